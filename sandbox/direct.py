"""A third-party provider that holds its keys and tokens itself: the sandbox's own tests use it, and benchmarks compare with it.

Rules this module keeps:
- It follows no redirect, retries nothing, and uses one connection for as long as the bank keeps it open.
- Its private keys come from the caller; nothing here belongs into production, which is the point of the comparison.
"""

import base64
import contextlib
import hashlib
import http.client
import json
import secrets
import ssl
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jwt
from joserfc.jwk import ECKey

from sandbox.assertions import ASSERTION_TYPE
from sandbox.directory import Layout, load_certificate

_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer of the bank; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> dict[str, object]:
        """Return the body as a JSON object."""
        document = json.loads(self.body)
        assert isinstance(document, dict)
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class TppKeys:
    """The keys of a third-party provider, in memory."""

    client: ec.EllipticCurvePrivateKey = field(repr=False)  # private_key_jwt
    signing: ec.EllipticCurvePrivateKey = field(repr=False)  # request signatures

    def client_jwks(self) -> dict[str, object]:
        """Return the public key set to register."""
        return {"keys": [{**self.jwk().as_dict(private=False), "use": "sig", "alg": "ES256"}]}

    def jwk(self) -> ECKey:
        """Return the client key as a JWK with its thumbprint as `kid`."""
        pem = self.client.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        key = ECKey.import_key(pem)
        key.ensure_kid()
        return key

    def signing_public_pem(self) -> bytes:
        """Return the public half of the request-signing key."""
        return self.signing.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


def new_keys() -> TppKeys:
    """Make the keys of a third-party provider."""
    return TppKeys(client=ec.generate_private_key(ec.SECP256R1()), signing=ec.generate_private_key(ec.SECP256R1()))


