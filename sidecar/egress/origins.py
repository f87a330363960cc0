"""The origins that egress may talk to. What is not in the settings does not exist."""

import ssl
from collections.abc import Sequence

from sidecar.egress import codes
from sidecar.egress.connection import ConnectFailed, TlsConnection, open_connection, tls_context
from sidecar.egress.deadline import Deadline
from sidecar.egress.pool import ConnectionPool
from sidecar.egress.requests import split_origin
from sidecar.errors import Unavailable
from sidecar.ipc.messages import EgressSettings, ProviderTransport

__all__ = ["Origin", "Origins"]


class Origin:
    def __init__(self, *, transport: ProviderTransport, connect_timeout_seconds: float, limit: int) -> None:
        self.provider = transport.provider
        host, self._port = split_origin(transport.origin)
        self._host = host.strip("[]")
        self._context: ssl.SSLContext = tls_context(transport)
        self._connect_timeout_seconds = connect_timeout_seconds
        self._pool = ConnectionPool(connect=lambda: self._connect(own=False), limit=limit)

    async def connect(self) -> TlsConnection:
        """A connection of its own. Raises ConnectFailed."""
        return await self._connect(own=True)

    async def take(self, *, own: bool, deadline: Deadline) -> TlsConnection:
        """A new connection, or one of the kept ones; `give_back` it. Raises ConnectFailed."""
        try:
            async with deadline.timeout():
                return await (self.connect() if own else self._pool.acquire())
        except TimeoutError:
            raise ConnectFailed(codes.DEADLINE_BEFORE_SEND) from None

    def give_back(self, connection: TlsConnection, *, keep: bool) -> None:
        """`keep` says that it may serve another request; one of its own is closed all the same."""
        if connection.own:
            connection.close()
        else:
            self._pool.release(connection, keep=keep)

    async def _connect(self, *, own: bool) -> TlsConnection:
        return await open_connection(
            context=self._context,
            host=self._host,
            port=self._port,
            timeout_seconds=self._connect_timeout_seconds,
            own=own,
        )

    def close(self) -> None:
        self._pool.close()


class Origins:
    """Raises OSError or Internal for settings that are no use."""

    def __init__(self, settings: EgressSettings) -> None:
        self._origins: dict[str, Origin] = {}
        for transport in settings.transports:
            if transport.origin in self._origins:
                raise ValueError("an origin is configured twice")
            self._origins[transport.origin] = Origin(
                transport=transport,
                connect_timeout_seconds=settings.connect_timeout_seconds,
                limit=settings.connections_per_origin,
            )

    def find(self, origin: str) -> Origin:
        """Raises Unavailable: an operator who configures the origin makes the same request possible."""
        found = self._origins.get(origin)
        if found is None:
            raise Unavailable("PROVIDER_UNAVAILABLE", "the provider's origin is not configured")
        return found

    def same_provider(self, origins: Sequence[str]) -> bool:
        """Whether all of them are configured, for one and the same provider."""
        providers = {self._origins[origin].provider if origin in self._origins else None for origin in origins}
        return len(providers) == 1 and None not in providers

    def close(self) -> None:
        for origin in self._origins.values():
            origin.close()
