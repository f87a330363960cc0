"""Who calls. The identity comes from the peer's certificate or from the socket, never from a field or a header.

gRPC's `peer_identities` is not used: it mixes kinds of names and falls back to the common name.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Protocol

from cryptography import x509

from sidecar.domain.ids import WorkloadId
from sidecar.errors import Unauthenticated
from sidecar.ports import Clock

__all__ = ["BoundSocketIdentity", "Identity", "SpiffeIdentity"]

AuthContext = Mapping[str, Iterable[bytes]]

_CACHED_CERTIFICATES = 1024


class Identity(Protocol):
    def workload(self, auth_context: AuthContext) -> WorkloadId:
        """The caller. Raises Unauthenticated where it is not established beyond doubt."""


class BoundSocketIdentity:
    """A socket that exactly one container mounts: whoever can connect is the workload the configuration names."""

    def __init__(self, *, name: str) -> None:
        self._workload = WorkloadId(f"workload:{name}")

    def workload(self, auth_context: AuthContext) -> WorkloadId:  # noqa: ARG002 - the socket is the identity
        return self._workload


class SpiffeIdentity:
    """mTLS: exactly one SPIFFE ID in our trust domain, in a certificate that is valid at the moment of the call.

    The handshake checks the chain once per connection, and TLS resumption not even that; the dates are checked per call.
    """

    def __init__(self, *, trust_domain: str, clock: Clock) -> None:
        # SPIFFE-ID standard, section 2.2: path segments of letters, digits, '.', '-', '_'; no empty ones, no '.' or '..'
        self._form = re.compile(rf"spiffe://{re.escape(trust_domain)}(?:/(?!\.{{1,2}}(?:/|\Z))[A-Za-z0-9._-]+)+\Z")
        self._clock = clock
        self._validity: dict[bytes, tuple[datetime, datetime]] = {}

    def workload(self, auth_context: AuthContext) -> WorkloadId:
        names = list(auth_context.get("peer_spiffe_id") or ())
        certificates = list(auth_context.get("x509_pem_cert") or ())
        if len(names) != 1 or len(certificates) != 1:
            raise _unknown()
        try:
            name = names[0].decode("ascii")
        except UnicodeDecodeError as error:
            raise _unknown() from error
        if not self._form.match(name):
            raise _unknown()
        self._check_dates(certificates[0])
        return WorkloadId(name)

    def _check_dates(self, pem: bytes) -> None:
        not_before, not_after = self._dates(pem)
        if not not_before <= self._clock.now() < not_after:
            raise Unauthenticated(
                "CERTIFICATE_EXPIRED", "the caller's certificate is not valid now; connect with a new one"
            )

    def _dates(self, pem: bytes) -> tuple[datetime, datetime]:
        key = hashlib.sha256(pem).digest()
        if key not in self._validity:
            try:
                certificate = x509.load_pem_x509_certificate(pem)
            except ValueError as error:
                raise _unknown() from error
            if len(self._validity) >= _CACHED_CERTIFICATES:
                self._validity.clear()
            self._validity[key] = (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        return self._validity[key]


def _unknown() -> Unauthenticated:
    return Unauthenticated("CALLER_UNKNOWN", "the caller's identity is not established")
