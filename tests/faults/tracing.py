"""Faults at system calls, by strace: the n-th call of a thread is answered with an error, or is the last thing its process does.

Works where a process may trace another (ptrace) and strace is installed; where not, `why_not` says what is missing and tests are
skipped with it.
"""

import contextlib
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["LOOP_CALLS", "WRITER_CALLS", "Call", "Tracer", "why_not"]

# What changes something outside of the process: of the store's writer, and of the loop that speaks to the bank.
WRITER_CALLS = ("pwrite64", "fdatasync", "fsync", "ftruncate", "sendto", "write")
LOOP_CALLS = ("connect", "sendto", "recvfrom", "write", "pwrite64", "fdatasync", "ftruncate", "unlink")
_ATTACH_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The `number`-th call of `name` by a thread."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name} #{self.number}"


@cache
def why_not() -> str:
    """Why system calls cannot be traced here; "" where they can."""
    if shutil.which("strace") is None:
        return "strace is not installed (as root: apt-get install strace)"
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            with Tracer(sleeper.pid, calls=("nanosleep",), output=Path("/dev/null")):
                return ""
        except TracingRefused as refused:
            return f"a process may not trace another here (ptrace): {refused}"
        finally:
            sleeper.kill()


class TracingRefused(Exception):
    """strace could not attach; the text is its own."""


class Tracer:
    """strace on one thread, from `__enter__` on, until the thread ends. `injected` are strace's expressions, such as
    `pwrite64:error=ENOSPC:when=3`."""

    def __init__(
        self, thread: int, *, calls: Sequence[str], output: Path, injected: Sequence[str] = (), data: bool = False
    ) -> None:
        self.output = output
        self._command = ["strace", "-p", str(thread), "-o", str(output), "-e", f"trace={','.join(calls)}"]
        self._command += [part for expression in injected for part in ("-e", f"inject={expression}")]
        self._command += ["-xx", "-y", "-s", "100000"] if data else []

    def __enter__(self) -> "Tracer":
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE)
        assert self._process.stderr is not None
        late = threading.Timer(_ATTACH_SECONDS, self._process.kill)
        late.start()
        first = self._process.stderr.readline().decode(errors="replace").strip()
        late.cancel()
        if "attached" not in first:
            self._stop()
            raise TracingRefused(first or "strace did not attach in time")
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the end of the thread; of the one that `why_not` tries there is nothing to wait for."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.0 if self.output == Path("/dev/null") else 30)
        self._stop()

    def calls(self) -> list[Call]:
        """What was called, in order, once the thread has ended."""
        counts: Counter[str] = Counter()
        found = []
        for name in re.findall(r"^(\w+)\(", self.output.read_text(errors="replace"), re.MULTILINE):
            counts[name] += 1
            found.append(Call(name=name, number=counts[name]))
        return found

    def injected(self) -> int:
        """How many calls were answered with an error."""
        return self.output.read_text(errors="replace").count("(INJECTED)")

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
