"""Sidecars as processes on one PostgreSQL: the main job, a crash, and two pods with one request id."""

import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from custody import PaymentState

from tests.e2e.system import System
from tools.development import DevelopmentError


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="custody-e2e-") as folder:
        system = System.start(Path(folder), store="postgresql")
        yield system
        system.stop()


def test_a_killed_sidecar_goes_on_and_pays_once(system: System) -> None:
    """SIGKILL in between: the next process of the name continues log and payments, the repeat finds the first payment, the bank
    has it once, and nothing that the database keeps shows a token."""
    consent = system.consent()
    request_id = str(uuid.uuid4())
    payment = system.pay(consent, request_id=request_id, end_to_end_id="PG-1")
    system.sidecar.process.kill()
    system.restart_sidecar()
    again = system.pay(consent, request_id=request_id, end_to_end_id="PG-1")
    final = system.client.payments.wait(payment.name, timeout_seconds=30)

    assert again.name == payment.name
    assert final.state is PaymentState.SETTLED
    assert len(system.bank.ledger("PG-1")) == 1
    kept = b"".join(path.read_bytes() for path in system.development.database_files())
    assert consent.name.partition("/")[2].encode() in kept  # it is the right place to look
    assert system.marker.encode() not in kept


def test_two_pods_with_one_request_id_pay_once(system: System) -> None:
    """The application asks both pods at the same time, again and again: each request id is one payment at the bank."""
    consent = system.shared_consent()
    other = system.another_pod("second")
    pods = [system, other]
    try:
        for number in range(5):
            request_id, reference = str(uuid.uuid4()), f"PG-2-{number}"
            with ThreadPoolExecutor(4) as threads:
                asked = [
                    threads.submit(pod.pay, consent, request_id=request_id, end_to_end_id=reference)
                    for pod in (*pods, *pods)
                ]
                names = {one.result().name for one in asked}
            assert len(names) == 1
            final = other.client.payments.wait(names.pop(), timeout_seconds=30)
            assert final.state is PaymentState.SETTLED
            assert len(system.bank.ledger(reference)) == 1
    finally:
        other.stop_pod()


def test_a_second_sidecar_of_one_name_does_not_start(system: System) -> None:
    """It says why, in one line, and the first one goes on."""
    with pytest.raises(DevelopmentError, match="another sidecar uses this database under the name development"):
        system.another_pod("development")

    assert system.pay(system.shared_consent(), end_to_end_id="PG-3").name


def test_the_doctor_finds_it_well(system: System) -> None:
    """custodyctl doctor looks at server, role, rights and schema while the sidecar runs."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("custodyctl")), "doctor", "--no-login"),
            *("--config", str(system.development.directory / "custody.yaml")),
        ],
        env={"PATH": "/usr/bin:/bin", **system.development.token.environment()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert "its server, this role's rights and the schema are as they must be" in " ".join(done.stdout.split())
