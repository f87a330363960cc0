"""A TLS server that answers byte for byte as a script says, and remembers every byte it was sent."""

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from tests.unit.egress.certificates import Issued

__all__ = ["BankServer", "Exchange", "Script", "http_answer"]

_PATIENCE_SECONDS = 20.0


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request and what the script does about it."""

    request: bytes
    number: int
    connection: ssl.SSLSocket
    stopping: threading.Event
    keep: bool = field(default=False)

    @property
    def head(self) -> str:
        return self.request.partition(b"\r\n\r\n")[0].decode("latin-1")

    @property
    def body(self) -> bytes:
        return self.request.partition(b"\r\n\r\n")[2]

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def reset(self) -> None:
        """RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close_raw()

    def close_plainly(self) -> None:
        """FIN without close_notify."""
        self._close_raw()

    def close_notify(self) -> None:
        with suppress(OSError, ValueError):
            self.connection.settimeout(1)
            self.connection.unwrap()
        self._close_raw()

    def stall(self) -> None:
        """Says nothing until the server is stopped or the peer hangs up."""
        self.connection.settimeout(0.05)
        while not self.stopping.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def _close_raw(self) -> None:
        # SSLSocket.close would do as well, but detach makes sure that nothing TLS is written.
        raw = socket.socket(fileno=self.connection.detach())
        raw.close()


Script = Callable[[Exchange], None]


def http_answer(status: int = 200, body: bytes = b"{}", headers: tuple[tuple[str, str], ...] = ()) -> bytes:
    lines = [f"HTTP/1.1 {status} Text", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode("latin-1") + body


class BankServer:
    """Serves on loopback while its `with` block runs. `requests` holds what came in, byte for byte."""

    def __init__(
        self,
        *,
        certificate: Issued,
        script: Script,
        client_ca_file: str | None = None,
        reads: bool = True,
        on_connect: Callable[[ssl.SSLSocket], None] | None = None,
    ) -> None:
        self.script = script
        self.requests: list[bytes] = []
        self.connections = 0
        self.failures: list[BaseException] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate.certificate_file, certificate.key_file)
        if client_ca_file is not None:
            self._context.load_verify_locations(client_ca_file)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._reads = reads
        self._on_connect = on_connect
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._stopping = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def context(self) -> ssl.SSLContext:
        return self._context

    @property
    def origin(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Hangs up and listens no more. Harmless when repeated."""
        self._stopping.set()
        self._listener.close()
        for connection in tuple(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_PATIENCE_SECONDS)
            assert not thread.is_alive()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        self._listener.settimeout(0.1)
        while not self._stopping.is_set():
            try:
                raw, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self._start(self._serve, raw)

    def _serve(self, raw: socket.socket) -> None:
        raw.settimeout(_PATIENCE_SECONDS)
        self._open.add(raw)
        try:
            with self._context.wrap_socket(raw, server_side=True) as connection:
                self._open.add(connection)
                self.connections += 1
                if self._on_connect is not None:
                    self._on_connect(connection)
                while self._serve_one(connection):
                    pass
                self._open.discard(connection)
        except (OSError, ValueError):
            pass  # peers hang up in the middle in these tests, and scripts close sockets
        finally:
            self._open.discard(raw)
            raw.close()

    def _serve_one(self, connection: ssl.SSLSocket) -> bool:
        request = self._read_request(connection) if self._reads else b""
        if request is None:
            return False
        self.requests.append(request)
        exchange = Exchange(request=request, number=len(self.requests), connection=connection, stopping=self._stopping)
        try:
            self.script(exchange)
        except OSError:
            return False
        except BaseException as error:
            self.failures.append(error)
            raise
        return exchange.keep and self._reads

    def _read_request(self, connection: ssl.SSLSocket) -> bytes | None:
        received = b""
        while b"\r\n\r\n" not in received:
            piece = connection.recv(65536)
            if not piece:
                if received:
                    self.requests.append(received)
                return None
            received += piece
        head, _, body = received.partition(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        while len(body) < length:
            piece = connection.recv(65536)
            if not piece:
                return None
            body += piece
        return head + b"\r\n\r\n" + body
