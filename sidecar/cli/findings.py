"""What custodyctl doctor finds, one line each. Every function looks at one part of an installation, reads, and changes nothing.

A failure keeps a sidecar from starting or working; a warning will, or lets somebody in who should not be.
"""

import os
import socket
import ssl
import stat
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from sidecar.config import Configuration, ProviderConfiguration

__all__ = ["Finding", "certificates", "database", "files", "hsm_keys", "hsm_token", "sockets"]

Outcome: TypeAlias = Literal["success", "warning", "failure"]

_SOON = timedelta(days=30)
_CONNECT_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. `advice` is what to do about it."""

    outcome: Outcome
    message: str
    advice: str = ""


def files(configuration: "Configuration") -> Iterator[Finding]:
    """The files that the configuration names: there, and secret where they must be."""
    hsm = configuration.hsm
    yield _module(Path(hsm.module_path))
    yield _secret("hsm.pin_file", Path(hsm.pin_file))
    yield _readable("hsm.keys_file", Path(hsm.keys_file))
    yield _readable("policy_file", Path(configuration.policy_file))
    for index, listener in enumerate(configuration.listeners):
        if listener.tls is not None:
            yield _secret(f"listeners[{index}].tls.key_file", Path(listener.tls.key_file))
            yield _readable(f"listeners[{index}].tls.client_ca_file", Path(listener.tls.client_ca_file))
    for provider in configuration.providers:
        yield _readable(f"{provider.id}: ca_file", Path(provider.ca_file))
        if provider.client_key_file:
            yield _secret(f"{provider.id}: client_key_file", Path(provider.client_key_file))


def hsm_token(seen: Mapping[str, Any]) -> Iterator[Finding]:
    """What the token shows without a login; `seen` is the answer of the inspection `info`."""
    yield Finding(
        outcome="success", message=f"the token {seen['token_label']} (serial {seen['token_serial']}) is there"
    )
    if seen["missing_mechanisms"]:
        missing = ", ".join(seen["missing_mechanisms"])
        yield Finding(
            outcome="failure", message=f"the module lacks {missing}", advice="the sidecar needs both; see docs/hsm.md"
        )
    for flag, outcome, message, advice in _PIN_FLAGS:
        if flag in seen["flags"]:
            yield Finding(outcome=outcome, message=message, advice=advice)
            return
    yield Finding(outcome="success", message="no wrong user PIN on record")


_PIN_FLAGS: tuple[tuple[str, Outcome, str, str], ...] = (
    ("USER_PIN_LOCKED", "failure", "the user PIN is locked", "the security officer unlocks it with a new PIN"),
    (
        "USER_PIN_FINAL_TRY",
        "failure",
        "one more wrong user PIN locks the token: the sidecar does not try",
        "log in once with the right PIN by the HSM's own tool",
    ),
    (
        "USER_PIN_COUNT_LOW",
        "warning",
        "a wrong user PIN was given since the last right one",
        "make sure that hsm.pin_file holds the right PIN before the sidecar starts",
    ),
)


def hsm_keys(seen: Mapping[str, Any]) -> Iterator[Finding]:
    """Every key, as a start would judge it; `seen` is the answer of the inspection `keys`."""
    for key in seen["keys"]:
        if key["refusal"]:
            advice = "the sidecar does not start with it; see docs/hsm.md, What a key must be"
            yield Finding(outcome="failure", message=key["refusal"], advice=advice)
        else:
            yield Finding(
                outcome="success", message=f"the {key['purpose']} key {key['label']} is there, strong, and computes"
            )


def database(configuration: "Configuration") -> Iterator[Finding]:
    """The database, opened as a start would."""
    from sidecar.store.errors import StoreRefused
    from sidecar.store.relocation.marks import Marks
    from sidecar.store.sqlite import SqliteDatabase

    if configuration.store.path is None:
        yield _shared_database(configuration.store.url or "", configuration.store.synchronous_commit)
        return
    path = Path(configuration.store.path)
    if not path.exists() and path.parent.is_dir():
        yield Finding(outcome="success", message=f"{path} is not there yet; the first start makes it")
        return
    try:
        database = SqliteDatabase(path, synchronous=configuration.store.synchronous)
        with closing(database.connect(read_only=True)) as connection:
            Marks(database.dialect).check_may_be_used(connection, where=str(path))
    except StoreRefused as refused:
        yield Finding(outcome="failure", message=str(refused), advice="see docs/store.md")
    else:
        yield Finding(outcome="success", message=f"{path} opens, and its schema is the one that this version makes")


def _shared_database(url: str, synchronous_commit: str) -> Finding:
    """Without the lock on the instance's name, which a running sidecar has."""
    from sidecar.store.errors import StoreRefused
    from sidecar.store.postgresql.address import Address
    from sidecar.store.postgresql.connection import PostgresqlDialect
    from sidecar.store.postgresql.database import checked
    from sidecar.store.relocation.marks import Marks

    try:
        address = Address.of_url(url, application="custodyctl doctor")
        with closing(checked(address, synchronous_commit=synchronous_commit)) as connection:
            Marks(PostgresqlDialect()).check_may_be_used(connection, where=str(address))
    except StoreRefused as refused:
        return Finding(outcome="failure", message=str(refused), advice="see docs/store.md")
    message = f"{address} opens; its server, this role's rights and the schema are as they must be"
    return Finding(outcome="success", message=message)


