"""A whole system for the end-to-end tests: real HSM module, real processes, real bank, real sockets."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.system import System


@pytest.fixture
def new_system() -> Iterator[Callable[..., System]]:
    """Makes systems, each in a folder of its own with a short path (Unix sockets), and ends them."""
    systems: list[System] = []
    folders: list[Path] = []

    def make(**options: object) -> System:
        folder = Path(tempfile.mkdtemp(prefix="custody-e2e-"))
        folders.append(folder)
        system = System.start(folder, **options)  # type: ignore[arg-type]
        systems.append(system)
        return system

    yield make
    for system in systems:
        system.stop()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """One system for the tests of a module that leave it as they found it."""
    folder = Path(tempfile.mkdtemp(prefix="custody-e2e-"))
    system = System.start(folder)
    yield system
    system.stop()
    shutil.rmtree(folder, ignore_errors=True)
