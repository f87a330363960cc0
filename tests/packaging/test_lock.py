"""What is installed is exactly what was reviewed: every package pinned and hashed, wherever it is fetched from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-setup.lock")

_REQUIREMENT = re.compile(r"^(?P<name>[a-z0-9-]+)(\[[a-z0-9,-]+\])?==(?P<version>[^ ;]+)(?P<marker> ; .+?)? \\$")
_HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def _pins(lock: str) -> dict[str, str]:
    lines = (ROOT / lock).read_text().splitlines()
    return {found["name"]: found["version"] for line in lines if (found := _REQUIREMENT.match(line))}


def _wanted(requirements: list[str]) -> set[str]:
    """Names as the index spells them (PEP 503)."""
    names = (re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0] for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_is_pins_with_hashes_and_nothing_else(lock: str) -> None:
    """Each line is a pin, a SHA-256 of one of its files, or a comment; and each pin has a hash on the next line."""
    lines = (ROOT / lock).read_text().splitlines()

    strange = [
        line for line in lines if not (_REQUIREMENT.match(line) or _HASH.match(line) or line.lstrip().startswith("#"))
    ]
    unhashed = [a for a, b in zip(lines, [*lines[1:], ""], strict=True) if _REQUIREMENT.match(a) and not _HASH.match(b)]

    assert strange == []
    assert unhashed == []
    assert _pins(lock)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_place(lock: str) -> None:
    """Where packages come from is the machine's setting: no address, index or folder is in a lock."""
    text = (ROOT / lock).read_text()

    assert re.findall(r"://|--(?:extra-)?index|--find-links|--trusted-host| @ |^-e ", text, re.MULTILINE) == []


def test_the_locks_hold_everything_the_project_asks_for() -> None:
    """A dependency that is added without locking it is noticed here and not on somebody's fresh clone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = _wanted(project["project"]["dependencies"])
    groups = _wanted([name for group in project["dependency-groups"].values() for name in group])

    assert runtime - _pins("requirements.lock").keys() == set()
    assert (runtime | groups) - _pins("requirements-dev.lock").keys() == set()


def test_what_is_tested_is_what_is_shipped() -> None:
    """Every package of the image has the same version where the tests run."""
    shipped, tested = _pins("requirements.lock"), _pins("requirements-dev.lock")

    assert shipped.items() <= tested.items()


def test_the_image_gets_no_tools() -> None:
    """Packages that only the sandbox, the tests or the set-up need are not in the image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = _wanted([name for group in project["dependency-groups"].values() for name in group])

    assert groups & _pins("requirements.lock").keys() == set()
