"""The sandbox's directory: what `init` makes and what `serve` reads.

    ca/ca.pem ca/ca.key            the sandbox's own CA
    bank/server.pem bank/server.key  the bank's TLS server
    tpp/client.pem tpp/client.key  the third-party provider's TLS client (QWAC stand-in)
    tpp/signing.pem                the certificate of its request-signing key (QSEAL stand-in); the key is elsewhere
    clients.json                   who may ask for what
    sandbox.json                   addresses, while the bank is serving

Rules this module keeps:
- Making is idempotent: only what is missing, expired or contradicted by the arguments is made, and each step is told.
- Private keys are files of mode 0600; files appear whole or not at all.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from sandbox import pki

DEFAULT_ORGANISATION = pki.Organisation(name="Demo Platform", identifier="PSDDE-BAFIN-123456")
_RENEW_BEFORE_SECONDS = 7 * 86400

Tell = Callable[[str], None]


class DirectoryError(Exception):
    """The directory, or an argument about it, is not usable; the text says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A registered third-party provider."""

    client_id: str
    name: str
    organisation_identifier: str  # must equal the one in its TLS and signing certificates
    redirect_uris: tuple[str, ...]
    jwks: Mapping[str, object]  # public keys of private_key_jwt


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where each file of the directory is."""

    root: Path

    @property
    def ca_certificate(self) -> Path:
        return self.root / "ca" / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.root / "ca" / "ca.key"

    @property
    def server_certificate(self) -> Path:
        return self.root / "bank" / "server.pem"

    @property
    def server_key(self) -> Path:
        return self.root / "bank" / "server.key"

    @property
    def tpp_certificate(self) -> Path:
        return self.root / "tpp" / "client.pem"

    @property
    def tpp_key(self) -> Path:
        return self.root / "tpp" / "client.key"

    @property
    def signing_certificate(self) -> Path:
        return self.root / "tpp" / "signing.pem"

    @property
    def clients(self) -> Path:
        return self.root / "clients.json"

    @property
    def announcement(self) -> Path:
        return self.root / "sandbox.json"


def initialise(
    root: Path,
    *,
    client_id: str,
    client_jwks: Mapping[str, object],
    request_signing_public_key_pem: bytes,
    redirect_uris: Sequence[str] = (),
    tell: Tell = print,
) -> Layout:
    """Make in `root` whatever is missing for this client, and tell each step."""
    layout = Layout(root=root)
    check_jwks(client_jwks)
    signing_key = _public_key(request_signing_public_key_pem)
    issuer = _ensure_ca(layout, tell)
    _ensure_server(layout, issuer, tell)
    _ensure_tls_client(layout, issuer, tell)
    _ensure_seal(layout, issuer, signing_key, tell)
    _ensure_client(layout, client_id, client_jwks, redirect_uris, tell)
    return layout


def load_issuer(layout: Layout) -> pki.Issuer:
    """Read the CA with its private key."""
    return pki.Issuer(certificate=load_certificate(layout.ca_certificate), key=load_private_key(layout.ca_key))


