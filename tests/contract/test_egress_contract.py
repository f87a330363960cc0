"""What the core may rely on from egress: the same promises of the fake and of the real process.

The bank is one callable. The fake calls it; for the real process a TLS server does, so that every byte goes the whole way.
"""

import asyncio
import contextlib
import json
import re
import socket
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from urllib.parse import parse_qs, quote_plus

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from sidecar.domain.ids import PaymentId
from sidecar.domain.payment import DispatchPermit
from sidecar.domain.provider import (
    Answer,
    Header,
    NotSent,
    ProviderRequest,
    SecretSlot,
    SendOutcome,
    SlotEncoding,
    TokenGrant,
    TokensRefused,
    Unknown,
)
from sidecar.domain.secrets import SealedSecret, SecretContext, SecretKind
from sidecar.errors import Corrupt, Internal, InvalidField, PreconditionFailed, Unavailable
from sidecar.ports import OpenSecret, TokenEgress
from tests.fakes.egress import BankRequest, FakeEgress, SoftwareKeys, data_key_context
from tests.unit.egress.bank_server import BankServer, Exchange, http_answer
from tests.unit.egress.certificates import TestAuthority
from tests.unit.egress.process import CLUSTER, running_egress, transport

ACCESS = b"access-token-" + b"a1" * 20
REFRESH = b"refresh/token+" + b"b2" * 20
SECONDS = 10.0


@dataclass(slots=True, kw_only=True)
class Bank:
    """Remembers each request and gives the outcome that the test set."""

    outcome: SendOutcome = field(default_factory=lambda: Answer(status=200, headers=(), body=b'{"ok":true}'))
    requests: list[BankRequest] = field(default_factory=list)

    def __call__(self, request: BankRequest) -> SendOutcome:
        self.requests.append(request)
        return self.outcome

    def answers(self, status: int, document: object, **headers: str) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
        self.outcome = Answer(status=status, headers=named, body=body)


@dataclass(slots=True, kw_only=True)
class Lab:
    """An egress, its bank, and what a consent at that bank has. `origin` and `other_origin` are of one provider each,
    `login_origin` is the same provider's as `origin`, `closed_origin` is configured and nobody listens there."""

    egress: TokenEgress
    bank: Bank
    keys: SoftwareKeys
    origin: str
    login_origin: str
    other_origin: str
    closed_origin: str
    stop_hsm: Callable[[], None]
    start_hsm: Callable[[], None]
    wrapped: bytes = b""

    def __post_init__(self) -> None:
        self.bank.requests.clear()
        self.bank.answers(200, {"ok": True})
        self.wrapped = self.keys.create_data_key(data_key_context(self.context()))[0]

    def context(self, **changes: object) -> SecretContext:
        context = SecretContext(
            cluster=CLUSTER, owner="owner-1", consent="consent-1", provider_origin=self.origin, row_version=1
        )
        return replace(context, **changes)  # type: ignore[arg-type]

    def access(self, token: bytes = ACCESS, **changes: object) -> OpenSecret:
        return self.keys.seal(SecretKind.ACCESS_TOKEN, token, self.context(**changes), wrapped_data_key=self.wrapped)

    def refresh(self, **changes: object) -> OpenSecret:
        return self.keys.seal(SecretKind.REFRESH_TOKEN, REFRESH, self.context(**changes), wrapped_data_key=self.wrapped)

    def read(self, **changes: object) -> ProviderRequest:
        slot = SecretSlot(kind=SecretKind.ACCESS_TOKEN, encoding=SlotEncoding.RAW)
        request = ProviderRequest(
            method="GET",
            origin=self.origin,
            target="/v1/accounts?withBalance=true",
            headers=(
                Header(name="X-Request-ID", value="99391c7e-ad88-49ec-a2ad-99ddcb1f7721"),
                Header(name="Authorization", value="Bearer ", slot=slot),
            ),
        )
        return replace(request, **changes)  # type: ignore[arg-type]

    def payment(self) -> ProviderRequest:
        headers = (*self.read().headers, Header(name="Content-Type", value="application/json"))
        return self.read(method="POST", target="/v1/payments/sepa", headers=headers, body=(b'{"amount":"1.00"}',))

    def token_request(self, kind: SecretKind = SecretKind.REFRESH_TOKEN) -> ProviderRequest:
        body = (b"grant_type=x&secret=", SecretSlot(kind=kind, encoding=SlotEncoding.FORM), b"&client_id=me")
        headers = (Header(name="Content-Type", value="application/x-www-form-urlencoded"),)
        return ProviderRequest(method="POST", origin=self.origin, target="/token", headers=headers, body=body)

    def opened(self, kind: SecretKind, sealed: bytes | None, context: SecretContext, wrapped: bytes) -> bytes:
        assert sealed is not None
        secret = SealedSecret(kind=kind, row_version=context.row_version, sealed=sealed)
        return self.keys.open(OpenSecret(secret=secret, context=context), wrapped_data_key=wrapped)


