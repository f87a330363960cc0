# ruff: noqa: E501 (the table of cases: one line each)
"""bi_D1 to bi_D30: what is wrong with consents and their tokens, by the ids of the list. A refusal leaves what was there as it was;
an answer of the provider that is not exactly a grant is never taken for one."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest
from custody.v1 import consent_pb2, payment_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.ids import WorkloadId
from sidecar.domain.provider import Answer, TokenGrant, TokenOutcome, TokensRefused, Unknown
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.egress.tokenanswers import Sealer, token_outcome
from sidecar.errors import CustodyError
from tests.fakes.bank import API, TOKENS, answer, error
from tests.faults.front import Front, Refusal, consent_message_for, payment_message_for, run
from tests.unit.custody.support import OWNER, World, caller, redirect, request_id

pb = consent_pb2
C = consent_pb2.Consent
Changes = dict[str, Any]
DAY = 86_400


# --- D1 to D6, D14 to D17, D39 to D42: what a token endpoint may answer


def outcome_of(status: int, body: bytes) -> TokenOutcome:
    """As the egress process reads it."""
    context = SecretContext(cluster="test", owner="o", consent="c", provider_origin=API, row_version=1)
    sealer = Sealer(
        key=memoryview(bytearray(32)),
        key_id=bytes(16),
        access_context=context,
        refresh_context=replace(context, provider_origin=TOKENS),
    )
    return token_outcome(status, memoryview(bytearray(body)), sealer)


def grant(**changes: object) -> bytes:
    """A right answer, with changes; `...` leaves a member out."""
    members = {
        "access_token": "access-1",
        "refresh_token": "refresh-1",
        "token_type": "Bearer",
        "expires_in": 600,
        **changes,
    }
    return json.dumps({name: value for name, value in members.items() if value is not ...}).encode()


GRANTED: dict[str, bytes] = {
    "bi_D1_one_character": grant(access_token="a"),
    "bi_D1_16_kilobytes": grant(access_token="a" * 16_384),
    "bi_D3_bearer": grant(token_type="bearer"),
    "bi_D3_BEARER": grant(token_type="BEARER"),
    "bi_D6_no_refresh_token": grant(refresh_token=...),
    "bi_D6_null_refresh_token": grant(refresh_token=None),
    "bi_D14_no_new_refresh_token": grant(refresh_token=...),
    "bi_D15_the_same_token_for_both": grant(refresh_token="access-1"),
    "bi_D17_no_lifetime": grant(expires_in=...),
    "bi_G42_of_another_person": grant(account="DE75512108001245126199", sub="somebody-else"),
}
NO_LIFETIME: dict[str, object] = {
    "bi_D17_text": "600", "bi_D17_negative": -1, "bi_D17_zero": 0, "bi_D17_10_to_the_12": 10**12, "bi_D17_fraction": 600.5, "bi_D17_true": True,
    "bi_D17_list": [600], "bi_D17_null": None, "bi_G39_a_date": "2099-01-01", "bi_G39_eleven_years": 11 * 365 * DAY,
}  # fmt: skip
NOT_GRANTED: dict[str, bytes] = {
    "bi_D1_empty": grant(access_token=""),
    "bi_D1_missing": grant(access_token=...),
    "bi_D1_null": grant(access_token=None),
    "bi_D1_number": grant(access_token=7),
    "bi_D1_16_kilobytes_and_one": grant(access_token="a" * 16_385),
    "bi_D1_64_kilobytes": grant(access_token="a" * 65_536),
    "bi_D1_refresh_token_empty": grant(refresh_token=""),
    "bi_D2_line_break": grant(access_token="a\r\nX-Evil: 1"),
    "bi_D2_nul": grant(access_token="a\0"),
    "bi_D2_not_ascii": grant(access_token="é"),
    "bi_D2_delete": grant(access_token="a\x7f"),
    "bi_D2_refresh_token_with_line": grant(refresh_token="a\nb"),
    "bi_D3_missing": grant(token_type=...),
    "bi_D3_mac": grant(token_type="mac"),
    "bi_D3_dpop": grant(token_type="DPoP"),
    "bi_D3_blank": grant(token_type="Bearer "),
    "bi_D3_list": grant(token_type=["Bearer"]),
    "bi_D18_two_answers": grant() + grant(),
    "bi_D18_two_tokens": b'{"access_token":"a","access_token":"b","token_type":"Bearer"}',
    "bi_D18_two_tokens_by_escape": b'{"access_token":"a","access\\u005ftoken":"b","token_type":"Bearer"}',
    "bi_D5_scope_with_the_token": grant(scope="read access-1"),
    "bi_D5_scope_list": grant(scope=["a"]),
    "bi_G41_form": b"access_token=a&token_type=Bearer&expires_in=600",
    "bi_G1_no_body": b"",
    "bi_G2_html": b"<html>",
    "bi_G3_truncated": grant()[:-1],
    "bi_G3_byte_order_mark": b"\xef\xbb\xbf" + grant(),
    "bi_G3_nan": b'{"access_token":"a","token_type":"Bearer","expires_in":NaN}',
    "bi_G3_depth": b'{"access_token":"a","token_type":"Bearer","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "bi_G3_list": b"[" + grant() + b"]",
}
REFUSED: dict[str, tuple[int, bytes, TokenOutcome]] = {
    "bi_G40_invalid_grant": (400, b'{"error":"invalid_grant"}', TokensRefused(status=400, error="invalid_grant")),
    "bi_G40_invalid_client": (401, b'{"error":"invalid_client"}', TokensRefused(status=401, error="invalid_client")),
    "bi_G40_temporarily_unavailable": (400, b'{"error":"temporarily_unavailable"}', TokensRefused(status=400, error="other")),
    "bi_G40_slow_down": (400, b'{"error":"slow_down"}', TokensRefused(status=400, error="other")),
    "bi_G40_no_code": (403, b"no", TokensRefused(status=403, error="other")),
    "bi_G14_408": (408, b'{"error":"invalid_grant"}', Unknown(code="TOKEN_ANSWER_STATUS")),
    "bi_G15_409": (409, b'{"error":"invalid_grant"}', Unknown(code="TOKEN_ANSWER_STATUS")),
    "bi_G14_425": (425, b'{"error":"invalid_grant"}', Unknown(code="TOKEN_ANSWER_STATUS")),
    "bi_G17_500": (500, b'{"error":"invalid_grant"}', Unknown(code="TOKEN_ANSWER_STATUS")),
    "bi_G8_redirect": (302, b"", Unknown(code="TOKEN_ANSWER_STATUS")),
}  # fmt: skip


@pytest.mark.parametrize("body", GRANTED.values(), ids=GRANTED.keys())
def test_a_token_answer_that_is_a_grant(body: bytes) -> None:
    """Sealed, and of the rest of the answer nothing goes on."""
    outcome = outcome_of(200, body)

    assert isinstance(outcome, TokenGrant)
    assert b"access-1" not in outcome.access_token
    assert (outcome.refresh_token is None) == (json.loads(body).get("refresh_token") is None)


@pytest.mark.parametrize("expires_in", NO_LIFETIME.values(), ids=NO_LIFETIME.keys())
def test_a_lifetime_that_is_none(expires_in: object) -> None:
    """The tokens are kept, because the provider has spent the code; how long they live is then the descriptor's to say."""
    outcome = outcome_of(200, grant(expires_in=expires_in))

    assert isinstance(outcome, TokenGrant)
    assert outcome.expires_in_seconds is None


