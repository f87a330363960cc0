"""The client for asyncio: the same names as in `custody.client`, awaited.

A call is sent again only when the sidecar was not available and the call cannot act twice; the request id is minted once and
stays. When an error or a deadline leaves open whether a call was carried out, call again with the error's `request_id`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import date, datetime
from types import TracebackType
from typing import Generic, Self, TypeVar

import grpc.aio

from custody import _calls
from custody._calls import Call, Page, PagedCall
from custody._polling import poll_pauses
from custody._settings import Settings, Tls
from custody._stubs import Stubs
from custody._transport import AsyncGrpcTransport, AsyncTransport
from custody.errors import WaitTimeoutError
from custody.money import Money
from custody.values import (
    Account,
    AccountReference,
    AuditEntry,
    Balance,
    BookingFilter,
    Checkpoint,
    Consent,
    Finding,
    Key,
    PayloadKind,
    Payment,
    PaymentProduct,
    PaymentState,
    PendingConsent,
    PeriodicLimit,
    Provider,
    PsuContext,
    Purpose,
    Signature,
    Status,
    Transaction,
    VerificationKey,
)

__all__ = ["Accounts", "AsyncPages", "Audit", "Client", "Consents", "Keys", "Payments", "Providers", "Signing"]

T = TypeVar("T")
ItemT = TypeVar("ItemT")


class Client:
    """A connection to the sidecar, for one event loop; use it as an async context manager, or close it.

    `address` is `unix:/path` or `host:port` (with `tls`), else CUSTODY_ADDRESS. `owner` is the person on whose behalf calls
    are made that name none themselves. `timeout_seconds` covers a call with its retries (else CUSTODY_TIMEOUT, else 30);
    `max_retries` counts the repeats of one call (else CUSTODY_MAX_RETRIES, else 3).
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        tls: Tls | None = None,
        owner: str | None = None,
        timeout_seconds: float | None = None,
        max_retries: int | None = None,
    ) -> None:
        settings = Settings.read(address=address, tls=tls, timeout_seconds=timeout_seconds, max_retries=max_retries)
        self._take(AsyncGrpcTransport(settings), owner)

    @classmethod
    def over(cls, transport: AsyncTransport, *, owner: str | None = None) -> Self:
        """Make a client that sends through `transport`: how the fake of custody.testing is reached."""
        client = cls.__new__(cls)
        client._take(transport, owner)
        return client

    def _take(self, transport: AsyncTransport, owner: str | None) -> None:
        self._transport = transport
        self._owner = owner
        self.consents = Consents(self)
        self.payments = Payments(self)
        self.accounts = Accounts(self)
        self.signing = Signing(self)
        self.providers = Providers(self)
        self.keys = Keys(self)
        self.audit = Audit(self)

    def for_owner(self, owner: str) -> Self:
        """Answer with a client on the same connection that acts for `owner`. Closing either closes both."""
        return self.over(self._transport, owner=owner)

    async def wait_ready(self, timeout_seconds: float = 30.0) -> None:
        """Return when the sidecar serves. Raises UnavailableError when it does not within `timeout_seconds`."""
        await self._transport.wait_ready(timeout_seconds)

    async def close(self) -> None:
        """Close the connection. Calls that are under way end with an error; what they began goes on in the sidecar."""
        await self._transport.close()

    @property
    def stub(self) -> Stubs:
        """The raw stubs of the contract, on this connection: without retries, deadlines, or readable errors."""
        if not isinstance(self._transport, AsyncGrpcTransport):
            raise TypeError("raw stubs need a gRPC connection")
        channel: grpc.aio.Channel = self._transport.channel
        return Stubs(channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: Call[T], timeout_seconds: float | None = None) -> T:
        return call.read(await self._transport.invoke(call.method, call.request, timeout_seconds=timeout_seconds))

    def _stream(self, call: Call[T], timeout_seconds: float | None = None) -> AsyncIterator[T]:
        return (
            call.read(m)
            async for m in self._transport.stream(call.method, call.request, timeout_seconds=timeout_seconds)
        )

    def _acting_for(self, owner: str | None) -> str:
        acting_for = owner or self._owner
        if not acting_for:
            raise ValueError(
                "owner is missing: name the person on whose behalf the call is made, or give Client(owner=…)"
            )
        return acting_for

    def _perhaps_for(self, owner: str | None) -> str:
        """Administrators may look at and revoke what belongs to anybody; the sidecar knows who they are."""
        return owner or self._owner or ""


