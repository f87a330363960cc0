"""The model and the product change the payment's row in the same ways, so neither can move without the other.

Once by the tables: what the model does to the row is what `TRANSITIONS` allows, no more and no less. And once by the real code:
each change that payments and reconciliation make in the simulation, with its step of the epoch, is one that the model makes.
"""

import asyncio
import functools
from typing import Any

from sidecar.domain.payment import TERMINAL, TRANSITIONS, PaymentState
from tests.fakes.store import FakeStore
from tests.model import payment_model as model
from tests.model.defects import payment_model
from tests.model.explorer import Step, explore
from tests.model.payment_model import Bounds, Transition, transition_of
from tests.model.small_simulation import Simulation
from tests.unit.custody.support import SIGNER

# What the model calls a row, and what the product does. The model's "none" is a payment that has no row yet.
NAMES = {
    model.INTENT: PaymentState.INTENT,
    model.DISPATCHED: PaymentState.DISPATCHED,
    model.RECONCILING: PaymentState.RECONCILING,
    model.AWAITING: PaymentState.AWAITING_AUTHORISATION,
    model.ACCEPTED: PaymentState.ACCEPTED,
    model.SETTLED: PaymentState.SETTLED,
    model.REJECTED: PaymentState.REJECTED,
    model.REJECTED_LATE: PaymentState.REJECTED_LATE,
    model.CANCELLED: PaymentState.CANCELLED,
    model.ABANDONED: PaymentState.ABANDONED,
    model.NEEDS_ATTENTION: PaymentState.NEEDS_ATTENTION,
}
WORDS = {state: name for name, state in NAMES.items()}
SMALL = Bounds(crashes=1, dispatches=2)

_MOST_SEEDS = 12  # two or three do, mostly
# Changes of the row that say when to look again and nothing else: the model has no such times.
PUT_OFF = {Transition(state, state, 0) for state in (model.RECONCILING, model.ACCEPTED, model.AWAITING)}


def is_simulated(change: Transition) -> bool:
    """The simulation has no operator, and no bank that drops a payment or asks the owner once it has accepted."""
    return not (
        change.before == model.NEEDS_ATTENTION
        or change.after in (model.REJECTED_LATE, model.CANCELLED)
        or (change.before, change.after) == (model.ACCEPTED, model.AWAITING)
    )


@functools.cache
def transitions(bank: str) -> frozenset[Transition]:
    """All that the model does to the row at a bank of this class."""
    found: set[Transition] = set()

    def note(before: model.State, step: Step[model.State]) -> None:
        if (change := transition_of(before, step)) is not None:
            found.add(change)

    for world in (f"{bank}, followed", *([f"{bank}, revoked"] if bank != "B" else [])):
        assert explore(payment_model(world, bounds=SMALL), max_states=200_000, on_step=note).is_exhaustive
    return frozenset(found)


def test_every_state_of_the_product_has_its_name_in_the_model() -> None:
    assert set(NAMES.values()) == set(PaymentState)
    assert {NAMES[name] for name in model.TERMINAL} == TERMINAL


def test_the_model_changes_the_row_exactly_as_the_table_allows() -> None:
    """No change in the product that the model lacks, and none in the model that the product forbids."""
    by_model = {(change.before, change.after) for bank in "ABC" for change in transitions(bank)}
    by_product = {(WORDS[before], WORDS[after]) for before, those in TRANSITIONS.items() for after in those}

    assert by_model - {(model.NONE, model.INTENT)} == by_product


class WatchedStore(FakeStore):
    """Notes each change of a payment's row, as it becomes durable."""

    def __init__(self, **arguments: Any) -> None:
        self.changes: set[Transition] = set()
        super().__init__(**arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_state" and "_state" in self.__dict__:
            before = self._state.payments
            for identifier, row in value.payments.items():
                if row is not before.get(identifier):
                    self._note(before.get(identifier), row)
        super().__setattr__(name, value)

    def _note(self, before: Any, after: Any) -> None:
        name, epoch = (WORDS[before.state], before.epoch) if before else (model.NONE, 0)
        self.changes.add(Transition(name, WORDS[after.state], after.epoch - epoch))


class WatchedSimulation(Simulation):
    """The simulation with a bank that also says received, awaiting and refused, and goes on from there."""

    def __init__(self, seed: int, name: str) -> None:
        super().__init__(seed, name)
        self.watched = WatchedStore(signer=SIGNER, clock=self.world.clock)
        self.world.store = self.watched

    async def turn(self) -> None:
        bank = self.world.bank
        bank.initial_status, bank.with_redirect = self.chance.choice(
            (("ACSC", False), ("RCVD", False), ("RCVD", True), ("ACCP", False), ("RJCT", False))
        )
        for payment in bank.payments.values():
            if payment.status in ("RCVD", "ACCP"):
                payment.status = self.chance.choice(("RCVD", "ACCP", "ACSC"))
        await super().turn()

    async def come_to_an_end(self, requests: list[Any]) -> None:
        bank = self.world.bank
        bank.initial_status = "ACSC"
        for payment in bank.payments.values():
            if payment.status != "RJCT":
                payment.status = "ACSC"
        for _ in range(3):  # an old payment is asked about once an hour
            self.advance(3700)
            await self.reconcile(self.serving)
        await super().come_to_an_end(requests)


def test_the_real_code_changes_the_row_only_as_the_model_does() -> None:
    """Including by how much each change raises the epoch; and it makes every change of the model that it is led to."""
    led_to = {change for bank in "AC" for change in transitions(bank) if is_simulated(change)}
    made: set[Transition] = set()
    for seed in range(_MOST_SEEDS):
        for bank, name in (("A", "sandbox-bank-idempotent"), ("C", "sandbox-bank")):
            simulation = WatchedSimulation(seed, name)
            asyncio.run(simulation.run())

            assert simulation.watched.changes - PUT_OFF <= transitions(bank), f"class {bank}, seed {seed}"
            made |= simulation.watched.changes
        if led_to <= made:
            return

    assert led_to <= made
