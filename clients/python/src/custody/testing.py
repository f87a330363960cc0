"""A sidecar in memory, for the tests of applications: no process, no HSM, no bank, no network.

    fake = FakeCustody()
    client = fake.client(owner="user:42")
    pending = client.consents.create(provider=fake.provider, …)
    client.consents.complete(pending.consent.name, fake.approve(pending.authorisation_uri))

It answers the same requests by the same rules: the contract's own rules on fields, owners, states of consents, purposes,
limits, request ids that are kept for ever. It is a `Transport`, so what your code holds is the real client.

What it leaves out: callers and policies, the sums of periodic limits, and whatever only time or a bank does, unless the test says
so (`script_payments`, `fail_next`, `clock`).
"""

import asyncio
import base64
import hashlib
import json
import secrets
import threading
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode, urlsplit
from xml.parsers import expat

import protovalidate
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2
from google.type import money_pb2

from custody import _sealing, aio, client
from custody._calls import date_message as _date
from custody._calls import money_message as _money
from custody._contract import method_named
from custody._retry import Retries
from custody.errors import CustodyError, FieldViolation, UnavailableError, error_type_of
from custody.money import Money, exponent_of
from custody.reasons import ErrorReason
from custody.v1 import (
    account_pb2,
    audit_pb2,
    consent_pb2,
    errors_pb2,
    key_pb2,
    payment_pb2,
    provider_pb2,
    purpose_pb2,
    signing_pb2,
)
from custody.values import BalanceKind, PaymentState

__all__ = ["FakeCustody"]

_LONGEST_CONSENT = timedelta(days=180)
_PAGE_SIZE = 50
_LARGEST_PAGE_SIZE = 200
_CHUNK_BYTES = 64 * 1024
_ISSUER = "https://bank.example"

_M = TypeVar("_M", bound=Message)
_C = consent_pb2.Consent
_P = payment_pb2.Payment


