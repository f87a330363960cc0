"""custodyctl as an administrator runs it: processes of its own, against a real sidecar, a real token and a sandbox bank."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import custody
import psutil
import pytest
import yaml

from sandbox.testing import SandboxProcess
from tools.development import Development, SidecarProcess

ROOT = Path(__file__).resolve().parents[2]
MARKER = "ctlmark7d1e"
OWNER = "user:42"


@dataclass(slots=True, kw_only=True)
class System:
    """What runs, and everything that custodyctl has said to anybody in these tests."""

    development: Development
    bank: SandboxProcess
    sidecar: SidecarProcess
    said: list[str] = field(default_factory=list)

    @property
    def config(self) -> str:
        return str(self.development.directory / "custody.yaml")

    @property
    def client(self) -> custody.Client:
        return custody.Client(self.development.address, owner=OWNER)

    def ctl(
        self, *arguments: str, address: str | None = None, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            env=self.environment(address, **environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        self.said += [done.stdout, done.stderr]
        return done

    def document(self, *arguments: str) -> Any:
        done = self.ctl("--format", "json", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "sidecar.cli.main", *arguments]

    def environment(self, address: str | None = None, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CUSTODY_")}
        return {
            **kept,
            **self.development.token.environment(),
            "CUSTODY_ADDRESS": address or self.development.admin_address,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'clients/python/src'}",
            **more,
        }

    def new_consent(self) -> str:
        """An active consent; its name."""
        with self.client as client:
            pending = client.consents.create(
                provider="providers/sandbox-bank",
                purposes=[custody.Purpose.ACCOUNTS, custody.Purpose.PAYMENTS],
                expire_time=datetime.now(UTC) + timedelta(days=90),
                redirect_uri=self.development.redirect_uri,
                psu_context=custody.PsuContext(ip_address="192.0.2.44"),
            )
            redirected_to = self.bank.redirect_after(pending.authorisation_uri)
            return client.consents.complete(pending.consent.name, redirected_to).name

    def new_payment(self, consent: str) -> str:
        """A payment that is settled; its name."""
        with self.client as client:
            payment = client.payments.initiate(
                consent,
                amount=custody.Money("49.90", "EUR"),
                debtor_account=client.accounts.list(consent)[0].iban,
                creditor_account="DE75512108001245126199",
                creditor_name="Wholesale Ltd",
                request_id=str(uuid.uuid4()),
            )
            return client.payments.wait(payment.name, timeout_seconds=60).name


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    development = Development.prepare(tmp_path_factory.mktemp("custodyctl"), bank_arguments=["--token-prefix", MARKER])
    with development:
        bank = development.start_bank(duration_seconds=900)
        system = System(development=development, bank=bank, sidecar=development.start_sidecar(bank))
        yield system


@pytest.fixture(scope="session")
def consent(running: System) -> str:
    return running.new_consent()


@pytest.fixture(scope="session")
def payment(running: System, consent: str) -> str:
    return running.new_payment(consent)


# --- looking --------------------------------------------------------------------------------------------------------------


def test_status_of_a_running_sidecar(running: System) -> None:
    """Exit status 0 and everything that the contract promises; the table says the same in words."""
    status = running.document("status")
    table = running.ctl("status")

    assert status["verdict"] == "ok"
    assert status["cluster"] == "development"
    assert {process["process"]: process["state"] for process in status["processes"]} == {
        "gateway": "READY",
        "egress": "READY",
        "hsm": "READY",
    }
    assert status["hsm_token"]["serial"] == running.development.token.serial
    assert status["hsm_token"]["logged_in"] is True
    assert status["master_key_version"] == 1
    assert status["log"]["entry_count"] >= 2
    assert table.returncode == 0
    assert running.development.token.serial in table.stdout


def test_keys_and_their_public_halves(running: System) -> None:
    """One key of each purpose, and the audit key's PEM is the one that was provisioned."""
    keys = running.document("key", "list")["keys"]
    label = next(key["label"] for key in keys if key["purpose"] == "AUDIT")
    root = running.document("key", "show", next(key["name"] for key in keys if key["purpose"] == "ROOT"))

    assert sorted(key["purpose"] for key in keys) == [
        "AUDIT",
        "CLIENT_AUTHENTICATION",
        "DOCUMENT_SIGNING",
        "MASTER",
        "REQUEST_SIGNING",
        "ROOT",
    ]
    assert running.ctl("key", "show", label, "--pem").stdout.encode() == running.development.public_key_pem("audit")
    assert root["attributes"]["EXTRACTABLE"] is False
    assert f"serial={running.development.token.serial}" in root["uri"]


