"""Payments against running sidecars, with callers, faults, kills and pauses in any order (`payments_machine`).

MACHINE_EXAMPLES says how many runs of each kind there are (default: few, for every change; `make test-faults` takes more).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.e2e.system import System
from tests.machine.payments_machine import World, machine_for

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "2"))
STEPS = 12


@pytest.fixture(params=["sandbox-bank-idempotent", "sandbox-bank"], ids=["class_A", "class_C"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One sidecar on SQLite."""
    folder = Path(tempfile.mkdtemp(prefix="custody-machine-"))
    system = System.start(folder, descriptor=request.param)
    world = World(pods=[system], consent=system.consent())
    yield world
    world.close()
    system.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(120 + 90 * EXAMPLES)
def test_payments_whatever_happens(world: World, tmp_path: Path) -> None:
    """At most once; never both yes and no; what was told is true; all come to rest; and the log of it all verifies."""
    run_state_machine_as_test(
        machine_for(world),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=[
                Phase.explicit,
                Phase.generate,
            ],  # the steps that failed are printed; to shrink them takes many minutes
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )

    for number, pod in enumerate(world.pods):
        export, key = tmp_path / f"log-{number}", tmp_path / f"key-{number}.pem"
        export.write_bytes(b"".join(pod.admin.audit.export()))
        key.write_bytes(pod.development.public_key_pem("audit"))
        command = [sys.executable, "-m", "sidecar.audit.verifier", str(export), "--key", str(key)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
