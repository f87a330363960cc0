"""JSON from a provider, read strictly: an object, no duplicate names, no NaN, bounded depth. Else None: the caller decides what
an unreadable answer means."""

import json
from collections.abc import Mapping
from typing import NoReturn

__all__ = ["JsonObject", "integer_at", "object_at", "objects_at", "read_object", "text_at"]

JsonObject = Mapping[str, object]

_MAX_DEPTH = 32


def read_object(body: bytes) -> JsonObject | None:
    """The JSON object in `body` (UTF-8, no byte-order mark), or None."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (UnicodeDecodeError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or _depth_exceeds(value, _MAX_DEPTH):
        return None
    return value


def text_at(value: JsonObject, name: str, *, max_length: int = 1024) -> str:
    """The text member `name`, or "" where it is missing, of another type, too long or holds control characters."""
    text = value.get(name)
    if (
        not isinstance(text, str)
        or len(text) > max_length
        or any(ord(character) < 32 or ord(character) == 127 for character in text)
    ):
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


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _refuse(_constant: str) -> NoReturn:
    raise ValueError("not a JSON number")


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
