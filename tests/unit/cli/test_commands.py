"""What the commands that ask a sidecar write, and how they end. JSON is a contract: golden files hold it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml
from custody import ErrorReason, Money
from custody.testing import FakeCustody
from custody.values import ConsentState, PaymentState
from google.protobuf.message import Message

from sidecar.cli import consents, payments
from sidecar.cli.session import Session
from tests.unit.cli.support import (
    AUSTRIAN_IBAN,
    GERMAN_IBAN,
    ToldSidecar,
    assert_golden,
    good_status,
    run,
    sandbox,
    session_of,
    some_keys,
    some_token,
)


def told(**changes: Any) -> Session:
    return session_of(ToldSidecar(status_now=good_status(**changes), keys_now=some_keys()))


# --- status ---------------------------------------------------------------------------------------------------------------


def test_status_of_a_sidecar_that_is_well() -> None:
    """Exit status 0; the document is the contract's."""
    counts = {ConsentState.ACTIVE: 7, ConsentState.REVOKED: 2}
    ran = run("--format", "json", "status", session=told(consent_counts=counts))

    assert ran.code == 0
    assert_golden("status.json", ran.out)


@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({"ready": False}, "the sidecar is not ready"),
        ({"hsm_token": None}, "the HSM token is not logged in"),
        ({"hsm_token": some_token(logged_in=False)}, "the HSM token is not logged in"),
        ({"hsm_token": some_token(user_pin_count_low=True)}, "a wrong user PIN was given since the last right one"),
        ({"hsm_token": some_token(user_pin_final_try=True)}, "one more wrong user PIN locks the token"),
        ({"hsm_token": some_token(user_pin_locked=True)}, "the token's user PIN is locked"),
        ({"master_key": "", "master_key_version": 0}, "there is no master key"),
        (
            {"processes": (replace(good_status().processes[2], state="RESTARTING"),)},
            "the process hsm is RESTARTING",
        ),
    ],
)
def test_status_3_tells_what_needs_attention(changes: dict[str, Any], attention: str) -> None:
    """Each thing that is not well ends in exit status 3 and is named, for people and for scripts."""
    table = run("status", session=told(**changes))
    document = run("--format", "json", "status", session=told(**changes)).document()

    assert table.code == 3
    assert attention in table.out
    assert document["verdict"] == "degraded"
    assert document["degradations"] == [attention]


def test_a_table_tells_how_far_away_a_time_is() -> None:
    """Times stand in RFC 3339 and relative to now."""
    ran = run("status", session=told())

    assert "2026-11-22T06:00:00Z (1 d ago)" in ran.out
    assert "2026-11-23T07:59:59Z (1 s ago)" in ran.out


def test_yaml_says_the_same_as_json() -> None:
    """Both formats carry one document."""
    as_json = run("--format", "json", "status", session=told()).document()
    as_yaml = yaml.safe_load(run("--format", "yaml", "status", session=told()).out)

    assert as_yaml == as_json


# --- keys -----------------------------------------------------------------------------------------------------------------


def test_keys_are_listed() -> None:
    """Every key with its attributes, and no secret, since none is in the answer."""
    ran = run("--format", "json", "key", "list", session=told())

    assert ran.code == 0
    assert_golden("keys.json", ran.out)


def test_one_key_is_shown_with_its_address_for_other_tools() -> None:
    """The URI (RFC 7512) names token, serial, object and id, escaped."""
    ran = run("--format", "json", "key", "show", "root/2026-11", session=told())

    assert ran.code == 0
    assert ran.document()["uri"].startswith(
        "pkcs11:token=custody%20blue;serial=1a2b3c4d;object=root%2F2026-11;id=%00%11%22"
    )
    assert ran.document()["uri"].endswith(";type=secret-key")
    assert_golden("key.json", ran.out)


@pytest.mark.parametrize("wanted", ["keys/0102", "0102", "audit/2026-11"])
def test_a_key_is_found_by_name_id_or_label(wanted: str) -> None:
    """All three show the same key."""
    ran = run("key", "show", wanted, session=told())

    assert ran.code == 0
    assert "audit/2026-11" in ran.out


