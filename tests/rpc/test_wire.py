"""What is sent to the port and is no call: the sidecar does not answer it, does not grow by it, and serves the next caller."""

import gzip
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from tests.rpc.calls import Method, call, contract_methods, valid
from tests.rpc.conftest import OWN_CONNECTION, Rpc

METHODS = {str(method): method for method in contract_methods()}
MIB = 1024 * 1024
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.fixture(autouse=True)
def _serves_the_next_caller(rpc: Rpc) -> Iterator[None]:
    """After each of these tests: the same process serves, without a restart, within a bound of memory."""
    process = psutil.Process(rpc.system.sidecar.pid)
    before = process.memory_info().rss
    yield
    assert call(rpc.application, METHODS["ListProviders"]).code is grpc.StatusCode.OK
    assert call(rpc.as_workload("application"), METHODS["ListProviders"]).code is grpc.StatusCode.OK
    assert process.is_running()
    assert process.memory_info().rss - before < 64 * MIB


NO_HTTP2 = {
    "nothing": b"",
    "a line": b"hello\r\n",
    "HTTP/1.1": b"POST /custody.v1.PaymentService/InitiatePayment HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    "noise": bytes((7 * number) % 256 for number in range(4096)),
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "half a preface": PREFACE[:10],
    "a preface and noise": PREFACE + bytes((7 * number) % 256 for number in range(4096)),
    "a frame of 16 MiB": PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(100_000),
    "an unknown frame": PREFACE + SETTINGS + b"\x00\x00\x01\xfe\x00\x00\x00\x00\x01x",
    "headers that do not decompress": PREFACE + SETTINGS + b"\x00\x00\x04\x01\x05\x00\x00\x00\x01\xff\xff\xff\xff",
    "data without a call": PREFACE + SETTINGS + b"\x00\x00\x04\x00\x01\x00\x00\x00\x01abcd",
    "a stream with an even number": PREFACE + SETTINGS + b"\x00\x00\x01\x01\x05\x00\x00\x00\x02\x82",
    "1000 settings": PREFACE + SETTINGS * 1000,
    "1000 resets": PREFACE + SETTINGS + b"\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x08" * 1000,
}


@pytest.mark.parametrize("what", NO_HTTP2)
def test_no_http2(rpc: Rpc, what: str) -> None:
    """Bytes that are no gRPC, on the Unix socket and on the TLS port: the connection ends, and nothing else does."""
    before = rpc.rows()
    for address in (rpc.system.development.address, rpc.addresses["tcp-api"]):
        with _connected(address) as raw:
            try:
                raw.sendall(NO_HTTP2[what])
                raw.settimeout(0.3)
                answer = raw.recv(65536)
            except (TimeoutError, ConnectionError):
                continue
            assert b"custody" not in answer

    assert rpc.rows() == before


@pytest.mark.parametrize("length", [2**32 - 1, 2**31, 300_000], ids=["4 GiB", "2 GiB", "over the limit"])
def test_length_prefix_beyond_the_limit(rpc: Rpc, length: int) -> None:
    """A message that says it is larger than is taken is refused before it has come, and no room is made for it."""
    with _connected(rpc.system.development.address) as raw:
        raw.sendall(
            PREFACE + SETTINGS + _headers(METHODS["ListProviders"]) + _data(b"\x00" + struct.pack(">I", length))
        )
        raw.settimeout(2)
        with suppress(TimeoutError):
            raw.recv(65536)


def test_message_over_the_limit(rpc: Rpc) -> None:
    """One byte more than is taken, and up to twice as much, is refused with a reason; nothing is parsed."""
    limit = 262_144
    for size in (limit + 1, limit * 2 - 10):
        outcome = call(rpc.application, METHODS["Sign"], b"\x2a" + _varint(size - 4) + bytes(size - 4))
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
        assert dict(outcome.info.metadata) == {"limitBytes": str(limit)}


def test_message_far_over_the_limit(rpc: Rpc) -> None:
    """Beyond that gRPC itself refuses, with the same code."""
    assert call(rpc.application, METHODS["Sign"], bytes(8 * MIB)).code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_compressed_message(rpc: Rpc) -> None:
    """A small message that would become a large one is not unpacked at all."""
    bomb = gzip.compress(bytes(64 * MIB))
    frame = b"\x01" + struct.pack(">I", len(bomb)) + bomb
    with _connected(rpc.system.development.address) as raw:
        raw.sendall(PREFACE + SETTINGS + _headers(METHODS["ListProviders"], (b"grpc-encoding", b"gzip")))
        for start in range(0, len(frame), 16_384):
            raw.sendall(_data(frame[start : start + 16_384], last=start + 16_384 >= len(frame)))
        raw.settimeout(2)
        with suppress(TimeoutError):
            raw.recv(65536)
    channel = grpc.insecure_channel(rpc.system.development.address, options=OWN_CONNECTION)
    stub = channel.unary_unary(METHODS["ListProviders"].path, None, None)
    with pytest.raises(grpc.RpcError) as refusal, channel:
        stub(bytes(1000), timeout=10, compression=grpc.Compression.Gzip)
    assert refusal.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)


