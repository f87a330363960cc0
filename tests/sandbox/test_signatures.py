"""HTTP signatures: what a provider can get wrong, got wrong once each."""

import base64
import hashlib
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from sandbox import pki
from sandbox.direct import Reply, new_keys
from sandbox.directory import DEFAULT_ORGANISATION, load_issuer
from sandbox.signatures import SignatureVerifier
from sandbox.testing import SandboxProcess
from sandbox.web import Call
from tests.sandbox.support import PSU, REDIRECT_URI, SCT, JudgedTpp, Prepared, Session, approve, code_of, payment_body

Headers = dict[str, str]
BODY = b'{"not":"reached"}'


def signed(tpp: JudgedTpp, session: Session, **more: str) -> Headers:
    extra = {name.replace("_", "-"): value for name, value in more.items()}
    return tpp.headers(token=session.access_token, body=BODY, headers={**PSU, **extra})


def outcome(reply: Reply) -> tuple[int, str]:
    return reply.status, code_of(reply)


def reissued(
    certificate: x509.Certificate,
    issuer: pki.Issuer,
    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    usage: x509.KeyUsage,
) -> x509.Certificate:
    """A certificate with the same names, from the same CA, for another key or use."""
    builder = x509.CertificateBuilder(
        certificate.issuer,
        certificate.subject,
        public_key,
        x509.random_serial_number(),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )
    return builder.add_extension(usage, critical=True).sign(issuer.key, hashes.SHA256())


def without(*names: str) -> Callable[[Headers], None]:
    def change(headers: Headers) -> None:
        for name in names:
            del headers[name]

    return change


def replaced(name: str, old: str, new: str) -> Callable[[Headers], None]:
    def change(headers: Headers) -> None:
        assert old in headers[name], f"{old} is not in {headers[name]}"
        headers[name] = headers[name].replace(old, new)

    return change


def put(name: str, value: str) -> Callable[[Headers], None]:
    return lambda headers: headers.update({name: value})


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (without("Digest", "Signature", "TPP-Signature-Certificate"), "SIGNATURE_MISSING"),
        (without("Signature"), "SIGNATURE_MISSING"),
        (without("Digest"), "SIGNATURE_MISSING"),
        (without("TPP-Signature-Certificate"), "CERTIFICATE_MISSING"),
        (put("TPP-Signature-Certificate", "bm90IGEgY2VydGlmaWNhdGU="), "CERTIFICATE_INVALID"),
        (put("X-Request-ID", "99391c7e-ad88-49ec-a2ad-99ddcb1f7721"), "SIGNATURE_INVALID"),
        (put("Digest", "SHA-256=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="), "SIGNATURE_INVALID"),
        (put("Digest", f"SHA={base64.b64encode(hashlib.sha1(BODY).digest()).decode()}"), "SIGNATURE_INVALID"),
        (put("PSU-ID", "anna"), "SIGNATURE_INVALID"),
        (put("TPP-Redirect-URI", REDIRECT_URI), "SIGNATURE_INVALID"),
        (replaced("Signature", "ecdsa-sha256", "ecdsa-sha512"), "SIGNATURE_INVALID"),
        (replaced("Signature", "ecdsa-sha256", "rsa-sha256"), "SIGNATURE_INVALID"),
        (replaced("Signature", "ecdsa-sha256", "hs2019"), "SIGNATURE_INVALID"),
        (replaced("Signature", "digest x-request-id", "digest"), "SIGNATURE_INVALID"),
        (replaced("Signature", "digest x-request-id", "digest x-request-id date"), "SIGNATURE_INVALID"),
        (replaced("Signature", "digest x-request-id", "Digest X-Request-ID"), "SIGNATURE_INVALID"),
        (replaced("Signature", "digest x-request-id", "digest digest x-request-id"), "SIGNATURE_INVALID"),
        (replaced("Signature", "SN=", "SN=1"), "SIGNATURE_INVALID"),
        (replaced("Signature", "CN=Sandbox Bank CA", "CN=Other CA"), "SIGNATURE_INVALID"),
        (replaced("Signature", ',signature="', ',signature="!'), "SIGNATURE_INVALID"),
        (replaced("Signature", ',signature="', ',signed="'), "SIGNATURE_INVALID"),
        (put("Signature", "nonsense"), "SIGNATURE_INVALID"),
    ],
)
def test_a_wrong_signature_is_refused(
    bank: SandboxProcess, tpp: JudgedTpp, session: Session, spoil: Callable[[Headers], None], code: str
) -> None:
    """Missing or wrong signature, digest, certificate, key id, algorithm or header list: 401, nothing executed."""
    headers = signed(tpp, session)
    spoil(headers)
    reply = tpp.send("POST", SCT, BODY, headers)

    assert outcome(reply) == (401, code)
    assert bank.ledger() == []


