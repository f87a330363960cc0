"""What is sent to a bank: against golden requests, against the official description, and signed so that others can verify it.

The vectors in tests/vectors/connectors/ hold every request as any implementation must render it, signature and signing
certificate apart; `python -m tests.unit.connectors.test_rendering` writes them anew.
"""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc import jwt
from joserfc.jwk import ECKey

from sidecar.connectors.base import UnsignedRequest
from sidecar.connectors.descriptor import DescriptorError
from sidecar.connectors.signing import SigningCertificate
from sidecar.domain.consent import Purpose
from sidecar.domain.provider import KeyPurpose, SecretSlot
from sidecar.domain.secrets import SecretKind
from tests.sandbox.official import official_description
from tests.unit.connectors.support import (
    CALL,
    KEY,
    SIGNING_KEY,
    certificate_pem,
    connector,
    consent,
    instruction,
    make_certificate,
    on_the_wire,
    payment,
    renderings,
    sign,
)

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "connectors" / "requests.json"
NAMES = sorted(renderings())
BANK_NAMES = [name for name in NAMES if renderings()[name].request.origin.startswith("https://api.")]
OAUTH_NAMES = [name for name in NAMES if name not in BANK_NAMES]
# The official file describes the bank's own resources: a query parameter of a vendor's next page is not in it.
NOT_OF_THE_STANDARD = {"look_up_payment"}  # a list of payments by reference is a bank's own addition