class FakeCustody:
    """The sidecar, in memory. Safe to share between threads.

    `provider` is the one provider there is; `add_account`, `add_balance` and `add_transaction` fill its books, of which it gives
    `entries_per_page` at once.
    """

    def __init__(self, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.provider = "providers/fake-bank"
        self.redirect_uri = "https://app.example/callback"
        self.entries_per_page = 50
        self._clock = clock
        self._lock = threading.RLock()
        self._consents: dict[str, consent_pb2.Consent] = {}
        self._payments: dict[str, payment_pb2.Payment] = {}
        self._accounts: dict[str, account_pb2.Account] = {}
        self._balances: dict[str, list[account_pb2.Balance]] = {}
        self._transactions: dict[str, list[account_pb2.Transaction]] = {}
        self._answered: dict[str, tuple[bytes, str]] = {}  # request id → (digest of the request, name of what it made)
        self._redirects: dict[str, str] = {}  # consent → state of its authorisation URI
        self._script: deque[PaymentState] = deque()
        self._later_states: dict[str, deque[PaymentState]] = {}
        self._resolutions: dict[str, payment_pb2.PaymentResolution] = {}
        self._failures: deque[tuple[str | None, ErrorReason]] = deque()
        self._entries: list[audit_pb2.AuditEntry] = []
        self._import_key = X25519PrivateKey.generate()
        self._signing_key = ec.generate_private_key(ec.SECP256R1())
        self.script_payments(PaymentState.ACCEPTED, PaymentState.SETTLED)

    # What a test does with it.

    def client(self, *, owner: str | None = None) -> client.Client:
        """Answer with a blocking client of this sidecar."""
        return client.Client.over(_Direct(self), owner=owner)

    def aio_client(self, *, owner: str | None = None) -> aio.Client:
        """Answer with an asyncio client of this sidecar."""
        return aio.Client.over(_AsyncDirect(self), owner=owner)

    def approve(self, authorisation_uri: str) -> str:
        """Do as the person who says yes at the bank; answers with the URI that the bank sends them back to."""
        return self._redirect(authorisation_uri, code=secrets.token_urlsafe(16))

    def deny(self, authorisation_uri: str) -> str:
        """Do as the person who says no at the bank; answers with the URI that the bank sends them back to."""
        return self._redirect(authorisation_uri, error="access_denied")

    def script_payments(self, *states: PaymentState) -> None:
        """Say how payments go from now on: the state that InitiatePayment answers with, then one for each later look.

        The last state stays. By default ACCEPTED, then SETTLED.
        """
        if not states:
            raise ValueError("a payment has at least one state")
        with self._lock:
            self._script = deque(states)

    def fail_next(self, reason: ErrorReason, *, times: int = 1, method: str | None = None) -> None:
        """Answer the next calls (of `method`, such as "PaymentService.InitiatePayment") with an error, before they act."""
        with self._lock:
            self._failures.extend([(method, reason)] * times)

    def need_reauthorisation(self, consent: str, *, usable_seconds: float = 0.0) -> None:
        """Do as a bank that no longer honours what it issued for a consent.

        With `usable_seconds`: as when what would renew it was lost on its way; so long it can still be used.
        """
        with self._lock:
            until = datetime.now(UTC) + timedelta(seconds=usable_seconds)
            self._consents[consent].state = _C.STATE_NEEDS_REAUTHORISATION
            self._consents[consent].failure_reason = errors_pb2.ERROR_REASON_PROVIDER_REFUSED
            self._consents[consent].usable_until_time.FromDatetime(until)

    def add_account(
        self, iban: str, *, currency_code: str = "EUR", owner_name: str = "", display_name: str = ""
    ) -> str:
        """Open an account at the bank; answers with its name, `accounts/{account}`."""
        with self._lock:
            name = f"accounts/{uuid.uuid4()}"
            self._accounts[name] = account_pb2.Account(
                name=name,
                iban=iban,
                currency_code=currency_code,
                owner_name=owner_name,
                display_name=display_name,
                account_type="CACC",
            )
            return name

    def add_balance(
        self,
        account: str,
        amount: Money,
        *,
        kind: BalanceKind = BalanceKind.INTERIM_AVAILABLE,
        reference_date: date | None = None,
    ) -> None:
        """Give an account a balance."""
        with self._lock:
            balance = account_pb2.Balance(
                kind=account_pb2.Balance.Kind.Value(f"KIND_{kind}"),
                amount=_money(amount),
                reference_date=_date(reference_date) if reference_date else None,
            )
            self._balances.setdefault(account, []).append(balance)

    def add_transaction(
        self,
        account: str,
        amount: Money,
        *,
        booking_date: date | None,
        counterparty: str = "",
        remittance_information: str = "",
        end_to_end_id: str = "",
    ) -> None:
        """Write an entry into an account's books; without `booking_date` it is pending."""
        with self._lock:
            entries = self._transactions.setdefault(account, [])
            statuses = account_pb2.Transaction
            entry = account_pb2.Transaction(
                transaction_id=f"t-{len(entries) + 1}",
                booking_status=statuses.BOOKING_STATUS_BOOKED if booking_date else statuses.BOOKING_STATUS_PENDING,
                amount=_money(amount),
                booking_date=_date(booking_date) if booking_date else None,
                creditor_name=counterparty if amount.amount < 0 else "",
                debtor_name=counterparty if amount.amount >= 0 else "",
                remittance_information=remittance_information,
                end_to_end_id=end_to_end_id,
            )
            entries.append(entry)

    # How requests are answered.

    def invoke(self, method: str, request: Message) -> Message:
        """Answer a request of a method `Service.Method`; raises CustodyError."""
        with self._lock:
            self._fail_if_told(method)
            self._check(request)
            self._expire()
            handle = getattr(self, f"_{method.replace('.', '_')}")
            # Work on a copy: over a real connection, too, nothing that the caller holds is what the sidecar holds.
            answer: Message = handle(_copy(request))
            return _copy(answer)

    def stream(self, method: str, request: Message) -> Iterator[Message]:
        """Answer a request of a streaming method."""
        self._fail_if_told(method)
        self._check(request)
        exported = b"".join(entry.SerializeToString(deterministic=True) for entry in self._entries)
        for start in range(0, len(exported), _CHUNK_BYTES):
            yield audit_pb2.ExportLogResponse(chunk=exported[start : start + _CHUNK_BYTES])

    def _ConsentService_CreateConsent(self, request: consent_pb2.CreateConsentRequest) -> Message:  # noqa: N802
        if request.provider != self.provider:
            raise _error(ErrorReason.PROVIDER_NOT_FOUND)
        if request.redirect_uri != self.redirect_uri:
            raise _invalid("redirect_uri", "redirect_uri.registered", "must be registered for the provider")
        self._check_expiry(request.expire_time)
        name = self._once(request, "consents")
        if name not in self._consents:
            self._consents[name] = self._new_consent(name, request)
            self._redirects[name] = secrets.token_urlsafe(16)
            self._record("CONSENT_CREATED", consent=name)
        query = urlencode({"consent": name, "state": self._redirects.get(name, ""), "redirect_uri": self.redirect_uri})
        uri = f"{_ISSUER}/authorise?{query}"
        return consent_pb2.CreateConsentResponse(consent=self._consents[name], authorisation_uri=uri)

    def _ConsentService_CompleteConsent(self, request: consent_pb2.CompleteConsentRequest) -> Message:  # noqa: N802
        consent = self._consent(request.consent, request.owner)
        if self._once(request, "consents", made=consent.name, peek=True):
            return consent_pb2.CompleteConsentResponse(consent=consent)
        _require_state(consent, _C.STATE_AWAITING_AUTHORISATION)
        if not secrets.compare_digest(request.state.encode(), self._redirects[consent.name].encode()):
            raise _error(ErrorReason.STATE_MISMATCH)
        if request.iss not in {"", _ISSUER}:
            raise _error(ErrorReason.ISSUER_MISMATCH)
        self._once(request, "consents", made=consent.name)
        del self._redirects[consent.name]
        if request.error:
            consent.state = _C.STATE_FAILED
            consent.failure_reason = errors_pb2.ERROR_REASON_AUTHORISATION_DENIED
            self._record("CONSENT_FAILED", consent=consent.name)
            raise _error(ErrorReason.AUTHORISATION_DENIED)
        self._activate(consent, self._clock() + timedelta(hours=1))
        return consent_pb2.CompleteConsentResponse(consent=consent)

    def _ConsentService_GetImportKey(self, request: consent_pb2.GetImportKeyRequest) -> Message:  # noqa: N802, ARG002
        import_key = consent_pb2.ImportKey(
            key_id="import-1",
            public_key=self._import_key.public_key().public_bytes_raw(),
            suite=_sealing.SUITE_NAME,
        )
        return consent_pb2.GetImportKeyResponse(import_key=import_key)

    def _ConsentService_ImportConsent(self, request: consent_pb2.ImportConsentRequest) -> Message:  # noqa: N802
        if request.provider != self.provider:
            raise _error(ErrorReason.PROVIDER_NOT_FOUND)
        if request.import_key_id != "import-1":
            raise _error(ErrorReason.IMPORT_KEY_UNKNOWN)
        self._check_expiry(request.expire_time)
        self._open_import(request)
        name = self._once(request, "consents")
        if name not in self._consents:
            self._consents[name] = self._new_consent(name, request)
            self._activate(self._consents[name], request.access_expire_time.ToDatetime(tzinfo=UTC))
        return consent_pb2.ImportConsentResponse(consent=self._consents[name])

    def _ConsentService_GetConsent(self, request: consent_pb2.GetConsentRequest) -> Message:  # noqa: N802
        return consent_pb2.GetConsentResponse(consent=self._consent(request.consent, request.owner))

    def _ConsentService_ListConsents(self, request: consent_pb2.ListConsentsRequest) -> Message:  # noqa: N802
        mine = [each for each in self._consents.values() if request.owner in {"", each.owner}]
        consents, token = _page(mine, request)
        return consent_pb2.ListConsentsResponse(consents=consents, next_page_token=token)

    def _ConsentService_RevokeConsent(self, request: consent_pb2.RevokeConsentRequest) -> Message:  # noqa: N802
        consent = self._consent(request.consent, request.owner)
        self._once(request, "consents", made=consent.name)
        if consent.state != _C.STATE_REVOKED:
            consent.state = _C.STATE_REVOKED
            consent.revoke_time.CopyFrom(_timestamp(self._clock()))
            self._record("CONSENT_REVOKED", consent=consent.name)
        return consent_pb2.RevokeConsentResponse(consent=consent)

    def _PaymentService_InitiatePayment(self, request: payment_pb2.InitiatePaymentRequest) -> Message:  # noqa: N802
        _check_account("creditor_account.iban", request.creditor_account.iban)
        if request.HasField("debtor_account"):
            _check_account("debtor_account.iban", request.debtor_account.iban)
        _check_decimals(request.amount)
        consent = self._consent(request.consent, request.owner)
        made = self._once(request, "payments", peek=True)
        if made:
            return payment_pb2.InitiatePaymentResponse(payment=self._look_again(self._payments[made]))
        _require_purpose(consent, purpose_pb2.PURPOSE_PAYMENTS)
        _require_limit(consent, request)
        name = self._once(request, "payments")
        self._payments[name] = self._new_payment(name, request)
        self._record("PAYMENT_DISPATCHED", consent=consent.name, payment=name)
        return payment_pb2.InitiatePaymentResponse(payment=self._payments[name])

    def _PaymentService_GetPayment(self, request: payment_pb2.GetPaymentRequest) -> Message:  # noqa: N802
        payment = self._payments.get(request.payment)
        if payment is None or request.owner not in {"", payment.owner}:
            raise _error(ErrorReason.PAYMENT_NOT_FOUND)
        seen = _copy(self._look_again(payment))
        if not request.owner and seen.name in self._resolutions:  # an administrator asks, and is told
            seen.resolution.CopyFrom(self._resolutions[seen.name])
        return payment_pb2.GetPaymentResponse(payment=seen)

    def _PaymentService_ListPayments(self, request: payment_pb2.ListPaymentsRequest) -> Message:  # noqa: N802
        if request.consent:
            self._consent(request.consent, request.owner)
        mine = [
            payment
            for payment in self._payments.values()
            if request.owner in {"", payment.owner}
            and request.consent in {"", payment.consent}
            and (not request.states or payment.state in request.states)
        ]
        payments, token = _page(mine, request)
        return payment_pb2.ListPaymentsResponse(payments=payments, next_page_token=token)

    def _PaymentService_ResolvePayment(self, request: payment_pb2.ResolvePaymentRequest) -> Message:  # noqa: N802
        payment = self._payments.get(request.payment)
        if payment is None:
            raise _error(ErrorReason.PAYMENT_NOT_FOUND)
        if not self._once(request, "payments", peek=True):
            if payment.state != _P.STATE_NEEDS_ATTENTION:
                raise _error(ErrorReason.PAYMENT_NOT_RESOLVABLE)
            self._once(request, "payments", made=payment.name)
            executed = request.finding == payment_pb2.PaymentResolution.FINDING_EXECUTED
            self._move(payment, PaymentState.SETTLED if executed else PaymentState.REJECTED)
            self._later_states[payment.name].clear()
            self._resolutions[payment.name] = payment_pb2.PaymentResolution(
                finding=request.finding,
                reason=request.reason,
                administrator="workload:fake",
                resolve_time=_timestamp(self._clock()),
            )
            self._record("PAYMENT_RESOLVED", consent=payment.consent, payment=payment.name)
        resolved = _copy(payment)
        resolved.resolution.CopyFrom(self._resolutions[payment.name])
        return payment_pb2.ResolvePaymentResponse(payment=resolved)

    def _AccountService_ListAccounts(self, request: account_pb2.ListAccountsRequest) -> Message:  # noqa: N802
        consent = self._consent(request.consent, request.owner)
        _require_purpose(consent, purpose_pb2.PURPOSE_ACCOUNTS)
        ibans = {account.iban for account in consent.accounts}
        accounts = [account for account in self._accounts.values() if not ibans or account.iban in ibans]
        return account_pb2.ListAccountsResponse(accounts=accounts)

    def _AccountService_ListBalances(self, request: account_pb2.ListBalancesRequest) -> Message:  # noqa: N802
        self._account(request, purpose_pb2.PURPOSE_BALANCES)
        return account_pb2.ListBalancesResponse(balances=self._balances.get(request.account, ()))

    def _AccountService_ListTransactions(self, request: account_pb2.ListTransactionsRequest) -> Message:  # noqa: N802
        self._account(request, purpose_pb2.PURPOSE_TRANSACTIONS)
        entries = [each for each in self._transactions.get(request.account, ()) if _is_asked_for(each, request)]
        transactions, token = _cut(entries, request.page_token, self.entries_per_page)
        return account_pb2.ListTransactionsResponse(transactions=transactions, next_page_token=token)

    def _SigningService_Sign(self, request: signing_pb2.SignRequest) -> Message:  # noqa: N802
        consent = self._consent(request.consent, request.owner)
        _require_purpose(consent, purpose_pb2.PURPOSE_SIGNING)
        kind = _content_type(request)
        self._once(request, "signatures")
        header = {"alg": "ES256", "kid": "fake-1", "cty": kind}
        protected = _base64url(json.dumps(header).encode())
        signed = self._signing_key.sign(f"{protected}.{_base64url(request.payload)}".encode(), ec.ECDSA(SHA256()))
        r, s = decode_dss_signature(signed)
        signature = _base64url(r.to_bytes(32, "big") + s.to_bytes(32, "big"))
        return signing_pb2.SignResponse(detached_jws=f"{protected}..{signature}", key="keys/fake-1", algorithm="ES256")

    def _SigningService_ListVerificationKeys(  # noqa: N802
        self,
        request: signing_pb2.ListVerificationKeysRequest,  # noqa: ARG002
    ) -> Message:
        point = self._signing_key.public_key().public_numbers()
        key = signing_pb2.VerificationKey(
            name="keys/fake-1",
            key_id="fake-1",
            key_type="EC",
            algorithm="ES256",
            curve="P-256",
            x=point.x.to_bytes(32, "big"),
            y=point.y.to_bytes(32, "big"),
        )
        return signing_pb2.ListVerificationKeysResponse(verification_keys=[key])

    def _ProviderService_ListProviders(self, request: provider_pb2.ListProvidersRequest) -> Message:  # noqa: N802
        providers, token = _page([self._provider()], request)
        return provider_pb2.ListProvidersResponse(providers=providers, next_page_token=token)

    def _ProviderService_GetProvider(self, request: provider_pb2.GetProviderRequest) -> Message:  # noqa: N802
        if request.provider != self.provider:
            raise _error(ErrorReason.PROVIDER_NOT_FOUND)
        return provider_pb2.GetProviderResponse(provider=self._provider())

    def _KeyService_GetStatus(self, request: key_pb2.GetStatusRequest) -> Message:  # noqa: N802, ARG002
        states = [consent.state for consent in self._consents.values()]
        counts = [key_pb2.ConsentCount(state=s, consent_count=states.count(s)) for s in sorted(set(states))]
        status = key_pb2.Status(
            version="fake",
            instance="fake-1",
            cluster="fake",
            ready=True,
            processes=[key_pb2.Process(process="gateway", state=key_pb2.Process.STATE_READY)],
            root_key="keys/root",
            master_key="keys/master-1",
            master_key_version=1,
            log=key_pb2.LogStatus(origin="fake", entry_count=len(self._entries)),
            consent_counts=counts,
        )
        return key_pb2.GetStatusResponse(status=status)

    def _KeyService_ListKeys(self, request: key_pb2.ListKeysRequest) -> Message:  # noqa: N802, ARG002
        key = key_pb2.Key(
            name="keys/root",
            label="fake-root",
            purpose=key_pb2.Key.PURPOSE_ROOT,
            algorithm="AES-256",
            attributes=[key_pb2.Key.Attribute(name="CKA_EXTRACTABLE", value=False)],
            state=key_pb2.Key.STATE_ACTIVE,
        )
        return key_pb2.ListKeysResponse(keys=[key])

    def _AuditService_ListEntries(self, request: audit_pb2.ListEntriesRequest) -> Message:  # noqa: N802
        entries = [
            entry
            for entry in (reversed(self._entries) if request.newest_first else self._entries)
            if request.consent in {"", entry.consent} and request.payment in {"", entry.payment}
        ]
        page, token = _page(entries, request)
        return audit_pb2.ListEntriesResponse(entries=page, next_page_token=token)

    def _AuditService_GetCheckpoint(self, request: audit_pb2.GetCheckpointRequest) -> Message:  # noqa: N802, ARG002
        return audit_pb2.GetCheckpointResponse()

    # The rules that the methods share.

    def _fail_if_told(self, method: str) -> None:
        if self._failures and self._failures[0][0] in {None, method}:
            _, reason = self._failures.popleft()
            raise _error(reason)

    def _check(self, request: Message) -> None:
        violations = [
            FieldViolation(
                field=".".join(_element(element) for element in each.proto.field.elements) if each.proto.field else "",
                rule=_rule_name(each.proto.rule_id),
                description=each.proto.message,
            )
            for each in protovalidate.collect_violations(request)
        ]
        if violations:
            raise _error(ErrorReason.FIELD_INVALID, field_violations=violations)

    def _check_expiry(self, expire_time: Timestamp) -> None:
        ahead = expire_time.ToDatetime(tzinfo=UTC) - self._clock()
        if not timedelta(0) < ahead <= _LONGEST_CONSENT:
            raise _invalid("expire_time", "expire_time.range", "must be in the future and at most 180 days ahead")

    def _once(self, request: Any, collection: str, *, made: str = "", peek: bool = False) -> str:  # noqa: ANN401
        """Keep a request id for ever: answer with the name of what it made. With `peek`, "" where it is new."""
        digest = hashlib.sha256(
            request.DESCRIPTOR.name.encode() + request.SerializeToString(deterministic=True)
        ).digest()
        known, name = self._answered.get(request.request_id, (digest, ""))
        if known != digest:
            raise _error(ErrorReason.REQUEST_ID_REUSED)
        if not name and not peek:
            name = made or f"{collection}/{uuid.uuid4()}"
            self._answered[request.request_id] = (digest, name)
        return name

    def _consent(self, name: str, owner: str) -> consent_pb2.Consent:
        consent = self._consents.get(name)
        if consent is None or owner not in {"", consent.owner}:
            raise _error(ErrorReason.CONSENT_NOT_FOUND)
        return consent

    def _account(self, request: Any, purpose: purpose_pb2.Purpose.ValueType) -> None:  # noqa: ANN401
        """Check that a consent opens an account for a purpose."""
        consent = self._consent(request.consent, request.owner)
        _require_purpose(consent, purpose)
        account = self._accounts.get(request.account)
        if account is None:
            raise _error(ErrorReason.ACCOUNT_NOT_FOUND)
        if consent.accounts and account.iban not in {each.iban for each in consent.accounts}:
            raise _error(ErrorReason.ACCOUNT_NOT_CONSENTED)

    def _new_consent(self, name: str, request: Any) -> consent_pb2.Consent:  # noqa: ANN401
        return _C(
            name=name,
            owner=request.owner,
            provider=request.provider,
            purposes=request.purposes,
            accounts=request.accounts,
            state=_C.STATE_AWAITING_AUTHORISATION,
            payment_limit=request.payment_limit if request.HasField("payment_limit") else None,
            periodic_limits=request.periodic_limits,
            create_time=_timestamp(self._clock()),
            expire_time=request.expire_time,
        )

    def _activate(self, consent: consent_pb2.Consent, access_expire_time: datetime) -> None:
        consent.state = _C.STATE_ACTIVE
        consent.activate_time.CopyFrom(_timestamp(self._clock()))
        consent.access_expire_time.CopyFrom(_timestamp(access_expire_time))
        self._record("CONSENT_ACTIVATED", consent=consent.name)

    def _expire(self) -> None:
        now = self._clock()
        living = {_C.STATE_AWAITING_AUTHORISATION, _C.STATE_ACTIVE, _C.STATE_NEEDS_REAUTHORISATION}
        for consent in self._consents.values():
            if consent.state in living and consent.expire_time.ToDatetime(tzinfo=UTC) <= now:
                consent.state = _C.STATE_EXPIRED

    def _open_import(self, request: consent_pb2.ImportConsentRequest) -> None:
        """See that the tokens open and are in the written form. They are not kept."""
        info = _sealing.import_info(owner=request.owner, provider=request.provider, request_id=request.request_id)
        try:
            tokens = json.loads(_sealing.suite().decrypt(request.sealed_tokens, self._import_key, info))
        except (InvalidTag, ValueError):
            raise _error(ErrorReason.IMPORT_REFUSED) from None
        known = isinstance(tokens, dict) and {"access_token"} <= tokens.keys() <= {"access_token", "refresh_token"}
        if not known or not all(isinstance(token, str) and token for token in tokens.values()):
            raise _error(ErrorReason.IMPORT_REFUSED)

    def _new_payment(self, name: str, request: payment_pb2.InitiatePaymentRequest) -> payment_pb2.Payment:
        states = deque(self._script)
        now = _timestamp(self._clock())
        payment = _P(
            name=name,
            consent=request.consent,
            owner=request.owner,
            request_id=request.request_id,
            amount=request.amount,
            debtor_account=request.debtor_account if request.HasField("debtor_account") else None,
            creditor_account=request.creditor_account,
            creditor_name=request.creditor_name,
            remittance_information=request.remittance_information,
            end_to_end_id=request.end_to_end_id,
            product=request.product,
            create_time=now,
        )
        self._move(payment, states.popleft())
        self._later_states[name] = states
        return payment

    def _look_again(self, payment: payment_pb2.Payment) -> payment_pb2.Payment:
        if self._later_states[payment.name]:
            self._move(payment, self._later_states[payment.name].popleft())
        return payment

    def _move(self, payment: payment_pb2.Payment, state: PaymentState) -> None:
        payment.state = _P.State.Value(f"STATE_{state}")
        waits = state is PaymentState.AWAITING_AUTHORISATION
        payment.authorisation_uri = f"{_ISSUER}/pay?{urlencode({'payment': payment.name})}" if waits else ""
        payment.update_time.CopyFrom(_timestamp(self._clock()))

    def _provider(self) -> provider_pb2.Provider:
        provider = provider_pb2.Provider(
            name=self.provider,
            display_name="Fake Bank",
            standard="fake",
            region_code="AT",
            purposes=purpose_pb2.Purpose.values()[1:],
            payment_products=payment_pb2.PaymentProduct.values()[1:],
            redirect_uris=[self.redirect_uri],
        )
        provider.max_consent_duration.FromTimedelta(_LONGEST_CONSENT)
        return provider

    def _redirect(self, authorisation_uri: str, **answer: str) -> str:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(authorisation_uri).query).items()}
        return f"{asked['redirect_uri']}?{urlencode({**answer, 'state': asked['state'], 'iss': _ISSUER})}"

    def _record(self, event: str, *, consent: str, payment: str = "") -> None:
        entry = audit_pb2.AuditEntry(
            index=len(self._entries),
            create_time=_timestamp(self._clock()),
            event=event,
            outcome=audit_pb2.AuditEntry.OUTCOME_SUCCEEDED,
            provider=self.provider,
            consent=consent,
            payment=payment,
        )
        self._entries.append(entry)