def test_consents_and_payments(running: System, consent: str, payment: str) -> None:
    """What an application made is listed and shown, whoever owns it."""
    listed = running.document("consent", "list", "--state", "ACTIVE", "--owner", OWNER)["consents"]
    paid = running.document("payment", "list", "--consent", consent)["payments"]
    shown = running.document("payment", "show", payment)

    assert consent in [each["name"] for each in listed]
    assert running.document("consent", "show", consent)["provider"] == "providers/sandbox-bank"
    assert payment in [each["name"] for each in paid]
    assert shown["amount"] == {"amount": "49.90", "currency_code": "EUR"}
    assert shown["state"] == "SETTLED"


def test_the_application_socket_administers_nothing(running: System) -> None:
    """Exit status 1, and where to go instead."""
    done = running.ctl("status", address=running.development.address)

    assert done.returncode == 1
    assert "surface: admin" in done.stderr or "socket of its own" in done.stderr


# --- the log --------------------------------------------------------------------------------------------------------------


def test_the_log_is_exported_and_verified_offline(running: System, payment: str, tmp_path: Path) -> None:
    """The export verifies with the public key alone; one changed octet, and it does not."""
    export, key = tmp_path / "log", tmp_path / "audit.pem"
    label = next(each["label"] for each in running.document("key", "list")["keys"] if each["purpose"] == "AUDIT")
    key.write_text(running.ctl("key", "show", label, "--pem").stdout)
    exported = running.ctl("audit", "export", "--output", str(export))
    origin = running.document("status")["log"]["origin"]

    good = running.ctl(
        "--format",
        "json",
        "audit",
        "verify",
        str(export),
        "--key",
        str(key),
        "--origin",
        origin,
        CUSTODY_ADDRESS="unix:/no",
    )
    tampered = tmp_path / "tampered"
    lines = export.read_bytes().splitlines(keepends=True)
    tampered.write_bytes(b"".join([*lines[:3], lines[4], lines[3], *lines[5:]]))
    bad = running.ctl("--format", "json", "audit", "verify", str(tampered), "--key", str(key))

    assert exported.returncode == 0, exported.stderr
    assert stat.S_IMODE(export.stat().st_mode) == 0o600
    assert good.returncode == 0, good.stdout
    assert json.loads(good.stdout)["payments_dispatched"] >= 1
    assert bad.returncode == 4


def test_bi_e27_two_exports_into_one_file(running: System, tmp_path: Path) -> None:
    """One wins, the other one is told; the file is whole."""
    export = tmp_path / "log"
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: running.ctl("audit", "export", "--output", str(export)), range(2)))

    assert sorted(done.returncode for done in both) == [0, 1]
    assert export.read_bytes().splitlines()[-1].startswith(b"end ")


def test_the_log_tells_of_one_consent(running: System, consent: str, payment: str) -> None:
    """Its creation, its activation and its payment's dispatch before its outcome, in order."""
    lines = running.ctl("--format", "json", "audit", "tail", "-n", "200", "--consent", consent).stdout.splitlines()
    events = [json.loads(line)["event"] for line in lines]

    assert events[0] == "CONSENT_CREATED"
    assert events.index("CONSENT_ACTIVATED") < events.index("PAYMENT_DISPATCHED") < events.index("PAYMENT_OUTCOME")
    assert {json.loads(line)["consent"] for line in lines} == {consent}


