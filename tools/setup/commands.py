"""Runs the commands of the set-up: bounded in time, silent while they go well, their output kept in a log for when they do not."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["Commands", "SetupError"]

_DEADLINE_SECONDS = 900
_SHOWN_LINES = 12


class SetupError(Exception):
    """The set-up cannot go on. The message says what happened and what to try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """Runs commands in one directory and logs them."""

    directory: Path
    log: Path

    def run(self, command: Sequence[str], *, environ: Mapping[str, str], advice: str) -> str:
        """Runs a command and returns its output, standard error included.

        Raises:
            SetupError: it ended badly, or not within fifteen minutes; the message holds the end of its output and `advice`.
        """
        try:
            done = subprocess.run(
                command,
                cwd=self.directory,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_DEADLINE_SECONDS,
                check=False,
            )
        except FileNotFoundError as error:
            raise SetupError(f"{command[0]} is not there. {advice}") from error
        except subprocess.TimeoutExpired as error:
            raise SetupError(f"{command[0]} did not end within {_DEADLINE_SECONDS} s. {advice}") from error
        self._note(command, done.stdout)
        if done.returncode != 0:
            raise SetupError(self._report(done.stdout, advice))
        return done.stdout

    def _note(self, command: Sequence[str], output: str) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n{output}\n")

    def _report(self, output: str, advice: str) -> str:
        end = "\n".join(f"    {line}" for line in output.strip().splitlines()[-_SHOWN_LINES:])
        return f"{advice}\n{end}\n    (all of it: {self.log.relative_to(self.directory)})"
