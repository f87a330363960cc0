"""The gRPC servers: one per listener, because the listener is what gives a caller's identity its meaning.

A Unix socket is taken under a lock file first: two servers that bind one path both succeed, and the second silently wins.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from custody.v1 import (
    account_pb2_grpc,
    audit_pb2_grpc,
    consent_pb2_grpc,
    key_pb2_grpc,
    payment_pb2_grpc,
    provider_pb2_grpc,
    signing_pb2_grpc,
)
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from sidecar.config import ConfigurationError, Limits, Listener, Tls
from sidecar.gateway.boundary import Boundary
from sidecar.gateway.servicers.accounts import AccountServicer
from sidecar.gateway.servicers.audit import AuditServicer
from sidecar.gateway.servicers.consents import ConsentServicer
from sidecar.gateway.servicers.keys import KeyServicer
from sidecar.gateway.servicers.payments import PaymentServicer
from sidecar.gateway.servicers.providers import ProviderServicer
from sidecar.gateway.servicers.signing import SigningServicer
from sidecar.telemetry.logging import Log

__all__ = ["GrpcServers", "Servicers"]

_APPLICATION_SERVICES = (
    "custody.v1.ConsentService",
    "custody.v1.PaymentService",
    "custody.v1.AccountService",
    "custody.v1.SigningService",
    "custody.v1.ProviderService",
)
_ADMINISTRATION_SERVICES = ("custody.v1.KeyService", "custody.v1.AuditService")
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

# A connection is renewed, so that what was taken away from an identity does not live on in an old connection.
_CONNECTION_AGE_MS = 3_600_000
_CONNECTION_GRACE_MS = 60_000

# gRPC refuses without a reason what is larger than its own limit; up to here the boundary refuses with one.
_HEADROOM = 2
# sockaddr_un holds 108 bytes, one of them the NUL at the end (unix(7)).
_LONGEST_SOCKET_PATH_BYTES = 107
# Only "identity": a small compressed message can become a very large one, and nothing here is worth compressing.
_NO_COMPRESSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Servicers:
    consents: ConsentServicer
    payments: PaymentServicer
    accounts: AccountServicer
    signing: SigningServicer
    providers: ProviderServicer
    keys: KeyServicer
    audit: AuditServicer


class GrpcServers:
    """All listeners of the configuration, started and stopped together."""

    def __init__(
        self,
        *,
        listeners: Sequence[Listener],
        limits: Limits,
        servicers: Servicers,
        boundary_for: Callable[[Listener], Boundary],
        log: Log,
    ) -> None:
        self._log = log
        self._listeners = listeners
        self._limits = limits
        self._servicers = servicers
        self._boundary_for = boundary_for
        self._servers: list[grpc.aio.Server] = []
        self._locks: list[_SocketLock] = []
        self._health = _Health()
        self.ports: dict[str, int] = {}

    async def start(self) -> None:
        """Listens. Raises ConfigurationError for an address that cannot be taken; then nothing listens."""
        try:
            for listener in self._listeners:
                await self._start_one(listener)
        except BaseException:
            await self.stop(grace_seconds=0)
            raise
        for service in ("", *_APPLICATION_SERVICES, *_ADMINISTRATION_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def begin_to_stop(self) -> None:
        """Health says NOT_SERVING from now on, so that balancers and waiting clients look elsewhere."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, *, grace_seconds: float) -> None:
        """Refuses new calls at once; calls in flight have `grace_seconds`."""
        await asyncio.gather(*(server.stop(grace_seconds) for server in self._servers))
        for lock in self._locks:
            lock.release()
        self._servers.clear()
        self._locks.clear()

    async def _start_one(self, listener: Listener) -> None:
        server = grpc.aio.server(
            interceptors=[self._boundary_for(listener)],
            options=(
                ("grpc.max_receive_message_length", self._limits.message_bytes * _HEADROOM),
                ("grpc.compression_enabled_algorithms_bitset", _NO_COMPRESSION),
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.max_concurrent_streams", self._limits.concurrent_calls),
                ("grpc.max_connection_age_ms", _CONNECTION_AGE_MS),
                ("grpc.max_connection_age_grace_ms", _CONNECTION_GRACE_MS),
                ("grpc.so_reuseport", 0),
            ),
        )
        self._add_services(server, listener.surface)
        with self._socket_of(listener):
            try:
                port = self._bind(server, listener)
            except RuntimeError as error:
                raise ConfigurationError([f"listeners: {listener.address} cannot be taken"]) from error
            await server.start()
        self._servers.append(server)
        self.ports[listener.address] = port

    def _bind(self, server: grpc.aio.Server, listener: Listener) -> int:
        if listener.tls is None:
            return int(server.add_insecure_port(listener.address))
        return int(server.add_secure_port(listener.address, _credentials(listener.tls, self._log)))

    @contextmanager
    def _socket_of(self, listener: Listener) -> Iterator[None]:
        """Around the start of a Unix listener: the lock is held, and the socket is born with its mode, never wider."""
        if not listener.address.startswith("unix:"):
            yield
            return
        path = Path(listener.address.removeprefix("unix:"))
        if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH_BYTES:
            raise ConfigurationError([f"listeners: {path} is too long for a Unix socket"])
        self._locks.append(_SocketLock.taken(path))
        mode = int(listener.mode, 8)
        before = os.umask(0o777 & ~mode)
        try:
            yield
        finally:
            os.umask(before)
        path.chmod(mode)

    def _add_services(self, server: grpc.aio.Server, surface: str) -> None:
        consent_pb2_grpc.add_ConsentServiceServicer_to_server(self._servicers.consents, server)
        payment_pb2_grpc.add_PaymentServiceServicer_to_server(self._servicers.payments, server)
        provider_pb2_grpc.add_ProviderServiceServicer_to_server(self._servicers.providers, server)
        signing_pb2_grpc.add_SigningServiceServicer_to_server(self._servicers.signing, server)
        account_pb2_grpc.add_AccountServiceServicer_to_server(self._servicers.accounts, server)
        names = list(_APPLICATION_SERVICES)
        if surface == "admin":
            key_pb2_grpc.add_KeyServiceServicer_to_server(self._servicers.keys, server)
            audit_pb2_grpc.add_AuditServiceServicer_to_server(self._servicers.audit, server)
            names += _ADMINISTRATION_SERVICES
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names += [health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
        _add_reflection_v1(server, names)


class _Health(HealthServicer):  # type: ignore[misc]  # grpcio ships no types for it
    """gRPC's own, and the List that it lacks."""

    async def List(  # noqa: N802 - the method's name in the protocol
        self,
        request: health_pb2.HealthListRequest,  # noqa: ARG002
        context: "grpc.aio.ServicerContext[Any, Any]",  # noqa: ARG002
    ) -> health_pb2.HealthListResponse:
        statuses = {
            name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items() if name
        }
        return health_pb2.HealthListResponse(statuses=statuses)


def _add_reflection_v1(server: grpc.aio.Server, names: Sequence[str]) -> None:
    """grpcio ships reflection v1alpha only; newer tools ask for v1, whose messages are the same on the wire."""
    servicer = ReflectionServicer(service_names=names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_REFLECTION_V1, methods),))


