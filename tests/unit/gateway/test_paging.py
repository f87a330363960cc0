"""Pages: how long they may be, and that the token of one begins the next."""

import pytest

from sidecar.errors import InvalidField
from sidecar.gateway.servicers.paging import after_of, page_of, page_size


@pytest.mark.parametrize(("asked", "given"), [(0, 50), (1, 1), (200, 200), (201, 200), (2**31 - 1, 200)])
def test_page_size(asked: int, given: int) -> None:
    """0 means 50, more than 200 means 200, as the contract says."""
    assert page_size(asked) == given


def test_page_size_of_the_log() -> None:
    """More than 500 entries means 500."""
    assert (page_size(500, largest=500), page_size(501, largest=500)) == (500, 500)


def test_pages_meet() -> None:
    """Page after page gives every member once, in order, and the last one has no token."""
    members = [f"c-{number:03}" for number in range(7)]
    seen: list[str] = []
    token = ""
    for _ in range(10):
        after = after_of(token, "consents")
        found = [member for member in members if member > after][: 3 + 1]
        page, token = page_of(found, 3, "consents", str)
        seen += page
        if not token:
            break

    assert seen == members


@pytest.mark.parametrize(
    "token", ["A", "_____w", "cGF5bWVudHMvcC0x", "Y29uc2VudHMv", "Y29uc2VudHM", "Y29uc2VudHMv=", "é"]
)
def test_token_of_no_page(token: str) -> None:
    """What no page of this collection gave is refused, and not repeated."""
    with pytest.raises(InvalidField) as refusal:
        after_of(token, "consents")

    assert [violation.field for violation in refusal.value.violations] == ["page_token"]
    assert token not in refusal.value.message