def test_a_master_key_has_no_address_in_the_token() -> None:
    """It is no object of the HSM, so no tool could find it there."""
    document = run("--format", "json", "key", "show", "master/3", session=told()).document()

    assert document["uri"] is None


def test_the_public_half_alone_is_a_pem_file() -> None:
    """What verify takes; a secret key has none, and says so."""
    public = run("key", "show", "audit/2026-11", "--pem", session=told())
    secret = run("key", "show", "root/2026-11", "--pem", session=told())

    assert public.out == "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n"
    assert secret.code == 1
    assert secret.out == ""
    assert "has no public half" in secret.err


def test_a_key_that_is_not_there_or_not_unique_is_refused() -> None:
    """bi_E16: none, or two, is an error that says how to go on."""
    keys = (*some_keys(), replace(some_keys()[1], name="keys/0304"))
    doubled = session_of(ToldSidecar(status_now=good_status(), keys_now=keys))

    nothing = run("key", "show", "nope", session=told())
    two = run("key", "show", "audit/2026-11", session=doubled)

    assert (nothing.code, two.code) == (1, 1)
    assert "no key has this name" in nothing.err
    assert "more than one key has this name" in two.err
    assert "custodyctl key list" in two.err


# --- consents -------------------------------------------------------------------------------------------------------------


def test_consents_are_listed_newest_first() -> None:
    """Of every owner; the document is the contract's."""
    fake, names = sandbox()
    ran = run("--format", "json", "consent", "list", session=session_of(fake))

    assert [each["name"] for each in ran.document()["consents"]] == names[::-1]
    assert_golden("consents.json", ran.out)


def test_a_list_shows_no_account_and_no_name_of_a_person() -> None:
    """What scrolls by on a screen names nobody."""
    fake, _ = sandbox()
    listed = run("consent", "list", session=session_of(fake)).out + run("payment", "list", session=session_of(fake)).out

    assert AUSTRIAN_IBAN not in listed
    assert GERMAN_IBAN not in listed
    assert "Huber" not in listed


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["--state", "ACTIVE"], [0]),
        (["--state", "awaiting_authorisation"], [1]),
        (["--state", "REVOKED"], [2]),
        (["--owner", "user:42"], [2, 1, 0]),
        (["--owner", "user:43"], []),
        (["--provider", "fake-bank"], [2, 1, 0]),
        (["--provider", "providers/other"], []),
        (["--limit", "2"], [2, 1]),
    ],
)
def test_consents_are_filtered(filters: list[str], expected: list[int]) -> None:
    """By state, owner, provider; cut off by --limit, which says so."""
    fake, names = sandbox()
    document = run("--format", "json", "consent", "list", *filters, session=session_of(fake)).document()

    assert [each["name"] for each in document["consents"]] == [names[index] for index in expected]
    assert document["more"] is ("--limit" in filters)


def test_the_states_to_filter_by_are_those_of_the_client() -> None:
    """The lists are written out so that help need not load the client; none may be missing."""
    assert set(consents.STATES) == {state.value for state in ConsentState} - {"UNRECOGNISED"}
    assert set(payments.STATES) == {state.value for state in PaymentState} - {"UNRECOGNISED"}


def test_one_consent_is_shown() -> None:
    """By its name or its bare id."""
    fake, names = sandbox()
    by_name = run("--format", "json", "consent", "show", names[0], session=session_of(fake))
    by_id = run("--format", "json", "consent", "show", names[0].removeprefix("consents/"), session=session_of(fake))

    assert by_name.out == by_id.out
    assert_golden("consent.json", by_name.out)


def test_a_consent_that_is_not_there() -> None:
    """Exit status 1, with the contract's reason and what to do."""
    ran = run("consent", "show", "nope", session=session_of(FakeCustody()))

    assert ran.code == 1
    assert ran.out == ""
    assert "CONSENT_NOT_FOUND" in ran.err or "FIELD_INVALID" in ran.err


