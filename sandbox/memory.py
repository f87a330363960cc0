"""What the bank remembers, and how it outlives the process when a state file is asked for.

Rules this module keeps:
- Everything that must survive is in `Memory`, as plain values; the parts that work on it are made anew at every start.
- With a state file the memory is written before an answer that changed it leaves: a killed bank forgets nothing that it
  told or did. (A power cut is another matter; this is a sandbox.)
- The file holds token hashes, never tokens; it is written whole or not at all, with mode 0600.
"""

import pickle
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.books import BooksMemory, opening_books
from sandbox.consents import Consent
from sandbox.directory import DirectoryError, write_file
from sandbox.oauth import OAuthMemory
from sandbox.payments import PaymentsMemory

_FORMAT = 1


@dataclass(slots=True, kw_only=True)
class Memory:
    """Books, consents, payments and grants."""

    books: BooksMemory
    consents: dict[str, Consent] = field(default_factory=dict)
    payments: PaymentsMemory = field(default_factory=PaymentsMemory)
    oauth: OAuthMemory = field(default_factory=OAuthMemory)


def opening_memory(now: float) -> Memory:
    """Make the memory of a new bank (seconds since 1970)."""
    return Memory(books=opening_books(now))


def load_memory(path: Path) -> Memory | None:
    """Read a state file; None if there is none. The file is this program's own, as private as a key."""
    if not path.exists():
        return None
    try:
        version, memory = pickle.loads(path.read_bytes())
    except Exception as error:  # pickle raises nearly anything on a file that is not its own
        raise DirectoryError(f"cannot read the state file {path}: {error!r}; remove it to start anew") from error
    if version != _FORMAT or not isinstance(memory, Memory):
        raise DirectoryError(f"the state file {path} is of another version; remove it to start anew")
    return memory


def save_memory(path: Path, memory: Memory) -> None:
    """Write a state file."""
    write_file(path, pickle.dumps((_FORMAT, memory)), private=True)