class _Direct:
    """Carries the requests of a blocking client to the fake, with the retries of a real connection but without its waits."""

    def __init__(self, fake: FakeCustody) -> None:
        self._fake = fake

    def invoke(self, method: str, request: Message, *, timeout_seconds: float | None) -> Message:
        retries = Retries(method=method_named(method), max_retries=3, deadline_seconds=timeout_seconds or 30.0)
        while True:
            try:
                return self._fake.invoke(method, request)
            except CustodyError as error:
                error.request_id = getattr(request, "request_id", None)
                if retries.pause_after(error, now_seconds=0.0) is None:
                    raise

    def stream(self, method: str, request: Message, *, timeout_seconds: float | None) -> Iterator[Message]:  # noqa: ARG002
        return self._fake.stream(method, request)

    def wait_ready(self, timeout_seconds: float) -> None:
        """The fake is ready when it is there."""

    def close(self) -> None:
        """Nothing to give up."""


class _AsyncDirect:
    """The same for an asyncio client."""

    def __init__(self, fake: FakeCustody) -> None:
        self._direct = _Direct(fake)

    async def invoke(self, method: str, request: Message, *, timeout_seconds: float | None) -> Message:
        await asyncio.sleep(0)  # as with a real connection, other tasks come to their turn
        return self._direct.invoke(method, request, timeout_seconds=timeout_seconds)

    async def stream(self, method: str, request: Message, *, timeout_seconds: float | None) -> AsyncIterator[Message]:
        for answer in self._direct.stream(method, request, timeout_seconds=timeout_seconds):
            await asyncio.sleep(0)
            yield answer

    async def wait_ready(self, timeout_seconds: float) -> None:
        """The fake is ready when it is there."""

    async def close(self) -> None:
        """Nothing to give up."""


