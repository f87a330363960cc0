"""The sandbox's certificates: one CA, a server, and third-party providers (QWAC and QSEAL stand-ins).

Rules this module keeps:
- EC P-256 everywhere; every leaf has SKI, AKI and keyUsage, so that strict X.509 checks (RFC 5280) accept it.
- The PSD2 roles are in a QcStatement (ETSI TS 119 495), so that the bank can check roles as a real one does.
- The issuer's name has only CN, O and C: its RFC 4514 text, which `keyId` quotes, is then the same in every library.
"""

import base64
import datetime
import hashlib
import ipaddress
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

ROLE_PAYMENTS = "PSP_PI"
ROLE_ACCOUNTS = "PSP_AI"

_ROLE_OIDS = {  # 0.4.0.19495.1.x, DER content octets
    ROLE_PAYMENTS: bytes.fromhex("04008198270102"),
    ROLE_ACCOUNTS: bytes.fromhex("04008198270103"),
}
_PSD2_STATEMENT_OID = bytes.fromhex("040081982702")  # 0.4.0.19495.2
_QC_STATEMENTS = ObjectIdentifier("1.3.6.1.5.5.7.1.3")
_CA_DAYS = 3650
_LEAF_DAYS = 365
_BACKDATE = datetime.timedelta(minutes=5)  # clocks of containers and hosts differ a little


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """A CA that can sign: its certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Organisation:
    """The third-party provider named in QWAC and QSEAL."""

    name: str
    identifier: str  # organizationIdentifier, PSDxx-NCA-number
    roles: tuple[str, ...] = (ROLE_PAYMENTS, ROLE_ACCOUNTS)


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def make_ca(common_name: str) -> Issuer:
    """Make a self-signed CA valid for ten years."""
    key = new_key()
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "EU"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Sandbox Bank"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )
    ski = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        _builder(name, name, key.public_key(), days=_CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(ski, critical=False)
    )
    return Issuer(certificate=builder.sign(key, hashes.SHA256()), key=key)


def issue_server(issuer: Issuer, public_key: ec.EllipticCurvePublicKey) -> x509.Certificate:
    """Issue the bank's server certificate for 127.0.0.1, ::1 and localhost."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = x509.SubjectAlternativeName(
        [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.IPAddress(ipaddress.ip_address("::1")),
        ]
    )
    builder = (
        _leaf(issuer, name, public_key)
        .add_extension(_key_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
    )
    return builder.sign(issuer.key, hashes.SHA256())


def issue_tls_client(
    issuer: Issuer, organisation: Organisation, public_key: ec.EllipticCurvePublicKey, *, days: float = _LEAF_DAYS
) -> x509.Certificate:
    """Issue a QWAC stand-in: a TLS client certificate that names a third-party provider; valid for `days`."""
    builder = (
        _leaf(issuer, _organisation_name(organisation, "TLS client"), public_key, days=days)
        .add_extension(_key_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(_psd2_statement(organisation.roles), critical=False)
    )
    return builder.sign(issuer.key, hashes.SHA256())


def issue_seal(
    issuer: Issuer, organisation: Organisation, public_key: ec.EllipticCurvePublicKey, *, days: float = _LEAF_DAYS
) -> x509.Certificate:
    """Issue a QSEAL stand-in for a request-signing key that lives elsewhere (in an HSM); valid for `days`."""
    builder = (
        _leaf(issuer, _organisation_name(organisation, "request signing"), public_key, days=days)
        .add_extension(_key_usage(seal=True), critical=True)
        .add_extension(_psd2_statement(organisation.roles), critical=False)
    )
    return builder.sign(issuer.key, hashes.SHA256())


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFacts:
    """What the bank asks of a presented certificate, read out once: parsing it at every request would cost more than TLS."""

    thumbprint: str  # x5t#S256, RFC 8705 section 3.1: base64url of SHA-256 over the DER
    organisation_identifier: str | None  # None if it names none or several
    roles: frozenset[str]  # PSD2 roles of its QcStatement
    not_before: float  # seconds since 1970
    not_after: float
    serial_number: int
    issuer: str  # RFC 4514
    public_key: object

    def in_force(self, now: float) -> bool:
        """Say whether the certificate is valid at this time (seconds since 1970)."""
        return self.not_before <= now <= self.not_after


def facts(certificate: x509.Certificate) -> CertificateFacts:
    """Read out a certificate."""
    digest = hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest()
    identifiers = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_IDENTIFIER)
    return CertificateFacts(
        thumbprint=base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
        organisation_identifier=str(identifiers[0].value) if len(identifiers) == 1 else None,
        roles=_roles(certificate),
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
        serial_number=certificate.serial_number,
        issuer=certificate.issuer.rfc4514_string(),
        public_key=certificate.public_key(),
    )


def _roles(certificate: x509.Certificate) -> frozenset[str]:
    try:
        extension = certificate.extensions.get_extension_for_oid(_QC_STATEMENTS).value
    except x509.ExtensionNotFound:
        return frozenset()
    assert isinstance(extension, x509.UnrecognizedExtension)
    return frozenset(role for role, oid in _ROLE_OIDS.items() if _der(0x06, oid) in extension.value)


def _leaf(
    issuer: Issuer, name: x509.Name, public_key: ec.EllipticCurvePublicKey, *, days: float = _LEAF_DAYS
) -> x509.CertificateBuilder:
    aki = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    return (
        _builder(name, issuer.certificate.subject, public_key, days=days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(aki, critical=False)
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, *, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _organisation_name(organisation: Organisation, purpose: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "DE"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation.name),
            x509.NameAttribute(NameOID.ORGANIZATION_IDENTIFIER, organisation.identifier),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{organisation.name} {purpose}"),
        ]
    )


def _key_usage(*, sign_certificates: bool = False, seal: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=seal,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _psd2_statement(names: tuple[str, ...]) -> x509.UnrecognizedExtension:
    """Build the PSD2 QcStatement (ETSI TS 119 495 section 5.1): roles, authority's name, authority's id."""
    of_role = [_der(0x30, _der(0x06, _ROLE_OIDS[name]) + _der(0x0C, name.encode())) for name in names]
    info = _der(0x30, _der(0x30, b"".join(of_role)) + _der(0x0C, b"Sandbox Authority") + _der(0x0C, b"DE-BAFIN"))
    return x509.UnrecognizedExtension(_QC_STATEMENTS, _der(0x30, _der(0x30, _der(0x06, _PSD2_STATEMENT_OID) + info)))


def _der(tag: int, content: bytes) -> bytes:
    assert len(content) < 0x100, "short and one-octet long lengths are enough here"
    length = bytes([len(content)]) if len(content) < 0x80 else bytes([0x81, len(content)])
    return bytes([tag]) + length + content
