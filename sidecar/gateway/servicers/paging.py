"""Page tokens: the last id of the page before, bound to the collection. A token of another collection is refused."""

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

from sidecar.errors import FieldViolation, InvalidField

__all__ = ["after_of", "page_of", "page_size"]

T = TypeVar("T")

DEFAULT_PAGE_SIZE = 50
LARGEST_PAGE_SIZE = 200


def page_size(asked: int, *, largest: int = LARGEST_PAGE_SIZE) -> int:
    """0 means the default; more than the largest page is clamped (AIP-158)."""
    return min(asked or DEFAULT_PAGE_SIZE, largest)


def after_of(token: str, collection: str) -> str:
    """The id after which a page begins; "" for the first. Raises InvalidField for a token that is not one of ours."""
    if not token:
        return ""
    try:
        text = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        text = ""
    prefix, separator, after = text.partition("/")
    if prefix != collection or not separator or not after:
        raise InvalidField(
            FieldViolation(field="page_token", rule="page_token", description="must be one that the page before gave")
        )
    return after


def page_of(found: Sequence[T], limit: int, collection: str, key: Callable[[T], str]) -> tuple[Sequence[T], str]:
    """The first `limit` of what was found, and the token of the next page where there is more."""
    if len(found) <= limit:
        return found, ""
    page = found[:limit]
    token = base64.urlsafe_b64encode(f"{collection}/{key(page[-1])}".encode("ascii")).rstrip(b"=").decode("ascii")
    return page, token