_NOT_USABLE = {
    _C.STATE_REVOKED: ErrorReason.CONSENT_REVOKED,
    _C.STATE_EXPIRED: ErrorReason.CONSENT_EXPIRED,
    _C.STATE_NEEDS_REAUTHORISATION: ErrorReason.CONSENT_NEEDS_REAUTHORISATION,
}


def _require_state(consent: consent_pb2.Consent, state: consent_pb2.Consent.State.ValueType) -> None:
    if consent.state != state:
        raise _error(_NOT_USABLE.get(consent.state, ErrorReason.CONSENT_NOT_ACTIVE))


def _require_purpose(consent: consent_pb2.Consent, purpose: purpose_pb2.Purpose.ValueType) -> None:
    until = consent.usable_until_time.ToDatetime(tzinfo=UTC)
    if consent.state != _C.STATE_NEEDS_REAUTHORISATION or until <= datetime.now(UTC):
        _require_state(consent, _C.STATE_ACTIVE)
    if purpose not in consent.purposes:
        raise _error(ErrorReason.PURPOSE_NOT_CONSENTED)


def _require_limit(consent: consent_pb2.Consent, request: payment_pb2.InitiatePaymentRequest) -> None:
    if not consent.HasField("payment_limit"):
        return
    limit, amount = consent.payment_limit, request.amount
    within = (amount.units, amount.nanos) <= (limit.units, limit.nanos)
    if amount.currency_code != limit.currency_code or not within:
        raise _error(ErrorReason.LIMIT_EXCEEDED)


