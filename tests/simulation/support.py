"""A directory for the database of each run: in memory where the machine has such a place, because no power is cut here."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.unit.store.support import new_database

__all__ = ["databases"]

_IN_MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def databases() -> Iterator["Databases"]:
    place = str(_IN_MEMORY) if _IN_MEMORY.is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="custody-simulation-", dir=place))
    try:
        yield Databases(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Databases:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def new(self) -> Iterator[Path]:
        """The directory of an empty database."""
        path = new_database(self._directory).parent
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