@pytest.mark.parametrize("body", NOT_GRANTED.values(), ids=NOT_GRANTED.keys())
def test_a_token_answer_that_is_no_grant(body: bytes) -> None:
    """Unknown: the provider may have spent code or token. Never a grant, never a refusal."""
    assert outcome_of(200, body) == Unknown(code="TOKEN_ANSWER_MALFORMED")


@pytest.mark.parametrize(("status", "body", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_a_token_answer_that_is_an_error(status: int, body: bytes, expected: TokenOutcome) -> None:
    """A refusal where the provider has decided; unknown where it may not have."""
    assert outcome_of(status, body) == expected


# --- CreateConsent


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    id: str
    changes: Changes = field(default_factory=dict)
    named: str = ""
    reason: str = "FIELD_INVALID"
    policy: Changes = field(default_factory=dict)


def _time(world: World, seconds: float) -> Timestamp:
    time = Timestamp()
    time.FromDatetime(world.clock.now() + timedelta(seconds=seconds))
    return time


_W = World()
CREATE = [
    Wrong(id="bi_D4_missing", changes={"expire_time": None}, named="expire_time"),
    Wrong(id="bi_D4_zero", changes={"expire_time": Timestamp()}, named="expire_time"),
    Wrong(id="bi_D4_now", changes={"expire_time": _time(_W, 0)}, named="expire_time"),
    Wrong(id="bi_D4_past", changes={"expire_time": _time(_W, -1)}, named="expire_time"),
    Wrong(id="bi_D4_181_days", changes={"expire_time": _time(_W, 181 * DAY)}, named="expire_time"),
    Wrong(id="bi_D4_year_9999", changes={"expire_time": Timestamp(seconds=253402300799)}, named="expire_time"),
    Wrong(id="bi_D8_not_configured", changes={"provider": "providers/no-such-bank"}, reason="POLICY_REFUSED"),
    Wrong(id="bi_D8_another_collection", changes={"provider": "consents/sandbox-bank"}, named="provider"),
    *[
        Wrong(id=f"bi_D11_{name}", changes={"redirect_uri": uri}, named="redirect_uri")
        for name, uri in {
            "missing": "", "other_host": "https://evil.example/callback", "other_path": "https://app.example/callback/x", "other_scheme": "http://app.example/callback",
            "user_info": "https://app.example@evil.example/callback", "user_info_before": "https://evil.example@app.example/callback", "fragment": "https://app.example/callback#x",
            "query": "https://app.example/callback?x", "upper_case": "https://APP.example/callback", "trailing_dot": "https://app.example./callback", "port": "https://app.example:443/callback",
            "javascript": "javascript:alert(1)", "line": "https://app.example/callback\n", "relative": "/callback", "dots": "https://app.example/a/../callback",
        }.items()
    ],
    Wrong(id="bi_D5_purpose_unknown", changes={"purposes": [99]}, named="purposes[0]"),
    Wrong(id="bi_D5_no_purpose", changes={"purposes": []}, named="purposes"),
    Wrong(id="bi_D5_purpose_not_allowed", policy={"purposes": frozenset()}, reason="POLICY_REFUSED"),
    Wrong(id="bi_D23_owner_not_allowed", policy={"owners": frozenset()}, reason="OWNER_MISMATCH"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", CREATE, ids=lambda wrong: wrong.id)
def test_a_wrong_consent_is_refused(wrong: Wrong) -> None:
    """Named by field or reason; nothing is written, and the bank is not asked."""

    async def test() -> None:
        world = World()
        front = Front(world=world, caller=caller(**wrong.policy))
        before = front.written()

        got = await front.send(pb.CreateConsentRequest, "CreateConsent", consent_message_for(world, **wrong.changes))

        assert isinstance(got, Refusal), got
        assert got.reason == wrong.reason, got
        assert not wrong.named or wrong.named in got.fields, got
        assert front.written() is before
        assert front.sent() == 0

    run(test)


# --- CompleteConsent


async def created(world: World) -> tuple[Consent, str]:
    message = consent_message_for(world)
    got = await Front(world=world).send(pb.CreateConsentRequest, "CreateConsent", message)
    (pushed,) = [asked for asked in world.bank.requests if world.bank.kind(asked) == "par"][-1:]
    (consent,) = [row for row in world.store._state.consents.values() if f"consents/{row.id}" == got.consent.name]
    return consent, parse_qs(pushed.body.decode())["state"][0]


REDIRECTS: dict[str, Changes] = {
    "bi_D9_state_missing": {"state": ""},
    "bi_D9_another_state": {"state": "x" * 43},
    "bi_D9_state_cut": {"state": -1},
    "bi_D9_state_with_more": {"state": 1},
    "bi_D12_another_issuer": {"iss": "https://other-bank.example"},
    "bi_D12_issuer_missing": {"iss": ""},
    "bi_D12_issuer_with_slash": {"iss": "https://issuer.bank.example/"},
    "bi_D12_issuer_in_capitals": {"iss": "https://ISSUER.bank.example"},
    "bi_D10_no_code": {"code": ""},
}


@pytest.mark.parametrize("changes", REDIRECTS.values(), ids=REDIRECTS.keys())
def test_a_wrong_redirect_leaves_the_consent_as_it_was(changes: Changes) -> None:
    """Refused, no code is sent, and the right redirect still completes it."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        consent, state = await created(world)
        world.bank.authorise("code-1")
        right = {"state": state, "iss": "https://issuer.bank.example", "code": "code-1"}
        changed = {
            name: (state[:value] if value == -1 else state + "x") if isinstance(value, int) else value
            for name, value in changes.items()
        }
        before, sent = front.written(), front.sent()

        refused = await front.send(
            pb.CompleteConsentRequest, "CompleteConsent", _complete(consent, {**right, **changed})
        )

        assert isinstance(refused, Refusal), refused
        assert front.written() is before
        assert front.sent() == sent
        completed = await front.send(pb.CompleteConsentRequest, "CompleteConsent", _complete(consent, right))
        assert completed.consent.state == C.STATE_ACTIVE

    run(test)


def _complete(consent: Consent, redirect_values: Changes) -> pb.CompleteConsentRequest:
    return pb.CompleteConsentRequest(
        consent=f"consents/{consent.id}", owner=consent.owner, request_id=request_id(), **redirect_values
    )


def test_bi_d9_the_state_of_another_tenants_consent() -> None:
    """Login CSRF: a redirect of one consent completes no other, of the same owner or of another."""

    async def test() -> None:
        world = World()
        first, _ = await created(world)
        _, state = await created(world)
        before = world.store._state

        with pytest.raises(CustodyError) as refused:
            await world.core.consents.complete(caller(), first.id, OWNER, redirect(state), request_id())

        assert refused.value.reason == "STATE_MISMATCH"
        assert world.store._state is before

    run(test)


def test_bi_d10_a_code_that_is_replayed() -> None:
    """The second use of a redirect, under a new request id or the same one, sends nothing and changes nothing."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        consent, state = await created(world)
        world.bank.authorise("code-1")
        message = _complete(consent, {"state": state, "iss": "https://issuer.bank.example", "code": "code-1"})
        first = await front.send(pb.CompleteConsentRequest, "CompleteConsent", message)
        exchanges = world.bank.count("token")

        again = await front.send(pb.CompleteConsentRequest, "CompleteConsent", message)
        message.request_id = request_id()
        other = await front.send(pb.CompleteConsentRequest, "CompleteConsent", message)

        assert again == first
        assert isinstance(other, Refusal)
        assert world.bank.count("token") == exchanges == 1
        assert (await world.stored(consent)).state is ConsentState.ACTIVE

    run(test)


@pytest.mark.parametrize("body", list(NOT_GRANTED.values()), ids=[f"code_{name}" for name in NOT_GRANTED])
def test_a_code_whose_exchange_brings_no_grant(body: bytes) -> None:
    """The consent has failed, keeps no token, and the code is not sent again."""

    async def test() -> None:
        world = World()
        consent, state = await created(world)
        world.bank.authorise("code-1")
        world.bank.script["token"] = [Answer(status=200, headers=(("content-type", "application/json"),), body=body)]
        # The fake egress reads JSON as json.loads does: here it gets the eyes of the real one.
        read: Any = lambda got, *_: outcome_of(got.status, got.body)  # noqa: E731
        world.core.egress._token_outcome = read  # type: ignore[method-assign]

        message = _complete(consent, {"state": state, "iss": "https://issuer.bank.example", "code": "code-1"})
        got = await Front(world=world).send(pb.CompleteConsentRequest, "CompleteConsent", message)

        stored = await world.stored(consent)
        kinds = {secret.kind for secret in (await world.store.secrets(consent.id)).secrets}
        assert got == Refusal(reason="AUTHORISATION_FAILED")
        assert stored.state is ConsentState.FAILED
        assert not kinds & {SecretKind.ACCESS_TOKEN, SecretKind.REFRESH_TOKEN}
        assert world.bank.count("token") == 1

    run(test)


# --- revocation


def test_bi_d13_refresh_while_it_is_refreshed() -> None:
    """Fifty calls that need a new token at once: one refresh."""

    async def test() -> None:
        world = World(token_seconds=1200)
        consent = await world.consent()
        world.clock.advance(700)

        await asyncio.gather(*(world.core.tokens.access(consent) for _ in range(50)))

        assert world.bank.refreshes == 1

    run(test)


def _revoke(of: Consent, /, **changes: Any) -> pb.RevokeConsentRequest:
    values = {"consent": f"consents/{of.id}", "owner": of.owner, "request_id": request_id(), **changes}
    return pb.RevokeConsentRequest(**values)


def test_bi_d19_revoked_twice() -> None:
    """The same answer, one entry, and the bank is told once."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        consent = await world.consent()

        answers = [await front.send(pb.RevokeConsentRequest, "RevokeConsent", _revoke(consent)) for _ in range(3)]

        assert {got.consent.state for got in answers} == {C.STATE_REVOKED}
        assert world.events().count(AuditEvent.CONSENT_REVOKED) == 1
        assert world.bank.count("end") == world.bank.count("revoke") == 1

    run(test)


@pytest.mark.parametrize("at", ["prepare", "send"])
def test_bi_d20_revoked_while_a_payment_is_in_flight(at: str) -> None:
    """Before the dispatch record nothing goes out any more; after it the payment has its outcome, and the revocation is answered
    when nothing can leave any more."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        consent = await world.consent()
        revocations: list[asyncio.Task[Any]] = []

        async def revokes() -> None:
            world.core.egress.gates.clear()
            revocations.append(
                asyncio.ensure_future(front.send(pb.RevokeConsentRequest, "RevokeConsent", _revoke(consent)))
            )
            for _ in range(20):
                await asyncio.sleep(0)
            assert world.store._state.consents[consent.id].state is ConsentState.REVOKED
            assert revocations[0].done() == (at == "prepare")

        world.core.egress.gates[at] = revokes
        got = await front.pay(payment_message_for(consent))

        assert (await revocations[0]).consent.state == C.STATE_REVOKED
        if at == "prepare":
            assert got == Refusal(reason="CONSENT_REVOKED")
            assert world.bank.count("initiate") == 0
        else:
            assert got.payment.state in (payment_pb2.Payment.STATE_SETTLED, payment_pb2.Payment.STATE_UNKNOWN)
            assert world.bank.count("initiate") == 1

    run(test)


REVOCATIONS: dict[str, tuple[Changes, str]] = {
    "bi_D21_unknown": ({"consent": "consents/c-unknown"}, "CONSENT_NOT_FOUND"),
    "bi_D21_another_owners": ({"owner": "owner-2"}, "CONSENT_NOT_FOUND"),
    "bi_D21_no_owner": ({"owner": ""}, "FIELD_INVALID"),
    "bi_D21_no_request_id": ({"request_id": ""}, "FIELD_INVALID"),
}


@pytest.mark.parametrize(("changes", "reason"), REVOCATIONS.values(), ids=REVOCATIONS.keys())
def test_a_revocation_of_what_is_not_ones_own(changes: Changes, reason: str) -> None:
    """Refused as what does not exist; the consent stays."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        consent = await world.consent()
        before = front.written()

        got = await front.send(pb.RevokeConsentRequest, "RevokeConsent", _revoke(consent, **changes))

        assert isinstance(got, Refusal)
        assert got.reason == reason
        assert front.written() is before

    run(test)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_bi_d22_the_bank_cannot_be_told(status: int) -> None:
    """Unusable here at once; the bank is told later, and only then is the key destroyed."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        consent = await world.consent()
        world.bank.script["end"] = [error(status, "X_Y")]

        got = await front.send(pb.RevokeConsentRequest, "RevokeConsent", _revoke(consent))
        refused = await front.pay(payment_message_for(consent))
        kept = (await world.stored(consent)).wrapped_data_key
        world.clock.advance(61)
        await world.core.consents.finish_ended()

        assert got.consent.state == C.STATE_REVOKED
        assert refused == Refusal(reason="CONSENT_REVOKED")
        assert kept
        assert not (await world.stored(consent)).wrapped_data_key
        assert world.bank.consents["bank-consent-0"] == "terminatedByTpp"

    run(test)


def test_bi_d30_ended_with_an_open_payment() -> None:
    """The payment stays, as the record of money; without the consent's token it cannot be followed, and its unknown outcome is a
    human's to find out."""

    async def test() -> None:
        world = World(name="sandbox-bank-idempotent", token_seconds=None)
        front = Front(world=world)
        consent = await world.consent(life_seconds=100_000)
        world.bank.script["initiate"] = [Unknown(code="ANSWER_TIMEOUT")]
        got = await front.pay(payment_message_for(consent))
        await front.send(pb.RevokeConsentRequest, "RevokeConsent", _revoke(consent))
        for _ in range(6):
            world.clock.advance(10)
            await world.core.reconciler.run_due()

        (payment,) = world.store._state.payments.values()
        assert got.payment.state == payment_pb2.Payment.STATE_UNKNOWN
        assert payment.state.value == "needs-attention"
        assert world.bank.count("initiate") == 1

    run(test)


# --- reading


async def _listed(front: Front, **changes: Any) -> Any:
    return await front.send(
        pb.ListConsentsRequest, "ListConsents", pb.ListConsentsRequest(**{"owner": OWNER, **changes})
    )


@pytest.mark.parametrize("what", ["caller", "owner", "provider"])
def test_bi_d23_what_is_not_ones_own_does_not_exist(what: str) -> None:
    """GetConsent of another caller's, owner's or provider's consent is answered exactly as for one that is not there."""

    async def test() -> None:
        world = World()
        consent = await world.consent()
        who = {
            "caller": caller(WorkloadId("workload:other")),
            "owner": caller(),
            "provider": caller(providers=frozenset()),
        }[what]
        owner = "owner-2" if what == "owner" else OWNER
        front = Front(world=world, caller=who)

        hidden = await front.send(
            pb.GetConsentRequest, "GetConsent", pb.GetConsentRequest(consent=f"consents/{consent.id}", owner=owner)
        )
        missing = await front.send(
            pb.GetConsentRequest, "GetConsent", pb.GetConsentRequest(consent="consents/c-unknown", owner=owner)
        )

        assert hidden == missing == Refusal(reason="CONSENT_NOT_FOUND")

    run(test)


PAGES: dict[str, tuple[Changes, str]] = {
    "bi_D24_negative": ({"page_size": -1}, "page_size"),
    "bi_D24_least": ({"page_size": -(2**31)}, "page_size"),
    "bi_D25_forged": ({"page_token": "Zm9yZ2Vk"}, "page_token"),
    "bi_D25_of_payments": ({"page_token": "cGF5bWVudHMvcC0x"}, "page_token"),
    "bi_D25_truncated": ({"page_token": "Y29uc2VudHM"}, "page_token"),
    "bi_D25_no_base64": ({"page_token": "A"}, "page_token"),
    "bi_D25_with_a_line": ({"page_token": "Y29uc2VudHMvYw\n"}, "page_token"),
    "bi_D25_513_characters": ({"page_token": "a" * 513}, "page_token"),
    "bi_D27_wildcard_owner": ({"owner": "%"}, "owner"),
    "bi_D27_star_owner": ({"owner": "*"}, "owner"),
    "bi_D27_sql_owner": ({"owner": "owner-1' OR '1'='1"}, "owner"),
    "bi_D27_no_owner": ({"owner": ""}, "owner"),
}


@pytest.mark.parametrize(("changes", "named"), PAGES.values(), ids=PAGES.keys())
def test_a_list_that_is_asked_for_wrongly(changes: Changes, named: str) -> None:
    """Refused with the field."""

    async def test() -> None:
        world = World()
        await world.consent()

        got = await _listed(Front(world=world), **changes)

        assert isinstance(got, Refusal)
        assert named in got.fields

    run(test)


@pytest.mark.parametrize("size", [0, 10**9, 2**31 - 1])
def test_bi_d24_no_page_size_is_no_way_around(size: int) -> None:
    """0 is the default and 10^9 the largest page, and both hold only what is the caller's own (Vault took `limit=0` for all)."""

    async def test() -> None:
        world = World()
        mine = [await world.consent() for _ in range(3)]
        await world.consent(owner="owner-2")
        await world.consent(caller=WorkloadId("workload:other"))

        got = await _listed(Front(world=world), page_size=size)

        assert sorted(item.name for item in got.consents) == sorted(f"consents/{one.id}" for one in mine)

    run(test)


def test_bi_d26_rows_change_while_they_are_listed() -> None:
    """Every consent that is there all the time is listed exactly once, whatever else comes and changes between two pages."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        there = set()
        for _ in range(9):
            world.clock.advance(1)
            there.add(f"consents/{(await world.consent()).id}")
        seen: list[str] = []
        token = ""
        while True:
            page = await _listed(front, page_size=2, page_token=token)
            seen += [item.name for item in page.consents]
            world.clock.advance(1)
            await world.consent()
            token = page.next_page_token
            if not token:
                break

        assert len(seen) == len(set(seen))
        assert there <= set(seen)

    run(test)


async def _get_payment(front: Front, name: str, owner: str = OWNER) -> Any:
    return await front.send(
        payment_pb2.GetPaymentRequest, "GetPayment", payment_pb2.GetPaymentRequest(payment=name, owner=owner)
    )


def test_bi_d28_the_payment_of_another_tenant() -> None:
    """As one that does not exist, for another owner and for another workload."""

    async def test() -> None:
        world = World()
        made = (await Front(world=world).pay(payment_message_for(await world.consent()))).payment.name
        other = Front(world=world, caller=caller(WorkloadId("workload:other")))

        answers = [
            await _get_payment(Front(world=world), made, "owner-2"),
            await _get_payment(other, made),
            await _get_payment(other, "payments/p-unknown"),
        ]

        assert answers == [Refusal(reason="PAYMENT_NOT_FOUND")] * 3

    run(test)


def test_bi_d29_a_status_that_is_asked_for_a_thousand_times() -> None:
    """The bank is asked at the descriptor's pace, by GET; nothing is ever posted again."""

    async def test() -> None:
        world = World(initial_status="ACTC")
        front = Front(world=world)
        made = (await front.pay(payment_message_for(await world.consent()))).payment
        for _ in range(1000):
            world.clock.advance(0.001)
            await _get_payment(front, made.name)

        assert made.state == payment_pb2.Payment.STATE_ACCEPTED
        assert world.bank.count("status") <= 2
        assert world.bank.count("initiate") == 1

    run(test)


IMPORTS: dict[str, tuple[Changes, str]] = {
    "bi_D1_nothing_sealed": ({"sealed_tokens": b""}, "sealed_tokens"),
    "bi_D1_64_kilobytes_and_one": ({"sealed_tokens": bytes(65_537)}, "sealed_tokens"),
    "bi_D1_noise": ({"sealed_tokens": bytes(200)}, "sealed_tokens"),
    "bi_D4_access_time_missing": ({"access_expire_time": None}, "access_expire_time"),
    "bi_D2_consent_id_with_line": ({"provider_consent_id": "a\r\nb"}, "provider_consent_id"),
}


@pytest.mark.parametrize(("changes", "named"), IMPORTS.values(), ids=IMPORTS.keys())
def test_a_wrong_import_is_refused(changes: Changes, named: str) -> None:
    """No active consent comes of it, and nothing is sent anywhere."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        key = await world.core.egress.import_key()
        base = consent_message_for(world)
        values: Changes = {
            "owner": base.owner, "provider": base.provider, "purposes": list(base.purposes), "expire_time": base.expire_time,
            "access_expire_time": _time(world, 600), "import_key_id": key.key_id, "sealed_tokens": bytes(200), "request_id": request_id(), **changes,
        }  # fmt: skip
        message = pb.ImportConsentRequest(**{name: value for name, value in values.items() if value is not None})

        got = await front.send(pb.ImportConsentRequest, "ImportConsent", message)

        assert isinstance(got, Refusal)
        assert named in got.fields
        assert not [row for row in world.store._state.consents.values() if row.state is ConsentState.ACTIVE]
        assert front.sent() == 0

    run(test)


def test_bi_d7_one_request_id_for_two_imports() -> None:
    """Another ciphertext under the same request id is another request: refused, and the first consent stands."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        message = consent_message_for(world)
        first = await front.send(pb.CreateConsentRequest, "CreateConsent", message)
        message.purposes.pop()

        again = await front.send(pb.CreateConsentRequest, "CreateConsent", message)

        assert first.consent.state == C.STATE_AWAITING_AUTHORISATION
        assert again == Refusal(reason="REQUEST_ID_REUSED")

    run(test)


def _with_scope(scope: str) -> Callable[[Answer], Answer]:
    def twist(got: Answer) -> Answer:
        return answer(200, {**json.loads(got.body), "scope": scope})

    return twist


def test_bi_d5_a_scope_that_is_narrower_or_wider_is_not_looked_at() -> None:
    """What the provider lets the token do is the provider's; what the sidecar does with it is what the owner consented to."""

    async def test() -> None:
        for scope in ("AIS:other", "PIS AIS:x admin"):
            world = World()
            consent, state = await created(world)
            world.bank.authorise("code-1")
            world.bank.script["token"] = [_with_scope(scope)]
            message = _complete(consent, {"state": state, "iss": "https://issuer.bank.example", "code": "code-1"})

            got = await Front(world=world).send(pb.CompleteConsentRequest, "CompleteConsent", message)

            assert got.consent.state == C.STATE_ACTIVE
            assert list(got.consent.purposes) == [1, 4]

    run(test)
