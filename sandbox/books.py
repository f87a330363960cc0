"""The bank's books: demo persons, their accounts, and the ledger of what was really executed.

Rules this module keeps:
- Money is a whole number of cents; it leaves an account in the same step in which the ledger gets its entry.
- An entry is written once and never changed; its booking follows the clock, `SETTLE_SECONDS` after execution.
- The same seed at every start: persons, accounts, opening balances and history are constants (dates are relative to
  the day of the start).
"""

import datetime
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from sandbox.web import Clock

SETTLE_SECONDS = 1.0
BIC = "SNDBDEFFXXX"
_AMOUNT = re.compile(r"[0-9]{1,14}(\.[0-9]{1,2})?")
_HISTORY_DAYS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One executed payment."""

    sequence: int
    payment_id: str
    product: str
    end_to_end_id: str | None
    amount_cents: int
    debtor_iban: str
    creditor_iban: str
    creditor_name: str
    remittance: str | None
    executed_at: float  # seconds since 1970
    x_request_id: str
    idempotency_key: str | None
    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """One line of an account statement; `amount_cents` is negative when money left."""

    transaction_id: str
    amount_cents: int
    counterparty: str
    counterparty_iban: str
    remittance: str
    end_to_end_id: str | None
    entered_at: float
    booked_at: float  # pending before this time


@dataclass(slots=True, kw_only=True)
class Account:
    """One account; `available_cents` counts what is executed, `booked_cents` what is settled."""

    resource_id: str
    iban: str
    name: str
    product: str
    owner_id: str
    owner_name: str
    available_cents: int
    booked_cents: int
    history: list[Movement]  # in order of entry
    _unsettled: deque[Movement] = field(default_factory=deque)

    def add(self, movement: Movement) -> None:
        """Enter a movement that settles at its `booked_at`."""
        self.available_cents += movement.amount_cents
        self.history.append(movement)
        self._unsettled.append(movement)

    def settle(self, now: float) -> None:
        """Book what is due."""
        while self._unsettled and self._unsettled[0].booked_at <= now:
            self.booked_cents += self._unsettled.popleft().amount_cents

    def newest_first(self) -> Iterator[Movement]:
        """Walk through the statement backwards."""
        return reversed(self.history)


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """A customer of the bank."""

    person_id: str
    name: str
    pin: str


@dataclass(slots=True, kw_only=True)
class BooksMemory:
    """What the books remember."""

    accounts: dict[str, Account]  # by IBAN
    ledger: list[Entry] = field(default_factory=list)


class Books:
    """Accounts and ledger."""

    def __init__(self, *, clock: Clock, memory: BooksMemory) -> None:
        self._clock = clock
        self.persons = {person.person_id: person for person in _PERSONS}
        self.accounts = memory.accounts
        self.by_resource = {account.resource_id: account for account in self.accounts.values()}
        self.ledger = memory.ledger

    def accounts_of(self, person_id: str) -> list[Account]:
        """Return a person's accounts, in the order in which the bank shows them."""
        return [account for account in self.accounts.values() if account.owner_id == person_id]

    def execute(
        self,
        *,
        payment_id: str,
        product: str,
        end_to_end_id: str | None,
        amount_cents: int,
        debtor: Account,
        creditor_iban: str,
        creditor_name: str,
        remittance: str | None,
        x_request_id: str,
        idempotency_key: str | None,
        client_id: str,
    ) -> Entry:
        """Move the money and write the ledger's entry, in one step. The caller has checked the funds."""
        now = self._clock()
        entry = Entry(
            sequence=len(self.ledger) + 1,
            payment_id=payment_id,
            product=product,
            end_to_end_id=end_to_end_id,
            amount_cents=amount_cents,
            debtor_iban=debtor.iban,
            creditor_iban=creditor_iban,
            creditor_name=creditor_name,
            remittance=remittance,
            executed_at=now,
            x_request_id=x_request_id,
            idempotency_key=idempotency_key,
            client_id=client_id,
        )
        self.ledger.append(entry)
        debtor.add(_movement(entry, -amount_cents, creditor_name, creditor_iban))
        creditor = self.accounts.get(creditor_iban)
        if creditor is not None:
            creditor.add(_movement(entry, amount_cents, debtor.owner_name, debtor.iban))
        return entry