@pytest.mark.parametrize(
    "path",
    [
        "/custody.v1.PaymentService/Pay",
        "/custody.v1.TokenService/GetToken",
        "/",
        "/x",
        "/custody.v1.KeyService/GetStatus",
    ],
)
def test_unknown_methods(rpc: Rpc, path: str) -> None:
    """What is not served is UNIMPLEMENTED, administration on the API socket included."""
    method = Method(
        path=path, request_type=METHODS["GetStatus"].request_type, response_type=METHODS["GetStatus"].response_type
    )

    assert call(rpc.application, method).code is grpc.StatusCode.UNIMPLEMENTED


METADATA: dict[str, tuple[tuple[str, str | bytes], ...]] = {
    "100 kB in one value": (("x-large", "a" * 100_000),),
    "1000 keys": tuple((f"x-key-{number}", "value" * 10) for number in range(1000)),
    "100 kB of bytes": (("x-large-bin", bytes(100_000)),),
}


@pytest.mark.parametrize("what", METADATA)
def test_metadata_beyond_the_limit(rpc: Rpc, what: str) -> None:
    """More metadata than a call needs is refused by gRPC."""
    assert (
        call(rpc.application, METHODS["ListProviders"], metadata=METADATA[what]).code
        is grpc.StatusCode.RESOURCE_EXHAUSTED
    )


@pytest.mark.parametrize("timeout", [0.001, 0.05])
def test_deadline_that_cannot_be_kept(rpc: Rpc, timeout: float) -> None:
    """With less than 100 ms left nothing is begun; the caller hears of its own deadline or of ours."""
    before = rpc.rows()

    outcome = call(rpc.application, METHODS["CreateConsent"], valid(METHODS["CreateConsent"]), timeout=timeout)
    time.sleep(0.2)

    assert outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert outcome.reason in ("", "DEADLINE_TOO_SHORT")
    assert rpc.rows() == before


def test_deadline_too_short_says_so(rpc: Rpc) -> None:
    """The sidecar's own answer, seen by a client that waits longer than it says it does."""
    with grpc.insecure_channel(rpc.system.development.address, options=OWN_CONNECTION) as channel:
        call(channel, METHODS["ListProviders"])
        reasons = {call(channel, METHODS["ListProviders"], timeout=0.08).reason for _ in range(20)}

    assert "DEADLINE_TOO_SHORT" in reasons


def test_no_deadline(rpc: Rpc) -> None:
    """A call without a deadline is served."""
    assert call(rpc.application, METHODS["ListProviders"], timeout=None).code is grpc.StatusCode.OK


def test_calls_that_are_cancelled(rpc: Rpc) -> None:
    """Hundreds of calls that their callers give up at once leave the sidecar as it was."""
    stub: Any = rpc.application.unary_unary(METHODS["ListConsents"].path, None, None)
    request = valid(METHODS["ListConsents"]).SerializeToString()
    for _ in range(300):
        stub.future(request, timeout=10).cancel()
    export: Any = rpc.operator.unary_stream(METHODS["ExportLog"].path, None, None)
    for _ in range(10):
        export(b"", timeout=10).cancel()

    assert call(rpc.application, METHODS["ListProviders"]).code is grpc.StatusCode.OK


def test_connections_that_say_nothing(rpc: Rpc) -> None:
    """200 connections that never speak do not keep another from being served."""
    silent = [_open(rpc.system.development.address) for _ in range(100)]
    silent += [_open(rpc.addresses["tcp-api"]) for _ in range(100)]
    try:
        with grpc.insecure_channel(rpc.system.development.address, options=OWN_CONNECTION) as channel:
            assert call(channel, METHODS["ListProviders"]).code is grpc.StatusCode.OK
    finally:
        for connection in silent:
            connection.close()


def test_one_byte_at_a_time(rpc: Rpc) -> None:
    """A caller that sends very slowly holds up nobody."""
    stop = threading.Event()

    def drip() -> None:
        with _connected(rpc.system.development.address) as raw:
            for byte in PREFACE + SETTINGS + _headers(METHODS["ListProviders"]):
                if stop.wait(0.02):
                    return
                raw.sendall(bytes([byte]))

    slow = threading.Thread(target=drip)
    slow.start()
    try:
        assert call(rpc.application, METHODS["ListProviders"]).code is grpc.StatusCode.OK
    finally:
        stop.set()
        slow.join(10)


# --- bytes ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _connected(address: str) -> Iterator[socket.socket]:
    connection = _open(address)
    try:
        yield connection
    finally:
        connection.close()


def _open(address: str) -> socket.socket:
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect(str(Path(address.removeprefix("unix:"))))
        return connection
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def _headers(method: Method, *more: tuple[bytes, bytes]) -> bytes:
    """The HEADERS frame of a call on stream 1, in HPACK literals without indexing (RFC 7541 section 6.2.2)."""
    pairs = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", method.path.encode()),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *more,
    )
    block = b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in pairs)
    return struct.pack(">I", len(block))[1:] + b"\x01\x04" + struct.pack(">I", 1) + block


def _data(data: bytes, *, last: bool = False) -> bytes:
    return struct.pack(">I", len(data))[1:] + b"\x00" + (b"\x01" if last else b"\x00") + struct.pack(">I", 1) + data


def _literal(text: bytes) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text


def _varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])