def sockets(configuration: "Configuration") -> Iterator[Finding]:
    """The Unix sockets: where they stand, who may reach them, and whether somebody answers."""
    for listener in configuration.listeners:
        if listener.address.startswith("unix:"):
            yield _socket(Path(listener.address.removeprefix("unix:")))


def certificates(
    configuration: "Configuration", *, now: datetime, hsm_public_keys: Mapping[str, bytes]
) -> Iterator[Finding]:
    """Every certificate: when it ends, and that its key is the one we have. `hsm_public_keys`: DER by purpose."""
    for index, listener in enumerate(configuration.listeners):
        if listener.tls is not None:
            where = f"listeners[{index}].tls.certificate_file"
            yield from _certificate(where, listener.tls.certificate_file, now=now)
            yield _pair(where, listener.tls.certificate_file, listener.tls.key_file)
    for provider in configuration.providers:
        yield from _provider_certificates(provider, now, hsm_public_keys)


def _provider_certificates(
    provider: "ProviderConfiguration", now: datetime, hsm_public_keys: Mapping[str, bytes]
) -> Iterator[Finding]:
    if provider.client_certificate_file:
        where = f"{provider.id}: client_certificate_file"
        yield from _certificate(where, provider.client_certificate_file, now=now)
        if provider.client_key_file:
            yield _pair(where, provider.client_certificate_file, provider.client_key_file)
    if provider.signing_certificate_file:
        where = f"{provider.id}: signing_certificate_file"
        yield from _certificate(
            where, provider.signing_certificate_file, now=now, public_key=hsm_public_keys.get("request-signing")
        )


def _certificate(where: str, path: str, *, now: datetime, public_key: bytes | None = None) -> Iterator[Finding]:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        certificate = x509.load_pem_x509_certificate(Path(path).read_bytes())
    except OSError as error:
        yield Finding(outcome="failure", message=f"{where}: {path} cannot be read ({error.strerror})")
        return
    except ValueError:
        yield Finding(outcome="failure", message=f"{where}: {path} holds no certificate in PEM")
        return
    yield _validity(where, certificate.not_valid_before_utc, certificate.not_valid_after_utc, now)
    der = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public_key is not None and der != public_key:
        advice = "the provider would refuse every signature; name the certificate of the key in hsm.keys_file"
        yield Finding(outcome="failure", message=f"{where}: is not of the HSM's request-signing key", advice=advice)