def _check_account(field: str, iban: str) -> None:
    """Hold an IBAN to its check digits (ISO 13616: the rearranged number is 1 modulo 97)."""
    digits = "".join(str(int(character, 36)) for character in iban[4:] + iban[:4])
    if int(digits) % 97 != 1:
        raise _invalid(field, "iban.check_digits", "is not an IBAN: its check digits are wrong")


def _check_decimals(amount: money_pb2.Money) -> None:
    try:
        decimals = exponent_of(amount.currency_code)
    except ValueError:
        raise _invalid("amount", "money.currency_code", "is in no currency of ISO 4217") from None
    if amount.nanos % 10 ** (9 - decimals):
        raise _invalid("amount", "money.decimals", "has more decimals than its currency")


def _is_asked_for(entry: account_pb2.Transaction, request: account_pb2.ListTransactionsRequest) -> bool:
    day = (entry.booking_date.year, entry.booking_date.month, entry.booking_date.day)
    first = (request.date_from.year, request.date_from.month, request.date_from.day)
    last = (
        (request.date_to.year, request.date_to.month, request.date_to.day) if request.HasField("date_to") else (9999,)
    )
    pending = entry.booking_status == account_pb2.Transaction.BOOKING_STATUS_PENDING
    filters = account_pb2.ListTransactionsRequest
    if request.booking_filter == filters.BOOKING_FILTER_PENDING:
        return pending
    if pending:
        return request.booking_filter == filters.BOOKING_FILTER_BOTH
    return first <= day <= last


