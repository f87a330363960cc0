"""Payments against running sidecars, with callers, faults, kills and pauses in any order (`payments_machine`).

MACHINE_EXAMPLES says how many runs of each kind there are (default: few, for every change; `make test-faults` takes more).
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.e2e.system import System
from tests.machine.payments_machine import World, machine_for

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "2"))
STEPS = 12


CLASSES = {"A": "sandbox-bank-idempotent", "B": "sandbox-bank-lookup", "C": "sandbox-bank"}


@pytest.fixture(params=[*itertools.product(["sqlite"], "ABC"), *itertools.product(["postgresql"], "AC")], ids="-".join)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One sidecar on SQLite, or two on one PostgreSQL, at a bank of this class."""
    store, name = request.param
    folder = Path(tempfile.mkdtemp(prefix="custody-machine-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        system = System.start(folder, descriptor=CLASSES[name], store=store)
        stack.callback(system.stop)
        pods = [system]
        if store == "postgresql":
            pods.append(system.another_pod("second"))
            stack.callback(pods[1].stop_pod)
        world = World(pods=pods, consent=system.consent())
        stack.callback(world.close)
        yield world


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
        verified = subprocess.run(command, capture_output=True, text=True, check=False)
        assert verified.returncode == 0, verified.stdout + verified.stderr
