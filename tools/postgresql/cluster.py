"""A PostgreSQL server in a temporary folder: for tests and for `make run STORE=postgresql`.

Rules: it listens on a Unix socket in a folder that only we can enter, and on loopback where it is asked to; it ends when the
process that started it ends, however that ends; every wait is bounded. Its durability is the real one: the sidecar refuses less.
"""

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg

from tools.postgresql.binaries import Binaries, find_binaries

__all__ = ["OWNER", "SIDECAR", "ClusterError", "ScratchCluster"]

OWNER = "custody_owner"
SIDECAR = "custody_sidecar"

_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1
_ROOM_BYTES = 2 << 30
_PORT = 5432  # of loopback only where `listen_addresses` says so; else a part of the socket's name

# The two roles of docs/store.md. Who may enter the socket's folder is who we are: nobody else can.
_HBA = "local all all trust\nlocal replication all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n"
_SETTINGS: Mapping[str, str] = {
    "shared_buffers": "16MB",
    "max_connections": "60",
    "dynamic_shared_memory_type": "posix",
    "lc_messages": "C",
    "max_wal_senders": "6",
}


class ClusterError(Exception):
    """The server did not start or stop; the text says what it said."""


@dataclass(slots=True, kw_only=True)
class ScratchCluster(AbstractContextManager["ScratchCluster"]):
    """Made by `create`, running; `stop` and `start` as often as one likes; `remove` leaves nothing."""

    binaries: Binaries
    directory: Path
    settings: dict[str, str] = field(default_factory=dict)
    _process: "subprocess.Popen[bytes] | None" = None

    @classmethod
    def create(
        cls,
        *,
        settings: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        parent: Path | None = None,
    ) -> Self:
        """A new cluster in a temporary folder, running. `files` are put into its data folder, for it alone to read. `parent` is
        where that folder is made: on a disk, where it matters what a commit costs."""
        cluster = cls(
            binaries=find_binaries(),
            directory=_new_folder() if parent is None else Path(tempfile.mkdtemp(prefix="pg-", dir=parent)),
            settings={**_SETTINGS, **(settings or {})},
        )
        try:
            cluster.initialise(files or {})
            cluster.start()
        except BaseException:
            cluster.remove()
            raise
        return cluster

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def sockets(self) -> Path:
        return self.directory / "s"

    @property
    def log_file(self) -> Path:
        return self.directory / "log"

    @property
    def port(self) -> int:
        return int(self.settings.get("port", _PORT))

    def initialise(self, files: Mapping[str, bytes]) -> None:
        _give(self.directory)
        self._run("initdb", "--pgdata", str(self.data), "--username", "postgres", "--auth", "trust", *_INITDB)
        for name, content in {"pg_hba.conf": _HBA.encode(), **files}.items():
            path = self.data / name
            path.touch(0o600)
            path.write_bytes(content)
            _give(path)
        settings, self.settings = self.settings, dict(_SETTINGS)
        self.start()
        try:
            with self.connect() as connection:
                for role in (OWNER, SIDECAR):
                    connection.execute(f"CREATE ROLE {role} LOGIN")
        finally:
            self.stop()
            self.settings = settings

    def start(self) -> None:
        """Returns when it takes connections. Raises ClusterError."""
        self.sockets.mkdir(exist_ok=True, mode=0o700)
        _give(self.sockets)
        flags = [text for name, value in self._settings().items() for text in ("-c", f"{name}={value}")]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self.binaries.directory / "postgres"), "-D", str(self.data), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                preexec_fn=_end_with_us,
                **self._identity(),
            )
        end = time.monotonic() + _SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop(immediate=True)
                raise ClusterError(f"PostgreSQL did not start: {self.last_words()}")
            time.sleep(0.02)

    def stop(self, *, immediate: bool = False) -> None:
        """Fast: connections are ended. Immediate: as in a crash."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def remove(self) -> None:
        self.stop(immediate=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def replica(self) -> "ScratchCluster":
        """A standby of this cluster, running, in a folder of its own."""
        standby = ScratchCluster(binaries=self.binaries, directory=_new_folder(), settings=dict(self.settings))
        _give(standby.directory)
        source = f"host={self.sockets} port={self.port} user=postgres application_name=standby"
        self._run(
            *("pg_basebackup", "--pgdata", str(standby.data), "--dbname", source),
            *("--write-recovery-conf", "--checkpoint", "fast", "--wal-method", "stream"),
        )
        standby.start()
        return standby

    def connect(self, database: str = "postgres", *, role: str = "postgres") -> "psycopg.Connection[Any]":
        """For whoever sets things up or looks behind the sidecar's back."""
        return psycopg.connect(
            host=str(self.sockets), port=self.port, user=role, dbname=database, autocommit=True, connect_timeout=10
        )

    def url(self, database: str, *, role: str = SIDECAR) -> str:
        """By the local socket."""
        return f"postgresql://{role}@/{database}?host={self.sockets}&port={self.port}"

    def create_database(self, *, template: str = "template0", owner: str = OWNER) -> str:
        """Its name. The owner of the schema may use it, the sidecar's role may connect."""
        name = f"custody_{secrets.token_hex(6)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name} OWNER {owner} TEMPLATE {template}")
        return name

    def last_words(self) -> str:
        return " | ".join(self.log_file.read_text(errors="replace").splitlines()[-4:])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except psycopg.Error:
            return False
        return True

    def _settings(self) -> dict[str, str]:
        return {
            "listen_addresses": "",
            "port": str(self.port),
            "unix_socket_directories": str(self.sockets),
            "unix_socket_permissions": "0700",
            **self.settings,
        }

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.binaries.directory / program), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            cwd="/",
            check=False,
            **self._identity(),
        )
        if done.returncode != 0:
            raise ClusterError(f"{program} failed: {done.stderr.strip() or done.stdout.strip()}")

    def _identity(self) -> dict[str, Any]:
        """PostgreSQL refuses to run as root: then another user does it for us."""
        environment = {**os.environ, **self.binaries.environment(), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        if os.geteuid() != 0:
            return {"env": environment}
        user = _other_user()
        return {"env": environment, "user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


_INITDB = ("--no-sync", "--no-instructions", "--encoding", "UTF8", "--locale", "C.UTF-8")


def _new_folder() -> Path:
    """In memory where there is room: what a power cut would take is thrown away anyway."""
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder that is ours alone
    has_room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM_BYTES
    return Path(tempfile.mkdtemp(prefix="pg-", dir=memory if has_room else None))


def _give(path: Path) -> None:
    if os.geteuid() == 0:
        user = _other_user()
        os.chown(path, user.pw_uid, user.pw_gid)


def _other_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ClusterError("there is no user other than root that PostgreSQL could run as: postgres or nobody")


def _end_with_us() -> None:
    """In the child: the kernel stops it at once when the thread that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)