def _content_type(request: signing_pb2.SignRequest) -> str:
    """Hold a document to what it is said to be; answers with the JWS header `cty`."""
    try:
        if request.payload_kind == signing_pb2.PAYLOAD_KIND_JSON_DOCUMENT:
            _require(isinstance(json.loads(request.payload, object_pairs_hook=_unique), dict))
            return "json"
        if request.payload_kind == signing_pb2.PAYLOAD_KIND_XML_DOCUMENT:
            parser = expat.ParserCreate()
            parser.StartDoctypeDeclHandler = lambda *_: _require(False)  # noqa: FBT003 — no document type is right
            parser.Parse(request.payload, True)  # noqa: FBT003 — the C function takes it so
            return "xml"
        _require(all(character in "\t\n" or character.isprintable() for character in request.payload.decode()))
    except (ValueError, expat.ExpatError):
        raise _invalid("payload", "payload.kind", "is not of its payload_kind") from None
    return "text/plain"


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    _require(len(members) == len(dict(members)))
    return dict(members)


def _require(holds: bool) -> None:  # noqa: FBT001 — reads as a sentence
    if not holds:
        raise ValueError


def _page(items: Iterable[Any], request: Any) -> tuple[list[Any], str]:  # noqa: ANN401
    """Cut out the page that a request asks for; answers with the next page's token too."""
    return _cut(items, request.page_token, min(request.page_size or _PAGE_SIZE, _LARGEST_PAGE_SIZE))