@contextlib.asynccontextmanager
async def _fake_lab(_folder: Path) -> AsyncIterator[Lab]:
    bank, keys = Bank(), SoftwareKeys()
    origins = {f"https://bank.example:{port}": provider for port, provider in ((1, "a"), (2, "a"), (3, "b"), (4, "a"))}
    first, login, other, closed = origins

    def at(request: BankRequest) -> SendOutcome:
        return NotSent(code="CONNECT_FAILED") if request.origin == closed else bank(request)

    egress = FakeEgress(cluster=CLUSTER, origins=origins, bank=at, keys=keys)

    def turn_hsm(*, on: bool) -> None:
        egress.available = on

    yield Lab(
        egress=egress,
        bank=bank,
        keys=keys,
        origin=first,
        login_origin=login,
        other_origin=other,
        closed_origin=closed,
        stop_hsm=lambda: turn_hsm(on=False),
        start_hsm=lambda: turn_hsm(on=True),
    )


@contextlib.asynccontextmanager
async def _real_lab(folder: Path) -> AsyncIterator[Lab]:
    bank, keys, authority = Bank(), SoftwareKeys(), TestAuthority(folder)
    certificate = authority.issue("bank", hosts=("127.0.0.1",))

    def script(exchange: Exchange) -> None:
        outcome = bank(_bank_request(exchange, f"https://127.0.0.1:{exchange.connection.getsockname()[1]}"))
        if isinstance(outcome, Answer):
            exchange.send(http_answer(outcome.status, outcome.body, outcome.headers))
            exchange.keep = "connection: close" not in exchange.head.lower()
        else:
            exchange.close_plainly()

    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(BankServer(certificate=certificate, script=script)) for _ in range(3)]
        with socket.create_server(("127.0.0.1", 0)) as unused:
            closed = f"https://127.0.0.1:{unused.getsockname()[1]}"
        origins = [*(server.origin for server in servers), closed]
        transports = [
            transport(origin, authority.ca_file, provider=provider)
            for origin, provider in zip(origins, "aaba", strict=True)
        ]
        async with running_egress(transports=transports, keys=keys, folder=folder) as running:
            yield Lab(
                egress=running.link,
                bank=bank,
                keys=keys,
                origin=origins[0],
                login_origin=origins[1],
                other_origin=origins[2],
                closed_origin=closed,
                stop_hsm=running.hsm.hang_up,
                start_hsm=running.wire,
            )
            assert running.alive


def _bank_request(exchange: Exchange, origin: str) -> BankRequest:
    first, *lines = exchange.head.split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    ours = ("host", "content-length", "connection", "accept-encoding")
    return BankRequest(
        method=method,
        origin=origin,
        target=target,
        headers={name: value for name, value in headers.items() if name not in ours},
        body=exchange.body,
    )


Test = Callable[[Lab], Coroutine[None, None, None]]
Run = Callable[[Test], None]


@pytest.fixture(scope="module", params=["fake", "process"])
def shared_lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One lab for all tests, because a process takes its time to start."""
    make = {"fake": _fake_lab, "process": _real_lab}[request.param]
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        lab = runner.run(stack.enter_async_context(make(tmp_path_factory.mktemp("egress"))))
        yield lambda test: runner.run(test(lab))
        runner.run(stack.aclose())


@pytest.fixture
def run(shared_lab: Run) -> Iterator[Run]:
    """Runs a test in the lab as if it were new: another consent's key, no requests yet, hsm there."""

    async def renew(lab: Lab) -> None:
        lab.__post_init__()

    shared_lab(renew)
    yield shared_lab

    async def restore(lab: Lab) -> None:
        lab.start_hsm()

    shared_lab(restore)


def _permit() -> DispatchPermit:
    return DispatchPermit(payment=PaymentId("payment-1"), epoch=1)


# --- sending ------------------------------------------------------------------------------------------------------------


