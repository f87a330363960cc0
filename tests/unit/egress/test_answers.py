"""The reader of answers, without a network: however the bytes are cut, the verdict is the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.egress.answers import AnswerReader, BadAnswer, BytesSink
from sidecar.egress.codes import UNKNOWN_CODES

WHOLE = [
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 7\r\n\r\n" + b'{"a":1}',
    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{"a\r\n4;ext=1\r\n":1}\r\n0\r\nX-Trailer: y\r\n\r\n',
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 201 Created\r\ncontent-length: 7\r\n\r\n" + b'{"a":1}',
]


def _read(pieces: list[bytes], *, closed: bool = False) -> tuple[int, bytes] | str:
    sink = BytesSink()
    reader = AnswerReader(method="POST", max_answer_bytes=1000, sink=sink)
    try:
        for piece in pieces:
            reader.feed(memoryview(bytearray(piece)))
        if closed:
            reader.feed_end()
    except BadAnswer as error:
        return error.code
    return (reader.status, bytes(sink.body)) if reader.complete else "incomplete"


@pytest.mark.parametrize("answer", WHOLE)
def test_an_answer_reads_the_same_wherever_it_is_cut(answer: bytes) -> None:
    """Every cut into two pieces, and byte by byte, gives the whole answer, and no sooner than its last byte."""
    expected = _read([answer])
    assert expected != "incomplete"

    for cut in range(1, len(answer)):
        assert _read([answer[:cut], answer[cut:]]) == expected
        assert _read([answer[:cut]]) == "incomplete"
        assert _read([answer[:cut]], closed=True) == "ANSWER_TRUNCATED"
    assert _read([bytes([octet]) for octet in answer]) == expected


@pytest.mark.parametrize("answer", WHOLE)
def test_anything_behind_an_answer_spoils_it(answer: bytes) -> None:
    """In the same piece or in the next one."""
    assert _read([answer + b"x"]) == "ANSWER_MALFORMED"
    assert _read([answer, b"x"]) == "ANSWER_MALFORMED"


@given(st.lists(st.binary(max_size=60), max_size=6), st.booleans())
def test_no_bytes_make_the_reader_fail_in_another_way(pieces: list[bytes], closed: bool) -> None:
    """Whatever comes, the result is an answer, the wish for more, or one of the codes."""
    result = _read(pieces, closed=closed)
    assert isinstance(result, tuple) or result == "incomplete" or result in UNKNOWN_CODES


@given(st.integers(0, 200), st.binary(min_size=1, max_size=4), st.sampled_from(WHOLE))
def test_a_damaged_answer_is_an_answer_or_a_code(position: int, damage: bytes, answer: bytes) -> None:
    """Bytes overwritten anywhere never raise anything but BadAnswer."""
    damaged = answer[:position] + damage + answer[position + len(damage) :]
    result = _read([damaged], closed=True)
    assert isinstance(result, tuple) or result in UNKNOWN_CODES


def test_a_connection_is_kept_only_when_both_sides_may() -> None:
    """Not after `Connection: close`, not after HTTP/1.0, not after a body that ended with the connection."""
    cases = {
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n": True,
        b"HTTP/1.1 204 No Content\r\n\r\n": True,
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n": False,
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n": False,
    }
    for answer, reusable in cases.items():
        reader = AnswerReader(method="GET", max_answer_bytes=10, sink=BytesSink())
        assert reader.feed(memoryview(answer))
        assert reader.reusable is reusable
    reader = AnswerReader(method="GET", max_answer_bytes=10, sink=BytesSink())
    assert not reader.feed(memoryview(b"HTTP/1.1 200 OK\r\n\r\nx"))
    reader.feed_end()
    assert reader.complete
    assert not reader.reusable


@pytest.mark.parametrize("answer", WHOLE)
def test_pieces_of_the_body_are_wiped_once_the_sink_has_them(answer: bytes) -> None:
    """They may hold new tokens, and do not wait for an allocator to overwrite them."""
    given_out: list[object] = []

    class Sink(BytesSink):
        def append(self, data: memoryview) -> None:
            super().append(data)
            given_out.append(data.obj)

    sink = Sink()
    reader = AnswerReader(method="GET", max_answer_bytes=1000, sink=sink)

    assert reader.feed(memoryview(bytearray(answer)))

    assert bytes(sink.body) == b'{"a":1}'
    assert given_out
    for piece in given_out:
        assert isinstance(piece, bytearray)
        assert not any(piece)