def opening_books(now: float) -> BooksMemory:
    """Make the books as they are at the start of a bank (seconds since 1970)."""
    return BooksMemory(accounts={account.iban: account for account in _seed_accounts(now)})


def parse_cents(text: str) -> int:
    """Parse an amount in euro, strictly; ValueError if it is not one or not positive."""
    if not _AMOUNT.fullmatch(text):
        raise ValueError("the amount is not a positive number with a decimal point and at most two decimals")
    whole, _, fraction = text.partition(".")
    cents = int(whole) * 100 + int(fraction.ljust(2, "0"))
    if cents == 0:
        raise ValueError("the amount is zero")
    return cents


def format_cents(cents: int) -> str:
    """Write cents as euro with two decimals."""
    sign = "-" if cents < 0 else ""
    return f"{sign}{abs(cents) // 100}.{abs(cents) % 100:02d}"


def iso_date(seconds: float) -> str:
    """Write a time as an ISO 8601 date in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def iso_time(seconds: float) -> str:
    """Write a time as RFC 3339 in UTC with milliseconds."""
    text = datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _movement(entry: Entry, amount_cents: int, counterparty: str, counterparty_iban: str) -> Movement:
    return Movement(
        transaction_id=f"T{entry.sequence:08d}",
        amount_cents=amount_cents,
        counterparty=counterparty,
        counterparty_iban=counterparty_iban,
        remittance=entry.remittance or "",
        end_to_end_id=entry.end_to_end_id,
        entered_at=entry.executed_at,
        booked_at=entry.executed_at + SETTLE_SECONDS,
    )


_PERSONS = (
    Person(person_id="anna", name="Anna Beispiel", pin="1234"),
    Person(person_id="bert", name="Bert Voorbeeld", pin="1234"),
)

# resource id, IBAN, name, product, owner, balance in cents
_ACCOUNTS = (
    ("3dc3d5b3-7023-4848-9853-f5400a64e801", "DE52100100100000000101", "Current account", "Giro", "anna", 12_480_55),
    ("3dc3d5b3-7023-4848-9853-f5400a64e802", "DE41100100100000000202", "Savings account", "Savings", "anna", 20_00),
    (
        "3dc3d5b3-7023-4848-9853-f5400a64e804",
        "DE19100100100000000404",
        "Business account",
        "Business Giro",
        "anna",
        900_000_000_00,
    ),
    ("3dc3d5b3-7023-4848-9853-f5400a64e803", "NL22INGB0000000303", "Betaalrekening", "Current", "bert", 4_210_00),
)

# counterparty, IBAN, text, cents; one every two days, in turn
_HISTORY = (
    ("Stadtwerke", "DE89370400440532013000", "Electricity", -84_30),
    ("Employer GmbH", "DE75512108001245126199", "Salary", 2_950_00),
    ("Supermarket", "NL91ABNA0417164300", "Groceries", -63_17),
    ("Landlord", "FR1420041010050500013M02606", "Rent", -1_150_00),
    ("Bookshop", "BE68539007547034", "Books", -24_95),
)


def _seed_accounts(now: float) -> list[Account]:
    names = {person.person_id: person.name for person in _PERSONS}
    return [
        Account(
            resource_id=resource_id,
            iban=iban,
            name=name,
            product=product,
            owner_id=owner,
            owner_name=names[owner],
            available_cents=cents,
            booked_cents=cents,
            history=_seed_history(resource_id, now),
        )
        for resource_id, iban, name, product, owner, cents in _ACCOUNTS
    ]


def _seed_history(resource_id: str, now: float) -> list[Movement]:
    """Make the statement before the start: it explains the opening balance and does not change it."""
    today = now - now % 86400
    days = range(_HISTORY_DAYS, 0, -2)
    history = []
    for number, days_ago in enumerate(days):
        counterparty, iban, remittance, cents = _HISTORY[number % len(_HISTORY)]
        at = today - days_ago * 86400 + 36000
        history.append(
            Movement(
                transaction_id=f"H{resource_id[-1]}{number:06d}",
                amount_cents=cents,
                counterparty=counterparty,
                counterparty_iban=iban,
                remittance=remittance,
                end_to_end_id=None,
                entered_at=at,
                booked_at=at,
            )
        )
    return history