def test_revoking_asks_for_the_name_and_ends_the_consent() -> None:
    """Only the typed name goes on; what becomes permanent is said first."""
    fake, names = sandbox()
    session = session_of(fake, can_ask=lambda: True)
    ran = run("consent", "revoke", names[0], session=session, typed=f"{names[0]}\n")

    assert ran.code == 0, ran.err
    assert "destroys its key" in ran.err
    assert fake.client().consents.get(names[0]).state is ConsentState.REVOKED


@pytest.mark.parametrize("typed", ["", "\n", "yes\n", "consents/other\n"])
def test_anything_else_typed_changes_nothing(typed: str) -> None:
    """Not y, not an empty line, not the end of the input."""
    fake, names = sandbox()
    ran = run("consent", "revoke", names[0], session=session_of(fake, can_ask=lambda: True), typed=typed)

    assert ran.code == 1
    assert "nothing was changed" in ran.err
    assert fake.client().consents.get(names[0]).state is ConsentState.ACTIVE


@pytest.mark.parametrize(("options", "can_ask"), [([], False), (["--no-input"], True)])
def test_bi_e7_where_nobody_can_be_asked_nothing_is_done(options: list[str], can_ask: bool) -> None:
    """Without a terminal, or with --no-input, --yes is needed; an answer on standard input does not count."""
    fake, names = sandbox()
    session = session_of(fake, can_ask=lambda: can_ask)
    ran = run(*options, "consent", "revoke", names[0], session=session, typed=f"{names[0]}\n")

    assert ran.code == 2
    assert "--yes" in ran.err
    assert fake.client().consents.get(names[0]).state is ConsentState.ACTIVE


def test_yes_answers_the_question() -> None:
    """Before the command or behind it; a second time does no harm."""
    fake, names = sandbox()
    first = run("--yes", "consent", "revoke", names[0], session=session_of(fake))
    second = run("consent", "revoke", names[0], "--yes", session=session_of(fake))

    assert (first.code, second.code) == (0, 0)
    assert fake.client().consents.get(names[0]).state is ConsentState.REVOKED


class Spy:
    """A transport's memory: which methods were called."""

    def __init__(self, fake: FakeCustody) -> None:
        self.methods: list[str] = []
        self._invoke = fake.invoke
        fake.invoke = self.invoke  # type: ignore[method-assign]

    def invoke(self, method: str, request: Message) -> Message:
        self.methods.append(method)
        return self._invoke(method, request)


def test_bi_e30_a_dry_run_only_reads() -> None:
    """It shows the consent and says what would happen; no method that changes anything is called, --yes or not."""
    fake, names = sandbox()
    spy = Spy(fake)
    living = run("--yes", "consent", "revoke", names[0], "--dry-run", session=session_of(fake))
    ended = run("consent", "revoke", names[2], "--dry-run", session=session_of(fake))

    assert spy.methods == ["ConsentService.GetConsent"] * 2
    assert (living.code, ended.code) == (0, 0)
    assert "would be revoked" in living.err
    assert "nothing would change" in ended.err


# --- payments -------------------------------------------------------------------------------------------------------------


def test_payments_are_listed() -> None:
    """Newest first; the document is the contract's."""
    fake, _ = sandbox()
    ran = run("--format", "json", "payment", "list", session=session_of(fake))

    assert [each["amount"]["amount"] for each in ran.document()["payments"]] == ["99.00", "12.34"]
    assert_golden("payments.json", ran.out)


def test_payments_are_filtered() -> None:
    """By consent and state."""
    fake, names = sandbox()
    unknown = run("--format", "json", "payment", "list", "--state", "UNKNOWN", session=session_of(fake)).document()
    other = run("--format", "json", "payment", "list", "--consent", names[1], session=session_of(fake)).document()

    assert [each["state"] for each in unknown["payments"]] == ["UNKNOWN"]
    assert other["payments"] == []


def test_an_unknown_payment_is_never_shown_as_failed() -> None:
    """UNKNOWN stays UNKNOWN, with the warning not to pay again."""
    fake, _ = sandbox()
    listed = run("--format", "json", "payment", "list", "--state", "UNKNOWN", session=session_of(fake)).document()
    ran = run("payment", "show", listed["payments"][0]["name"], session=session_of(fake))

    assert ran.code == 0
    assert "UNKNOWN" in ran.out
    assert "FAILED" not in ran.out
    assert "Never have it paid again" in ran.err


