"""How the clients behave on the wire: deadlines, retries, request ids, TLS, waiting, and answers that are not as they should be."""

import asyncio
import datetime as dt
import ipaddress
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import custody
import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from custody import ErrorReason, Money, Purpose
from custody._contract import method_named
from custody._polling import poll_pauses
from custody._retry import Retries
from custody.testing import FakeCustody
from google.rpc import error_details_pb2, status_pb2

from tests.clients.python.served import Served, served

IBAN = "DE89370400440532013000"
PAY = "PaymentService.InitiatePayment"


@pytest.fixture
def server() -> Iterator[Served]:
    with served() as server:
        yield server


@pytest.fixture
def client(server: Served) -> Iterator[custody.Client]:
    with custody.Client(server.address, owner="user:42") as client:
        yield client


def activate(client: custody.Client, fake: FakeCustody) -> str:
    pending = client.consents.create(
        provider=fake.provider,
        purposes=[Purpose.PAYMENTS],
        expire_time=dt.datetime.now(dt.UTC) + dt.timedelta(days=1),
        redirect_uri=fake.redirect_uri,
    )
    return client.consents.complete(pending.consent.name, fake.approve(pending.authorisation_uri)).name


def pay(client: Any, consent: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"amount": Money(1, "EUR"), "creditor_account": IBAN, "creditor_name": "X"}
    return client.payments.initiate(consent, **(arguments | changes))


def status(code: grpc.StatusCode, *details: Any, message: str = "no", raw: bytes | None = None) -> Callable[..., None]:
    """Answer with any status, whether the contract has it or not."""

    def fail(context: grpc.ServicerContext) -> None:
        packed = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed.details.add().Pack(detail)
        if details or raw is not None:
            trailer = packed.SerializeToString() if raw is None else raw
            context.set_trailing_metadata((("grpc-status-details-bin", trailer),))
        context.abort(code, message)

    return fail


def retry_after(seconds: float) -> error_details_pb2.RetryInfo:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(int(seconds * 1000))
    return info


def test_retries_repeat_the_request_byte_for_byte(server: Served, client: custody.Client) -> None:
    """Each attempt of a call carries the same bytes, the minted request id among them."""
    consent = activate(client, server.fake)
    server.raw_failures.extend([status(grpc.StatusCode.UNAVAILABLE)] * 3)

    payment = pay(client, consent)

    attempts = server.attempts(PAY)
    assert len(attempts) == 4
    assert {attempt.SerializeToString(deterministic=True) for attempt in attempts} == {
        attempts[0].SerializeToString(deterministic=True)
    }
    assert uuid.UUID(payment.request_id).version == 4


def test_retries_are_bounded(server: Served) -> None:
    """`max_retries` is the number of repeats, not of attempts; 0 means that nothing is repeated."""
    for max_retries in (0, 2):
        with custody.Client(server.address, owner="user:42", max_retries=max_retries) as client:
            server.seen.clear()
            server.raw_failures.extend([status(grpc.StatusCode.UNAVAILABLE)] * 10)

            with pytest.raises(custody.UnavailableError):
                pay(client, "consents/a")

            assert len(server.seen) == max_retries + 1
            server.raw_failures.clear()


@pytest.mark.parametrize(
    "code",
    [code for code in grpc.StatusCode if code not in {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}],
    ids=lambda code: code.name,
)
def test_no_other_status_is_repeated(server: Served, client: custody.Client, code: grpc.StatusCode) -> None:
    """A call that ended in any status but UNAVAILABLE was sent once, and its error says how to ask again."""
    server.raw_failures.append(status(code))
    request_id = str(uuid.uuid4())

    with pytest.raises(custody.CustodyError) as caught:
        pay(client, "consents/a", request_id=request_id)

    assert len(server.attempts(PAY)) == 1
    assert caught.value.code == code.name
    assert caught.value.reason is None
    assert caught.value.request_id == request_id


def test_a_stream_is_not_taken_up_again(server: Served, client: custody.Client) -> None:
    """An export that broke off is an error: half a file is not made whole by asking twice."""
    server.raw_failures.append(status(grpc.StatusCode.UNAVAILABLE))

    with pytest.raises(custody.UnavailableError):
        list(client.audit.export())

    assert len(server.seen) == 1


