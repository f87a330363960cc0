"""A connector with a certificate and a fixed key, and values to render requests from."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature

from sidecar.connectors.base import UnsignedRequest
from sidecar.connectors.berlin_group import BerlinGroupConnector
from sidecar.connectors.oauth import OAuthClient
from sidecar.connectors.signing import SigningCertificate
from sidecar.domain.account import BookingStatus, PsuContext
from sidecar.domain.consent import AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, PaymentId, ProviderId, RequestId, WorkloadId
from sidecar.domain.money import Money
from sidecar.domain.payment import IdempotencyClass, Payment, PaymentInstruction, PaymentProduct, PaymentState
from sidecar.domain.provider import Answer, ProviderRequest, SecretSlot
from tests.unit.custody.support import descriptor

CALL = "11111111-1111-4111-8111-111111111111"
KEY = "22222222-2222-4222-8222-222222222222"
NOW = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
IBAN, CREDITOR = "DE40100100103307118608", "DE02120300000000202051"
PSU = PsuContext(ip_address="198.51.100.7", user_agent="Example/1.0")
CLASS_C, CLASS_B, CLASS_A = "sandbox-bank", "sandbox-bank-lookup", "sandbox-bank-idempotent"
JSON = (("content-type", "application/json"), ("x-request-id", CALL))

SIGNING_KEY = ec.derive_private_key(0x1234567, ec.SECP256R1())
ISSUER = x509.Name(
    [
        x509.NameAttribute(x509.NameOID.COUNTRY_NAME, "DE"),
        x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Example Trust Services"),
        x509.NameAttribute(x509.NameOID.COMMON_NAME, "Example QSEAL CA, 1"),
    ]
)


@lru_cache(maxsize=1)
def certificate_pem() -> bytes:
    """The same certificate each time but for its signature: serial number and names are fixed."""
    return make_certificate(SIGNING_KEY.public_key(), ISSUER)


def make_certificate(key: object, issuer: x509.Name) -> bytes:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Example TPP")]))
        .issuer_name(issuer)
        .public_key(key)  # type: ignore[arg-type]
        .serial_number(0xABCDEF0123)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=365))
    )
    signer = ec.derive_private_key(99, ec.SECP256R1())
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def connector(name: str = CLASS_C, *, signed: bool = True) -> BerlinGroupConnector:
    described = descriptor(name)
    return BerlinGroupConnector(
        descriptor=described,
        oauth=OAuthClient(descriptor=described, key_id="client-key-1"),
        certificate=SigningCertificate.from_pem(certificate_pem()) if signed else None,
    )


def consent(**changes: Any) -> Consent:
    value = Consent(
        id=ConsentId("c-1"),
        caller=WorkloadId("workload:shop"),
        owner=OwnerId("owner-1"),
        provider=ProviderId("sandbox-bank"),
        purposes=frozenset(Purpose),
        accounts=(AccountReference(iban=IBAN, currency_code="EUR"),),
        state=ConsentState.ACTIVE,
        subject_key=b"s" * 16,
        redirect_uri="https://app.example/callback",
        create_time=NOW,
        expire_time=NOW + timedelta(days=90),
        provider_consent_id="bank-consent-1",
    )
    return replace(value, **changes)


def instruction(**changes: Any) -> PaymentInstruction:
    value = PaymentInstruction(
        amount=Money(currency_code="EUR", minor_units=1250),
        creditor_account=AccountReference(iban=CREDITOR),
        creditor_name="Example Shop",
        debtor_account=AccountReference(iban=IBAN, currency_code="EUR"),
        product=PaymentProduct.SEPA_CREDIT_TRANSFER,
        remittance_information="Order 42",
        end_to_end_id="ORDER-42",
    )
    return replace(value, **changes)


def payment() -> Payment:
    return Payment(
        id=PaymentId("p-1"),
        caller=WorkloadId("workload:shop"),
        request_id=RequestId(KEY),
        consent=ConsentId("c-1"),
        owner=OwnerId("owner-1"),
        provider=ProviderId("sandbox-bank"),
        instruction=instruction(),
        state=PaymentState.ACCEPTED,
        idempotency_class=IdempotencyClass.NONE,
        bank_key=KEY,
        create_time=NOW,
        update_time=NOW,
        provider_payment_id="bank-payment-1",
    )


def renderings(*, signed: bool = True) -> dict[str, UnsignedRequest]:
    """One of each request that the connectors render, by name."""
    bank, other, third = (connector(name, signed=signed) for name in (CLASS_C, CLASS_A, CLASS_B))
    auth: dict[str, Any] = {"now": NOW, "assertion_id": "assertion-1"}
    made: dict[str, UnsignedRequest | None] = {
        "register_consent": bank.register_consent(consent(), psu=PSU, call_id=CALL),
        "register_consent_owner_chooses": bank.register_consent(consent(accounts=()), psu=None, call_id=CALL),
        "consent_details": bank.consent_details(consent(), call_id=CALL),
        "end_consent": bank.end_consent(consent(), call_id=CALL),
        "push_authorisation": bank.push_authorisation(
            consent(), state="st+a/te=", code_challenge="ch-al_lenge", **auth
        ),
        "exchange_code": bank.exchange_code(consent(), code="co&de=1 +", **auth),
        "refresh": bank.refresh(**auth),
        "revoke_token": bank.revoke_token(**auth),
        "initiate_payment": bank.initiate_payment(consent(), instruction(), bank_key=KEY, psu=PSU, call_id=KEY),
        "initiate_payment_instant": bank.initiate_payment(
            consent(provider_consent_id="", redirect_uri=""),
            instruction(
                product=PaymentProduct.INSTANT_SEPA_CREDIT_TRANSFER, remittance_information="", end_to_end_id=""
            ),
            bank_key=KEY,
            psu=None,
            call_id=KEY,
        ),
        "initiate_payment_class_a": other.initiate_payment(
            consent(), instruction(), bank_key=KEY, psu=PSU, call_id=KEY
        ),
        "initiate_payment_class_b": third.initiate_payment(
            consent(), instruction(), bank_key=KEY, psu=PSU, call_id=KEY
        ),
        "look_up_payment": third.look_up_payment(payment(), call_id=CALL),
        "payment_status": bank.payment_status(payment(), call_id=CALL),
        "accounts": bank.accounts(consent(), psu=None, call_id=CALL),
        "balances": bank.balances(consent(), "acc-1", psu=PSU, call_id=CALL),
        "transactions": bank.transactions(
            consent(),
            "acc-1",
            booking_status=BookingStatus.BOTH,
            date_from=date(2026, 8, 25),
            date_to=date(2026, 11, 23),
            page_query="",
            psu=None,
            call_id=CALL,
        ),
        "transactions_next_page": bank.transactions(
            consent(),
            "acc-1",
            booking_status=BookingStatus.BOTH,
            date_from=date(2026, 8, 25),
            date_to=None,
            page_query="bookingStatus=both&dateFrom=2026-08-25",
            psu=None,
            call_id=CALL,
        ),
    }
    assert None not in made.values()
    return {name: unsigned for name, unsigned in made.items() if unsigned}


def sign(unsigned: UnsignedRequest) -> ProviderRequest:
    """As the HSM does: r || s over the digest."""
    r, s = decode_dss_signature(SIGNING_KEY.sign(unsigned.digest, ec.ECDSA(Prehashed(hashes.SHA256()))))
    return unsigned.signed(r.to_bytes(32, "big") + s.to_bytes(32, "big"))


def on_the_wire(request: ProviderRequest) -> tuple[dict[str, str], bytes]:
    """Headers (lower case) and body as egress would send them, each slot filled with its own name."""
    headers = {
        header.name.lower(): header.value + (f"<{header.slot.kind.name}>" if header.slot else "")
        for header in request.headers
    }
    body = b"".join(f"<{part.kind.name}>".encode() if isinstance(part, SecretSlot) else part for part in request.body)
    return headers, body


def answer(status: int, body: bytes, *headers: tuple[str, str]) -> Answer:
    return Answer(status=status, headers=headers or JSON, body=body)
