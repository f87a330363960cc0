"""A bank with a ledger, and the network in front of it: both may do whatever they are not promised not to do.

What they promise is the class's. A (key with window): the same key within a day is the same payment; a request may be under way for
an hour. B (look-up): a request has arrived five seconds after its send deadline or never, and what arrived is on the list after the
quiet period. C: nothing. For all classes: the bank acts on a request at most once, and refuses with a listed code only a request
that it has not acted on.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from sidecar.custody.payments import NETWORK_LIFE_SECONDS
from sidecar.domain.provider import Answer, NotSent, SendOutcome, Unknown
from tests.fakes.bank import ScriptedBank, answer, error
from tests.fakes.clock import FakeClock
from tests.fakes.egress import BankRequest
from tests.simulation.virtual import SimulationLoop

__all__ = ["Bank", "ClassName", "Network"]

ClassName = Literal["A", "B", "C"]
WINDOW_SECONDS = 86_400.0
QUIET_SECONDS = 5.0
LATENCY_SECONDS = 0.2
DELAYS_SECONDS = {"A": (1, 30, 600, 3600), "B": (1, 5, 9), "C": (1, 30, 600, 3600)}

Twist = Callable[[Answer], SendOutcome]


class _TrueClock(FakeClock):
    """The bank's own clock, which nobody sets."""

    def __init__(self, loop: SimulationLoop) -> None:
        super().__init__()
        self._loop = loop

    def boot_time_ns(self) -> int:
        return int(self._loop.time() * 1e9)


class Bank(ScriptedBank):
    """`on_receipt` is called before the bank looks at an initiation, `on_execution` after it has moved money."""

    def __init__(
        self,
        *,
        class_name: ClassName,
        loop: SimulationLoop,
        chance: random.Random,
        on_receipt: Callable[[BankRequest], None],
        on_execution: Callable[[str], None],
    ) -> None:
        super().__init__(
            clock=_TrueClock(loop), window_seconds=WINDOW_SECONDS if class_name == "A" else None, token_seconds=None
        )
        self._loop = loop
        self._chance = chance
        self._on_receipt = on_receipt
        self._on_execution = on_execution
        self._shown_at: dict[str, float] = {}

    def receive(self, request: BankRequest, *, refuse: bool = False) -> Answer:
        kind = self.kind(request)
        if kind == "initiate":
            self._on_receipt(request)
        if refuse:
            echo = request.headers.get("x-request-id", "")
            refused = error(400, "FORMAT_ERROR")
            return replace(refused, headers=(*refused.headers, ("x-request-id", echo)))
        outcome = self(request)
        assert isinstance(outcome, Answer)
        self.requests.clear()
        return outcome

    def _initiate(self, request: BankRequest) -> Answer:
        known = len(self.payments)
        self.initial_status = self._chance.choices(("ACSC", "ACSP", "RJCT"), (80, 15, 5))[0]
        answered = super()._initiate(request)
        if len(self.payments) > known:
            payment = self.payments[f"bank-payment-{known + 1}"]
            self._shown_at[payment.id] = self._loop.time() + QUIET_SECONDS * self._chance.random()
            if payment.status != "RJCT":
                self._on_execution(str(payment.body["endToEndIdentification"]))
        return answered

    def _lookup(self, request: BankRequest) -> Answer:
        (reference,) = parse_qs(urlsplit(request.target).query)["instructionIdentification"]
        now = self._loop.time()
        found = [
            self._listed(payment)
            for payment in self.payments.values()
            if payment.reference == reference and self._shown_at[payment.id] <= now
        ]
        return answer(200, {"payments": found})

    def decide_all(self) -> None:
        """What was accepted settles."""
        for payment in self.payments.values():
            payment.status = "ACSC" if payment.status == "ACSP" else payment.status


@dataclass(frozen=True, kw_only=True)
class _Fate:
    """Of one request. `arrives_after_seconds` None: never. `twist` spoils the answer; None of a `twist` loses it."""

    name: str = "fine"
    arrives_after_seconds: float | None = LATENCY_SECONDS
    refuse: bool = False
    answer_after_seconds: float = LATENCY_SECONDS
    twist: Twist | None = None
    answer_lost: bool = False


def _broken(code: str) -> Twist:
    return lambda _answer: Unknown(code=code)


def _status(status: int, document: object = None) -> Twist:
    return lambda given: replace(
        given, status=status, body=given.body if document is None else answer(1, document).body
    )


