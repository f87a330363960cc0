"""Tokens are found where a JSON parser finds them, decoded as it decodes them, and nothing else is read."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.egress.tokenjson import MAX_TOKEN_BYTES, NotTokens, scanned

READABLE = frozenset({"scope", "token_type"})


def _token(document: bytes, name: str = "access_token") -> bytes | None:
    with scanned(memoryview(bytearray(document)), readable=READABLE) as scan:
        first = scan.token(name)
        again = scan.token(name)
        assert (first is None) == (again is None)
        assert first is None or again is None or bytes(first) == bytes(again)
        return None if first is None else bytes(first)


VSCHAR = "".join(chr(octet) for octet in range(0x20, 0x7F))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.text(VSCHAR, min_size=1, max_size=60),
    st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=5), json_values, max_size=4),
    st.sampled_from([None, 1]),
    st.integers(0, 4),
)
def test_the_token_is_the_one_that_a_parser_finds(
    token: str, others: dict[str, object], indent: int | None, position: int
) -> None:
    """Among any other members, in any layout and order, with the escapes that json writes."""
    members = list(others.items())
    members.insert(position, ("access_token", token))
    document = json.dumps(dict(members), indent=indent).encode()

    assert _token(document) == token.encode()


@given(st.text(VSCHAR, min_size=1, max_size=20))
def test_every_escape_is_decoded(token: str) -> None:
    """A token written in \\u escapes throughout is the same token."""
    escaped = "".join(f"\\u{ord(character):04X}" for character in token)
    assert _token(b'{"access_token":"' + escaped.encode() + b'"}') == token.encode()


@given(st.binary(max_size=80) | st.text('{}[]",:\\ u0019ntxa_', max_size=40).map(str.encode))
def test_no_bytes_make_the_scanner_fail_in_another_way(document: bytes) -> None:
    """What is not taken is NotTokens, and what is taken json takes too."""
    try:
        token = _token(document)
    except NotTokens:
        return
    assert isinstance(json.loads(document), dict)
    assert token is None or token.decode() == json.loads(document)["access_token"]


REFUSED = {
    "empty": b"",
    "array": b'["access_token"]',
    "string": b'"access_token"',
    "twice": b'{"access_token":"a","access_token":"b"}',
    "twice_by_escape": b'{"access_token":"a","access\\u005ftoken":"b"}',
    "number": b'{"access_token":1}',
    "object": b'{"access_token":{"access_token":"a"}}',
    "empty_token": b'{"access_token":""}',
    "control_character": b'{"access_token":"a\nb"}',
    "escaped_control_character": b'{"access_token":"a\\nb"}',
    "escaped_control_character_u": b'{"access_token":"a\\u000ab"}',
    "not_ascii": '{"access_token":"ä"}'.encode(),
    "escaped_not_ascii": b'{"access_token":"\\u00e4"}',
    "delete_character": b'{"access_token":"\x7f"}',
    "bad_escape": b'{"access_token":"\\x41"}',
    "half_escape": b'{"access_token":"\\u00"}',
    "not_closed": b'{"access_token":"abc',
    "trailing_comma": b'{"access_token":"a",}',
    "missing_comma": b'{"access_token":"a" "b":1}',
    "missing_colon": b'{"access_token" "a"}',
    "behind": b'{"access_token":"a"}x',
    "two_documents": b'{"access_token":"a"}{}',
    "nan": b'{"access_token":"a","x":NaN}',
    "byte_order_mark": b'\xef\xbb\xbf{"access_token":"a"}',
    "utf_16": '{"access_token":"a"}'.encode("utf-16-le"),
    "not_utf_8": b'{"access_token":"a","scope":"\xff"}',
    "single_quotes": b"{'access_token':'a'}",
    "comment": b'{"access_token":"a"/*x*/}',
    "too_deep": b'{"access_token":"a","x":' + b"[" * 40 + b"]" * 40 + b"}",
    "huge_number": b'{"access_token":"a","x":' + b"9" * 5000 + b"}",
    "too_long": b'{"access_token":"' + b"a" * (MAX_TOKEN_BYTES + 1) + b'"}',
    "long_name": b'{"access_token":"a","' + b"n" * 300 + b'":1}',
}


@pytest.mark.parametrize("document", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_exactly_a_token_document_is_refused(document: bytes) -> None:
    """And the refusal repeats nothing of it."""
    with pytest.raises(NotTokens) as caught:
        _token(document)
    assert str(caught.value) == ""


def test_absent_and_null_are_no_token() -> None:
    """A member that is null counts as left out; a nested one of the same name does not count at all."""
    assert _token(b"{}") is None
    assert _token(b'{"access_token":null}') is None
    assert _token(b'{"x":{"access_token":"a"}}') is None


def test_only_readable_members_become_text() -> None:
    """Everything else is blanked before a parser sees it: id tokens, nested strings, tokens themselves."""
    document = (
        b'{"access_token":"secret-a","id_token":"secret-b","scope":"a b","deep":[{"x":"secret-c"}],"expires_in":5}'
    )

    with scanned(memoryview(bytearray(document)), readable=READABLE) as scan:
        values = {name: scan.value(name) for name in scan.names}

    assert values["scope"] == "a b"
    assert values["expires_in"] == 5
    assert "secret" not in repr(values)


def test_the_longest_token_is_taken() -> None:
    """16,384 characters, as the rule says."""
    assert _token(b'{"access_token":"' + b"a" * MAX_TOKEN_BYTES + b'"}') == b"a" * MAX_TOKEN_BYTES
