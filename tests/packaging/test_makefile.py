"""`make` explains itself, and continuous integration hides nothing from it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"setup", "run", "test", "check", "lock", "image", "clean"}


def _make(*arguments: str) -> str:
    environ = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_make_alone_shows_every_target_and_does_nothing() -> None:
    """The default target is the help, and it lists each target with what it does."""
    declared = set(re.findall(r"^\.PHONY: ([a-z-]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))

    shown = dict(re.findall(r"^  ([a-z-]+)\s+(\S.*)$", _make(), re.MULTILINE))

    assert shown.keys() == declared
    assert declared >= TARGETS
    assert _make() == _make("help")


def test_every_target_that_uses_the_environment_sets_it_up_first() -> None:
    """Each target of a fresh clone works: whoever calls something in `.venv` depends on `setup`."""
    rules = re.findall(r"^([a-z-]+):(.*?)(?: ##.*)?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)

    without = [
        name
        for name, needs, recipe in rules
        if re.search(r"\$\((PY|COMPILE)\)|^\t@?\.venv/", recipe, re.MULTILINE) and "setup" not in needs
    ]

    assert rules
    assert without == []


def test_check_runs_what_continuous_integration_promises() -> None:
    """`make check` lints, checks formatting, types, import contracts, the contract and the freshness of its stubs."""
    plan = _make("--dry-run", "check")

    for command in (
        "ruff check",
        "ruff format --check",
        "mypy",
        "lint-imports",
        "buf lint",
        "generate_stubs.py --check",
    ):
        assert command in plan, command


def test_types_are_checked_everywhere() -> None:
    """The type checker sees product, client, sandbox, set-up and tests."""
    (line,) = [line for line in _make("--dry-run", "types").splitlines() if "mypy" in line]

    assert {"sidecar", "softhsm", "tools", "tests"} <= set(line.split())
