"""Real processes move from SQLite to PostgreSQL: the same consent pays before and after, once, and the log is one log."""

import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from custody import PaymentState

from tests.e2e.system import System, eventually
from tools.development import DevelopmentError, ScratchDatabase

INSTANCE = "shop-0"


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="custody-e2e-") as folder:
        system = System.start(Path(folder))
        yield system
        system.stop()


@pytest.fixture(scope="module")
def database() -> Iterator[ScratchDatabase]:
    database = ScratchDatabase.start()
    yield database
    database.stop()


def _custodyctl(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(Path(sys.executable).with_name("custodyctl")), *arguments],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _migrate(system: System, database: ScratchDatabase, *options: str) -> "subprocess.CompletedProcess[str]":
    return _custodyctl(
        *("--format", "json", "store", "migrate", "--from", str(system.development.database)),
        *("--to", database.url, "--instance", INSTANCE, *options),
    )


def _verified(system: System, folder: Path) -> dict[str, Any]:
    """What `audit verify` says of an export that is made now."""
    export, key = folder / f"log-{uuid.uuid4()}", folder / "audit.pem"
    key.write_bytes(system.development.public_key_pem("audit"))
    done = _custodyctl("--address", system.development.admin_address, "audit", "export", "--output", str(export))
    assert done.returncode == 0, done.stderr
    done = _custodyctl("--format", "json", "audit", "verify", str(export), "--key", str(key))
    assert done.returncode == 0, done.stdout
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_vault_moves_and_goes_on(system: System, database: ScratchDatabase, tmp_path: Path) -> None:
    """Consent and payment on SQLite; stop, migrate, start on PostgreSQL with the same HSM. The consent reads and pays, the first
    request repeated finds the first payment, the bank has each once, and one log tells of all, from its first entry on. The file
    starts no sidecar any more; nothing that was written shows a token."""
    consent, before = system.consent(), str(uuid.uuid4())
    first = system.client.payments.wait(
        system.pay(consent, request_id=before, end_to_end_id="MOVE-1").name, timeout_seconds=30
    )
    log = _verified(system, tmp_path)
    running = _migrate(system, database)
    system.sidecar.stop()
    migrated = _migrate(system, database)
    with pytest.raises(DevelopmentError, match=r"the vault has moved to .* and the instance shop-0"):
        system.development.start_sidecar(system.bank)
    system.sidecar = system.development.start_sidecar(
        system.bank, changes={"store": {"url": database.url, "instance": INSTANCE}}
    )
    system.client.wait_ready(30)

    again = system.pay(consent, request_id=before, end_to_end_id="MOVE-1")
    second = system.client.payments.wait(
        system.pay(consent, amount="20.00", end_to_end_id="MOVE-2").name, timeout_seconds=30
    )
    balances = system.client.accounts.balances(consent.name, system.client.accounts.list(consent.name)[0].name)
    whole = eventually(lambda: _verified(system, tmp_path), lambda seen: seen["payments_dispatched"] == 2, seconds=30)

    assert running.returncode == 1
    assert "a sidecar, or another migration, uses the file; stop it first" in running.stderr
    assert migrated.returncode == 0, migrated.stderr
    assert json.loads(migrated.stdout)["outcome"] == "migrated"
    assert (first.state, second.state) == (PaymentState.SETTLED, PaymentState.SETTLED)
    assert again.name == first.name
    assert len(system.bank.ledger("MOVE-1")) == 1
    assert len(system.bank.ledger("MOVE-2")) == 1
    assert balances
    assert whole["origin"] == log["origin"]
    assert whole["entry_count"] > log["entry_count"]
    assert whole["events"]["SIDECAR_STARTED"] == log["events"]["SIDECAR_STARTED"] + 1
    for told in (running, migrated):
        assert system.marker not in told.stdout + told.stderr
    kept = b"".join(path.read_bytes() for path in database.cluster.data.rglob("*") if path.is_file())
    assert consent.name.partition("/")[2].encode() in kept  # it is the right place to look
    assert system.marker.encode() not in kept
