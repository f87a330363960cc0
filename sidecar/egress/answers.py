"""Reads one HTTP/1.1 answer (RFC 9112), strictly and within bounds. No I/O.

h11 does the parsing; what it would forgive is refused here first: two lengths, a length beside a chunked coding, folded lines,
bare line ends, control characters, codings nobody asked for, bytes behind the answer. Rules:

- Either the whole answer is well-formed and complete, or BadAnswer names why not. Half an answer is never given out.
- Everything is counted as it comes: header bytes and fields, interim answers, and all bytes together.
- Cookies are dropped here: egress keeps none, and nobody else has use for them.
"""

import re
from functools import cache
from typing import Final, Protocol

import h11

from sidecar.domain.provider import Answer
from sidecar.egress import codes
from sidecar.secretbuffer import wipe

__all__ = ["AnswerReader", "BadAnswer", "BodySink", "BytesSink"]

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_HEADER_FIELDS: Final = 128
_MAX_INTERIM_ANSWERS: Final = 8
# What chunk headers, extensions and trailers may add to the body.
_FRAMING_BYTES: Final = 256 * 1024

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] [1-5][0-9]{2}(?: [\t\x20-\x7e\x80-\xff]*)?\Z")
_FIELD_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)\Z")
_LENGTH = re.compile(rb"[0-9]{1,15}\Z")
_IDENTITY = frozenset({"", "identity"})
_DROPPED = frozenset({"set-cookie", "set-cookie2"})


class BadAnswer(Exception):
    """What came is no complete, well-formed answer; `code` is one of `codes`."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class BodySink(Protocol):
    """Where the body's bytes go."""

    def append(self, data: memoryview) -> None: ...


class BytesSink:
    """For bodies that are passed on."""

    __slots__ = ("body",)

    def __init__(self) -> None:
        self.body = bytearray()

    def append(self, data: memoryview) -> None:
        self.body += data


