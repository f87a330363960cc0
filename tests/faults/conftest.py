"""What the kill sweeps share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.sweeps import Harness


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    """The processes that may be killed, and their bank, for the sweeps of one module."""
    with tempfile.TemporaryDirectory(prefix="custody-faults-") as folder, Harness.started(Path(folder)) as harness:
        yield harness
