"""strace, with which the fault harness fails system calls. Wanted, not needed: without it those tests say so and are skipped.

Rules: it is installed only as root, with apt, once; sudo is never called; that it could not be installed stops nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Tracer"]

_DEADLINE_SECONDS = 120
_INSTALL = ["apt-get", "install", "-y", "--no-install-recommends", "strace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracer:
    """`note` is written once it was tried, so that a machine without packages is not asked each time."""

    note: Path

    def is_wanted(self) -> bool:
        may_install = os.geteuid() == 0 and shutil.which("apt-get") is not None
        return may_install and shutil.which("strace") is None and not self.note.exists()

    def install(self) -> None:
        self.note.parent.mkdir(parents=True, exist_ok=True)
        self.note.touch()
        if not _ran(_INSTALL) and _ran(["apt-get", "update"]):
            _ran(_INSTALL)


def _ran(command: list[str]) -> bool:
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_DEADLINE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
