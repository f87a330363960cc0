"""The third layer of the proof: callers, faults, kills and pauses in any order against running sidecars; the bank's ledger judges.

The first layer is the model of the protocol, the second the real code in simulated time; here everything is real: processes,
sockets, TLS, HSM module, database. What one run lacks in number it has in truth.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import custody
import psutil
from custody import PaymentState
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, initialize, invariant, multiple, rule

from tests.e2e.system import System, eventually
from tests.machine.orders import AMOUNT, NO, SETTLED, YES, Order, tried

__all__ = ["PaymentsMachine", "World", "machine_for"]

PAYMENTS = "/v1/payments/"
# What may happen to the next POST of a payment at the bank. "executed" and "not executed" are the bank's own truth. The first
# ones are tried most.
FAULTS: Mapping[str, Mapping[str, object]] = {
    "500, executed": {"kind": "answer", "status": 500, "body": "{}", "commit": True},
    "none": {},
    "connection cut before the body is read": {"kind": "cut_before_read"},
    "connection cut, not executed": {"kind": "cut_before_commit"},
    "connection cut, executed": {"kind": "cut_after_commit"},
    "half an answer, executed": {"kind": "cut_mid_body"},
    "500, not executed": {"kind": "answer", "status": 500, "body": "{}"},
    "slow, executed": {"kind": "delay_after_commit", "seconds": 1.5},
    "slow, executed late": {"kind": "delay_before_commit", "seconds": 1.5},
    "nonsense, executed": {"kind": "body", "variant": "html"},
    "refused": {
        "kind": "answer",
        "status": 400,
        "body": '{"tppMessages":[{"category":"ERROR","code":"FORMAT_ERROR"}]}',
    },
}
_SETTLE_SECONDS = 60.0


@dataclass(slots=True, kw_only=True)
class World:
    """What outlives one example: one or more sidecars on one vault, their bank, and a consent. `pods` share the bank."""

    pods: list[System]
    consent: custody.Consent
    clients: list[custody.Client] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clients = [custody.Client(pod.address, owner="person-1", max_retries=0) for pod in self.pods]

    @property
    def bank(self) -> System:
        return self.pods[0]

    def process(self, pod: int, name: str) -> psutil.Process | None:
        """None where it is not there at the moment."""
        try:
            gateway = psutil.Process(self.pods[pod].sidecar.pid)
            return gateway if name == "gateway" else self.pods[pod].child(name)
        except (psutil.NoSuchProcess, AssertionError):
            return None

    def close(self) -> None:
        for client in self.clients:
            client.close()


class PaymentsMachine(RuleBasedStateMachine):
    """`world` is set by `machine_for`."""

    world: ClassVar[World]
    orders = Bundle("orders")

    def __init__(self) -> None:
        super().__init__()
        self._placed: list[Order] = []

    @initialize(target=orders, faults=st.lists(st.sampled_from(list(FAULTS)), min_size=3, max_size=5))
    def begin(self, faults: list[str]) -> MultipleResults[Order]:
        """Every run has some payments under way, at different sidecars."""
        self.world.bank.bank.clear_faults()
        return multiple(*(self._placed_with(pod, fault) for pod, fault in enumerate(faults)))

    # -- what callers do

    @rule(target=orders, pod=st.integers(0, 7), fault=st.sampled_from(list(FAULTS)))
    def place(self, pod: int, fault: str) -> Order:
        """A new payment, while something may go wrong at the bank."""
        return self._placed_with(pod, fault)

    @rule(order=orders, pod=st.integers(0, 7), fault=st.sampled_from(list(FAULTS)))
    def place_again(self, order: Order, pod: int, fault: str) -> None:
        """The same request id and body, at any sidecar, while the first call may be under way still."""
        self._set(fault)
        order.place_meanwhile(self._client(pod), wait_seconds=1.0)

    @rule(order=orders, pods=st.tuples(st.integers(0, 7), st.integers(0, 7)))
    def place_twice_at_once(self, order: Order, pods: tuple[int, int]) -> None:
        for pod in pods:
            order.place_meanwhile(self._client(pod), wait_seconds=0.0)

    @rule(order=orders, pod=st.integers(0, 7))
    def place_with_another_amount(self, order: Order, pod: int) -> None:
        """Refused wherever the order is known, and never a payment of its own."""
        if not order.told:
            return
        try:
            tried(lambda: order.place(self._client(pod), amount=custody.Money("0.20", "EUR")))
        except custody.RequestIdReusedError:
            return

    @rule(order=orders, pod=st.integers(0, 7))
    def look(self, order: Order, pod: int) -> None:
        if order.names:
            tried(lambda: order.look(self._client(pod)))

    # -- what happens to sidecars

    @rule(pod=st.integers(0, 7), name=st.sampled_from(["egress", "hsm"]))
    def kill_child(self, pod: int, name: str) -> None:
        self._signal(pod, name, signal.SIGKILL)

    @rule(pod=st.integers(0, 7))
    def kill_sidecar(self, pod: int) -> None:
        """SIGKILL of the gateway, and a new sidecar on the same vault."""
        pod %= len(self.world.pods)
        os.kill(self.world.pods[pod].sidecar.pid, signal.SIGKILL)
        self.world.pods[pod].restart_sidecar()

    @rule(pod=st.integers(0, 7))
    def stop_sidecar(self, pod: int) -> None:
        """SIGTERM: it ends cleanly, whatever is under way."""
        system = self.world.pods[pod % len(self.world.pods)]
        assert system.sidecar.stop(within_seconds=60) == 0
        system.restart_sidecar()

    @rule(
        pod=st.integers(0, 7),
        name=st.sampled_from(["gateway", "egress", "hsm"]),
        seconds=st.sampled_from([0.1, 0.5, 1.0, 4.0]),
    )
    def pause(self, pod: int, name: str, seconds: float) -> None:
        """SIGSTOP; with 4 s a child is longer silent than the supervisor bears."""
        process = self._signal(pod, name, signal.SIGSTOP)
        time.sleep(seconds)
        if process is not None and process.is_running():
            process.send_signal(signal.SIGCONT)

    # -- what must always hold

    @invariant()
    def bank_has_each_payment_at_most_once(self) -> None:
        counts = self._ledger()
        assert all(counts[order.end_to_end_id] <= 1 for order in self._placed), "the bank made a payment twice"

    @invariant()
    def never_both_yes_and_no(self) -> None:
        for order in self._placed:
            told = list(order.told)
            assert not (YES & set(told) and NO & set(told)), f"both yes and no were told: {told}"
            assert len(order.names) <= 1, "one request id has two payments"
            assert not order.surprises, order.surprises

    def teardown(self) -> None:
        """The faults stop. Every order comes to rest, and what was ever told was the truth."""
        self.world.bank.bank.clear_faults()
        for order in self._placed:
            order.wait_for_callers(seconds=60)
        last = {order.request_id: self._at_rest(order) for order in self._placed}
        counts = self._ledger()
        for order in self._placed:
            executed = counts[order.end_to_end_id]
            assert last[order.request_id] in SETTLED, f"never came to rest: {order.told}"
            assert executed <= 1, "the bank made a payment twice"
            if YES & set(order.told):
                assert executed == 1, f"accepted was told, and the bank has nothing: {order.told}"
            if NO & set(order.told):
                assert executed == 0, f"rejected was told, and the bank has it: {order.told}"
        self.never_both_yes_and_no()

    def _at_rest(self, order: Order) -> PaymentState | None:
        def ask() -> PaymentState | None:
            payment = tried(lambda: order.place(self._client(0), amount=AMOUNT))
            return payment.state if payment else None

        return eventually(ask, lambda state: state in SETTLED, seconds=_SETTLE_SECONDS)

    # --

    def _placed_with(self, pod: int, fault: str) -> Order:
        order = Order(consent=self.world.consent)
        self._placed.append(order)
        self._set(fault)
        order.place_meanwhile(self._client(pod), wait_seconds=1.0)
        return order

    def _client(self, pod: int) -> custody.Client:
        return self.world.clients[pod % len(self.world.clients)]

    def _set(self, fault: str) -> None:
        description = dict(FAULTS[fault])
        if description:
            self.world.bank.bank.set_fault(str(description.pop("kind")), PAYMENTS, method="POST", **description)

    def _ledger(self) -> Counter[str]:
        return Counter(str(entry["end_to_end_id"]) for entry in self.world.bank.bank.ledger())

    def _signal(self, pod: int, name: str, number: signal.Signals) -> psutil.Process | None:
        process = self.world.process(pod % len(self.world.pods), name)
        if process is not None:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                return None
        return process


def machine_for(world: World) -> type[PaymentsMachine]:
    """A machine that works on `world`."""
    return type("PaymentsMachine", (PaymentsMachine,), {"world": world})
