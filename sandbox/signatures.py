"""HTTP signatures as Berlin Group profiles them (draft-cavage, "Signing Messages at Application Layer").

Rules this module keeps:
- The digest covers the bytes that arrived; a request without a body signs the digest of nothing.
- The signed headers are digest and x-request-id, and psu-id, psu-corporate-id and tpp-redirect-uri exactly when sent.
- The certificate comes from our CA, is in force, seals (digitalSignature), and names the organisation of the TLS client;
  `keyId` names that certificate.
- The algorithm is the one of the certificate's key, with SHA-256 or SHA-512.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import unquote

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from sandbox.pki import CertificateFacts, facts
from sandbox.web import Call, Clock

_CONDITIONAL = ("psu-id", "psu-corporate-id", "tpp-redirect-uri")
_PARAMETER = re.compile(r'([a-zA-Z]+)="([^"]*)"')
_KEY_ID = re.compile(r"SN=([0-9A-Fa-f]+),CA=(.+)")
_DIGESTS = {"SHA-256": hashlib.sha256, "SHA-512": hashlib.sha512}
_HASHES: Mapping[str, hashes.HashAlgorithm] = {"sha256": hashes.SHA256(), "sha512": hashes.SHA512()}


class SignatureRefused(Exception):
    """The request's signature does not hold; `code` is Berlin Group's name for why."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class SignatureVerifier:
    """Judges signatures against one CA."""

    def __init__(self, *, ca: x509.Certificate, clock: Clock) -> None:
        self._clock = clock
        self._certificate = lru_cache(maxsize=64)(lambda text: _read_certificate(text, ca))

    def check(self, call: Call, *, required: bool) -> None:
        """Check a request's Digest and Signature; a request without either passes only if none is required."""
        try:
            digest, signature = call.header("digest"), call.header("signature")
            if digest is None and signature is None and not required:
                return
            if digest is None or signature is None:
                raise SignatureRefused("SIGNATURE_MISSING", "Digest and Signature are required")
            certificate = self._signer(call)
            _check_digest(digest, call.body)
            self._check_signature(call, _parameters(signature), certificate)
        except ValueError as error:
            raise SignatureRefused("SIGNATURE_INVALID", str(error)) from error

    def _signer(self, call: Call) -> CertificateFacts:
        text = call.header("tpp-signature-certificate")
        if text is None:
            raise SignatureRefused("CERTIFICATE_MISSING", "TPP-Signature-Certificate is required")
        try:
            certificate = self._certificate(text)
        except ValueError as error:
            raise SignatureRefused("CERTIFICATE_INVALID", str(error)) from error
        if not certificate.in_force(self._clock()):
            raise SignatureRefused("CERTIFICATE_EXPIRED", "the signing certificate is not in force")
        tls = call.certificate
        if tls is None or certificate.organisation_identifier != tls.organisation_identifier:
            raise SignatureRefused("CERTIFICATE_INVALID", "signing and TLS certificate name different organisations")
        return certificate

    def _check_signature(self, call: Call, given: Mapping[str, str], certificate: CertificateFacts) -> None:
        _check_key_id(given["keyId"], certificate)
        names = given["headers"].split(" ")
        if sorted(names) != sorted(_expected_names(call)):
            raise ValueError("headers must list digest, x-request-id, and of the conditional ones those that are sent")
        lines = [f"{name}: {call.header(name)}" for name in names]
        try:
            signature = base64.b64decode(given["signature"], validate=True)
        except binascii.Error as error:
            raise ValueError("the signature is not base64") from error
        _verify(certificate, given["algorithm"], signature, "\n".join(lines).encode())


def _expected_names(call: Call) -> list[str]:
    return ["digest", "x-request-id", *(name for name in _CONDITIONAL if call.headers.get(name))]


def _check_digest(value: str, body: bytes) -> None:
    algorithm, _, digest = value.partition("=")
    function = _DIGESTS.get(algorithm)
    if function is None:
        raise ValueError("Digest must be SHA-256 or SHA-512")
    if digest != base64.b64encode(function(body).digest()).decode():
        raise ValueError("Digest does not fit the body")


def _parameters(value: str) -> dict[str, str]:
    found = _PARAMETER.findall(value)
    given = dict(found)
    if len(given) != len(found) or ",".join(f'{name}="{text}"' for name, text in found) != value.replace('", ', '",'):
        raise ValueError('Signature is not a list of name="value"')
    if set(given) != {"keyId", "algorithm", "headers", "signature"}:
        raise ValueError("Signature must have keyId, algorithm, headers and signature")
    return given


def _check_key_id(key_id: str, certificate: CertificateFacts) -> None:
    match = _KEY_ID.fullmatch(unquote(key_id))
    if match is None:
        raise ValueError('keyId must be "SN=<hexadecimal serial>,CA=<issuer>"')
    if int(match[1], 16) != certificate.serial_number or match[2] != certificate.issuer:
        raise ValueError("keyId does not name the certificate")


def _verify(certificate: CertificateFacts, algorithm: str, signature: bytes, content: bytes) -> None:
    kind, _, hash_name = algorithm.partition("-")
    function = _HASHES.get(hash_name)
    key = certificate.public_key
    try:
        if kind == "ecdsa" and function is not None and isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, content, ec.ECDSA(function))
        elif kind == "rsa" and function is not None and isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, content, padding.PKCS1v15(), function)
        else:
            raise ValueError("the algorithm does not fit the certificate's key")
    except InvalidSignature as error:
        raise ValueError("the signature does not fit") from error


def _read_certificate(text: str, ca: x509.Certificate) -> CertificateFacts:
    """Read a base64 DER certificate and check who issued it and what for."""
    try:
        certificate = x509.load_der_x509_certificate(base64.b64decode(text, validate=True))
        certificate.verify_directly_issued_by(ca)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise ValueError("TPP-Signature-Certificate is not a certificate of a CA that the bank trusts") from error
    if not usage.digital_signature:
        raise ValueError("the certificate may not sign")
    return facts(certificate)