def load_certificate(path: Path) -> x509.Certificate:
    """Read one PEM certificate."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DirectoryError(f"cannot read the certificate {path}: {error}; run `init` again") from error


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read one unencrypted EC private key."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise DirectoryError(f"cannot read the private key {path}: {error}; run `init` again") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DirectoryError(f"{path} is not an EC key; remove it and run `init` again")
    return key


def load_clients(layout: Layout) -> dict[str, Client]:
    """Read the registered clients, by client id."""
    try:
        document = json.loads(layout.clients.read_text())
        records = [_client_of(record) for record in document["clients"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DirectoryError(f"cannot read {layout.clients}: {error!r}; run `init` first") from error
    return {client.client_id: client for client in records}


def save_clients(layout: Layout, clients: Mapping[str, Client]) -> None:
    """Write the registered clients."""
    records = [
        {
            "client_id": client.client_id,
            "name": client.name,
            "organisation_identifier": client.organisation_identifier,
            "redirect_uris": list(client.redirect_uris),
            "jwks": client.jwks,
        }
        for client in clients.values()
    ]
    write_file(layout.clients, json.dumps({"version": 1, "clients": records}, indent=2).encode() + b"\n")


def check_jwks(jwks: Mapping[str, object]) -> None:
    """Refuse a key set that is not a set of public keys."""
    keys = jwks.get("keys")
    if not isinstance(keys, list) or not keys:
        raise DirectoryError('the client\'s key set must be {"keys": [...]} with at least one key (RFC 7517)')
    if any("d" in key for key in keys):
        raise DirectoryError("the client's key set holds a private key; the bank must only see public keys")
    try:
        KeySet.import_key_set({"keys": keys})
    except (JoseError, ValueError, TypeError) as error:
        raise DirectoryError(f"the client's key set is not valid: {error}") from error


def write_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file so that it appears whole or not at all; a private one has mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        if not private:
            Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the unencrypted PKCS#8 PEM of a key that this directory made itself."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _ensure_ca(layout: Layout, tell: Tell) -> pki.Issuer:
    if layout.ca_certificate.exists() and layout.ca_key.exists():
        return load_issuer(layout)
    issuer = pki.make_ca("Sandbox Bank CA")
    write_file(layout.ca_key, private_pem(issuer.key), private=True)
    write_file(layout.ca_certificate, certificate_pem(issuer.certificate))
    tell(f"made the sandbox's CA: {layout.ca_certificate}")
    return issuer


def _ensure_server(layout: Layout, issuer: pki.Issuer, tell: Tell) -> None:
    if layout.server_key.exists() and _fresh(layout.server_certificate, issuer):
        return
    key = pki.new_key()
    write_file(layout.server_key, private_pem(key), private=True)
    write_file(layout.server_certificate, certificate_pem(pki.issue_server(issuer, key.public_key())))
    tell(f"made the bank's server certificate for 127.0.0.1 and localhost: {layout.server_certificate}")


def _ensure_tls_client(layout: Layout, issuer: pki.Issuer, tell: Tell) -> None:
    if layout.tpp_key.exists() and _fresh(layout.tpp_certificate, issuer):
        return
    key = pki.new_key()
    write_file(layout.tpp_key, private_pem(key), private=True)
    certificate = pki.issue_tls_client(issuer, DEFAULT_ORGANISATION, key.public_key())
    write_file(layout.tpp_certificate, certificate_pem(certificate))
    tell(f"made the platform's TLS client certificate (QWAC stand-in): {layout.tpp_certificate}")


def _ensure_seal(layout: Layout, issuer: pki.Issuer, public_key: ec.EllipticCurvePublicKey, tell: Tell) -> None:
    path = layout.signing_certificate
    if _fresh(path, issuer) and load_certificate(path).public_key() == public_key:
        return
    write_file(path, certificate_pem(pki.issue_seal(issuer, DEFAULT_ORGANISATION, public_key)))
    tell(f"certified the request-signing key (QSEAL stand-in): {path}")


def _ensure_client(
    layout: Layout, client_id: str, jwks: Mapping[str, object], redirect_uris: Sequence[str], tell: Tell
) -> None:
    clients = load_clients(layout) if layout.clients.exists() else {}
    known = clients.get(client_id)
    uris = tuple(dict.fromkeys([*(known.redirect_uris if known else ()), *redirect_uris]))
    wanted = Client(
        client_id=client_id,
        name=DEFAULT_ORGANISATION.name,
        organisation_identifier=DEFAULT_ORGANISATION.identifier,
        redirect_uris=uris,
        jwks=jwks,
    )
    if known == wanted:
        return
    save_clients(layout, {**clients, client_id: wanted})
    tell(f"registered the client {client_id} with {len(uris)} redirect address(es): {layout.clients}")


def _fresh(path: Path, issuer: pki.Issuer) -> bool:
    """Say whether a certificate is there, from this CA, and good for some days yet."""
    if not path.exists():
        return False
    certificate = load_certificate(path)
    try:
        certificate.verify_directly_issued_by(issuer.certificate)
    except Exception:  # noqa: BLE001 - any failure has the same cure: make it anew
        return False
    return pki.facts(certificate).in_force(time.time() + _RENEW_BEFORE_SECONDS)


def _public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError as error:
        raise DirectoryError(f"the request-signing public key is not a PEM public key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise DirectoryError("the request-signing public key must be an EC key on P-256")
    return key


def _client_of(record: Mapping[str, object]) -> Client:
    jwks, uris = record["jwks"], record["redirect_uris"]
    if not isinstance(jwks, dict) or not isinstance(uris, list):
        raise TypeError("jwks must be an object and redirect_uris a list")
    return Client(
        client_id=str(record["client_id"]),
        name=str(record["name"]),
        organisation_identifier=str(record["organisation_identifier"]),
        redirect_uris=tuple(str(uri) for uri in uris),
        jwks=jwks,
    )