def test_a_changed_body_is_noticed(bank: SandboxProcess, tpp: JudgedTpp, session: Session) -> None:
    """One byte of the body other than what was signed is refused."""
    reply = tpp.send("POST", SCT, BODY.replace(b"not", b"now"), signed(tpp, session))

    assert outcome(reply) == (401, "SIGNATURE_INVALID")


def test_a_right_signature_is_let_through(tpp: JudgedTpp, session: Session) -> None:
    """The same request unspoiled gets past the signature: it is refused only for its body."""
    reply = tpp.send("POST", SCT, BODY, signed(tpp, session))

    assert outcome(reply) == (400, "PARAMETER_NOT_SUPPORTED")


@pytest.mark.parametrize("style", ["%20", "upper-case serial"])
def test_the_spellings_of_the_key_id_are_taken(tpp: JudgedTpp, session: Session, style: str) -> None:
    """The issuer's name may have its blanks as %20, and the serial number may be in upper case."""
    headers = signed(tpp, session)
    serial = headers["Signature"].partition("SN=")[2].partition(",")[0]
    if style == "%20":
        replaced("Signature", "Sandbox Bank", "Sandbox%20Bank")(headers)
    else:
        replaced("Signature", f"SN={serial}", f"SN={serial.upper()}")(headers)
    reply = tpp.send("POST", SCT, BODY, headers)

    assert reply.status == 400


def test_psu_headers_are_signed_when_sent(tpp: JudgedTpp, session: Session) -> None:
    """PSU-ID, PSU-Corporate-ID and TPP-Redirect-URI are part of the signature when they are sent."""
    headers = signed(tpp, session, PSU_ID="anna", PSU_Corporate_ID="x", TPP_Redirect_URI=REDIRECT_URI)
    right = tpp.send("POST", SCT, BODY, headers)
    headers["PSU-ID"] = "bert"
    wrong = tpp.send("POST", SCT, BODY, headers)

    assert 'headers="digest x-request-id psu-id psu-corporate-id tpp-redirect-uri"' in headers["Signature"]
    assert (right.status, wrong.status) == (400, 401)


def test_reads_are_signed_too(tpp: JudgedTpp, session: Session) -> None:
    """With `--signature required` a read without a signature is refused."""
    headers = {"Consent-ID": session.consent_id}
    reply = tpp.xs2a("GET", "/v1/accounts", token=session.access_token, headers=headers, sign=False)

    assert outcome(reply) == (401, "SIGNATURE_MISSING")


def test_another_key_does_not_sign(bank: SandboxProcess, session: Session, prepared: Prepared) -> None:
    """A signature by another key than the certificate's is refused."""
    thief = prepared.tpp(bank, keys=new_keys())
    reply = thief.send("POST", SCT, BODY, signed(thief, session))
    thief.close()

    assert outcome(reply) == (401, "SIGNATURE_INVALID")


