"""Runs custodyctl in this process, against sidecars and HSMs that are not there."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from click.testing import CliRunner
from custody import Money, PaymentState, PeriodicLimit, PeriodType, Purpose
from custody.testing import FakeCustody
from custody.values import HsmToken, Key, LogStatus, Process, Status

from sidecar.cli.main import main
from sidecar.cli.session import Session

__all__ = [
    "AUSTRIAN_IBAN",
    "GERMAN_IBAN",
    "NOW",
    "AskedHsm",
    "Ran",
    "ToldSidecar",
    "assert_golden",
    "good_status",
    "run",
    "sandbox",
    "session_of",
    "some_keys",
]

NOW = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
AUSTRIAN_IBAN = "AT611904300234573201"
GERMAN_IBAN = "DE89370400440532013000"
_GOLDEN = Path(__file__).parent / "golden"
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a run ended, and what it wrote to the two streams."""

    code: int
    out: str
    err: str

    def document(self) -> Any:
        return json.loads(self.out)


def run(
    *arguments: str,
    session: Session | None = None,
    typed: str = "",
    environment: Mapping[str, str | None] | None = None,
) -> Ran:
    """`typed` is what standard input holds. Variables of the caller's own environment do not reach the run."""
    cleared: dict[str, str | None] = {
        name: None for name in os.environ if name.startswith("CUSTODY_") or name == "NO_COLOR"
    }
    with CliRunner().isolation(input=typed, env={**cleared, **(environment or {})}) as streams:
        code = main(arguments, session=session)
        out, err = streams[0].getvalue(), streams[1].getvalue()
    return Ran(code=int(code), out=out.decode(), err=err.decode())


def session_of(sidecar: Any, **more: Any) -> Session:
    """A session whose sidecar is a FakeCustody, or anything with the client's resources. Time stands still at NOW."""
    connect = (lambda _: sidecar.client()) if isinstance(sidecar, FakeCustody) else (lambda _: sidecar)
    return Session(connect=connect, now=lambda: NOW, **more)