SPOILED: dict[str, Twist] = {
    "cut": _broken("ANSWER_TRUNCATED"),
    "200": _status(200),
    "202": _status(202),
    "307": _status(307),
    "408": _status(408, {"tppMessages": [{"category": "ERROR", "code": "FORMAT_ERROR"}]}),
    "409 as for a duplicate": _status(409, {"tppMessages": [{"category": "ERROR", "code": "FORMAT_ERROR"}]}),
    "429": _status(429, {"tppMessages": [{"category": "ERROR", "code": "ACCESS_EXCEEDED"}]}),
    "500": _status(500),
    "503": _status(503, {"tppMessages": [{"category": "ERROR", "code": "FORMAT_ERROR"}]}),
    "400 unlisted": _status(400, {"tppMessages": [{"category": "ERROR", "code": "X_UNKNOWN"}]}),
    "400 with a payment": _status(
        400, {"paymentId": "x", "tppMessages": [{"category": "ERROR", "code": "FORMAT_ERROR"}]}
    ),
    "half a body": lambda given: replace(given, body=given.body[: len(given.body) // 2]),
    "no id": _status(201, {"transactionStatus": "ACSC"}),
    "no body": lambda given: replace(given, body=b""),
    "html": lambda given: replace(given, headers=(("content-type", "text/html"),)),
    "another's": lambda given: replace(given, headers=(given.headers[0], ("x-request-id", "another"))),
}


class Network:
    """Carries requests to the bank and answers back, or not. `notice` is told what happens, for the trace."""

    def __init__(
        self,
        *,
        bank: Bank,
        class_name: ClassName,
        loop: SimulationLoop,
        chance: random.Random,
        notice: Callable[[str], None],
    ) -> None:
        self.bank = bank
        self.faulty = True
        self.under_way = 0
        self._class_name = class_name
        self._loop = loop
        self._chance = chance
        self._notice = notice

    async def exchange(self, request: BankRequest, *, deadline_seconds: float) -> SendOutcome:
        """What the sender sees by its deadline. The request may arrive later."""
        kind = self.bank.kind(request)
        fate = self._fate(kind, deadline_seconds)
        self._notice(f"{kind} {request.headers.get('x-request-id')} {fate.name}")
        if fate.name == "not sent":
            return NotSent(code="CONNECT_FAILED")
        answered: asyncio.Future[SendOutcome] = self._loop.create_future()
        if fate.arrives_after_seconds is not None:
            self.under_way += 1
            self._loop.call_later(fate.arrives_after_seconds, self._arrive, request, fate, answered)
        try:
            return await asyncio.wait_for(answered, deadline_seconds)
        except TimeoutError:
            return Unknown(code="ANSWER_TIMEOUT")

    def _arrive(self, request: BankRequest, fate: _Fate, answered: "asyncio.Future[SendOutcome]") -> None:
        self.under_way -= 1
        given = self.bank.receive(request, refuse=fate.refuse)
        self._notice(f"bank {self.bank.kind(request)} {request.headers.get('x-request-id')} {given.status}")
        if not fate.answer_lost:
            outcome = fate.twist(given) if fate.twist else given
            self._loop.call_later(fate.answer_after_seconds, _give, answered, outcome)

    def _fate(self, kind: str, deadline_seconds: float) -> _Fate:
        latency = LATENCY_SECONDS * self._chance.random()
        fine = _Fate(arrives_after_seconds=latency, answer_after_seconds=latency)
        if not self.faulty or self._chance.random() < 0.5:
            return fine
        dice = self._chance.random()
        if dice < 0.1:
            return replace(fine, name="not sent")
        if dice < 0.2:
            return replace(fine, name="request lost", arrives_after_seconds=None)
        if dice < 0.35:
            return replace(fine, name="answer lost", answer_lost=True)
        if dice < 0.45 and kind == "initiate":
            return replace(fine, name="refused", refuse=True)
        if dice < 0.6 and kind == "initiate":
            return replace(fine, name="delayed", arrives_after_seconds=self._delay_seconds(deadline_seconds))
        if dice < 0.65:
            return replace(fine, name="slow", answer_after_seconds=deadline_seconds * 2 * self._chance.random())
        name = self._chance.choice(_SPOILED_NAMES if kind == "initiate" else _SPOILED_READS)
        return replace(fine, name=name, twist=SPOILED[name])

    def _delay_seconds(self, deadline_seconds: float) -> float:
        seconds = self._chance.choice(DELAYS_SECONDS[self._class_name]) * (0.5 + 0.5 * self._chance.random())
        longest = deadline_seconds + NETWORK_LIFE_SECONDS - 0.01
        return min(seconds, longest) if self._class_name == "B" else seconds


# A read that is answered 408 or 429 is not asked again for a while that the bank chose: no case for a limit of time.
_SPOILED_NAMES = sorted(SPOILED)
_SPOILED_READS = ["cut", "500", "half a body", "html", "another's", "no body"]


def _give(answered: "asyncio.Future[Any]", outcome: SendOutcome) -> None:
    if not answered.done():
        answered.set_result(outcome)