@pytest.mark.parametrize("kind", ["expired", "other-organisation", "other-ca", "no-signing"])
def test_a_wrong_signing_certificate_is_refused(
    tpp: JudgedTpp, session: Session, prepared: Prepared, kind: str
) -> None:
    """A certificate that is over, names another organisation, comes from another CA, or may not sign."""
    issuer = pki.make_ca("Sandbox Bank CA") if kind == "other-ca" else load_issuer(prepared.layout)
    organisation = pki.Organisation(name="X", identifier="PSDDE-BAFIN-1") if "org" in kind else DEFAULT_ORGANISATION
    days = -1e-3 if kind == "expired" else 1
    public_key = prepared.keys.signing.public_key()
    certificate = pki.issue_seal(issuer, organisation, public_key, days=days)
    if kind == "no-signing":
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=True,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=False,
            crl_sign=False,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = reissued(certificate, issuer, public_key, usage)
    headers = signed(tpp, session)
    headers["TPP-Signature-Certificate"] = base64.b64encode(
        certificate.public_bytes(serialization.Encoding.DER)
    ).decode()
    reply = tpp.send("POST", SCT, BODY, headers)

    assert outcome(reply) == (401, "CERTIFICATE_EXPIRED" if kind == "expired" else "CERTIFICATE_INVALID")


def test_optional_signatures_are_still_judged(prepared: Prepared) -> None:
    """With `--signature optional` unsigned requests pass, and wrong signatures do not."""
    with SandboxProcess.start(prepared.layout.root, arguments=["--signature", "optional"]) as bank:
        tpp = prepared.tpp(bank)
        session = approve(bank, tpp)
        unsigned = tpp.xs2a("POST", SCT, token=session.access_token, body=payment_body(), headers=PSU, sign=False)
        headers = signed(tpp, session)
        headers["Digest"] = "SHA-256=x"
        wrong = tpp.send("POST", SCT, BODY, headers)
        tpp.close()

    assert unsigned.status == 201
    assert outcome(wrong) == (401, "SIGNATURE_INVALID")


def test_signatures_on_writes_only(prepared: Prepared) -> None:
    """With `--signature writes` reads pass unsigned, payments do not."""
    with SandboxProcess.start(prepared.layout.root, arguments=["--signature", "writes"]) as bank:
        tpp = prepared.tpp(bank)
        session = approve(bank, tpp)
        headers = {"Consent-ID": session.consent_id}
        read = tpp.xs2a("GET", "/v1/accounts", token=session.access_token, headers=headers, sign=False)
        paid = tpp.xs2a("POST", SCT, token=session.access_token, body=payment_body(), headers=PSU, sign=False)
        tpp.close()

    assert (read.status, paid.status, code_of(paid)) == (200, 401, "SIGNATURE_MISSING")


def test_rsa_keys_are_judged_too(prepared: Prepared) -> None:
    """rsa-sha256 with an RSA certificate is taken: the judge is not bound to one curve."""
    issuer = load_issuer(prepared.layout)
    key = rsa.generate_private_key(65537, 2048)
    seal = pki.issue_seal(issuer, DEFAULT_ORGANISATION, ec.generate_private_key(ec.SECP256R1()).public_key())
    usage = seal.extensions.get_extension_for_class(x509.KeyUsage).value
    certificate = reissued(seal, issuer, key.public_key(), usage)
    digest = "SHA-256=" + base64.b64encode(hashlib.sha256(b"").digest()).decode()
    request_id = "99391c7e-ad88-49ec-a2ad-99ddcb1f7721"
    text = f"x-request-id: {request_id}\ndigest: {digest}".encode()
    value = base64.b64encode(key.sign(text, padding.PKCS1v15(), hashes.SHA256())).decode()
    key_id = f"SN={certificate.serial_number:x},CA={certificate.issuer.rfc4514_string()}"
    signature = f'keyId="{key_id}",algorithm="rsa-sha256",headers="x-request-id digest",signature="{value}"'
    der = base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()
    now = certificate.not_valid_before_utc.timestamp() + 1
    call = Call(
        method="GET",
        path="/v1/accounts",
        query="",
        headers={
            "digest": [digest],
            "x-request-id": [request_id],
            "signature": [signature],
            "tpp-signature-certificate": [der],
        },
        body=b"",
        certificate=pki.facts(seal),
    )

    SignatureVerifier(ca=issuer.certificate, clock=lambda: now).check(call, required=True)
