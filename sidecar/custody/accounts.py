"""Account reads: the token's use is on record before the call; a read may be repeated, so an expired token is renewed once."""

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TypeVar

from sidecar.connectors.base import Connector, Problem, ProblemKind, Reading, UnsignedRequest
from sidecar.custody.access import connector_for, consent_for
from sidecar.custody.provider_calls import answer_of, new_call_id, problem_error, sign_request
from sidecar.custody.tokens import Access, Tokens
from sidecar.domain.account import Account, Balance, BookingStatus, PsuContext, TransactionPage
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.caller import Caller
from sidecar.domain.consent import AccountReference, Consent, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, ProviderId
from sidecar.domain.provider import Answer
from sidecar.errors import FieldViolation, InvalidField
from sidecar.ports import Clock, Hsm, Store, TokenEgress

__all__ = ["AccountRead", "Accounts", "TransactionQuery"]

T = TypeVar("T")
_QUERY = re.compile(r"[!$%&'()*+,./0-9:;=?@A-Z_a-z~-]{1,1024}\Z")  # as the connectors let one through


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountRead:
    """Whose accounts, under which consent; `account` is the provider's resource id, empty for the list of accounts."""

    consent: ConsentId
    owner: OwnerId
    account: str = ""
    psu: PsuContext | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionQuery:
    """`page_token` is one that the page before gave; then the other values are the provider's own from that page."""

    booking_status: BookingStatus
    date_from: date | None = None
    date_to: date | None = None
    page_token: str = ""


class Accounts:
    def __init__(
        self,
        *,
        store: Store,
        egress: TokenEgress,
        hsm: Hsm,
        clock: Clock,
        connectors: Mapping[ProviderId, Connector],
        tokens: Tokens,
    ) -> None:
        self._store = store
        self._egress = egress
        self._hsm = hsm
        self._clock = clock
        self._connectors = connectors
        self._tokens = tokens

    async def list_accounts(self, caller: Caller, read: AccountRead) -> tuple[Account, ...]:
        """The accounts that the consent names; others that the provider may show are left out."""
        consent, connector = await self._consented(caller, read, Purpose.ACCOUNTS)
        accounts = await self._read(
            consent,
            connector,
            lambda now, call_id: connector.accounts(now, psu=read.psu, call_id=call_id),
            lambda answer, call_id: connector.read_accounts(answer, call_id=call_id),
        )
        return tuple(
            account for account in accounts if not consent.accounts or consent.named_account(_reference(account))
        )

    async def list_balances(self, caller: Caller, read: AccountRead) -> tuple[Balance, ...]:
        consent, connector = await self._consented(caller, read, Purpose.BALANCES)
        return await self._read(
            consent,
            connector,
            lambda now, call_id: connector.balances(now, read.account, psu=read.psu, call_id=call_id),
            lambda answer, call_id: connector.read_balances(answer, call_id=call_id),
        )

    async def list_transactions(
        self, caller: Caller, read: AccountRead, query: TransactionQuery
    ) -> tuple[TransactionPage, str]:
        """A page as the provider cuts it, and the token of the next one ("" at the end)."""
        consent, connector = await self._consented(caller, read, Purpose.TRANSACTIONS)
        page_query = _provider_query(query.page_token)
        date_from = query.date_from or self._earliest(connector)
        page = await self._read(
            consent,
            connector,
            lambda now, call_id: connector.transactions(
                now,
                read.account,
                booking_status=query.booking_status,
                date_from=date_from,
                date_to=query.date_to,
                page_query=page_query,
                psu=read.psu,
                call_id=call_id,
            ),
            lambda answer, call_id: connector.read_transactions(answer, account=read.account, call_id=call_id),
        )
        return page, _page_token(page.next_query)

    async def _consented(self, caller: Caller, read: AccountRead, purpose: Purpose) -> tuple[Consent, Connector]:
        consent = await consent_for(self._store, caller, read.consent, read.owner)
        caller.check_purposes(frozenset({purpose}))
        consent.check_usable(purpose, self._clock.now())
        return consent, connector_for(self._connectors, consent.provider)

    async def _read(
        self,
        consent: Consent,
        connector: Connector,
        render: Callable[[Consent, str], UnsignedRequest],
        read: Callable[[Answer, str], Reading[T] | Problem],
    ) -> T:
        access = await self._tokens.access(consent)
        reading = await self._call(access, connector, render, read)
        if isinstance(reading, Problem) and reading.kind is ProblemKind.TOKEN_EXPIRED:
            access = await self._tokens.access(consent, refuse_older_than=access.secret.secret.row_version)
            reading = await self._call(access, connector, render, read)
        if not isinstance(reading, Problem):
            self._tokens.confirm(access)
            return reading.value
        if reading.kind is ProblemKind.CONSENT_ENDED:
            await self._tokens.mark_ended(access.consent, reason="PROVIDER_ENDED")
        raise problem_error(reading)

    async def _call(
        self,
        access: Access,
        connector: Connector,
        render: Callable[[Consent, str], UnsignedRequest],
        read: Callable[[Answer, str], Reading[T] | Problem],
    ) -> Reading[T] | Problem:
        call_id = new_call_id()
        # Neither waits for the other, and the call waits for both: no entry, no act.
        request, _ = await asyncio.gather(
            sign_request(self._hsm, render(access.consent, call_id)), self._store.record([_use(access.consent)])
        )
        outcome = await self._egress.call(
            request,
            wrapped_data_key=access.consent.wrapped_data_key,
            secrets=[access.secret],
            deadline_seconds=connector.descriptor.call_seconds,
        )
        return read(answer_of(outcome), call_id)

    def _earliest(self, connector: Connector) -> date:
        return (self._clock.now() - timedelta(days=connector.descriptor.accounts.history_days)).date()


def _reference(account: Account) -> AccountReference:
    return AccountReference(iban=account.iban, currency_code=account.currency_code)


def _use(consent: Consent) -> AuditDraft:
    return AuditDraft(
        event=AuditEvent.TOKEN_USE,
        outcome=AuditOutcome.INTENDED,
        caller=consent.caller,
        provider=consent.provider,
        consent=consent.id,
        subject=consent.subject(),
    )


def _page_token(query: str) -> str:
    return base64.urlsafe_b64encode(query.encode("ascii")).rstrip(b"=").decode("ascii")


def _provider_query(page_token: str) -> str:
    """The provider's query in a page token; it can name nothing but a page of the account that the caller names again."""
    if not page_token:
        return ""
    try:
        query = base64.b64decode(page_token + "=" * (-len(page_token) % 4), altchars=b"-_", validate=True).decode(
            "ascii"
        )
    except (binascii.Error, UnicodeDecodeError, ValueError):
        query = ""
    if not _QUERY.match(query):
        raise InvalidField(
            FieldViolation(field="page_token", rule="page_token", description="must be one that the page before gave")
        )
    return query
