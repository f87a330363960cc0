"""What a caller ordered, and everything it was ever told about it.

Rules: one order has one request id and one body for ever; what was told is only added to; a caller whose call failed knows
nothing, and asks again with the same request id.
"""

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import custody
from custody import PaymentState

from tests.e2e.system import CREDITOR

YES = frozenset({PaymentState.ACCEPTED, PaymentState.SETTLED})
NO = frozenset({PaymentState.REJECTED, PaymentState.CANCELLED})
SETTLED = frozenset({PaymentState.SETTLED, PaymentState.NEEDS_ATTENTION, *NO})
"""After these nothing is under way any more."""

AMOUNT = custody.Money("0.10", "EUR")
# Nothing that the caller may act upon: it asks again with the same request id.
_KNOWS_NOTHING = (
    custody.UnavailableError,
    custody.DeadlineExceededError,
    custody.RateLimitedError,
)


@dataclass(slots=True, kw_only=True)
class Order:
    """One payment as its caller knows it."""

    consent: custody.Consent
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    end_to_end_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    names: set[str] = field(default_factory=set)
    told: list[PaymentState] = field(default_factory=list)
    surprises: list[Exception] = field(default_factory=list)
    _callers: list[threading.Thread] = field(default_factory=list)

    def place(self, client: custody.Client, *, amount: custody.Money = AMOUNT) -> custody.Payment:
        """Orders it, for the first time or again."""
        return self._heard(
            client.payments.initiate(
                self.consent.name,
                amount=amount,
                debtor_account=self.consent.accounts[0],
                creditor_account=CREDITOR,
                creditor_name="Wholesale Ltd",
                end_to_end_id=self.end_to_end_id,
                request_id=self.request_id,
                timeout_seconds=20,
            )
        )

    def look(self, client: custody.Client) -> custody.Payment:
        """Asks how it stands; it must be known already."""
        return self._heard(client.payments.get(next(iter(self.names))))

    def place_meanwhile(self, client: custody.Client, *, wait_seconds: float) -> None:
        """Orders it in a thread of its own, and waits a moment for the answer."""
        caller = threading.Thread(target=self._try, args=(lambda: self.place(client),), daemon=True)
        self._callers.append(caller)
        caller.start()
        caller.join(wait_seconds)

    def wait_for_callers(self, *, seconds: float) -> None:
        end = time.monotonic() + seconds
        for caller in self._callers:
            caller.join(max(0.0, end - time.monotonic()))
        assert not any(caller.is_alive() for caller in self._callers), "a call never ended"

    def _heard(self, payment: custody.Payment) -> custody.Payment:
        self.names.add(payment.name)
        self.told.append(payment.state)
        return payment

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except _KNOWS_NOTHING:
            return
        except Exception as error:  # noqa: BLE001 - the machine fails on it, in its own thread
            self.surprises.append(error)


def tried(call: Callable[[], custody.Payment]) -> custody.Payment | None:
    """The answer, or None where the caller was told nothing."""
    try:
        return call()
    except _KNOWS_NOTHING:
        return None