def test_following_the_log(running: System) -> None:
    """What happens now appears; Ctrl-C ends it with exit status 130."""
    following = subprocess.Popen(
        running.command("--format", "json", "audit", "tail", "-f", "-n", "1"),
        cwd=ROOT,
        env=running.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert following.stdout is not None
        before = json.loads(following.stdout.readline())["index"]
        created = running.new_consent()
        seen = [json.loads(following.stdout.readline()) for _ in range(2)]
        following.send_signal(signal.SIGINT)
        _, err = following.communicate(timeout=30)
    finally:
        following.kill()
        following.wait()
    running.said += [json.dumps(seen), err]

    assert [entry["index"] for entry in seen] == [before + 1, before + 2]
    assert seen[0]["consent"] == created
    assert following.returncode == 130
    assert "Traceback" not in err


# --- ending a consent -----------------------------------------------------------------------------------------------------


def test_revoking_a_consent(running: System) -> None:
    """A dry run leaves no trace in the log; without a terminal --yes is needed; then nothing can use the consent any more."""
    name = running.new_consent()
    entries = running.document("status")["log"]["entry_count"]
    dry = running.ctl("consent", "revoke", name, "--dry-run")
    unasked = running.ctl("consent", "revoke", name)
    after_both = running.document("consent", "show", name)["state"]
    done = running.ctl("consent", "revoke", name, "--yes")
    again = running.ctl("consent", "revoke", name, "--yes")
    events = running.ctl("--format", "json", "audit", "tail", "-n", "200", "--consent", name).stdout

    assert (dry.returncode, unasked.returncode, after_both) == (0, 2, "ACTIVE")
    assert "would be revoked" in dry.stderr
    assert (done.returncode, again.returncode) == (0, 0), done.stderr + again.stderr
    assert "CONSENT_REVOKED" in events
    assert entries <= running.document("status")["log"]["entry_count"]
    with running.client as client, pytest.raises(custody.ConsentUnusableError):
        client.accounts.list(name)


def test_a_person_at_a_terminal_types_the_name(running: System) -> None:
    """On a terminal it asks, and the typed name revokes."""
    import pty

    name = running.new_consent()
    leader, follower = pty.openpty()
    asking = subprocess.Popen(
        running.command("consent", "revoke", name),
        cwd=ROOT,
        env=running.environment(),
        stdin=follower,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(follower)
    try:
        os.write(leader, f"{name}\n".encode())
        _, err = asking.communicate(timeout=60)
    finally:
        asking.kill()
        asking.wait()
        os.close(leader)

    assert asking.returncode == 0, err
    assert f"Type {name} to go on" in err
    assert running.document("consent", "show", name)["state"] == "REVOKED"


# --- HSM, configuration, doctor -------------------------------------------------------------------------------------------


def test_the_hsm_is_looked_into_beside_a_running_sidecar(running: System) -> None:
    """Slots, the token, and the promises of the module: a second process, which takes nothing away from the first."""
    slots = running.document("hsm", "list-slots", "--config", running.config)["slots"]
    info = running.document("hsm", "info", "--config", running.config)
    test = running.document("hsm", "test", "--config", running.config, "--bench", "10")

    assert running.development.token.serial in [slot["token_serial"] for slot in slots]
    assert info["missing_mechanisms"] == []
    assert test["verdict"] == "passed"
    assert {rate["operation"] for rate in test["rates"]} == {"wrap", "unwrap", "sign"}
    assert running.document("status")["verdict"] == "ok"


def test_doctor_of_a_running_system(running: System) -> None:
    """No failure, every section looked at."""
    done = running.ctl("--format", "json", "doctor", "--config", running.config)
    report = json.loads(done.stdout)

    assert [check for check in report["checks"] if check["outcome"] == "failure"] == []
    assert list(dict.fromkeys(check["section"] for check in report["checks"])) == [
        "Configuration",
        "Files",
        "HSM",
        "Database",
        "Sockets",
        "Certificates",
        "Sidecar",
    ]


def changed_configuration(running: System, directory: Path, **hsm: str) -> str:
    """The configuration of a second sidecar beside the first, which was never started."""
    document = yaml.safe_load(Path(running.config).read_text())
    document["store"]["path"] = str(directory / "custody.db")
    for listener in document["listeners"]:
        listener["address"] = f"unix:{directory}/{listener['surface']}.sock"
    document["hsm"].update(hsm)
    path = directory / "custody.yaml"
    path.write_text(yaml.safe_dump(document))
    directory.chmod(0o700)
    return str(path)


def test_doctor_while_the_sidecar_is_down(running: System, tmp_path: Path) -> None:
    """All is looked at; that none answers is a warning, exit status 3."""
    environment = running.environment()
    del environment["CUSTODY_ADDRESS"]
    done = subprocess.run(
        running.command("--format", "json", "doctor", "--config", changed_configuration(running, tmp_path)),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    report = json.loads(done.stdout)
    running.said += [done.stdout, done.stderr]

    assert done.returncode == 3, done.stdout
    assert [check["message"] for check in report["checks"] if check["outcome"] == "warning"] == ["no sidecar answers"]
    assert any("the root key" in check["message"] for check in report["checks"])


def test_a_wrong_pin(running: System, tmp_path: Path) -> None:
    """bi_E8: tried once, and told. From then on doctor leaves the login alone, until the right PIN was given by hand."""
    pin = tmp_path / "pin"
    pin.write_text("hunter22")
    pin.chmod(0o400)
    config = changed_configuration(running, tmp_path, pin_file=str(pin))
    wrong = running.ctl("hsm", "test", "--config", config)
    wary = running.ctl("--format", "json", "doctor", "--config", running.config)
    right = running.ctl("hsm", "test", "--config", running.config)  # the token forgets about the wrong PIN
    after = running.ctl("--format", "json", "doctor", "--config", running.config)

    assert wrong.returncode == 3
    assert "tried once" in wrong.stderr
    assert "hunter22" not in wrong.stdout + wrong.stderr
    assert "a wrong user PIN was given" in wary.stdout
    assert "the keys were not looked at" in wary.stdout
    assert right.returncode == 0, right.stderr
    assert "a wrong user PIN was given" not in after.stdout


def test_the_configuration_is_checked_and_shown(running: System) -> None:
    """Valid, and shown as it is in effect."""
    assert running.document("config", "check", "--config", running.config)["valid"] is True
    assert running.document("config", "show", "--config", running.config)["configuration"]["cluster"] == "development"


# --- when things go wrong -------------------------------------------------------------------------------------------------


def eventually(look: Callable[[], bool], *, within_seconds: float = 60.0) -> None:
    end = time.monotonic() + within_seconds
    while not look():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


def test_status_sees_a_replaced_process(running: System) -> None:
    """While the hsm process is away status ends with 3 or 5, never with 0 and "ok"; afterwards it counts the replacement."""
    before = restarts(running)
    child = next(
        each for each in psutil.Process(running.sidecar.pid).children() if "sidecar.hsm" in " ".join(each.cmdline())
    )
    child.kill()
    codes = set()

    def is_replaced() -> bool:
        done = running.ctl("--format", "json", "status")
        codes.add(done.returncode)
        return done.returncode == 0 and restarts(running) > before

    eventually(is_replaced)
    assert codes <= {0, 3, 5}


def restarts(running: System) -> int:
    done = running.ctl("--format", "json", "status")
    if done.returncode not in (0, 3):
        return -1
    return sum(process["restart_count"] for process in json.loads(done.stdout)["processes"])


def test_nothing_that_was_said_holds_a_secret(running: System, consent: str, payment: str) -> None:
    """No token of the bank and no PIN in any output of any command of this file that ran before; and of these."""
    for command in (
        ["consent", "show", consent],
        ["payment", "show", payment],
        ["audit", "tail", "-n", "200"],
        ["key", "list"],
    ):
        for form in ("table", "json", "yaml"):
            assert running.ctl("--format", form, *command).returncode == 0
    said = "".join(running.said)
    pins = [running.development.token.pin_file.read_text(), running.development.token.so_pin_file.read_text()]

    assert len(said) > 10_000
    assert MARKER not in said
    assert MARKER.encode().hex() not in said
    assert not [pin for pin in pins if pin in said]
    assert not re.search(r"BEGIN (EC |RSA |ENCRYPTED )?PRIVATE KEY", said)
