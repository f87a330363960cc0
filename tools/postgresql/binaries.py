"""Finds PostgreSQL's server programs, or fetches them. Standard library only: the set-up uses it before anything is installed.

Rules this module keeps:

- `find_binaries` only looks. `ensure_binaries` may install: as root with apt, otherwise by unpacking Debian's packages into the
  project's own `.cache/postgresql`, never with sudo.
- Installing makes and starts no server: Debian's package would begin a cluster of its own.
- `$POSTGRESQL_BIN` is the operator's word: if it is set and wrong that is an error, not a reason to look elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from softhsm.debian import DebianError, install, run, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Binaries", "PostgresqlMissingError", "cache_directory", "ensure_binaries", "find_binaries"]

BIN_VARIABLE = "POSTGRESQL_BIN"
OLDEST_MAJOR = 13

_NEEDED = ("initdb", "postgres", "pg_ctl", "pg_basebackup")
_TRIAL_DEADLINE_SECONDS = 30
_NO_CLUSTER = Path("/etc/postgresql-common/createcluster.conf")


class PostgresqlMissingError(Exception):
    """There is no PostgreSQL server to run; the message says what to type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binaries:
    """The folder of the server's programs, and what they need in their environment."""

    directory: Path
    libraries: tuple[Path, ...] = field(default=())

    def environment(self) -> dict[str, str]:
        if not self.libraries:
            return {}
        return {"LD_LIBRARY_PATH": ":".join(map(str, self.libraries))}


def find_binaries(*, environ: Mapping[str, str] | None = None, cache: Path | None = None) -> Binaries:
    """Installed or unpacked programs that run. Raises PostgresqlMissingError."""
    chosen = (os.environ if environ is None else environ).get(BIN_VARIABLE)
    if chosen:
        binaries = Binaries(directory=Path(chosen))
        if not _runs(binaries):
            raise PostgresqlMissingError(f"${BIN_VARIABLE} names {chosen}, which holds no PostgreSQL server that runs.")
        return binaries
    for binaries in _candidates(cache or cache_directory()):
        if _runs(binaries):
            return binaries
    raise PostgresqlMissingError(f"PostgreSQL's server is not installed. {_how_to_install()}")


def ensure_binaries(*, cache: Path | None = None) -> Binaries:
    """Fetches them first where there are none. Raises PostgresqlMissingError with the one line to type."""
    try:
        return find_binaries(cache=cache)
    except PostgresqlMissingError:
        if os.environ.get(BIN_VARIABLE):
            raise
    if shutil.which("apt-get") is None:
        _refuse("this system has no apt-get")
    if os.geteuid() != 0 or not _install():
        try:
            unpack(cache or cache_directory(), _missing_packages)
        except DebianError as error:
            _refuse(str(error))
    return find_binaries(cache=cache)


def cache_directory() -> Path:
    """Where a server that is not installed is unpacked: inside the project, ignored by git."""
    return Path(__file__).resolve().parents[2] / ".cache" / "postgresql"


def _candidates(cache: Path) -> Iterator[Binaries]:
    """The newest first: Debian and Ubuntu, Fedora, Homebrew, then our own unpacked copy."""
    yield from (Binaries(directory=path) for path in _versions(Path("/usr/lib/postgresql")))
    yield Binaries(directory=Path("/usr/bin"))
    for prefix in (Path("/opt/homebrew/opt"), Path("/usr/local/opt"), Path("/usr/pgsql-17"), Path("/usr/pgsql-16")):
        yield from (Binaries(directory=path) for path in (*sorted(prefix.glob("postgresql@*/bin")), prefix / "bin"))
    libraries = tuple(sorted((cache / "usr/lib").glob("*-linux-*")))
    yield from (Binaries(directory=path, libraries=libraries) for path in _versions(cache / "usr/lib/postgresql"))


def _versions(directory: Path) -> list[Path]:
    majors = [path for path in directory.glob("*/bin") if path.parent.name.isdecimal()]
    return sorted(majors, key=lambda path: -int(path.parent.name))


def _runs(binaries: Binaries) -> bool:
    """Whether all programs are there, the loader takes the server, and it is new enough."""
    if not all((binaries.directory / name).is_file() for name in _NEEDED):
        return False
    try:
        done = subprocess.run(
            [str(binaries.directory / "postgres"), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, **binaries.environment()},
            timeout=_TRIAL_DEADLINE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    version = re.search(r" (\d+)", done.stdout)
    return done.returncode == 0 and version is not None and int(version[1]) >= OLDEST_MAJOR


def _install() -> bool:
    if not _NO_CLUSTER.exists():  # dpkg keeps a configuration file that it finds
        _NO_CLUSTER.parent.mkdir(parents=True, exist_ok=True)
        _NO_CLUSTER.write_text("create_main_cluster = false\n")
    return install("postgresql")


def _missing_packages(options: Sequence[str]) -> list[str]:
    """What an installation would add, by a dry run of it: the server and the libraries that this machine lacks."""
    plan = run(["apt-get", *options, "install", "--simulate", "--no-install-recommends", "postgresql"])
    return re.findall(r"^Inst (\S+)", plan or "", re.MULTILINE)


def _refuse(reason: str) -> NoReturn:
    raise PostgresqlMissingError(f"PostgreSQL's server is not installed, and {reason}. {_how_to_install()}")


def _how_to_install() -> str:
    command = "sudo apt-get install postgresql"
    if shutil.which("apt-get") is None:
        command = "brew install postgresql@17" if shutil.which("brew") else "sudo dnf install postgresql-server"
    return f"Install it ({command}), or set {BIN_VARIABLE} to the folder of its programs."
