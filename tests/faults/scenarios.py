"""What a sidecar's core is doing when it is killed, and what it does when it comes back. Runs in the processes of `core_process`.

A scenario begins from a database that `set_up` has made, once; `act` is the piece of work with the kill points; `recover` is the
next process: it starts as a sidecar does, the application asks again with the same request id, the background work goes round, and
all that it finds is reported.
"""

import io
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidecar.audit.entry import AuditEntry
from sidecar.audit.export import export_lines
from sidecar.audit.verifier import verify_export
from sidecar.custody.accounts import AccountRead
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.ids import ConsentId, RequestId
from sidecar.domain.payment import PaymentState
from sidecar.errors import CustodyError, PreconditionFailed, Unavailable
from sidecar.ports import ConsentFilter, PaymentFilter
from sidecar.store import SqliteStore
from tests.fakes.bank import API, TOKENS, ScriptedBank
from tests.fakes.clock import FakeClock
from tests.fakes.egress import BankRequest, SoftwareKeys
from tests.fakes.hsm import FakeHsm
from tests.faults.remote_bank import ask_bank_at
from tests.unit.custody.support import (
    CLUSTER,
    OWNER,
    PROVIDER,
    SIGNER,
    Core,
    GatedEgress,
    World,
    caller,
    connector,
    create_request,
    draft,
    payment_request,
    redirect,
    request_id,
)

__all__ = ["SCENARIOS", "Given", "Scenario", "Scene", "Shared", "bank_of", "opened_scene"]