def golden(unsigned: UnsignedRequest) -> dict[str, Any]:
    """A request as plain values; what depends on the certificate is replaced by a word."""
    headers, body = on_the_wire(unsigned.request)
    if "tpp-signature-certificate" in headers:
        headers["tpp-signature-certificate"] = "<certificate>"
    return {
        "method": unsigned.request.method,
        "origin": unsigned.request.origin,
        "target": unsigned.request.target,
        "headers": headers,
        "body": body.decode(),
        "key": unsigned.key.value,
        "signing_input": unsigned.signing_input.decode(),
        "signature_place": unsigned.place.value,
        "signature_prefix": unsigned.prefix,
        "signature_suffix": unsigned.suffix,
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_request_is_the_golden_one(name: str) -> None:
    """Byte for byte: method, origin, target, headers, body with its slots, and what is signed."""
    vectors = json.loads(VECTORS.read_text())

    assert golden(renderings()[name]) == vectors[name]


def test_there_is_no_golden_request_that_nobody_renders() -> None:
    """The file and the code have the same requests."""
    assert sorted(json.loads(VECTORS.read_text())) == NAMES


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", [name for name in BANK_NAMES if name not in NOT_OF_THE_STANDARD])
def test_each_request_to_the_bank_is_one_of_the_official_description(name: str, signed: bool) -> None:
    """Parameters, headers and bodies by the Berlin Group's own 1.3.11 file."""
    unsigned = renderings(signed=signed)[name]
    request = sign(unsigned) if unsigned.signing_input else unsigned.request
    headers, body = on_the_wire(request)

    official_description().check_request(request.method, request.target, headers, body)


def test_the_official_judge_refuses_what_is_wrong() -> None:
    """A judge that takes everything would prove nothing."""
    headers, body = on_the_wire(renderings()["initiate_payment"].request)
    target = renderings()["initiate_payment"].request.target
    judge = official_description()

    with pytest.raises(AssertionError):
        judge.check_request("POST", target, headers, body.replace(b"12.50", b"12,50"))
    with pytest.raises(AssertionError):
        judge.check_request("POST", target, {k: v for k, v in headers.items() if k != "x-request-id"}, body)


# --- signatures


def cavage_parameters(header: str) -> dict[str, str]:
    assert re.fullmatch(r'([a-zA-Z]+="[^"]*")(,[a-zA-Z]+="[^"]*")*', header)
    return dict(re.findall(r'([a-zA-Z]+)="([^"]*)"', header))


@pytest.mark.parametrize("name", BANK_NAMES)
def test_each_signature_verifies_from_the_bytes_on_the_wire(name: str) -> None:
    """draft-cavage-12, section 2.5, by code of the test's own: digest over the body, names in lower case, DER in base64."""
    headers, body = on_the_wire(sign(renderings()[name]))
    parameters = cavage_parameters(headers["signature"])
    names = parameters["headers"].split(" ")
    lines = "\n".join(f"{each}: {headers[each]}" for each in names).encode()

    SIGNING_KEY.public_key().verify(base64.b64decode(parameters["signature"]), lines, ec.ECDSA(hashes.SHA256()))
    assert headers["digest"] == "SHA-256=" + base64.b64encode(hashlib.sha256(body).digest()).decode()
    assert parameters["algorithm"] == "ecdsa-sha256"
    assert parameters["keyId"] == "SN=abcdef0123,CA=CN=Example%20QSEAL%20CA\\,%201,O=Example%20Trust%20Services,C=DE"
    carried = x509.load_der_x509_certificate(base64.b64decode(headers["tpp-signature-certificate"]))
    assert carried == x509.load_pem_x509_certificate(certificate_pem())


@pytest.mark.parametrize("name", BANK_NAMES)
def test_what_berlin_group_has_signed_is_signed_and_no_token(name: str) -> None:
    """digest and x-request-id always; tpp-redirect-uri exactly when it is sent; nothing that holds a secret."""
    headers, _ = on_the_wire(sign(renderings()[name]))
    names = cavage_parameters(headers["signature"])["headers"].split(" ")

    assert names[:2] == ["digest", "x-request-id"]
    assert ("tpp-redirect-uri" in names) == ("tpp-redirect-uri" in headers)
    assert set(names) <= {"digest", "x-request-id", "tpp-redirect-uri", "psu-id", "psu-corporate-id"}


def test_without_a_certificate_there_is_neither_signature_nor_digest() -> None:
    """Digest is sent if and only if Signature is."""
    for name in BANK_NAMES:
        unsigned = renderings(signed=False)[name]
        assert unsigned.signing_input == b""
        assert not {"digest", "signature", "tpp-signature-certificate"} & set(on_the_wire(unsigned.request)[0])


@pytest.mark.parametrize("name", OAUTH_NAMES)
def test_each_client_assertion_verifies_with_an_independent_library(name: str) -> None:
    """RFC 7523 by joserfc: ES256, iss = sub = client_id, aud = issuer, exp 60 s after iat, the given jti."""
    unsigned = renderings()[name]
    _, body = on_the_wire(sign(unsigned))
    form = parse_qs(body.decode(), strict_parsing=True)
    token = jwt.decode(form["client_assertion"][0], ECKey.import_key(SIGNING_KEY.public_key()), algorithms=["ES256"])

    assert unsigned.key is KeyPurpose.CLIENT_AUTHENTICATION
    assert form["client_assertion_type"] == ["urn:ietf:params:oauth:client-assertion-type:jwt-bearer"]
    assert token.header == {"alg": "ES256", "kid": "client-key-1", "typ": "JWT"}
    assert token.claims["iss"] == token.claims["sub"] == "PSDDE-BAFIN-123456"
    assert token.claims["aud"] == "https://issuer.bank.example"
    assert token.claims["exp"] - token.claims["iat"] == 60
    assert token.claims["jti"] == "assertion-1"


def test_form_values_survive_their_encoding() -> None:
    """State and code come out of the form as they went in, whatever characters they have."""
    pushed = parse_qs(on_the_wire(sign(renderings()["push_authorisation"]))[1].decode())
    exchanged = parse_qs(on_the_wire(sign(renderings()["exchange_code"]))[1].decode())

    assert pushed["state"] == ["st+a/te="]
    assert pushed["scope"] == ["AIS:bank-consent-1 PIS"]
    assert (pushed["code_challenge_method"], pushed["response_type"]) == (["S256"], ["code"])
    assert exchanged["code"] == ["co&de=1 +"]


# --- secrets and slots


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("initiate_payment", [SecretKind.ACCESS_TOKEN]),
        ("end_consent", [SecretKind.ACCESS_TOKEN]),
        ("exchange_code", [SecretKind.PKCE_VERIFIER]),
        ("refresh", [SecretKind.REFRESH_TOKEN]),
        ("revoke_token", [SecretKind.REFRESH_TOKEN]),
        ("push_authorisation", []),
        ("register_consent", []),
    ],
)
def test_each_request_has_slots_for_exactly_its_secrets(name: str, kinds: list[SecretKind]) -> None:
    """No other secret can be written into it."""
    assert [slot.kind for slot in sign(renderings()[name]).slots] == kinds