def test_the_sidecars_wish_to_wait_is_kept(server: Served, client: custody.Client) -> None:
    """RetryInfo is waited for before the request comes again."""
    server.raw_failures.append(status(grpc.StatusCode.UNAVAILABLE, retry_after(0.4)))
    started = time.monotonic()

    client.providers.get(server.fake.provider)

    assert time.monotonic() - started >= 0.4
    assert len(server.seen) == 2


def test_a_wait_beyond_the_deadline_is_not_begun(server: Served, client: custody.Client) -> None:
    """When the sidecar asks to wait for longer than there is time, the error comes at once, with the wish."""
    server.raw_failures.append(status(grpc.StatusCode.UNAVAILABLE, retry_after(60)))
    started = time.monotonic()

    with pytest.raises(custody.UnavailableError) as caught:
        client.providers.get(server.fake.provider, timeout_seconds=20)

    assert time.monotonic() - started < 15
    assert caught.value.retry_after_seconds == 60
    assert len(server.seen) == 1


def test_the_sidecar_sees_the_deadline(server: Served) -> None:
    """Every attempt has a deadline: the client's own, the call's, or what is left of it after the attempts before."""
    with custody.Client(server.address, owner="user:42", timeout_seconds=50) as client:
        client.providers.get(server.fake.provider)
        client.providers.get(server.fake.provider, timeout_seconds=9)
        server.raw_failures.append(status(grpc.StatusCode.UNAVAILABLE, retry_after(0.5)))
        client.providers.get(server.fake.provider, timeout_seconds=9)

    default, own, first, second = (left for _, _, left in server.seen)
    assert 10 < default <= 50.1
    assert own <= 9.1
    assert second <= first - 0.4


def test_a_deadline_that_passes_is_an_error_with_the_request_id(server: Served, client: custody.Client) -> None:
    """Whether the payment was made is not known; the same request id tells, and pays once."""
    consent = activate(client, server.fake)
    request_id = str(uuid.uuid4())
    release = threading.Event()

    def stall(context: grpc.ServicerContext) -> None:
        release.wait(20)

    server.raw_failures.append(stall)

    with pytest.raises(custody.DeadlineExceededError) as caught:
        pay(client, consent, request_id=request_id, timeout_seconds=0.3)
    release.set()
    payment = pay(client, consent, request_id=caught.value.request_id)

    assert caught.value.request_id == request_id
    assert [each.name for each in client.payments.list()] == [payment.name]


def test_details_are_read(server: Served, client: custody.Client) -> None:
    """Reason, metadata and resource come from the details; the sidecar's request id where the call had none."""
    info = error_details_pb2.ErrorInfo(reason="RATE_LIMITED", domain="custody.v1", metadata={"provider": "providers/x"})
    request_info = error_details_pb2.RequestInfo(request_id="r-1")
    server.raw_failures.append(status(grpc.StatusCode.RESOURCE_EXHAUSTED, info, retry_after(2), request_info))

    with pytest.raises(custody.RateLimitedError) as caught:
        client.providers.get("providers/x")

    error = caught.value
    assert error.reason == ErrorReason.RATE_LIMITED
    assert error.metadata == {"provider": "providers/x"}
    assert error.retry_after_seconds == 2
    assert error.request_id == "r-1"
    assert str(error) == "RATE_LIMITED: no (request id r-1)"


def test_a_reason_of_another_domain_is_not_ours(server: Served, client: custody.Client) -> None:
    """A proxy on the way may answer with its own ErrorInfo; its reason is not taken for one of the contract."""
    info = error_details_pb2.ErrorInfo(reason="CONSENT_REVOKED", domain="proxy.example", metadata={"a": "b"})
    server.raw_failures.append(status(grpc.StatusCode.FAILED_PRECONDITION, info))

    with pytest.raises(custody.PreconditionError) as caught:
        client.providers.get("providers/x")

    assert type(caught.value) is custody.PreconditionError
    assert caught.value.reason is None
    assert caught.value.metadata == {}