def test_one_payment_is_shown() -> None:
    """The document is the contract's; the address where its person authorises it is not in it."""
    fake, _ = sandbox()
    name = run("--format", "json", "payment", "list", session=session_of(fake)).document()["payments"][0]["name"]
    ran = run("--format", "json", "payment", "show", name, session=session_of(fake))

    assert "authorisation_uri" not in ran.document()
    assert_golden("payment.json", ran.out)


def test_states_are_written_in_either_way() -> None:
    """As the contract writes them, or in lower case with dashes; another word is wrong usage."""
    fake, _ = needing_attention()
    for state in ("NEEDS_ATTENTION", "needs-attention", "needs_attention"):
        ran = run("--format", "json", "payment", "list", "--state", state, session=session_of(fake))
        assert [each["state"] for each in ran.document()["payments"]] == ["NEEDS_ATTENTION"], state

    assert run("payment", "list", "--state", "lost", session=session_of(fake)).code == 2


def needing_attention() -> tuple[FakeCustody, str]:
    """A sidecar with one payment that a person has to find out; its name."""
    fake, names = sandbox()
    fake.script_payments(PaymentState.NEEDS_ATTENTION)
    payment = fake.client(owner="user:42").payments.initiate(
        names[0], amount=Money("7.00", "EUR"), creditor_account=GERMAN_IBAN, creditor_name="Blumen Huber"
    )
    return fake, payment.name


def resolving(name: str, finding: str = "not-executed", reason: str = "asked the bank, ticket 17") -> list[str]:
    return ["payment", "resolve", name, "--finding", finding, "--reason", reason]


@pytest.mark.parametrize(
    ("finding", "state"), [("executed", PaymentState.SETTLED), ("not-executed", PaymentState.REJECTED)]
)
def test_a_finding_is_written_down(finding: str, state: PaymentState) -> None:
    """The payment is shown before the question, the name is typed, and the answer shows who found out what."""
    fake, name = needing_attention()
    session = session_of(fake, can_ask=lambda: True)
    ran = run(*resolving(name, finding), session=session, typed=f"{name}\n")

    assert ran.code == 0, ran.err
    assert "7.00 EUR" in ran.err.partition("Type payments/")[0]
    assert GERMAN_IBAN in ran.err.partition("Type payments/")[0]
    assert "asked the bank, ticket 17" in ran.out
    assert f"{name} is {state.value}" in ran.err
    assert fake.client().payments.get(name).state is state


def test_the_document_of_a_finding() -> None:
    """The document is the contract's; --yes asks nobody."""
    fake, name = needing_attention()
    ran = run("--format", "json", "--yes", *resolving(name), session=session_of(fake))

    assert ran.document()["resolution"]["finding"] == "NOT_EXECUTED"
    assert_golden("payment-resolved.json", ran.out)


@pytest.mark.parametrize(
    ("options", "can_ask", "typed", "code"),
    [([], True, "yes\n", 1), ([], True, "", 1), ([], False, "", 2), (["--no-input"], True, "", 2)],
)
def test_without_a_confirmation_nothing_is_found(options: list[str], *, can_ask: bool, typed: str, code: int) -> None:
    """Something else typed, nobody to be asked: the payment still needs attention, and no call was made that changes it."""
    fake, name = needing_attention()
    spy = Spy(fake)
    ran = run(*options, *resolving(name), session=session_of(fake, can_ask=lambda: can_ask), typed=typed)

    assert ran.code == code
    assert set(spy.methods) == {"PaymentService.GetPayment"}