def assert_golden(name: str, text: str) -> None:
    """Compare with the file of the contract; UUIDs are numbered in the order of their appearance."""
    numbers: dict[str, str] = {}
    found = _UUID.sub(
        lambda match: numbers.setdefault(match[0], f"{len(numbers) + 1:08d}-0000-4000-8000-000000000000"), text
    )
    path = _GOLDEN / name
    if os.environ.get("CUSTODYCTL_WRITE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text(), f"{name}: the contract with scripts has changed"


def sandbox() -> tuple[FakeCustody, list[str]]:
    """A sidecar with an active consent (two payments), one that awaits its person, and one that was revoked; their names."""
    time = NOW - timedelta(hours=1)
    fake = FakeCustody(clock=lambda: time)
    client = fake.client(owner="user:42")
    asked: dict[str, Any] = {
        "provider": fake.provider,
        "redirect_uri": fake.redirect_uri,
        "expire_time": NOW + timedelta(days=90),
    }
    names = []
    for number, purposes in enumerate(([Purpose.PAYMENTS, Purpose.ACCOUNTS], [Purpose.BALANCES], [Purpose.ACCOUNTS])):
        time += timedelta(minutes=1)
        limit = Money("500.00", "EUR") if number == 0 else None
        accounts = [AUSTRIAN_IBAN] if number == 0 else []
        periodic = [PeriodicLimit(amount=Money("1500", "EUR"), period_type=PeriodType.MONTH)] if number == 0 else []
        pending = client.consents.create(
            purposes=purposes, payment_limit=limit, periodic_limits=periodic, accounts=accounts, **asked
        )
        if number != 1:
            client.consents.complete(pending.consent.name, fake.approve(pending.authorisation_uri))
        names.append(pending.consent.name)
    client.consents.revoke(names[2])
    for amount, states in (("12.34", [PaymentState.UNKNOWN]), ("99.00", [PaymentState.ACCEPTED])):
        time += timedelta(minutes=1)
        fake.script_payments(*states)
        client.payments.initiate(
            names[0],
            amount=Money(amount, "EUR"),
            creditor_account=GERMAN_IBAN,
            creditor_name="Blumen Huber",
            remittance_information="Invoice 7",
            end_to_end_id="E2E-7",
        )
    return fake, names


@dataclass(slots=True, kw_only=True)
class ToldSidecar:
    """A client of a sidecar that says what it was told to: for what FakeCustody has no HSM to say it with."""

    status_now: Status
    keys_now: tuple[Key, ...] = ()

    @property
    def keys(self) -> "_ToldKeys":
        return _ToldKeys(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class _ToldKeys:
    told: ToldSidecar

    def status(self, *, timeout_seconds: float | None = None) -> Status:
        return self.told.status_now

    def list(self, *, timeout_seconds: float | None = None) -> tuple[Key, ...]:
        return self.told.keys_now


@dataclass(slots=True)
class AskedHsm:
    """Answers inspections by command, and remembers what it was asked."""

    answers: Mapping[str, Any]
    asked: list[tuple[Sequence[str], bytes]] = field(default_factory=list)

    def __call__(self, arguments: Sequence[str], *, settings: bytes = b"", timeout_seconds: float | None) -> Any:
        self.asked.append((arguments, settings))
        answer = self.answers[arguments[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer


def good_status(**changes: Any) -> Status:
    """A sidecar that is well, unless `changes` say otherwise."""
    values: dict[str, Any] = {
        "version": "1.2.3",
        "instance": "audit/blue/7b8e",
        "cluster": "blue",
        "uptime": timedelta(hours=26),
        "ready": True,
        "processes": tuple(
            Process(process=name, state="READY", restart_count=count, start_time=started)
            for name, count, started in (
                ("gateway", 0, NOW - timedelta(hours=26)),
                ("egress", 0, None),
                ("hsm", 2, NOW - timedelta(minutes=3)),
            )
        ),
        "hsm_token": some_token(),
        "root_key": "keys/00112233445566778899aabbccddeeff",
        "master_key": "keys/ffeeddccbbaa99887766554433221100",
        "master_key_version": 3,
        "log": LogStatus(
            origin="audit/blue/7b8e", entry_count=12, checkpoint_size=11, checkpoint_time=NOW - timedelta(seconds=1)
        ),
        "consent_counts": {},
    }
    return Status(**{**values, **changes})


def some_token(**changes: bool) -> HsmToken:
    flags = {"logged_in": True, "user_pin_count_low": False, "user_pin_final_try": False, "user_pin_locked": False}
    return HsmToken(
        label="custody blue",
        serial="1a2b3c4d",
        model="Vendor Model 5",
        module="/opt/hsm/module.so",
        **{**flags, **changes},
    )


def some_keys() -> tuple[Key, ...]:
    """A root key, an audit key, and two master keys."""
    none: dict[str, Any] = {"attributes": {}, "public_key_pem": "", "version": 0}
    return (
        Key(
            **{**none, "attributes": {"SENSITIVE": True, "EXTRACTABLE": False}},
            name="keys/00112233445566778899aabbccddeeff",
            label="root/2026-11",
            purpose="ROOT",
            algorithm="AES-256",
            state="ACTIVE",
        ),
        Key(
            **{**none, "public_key_pem": "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n"},
            name="keys/0102",
            label="audit/2026-11",
            purpose="AUDIT",
            algorithm="EC-256",
            state="ACTIVE",
        ),
        *(
            Key(
                **{**none, "version": version},
                name=f"keys/{version:032x}",
                label=label,
                purpose="MASTER",
                algorithm="AES-256",
                state=state,
            )
            for version, label, state in ((2, "master/2", "RETIRED"), (3, "master/3", "ACTIVE"))
        ),
    )
