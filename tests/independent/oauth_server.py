"""Runs `oauth/server.mjs` for tests: an OAuth server that shares no code with ours.

Its packages are pinned with their hashes in `oauth/package-lock.json` and installed once, into `.cache`, without their scripts.
Where Node.js is missing it is installed from the distribution if we are root; else the tests that need it are skipped, and say so.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["IndependentServer", "independent_server", "installed_packages"]

SOURCE = Path(__file__).parent / "oauth"
CACHE = Path(__file__).resolve().parents[2] / ".cache"
_OLDEST_NODE = 18
_DEADLINE_SECONDS = 300


def installed_packages() -> Path:
    """The folder with the server and its packages; they are installed the first time. Skips the test where that is not possible."""
    _need_node()
    lock = (SOURCE / "package-lock.json").read_bytes()
    folder = CACHE / f"oauth-server-{hashlib.sha256(lock).hexdigest()[:16]}"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "oauth-server.lock").open("w") as taking_turns:
        fcntl.flock(taking_turns, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(SOURCE / name, folder)
            install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--cache", str(CACHE / "npm")]
            done = subprocess.run(
                install, cwd=folder, capture_output=True, text=True, timeout=_DEADLINE_SECONDS, check=False
            )
            assert done.returncode == 0, f"npm ci failed: {done.stderr[-2000:]}"
            (folder / "complete").touch()
        shutil.copy(SOURCE / "server.mjs", folder)
    return folder


def _need_node() -> None:
    if _is_there():
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "nodejs", "npm"]):
            subprocess.run(
                ["apt-get", "--quiet", *command],
                env=environment,
                capture_output=True,
                timeout=_DEADLINE_SECONDS,
                check=False,
            )
    if not _is_there():
        pytest.skip(f"needs Node.js {_OLDEST_NODE} or newer with npm: install them to run the independent OAuth server")


def _is_there() -> bool:
    if shutil.which("node") is None or shutil.which("npm") is None:
        return False
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    major = version.strip().removeprefix("v").partition(".")[0]
    return major.isdigit() and int(major) >= _OLDEST_NODE


@dataclass(slots=True, kw_only=True)
class IndependentServer:
    """`port` on loopback; it speaks TLS and asks for a client certificate."""

    port: int
    process: asyncio.subprocess.Process

    @property
    def origin(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    async def mint(self, count: int) -> list[tuple[str, str]]:
        """Access and refresh token of as many new grants."""
        answer = await _ask(self.process, {"mint": count})
        return [(access, refresh) for access, refresh in answer["tokens"]]

    async def lose(self, count: int) -> None:
        """The answers to the next token requests are lost on their way; the server has done its work."""
        await _ask(self.process, {"lose": count})

    async def report(self) -> dict[str, Any]:
        return await _ask(self.process, {"report": 1})


@asynccontextmanager
async def independent_server(packages: Path, **settings: object) -> AsyncIterator[IndependentServer]:
    """Runs it until the block ends. `settings` are those of server.mjs."""
    process = await asyncio.create_subprocess_exec(
        "node",
        str(packages / "server.mjs"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        limit=16 * 1024 * 1024,
    )
    try:
        port = (await _ask(process, settings))["port"]
        yield IndependentServer(port=port, process=process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 15)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _ask(process: asyncio.subprocess.Process, question: object) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question).encode() + b"\n")
    async with asyncio.timeout(60):
        line = await process.stdout.readline()
    assert line, f"the server has ended: {process.returncode}"
    answer: dict[str, Any] = json.loads(line)
    return answer
