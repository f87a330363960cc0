"""Processes that may be killed: each runs a scenario's set-up, act or recovery, and is gone.

A sidecar's core takes half a second to load, so one process loads it and forks for each command; it has no threads and no event
loop, so a fork of it is a fresh process. Commands and answers are lines of JSON; what a child says goes line by line into a file,
where it outlives the child.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from sidecar.errors import Unavailable

__all__ = ["Command", "CoreProcesses", "Ended"]

ROOT = Path(__file__).resolve().parents[2]
_LONGEST_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """`do` is set_up, act or recover. `kill_at`: the point (`stepping`) at which the process kills itself, 0 for none. `hold` is a
    FIFO: the child says which threads it has and waits there before it acts."""

    do: str
    scenario: str
    database: str
    bank: str
    said: str
    given: dict[str, str] = field(default_factory=dict)
    after_seconds: float = 0.0
    kill_at: int = 0
    hold: str = ""
    asks_first: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """`status` is the exit status, or minus the signal. `said` are the child's words, in order."""

    status: int
    said: tuple[dict[str, Any], ...]

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    def all(self, name: str) -> list[Any]:
        return [words[name] for words in self.said if name in words]

    def last(self, name: str) -> Any:
        return self.all(name)[-1]


class CoreProcesses:
    """The process that forks, as the test sees it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.core_process"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def run(self, command: Command) -> Ended:
        """Waits for the child's end. A child that fails by itself fails the test, with its words."""
        self.begin(command)
        return self.end(command)

    def begin(self, command: Command) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(command)).encode() + b"\n")
        self._process.stdin.flush()

    def end(self, command: Command) -> Ended:
        assert self._process.stdout is not None
        status = json.loads(self._process.stdout.readline())["status"]
        ended = Ended(status=status, said=said(Path(command.said)))
        assert not ended.all("error"), "\n".join(ended.all("error"))
        return ended


def said(file: Path) -> tuple[dict[str, Any], ...]:
    """The words so far. One write makes one line, so a killed child leaves no half of one."""
    return tuple(json.loads(line) for line in file.read_bytes().splitlines()) if file.exists() else ()


# --- in the processes -------------------------------------------------------------------------------------------------------


def main() -> None:
    from tests.fakes.egress import SoftwareKeys
    from tests.fakes.hsm import FakeHsm
    from tests.faults.scenarios import Shared

    shared = Shared(keys=SoftwareKeys(), hsm=FakeHsm())
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            _be_child(Command(**json.loads(line)), shared)
        _, status = os.waitpid(child, 0)
        os.write(1, json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _be_child(command: Command, shared: Any) -> None:
    signal.alarm(_LONGEST_SECONDS)
    words = os.open(command.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def say(word: dict[str, Any]) -> None:
        os.write(words, json.dumps(word).encode() + b"\n")

    status = 0
    try:
        asyncio.run(_run(command, shared, say))
    except BaseException:  # noqa: BLE001 - whatever it is, the test is told
        say({"error": traceback.format_exc()})
        status = 1
    os._exit(status)


async def _run(command: Command, shared: Any, say: Any) -> None:
    from tests.faults.scenarios import SCENARIOS, opened_scene
    from tests.faults.stepping import at_every_await

    scenario = SCENARIOS[command.scenario]
    scene = await opened_scene(
        scenario,
        shared,
        database=Path(command.database),
        bank=Path(command.bank),
        after_seconds=command.after_seconds,
    )
    passed = 0

    def happens(point: int) -> None:
        nonlocal passed
        passed = point
        if point == command.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if command.do == "set_up":
        say({"given": dict(await scene.set_up())})
        await scene.store.close()
        return
    if command.hold:
        writers = [thread.native_id for thread in threading.enumerate() if thread.name == "store-writer"]
        say({"threads": {"loop": os.getpid(), "writer": writers[0]}})
        with open(command.hold, "rb") as hold:  # noqa: PTH123 - a FIFO: opening it waits
            hold.read()
    if command.do == "act":
        await at_every_await(scene.act(command.given, say), happens)
        await scene.core.tasks.drain(seconds=10)
    else:
        await at_every_await(scene.recover(command.given, say, asks_first=command.asks_first), happens)
    say({"points": passed})
    with suppress(Unavailable):  # where the disk is full, not all can be finished
        await scene.store.close()


if __name__ == "__main__":
    main()
