"""Worker processes that the benchmarks start and steer: each takes one JSON command a line and answers each with one JSON line.

Load generators, baselines and the provider are processes of their own, so that none of them shares an interpreter with what is
measured. A worker ends when its standard input closes, so none outlives its benchmark; an error ends it and fails the benchmark.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import uvloop

__all__ = ["Load", "Result", "Worker", "WorkerError", "run_load", "serve"]

_ROOT = Path(__file__).resolve().parent.parent

Work = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class WorkerError(Exception):
    """A worker did not do its work; the text says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a load generator is to do: `work`, by so many callers at once, for so long (or so many calls, where `calls` is set)."""

    work: str
    in_flight: int = 1
    seconds: float = 0.0
    calls: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a load generator measured. `cpu_seconds` is the generator's own."""

    count: int
    seconds: float
    latencies_seconds: tuple[float, ...]
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        return self.count / self.seconds


class Worker(AbstractContextManager["Worker"]):
    """A worker process, `python -m MODULE ARGUMENTS`."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=_ROOT,
            env=None if environment is None else dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hello = self._read()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **command: object) -> dict[str, Any]:
        """The answer to a command. Raises WorkerError."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def load(self, load: Load) -> Result:
        answer = self.ask(work=load.work, in_flight=load.in_flight, seconds=load.seconds, calls=load.calls)
        return Result(
            count=answer["count"],
            seconds=answer["seconds"],
            latencies_seconds=tuple(answer["latencies_seconds"]),
            cpu_seconds=answer["cpu_seconds"],
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.module} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


# --- in the worker ------------------------------------------------------------------------------------------------------


def serve(main: Callable[[Sequence[str]], Awaitable[tuple[dict[str, Any], Work]]]) -> None:
    """Runs a worker: `main` takes the arguments and gives its hello and what answers the commands."""
    uvloop.run(_serve(main))


async def _serve(main: Callable[[Sequence[str]], Awaitable[tuple[dict[str, Any], Work]]]) -> None:
    hello, work = await main(sys.argv[1:])
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _say(hello)
    while line := await reader.readline():
        _say(await work(json.loads(line)))


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def run_load(command: Mapping[str, Any], call: Callable[[], Awaitable[None]]) -> dict[str, Any]:
    """Calls `call` as the command says, and measures. The first error ends all."""
    latencies: list[float] = []
    began, cpu_began = time.perf_counter(), time.process_time()
    end = began + command["seconds"] if command["seconds"] else float("inf")
    calls = command["calls"] or sys.maxsize
    started = 0

    async def caller() -> None:
        nonlocal started
        while started < calls and (now := time.perf_counter()) < end:
            started += 1
            await call()
            latencies.append(time.perf_counter() - now)

    async with asyncio.TaskGroup() as group:
        for _ in range(command["in_flight"]):
            group.create_task(caller())
    return {
        "count": len(latencies),
        "seconds": time.perf_counter() - began,
        "latencies_seconds": latencies,
        "cpu_seconds": time.process_time() - cpu_began,
    }