class AnswerReader:
    """Takes decrypted bytes as they come. After `feed` returned True, `status`, `headers` and the sink are complete.

    `max_answer_bytes` bounds the body. `reusable` tells whether the connection may serve another request.
    """

    def __init__(self, *, method: str, max_answer_bytes: int, sink: BodySink) -> None:
        self.status = 0
        self.headers: tuple[tuple[str, str], ...] = ()
        self.complete = False
        self._max_answer_bytes = max_answer_bytes
        self._sink = sink
        self._head: bytearray | None = bytearray()
        self._interim_answers = 0
        self._total_bytes = 0
        self._body_bytes = 0
        self._until_close = False
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        # h11 must know the method, but not one of our bytes: it is told of a request that is never sent.
        self._h11.send(_never_sent(method))
        self._h11.send(h11.EndOfMessage())

    @property
    def reusable(self) -> bool:
        return self.complete and not self._until_close and self._h11.their_state is h11.DONE

    def feed(self, data: memoryview) -> bool:
        """True when the answer is complete. Raises BadAnswer."""
        self._total_bytes += len(data)
        if self._total_bytes > self._max_answer_bytes + MAX_HEAD_BYTES + _FRAMING_BYTES:
            raise BadAnswer(codes.ANSWER_TOO_LARGE)
        if self.complete:
            raise BadAnswer(codes.ANSWER_MALFORMED)
        if self._head is None:
            self._feed_body(data)
        else:
            self._feed_head(data)
        return self.complete

    def feed_end(self) -> None:
        """The provider said that it will send no more (TLS close_notify). Raises BadAnswer unless that completes the answer."""
        if self.complete:
            return
        if self._total_bytes == 0:
            raise BadAnswer(codes.CONNECTION_LOST)
        if self._head is not None or not self._until_close:
            raise BadAnswer(codes.ANSWER_TRUNCATED)
        self._receive(b"")

    @property
    def started(self) -> bool:
        return self._total_bytes > 0

    def answer(self, body: bytes) -> Answer:
        return Answer(status=self.status, headers=self.headers, body=body)

    # -- head

    def _feed_head(self, data: memoryview) -> None:
        assert self._head is not None
        self._head += data
        while self._head is not None:
            end = self._head.find(b"\r\n\r\n") + 4
            if max(end, len(self._head) if end < 4 else 0) > MAX_HEAD_BYTES:
                raise BadAnswer(codes.ANSWER_TOO_LARGE)
            if end < 4:
                _refuse_hopeless_start(self._head)
                return
            head, rest = bytes(self._head[:end]), self._head[end:]
            self._head = rest
            self._take_head(head)
            if self.status:
                self._head = None
                with memoryview(rest) as view:
                    self._feed_body(view)
                wipe(rest)

    def _take_head(self, head: bytes) -> None:
        lines = head[:-4].split(b"\r\n")
        fields = _checked_fields(lines)
        event = self._next_event(head)
        if isinstance(event, h11.InformationalResponse):
            self._interim_answers += 1
            if self._interim_answers > _MAX_INTERIM_ANSWERS:
                raise BadAnswer(codes.ANSWER_MALFORMED)
            return
        if not isinstance(event, h11.Response):
            raise BadAnswer(codes.ANSWER_MALFORMED)
        self._check_framing(event, fields)
        self.headers = tuple((name, value) for name, value in fields if name not in _DROPPED)
        self.status = event.status_code

    def _check_framing(self, event: h11.Response, fields: list[tuple[str, str]]) -> None:
        lengths = [value for name, value in fields if name == "content-length"]
        codings = [value for name, value in fields if name == "transfer-encoding"]
        if len(lengths) + len(codings) > 1:
            raise BadAnswer(codes.ANSWER_MALFORMED)
        if codings and (codings[0].lower() != "chunked" or event.http_version != b"1.1"):
            raise BadAnswer(codes.ANSWER_MALFORMED)
        if any(name == "content-encoding" and value.lower() not in _IDENTITY for name, value in fields):
            raise BadAnswer(codes.ANSWER_ENCODED)
        if lengths and not _LENGTH.match(lengths[0].encode("latin-1")):
            raise BadAnswer(codes.ANSWER_MALFORMED)
        if lengths and int(lengths[0]) > self._max_answer_bytes:
            raise BadAnswer(codes.ANSWER_TOO_LARGE)
        self._until_close = not lengths and not codings and event.status_code not in (204, 304)

    # -- body

    def _feed_body(self, data: memoryview) -> None:
        if len(data):
            # h11 appends to a bytearray of its own, so a view is as good as bytes.
            self._receive(data)  # type: ignore[arg-type]
        else:
            self._take_events()

    def _receive(self, data: bytes) -> None:
        try:
            self._h11.receive_data(data)
        except (h11.ProtocolError, RuntimeError):
            raise BadAnswer(codes.ANSWER_MALFORMED) from None
        self._take_events()

    def _take_events(self) -> None:
        while True:
            event = self._next_event()
            if event is h11.NEED_DATA:
                return
            if isinstance(event, h11.Data):
                self._take_data(event)
            elif isinstance(event, h11.EndOfMessage):
                self._end_of_answer()
                return
            else:
                raise BadAnswer(codes.ANSWER_MALFORMED)

    def _take_data(self, event: h11.Data) -> None:
        self._body_bytes += len(event.data)
        if self._body_bytes > self._max_answer_bytes:
            raise BadAnswer(codes.ANSWER_TOO_LARGE)
        with memoryview(event.data) as data:
            self._sink.append(data)
            if not data.readonly:  # it may hold new tokens, and h11 gives out its own bytearray
                wipe(data)

    def _end_of_answer(self) -> None:
        trailing, closed = self._h11.trailing_data
        if trailing or (closed and not self._until_close):
            raise BadAnswer(codes.ANSWER_MALFORMED)
        self.complete = True

    def _next_event(self, data: bytes = b"") -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        # h11 repeats the provider's bytes in its errors: they end here.
        try:
            if data:
                self._h11.receive_data(data)
            return self._h11.next_event()
        except (h11.ProtocolError, RuntimeError, ValueError):
            raise BadAnswer(codes.ANSWER_MALFORMED) from None


@cache
def _never_sent(method: str) -> h11.Request:
    return h11.Request(method=method, target="/", headers=[("host", "placeholder")])


def _refuse_hopeless_start(head: bytearray) -> None:
    """What does not begin like an answer never becomes one: no need to wait for an end of headers."""
    start = b"HTTP/1."[: len(head)]
    if not head.startswith(start):
        raise BadAnswer(codes.ANSWER_MALFORMED)


def _checked_fields(lines: list[bytes]) -> list[tuple[str, str]]:
    """Names in lower case and values, in order. Refuses what h11 forgives: folding, blanks before the colon, bare CR or LF."""
    if not _STATUS_LINE.match(lines[0]):
        raise BadAnswer(codes.ANSWER_MALFORMED)
    if len(lines) - 1 > MAX_HEADER_FIELDS:
        raise BadAnswer(codes.ANSWER_TOO_LARGE)
    fields = []
    for line in lines[1:]:
        match = _FIELD_LINE.match(line)
        if match is None:
            raise BadAnswer(codes.ANSWER_MALFORMED)
        fields.append((match[1].decode("ascii").lower(), match[2].decode("latin-1").rstrip(" \t")))
    return fields
