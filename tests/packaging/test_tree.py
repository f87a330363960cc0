"""Nothing in the repository belongs to one machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a working copy of git")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_the_place_of_this_working_copy() -> None:
    """A path of the machine in a tracked file would work here and nowhere else."""
    if len(ROOT.parts) < 3:
        pytest.skip("a working copy directly below / has a name that may stand for anything")
    place = str(ROOT).encode()

    assert [str(path.relative_to(ROOT)) for path in _tracked() if place in path.read_bytes()] == []


def test_what_set_up_and_runs_make_is_ignored() -> None:
    """Environments, caches, databases and development keys cannot be committed by accident."""
    made = [
        ".venv/bin/python",
        ".cache/softhsm/usr",
        "var/hsm/pin",
        "var/custody.db",
        "build/x",
        "sidecar/__pycache__/x.pyc",
    ]
    if not (ROOT / ".git").exists():
        pytest.skip("not a working copy of git")

    ignored = subprocess.run(
        ["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert ignored.stdout.split() == made


def test_scripts_can_be_run() -> None:
    """Every tracked file that starts with an interpreter line is executable."""
    scripts = [path for path in _tracked() if path.read_bytes().startswith(b"#!")]

    assert [str(path.relative_to(ROOT)) for path in scripts if not path.stat().st_mode & 0o100] == []