class DirectTpp:
    """Talks to the bank as an application that holds the token would."""

    def __init__(
        self,
        *,
        layout: Layout,
        issuer: str,
        api_base_url: str,
        client_id: str,
        redirect_uri: str,
        keys: TppKeys,
        tls_certificate: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        self.issuer = issuer
        self.api_base_url = api_base_url
        self.client_id = client_id
        self.redirect_uri = redirect_uri
        self._keys = keys
        self._jwk = keys.jwk()
        self._signing_certificate = load_certificate(layout.signing_certificate)
        self._tls = tls_context(
            layout.ca_certificate, tls_certificate or layout.tpp_certificate, tls_key or layout.tpp_key
        )
        parts = urlsplit(api_base_url)
        assert parts.hostname is not None
        self._connection = http.client.HTTPSConnection(
            parts.hostname, parts.port, context=self._tls, timeout=_TIMEOUT_SECONDS
        )

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    # OAuth

    def assertion(self, **changes: object) -> str:
        """Make a client assertion; `changes` replace claims, and None removes one."""
        now = int(time.time())
        claims: dict[str, object] = {
            "iss": self.client_id,
            "sub": self.client_id,
            "aud": self.issuer,
            "jti": secrets.token_urlsafe(16),
            "iat": now,
            "exp": now + 60,
            **changes,
        }
        header = {"alg": "ES256", "kid": self._jwk.kid or ""}
        return jwt.encode(header, {name: value for name, value in claims.items() if value is not None}, self._jwk)

    def form(self, path: str, parameters: Mapping[str, str], *, assertion: str | None = None) -> Reply:
        """Post a form with client authentication."""
        form = {
            "client_id": self.client_id,
            "client_assertion_type": ASSERTION_TYPE,
            "client_assertion": assertion if assertion is not None else self.assertion(),
            **parameters,
        }
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.send("POST", path, urlencode(form).encode(), headers)

    def push(self, scope: str, *, state: str, verifier: str, **changes: str | None) -> Reply:
        """Push an authorization request; `changes` replace parameters, and None removes one."""
        parameters: dict[str, str | None] = {
            "response_type": "code",
            "redirect_uri": self.redirect_uri,
            "scope": scope,
            "state": state,
            "code_challenge": challenge_of(verifier),
            "code_challenge_method": "S256",
            **changes,
        }
        return self.form("/oauth/par", {name: value for name, value in parameters.items() if value is not None})

    def authorisation_url(self, request_uri: str) -> str:
        """Return where to send the person."""
        query = urlencode({"client_id": self.client_id, "request_uri": request_uri})
        return f"{self.issuer}/oauth/authorize?{query}"

    def exchange(self, code: str, verifier: str, **changes: str) -> Reply:
        """Exchange a code."""
        parameters = {"grant_type": "authorization_code", "code": code, "code_verifier": verifier}
        return self.form("/oauth/token", {**parameters, "redirect_uri": self.redirect_uri, **changes})

    def refresh(self, refresh_token: str) -> Reply:
        """Refresh."""
        return self.form("/oauth/token", {"grant_type": "refresh_token", "refresh_token": refresh_token})

    # Berlin Group

    def xs2a(
        self,
        method: str,
        path: str,
        *,
        token: str | None = None,
        body: Mapping[str, object] | bytes | None = None,
        headers: Mapping[str, str] | None = None,
        sign: bool = True,
    ) -> Reply:
        """Send one request below /v1, signed unless told otherwise."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return self.send(method, path, content, self.headers(token=token, body=content, headers=headers, sign=sign))

    def headers(
        self, *, token: str | None, body: bytes, headers: Mapping[str, str] | None = None, sign: bool = True
    ) -> dict[str, str]:
        """Return the headers of one request below /v1, with a new X-Request-ID unless one is given."""
        result = {"X-Request-ID": str(uuid.uuid4()), **(headers or {})}
        if token is not None:
            result["Authorization"] = f"Bearer {token}"
        if body:
            result.setdefault("Content-Type", "application/json")
        return {**self.signature_headers(result, body), **result} if sign else result

    def signature_headers(self, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
        """Sign as Berlin Group profiles draft-cavage: ecdsa-sha256, DER signature."""
        signed = {name.lower(): value for name, value in headers.items()}
        signed["digest"] = f"SHA-256={base64.b64encode(hashlib.sha256(body).digest()).decode()}"
        optional = ("psu-id", "psu-corporate-id", "tpp-redirect-uri")
        names = ["digest", "x-request-id", *(name for name in optional if name in signed)]
        text = "\n".join(f"{name}: {signed[name]}" for name in names)
        signature = base64.b64encode(self._keys.signing.sign(text.encode(), ec.ECDSA(hashes.SHA256()))).decode()
        certificate = self._signing_certificate
        key_id = f"SN={certificate.serial_number:x},CA={certificate.issuer.rfc4514_string()}"
        der = certificate.public_bytes(serialization.Encoding.DER)
        return {
            "Digest": signed["digest"],
            "Signature": f'keyId="{key_id}",algorithm="ecdsa-sha256",headers="{" ".join(names)}",signature="{signature}"',
            "TPP-Signature-Certificate": base64.b64encode(der).decode(),
        }

    def send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """Send one request and read one answer. Errors of the connection come out as they are."""
        with self._closing_after_errors():
            self._connection.request(method, path, body=body or None, headers=dict(headers))
            answer = self._connection.getresponse()
            content = answer.read()
        return Reply(status=answer.status, headers={k.lower(): v for k, v in answer.getheaders()}, body=content)

    @contextlib.contextmanager
    def _closing_after_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._connection.close()
            raise


def tls_context(ca_file: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Make a client's TLS context that trusts only the sandbox's CA, with strict X.509 checks (RFC 5280)."""
    context = ssl.create_default_context(cafile=str(ca_file))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def challenge_of(verifier: str) -> str:
    """Return the S256 challenge of a PKCE verifier (RFC 7636 section 4.2)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