Given = Mapping[str, str]
Say = Callable[[dict[str, Any]], None]
A, C = "sandbox-bank-idempotent", "sandbox-bank"
_OPEN_STATES = frozenset(PaymentState) - {
    PaymentState.SETTLED,
    PaymentState.REJECTED,
    PaymentState.REJECTED_LATE,
    PaymentState.CANCELLED,
    PaymentState.ABANDONED,
    PaymentState.NEEDS_ATTENTION,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`twists` are what happens to the next requests of a kind, by name; `age_seconds` lie between set-up and act;
    `rounds` of reconciliation belong to the act."""

    work: str
    descriptor: str = A
    twists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    token_seconds: int = 1_000_000
    age_seconds: float = 0.0
    rounds: int = 0


SCENARIOS: Mapping[str, Scenario] = {
    "payment, class A": Scenario(work="payment"),
    "payment, class C": Scenario(work="payment", descriptor=C),
    "payment, class A, answer lost, reconciled": Scenario(work="payment", twists={"initiate": ("lost",)}, rounds=3),
    "payment, class C, answer lost, flagged": Scenario(
        work="payment", descriptor=C, twists={"initiate": ("lost",)}, rounds=2
    ),
    "payment, refused by the bank": Scenario(work="payment", twists={"initiate": ("refused",)}),
    "payment, the bank cannot be reached": Scenario(work="payment", twists={"initiate": ("not sent",)}),
    "payment, followed to its end": Scenario(work="payment", twists={"initiate": ("received",)}, rounds=2),
    "payment with a refresh on the way": Scenario(work="payment", token_seconds=1200, age_seconds=700),
    "consent completion": Scenario(work="completion"),
    "refresh": Scenario(work="refresh", token_seconds=1200, age_seconds=700),
    "revocation": Scenario(work="revocation"),
}


def bank_of(scenario: Scenario) -> ScriptedBank:
    """The bank as it stands when the act begins."""
    window = 86_400.0 if scenario.descriptor == A else None
    bank = ScriptedBank(clock=FakeClock(), window_seconds=window, token_seconds=scenario.token_seconds)
    if scenario.work == "completion":
        bank.authorise("code-1")
    else:
        bank.mint()
    return bank


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all processes of one harness have in common, because it would outlive them: keys in the HSM."""

    keys: SoftwareKeys
    hsm: FakeHsm


class Scene(World):
    """A core on a real database file and a bank in another process."""

    def __init__(self, scenario: Scenario, shared: Shared, store: SqliteStore, clock: FakeClock, bank: Path) -> None:
        self.scenario = scenario
        self.clock = clock
        # Only for the tokens of `consent`, which are named by number: the books are the other process's.
        self.bank = ScriptedBank(clock=clock, token_seconds=scenario.token_seconds)
        self.store = store  # type: ignore[assignment]
        self.keys = shared.keys
        self.hsm = shared.hsm
        self.connector = connector(scenario.descriptor)
        self._bank_path = bank
        self.core = self.start()

    def start(self, instance: str = "one") -> Core:
        async def ask(request: BankRequest) -> Any:
            return await ask_bank_at(self._bank_path, request)

        origins = {API: PROVIDER, TOKENS: PROVIDER}
        egress = GatedEgress(
            cluster=CLUSTER, origins=origins, bank=ask, keys=self.keys, boot_time_ns=self.clock.boot_time_ns
        )
        return Core(
            store=self.store,
            egress=egress,
            hsm=self.hsm,
            clock=self.clock,
            connectors={PROVIDER: self.connector},
            instance=instance,
        )

    # -- before

    async def set_up(self) -> Given:
        if self.scenario.work == "completion":
            created = await self.core.consents.create(caller(), create_request(self))
            return {"consent": created.id, "request_id": request_id()}
        consent = await self.consent(life_seconds=self.scenario.token_seconds)
        return {"consent": consent.id, "request_id": request_id()}

    # -- the work

    async def act(self, given: Given, say: Say) -> None:
        """The call, again where it was told to try again, as the clients do; then some rounds of the background work."""
        for _ in range(3):
            if await self.ask(given, say):
                break
        for _ in range(self.scenario.rounds):
            self.clock.advance(2)
            with suppress(Unavailable):  # the next round tries again
                await self.core.reconciler.run_due()

    async def ask(self, given: Given, say: Say) -> bool:
        """The application's call, and what it is told. Whether that was an answer, and not to try again."""
        calls: Mapping[str, Callable[[Given], Awaitable[str]]] = {
            "payment": self._pay,
            "completion": self._complete,
            "refresh": self._read,
            "revocation": self._revoke,
        }
        try:
            say({"told": await calls[self.scenario.work](given)})
        except CustodyError as error:
            say({"refused": error.reason})
            return not isinstance(error, Unavailable)
        return True

    async def _pay(self, given: Given) -> str:
        consent = await self._consent(given)
        request = payment_request(consent, request_id=RequestId(given["request_id"]))
        return (await self.core.payments.initiate(caller(), request)).state

    async def _complete(self, given: Given) -> str:
        brought = redirect(given["state"], "code-1")
        identifier = RequestId(given["request_id"])
        return (
            await self.core.consents.complete(caller(), ConsentId(given["consent"]), OWNER, brought, identifier)
        ).state

    async def _read(self, given: Given) -> str:
        read = AccountRead(consent=ConsentId(given["consent"]), owner=OWNER)
        return f"{len(await self.core.accounts.list_accounts(caller(), read))} account"

    async def _revoke(self, given: Given) -> str:
        identifier = RequestId(given["request_id"])
        return (await self.core.consents.revoke(caller(), ConsentId(given["consent"]), OWNER, identifier)).state

    async def _consent(self, given: Given) -> Consent:
        found = await self.store.consent(ConsentId(given["consent"]))
        assert found is not None
        return found

    # -- afterwards

    async def recover(self, given: Given, say: Say, *, asks_first: bool) -> None:
        """`asks_first`: whether the application's repeat or the background work comes first."""
        if self.scenario.work in ("completion", "refresh"):
            await self._say_whether_it_reads(given, say, "reads at once")
        if not asks_first:
            await self._background()
            if (await self._consent(given)).state is ConsentState.REVOKED:
                await self._end_without_the_application(given, say)
                return
        await self.ask(given, say)
        for _ in range(60):
            self.clock.advance(10)
            await self._background()
            if not await self._is_anything_open():
                break
        if self.scenario.work == "refresh":
            self.clock.advance(600)  # the old access token has ended
        await self.ask(given, say)
        await self._say_whether_it_reads(given, say, "reads")
        await self._background()
        await self.report(say)

    async def _end_without_the_application(self, given: Given, say: Say) -> None:
        """A revocation that is on record is brought to its end by the background work alone."""
        await self._say_whether_it_reads(given, say, "reads")
        await self._background()
        await self.report(say)

    async def _background(self) -> None:
        await self.core.reconciler.run_due()
        await self.core.consents.expire_due()
        await self.core.consents.finish_ended()
        await self.store.sign_pending()

    async def _is_anything_open(self) -> bool:
        payments = await self.store.payments(PaymentFilter(states=_OPEN_STATES), after="", limit=10)
        completing = ConsentFilter(states=frozenset({ConsentState.COMPLETING}))
        return bool(payments) or bool(await self.store.consents(completing, after="", limit=10))

    async def _say_whether_it_reads(self, given: Given, say: Say, name: str) -> None:
        try:
            say({name: await self._read(given)})
        except PreconditionFailed as error:
            say({name: error.reason})
        except CustodyError as error:
            say({name: f"error {error.reason}"})

    async def report(self, say: Say) -> None:
        store = self.store
        leaves = [leaf.entry for leaf in await store.leaves(start=0, limit=1_000_000)]
        notes = [note for _, note in await store.checkpoints(start_size=0, limit=1_000_000)]
        export = io.BytesIO(b"".join(export_lines(store.origin, leaves, notes)))
        verified = verify_export(export, public_key=SIGNER.pem, origin=store.origin)
        entries = [AuditEntry.decode(leaf).draft for leaf in leaves]
        payments = await store.payments(PaymentFilter(), after="", limit=1000)
        consents = await store.consents(ConsentFilter(), after="", limit=1000)
        say(
            {
                "verified": verified.ok and verified.violation_count == 0,
                "findings": str(verified),
                "events": [[entry.event.name, entry.payment] for entry in entries],
                "payments": [
                    {
                        "id": payment.id,
                        "state": payment.state,
                        "end_to_end_id": payment.instruction.end_to_end_id,
                        "claimed": await store.claim(payment.caller, payment.request_id) is not None,
                    }
                    for payment in payments
                ],
                "consents": [
                    {
                        "state": consent.state,
                        "has_key": bool(consent.wrapped_data_key),
                        "secrets": sorted(s.kind.name for s in (await store.secrets(consent.id)).secrets),
                    }
                    for consent in consents
                ],
            }
        )


async def opened_scene(
    scenario: Scenario, shared: Shared, *, database: Path, bank: Path, after_seconds: float
) -> Scene:
    """A sidecar that has started on `database`, so many seconds after the set-up."""
    clock = FakeClock()
    clock.advance(after_seconds)
    store = await SqliteStore.open(
        path=database, cluster=CLUSTER, signer=SIGNER, clock=clock, migrate=False, linger_seconds=0.0
    )
    await store.record([draft(AuditEvent.SIDECAR_STARTED)])
    return Scene(scenario, shared, store, clock, bank)
