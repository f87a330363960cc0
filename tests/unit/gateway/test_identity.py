"""Who calls, from what gRPC says of a connection: exactly one SPIFFE ID, in a certificate that is valid at this moment."""

from datetime import UTC, datetime, timedelta

import pytest

from sidecar.errors import Unauthenticated
from sidecar.gateway.identity import BoundSocketIdentity, SpiffeIdentity
from tests.rpc.pki import Authority

AUTHORITY = Authority()
NAME = b"spiffe://custody.test/application"


class HandClock:
    """A clock in the test's hand."""

    def __init__(self) -> None:
        self.time = datetime.now(UTC)

    def now(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        raise NotImplementedError("identities have dates only")

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError("identities do not wait")


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def identity(clock: HandClock) -> SpiffeIdentity:
    return SpiffeIdentity(trust_domain="custody.test", clock=clock)  # type: ignore[arg-type]


def _context(*names: bytes, pem: bytes | None = None) -> dict[str, list[bytes]]:
    certificate = AUTHORITY.workload("application").certificate if pem is None else pem
    return {"peer_spiffe_id": list(names), "x509_pem_cert": [certificate]}


def test_one_name_and_one_certificate(identity: SpiffeIdentity) -> None:
    """The name is taken as it is."""
    assert identity.workload(_context(NAME)) == NAME.decode()


@pytest.mark.parametrize(
    "context",
    [
        {},
        {"x509_pem_cert": [AUTHORITY.workload("application").certificate]},
        {"peer_spiffe_id": [NAME]},
        {"peer_spiffe_id": [], "x509_pem_cert": []},
        _context(),
        _context(NAME, NAME),
        _context(NAME, pem=b""),
        _context(NAME, pem=b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        _context(b"\xff" + NAME),
        _context(NAME + b"\n"),
        _context(NAME + b"\0"),
        _context(b" " + NAME),
        _context(b"spiffe://customtest/application"),
        _context(b"spiffe://custodyXtest/application"),
        {**_context(), "peer_identities": [NAME], "x509_common_name": [NAME], "peer_uri": [NAME]},
    ],
    ids=lambda context: str({key: len(value) for key, value in context.items()}),
)
def test_anything_else_is_nobody(identity: SpiffeIdentity, context: dict[str, list[bytes]]) -> None:
    """None, two, half of it, other bytes, or a name that stands anywhere else: nobody."""
    with pytest.raises(Unauthenticated) as refusal:
        identity.workload(context)

    assert refusal.value.reason == "CALLER_UNKNOWN"


def test_dates_are_looked_at_each_time(identity: SpiffeIdentity, clock: HandClock) -> None:
    """The same connection is let in and refused as time goes; to the second, at both ends."""
    context = _context(NAME, pem=AUTHORITY.workload("application", ends=timedelta(hours=1)).certificate)
    start = clock.time
    expected = {
        timedelta(0): True,
        timedelta(minutes=59, seconds=58): True,
        timedelta(hours=1, seconds=1): False,
        timedelta(days=365): False,
        timedelta(hours=-2): False,
        timedelta(minutes=1): True,
    }

    seen = {}
    for offset in expected:
        clock.time = start + offset
        try:
            identity.workload(context)
        except Unauthenticated as refusal:
            seen[offset] = refusal.reason != "CERTIFICATE_EXPIRED"
        else:
            seen[offset] = True

    assert seen == expected


def test_cache_is_bounded(identity: SpiffeIdentity) -> None:
    """A caller that shows ever new certificates does not fill the memory."""
    pem = AUTHORITY.workload("application").certificate
    for number in range(1500):
        identity.workload(_context(NAME, pem=pem + b"\n" * number))

    assert len(identity._validity) <= 1024


def test_bound_socket_is_its_workload() -> None:
    """On a bound socket nothing that gRPC says of the peer changes who it is."""
    assert BoundSocketIdentity(name="shop").workload(_context(b"spiffe://custody.test/other")) == "workload:shop"
