"""JSON of a provider: what is read, and what is not."""

import json

import pytest

from sidecar.connectors.strict_json import is_json_text, read_object, text_at


def nested(depth: int, *, arrays: bool) -> bytes:
    """An object whose innermost value stands `depth` levels deep."""
    inside = depth - 1
    return (
        b'{"a":'
        + ((b"[" * inside + b"1" + b"]" * inside) if arrays else (b'{"a":' * inside + b"1" + b"}" * inside))
        + b"}"
    )


@pytest.mark.parametrize("arrays", [True, False])
@pytest.mark.parametrize(("depth", "read"), [(1, True), (31, True), (32, False), (33, False), (200, False)])
def test_depth_is_bounded(*, arrays: bool, depth: int, read: bool) -> None:
    """Up to 31 levels of objects and arrays together; more is no answer, however short it is."""
    assert (read_object(nested(depth, arrays=arrays)) is not None) is read


def test_brackets_side_by_side_are_not_depth() -> None:
    """A long list of transactions is flat, and brackets within texts count for nothing."""
    document = json.dumps({"rows": [{"amount": [1]} for _ in range(500)], "text": "[{" * 400}).encode()

    assert read_object(document) is not None


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":1}}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":1',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":"\xff"}',
        b"",
    ],
)
def test_what_is_ambiguous_or_broken_is_not_read(body: bytes) -> None:
    assert read_object(body) is None
    assert not is_json_text(body)


@pytest.mark.parametrize("text", ["", "Müller & Söhne", "a b", "\u00a0", "e\u0301", "\u200d", "\U0001f600"])
def test_text_is_given_as_it_is(text: str) -> None:
    """Letters, marks, symbols, blanks and joiners of every script."""
    assert text_at({"name": text}, "name") == text


@pytest.mark.parametrize("character", ["\x00", "\n", "\x1b", "\x7f", "\x85", "\ud800"])
def test_text_with_control_characters_or_halves_of_pairs_is_none(character: str) -> None:
    assert text_at({"name": f"before{character}after"}, "name") == ""


@pytest.mark.parametrize("value", [None, 1, True, ["a"], {"a": "b"}, "x" * 11])
def test_what_is_no_text_or_too_long_is_none(value: object) -> None:
    assert text_at({"name": value}, "name", max_length=10) == ""