def test_a_new_reason_is_passed_on(server: Served, client: custody.Client) -> None:
    """A reason that this client does not know is treated by its status code, and still there to read."""
    info = error_details_pb2.ErrorInfo(reason="MOON_FULL", domain="custody.v1")
    server.raw_failures.append(status(grpc.StatusCode.FAILED_PRECONDITION, info))

    with pytest.raises(custody.PreconditionError) as caught:
        client.providers.get("providers/x")

    assert caught.value.reason == "MOON_FULL"


def test_details_that_do_not_parse_do_not_hide_the_error(server: Served, client: custody.Client) -> None:
    """The status code is enough to know what happened."""
    server.raw_failures.append(status(grpc.StatusCode.NOT_FOUND, raw=b"\xff\xff\xff"))

    with pytest.raises(custody.NotFoundError):
        client.providers.get("providers/x")


def test_no_sidecar_is_unavailable() -> None:
    """A socket that is not there is an UnavailableError after the retries, with the request id."""
    folder = tempfile.mkdtemp(prefix="cu")
    with custody.Client(f"unix:{folder}/none", owner="user:42", max_retries=1) as client:
        with pytest.raises(custody.UnavailableError) as caught:
            pay(client, "consents/a", timeout_seconds=10)

        assert caught.value.request_id is not None
        with pytest.raises(custody.UnavailableError, match="not ready"):
            client.wait_ready(timeout_seconds=0.3)
    Path(folder).rmdir()


def test_wait_ready_waits_for_a_sidecar_that_comes_later(tmp_path: Path) -> None:
    """The application may start first: waiting spans the time in which there is no socket, and in which it does not serve."""
    folder = tempfile.mkdtemp(prefix="cu")
    address = f"unix:{folder}/late"
    stop = threading.Event()

    def come_late() -> None:
        time.sleep(0.3)
        with served(address=address) as server:
            server.set_serving(False)
            time.sleep(0.3)
            server.set_serving(True)
            stop.wait(30)

    thread = threading.Thread(target=come_late)
    thread.start()
    started = time.monotonic()
    try:
        with custody.Client(address) as client:
            client.wait_ready(timeout_seconds=30)
        assert time.monotonic() - started >= 0.6
    finally:
        stop.set()
        thread.join(30)
        Path(folder).joinpath("late").unlink(missing_ok=True)
        Path(folder).rmdir()


def test_asyncio_wait_ready_and_retries(server: Served) -> None:
    """The asyncio client waits, repeats and gives up by the same rules, without blocking the loop."""

    async def act() -> tuple[int, str | None]:
        async with custody.aio.Client(server.address, owner="user:42", max_retries=2) as client:
            server.set_serving(False)
            waiting = asyncio.create_task(client.wait_ready(timeout_seconds=30))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            server.set_serving(True)
            await waiting
            server.raw_failures.extend([status(grpc.StatusCode.UNAVAILABLE)] * 3)
            with pytest.raises(custody.UnavailableError) as caught:
                await pay(client, "consents/a")
            return len(server.attempts(PAY)), caught.value.request_id

    attempts, request_id = asyncio.run(act())

    assert attempts == 3
    assert request_id == server.attempts(PAY)[0].request_id  # type: ignore[attr-defined]


def test_asyncio_calls_have_a_deadline_too(server: Served) -> None:
    """The sidecar sees a deadline from the asyncio client: the client's own, and the call's."""

    async def act() -> None:
        async with custody.aio.Client(server.address, timeout_seconds=50) as client:
            await client.providers.get(server.fake.provider)
            await client.providers.get(server.fake.provider, timeout_seconds=9)

    asyncio.run(act())

    default, own = (left for _, _, left in server.seen)
    assert 10 < default <= 50.1
    assert own <= 9.1


def test_what_is_not_repeatable_is_not_repeated() -> None:
    """A method that is neither a read nor carries a request id is sent once, however the call ends."""
    unavailable = custody.UnavailableError("no", code="UNAVAILABLE")

    pauses = [
        Retries(method=method_named(name), max_retries=3, deadline_seconds=100).pause_after(unavailable, now_seconds=0)
        for name in ("AuditService.ExportLog", "AuditService.GetCheckpoint", PAY)
    ]

    assert [pause is None for pause in pauses] == [True, False, False]


