"""A TLS connection to a provider whose plaintext never waits anywhere.

asyncio's own TLS keeps a reference to plaintext that it could not write yet. Here the TLS engine is driven directly over two
memory BIOs: what is written is encrypted before `send` returns, only ciphertext is handed to the event loop (asyncio's or
uvloop's alike), and what arrives is decrypted into the caller's buffer. Rules:

- TLS 1.2 or newer, the provider's CA file only, host name checked, no key log, no compression, no renegotiation, no resumption.
- `send` hands ciphertext to the transport in one call, or raises NothingSent: then not one byte of it left.
- A request on a connection of its own does not outlive its deadline: what the provider has not acknowledged by then, or
  when the connection ends before the answer, the kernel drops, where it would go on sending for minutes.
- A connection on which the peer speaks unasked, or closes, while nothing is awaited is dead: its next answer could be
  somebody else's.
"""

import asyncio
import select
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol, cast

from sidecar.egress import codes
from sidecar.ipc.messages import ProviderTransport
from sidecar.secretbuffer import Buffer, wipe

__all__ = ["ConnectFailed", "ConnectionLost", "NothingSent", "TlsConnection", "open_connection", "tls_context"]

_CIPHERTEXT_BYTES = 32 * 1024
# struct linger: with a time of 0, close sends RST and drops what waits to be sent (socket(7)).
_CLOSE_DROPS: Final = struct.pack("ii", 1, 0)
_CLOSE_DELIVERS: Final = struct.pack("ii", 0, 0)


