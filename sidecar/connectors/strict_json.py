"""JSON from a provider, read strictly: an object, no duplicate names, no NaN, no boundless number, bounded depth. Else None: the
caller decides what an unreadable answer means."""

import json
import math
import unicodedata
from collections.abc import Mapping
from typing import NoReturn

__all__ = ["JsonObject", "integer_at", "is_json_text", "object_at", "objects_at", "read_object", "text_at"]

JsonObject = Mapping[str, object]

_MAX_DEPTH = 32
_NO_TEXT = frozenset({"Cc", "Cs"})  # control characters, and halves of surrogate pairs: no UTF-8 can hold them


def read_object(body: bytes) -> JsonObject | None:
    """The JSON object in `body` (UTF-8, no byte-order mark), or None."""
    try:
        value = _read(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def is_json_text(body: bytes) -> bool:
    """Whether `body` is one JSON text (RFC 8259) of any type, as strictly."""
    try:
        _read(body)
    except ValueError:
        return False
    return True


def text_at(value: JsonObject, name: str, *, max_length: int = 1024) -> str:
    """The text member `name`, or "" where it is missing, of another type, too long or holds control characters."""
    text = value.get(name)
    if not isinstance(text, str) or len(text) > max_length:
        return ""
    # What is printable holds neither; only the rest is looked at one by one.
    if not text.isprintable() and any(unicodedata.category(character) in _NO_TEXT for character in text):
        return ""
    return text


def integer_at(value: JsonObject, name: str) -> int | None:
    number = value.get(name)
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def object_at(value: JsonObject, name: str) -> JsonObject:
    member = value.get(name)
    return member if isinstance(member, dict) else {}


def objects_at(value: JsonObject, name: str) -> tuple[JsonObject, ...] | None:
    """The members of the array `name` when it is an array of objects, else None."""
    member = value.get(name)
    if not isinstance(member, list) or not all(isinstance(item, dict) for item in member):
        return None
    return tuple(member)


def _read(body: bytes) -> object:
    """Raises ValueError for what is not JSON as this module means it."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    # A text with fewer brackets than that cannot be nested as deep.
    if body.count(b"{") + body.count(b"[") >= _MAX_DEPTH and _depth_exceeds(value, _MAX_DEPTH):
        raise ValueError("nested too deep")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _refuse(_constant: str) -> NoReturn:
    raise ValueError("not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number beyond all bounds")
    return number


def _depth_exceeds(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True