def _validity(where: str, begins: datetime, ends: datetime, now: datetime) -> Finding:
    if now < begins:
        return Finding(
            outcome="failure", message=f"{where}: is not valid before {begins:%Y-%m-%d}", advice="check the clock"
        )
    if now >= ends:
        return Finding(outcome="failure", message=f"{where}: expired on {ends:%Y-%m-%d}", advice="have it renewed")
    days = (ends - now).days
    if ends - now < _SOON:
        return Finding(
            outcome="warning", message=f"{where}: expires on {ends:%Y-%m-%d}, in {days} d", advice="have it renewed"
        )
    return Finding(outcome="success", message=f"{where}: valid until {ends:%Y-%m-%d}, for {days} d")


def _pair(where: str, certificate: str, key: str) -> Finding:
    """OpenSSL reads the key; no copy of it is made here."""
    try:
        # A password that cannot be right keeps OpenSSL from asking the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError):
        advice = "both must be readable PEM files, the key unencrypted, and belong together"
        return Finding(outcome="failure", message=f"{where}: does not go with its key", advice=advice)
    return Finding(outcome="success", message=f"{where}: goes with its key")


def _module(path: Path) -> Finding:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return _missing("hsm.module_path", path, error)
    if mode & stat.S_IWOTH:
        advice = f"chmod o-w {path}: whoever can change it gets the PIN"
        return Finding(outcome="failure", message=f"hsm.module_path: everybody may write to {path}", advice=advice)
    return Finding(outcome="success", message=f"hsm.module_path: {path} is there")


def _readable(where: str, path: Path) -> Finding:
    try:
        with path.open("rb"):
            mode = path.stat().st_mode
    except OSError as error:
        return _missing(where, path, error)
    if mode & stat.S_IWOTH:
        return Finding(outcome="failure", message=f"{where}: everybody may write to {path}", advice=f"chmod o-w {path}")
    return Finding(outcome="success", message=f"{where}: {path} can be read")


def _secret(where: str, path: Path) -> Finding:
    """A file that nobody but its owner may open, and that is what its name says: no link, no pipe."""
    try:
        status = path.lstat()
    except OSError as error:
        return _missing(where, path, error)
    if not stat.S_ISREG(status.st_mode):
        advice = "a link or a pipe does not say whose content it delivers; name the file itself"
        return Finding(outcome="failure", message=f"{where}: {path} is not a regular file", advice=advice)
    if status.st_uid not in (0, os.geteuid()):
        advice = "run this as the sidecar's user, or give the file to that user"
        return Finding(
            outcome="warning", message=f"{where}: {path} belongs to another user than you and root", advice=advice
        )
    if status.st_mode & 0o077:
        message = f"{where}: others than its owner may open {path} (mode {status.st_mode & 0o777:04o})"
        return Finding(outcome="failure", message=message, advice=f"chmod 400 {path}")
    return Finding(outcome="success", message=f"{where}: {path} is for its owner alone")


def _missing(where: str, path: Path, error: OSError) -> Finding:
    return Finding(outcome="failure", message=f"{where}: {path} cannot be read ({error.strerror})")


def _socket(path: Path) -> Finding:
    try:
        directory = path.parent.stat().st_mode
    except OSError as error:
        return Finding(
            outcome="failure", message=f"the folder of {path} is not there ({error.strerror})", advice="make it"
        )
    if directory & stat.S_IWOTH and not directory & stat.S_ISVTX:
        advice = f"chmod o-w {path.parent}: anybody could put a socket of their own in its place"
        return Finding(outcome="failure", message=f"everybody may write to the folder of {path}", advice=advice)
    try:
        status = path.lstat()
    except OSError:
        return Finding(outcome="success", message=f"{path} is not there yet; a start makes it")
    if not stat.S_ISSOCK(status.st_mode):
        return Finding(outcome="failure", message=f"{path} is there, and is no socket", advice="move it away")
    if status.st_mode & 0o007:
        return Finding(outcome="failure", message=f"everybody may connect to {path}", advice=f"chmod 600 {path}")
    if not _answers(path):
        return Finding(outcome="success", message=f"{path} is left over from a sidecar that ended; a start replaces it")
    return Finding(outcome="success", message=f"{path} takes connections")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_SECONDS)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