class ConnectFailed(Exception):
    """No connection; `code` is one of `codes`."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class NothingSent(Exception):
    """The connection was dead before anything was handed to it."""


class ConnectionLost(Exception):
    """The connection ended without a TLS close_notify: reset, alert, or plain close."""


def tls_context(transport: ProviderTransport) -> ssl.SSLContext:
    """The TLS settings of one origin. Raises OSError (ssl.SSLError among them) for files that are missing or no use."""
    # Not create_default_context: that one loads the system's CAs and honours SSLKEYLOGFILE.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = True
    context.hostname_checks_common_name = False
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    # CPython turns a missing close_notify into a proper end; an answer that was cut off must not look whole.
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    context.set_alpn_protocols(["http/1.1"])
    context.load_verify_locations(cafile=transport.ca_file)
    if transport.client_certificate_file:
        context.load_cert_chain(transport.client_certificate_file, transport.client_key_file or None)
    return context


async def open_connection(
    *, context: ssl.SSLContext, host: str, port: int, timeout_seconds: float, own: bool
) -> "TlsConnection":
    """Connected, with the handshake complete; `own` for one request only. Raises ConnectFailed."""
    connection: TlsConnection | None = None
    try:
        async with asyncio.timeout(timeout_seconds):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: TlsConnection(context=context, host=host, own=own), host, port
            )
            await connection.handshake()
    except BaseException as error:
        if connection is not None:
            connection.abort()
        if isinstance(error, Exception):
            raise ConnectFailed(_connect_code(error)) from None
        raise
    return connection


def _connect_code(error: Exception) -> str:
    match error:
        case TimeoutError():
            return codes.CONNECT_TIMED_OUT
        case ssl.SSLError() | ConnectionLost():
            return codes.TLS_FAILED
        case socket.gaierror() | UnicodeError():  # IDNA refuses labels that are too long with UnicodeError
            return codes.NAME_NOT_RESOLVED
        case OSError():
            return codes.CONNECT_FAILED
    raise error


class _Reader(Protocol):
    """What takes decrypted bytes: `feed` returns True when it needs no more."""

    def feed(self, data: memoryview) -> bool: ...

    def feed_end(self) -> None: ...


class TlsConnection(asyncio.BufferedProtocol):
    """Made by `open_connection`. One request at a time: `send`, then `receive`, then `close` or keep."""

    def __init__(self, *, context: ssl.SSLContext, host: str, own: bool) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._ciphertext = memoryview(bytearray(_CIPHERTEXT_BYTES))
        self._transport: asyncio.Transport | None = None
        self._arrival: asyncio.Future[None] | None = None
        self._awaited = True  # during the handshake; later only between `send` and the end of the answer
        self._peer_ended = False
        self.own = own
        self._on_death: Callable[[], None] | None = None

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing() and not self._peer_ended

    async def handshake(self) -> None:
        while not self._handshake_step():
            await self._more_ciphertext()
        self._awaited = False
        self._look_while_idle()

    async def settle(self) -> None:
        """Lets the event loop see what the kernel has already, so that `alive` tells what is known on this machine."""
        if self.alive and self._readable_now():
            # One turn to poll, one to run what the poll found.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def send(self, *parts: Buffer, within_seconds: float) -> None:
        """Encrypts `parts` and hands the ciphertext over in one call. Nothing refers to `parts` afterwards.

        On a connection of its own, what the provider has not acknowledged `within_seconds` is not sent again.
        Raises NothingSent when not one byte was handed over; the connection is of no use then.
        """
        transport = self._transport
        if transport is None or not self.alive:
            raise NothingSent
        try:
            for part in parts:
                self._encrypt(part)
            if self.own:
                self._bound_delivery(transport, within_seconds)
        except (ssl.SSLError, OSError):
            # The ciphertext made so far stays in the BIO and is never flushed.
            self.abort()
            raise NothingSent from None
        self._awaited = True
        transport.write(self._outgoing.read())

    @staticmethod
    def _bound_delivery(transport: asyncio.Transport, within_seconds: float) -> None:
        """Set before the first byte, so that it holds on every way to the end, this process's death among them."""
        peer = transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_DROPS)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # RFC 5482; Linux only
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(within_seconds * 1000)))

    async def receive(self, reader: _Reader, plaintext: memoryview) -> None:
        """Feeds decrypted bytes to `reader` until it has enough; each piece lies in `plaintext` only during `feed`.

        `reader.feed_end` is told of a close_notify. Raises ConnectionLost for any other end.
        """
        while True:
            count = self._decrypt_into(plaintext)
            if count is None:
                await self._more_ciphertext()
            elif count == 0:
                reader.feed_end()
                self._answer_is_complete()
                return
            elif self._fed(reader, plaintext[:count]):
                self._feed_rest(reader, plaintext)
                return

    def _feed_rest(self, reader: _Reader, plaintext: memoryview) -> None:
        """What has arrived behind the answer goes to the reader too, which refuses it."""
        self._answer_is_complete()
        try:
            count = self._decrypt_into(plaintext)
        except ConnectionLost:
            count = 0
        if count:
            self._fed(reader, plaintext[:count])
        elif count == 0:
            self._end()

    def _answer_is_complete(self) -> None:
        self._awaited = False
        if self.own and self._transport is not None:
            # The provider has the whole request, and a polite close does no harm any more.
            with suppress(OSError):
                self._transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_DELIVERS
                )

    @staticmethod
    def _fed(reader: _Reader, piece: memoryview) -> bool:
        try:
            return reader.feed(piece)
        finally:
            wipe(piece)

    def on_death(self, callback: Callable[[], None]) -> None:
        """Called once when an idle connection turns out to be of no use."""
        self._on_death = callback

    def close(self) -> None:
        """Says close_notify if there is room for it at once, and closes; before the end of an answer it only closes."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._awaited:
            transport.abort()
            return
        with suppress(ssl.SSLError, ValueError):  # the peer's own close_notify is not waited for
            self._tls.unwrap()
        self._flush()
        # A peer that reads nothing would keep a polite close waiting for ever.
        if transport.get_write_buffer_size():
            transport.abort()
        else:
            transport.close()

    def abort(self) -> None:
        """Closes at once; what was not yet given to the kernel is dropped."""
        if self._transport is not None:
            self._transport.abort()

    # -- the event loop's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not registered as such

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (the protocol's signature)
        return self._ciphertext

    def buffer_updated(self, nbytes: int) -> None:
        self._incoming.write(self._ciphertext[:nbytes])
        self._arrived()

    def eof_received(self) -> bool:
        self._peer_ended = True
        self._incoming.write_eof()
        self._arrived()
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (what it says is of no use to anybody)
        if not self._peer_ended:
            self.eof_received()

    def _arrived(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
        if not self._awaited:
            self._look_while_idle()

    async def _more_ciphertext(self) -> None:
        if self._peer_ended:
            raise ConnectionLost
        self._arrival = asyncio.get_running_loop().create_future()
        try:
            await self._arrival
        finally:
            self._arrival = None

    # -- the TLS engine

    def _handshake_step(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        finally:
            self._flush()
        return True

    def _encrypt(self, part: Buffer) -> None:
        with memoryview(part) as rest:
            done = 0
            while done < len(rest):
                with rest[done:] as piece:
                    done += self._tls.write(piece)

    def _decrypt_into(self, plaintext: memoryview) -> int | None:
        """How many bytes; 0 at close_notify; None when more ciphertext is needed."""
        try:
            return int(self._tls.read(len(plaintext), plaintext))
        except ssl.SSLWantReadError:
            self._flush()
            return None
        except ssl.SSLError:
            raise ConnectionLost from None

    def _look_while_idle(self) -> None:
        """Handles what needs no answer of ours (session tickets, key updates) and ends the connection on all else."""
        unasked = memoryview(bytearray(1))
        try:
            if self._decrypt_into(unasked) is None and not self._peer_ended:
                return
        except ConnectionLost:
            pass
        self._end()

    def _end(self) -> None:
        self.abort()
        if self._on_death is not None:
            callback, self._on_death = self._on_death, None
            callback()

    def _flush(self) -> None:
        pending = self._outgoing.read()
        if pending and self._transport is not None and not self._transport.is_closing():
            self._transport.write(pending)

    def _readable_now(self) -> bool:
        if self._transport is None:
            return False
        peer = self._transport.get_extra_info("socket")
        if peer is None or peer.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(peer.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
        return bool(poll.poll(0))