def _credentials(tls: Tls, log: Log) -> grpc.ServerCredentials:
    """mTLS 1.2 or newer. The files are read again when they have changed: see `_Fetcher`."""
    fetcher = _Fetcher(tls=tls, log=log)  # looks at the files' times first: a change from here on is not missed
    configuration = _certificates(tls)
    return grpc.dynamic_ssl_server_credentials(
        configuration,
        fetcher,  # type: ignore[arg-type]  # the stubs do not know that None means "no change"
        require_client_authentication=True,
    )


class _Fetcher:
    """Gives gRPC certificates that have changed, None where they have not. Called in gRPC's own threads, once per handshake."""

    def __init__(self, *, tls: Tls, log: Log) -> None:
        self._tls = tls
        self._log = log
        self._seen = _change_times(tls)
        self._refused: tuple[int, ...] | None = None

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        seen = _change_times(self._tls)
        if seen == self._seen:
            return None
        try:
            fresh = _certificates(self._tls)
        except ConfigurationError:  # half-written files: the old ones go on, the next handshake looks again
            if seen != self._refused:
                self._refused = seen
                self._log.error("certificates_not_reloaded", path=self._tls.certificate_file)
            return None
        self._seen = seen
        self._log.info("certificates_reloaded", path=self._tls.certificate_file)
        return fresh


def _change_times(tls: Tls) -> tuple[int, ...]:
    try:
        return tuple(Path(name).stat().st_mtime_ns for name in (tls.certificate_file, tls.key_file, tls.client_ca_file))
    except OSError:
        return ()


def _certificates(tls: Tls) -> grpc.ServerCertificateConfiguration:
    try:
        certificate, key, ca = (
            Path(name).read_bytes() for name in (tls.certificate_file, tls.key_file, tls.client_ca_file)
        )
    except OSError as error:
        raise ConfigurationError([f"listeners: {error.filename} cannot be read ({error.strerror})"]) from error
    mistakes = list(_tls_mistakes(tls, certificate, key, ca))
    if mistakes:
        raise ConfigurationError([f"listeners: {mistake}" for mistake in mistakes])
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca)


def _tls_mistakes(tls: Tls, certificate: bytes, key: bytes, ca: bytes) -> Iterator[str]:
    """What gRPC would not say: it takes any bytes, and then refuses every handshake without a word."""
    try:
        x509.load_pem_x509_certificates(ca)
    except ValueError:
        yield f"{tls.client_ca_file} is no PEM certificate"
    try:
        private_key = load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        yield f"{tls.key_file} is no PEM private key without a password"
        return
    try:
        leaf = x509.load_pem_x509_certificates(certificate)[0]
    except ValueError:
        yield f"{tls.certificate_file} is no PEM certificate"
        return
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(*form) != private_key.public_key().public_bytes(*form):
        yield f"{tls.key_file} is not the key of {tls.certificate_file}"
    if not leaf.not_valid_before_utc <= datetime.now(UTC) < leaf.not_valid_after_utc:
        yield f"{tls.certificate_file} is not valid now"


class _SocketLock:
    """`PATH.lock`, held as long as the socket is served. The kernel lets go of it when the process ends, however it ends."""

    def __init__(self, *, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def taken(cls, path: Path) -> "_SocketLock":
        if path.exists() and not path.is_socket():
            raise ConfigurationError([f"listeners: {path} exists and is no socket"])
        try:
            if path.parent.stat().st_mode & 0o002:
                raise ConfigurationError([f"listeners: everybody may write to the folder of {path}"])
            descriptor = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigurationError([f"listeners: {path} cannot be made ({error.strerror})"]) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise ConfigurationError([f"listeners: another process serves {path}"]) from error
        return cls(descriptor=descriptor)

    def release(self) -> None:
        os.close(self._descriptor)
