"""`make setup`: whatever is missing is done, step by step; what is there is left alone."""

from __future__ import annotations

import contextlib
import fcntl
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from softhsm.errors import ModuleMissingError
from softhsm.module import ensure_module, find_module
from tools.postgresql.binaries import PostgresqlMissingError, ensure_binaries, find_binaries
from tools.setup.commands import Commands, SetupError
from tools.setup.environment import Environment, clean_environ
from tools.setup.progress import Progress
from tools.setup.tracer import Tracer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that a working copy needs."""

    title: str
    needed: Callable[[], bool]
    do: Callable[[], object]


def main(root: Path | None = None) -> int:
    """0: everything is in place. 1: it is not, and standard error says why. 130: interrupted."""
    root = root or Path(__file__).resolve().parents[2]
    progress = Progress(sys.stdout)
    try:
        with _alone(root / ".cache" / "set-up.lock", progress):
            carry_out(_steps(root, progress), progress)
    except (SetupError, ModuleMissingError) as error:
        sys.stderr.write(f"set-up: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(
            f"set-up: {error.filename}: {error.strerror}. Does the working copy belong to you, and is there space?\n"
        )
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("set-up: interrupted; the next one goes on from here.\n")
        return 130
    return 0


def carry_out(steps: Sequence[Step], progress: Progress) -> None:
    """Does the steps that are needed, in order. Each is asked only when its turn comes, since it may depend on the one before."""
    for step in steps:
        if step.needed():
            with progress.step(step.title):
                step.do()


def _steps(root: Path, progress: Progress) -> list[Step]:
    commands = Commands(directory=root, log=root / ".cache" / "set-up.log")
    environment = Environment(root=root, commands=commands, environ=clean_environ())
    tracer = Tracer(note=root / ".cache" / "strace.tried")
    return [
        Step(title="Python environment", needed=environment.needs_making, do=environment.make),
        Step(
            title="Packages, checked against their hashes",
            needed=environment.needs_packages,
            do=environment.install_packages,
        ),
        Step(title="Project and commands", needed=environment.needs_project, do=environment.install_project),
        Step(title="Development HSM (SoftHSM)", needed=_no_module, do=ensure_module),
        Step(title="PostgreSQL, for tests", needed=_no_server, do=lambda: _ensure_server(progress)),
        Step(title="System call tracer (strace), for the fault harness", needed=tracer.is_wanted, do=tracer.install),
    ]


def _no_module() -> bool:
    try:
        find_module()
    except ModuleMissingError:
        return True
    return False


def _no_server() -> bool:
    try:
        find_binaries()
    except PostgresqlMissingError:
        return True
    return False


def _ensure_server(progress: Progress) -> None:
    """All but the tests works without it, so it stops nobody: the one line to type is said."""
    try:
        ensure_binaries()
    except PostgresqlMissingError as error:
        progress.say(f"  {error}")


@contextlib.contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[None]:
    """Two set-ups of one working copy take turns: they write the same files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("  Another set-up of this working copy is running; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