def test_only_what_needs_attention_is_resolved() -> None:
    """Any other state, also after a first resolution: exit status 1, and the state."""
    fake, name = needing_attention()
    unknown = run("--format", "json", "payment", "list", "--state", "unknown", session=session_of(fake)).document()
    first = run("--yes", *resolving(name), session=session_of(fake))
    second = run("--yes", *resolving(name, "executed"), session=session_of(fake))
    other = run("--yes", *resolving(unknown["payments"][0]["name"]), session=session_of(fake))

    assert (first.code, second.code, other.code) == (0, 1, 1)
    assert "is REJECTED" in second.err
    assert "is UNKNOWN" in other.err
    assert fake.client().payments.get(name).state is PaymentState.REJECTED


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (["--finding", "settled"], 2),
        (["--finding", "executed", "--reason", ""], 2),
        (["--reason", "x"], 2),
        (["--finding", "executed"], 2),
        (["--finding", "executed", "--reason", "a\nb"], 1),
        (["--finding", "executed", "--reason", "x" * 501], 1),
    ],
)
def test_a_finding_needs_words_and_one_of_two(change: list[str], code: int) -> None:
    """A finding that there is not, and words that are missing, too long or no plain text: nothing is resolved."""
    fake, name = needing_attention()
    ran = run("--yes", "payment", "resolve", name, *change, session=session_of(fake))

    assert ran.code == code, ran.err
    assert fake.client().payments.get(name).state is PaymentState.NEEDS_ATTENTION


# --- the log --------------------------------------------------------------------------------------------------------------


def test_the_last_entries_are_shown_oldest_first() -> None:
    """As JSON, a line for each; the document is the contract's."""
    fake, _ = sandbox()
    ran = run("--format", "json", "audit", "tail", "-n", "3", session=session_of(fake))
    entries = [json.loads(line) for line in ran.out.splitlines()]

    assert [entry["event"] for entry in entries] == ["CONSENT_REVOKED", "PAYMENT_DISPATCHED", "PAYMENT_DISPATCHED"]
    assert_golden("audit-entries.jsonl", ran.out)


def test_the_log_is_filtered_by_consent_and_payment() -> None:
    """With the full name or the bare id."""
    fake, names = sandbox()
    ran = run(
        "--format", "json", "audit", "tail", "--consent", names[2].removeprefix("consents/"), session=session_of(fake)
    )

    assert {json.loads(line)["consent"] for line in ran.out.splitlines()} == {names[2]}


def test_following_shows_each_new_entry_once_and_ends_with_ctrl_c() -> None:
    """New entries appear as they come, in order; Ctrl-C is exit status 130."""
    fake, names = sandbox()
    rounds: Iterator[Callable[[], object]] = iter([lambda: fake.client().consents.revoke(names[1]), lambda: None])

    def sleep(_seconds: float) -> None:
        try:
            next(rounds)()
        except StopIteration:
            raise KeyboardInterrupt from None

    ran = run("--format", "json", "audit", "tail", "-f", "-n", "1", session=session_of(fake, sleep=sleep))
    entries = [json.loads(line) for line in ran.out.splitlines()]

    assert ran.code == 130
    assert [entry["event"] for entry in entries] == ["PAYMENT_DISPATCHED", "CONSENT_REVOKED"]
    assert entries[1]["index"] == entries[0]["index"] + 1


def test_following_from_now_on_shows_nothing_of_before() -> None:
    """-n 0 -f starts behind the last entry."""
    fake, names = sandbox()
    rounds = iter([lambda: fake.client().consents.revoke(names[1])])

    def sleep(_seconds: float) -> None:
        try:
            next(rounds)()
        except StopIteration:
            raise KeyboardInterrupt from None

    ran = run("--format", "json", "audit", "tail", "-f", "-n", "0", session=session_of(fake, sleep=sleep))

    assert [json.loads(line)["event"] for line in ran.out.splitlines()] == ["CONSENT_REVOKED"]


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (ErrorReason.HSM_UNAVAILABLE, 5),
        (ErrorReason.STORE_UNAVAILABLE, 1),
        (ErrorReason.METHOD_NOT_ALLOWED, 1),
        (ErrorReason.INTERNAL, 1),
    ],
)
def test_an_error_of_the_sidecar_is_words_and_an_exit_code(reason: ErrorReason, code: int) -> None:
    """One line with the reason, one with advice; nothing on standard output, no traceback."""
    fake = FakeCustody()
    fake.fail_next(reason, times=9)
    ran = run("key", "list", session=session_of(fake))

    assert ran.code == code
    assert ran.out == ""
    assert reason in ran.err
    assert "advice:" in ran.err
    assert "Traceback" not in ran.err