def test_looks_become_seldom_and_end_in_time() -> None:
    """Waiting looks soon at first, never more seldom than every 5 seconds, and not beyond its time."""
    pauses: list[float] = []
    given = poll_pauses(60, clock=lambda: sum(pauses))
    while (pause := next(given, None)) is not None:
        pauses.append(pause)

    assert pauses[0] == 0.25
    assert max(pauses) == 5.0
    assert sum(pauses) == pytest.approx(60)
    assert pauses[:-1] == sorted(pauses[:-1])


def test_a_closed_client_says_so(server: Served) -> None:
    """After the block the connection is closed, and a call says that instead of hanging or connecting again."""
    with custody.Client(server.address) as client:
        client.providers.get(server.fake.provider)

    async def act() -> None:
        async with custody.aio.Client(server.address) as asynchronous:
            await asynchronous.providers.get(server.fake.provider)
        with pytest.raises(RuntimeError, match="closed"):
            await asynchronous.providers.get(server.fake.provider)

    with pytest.raises(RuntimeError, match="closed"):
        client.providers.get(server.fake.provider)
    asyncio.run(act())


def test_asyncio_calls_run_side_by_side(server: Served) -> None:
    """Many calls at once on one client each get their own answer."""

    async def act() -> list[str]:
        async with custody.aio.Client(server.address, owner="user:42") as client:
            found = await asyncio.gather(*(client.providers.get(server.fake.provider) for _ in range(50)))
            return [each.name for each in found]

    assert asyncio.run(act()) == [server.fake.provider] * 50


def test_raw_stubs_are_there(server: Served, client: custody.Client) -> None:
    """Whoever needs more than the client offers has the stubs on the same connection; the fake has none."""
    from custody.v1 import provider_pb2

    request = provider_pb2.GetProviderRequest(provider=server.fake.provider)

    assert client.stub.providers.GetProvider(request, timeout=20).provider.name == server.fake.provider
    with pytest.raises(TypeError, match="gRPC"):
        _ = server.fake.client().stub


