"""Debian's packages: installed as root, or unpacked into a folder without. Standard library only.

Rules this module keeps:

- Never with sudo; apt checks signatures as usual.
- What is unpacked appears by one rename, so that an interrupted set-up leaves nothing half-made to be found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["DebianError", "install", "run", "unpack"]

_DEADLINE_SECONDS = 600


class DebianError(Exception):
    """Packages cannot be had; the text says why, as half a sentence."""


def install(package: str) -> bool:
    """As root. False if apt cannot (a read-only root, no mirror)."""
    command = ["apt-get", "install", "-y", "--no-install-recommends", package]
    return run(command) is not None or (run(["apt-get", "update"]) is not None and run(command) is not None)


def unpack(folder: Path, packages: Callable[[Sequence[str]], Sequence[str]]) -> None:
    """Downloads the packages and unpacks them in the place of `folder`. `packages` names them; it is given the options that apt
    needs to find them. Raises DebianError."""
    if shutil.which("apt-get") is None:
        raise DebianError("this system has no apt-get")
    if shutil.which("dpkg-deb") is None:
        raise DebianError("this system has no dpkg-deb")
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    (work / "download").mkdir(parents=True)
    try:
        _download(work, packages)
        for package in sorted((work / "download").glob("*.deb")):
            if run(["dpkg-deb", "-x", str(package), str(work / "unpacked")]) is None:
                raise DebianError(f"{package.name} cannot be unpacked")
        shutil.rmtree(folder, ignore_errors=True)
        (work / "unpacked").rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(command: Sequence[str], directory: Path | None = None) -> str | None:
    """Its output, None where it fails or does not end in time."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
            timeout=_DEADLINE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _download(work: Path, packages: Callable[[Sequence[str]], Sequence[str]]) -> None:
    """With the machine's package lists, or, where there are none (slim images delete them), with lists of our own."""
    target = work / "download"
    lists, archives = work / "apt/lists", work / "apt/cache"
    (lists / "partial").mkdir(parents=True)
    (archives / "archives/partial").mkdir(parents=True)
    own = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={archives}"]
    if _downloaded([], packages, target):
        return
    if run(["apt-get", *own, "update"], target) is not None and _downloaded(own, packages, target):
        return
    raise DebianError("apt-get cannot download it (is the network up?)")


def _downloaded(options: Sequence[str], packages: Callable[[Sequence[str]], Sequence[str]], target: Path) -> bool:
    names = packages(options)
    return bool(names) and run(["apt-get", *options, "download", *names], target) is not None