class AsyncPages(Generic[ItemT]):
    """A list that is fetched page by page, as it is gone through. Each iteration begins anew."""

    def __init__(self, client: Client, call: PagedCall[ItemT]) -> None:
        self._client = client
        self._call = call

    async def __aiter__(self) -> AsyncIterator[ItemT]:
        async for page in self.pages():
            for item in page.items:
                yield item

    async def pages(self) -> AsyncIterator[Page[ItemT]]:
        """Go through the pages instead of the items."""
        token = ""
        while True:
            page = await self._client._run(self._call.page(token))
            yield page
            token = page.next_page_token
            if not token:
                return


class _Resource:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._run = client._run


class Consents(_Resource):
    """Brings consents into custody and ends them."""

    async def create(
        self,
        *,
        provider: str,
        purposes: Iterable[Purpose],
        expire_time: datetime,
        redirect_uri: str,
        accounts: Iterable[AccountReference | str] = (),
        psu_context: PsuContext | None = None,
        payment_limit: Money | None = None,
        periodic_limits: Iterable[PeriodicLimit] = (),
        owner: str | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> PendingConsent:
        """Begin a consent; send the person to the answer's `authorisation_uri`."""
        call = _calls.create_consent(
            owner=self._client._acting_for(owner),
            provider=provider,
            purposes=purposes,
            accounts=accounts,
            expire_time=expire_time,
            redirect_uri=redirect_uri,
            psu_context=psu_context,
            payment_limit=payment_limit,
            periodic_limits=periodic_limits,
            request_id=request_id,
        )
        return await self._run(call, timeout_seconds)

    async def complete(
        self,
        consent: str,
        redirected_to: str,
        *,
        owner: str | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Consent:
        """Hand in the URI that the person came back to, with all its parameters. The consent is active afterwards.

        Take `consent` from your own session with the person, never from the URI.
        """
        parameters = _calls.redirect_parameters(redirected_to)
        acting_for = self._client._acting_for(owner)
        call = _calls.complete_consent(consent=consent, owner=acting_for, parameters=parameters, request_id=request_id)
        return await self._run(call, timeout_seconds)

    async def import_consent(
        self,
        *,
        provider: str,
        purposes: Iterable[Purpose],
        expire_time: datetime,
        access_token: str,
        access_expire_time: datetime,
        refresh_token: str | None = None,
        accounts: Iterable[AccountReference | str] = (),
        provider_consent_id: str = "",
        payment_limit: Money | None = None,
        periodic_limits: Iterable[PeriodicLimit] = (),
        owner: str | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Consent:
        """Hand over tokens that were held elsewhere. They are sealed here, before they leave this process.

        Forget them afterwards. A repeat with a request id of before seals anew, which is another content: after an error,
        RequestIdReusedError tells that the first try had come through, and `list` has the consent.
        """
        call = _calls.import_consent(
            await self._run(_calls.get_import_key(), timeout_seconds),
            owner=self._client._acting_for(owner),
            provider=provider,
            purposes=purposes,
            accounts=accounts,
            expire_time=expire_time,
            access_token=access_token,
            refresh_token=refresh_token,
            access_expire_time=access_expire_time,
            provider_consent_id=provider_consent_id,
            payment_limit=payment_limit,
            periodic_limits=periodic_limits,
            request_id=request_id,
        )
        return await self._run(call, timeout_seconds)

    async def get(self, consent: str, *, owner: str | None = None, timeout_seconds: float | None = None) -> Consent:
        """Look at one consent."""
        return await self._run(
            _calls.get_consent(consent=consent, owner=self._client._perhaps_for(owner)), timeout_seconds
        )

    def list(self, *, owner: str | None = None, page_size: int = 0) -> AsyncPages[Consent]:
        """Go through the consents of an owner, the ended ones among them."""
        return AsyncPages(
            self._client, _calls.list_consents(owner=self._client._perhaps_for(owner), page_size=page_size)
        )

    async def revoke(
        self,
        consent: str,
        *,
        owner: str | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Consent:
        """End a consent for good."""
        acting_for = self._client._perhaps_for(owner)
        return await self._run(
            _calls.revoke_consent(consent=consent, owner=acting_for, request_id=request_id), timeout_seconds
        )


class Payments(_Resource):
    """Makes payments, each at most once."""

    async def initiate(
        self,
        consent: str,
        *,
        amount: Money,
        creditor_account: AccountReference | str,
        creditor_name: str,
        product: PaymentProduct = PaymentProduct.SEPA_CREDIT_TRANSFER,
        remittance_information: str = "",
        end_to_end_id: str = "",
        debtor_account: AccountReference | str | None = None,
        psu_context: PsuContext | None = None,
        owner: str | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Payment:
        """Initiate a payment, or learn how one stands that was initiated with the same `request_id`.

        Mint a `request_id` (str(uuid.uuid4())) and store it with your order before you call, and it is paid once whatever
        happens. State UNKNOWN, and any error: ask again with the same `request_id`, never with a new one.
        """
        call = _calls.initiate_payment(
            consent=consent,
            owner=self._client._acting_for(owner),
            amount=amount,
            creditor_account=creditor_account,
            creditor_name=creditor_name,
            product=product,
            remittance_information=remittance_information,
            end_to_end_id=end_to_end_id,
            debtor_account=debtor_account,
            psu_context=psu_context,
            request_id=request_id,
        )
        return await self._run(call, timeout_seconds)

    async def get(self, payment: str, *, owner: str | None = None, timeout_seconds: float | None = None) -> Payment:
        """Look at one payment as it stands; where it is not final, custody asks the provider for news by itself."""
        return await self._run(
            _calls.get_payment(payment=payment, owner=self._client._perhaps_for(owner)), timeout_seconds
        )

    def list(
        self,
        *,
        consent: str = "",
        states: Iterable[PaymentState] = (),
        owner: str | None = None,
        page_size: int = 0,
    ) -> AsyncPages[Payment]:
        """Go through the payments of an owner, those made with one consent, or those in some states."""
        call = _calls.list_payments(
            owner=self._client._perhaps_for(owner), consent=consent, states=states, page_size=page_size
        )
        return AsyncPages(self._client, call)

    async def resolve(
        self,
        payment: str,
        *,
        finding: Finding,
        reason: str,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Payment:
        """Write down what was found out at the provider about a payment in NEEDS_ATTENTION. For administrators."""
        call = _calls.resolve_payment(payment=payment, finding=finding, reason=reason, request_id=request_id)
        return await self._run(call, timeout_seconds)

    async def wait(
        self,
        payment: str,
        *,
        timeout_seconds: float = 60.0,
        owner: str | None = None,
        until: Callable[[Payment], bool] | None = None,
    ) -> Payment:
        """Look at a payment again and again until its state is final, or until `until` says so.

        Raises WaitTimeoutError with the payment as it was last seen; the payment goes on.
        """
        until = until or _is_final
        for pause_seconds in poll_pauses(timeout_seconds, clock=time.monotonic):
            seen = await self.get(payment, owner=owner)
            if until(seen):
                return seen
            await asyncio.sleep(pause_seconds)
        seen = await self.get(payment, owner=owner)
        if until(seen):
            return seen
        raise WaitTimeoutError(seen)


def _is_final(payment: Payment) -> bool:
    return payment.state.is_final


class Accounts(_Resource):
    """Reads accounts with a consent. Give `psu_context` if and only if the person is asking now."""

    async def list(
        self,
        consent: str,
        *,
        psu_context: PsuContext | None = None,
        owner: str | None = None,
        timeout_seconds: float | None = None,
    ) -> tuple[Account, ...]:
        """List the accounts that the consent opens."""
        acting_for = self._client._acting_for(owner)
        return await self._run(
            _calls.list_accounts(consent=consent, owner=acting_for, psu_context=psu_context), timeout_seconds
        )

    async def balances(
        self,
        consent: str,
        account: str,
        *,
        psu_context: PsuContext | None = None,
        owner: str | None = None,
        timeout_seconds: float | None = None,
    ) -> tuple[Balance, ...]:
        """List the balances of one account, `Account.name`."""
        acting_for = self._client._acting_for(owner)
        call = _calls.list_balances(consent=consent, owner=acting_for, account=account, psu_context=psu_context)
        return await self._run(call, timeout_seconds)

    def transactions(
        self,
        consent: str,
        account: str,
        *,
        date_from: date,
        date_to: date | None = None,
        booking: BookingFilter = BookingFilter.BOOKED,
        psu_context: PsuContext | None = None,
        owner: str | None = None,
    ) -> AsyncPages[Transaction]:
        """Go through the entries of one account, `Account.name`, in the provider's order."""
        call = _calls.list_transactions(
            consent=consent,
            owner=self._client._acting_for(owner),
            account=account,
            date_from=date_from,
            date_to=date_to,
            booking=booking,
            psu_context=psu_context,
        )
        return AsyncPages(self._client, call)


class Signing(_Resource):
    """Signs documents on an owner's behalf."""

    async def sign(
        self,
        consent: str,
        payload: bytes,
        *,
        payload_kind: PayloadKind,
        owner: str | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Signature:
        """Sign a document of up to 64 KiB; the answer is a detached JWS over exactly these bytes."""
        call = _calls.sign(
            consent=consent,
            owner=self._client._acting_for(owner),
            payload=payload,
            payload_kind=payload_kind,
            request_id=request_id,
        )
        return await self._run(call, timeout_seconds)

    async def verification_keys(self, *, timeout_seconds: float | None = None) -> tuple[VerificationKey, ...]:
        """List the public keys that verify signatures."""
        return await self._run(_calls.list_verification_keys(), timeout_seconds)


class Providers(_Resource):
    """Tells at which banks and accounting systems consents can be had."""

    async def get(self, provider: str, *, timeout_seconds: float | None = None) -> Provider:
        """Look at one provider."""
        return await self._run(_calls.get_provider(provider=provider), timeout_seconds)

    def list(self, *, page_size: int = 0) -> AsyncPages[Provider]:
        """Go through the providers."""
        return AsyncPages(self._client, _calls.list_providers(page_size=page_size))


class Keys(_Resource):
    """Administers the sidecar; on the administration socket only."""

    async def status(self, *, timeout_seconds: float | None = None) -> Status:
        """Tell how the sidecar, its processes, its HSM and its log are."""
        return await self._run(_calls.get_status(), timeout_seconds)

    async def list(self, *, timeout_seconds: float | None = None) -> tuple[Key, ...]:
        """List the keys that the sidecar uses."""
        return await self._run(_calls.list_keys(), timeout_seconds)


class Audit(_Resource):
    """Hands out the log; on the administration socket only."""

    def entries(
        self, *, consent: str = "", payment: str = "", newest_first: bool = False, page_size: int = 0
    ) -> AsyncPages[AuditEntry]:
        """Go through the entries, decoded."""
        call = _calls.list_entries(consent=consent, payment=payment, newest_first=newest_first, page_size=page_size)
        return AsyncPages(self._client, call)

    async def checkpoint(self, *, timeout_seconds: float | None = None) -> Checkpoint | None:
        """Look at the last signed checkpoint; None while there is none."""
        return await self._run(_calls.get_checkpoint(), timeout_seconds)

    def export(self, *, timeout_seconds: float | None = None) -> AsyncIterator[bytes]:
        """Stream the export file. Only a stream that ends without an error is whole."""
        return self._client._stream(_calls.export_log(), timeout_seconds)