class Authority:
    """A certificate authority for one test."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test CA")])
        self.certificate = self._sign(self.name, self.key, [], ca=True)

    def issue(self, folder: Path, name: str, *alternatives: x509.GeneralName) -> tuple[Path, Path]:
        """Write a certificate and its key; answers with their paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key, list(alternatives), ca=False)
        paths = folder / f"{name}.pem", folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return paths

    def _sign(
        self, subject: x509.Name, key: Any, alternatives: list[x509.GeneralName], *, ca: bool
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(self.key, hashes.SHA256())


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asyncio"])
def test_mutual_tls(tmp_path: Path, tcp: bool, asynchronous: bool) -> None:
    """With the right files both sides know each other, over TCP and over a Unix socket; with another CA nothing is sent."""
    authority, stranger = Authority(), Authority()
    (tmp_path / "ca.pem").write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "other.pem").write_bytes(stranger.certificate.public_bytes(serialization.Encoding.PEM))
    names = [
        x509.DNSName("custody.internal"),
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    certificate, key = authority.issue(tmp_path, "sidecar", *names)
    mine, my_key = authority.issue(tmp_path, "app", x509.UniformResourceIdentifier("spiffe://example/app"))
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())],
        root_certificates=(tmp_path / "ca.pem").read_bytes(),
        require_client_auth=True,
    )

    def name_by(ca: str, server_name: str | None) -> str:
        tls = custody.Tls(ca=tmp_path / ca, certificate=mine, key=my_key, server_name=server_name)
        if not asynchronous:
            with custody.Client(secured.address, tls=tls, max_retries=0) as client:
                return client.providers.get(secured.fake.provider, timeout_seconds=20).name

        async def act() -> str:
            async with custody.aio.Client(secured.address, tls=tls, max_retries=0) as client:
                return (await client.providers.get(secured.fake.provider, timeout_seconds=20)).name

        return asyncio.run(act())

    with served(credentials=credentials, tcp=tcp) as secured:
        assert name_by("ca.pem", None) == secured.fake.provider
        assert name_by("ca.pem", "custody.internal") == secured.fake.provider
        with pytest.raises(custody.UnavailableError):
            name_by("ca.pem", "elsewhere.internal")
        with pytest.raises(custody.UnavailableError):
            name_by("other.pem", None)
        assert len(secured.seen) == 2


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asyncio"])
def test_renewed_certificates_are_picked_up(tmp_path: Path, asynchronous: bool) -> None:
    """A certificate that is replaced in its file is what the next call shows; while it is gone, calls go on as before."""
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))
    certificate, key = authority.issue(tmp_path, "sidecar", x509.DNSName("localhost"))
    old, old_key = authority.issue(tmp_path, "old")
    new, new_key = authority.issue(tmp_path, "new")
    mine, my_key = old.rename(tmp_path / "app.pem"), old_key.rename(tmp_path / "app.key")
    tls = custody.Tls(ca=tmp_path / "ca.pem", certificate=mine, key=my_key)
    pair = (key.read_bytes(), certificate.read_bytes())
    ca = (tmp_path / "ca.pem").read_bytes()
    credentials = grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=True)

    def renew() -> None:
        new.rename(mine)
        new_key.rename(my_key)

    async def act(address: str, provider: str) -> None:
        async with custody.aio.Client(address, tls=tls) as client:
            await client.providers.get(provider, timeout_seconds=20)
            mine.unlink()
            await client.providers.get(provider, timeout_seconds=20)
            renew()
            await client.providers.get(provider, timeout_seconds=20)

    with served(credentials=credentials) as secured:
        if asynchronous:
            asyncio.run(act(secured.address, secured.fake.provider))
        else:
            with custody.Client(secured.address, tls=tls) as client:
                client.providers.get(secured.fake.provider, timeout_seconds=20)
                mine.unlink()
                client.providers.get(secured.fake.provider, timeout_seconds=20)
                renew()
                client.providers.get(secured.fake.provider, timeout_seconds=20)
        assert secured.peers == ["old", "old", "new"]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("", "missing"),
        ("unix:relative", "absolute"),
        ("unix:/" + "x" * 107, "107 bytes"),
        ("localhost", "host:port"),
        ("localhost:0", "host:port"),
        ("localhost:99999", "host:port"),
        ("localhost:50051", "needs tls"),
    ],
)
def test_addresses_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch, address: str, says: str) -> None:
    """A wrong address is said at once, and plain TCP is no address of a sidecar."""
    monkeypatch.delenv("CUSTODY_ADDRESS", raising=False)

    with pytest.raises(ValueError, match=says):
        custody.Client(address)


def test_the_environment_fills_in(monkeypatch: pytest.MonkeyPatch, server: Served) -> None:
    """CUSTODY_ADDRESS, CUSTODY_TIMEOUT and CUSTODY_MAX_RETRIES count where no argument is given."""
    monkeypatch.setenv("CUSTODY_ADDRESS", server.address)
    monkeypatch.setenv("CUSTODY_TIMEOUT", "7.5")
    monkeypatch.setenv("CUSTODY_MAX_RETRIES", "1")
    server.raw_failures.extend([status(grpc.StatusCode.UNAVAILABLE)] * 2)

    with custody.Client() as client, pytest.raises(custody.UnavailableError):
        client.providers.get(server.fake.provider)
    with custody.Client(timeout_seconds=50) as client:
        client.providers.get(server.fake.provider)

    first, second, third = (left for _, _, left in server.seen)
    assert max(first, second) <= 7.6
    assert third > 10


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("CUSTODY_TIMEOUT", "soon", "not a number"),
        ("CUSTODY_TIMEOUT", "0", "above 0"),
        ("CUSTODY_TIMEOUT", "nan", "above 0"),
        ("CUSTODY_MAX_RETRIES", "11", "0 to 10"),
        ("CUSTODY_MAX_RETRIES", "-1", "0 to 10"),
    ],
)
def test_a_wrong_environment_is_said(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    """A mistake in the environment is an error of the start, not of the first call."""
    monkeypatch.setenv(name, value)

    with pytest.raises(ValueError, match=says):
        custody.Client("unix:/run/none")