def test_a_call_carries_the_opened_token_and_brings_the_answer_back(run: Run) -> None:
    """The bank gets exactly the rendered request with the token in its slot; the answer's status, headers and body come back."""

    async def test(lab: Lab) -> None:
        lab.bank.answers(207, {"accounts": []}, x_request_id="42")

        outcome = await lab.egress.call(
            lab.read(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=SECONDS
        )

        assert isinstance(outcome, Answer)
        assert (outcome.status, json.loads(outcome.body)) == (207, {"accounts": []})
        assert outcome.header("x-request-id") == "42"
        [request] = lab.bank.requests
        assert (request.method, request.target, request.body) == ("GET", "/v1/accounts?withBalance=true", b"")
        assert request.headers["authorization"] == "Bearer " + ACCESS.decode()
        assert request.headers["x-request-id"] == "99391c7e-ad88-49ec-a2ad-99ddcb1f7721"

    run(test)


def test_a_request_without_secrets_needs_no_key(run: Run) -> None:
    """A pushed authorization request has no slots: it goes out although the hsm does not answer."""

    async def test(lab: Lab) -> None:
        lab.stop_hsm()
        request = lab.read(method="POST", target="/par", headers=(), body=(b"a=", b"1"))

        outcome = await lab.egress.call_once(request, deadline_seconds=SECONDS)

        assert isinstance(outcome, Answer)
        assert [sent.body for sent in lab.bank.requests] == [b"a=1"]

    run(test)


def test_a_secret_in_a_form_is_encoded(run: Run) -> None:
    """RFC 6749 appendix B: what is not unreserved is percent-encoded, and decodes to the same token."""

    async def test(lab: Lab) -> None:
        await lab.egress.call_once(
            lab.token_request(), wrapped_data_key=lab.wrapped, secrets=[lab.refresh()], deadline_seconds=SECONDS
        )

        [request] = lab.bank.requests
        assert parse_qs(request.body.decode()) == {
            "grant_type": ["x"],
            "secret": [REFRESH.decode()],
            "client_id": ["me"],
        }
        assert b"refresh%2Ftoken%2B" in request.body

    run(test)


@pytest.mark.parametrize(
    "changes",
    [
        {"provider_origin": "other"},
        {"owner": "owner-2"},
        {"consent": "consent-2"},
        {"cluster": "prod"},
        {"row_version": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_secret_opens_only_for_its_context(run: Run, changes: dict[str, object]) -> None:
    """Whatever of the context differs from when the token was sealed: ENVELOPE_CORRUPT, and the bank gets nothing."""

    async def test(lab: Lab) -> None:
        sealed = lab.access().secret
        claimed = lab.context(
            **({**changes, "provider_origin": lab.other_origin} if "provider_origin" in changes else changes)
        )
        secret = OpenSecret(secret=replace(sealed, row_version=claimed.row_version), context=claimed)

        with pytest.raises(Corrupt) as caught:
            await lab.egress.call(lab.read(), wrapped_data_key=lab.wrapped, secrets=[secret], deadline_seconds=SECONDS)

        assert caught.value.reason == "ENVELOPE_CORRUPT"
        assert lab.bank.requests == []

    run(test)


def test_a_token_never_goes_to_another_origin(run: Run) -> None:
    """A request to another configured origin does not get a token that is sealed for the first, however its context is given."""

    async def test(lab: Lab) -> None:
        sealed = lab.access()
        request = lab.read(origin=lab.other_origin)

        for secret in (sealed, replace(sealed, context=lab.context(provider_origin=lab.other_origin))):
            with pytest.raises(Corrupt):
                await lab.egress.call(request, wrapped_data_key=lab.wrapped, secrets=[secret], deadline_seconds=SECONDS)
            with pytest.raises(Corrupt):
                await lab.egress.prepare(
                    request, wrapped_data_key=lab.wrapped, secrets=[secret], deadline_seconds=SECONDS
                )

        assert lab.bank.requests == []

    run(test)


def test_damaged_secrets_and_keys_are_corrupt(run: Run) -> None:
    """One flipped bit in the sealed token or in the wrapped data key, another kind, or no key at all: ENVELOPE_CORRUPT."""

    async def test(lab: Lab) -> None:
        good = lab.access()
        flipped = good.secret.sealed[:-1] + bytes([good.secret.sealed[-1] ^ 1])
        other_kind = replace(lab.refresh(), secret=replace(lab.refresh().secret, kind=SecretKind.ACCESS_TOKEN))
        cases = [
            (replace(good, secret=replace(good.secret, sealed=flipped)), lab.wrapped),
            (replace(good, secret=replace(good.secret, sealed=b"")), lab.wrapped),
            (other_kind, lab.wrapped),
            (good, lab.wrapped[:-1] + bytes([lab.wrapped[-1] ^ 1])),
            (good, b""),
        ]

        for secret, wrapped in cases:
            with pytest.raises(Corrupt):
                await lab.egress.call(lab.read(), wrapped_data_key=wrapped, secrets=[secret], deadline_seconds=SECONDS)

        assert lab.bank.requests == []

    run(test)


def test_slots_and_secrets_must_match(run: Run) -> None:
    """A slot without its secret, or a secret without a slot, is a defect of ours: INTERNAL, and nothing is sent."""

    async def test(lab: Lab) -> None:
        for secrets in ([], [lab.access(), lab.refresh()], [lab.refresh()], [lab.access(), lab.access()]):
            with pytest.raises(Internal):
                await lab.egress.call(
                    lab.read(), wrapped_data_key=lab.wrapped, secrets=secrets, deadline_seconds=SECONDS
                )

        assert lab.bank.requests == []

    run(test)


def test_tokens_are_not_asked_for_without_a_secret(run: Run) -> None:
    """A code's verifier or a refresh token says whose tokens come: without one, any answer could be sealed for anybody."""

    async def test(lab: Lab) -> None:
        request = replace(lab.token_request(), body=(b"grant_type=client_credentials",))

        with pytest.raises(Internal):
            await lab.egress.request_tokens(
                request,
                wrapped_data_key=lab.wrapped,
                secrets=[],
                seal_access_as=lab.context(),
                seal_refresh_as=lab.context(),
                deadline_seconds=SECONDS,
            )

        assert lab.bank.requests == []

    run(test)


def test_no_hsm_means_unavailable(run: Run) -> None:
    """Without the hsm no token opens: HSM_UNAVAILABLE within the deadline, and nothing is sent."""

    async def test(lab: Lab) -> None:
        lab.stop_hsm()
        attempts = [
            lab.egress.call(lab.read(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=1.0),
            lab.egress.prepare(lab.read(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=1.0),
            lab.egress.new_secrets(lab.context()),
        ]

        for attempt in attempts:
            with pytest.raises(Unavailable) as caught:
                await attempt
            assert caught.value.reason == "HSM_UNAVAILABLE"

        assert lab.bank.requests == []

    run(test)


def test_an_origin_that_is_not_configured_is_unavailable(run: Run) -> None:
    """Egress talks to configured origins only, whatever is sealed for them."""

    async def test(lab: Lab) -> None:
        origin = "https://attacker.example:443"

        with pytest.raises(Unavailable) as caught:
            await lab.egress.call(
                lab.read(origin=origin),
                wrapped_data_key=lab.wrapped,
                secrets=[lab.access(provider_origin=origin)],
                deadline_seconds=SECONDS,
            )

        assert caught.value.reason == "PROVIDER_UNAVAILABLE"

    run(test)


def test_a_bank_that_cannot_be_reached_is_not_sent(run: Run) -> None:
    """Nobody listens: NotSent, the one outcome after which the same act may be tried again."""

    async def test(lab: Lab) -> None:
        outcome = await lab.egress.call(
            lab.read(origin=lab.closed_origin),
            wrapped_data_key=lab.wrapped,
            secrets=[lab.access(provider_origin=lab.closed_origin)],
            deadline_seconds=SECONDS,
        )

        assert outcome == NotSent(code="CONNECT_FAILED")

    run(test)


def test_no_answer_is_unknown(run: Run) -> None:
    """The bank got the request and hung up: Unknown, and it was asked once."""

    async def test(lab: Lab) -> None:
        lab.bank.outcome = Unknown(code="CONNECTION_LOST")

        outcome = await lab.egress.call(
            lab.read(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=SECONDS
        )

        assert outcome == Unknown(code="CONNECTION_LOST")
        assert len(lab.bank.requests) == 1

    run(test)


def test_errors_of_the_bank_are_answers(run: Run) -> None:
    """Statuses are not judged here: 302 is not followed, 401 and 500 come back as they are."""

    async def test(lab: Lab) -> None:
        for status in (302, 401, 500):
            lab.bank.answers(status, {"tppMessages": []}, location=lab.origin + "/elsewhere")
            outcome = await lab.egress.call(
                lab.read(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=SECONDS
            )
            assert isinstance(outcome, Answer)
            assert outcome.status == status

        assert len(lab.bank.requests) == 3

    run(test)


def test_an_answer_that_repeats_the_token_is_not_passed_on(run: Run) -> None:
    """In the body or in a header: the answer is withheld, the outcome unknown."""

    async def test(lab: Lab) -> None:
        async def outcome() -> SendOutcome:
            return await lab.egress.call(
                lab.read(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=SECONDS
            )

        lab.bank.answers(400, {"error": "bad token " + ACCESS.decode()})
        assert await outcome() == Unknown(code="ANSWER_ECHOES_SECRET")
        lab.bank.answers(400, {}, x_debug="got " + ACCESS.decode())
        assert await outcome() == Unknown(code="ANSWER_ECHOES_SECRET")

    run(test)


def test_an_answer_that_repeats_a_form_is_not_passed_on(run: Run) -> None:
    """A secret that was sent encoded is found both as it is and as it was sent."""

    async def test(lab: Lab) -> None:
        for repeated in (REFRESH, quote_plus(REFRESH).encode()):
            lab.bank.answers(400, b"cannot revoke " + repeated)
            outcome = await lab.egress.call_once(
                lab.token_request(), wrapped_data_key=lab.wrapped, secrets=[lab.refresh()], deadline_seconds=SECONDS
            )
            assert outcome == Unknown(code="ANSWER_ECHOES_SECRET")

    run(test)


def test_tokens_do_not_come_back_by_a_plain_call(run: Run) -> None:
    """A token endpoint's answer to `call` would hand the core a token in the clear: it is withheld."""

    async def test(lab: Lab) -> None:
        lab.bank.answers(200, {"access_token": "new-token-in-the-clear", "token_type": "Bearer"})

        outcome = await lab.egress.call_once(
            lab.token_request(), wrapped_data_key=lab.wrapped, secrets=[lab.refresh()], deadline_seconds=SECONDS
        )

        assert outcome == Unknown(code="ANSWER_HOLDS_TOKENS")

    run(test)


# --- token endpoints ------------------------------------------------------------------------------------------------------


def test_granted_tokens_come_back_sealed(run: Run) -> None:
    """Both tokens are sealed under the given contexts and open to what the bank sent; nothing of them is in the clear."""

    async def test(lab: Lab) -> None:
        lab.bank.answers(
            200,
            {
                "access_token": "new-access-9Zq",
                "token_type": "bearer",
                "expires_in": 3600,
                "refresh_token": 'new/refresh"\\8Yp',
                "scope": "AIS:c1 offline",
                "extra": {"nested": ["ignored"]},
            },
        )
        access_as = lab.context(row_version=2)
        refresh_as = lab.context(row_version=2, provider_origin=lab.login_origin)

        grant = await lab.egress.request_tokens(
            lab.token_request(),
            wrapped_data_key=lab.wrapped,
            secrets=[lab.refresh()],
            seal_access_as=access_as,
            seal_refresh_as=refresh_as,
            deadline_seconds=SECONDS,
        )

        assert isinstance(grant, TokenGrant)
        assert (grant.expires_in_seconds, grant.scope) == (3600, "AIS:c1 offline")
        assert lab.opened(SecretKind.ACCESS_TOKEN, grant.access_token, access_as, lab.wrapped) == b"new-access-9Zq"
        refreshed = lab.opened(SecretKind.REFRESH_TOKEN, grant.refresh_token, refresh_as, lab.wrapped)
        assert refreshed == b'new/refresh"\\8Yp'
        assert "new-access" not in repr(grant)

    run(test)


def test_a_grant_may_lack_refresh_token_lifetime_and_scope(run: Run) -> None:
    """What the bank leaves out is None; a lifetime that is no whole number of seconds is None too."""

    async def test(lab: Lab) -> None:
        for lifetime in (None, 0, -1, True, "3600", 1.5, 10**12):
            document = {"access_token": "t", "token_type": "Bearer", "refresh_token": None, "expires_in": lifetime}
            lab.bank.answers(200, {name: value for name, value in document.items() if value is not None})
            grant = await lab.egress.request_tokens(
                lab.token_request(),
                wrapped_data_key=lab.wrapped,
                secrets=[lab.refresh()],
                seal_access_as=lab.context(),
                seal_refresh_as=lab.context(),
                deadline_seconds=SECONDS,
            )
            assert isinstance(grant, TokenGrant), lifetime
            assert (grant.refresh_token, grant.expires_in_seconds, grant.scope) == (None, None, None)

    run(test)


@pytest.mark.parametrize(
    ("status", "document", "expected"),
    [
        (400, {"error": "invalid_grant"}, TokensRefused(status=400, error="invalid_grant")),
        (401, {"error": "invalid_client"}, TokensRefused(status=401, error="invalid_client")),
        (400, {"error": "no such thing"}, TokensRefused(status=400, error="other")),
        (400, b"<html>", TokensRefused(status=400, error="other")),
        (429, {"error": "slow_down"}, TokensRefused(status=429, error="other")),
        (408, {"error": "invalid_grant"}, Unknown(code="TOKEN_ANSWER_STATUS")),
        (500, {"error": "invalid_grant"}, Unknown(code="TOKEN_ANSWER_STATUS")),
        (302, b"", Unknown(code="TOKEN_ANSWER_STATUS")),
        (200, b"access_token=a&token_type=bearer", Unknown(code="TOKEN_ANSWER_MALFORMED")),
        (200, {"access_token": "t"}, Unknown(code="TOKEN_ANSWER_MALFORMED")),
        (200, {"access_token": "t", "token_type": "mac"}, Unknown(code="TOKEN_ANSWER_MALFORMED")),
        (200, {"access_token": "", "token_type": "Bearer"}, Unknown(code="TOKEN_ANSWER_MALFORMED")),
        (200, {"access_token": 1, "token_type": "Bearer"}, Unknown(code="TOKEN_ANSWER_MALFORMED")),
        (200, {"access_token": "a\nb", "token_type": "Bearer"}, Unknown(code="TOKEN_ANSWER_MALFORMED")),
        (200, {"access_token": "ä", "token_type": "Bearer"}, Unknown(code="TOKEN_ANSWER_MALFORMED")),
        (200, {"access_token": "x" * 16385, "token_type": "Bearer"}, Unknown(code="TOKEN_ANSWER_MALFORMED")),
        (200, {"error": "invalid_grant"}, Unknown(code="TOKEN_ANSWER_MALFORMED")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_token_answers_that_grant_nothing(run: Run, status: int, document: object, expected: object) -> None:
    """4xx refuses; a grant that is not exactly one, and every status that proves nothing, is unknown, never a failure."""

    async def test(lab: Lab) -> None:
        lab.bank.answers(status, document)

        outcome = await lab.egress.request_tokens(
            lab.token_request(),
            wrapped_data_key=lab.wrapped,
            secrets=[lab.refresh()],
            seal_access_as=lab.context(),
            seal_refresh_as=lab.context(),
            deadline_seconds=SECONDS,
        )

        assert outcome == expected
        assert len(lab.bank.requests) == 1

    run(test)


def test_tokens_are_sealed_only_for_the_provider_and_consent_they_are_for(run: Run) -> None:
    """Another provider's origin, another owner or consent, or two consents at once: refused before anything is sent."""

    async def test(lab: Lab) -> None:
        cases = [
            (lab.context(provider_origin=lab.other_origin), lab.context()),
            (lab.context(), lab.context(provider_origin=lab.other_origin)),
            (lab.context(provider_origin=lab.other_origin), lab.context(provider_origin=lab.other_origin)),
            (lab.context(), lab.context(consent="consent-2")),
            (lab.context(owner="owner-2"), lab.context(owner="owner-2")),
            (lab.context(cluster="prod"), lab.context(cluster="prod")),
        ]

        for access_as, refresh_as in cases:
            with pytest.raises(Internal):
                await lab.egress.request_tokens(
                    lab.token_request(),
                    wrapped_data_key=lab.wrapped,
                    secrets=[lab.refresh()],
                    seal_access_as=access_as,
                    seal_refresh_as=refresh_as,
                    deadline_seconds=SECONDS,
                )

        assert lab.bank.requests == []

    run(test)


def test_new_secrets_are_a_data_key_and_a_pkce_verifier(run: Run) -> None:
    """The verifier opens under the new key to RFC 7636's form, the challenge is its S256, and both are new each time."""

    async def test(lab: Lab) -> None:
        context = lab.context()

        made = [await lab.egress.new_secrets(context) for _ in range(2)]

        for secrets in made:
            verifier = lab.opened(SecretKind.PKCE_VERIFIER, secrets.pkce_verifier, context, secrets.wrapped_data_key)
            assert re.fullmatch(rb"[A-Za-z0-9\-_]{43}", verifier)
            assert urlsafe_b64encode(sha256(verifier).digest()).rstrip(b"=").decode() == secrets.code_challenge
        assert made[0].code_challenge != made[1].code_challenge
        assert made[0].wrapped_data_key != made[1].wrapped_data_key

    run(test)


def test_the_verifier_is_sent_with_the_code(run: Run) -> None:
    """What new_secrets made goes into the token request as it was made."""

    async def test(lab: Lab) -> None:
        made = await lab.egress.new_secrets(lab.context())
        sealed = SealedSecret(kind=SecretKind.PKCE_VERIFIER, row_version=1, sealed=made.pkce_verifier)
        lab.bank.answers(200, {"access_token": "t", "token_type": "Bearer"})

        grant = await lab.egress.request_tokens(
            lab.token_request(SecretKind.PKCE_VERIFIER),
            wrapped_data_key=made.wrapped_data_key,
            secrets=[OpenSecret(secret=sealed, context=lab.context())],
            seal_access_as=lab.context(),
            seal_refresh_as=lab.context(),
            deadline_seconds=SECONDS,
        )

        assert isinstance(grant, TokenGrant)
        [verifier] = parse_qs(lab.bank.requests[0].body.decode())["secret"]
        assert urlsafe_b64encode(sha256(verifier.encode()).digest()).rstrip(b"=").decode() == made.code_challenge

    run(test)


# --- prepared requests ---------------------------------------------------------------------------------------------------


def test_a_prepared_request_goes_out_once_when_it_is_sent(run: Run) -> None:
    """Preparing sends nothing; sending sends once; the permit serves once and the handle is gone."""

    async def test(lab: Lab) -> None:
        lab.bank.answers(201, {"paymentId": "p1"})
        prepared = await lab.egress.prepare(
            lab.payment(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=SECONDS
        )
        assert lab.bank.requests == []
        permit = _permit()

        outcome = await lab.egress.send(prepared, permit, deadline_seconds=SECONDS)

        assert isinstance(outcome, Answer)
        assert (outcome.status, json.loads(outcome.body)) == (201, {"paymentId": "p1"})
        with pytest.raises(Internal):
            await lab.egress.send(prepared, permit, deadline_seconds=SECONDS)
        assert await lab.egress.send(prepared, _permit(), deadline_seconds=SECONDS) == NotSent(code="PREPARED_GONE")
        [request] = lab.bank.requests
        assert request.headers["authorization"] == "Bearer " + ACCESS.decode()
        assert request.body == b'{"amount":"1.00"}'

    run(test)


def test_a_prepared_request_without_an_answer_is_unknown(run: Run) -> None:
    """The bank got it and hung up: Unknown, and it was sent once."""

    async def test(lab: Lab) -> None:
        lab.bank.outcome = Unknown(code="CONNECTION_LOST")
        prepared = await lab.egress.prepare(
            lab.payment(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=SECONDS
        )

        assert await lab.egress.send(prepared, _permit(), deadline_seconds=SECONDS) == Unknown(code="CONNECTION_LOST")
        assert len(lab.bank.requests) == 1

    run(test)


def test_a_discarded_request_is_never_sent(run: Run) -> None:
    """After discard, which may be repeated, a send says that nothing left."""

    async def test(lab: Lab) -> None:
        prepared = await lab.egress.prepare(
            lab.payment(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=SECONDS
        )

        await lab.egress.discard(prepared)
        await lab.egress.discard(prepared)

        assert await lab.egress.send(prepared, _permit(), deadline_seconds=SECONDS) == NotSent(code="PREPARED_GONE")
        assert lab.bank.requests == []

    run(test)


def test_a_send_after_its_deadline_sends_nothing(run: Run) -> None:
    """Egress looks at the clock right before the first byte."""

    async def test(lab: Lab) -> None:
        prepared = await lab.egress.prepare(
            lab.payment(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=SECONDS
        )

        outcome = await lab.egress.send(prepared, _permit(), deadline_seconds=0)

        assert outcome == NotSent(code="DEADLINE_BEFORE_SEND")
        assert lab.bank.requests == []

    run(test)


def test_a_permit_whose_time_is_over_sends_nothing_however_many_seconds_are_given(run: Run) -> None:
    """Seconds from now grow where a process stands still between counting and using them; the permit's moment does not."""

    async def test(lab: Lab) -> None:
        prepared = await lab.egress.prepare(
            lab.payment(), wrapped_data_key=lab.wrapped, secrets=[lab.access()], deadline_seconds=SECONDS
        )
        permit = _permit()
        permit.send_before_boot_time_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

        outcome = await lab.egress.send(prepared, permit, deadline_seconds=SECONDS)

        assert outcome == NotSent(code="DEADLINE_BEFORE_SEND")
        assert lab.bank.requests == []

    run(test)


def test_what_cannot_be_prepared_fails_before_the_point_of_no_return(run: Run) -> None:
    """A token that does not open is found while preparing, not while sending."""

    async def test(lab: Lab) -> None:
        secret = replace(lab.access(), context=lab.context(consent="consent-2"))

        with pytest.raises(Corrupt):
            await lab.egress.prepare(
                lab.payment(), wrapped_data_key=lab.wrapped, secrets=[secret], deadline_seconds=SECONDS
            )

    run(test)


# --- import --------------------------------------------------------------------------------------------------------------


def _info(owner: str = "owner-1", provider: str = "providers/a") -> bytes:
    parts = [text.encode() for text in ("custody/v1/import", owner, provider, "request-1")]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _sealed(public_key: bytes, plaintext: bytes, info: bytes) -> bytes:
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    return suite.encrypt(plaintext, X25519PublicKey.from_public_bytes(public_key), info)


def test_imported_tokens_are_sealed_for_their_consent(run: Run) -> None:
    """Tokens that only egress can open come back sealed under a new data key, for the origins where they go."""

    async def test(lab: Lab) -> None:
        key = await lab.egress.import_key()
        assert key.key_id == sha256(key.public_key).hexdigest()[:16]
        access_as, refresh_as = lab.context(), lab.context(provider_origin=lab.login_origin)
        for refresh in ("old-refresh", None):
            document = {"access_token": "old-access", **({"refresh_token": refresh} if refresh else {})}

            imported = await lab.egress.import_tokens(
                key_id=key.key_id,
                sealed_tokens=_sealed(key.public_key, json.dumps(document).encode(), _info()),
                info=_info(),
                seal_access_as=access_as,
                seal_refresh_as=refresh_as,
            )

            wrapped = imported.wrapped_data_key
            assert lab.opened(SecretKind.ACCESS_TOKEN, imported.access_token, access_as, wrapped) == b"old-access"
            if refresh is None:
                assert imported.refresh_token is None
            else:
                opened = lab.opened(SecretKind.REFRESH_TOKEN, imported.refresh_token, refresh_as, wrapped)
                assert opened == b"old-refresh"

    run(test)


@pytest.mark.parametrize(
    "plaintext",
    [
        b"",
        b"{}",
        b"[]",
        b"not json",
        b'{"access_token": ""}',
        b'{"access_token": 5}',
        b'{"access_token": "a\\nb"}',
        b'{"refresh_token": "only"}',
        b'{"access_token": "a", "refresh_token": 7}',
        b'{"access_token": "a", "other": "b"}',
        b'{"access_token": "' + b"x" * 16385 + b'"}',
    ],
    ids=range(11),
)
def test_what_is_not_tokens_is_not_imported(run: Run, plaintext: bytes) -> None:
    """A document of another form is an invalid field, named and not repeated."""

    async def test(lab: Lab) -> None:
        key = await lab.egress.import_key()

        with pytest.raises(InvalidField) as caught:
            await lab.egress.import_tokens(
                key_id=key.key_id,
                sealed_tokens=_sealed(key.public_key, plaintext, _info()),
                info=_info(),
                seal_access_as=lab.context(),
                seal_refresh_as=lab.context(),
            )

        assert caught.value.violations[0].field == "sealed_tokens"

    run(test)


def test_imports_are_bound_to_key_info_owner_and_provider(run: Run) -> None:
    """Another run's key, another info, damage, and an info for another owner or provider: refused, each with its reason."""

    async def test(lab: Lab) -> None:
        key = await lab.egress.import_key()
        document = b'{"access_token": "old-access"}'
        good = _sealed(key.public_key, document, _info())

        async def importing(sealed: bytes, info: bytes, key_id: str = key.key_id) -> None:
            await lab.egress.import_tokens(
                key_id=key_id,
                sealed_tokens=sealed,
                info=info,
                seal_access_as=lab.context(),
                seal_refresh_as=lab.context(),
            )

        with pytest.raises(PreconditionFailed) as caught:
            await importing(good, _info(), "0" * 16)
        assert caught.value.reason == "IMPORT_KEY_UNKNOWN"
        for sealed, info in [
            (good[:-1] + bytes([good[-1] ^ 1]), _info()),
            (good[:40], _info()),
            (b"", _info()),
            (_sealed(key.public_key, document, _info("owner-2")), _info("owner-2")),
            (_sealed(key.public_key, document, _info(provider="providers/b")), _info(provider="providers/b")),
            (_sealed(key.public_key, document, b"free text"), b"free text"),
            (_sealed(key.public_key, document, _info("owner-2")), _info()),
        ]:
            with pytest.raises(InvalidField):
                await importing(sealed, info)
        await importing(good, _info())

    run(test)


def test_a_forgotten_key_is_asked_for_again(run: Run) -> None:
    """After forget, a call asks the hsm: once the consent's data key is destroyed there, nothing opens."""

    async def test(lab: Lab) -> None:
        async def call() -> SendOutcome:
            return await lab.egress.call(
                lab.read(), wrapped_data_key=lab.wrapped, secrets=[secret], deadline_seconds=1.0
            )

        secret = lab.access()
        assert isinstance(await call(), Answer)
        lab.stop_hsm()

        await lab.egress.forget(lab.wrapped)

        with pytest.raises(Unavailable):
            await call()

    run(test)