def test_the_idempotency_key_is_sent_where_the_provider_promises_something_for_it() -> None:
    """Class A: our key in its header; class C: no such header, X-Request-ID alone."""
    class_a, _ = on_the_wire(renderings()["initiate_payment_class_a"].request)
    class_c, _ = on_the_wire(renderings()["initiate_payment"].request)

    assert class_a["idempotency-key"] == class_a["x-request-id"] == KEY
    assert "idempotency-key" not in class_c


def test_our_key_is_sent_as_a_reference_where_the_provider_can_be_asked_for_it() -> None:
    """Class B: the initiation carries our key, never the application's own end-to-end id, and the look-up asks for the same."""
    body = json.loads(on_the_wire(renderings()["initiate_payment_class_b"].request)[1])
    query = parse_qs(urlsplit(renderings()["look_up_payment"].request.target).query)

    assert body["instructionIdentification"] == KEY.replace("-", "")
    assert body["endToEndIdentification"] == "ORDER-42"
    assert query == {"instructionIdentification": [KEY.replace("-", "")]}
    assert "instructionIdentification" not in on_the_wire(renderings()["initiate_payment"].request)[1].decode()
    assert connector().look_up_payment(payment(), call_id=CALL) is None


def test_nothing_is_sent_empty() -> None:
    """A header without a value says nothing; an imported consent has no redirect URI."""
    for name, unsigned in renderings().items():
        assert all(on_the_wire(unsigned.request)[0].values()), name
    assert "tpp-redirect-uri" not in on_the_wire(renderings()["initiate_payment_instant"].request)[0]


@pytest.mark.parametrize("identifier", ["a/../b", "%2e%2e", "a?b", "a#b", "a b", "ä", "a\r\nb"])
def test_an_identifier_of_the_bank_stays_one_segment(identifier: str) -> None:
    """N11, N12: whatever it holds, it names nothing but a resource of that name."""
    target = connector().balances(consent(), identifier, psu=None, call_id=CALL).request.target

    assert urlsplit(target).path.count("/") == 4
    assert target.isascii()
    assert target.isprintable()
    assert " " not in target


def test_a_consent_without_account_purposes_has_nothing_to_register_or_end() -> None:
    """None where the provider holds no consent resource."""
    only_payments = consent(purposes=frozenset({Purpose.PAYMENTS}), provider_consent_id="")

    assert connector().register_consent(only_payments, psu=None, call_id=CALL) is None
    assert connector().consent_details(only_payments, call_id=CALL) is None
    assert connector().end_consent(only_payments, call_id=CALL) is None


def test_the_bytes_of_a_payment_are_the_instruction_and_nothing_else() -> None:
    """Amount with exactly the currency's decimals; what was not asked for is not there."""
    body = json.loads(on_the_wire(renderings()["initiate_payment_instant"].request)[1])

    assert body == {
        "debtorAccount": {"iban": "DE40100100103307118608", "currency": "EUR"},
        "instructedAmount": {"currency": "EUR", "amount": "12.50"},
        "creditorAccount": {"iban": "DE02120300000000202051"},
        "creditorName": "Example Shop",
    }
    assert instruction().amount.amount == "12.50"
    assert all(isinstance(part, bytes | SecretSlot) for part in renderings()["initiate_payment"].request.body)


# --- the signing certificate (F11)


@pytest.mark.parametrize(
    "case", ["no certificate", "rsa key", "other curve", "quote in the issuer", "umlaut in the issuer"]
)
def test_bi_f11_a_certificate_that_cannot_be_used_is_refused_when_it_is_loaded(case: str) -> None:
    """F11: not at the first request."""
    plain = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "CA")])

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    pem = {  # type: ignore[no-untyped-call]
        "no certificate": lambda: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "rsa key": lambda: make_certificate(rsa.generate_private_key(65537, 2048).public_key(), plain),
        "other curve": lambda: make_certificate(ec.generate_private_key(ec.SECP384R1()).public_key(), plain),
        "quote in the issuer": lambda: make_certificate(SIGNING_KEY.public_key(), named('a"b')),
        "umlaut in the issuer": lambda: make_certificate(SIGNING_KEY.public_key(), named("Prüfstelle")),
    }[case]()

    with pytest.raises(DescriptorError):
        SigningCertificate.from_pem(pem)


if __name__ == "__main__":
    VECTORS.parent.mkdir(parents=True, exist_ok=True)
    VECTORS.write_text(json.dumps({name: golden(made) for name, made in renderings().items()}, indent=2) + "\n")
