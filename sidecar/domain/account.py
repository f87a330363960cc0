"""What account reads give back, and who is asking. Amounts are exact; what a bank did not send is empty, never guessed."""

from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum

from sidecar.domain.money import Money

__all__ = ["Account", "Balance", "BookingStatus", "PsuContext", "Transaction", "TransactionPage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PsuContext:
    """The person's own connection to the application (Berlin Group PSU-* headers).

    Present means that the person is asking right now; absent means an unattended access, which banks count.
    """

    ip_address: str
    user_agent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    resource_id: str
    iban: str
    currency_code: str
    owner_name: str = ""
    display_name: str = ""
    product: str = ""
    cash_account_type: str = ""  # ISO 20022 ExternalCashAccountType1Code


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    balance_type: str  # as the bank names it: closingBooked, interimAvailable …
    amount: Money
    credit_limit_included: bool | None = None
    reference_date: date | None = None
    last_change_time: datetime | None = None


class BookingStatus(StrEnum):
    BOOKED = "booked"
    PENDING = "pending"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """`amount` is negative for money that left the account."""

    transaction_id: str
    entry_reference: str
    end_to_end_id: str
    amount: Money
    pending: bool
    booking_date: date | None
    value_date: date | None
    creditor_name: str
    creditor_iban: str
    debtor_name: str
    debtor_iban: str
    remittance_information: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionPage:
    """`next_query` is the query of the bank's next page, or empty at the end."""

    transactions: tuple[Transaction, ...]
    next_query: str
