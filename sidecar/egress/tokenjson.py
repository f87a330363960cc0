"""Takes tokens out of a JSON document without making a `str` or `bytes` of them.

Rules:
- The document is one JSON object (RFC 8259) in UTF-8, no member of it twice, at most 32 levels deep. Anything else is NotTokens.
  What is inside a string that nobody reads is not looked at: a provider's broken text there must not lose its tokens.
- Only the members that the caller names as readable become Python values. Every other string is blanked, in a copy in locked
  memory, before a JSON parser sees the document: what we do not know may be a secret.
- Escapes in a token are decoded in place. A token has 1 to 16,384 characters of RFC 6749's VSCHAR (%x20-7E).
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Never

from sidecar.secretbuffer import SecretBuffer

__all__ = ["MAX_TOKEN_BYTES", "NotTokens", "TokenDocument", "scanned"]

MAX_TOKEN_BYTES: Final = 16_384
_MAX_LEVELS: Final = 32
_MAX_NAME_BYTES: Final = 256

# Possessive, so that no input makes them go back and forth.
_STRING = re.compile(rb'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"')
_SCALAR = re.compile(rb"[-+.0-9A-Za-z]++")
_VSCHAR = re.compile(rb"[\x20-\x7e]+\Z")
_QUOTE, _BACKSLASH, _SLASH, _LETTER_U = 0x22, 0x5C, 0x2F, 0x75
_OPENING, _CLOSING = frozenset(b"{["), frozenset(b"}]")
_PUNCTUATION = frozenset(b":, \t\r\n")

_Span = tuple[int, int]


class NotTokens(Exception):
    """The document is not what it must be. It never says where: the text there may be a secret."""


class TokenDocument:
    """Made by `scanned`; of use inside its block only."""

    __slots__ = ("_document", "_strings", "_tokens", "_values")

    def __init__(self, document: memoryview, strings: dict[str, _Span], values: dict[str, object]) -> None:
        self._document = document
        self._strings = strings
        self._tokens: dict[str, memoryview] = {}  # those that were decoded in place, which must happen once
        self._values = values

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._values)

    def value(self, name: str) -> object:
        """A member's value, or None. Strings that were not named as readable are blanked."""
        return self._values.get(name)

    def token(self, name: str) -> memoryview | None:
        """The token's own bytes in the document; None where the member is absent or null. Raises NotTokens."""
        if self._values.get(name) is None:
            return None
        if name not in self._strings:
            raise NotTokens
        if name not in self._tokens:
            start, end = self._strings[name]
            self._tokens[name] = self._document[start : start + _unescape(self._document[start:end])]
        token = self._tokens[name]
        if not 1 <= len(token) <= MAX_TOKEN_BYTES or not _VSCHAR.match(token):
            raise NotTokens
        return token


@contextmanager
def scanned(document: memoryview, *, readable: frozenset[str]) -> Iterator[TokenDocument]:
    """Reads `document`, which it may change. Raises NotTokens."""
    if not len(document):
        raise NotTokens
    strings, to_blank = _strings_of(document, readable)
    with SecretBuffer(len(document)) as copy:
        copy.view[:] = document
        for start, end in to_blank:
            copy.view[start:end] = b"x" * (end - start)
        values = _parsed(bytes(copy.view))
    yield TokenDocument(document, strings, values)


def _parsed(blanked: bytes) -> dict[str, object]:
    try:
        values = json.loads(blanked.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise NotTokens from None
    if not isinstance(values, dict):
        raise NotTokens
    return values


def _refuse_constant(_: str) -> Never:
    raise ValueError("NaN and Infinity are not JSON")


def _strings_of(document: memoryview, readable: frozenset[str]) -> tuple[dict[str, _Span], list[_Span]]:
    """Where the strings of the outermost object are, by member, and which strings of the document must be blanked.

    It only has to be right for documents that are valid JSON: the parser refuses the others afterwards.
    """
    strings: dict[str, _Span] = {}
    to_blank: list[_Span] = []
    seen: set[str] = set()
    name: str | None = None
    level = position = 0
    while position < len(document):
        octet = document[position]
        if octet == _QUOTE:
            span = _string_at(document, position)
            position = span[1] + 1
            if level == 1 and name is None:
                name = _name_at(document, span)
                if name in seen:
                    raise NotTokens
                seen.add(name)
                continue
            if level == 1 and name is not None:
                strings[name] = span
                if name not in readable:
                    to_blank.append(span)
                name = None
            else:
                to_blank.append(span)
        elif octet in _OPENING or octet in _CLOSING:
            level += 1 if octet in _OPENING else -1
            position += 1
            if not 0 <= level <= _MAX_LEVELS:
                raise NotTokens
            if level == 1 and octet in _CLOSING:
                name = None
        elif octet in _PUNCTUATION:
            position += 1
        else:
            position = _scalar_end(document, position)
            if level == 1:
                name = None
    return strings, to_blank


def _string_at(document: memoryview, position: int) -> _Span:
    """Of the characters between the quotes."""
    match = _STRING.match(document, position)
    if match is None:
        raise NotTokens
    return match.start() + 1, match.end() - 1


def _scalar_end(document: memoryview, position: int) -> int:
    match = _SCALAR.match(document, position)
    if match is None:
        raise NotTokens
    return match.end()


def _name_at(document: memoryview, span: _Span) -> str:
    start, end = span
    if end - start > _MAX_NAME_BYTES:
        raise NotTokens
    try:
        return str(json.loads(b'"' + document[start:end] + b'"'))
    except ValueError:
        raise NotTokens from None


def _unescape(text: memoryview) -> int:
    """Decodes JSON's escapes where they stand and returns the new length. Escapes of what no token may hold are refused."""
    read = written = 0
    while read < len(text):
        octet = text[read]
        read += 1
        if octet == _BACKSLASH:
            escape = text[read]
            read += 1
            if escape == _LETTER_U:
                octet = _hexadecimal(text[read : read + 4])
                read += 4
            elif escape in (_QUOTE, _BACKSLASH, _SLASH):
                octet = escape
            else:
                raise NotTokens
        if not 0x20 <= octet <= 0x7E:
            raise NotTokens
        text[written] = octet
        written += 1
    return written


def _hexadecimal(digits: memoryview) -> int:
    value = 0
    for digit in digits:
        value = value * 16 + (digit - 0x30 if digit <= 0x39 else (digit | 0x20) - 0x57)
    return value