def _cut(items: Iterable[Any], token: str, size: int) -> tuple[list[Any], str]:
    everything = list(items)
    try:
        start = int(token or "0", 16)
    except ValueError:
        raise _invalid("page_token", "page_token", "must be one that the page before gave") from None
    end = start + size
    return everything[start:end], f"{end:x}" if end < len(everything) else ""


def _error(reason: ErrorReason, *, field_violations: Iterable[FieldViolation] = ()) -> CustodyError:
    """Make the error that the contract has for a reason."""
    value = errors_pb2.ErrorReason.DESCRIPTOR.values_by_name[f"ERROR_REASON_{reason}"]
    rule = value.GetOptions().Extensions[errors_pb2.error_rule]
    code = code_pb2.Code.Name(rule.code)
    error_type = error_type_of(code=code, reason=reason)
    retry_after_seconds = 0.01 if issubclass(error_type, UnavailableError) else None
    return error_type(
        "refused by the fake",
        code=code,
        reason=reason,
        field_violations=field_violations,
        retry_after_seconds=retry_after_seconds,
    )


def _invalid(field: str, rule: str, description: str) -> CustodyError:
    violation = FieldViolation(field=field, rule=_rule_name(rule), description=description)
    return _error(ErrorReason.FIELD_INVALID, field_violations=[violation])


def _element(element: Any) -> str:  # noqa: ANN401 — protovalidate's own message, which comes without types
    """One step of a field's path, with the place in a list where there is one."""
    index = getattr(element.subscript, "value", None)
    return f"{element.field_name}[{index}]" if isinstance(index, int) else str(element.field_name)


def _rule_name(rule_id: str) -> str:
    """Reasons are in capitals (AIP-193): string.max_len is STRING_MAX_LEN."""
    return rule_id.upper().replace(".", "_")


def _copy(message: _M) -> _M:
    return type(message).FromString(message.SerializeToString())


def _timestamp(time: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp


def _base64url(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
