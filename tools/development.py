"""A whole custody system on this machine, for development: token and keys, sandbox bank, configuration, sidecar.

Used by `make run`, by the end-to-end tests and by the benchmarks, so that all three run the same thing. Rules: everything lies in
one folder; nothing listens but on loopback; no PIN, key or token passes through here; what was started is ended by its handle.
"""

import base64
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import yaml
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from sandbox.testing import SandboxProcess
from softhsm.setup import TokenConfiguration, ensure_token
from tools.postgresql.cluster import OWNER, SIDECAR, ScratchCluster

__all__ = ["CLIENT_ID", "Development", "DevelopmentError", "SidecarProcess", "free_port"]

CLIENT_ID = "PSDDE-BAFIN-000000"
_ROOT = Path(__file__).resolve().parent.parent
_SOCKET_PATH_BYTES = 100

Report = Callable[[str], None]


class DevelopmentError(Exception):
    """A part of the development system did not start; the text says which and what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Development(AbstractContextManager["Development"]):
    """The system's parts in `directory`. Made by `prepare`; `start_bank` and `start_sidecar` start its processes.

    `descriptor` is the bank's: sandbox-bank (class C), sandbox-bank-idempotent (class A) or sandbox-bank-lookup (class B).
    """

    directory: Path
    token: TokenConfiguration
    keys_file: Path
    redirect_port: int
    sockets: Path
    descriptor: str = "sandbox-bank"
    bank_arguments: tuple[str, ...] = ()
    access_token_seconds: int = 300
    postgresql: "ScratchDatabase | None" = None
    _running: list["SandboxProcess | SidecarProcess | ScratchDatabase"] = field(default_factory=list)

    @classmethod
    def prepare(
        cls,
        directory: Path,
        *,
        report: Report = lambda _: None,
        descriptor: str = "sandbox-bank",
        bank_arguments: Sequence[str] = (),
        redirect_port: int = 0,
        store: str = "sqlite",
    ) -> Self:
        """Token, keys, certificates: made where they are missing, kept where they are there. With the store `postgresql` a scratch
        server runs, too."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        token = ensure_token(directory / "hsm", label="custody-development")
        report(f"development HSM token '{token.token_label}' (serial {token.serial})")
        keys_file = directory / "keys.json"
        if not keys_file.exists():
            _provision(token, keys_file)
        for key in _descriptions(keys_file):
            report(f"key {key['label']} ({key['key_type']}-{key['size_bits']}) in the HSM, not extractable")
        port = redirect_port or _kept_port(directory / "redirect-port")
        development = cls(
            directory=directory,
            token=token,
            keys_file=keys_file,
            redirect_port=port,
            sockets=_socket_folder(directory),
            descriptor=descriptor,
            bank_arguments=tuple(bank_arguments),
            postgresql=ScratchDatabase.start() if store == "postgresql" else None,
        )
        if development.postgresql is not None:
            development._running.append(development.postgresql)
            report(
                f"PostgreSQL runs, with a role that owns the schema and one for the sidecar: {development.postgresql.url}"
            )
        development._initialise_bank()
        return development

    def public_key_pem(self, purpose: str) -> bytes:
        """The public half of the key of this purpose, such as `audit`."""
        description = next(key for key in _descriptions(self.keys_file) if key["purpose"] == purpose)
        return _public_key(description).public_bytes(*_PEM)

    @property
    def redirect_uri(self) -> str:
        return f"http://127.0.0.1:{self.redirect_port}/callback"

    @property
    def bank_directory(self) -> Path:
        return self.directory / "bank"

    @property
    def log_file(self) -> Path:
        return self.directory / "sidecar.log"

    @property
    def database(self) -> Path:
        return self.directory / "custody.db"

    @property
    def address(self) -> str:
        return f"unix:{self.sockets / 'api.sock'}"

    @property
    def admin_address(self) -> str:
        return f"unix:{self.sockets / 'admin.sock'}"

    def start_bank(self, *, duration_seconds: float | None = 3600.0) -> SandboxProcess:
        arguments = list(self.bank_arguments)
        if self.descriptor == "sandbox-bank-idempotent":
            arguments += ["--idempotency", "header"]
        if self.descriptor == "sandbox-bank-lookup":
            arguments += ["--payment-lookup"]
        arguments += ["--frequency-per-day", "1000", "--port", str(_kept_port(self.directory / "bank-port"))]
        bank = SandboxProcess.start(
            self.bank_directory,
            arguments=arguments,
            duration_seconds=duration_seconds,
            log=self.directory / "bank.log",
        )
        self._running.append(bank)
        return bank

    def start_sidecar(self, bank: SandboxProcess, *, changes: Mapping[str, Any] | None = None) -> "SidecarProcess":
        """Writes the configuration for this bank and starts a sidecar on it. `changes` replace top-level keys."""
        port = free_port()
        configuration = {**self.configuration(bank, operations_port=port), **(changes or {})}
        (self.directory / "policy.yaml").write_text(yaml.safe_dump(self.policy(), sort_keys=False))
        config_file = self.directory / "custody.yaml"
        config_file.write_text(yaml.safe_dump(configuration, sort_keys=False))
        sidecar = SidecarProcess.start(
            config_file, operations_port=port, environment=self.token.environment(), log_file=self.log_file
        )
        self._running.append(sidecar)
        return sidecar

    def configuration(self, bank: SandboxProcess, *, operations_port: int) -> dict[str, Any]:
        """The whole configuration of a development sidecar, as plain values."""
        layout = bank.layout
        return {
            "cluster": "development",
            "listeners": [
                {"address": self.address, "surface": "api", "workload": "shop"},
                {"address": self.admin_address, "surface": "admin", "workload": "operator"},
            ],
            "operations_address": f"127.0.0.1:{operations_port}",
            "policy_file": str(self.directory / "policy.yaml"),
            "store": self._store(),
            "hsm": {
                "module_path": str(self.token.module_path),
                "token_label": self.token.token_label,
                "token_serial": self.token.serial,
                "pin_file": str(self.token.pin_file),
                "keys_file": str(self.keys_file),
            },
            "providers": [
                {
                    "id": "sandbox-bank",
                    "descriptor": self.descriptor,
                    "ca_file": str(layout.ca_certificate),
                    "client_certificate_file": str(layout.tpp_certificate),
                    "client_key_file": str(layout.tpp_key),
                    "allow_client_key_file": True,
                    "signing_certificate_file": str(layout.signing_certificate),
                    "variables": self._variables(bank),
                }
            ],
        }

    def database_files(self) -> Iterator[Path]:
        """All that the database has on disk, the server's logs of changes included."""
        if self.postgresql is None:
            yield from self.directory.glob("custody.db*")
        else:
            yield from (path for path in self.postgresql.cluster.data.rglob("*") if path.is_file())

    def _store(self) -> dict[str, str]:
        if self.postgresql is None:
            return {"path": str(self.database)}
        return {"url": self.postgresql.url, "instance": "development"}

    def policy(self) -> dict[str, Any]:
        """What the example application and the operator may do."""
        return {
            "workloads": [
                {
                    "workload": "workload:shop",
                    "roles": ["application"],
                    "purposes": ["accounts", "balances", "transactions", "payments", "signing"],
                    "providers": ["sandbox-bank"],
                    "owners": "any",
                    "imports": True,
                    "payment_limits": [{"currency_code": "EUR", "amount": "10000.00"}],
                },
                {"workload": "workload:operator", "roles": ["administrator", "auditor"]},
            ]
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends what was started, the newest first."""
        while self._running:
            self._running.pop().stop()

    def _variables(self, bank: SandboxProcess) -> dict[str, str]:
        """The bank's addresses, pinned: the sidecar discovers nothing at run time."""
        document = _metadata(bank)
        mtls = document["mtls_endpoint_aliases"]
        return {
            "api_uri": bank.info.api_base_url.removesuffix("/v1"),
            "issuer": document["issuer"],
            "authorization_endpoint": document["authorization_endpoint"],
            "pushed_authorization_request_endpoint": mtls["pushed_authorization_request_endpoint"],
            "token_endpoint": mtls["token_endpoint"],
            "revocation_endpoint": mtls["revocation_endpoint"],
            "client_id": CLIENT_ID,
            "redirect_uri": self.redirect_uri,
        }

    def _initialise_bank(self) -> None:
        client_key = next(k for k in _descriptions(self.keys_file) if k["purpose"] == "client-authentication")
        jwks = self.directory / "client-jwks.json"
        jwks.write_text(json.dumps({"keys": [_jwk(client_key)]}))
        signing_key = self.directory / "request-signing.pem"
        signing_key.write_bytes(self.public_key_pem("request-signing"))
        _run(
            "sandbox",
            {
                "directory": self.bank_directory,
                "client-id": CLIENT_ID,
                "client-jwks": jwks,
                "redirect-uri": self.redirect_uri,
                "request-signing-public-key": signing_key,
            },
            command="init",
            what="the sandbox bank's set-up",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchDatabase:
    """A PostgreSQL server in a temporary folder, with one migrated database."""

    cluster: ScratchCluster
    url: str

    @classmethod
    def start(cls) -> Self:
        cluster = ScratchCluster.create()
        try:
            name = cluster.create_database()
            _run(
                "sidecar.store.migrate",
                {"url": cluster.url(name, role=OWNER), "grant": SIDECAR},
                what="the migration of the database",
            )
        except BaseException:
            cluster.remove()
            raise
        return cls(cluster=cluster, url=cluster.url(name))

    def stop(self) -> None:
        self.cluster.remove()


class SidecarProcess:
    """A running sidecar. `stop` is what Kubernetes does: SIGTERM, and some seconds."""

    def __init__(self, *, process: "subprocess.Popen[bytes]", operations_port: int, log_file: Path) -> None:
        self.process = process
        self.operations_port = operations_port
        self.log_file = log_file

    @classmethod
    def start(
        cls,
        config_file: Path,
        *,
        operations_port: int,
        environment: Mapping[str, str],
        log_file: Path,
        ready_within_seconds: float = 60.0,
    ) -> Self:
        """Starts it and waits until it has become ready. Raises DevelopmentError with what it said, when it does not."""
        with log_file.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sidecar", "--config", str(config_file)],
                cwd=_ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        sidecar = cls(process=process, operations_port=operations_port, log_file=log_file)
        try:
            sidecar.wait_until("/startup", within_seconds=ready_within_seconds)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return sidecar

    @property
    def pid(self) -> int:
        return self.process.pid

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a path of the operations port."""
        connection = http.client.HTTPConnection("127.0.0.1", self.operations_port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def wait_until(self, path: str, *, within_seconds: float) -> None:
        end = time.monotonic() + within_seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise DevelopmentError(f"the sidecar ended with {self.process.returncode}: {self.last_words()}")
            try:
                if self.get(path)[0] == 200:
                    return
            except OSError:
                pass  # not listening yet
            time.sleep(0.02)
        raise DevelopmentError(f"the sidecar was not ready within {within_seconds} s: {self.last_words()}")

    def last_words(self) -> str:
        return " | ".join(self.log_file.read_text(errors="replace").splitlines()[-4:])

    def stop(self, *, within_seconds: float = 20.0) -> int:
        """Ends it and returns its exit status; one that does not end in time is killed."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


_PEM = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _metadata(bank: SandboxProcess) -> dict[str, Any]:
    """The authorization server's metadata (RFC 8414), read once, here, by the operator's hand."""
    issuer = urlsplit(bank.info.issuer)
    context = ssl.create_default_context(cafile=str(bank.info.ca_file))
    connection = http.client.HTTPSConnection(issuer.hostname or "", issuer.port, timeout=10, context=context)
    try:
        connection.request("GET", "/.well-known/oauth-authorization-server")
        document: dict[str, Any] = json.loads(connection.getresponse().read())
        return document
    finally:
        connection.close()


def _provision(token: TokenConfiguration, keys_file: Path) -> None:
    """In a process of its own: the one that loads the PKCS#11 module must never be forked."""
    _run(
        "sidecar.hsm.provisioning",
        {
            "module": token.module_path,
            "token-label": token.token_label,
            "token-serial": token.serial,
            "pin-file": token.pin_file,
            "output": keys_file,
        },
        what="making the keys",
        environment=token.environment(),
    )


def _run(
    module: str,
    options: Mapping[str, object],
    *,
    what: str,
    command: str = "",
    environment: Mapping[str, str] | None = None,
) -> None:
    """Runs a module of ours as a command. Raises DevelopmentError with what it said, when it fails."""
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", module, *([command] if command else []), *flags],
        cwd=_ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        raise DevelopmentError(f"{what} failed: {done.stderr.strip() or done.stdout.strip()}")


def _descriptions(keys_file: Path) -> list[dict[str, Any]]:
    descriptions: list[dict[str, Any]] = json.loads(keys_file.read_text())["descriptions"]
    return descriptions


def _public_key(description: Mapping[str, Any]) -> EllipticCurvePublicKey:
    key = load_der_public_key(base64.b64decode(description["spki_der"]))
    if not isinstance(key, EllipticCurvePublicKey):
        raise DevelopmentError(f"{description['label']} is no elliptic-curve key")
    return key


def _jwk(description: Mapping[str, Any]) -> dict[str, str]:
    numbers = _public_key(description).public_numbers()
    coordinates = {name: _base64url(value.to_bytes(32, "big")) for name, value in (("x", numbers.x), ("y", numbers.y))}
    return {"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": description["key_id"], **coordinates}


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _kept_port(file: Path) -> int:
    """The port of the last run, if it is free; sealed tokens name the bank's origin, and a new port would orphan them."""
    if file.exists():
        port = int(file.read_text())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pass
            else:
                return port
    port = free_port()
    file.write_text(str(port))
    return port


def _socket_folder(directory: Path) -> Path:
    """`directory` itself, or a short folder of its own where a Unix socket's path would be too long for the kernel."""
    if len(os.fsencode(directory / "admin.sock")) <= _SOCKET_PATH_BYTES:
        return directory
    return Path(tempfile.mkdtemp(prefix="custody-"))
