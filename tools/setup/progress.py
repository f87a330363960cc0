"""Shows what is being done: one line a step, with a tick and its seconds on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Progress"]

_TICK_SECONDS = 0.1
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PLAIN_SPINNER = "|/-\\"
_CLEAR_LINE = "\r\x1b[2K"


class Progress:
    """Writes steps to one stream. On a terminal the running step counts its seconds: slow must not look hung."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._fancy = _can_show(stream, "✓✗…" + _SPINNER)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Shows a step while the block runs, and how it ended. An exception passes through."""
        started = time.monotonic()
        try:
            with self._running(title, started):
                yield
        except BaseException:
            self._end(self._mark("✗", "failed"), title, started)
            raise
        self._end(self._mark("✓", "ok"), title, started)

    def say(self, line: str) -> None:
        """Writes one line between steps."""
        self._write(f"{line}\n")

    @contextlib.contextmanager
    def _running(self, title: str, started: float) -> Iterator[None]:
        if not self._terminal:
            self._write(f"  {self._mark('…', '..')} {title}\n")
            yield
            return
        done = threading.Event()
        spinner = threading.Thread(target=self._spin, args=(title, started, done), daemon=True)
        spinner.start()
        try:
            yield
        finally:
            done.set()
            spinner.join()

    def _spin(self, title: str, started: float, done: threading.Event) -> None:
        frames = _SPINNER if self._fancy else _PLAIN_SPINNER
        turn = 0
        while not done.is_set():
            elapsed = time.monotonic() - started
            self._write(f"{_CLEAR_LINE}  {frames[turn % len(frames)]} {title}  {elapsed:.0f} s")
            turn += 1
            done.wait(_TICK_SECONDS)

    def _end(self, mark: str, title: str, started: float) -> None:
        start = _CLEAR_LINE if self._terminal else ""
        self._write(f"{start}  {mark} {title}  {time.monotonic() - started:.1f} s\n")

    def _mark(self, symbol: str, word: str) -> str:
        return symbol if self._fancy else word

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _can_show(stream: TextIO, symbols: str) -> bool:
    try:
        symbols.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
