"""Assembling what the HSM signs: draft-cavage HTTP signatures (Berlin Group profile) and private_key_jwt assertions.

The HSM signs digests and knows nothing of formats; here are the bytes that are digested and the text that carries the signature.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from sidecar.connectors.descriptor import DescriptorError
from sidecar.domain.provider import Header

__all__ = [
    "Base64Der",
    "Base64UrlRaw",
    "SigningCertificate",
    "assertion_input",
    "base64url",
    "digest_header",
    "jws_input",
    "signature_prefix",
    "signing_string",
]

P256_BYTES = 32


class Base64UrlRaw:
    """r || s in base64url without padding: JWS (RFC 7515, RFC 7518 section 3.4)."""

    def encode(self, signature: bytes) -> str:
        return base64url(signature)


class Base64Der:
    """ASN.1 DER in base64: what banks take as cavage `ecdsa-sha256`."""

    def encode(self, signature: bytes) -> str:
        r, s = signature[:P256_BYTES], signature[P256_BYTES:]
        der = encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))
        return base64.b64encode(der).decode("ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningCertificate:
    """The QSEAL certificate of the request-signing key, as it goes into headers."""

    key_id: str  # SN=<lower-case hex serial>,CA=<issuer, RFC 2253, blanks as %20>
    header_value: str  # base64 of the DER form

    @classmethod
    def from_pem(cls, pem: bytes) -> "SigningCertificate":
        """Raises DescriptorError for what is no certificate of a P-256 key, or has an issuer that no header can name."""
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            key = certificate.public_key()
        except (ValueError, UnsupportedAlgorithm) as error:
            raise DescriptorError("the signing certificate is not an X.509 certificate in PEM form") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise DescriptorError(
                "the signing certificate must be of a P-256 key, because that is what the HSM signs with"
            )
        issuer = certificate.issuer.rfc4514_string().replace(" ", "%20")
        if not issuer.isascii() or not issuer.isprintable() or '"' in issuer:
            raise DescriptorError("the signing certificate's issuer has characters that a Signature header cannot hold")
        return cls(
            key_id=f"SN={certificate.serial_number:x},CA={issuer}",
            header_value=base64.b64encode(certificate.public_bytes(Encoding.DER)).decode("ascii"),
        )


def digest_header(body: bytes) -> str:
    """RFC 3230 / Berlin Group 1.3.11: the digest of the exact body; of the empty string where there is none."""
    return "SHA-256=" + base64.b64encode(hashlib.sha256(body).digest()).decode("ascii")


def signing_string(headers: Sequence[Header], names: Sequence[str]) -> bytes:
    """`name: value` lines in the order of `names`, lower case, joined by LF, none at the end (draft-cavage-12, 2.3)."""
    values = {header.name.lower(): header.value for header in headers}
    return "\n".join(f"{name}: {values[name]}" for name in names).encode("ascii")


def signature_prefix(key_id: str, names: Sequence[str]) -> str:
    """The Signature header up to where the signature itself begins; a double quote ends it."""
    return f'keyId="{key_id}",algorithm="ecdsa-sha256",headers="{" ".join(names)}",signature="'


def assertion_input(
    *, client_id: str, audience: str, assertion_id: str, issued_at: int, lifetime_seconds: int, key_id: str
) -> str:
    """The signing input of a client assertion (RFC 7523 section 3, RFC 7515 section 5.1)."""
    claims = {
        "iss": client_id,
        "sub": client_id,
        "aud": audience,
        "jti": assertion_id,
        "iat": issued_at,
        "exp": issued_at + lifetime_seconds,
    }
    return jws_input({"alg": "ES256", "kid": key_id, "typ": "JWT"}, json_bytes(claims))


def jws_input(header: Mapping[str, object], payload: bytes) -> str:
    return f"{base64url(json_bytes(header))}.{base64url(payload)}"


def json_bytes(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
