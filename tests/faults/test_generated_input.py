# ruff: noqa: E501 (the tables: one line each)
"""Thousands of generated cases against the pure parts: requests, answers of banks, answers of token endpoints.

Each case is a right input with something random done to it, from a seed that is printed. Nothing may crash; and what is accepted is
accepted by a second, independent judgement too, which is written out here and shares no code with the product.
"""

import json
import random
import re
from collections.abc import Callable
from email.message import Message as Mail
from typing import Any

import pytest
from custody.v1 import payment_pb2

from sidecar.connectors.base import InitiationAccepted, InitiationReading, InitiationRefused
from sidecar.domain.provider import Answer, TokenGrant
from sidecar.egress.answers import AnswerReader, BadAnswer, BytesSink
from sidecar.egress.codes import UNKNOWN_CODES
from tests.faults.extent import everything, seed
from tests.faults.front import Front, Refusal, payment_message_for, run
from tests.faults.test_bad_consents import grant, outcome_of
from tests.unit.connectors.support import CALL
from tests.unit.custody.support import World, connector

Record = Callable[[str, object], None]
REQUESTS, ANSWERS, TOKENS = 2500, 4000, 2500
BATCH = 500  # payments at one fake store, which copies what it holds


def _count(ordinary: int) -> int:
    return 10 * ordinary if everything() else ordinary


# --- requests

NASTY = [
    "", " ", "\0", "\n", "a\r\nX: y", "\u202e", "\u200b", "\uff11", "'; DROP TABLE payments; --", "../..", "%00", "${x}", "{}", "[]", "NaN", "-1", "1e9", "0",
    "A" * 35, "A" * 36, "A" * 70, "A" * 71, "A" * 141, "DE02120300000000202051", "DE40100100103307118608", "GB82WEST12345698765432", "DE00", "EUR", "eur", "JPY",
    "consents/x", "payments/x", "consents/", "a/b", "a//b", "/a", "a/", "é", "ＡＢ", "x\x7f", "owner-1", "owner-2", "Example Shop",
]  # fmt: skip
NUMBERS = [
    0,
    1,
    -1,
    2,
    12,
    999_999,
    10_000,
    10_001,
    2**31 - 1,
    -(2**31),
    2**63 - 1,
    -(2**63),
    10**14,
    10_000_000,
    500_000_000,
    999_000_000,
    1_000_000,
]


def _mutate_message(message: Any, chance: random.Random) -> None:
    """One field of the message or of one in it, set to something."""
    fields = message.DESCRIPTOR.fields
    field = chance.choice(fields)
    if field.message_type is not None:
        inner = getattr(message, field.name)
        if chance.random() < 0.2:
            message.ClearField(field.name)
        else:
            _mutate_message(inner, chance)
            inner.SetInParent()
    elif field.type == field.TYPE_STRING:
        old = getattr(message, field.name)
        setattr(
            message,
            field.name,
            chance.choice([*NASTY, old + chance.choice(NASTY), old[:-1], old.upper(), old.lower(), old[::-1]]),
        )
    elif field.enum_type is not None:
        setattr(message, field.name, chance.choice([0, 1, 2, 3, 99, -1]))
    else:
        number = chance.choice(NUMBERS)
        low, high = (-(2**31), 2**31 - 1) if field.cpp_type == field.CPPTYPE_INT32 else (-(2**63), 2**63 - 1)
        setattr(message, field.name, min(max(number, low), high))


def _mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    content = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        position = chance.randrange(len(content) + 1)
        match chance.randrange(4):
            case 0:
                content[position : position + 1] = bytes([chance.randrange(256)])
            case 1:
                content[position:position] = chance.randbytes(chance.randint(1, 4))
            case 2:
                del content[position : position + chance.randint(1, 4)]
            case _:
                content[position:position] = content[: chance.randint(0, len(content))]
    return bytes(content)


_SEPA = re.compile(r"[A-Za-z0-9/?:().,'+\- ]+")


def _iban_is_right(iban: str) -> bool:
    """ISO 13616: two letters, two digits, and the remainder by 97 is 1."""
    if not re.fullmatch(r"[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}", iban):
        return False
    digits = "".join(str(int(character, 36)) for character in iban[4:] + iban[:4])
    return int(digits) % 97 == 1


def _sepa_is_right(text: str, longest: int, *, shortest: int = 0) -> bool:
    if not shortest <= len(text) <= longest:
        return False
    return not text or bool(
        _SEPA.fullmatch(text)
        and text == text.strip()
        and not text.startswith("/")
        and not text.endswith("/")
        and "//" not in text
    )


def _is_right(message: Any, consent_name: str) -> bool:
    """Whether a person who knows the rules would let this payment pass."""
    amount = message.amount
    cents = amount.units * 100 + amount.nanos // 10_000_000
    return bool(
        message.consent == consent_name
        and message.owner == "owner-1"
        and re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", message.request_id)
        and amount.currency_code == "EUR"
        and amount.units >= 0
        and 0 <= amount.nanos < 10**9
        and amount.nanos % 10_000_000 == 0
        and 0 < cents <= 1_000_000
        and _iban_is_right(message.creditor_account.iban)
        and message.creditor_account.iban != "DE40100100103307118608"
        and message.creditor_account.currency_code in ("", "EUR", "USD", "JPY")
        and _sepa_is_right(message.creditor_name, 70, shortest=1)
        and _sepa_is_right(message.remittance_information, 140)
        and _sepa_is_right(message.end_to_end_id, 35)
        and " " not in message.end_to_end_id
        and message.product in (1, 2)
    )


def test_generated_payments(record_property: Record) -> None:
    """Refused with the state untouched, or accepted: then it is right by the second judgement, and what was stored is what was
    asked for."""
    chance = random.Random(seed())
    print(f"seed {seed()}")
    accepted = 0

    async def batch(count: int) -> None:
        nonlocal accepted
        world = World(token_seconds=None)
        consent = await world.consent(life_seconds=1_000_000)
        front = Front(world=world)
        for _ in range(count):
            message = payment_message_for(consent)
            for _ in range(chance.randint(0, 3)):
                _mutate_message(message, chance)
            data = message.SerializeToString()
            if chance.random() < 0.3:
                data = _mutate_bytes(data, chance)
            before, sent = front.written(), world.bank.count("initiate")

            answer = await front.pay(data)

            if isinstance(answer, Refusal):
                assert answer.reason != "INTERNAL", data
                assert front.written() is before, data
                assert world.bank.count("initiate") == sent, data
                continue
            accepted += 1
            asked = payment_pb2.InitiatePaymentRequest.FromString(data)
            assert _is_right(asked, f"consents/{consent.id}"), data
            got = answer.payment
            assert (got.amount, got.creditor_account, got.creditor_name) == (
                asked.amount,
                asked.creditor_account,
                asked.creditor_name,
            )
            assert (got.remittance_information, got.end_to_end_id, got.request_id) == (
                asked.remittance_information,
                asked.end_to_end_id,
                asked.request_id,
            )

    for _ in range(_count(REQUESTS) // BATCH):
        run(lambda: batch(BATCH))

    record_property("injected", _count(REQUESTS))
    assert _count(REQUESTS) / 20 < accepted < _count(REQUESTS) * 0.9  # both happen, or nothing was tried


# --- answers of a bank


def _right_answer(chance: random.Random) -> bytes:
    created = {
        "transactionStatus": chance.choice(["ACSC", "ACTC", "RCVD", "RJCT", "PDNG"]),
        "paymentId": "bank-1",
        "_links": {"scaRedirect": {"href": "https://issuer.bank.example/a"}},
    }
    refused = {"tppMessages": [{"category": "ERROR", "code": chance.choice(["FORMAT_ERROR", "PAYMENT_FAILED", "X_Y"])}]}
    status, document = chance.choice(
        [(201, created), (201, created), (400, refused), (403, refused), (500, refused), (409, refused)]
    )
    body = json.dumps(document).encode()
    head = f"HTTP/1.1 {status} Text\r\nContent-Type: application/json\r\nX-Request-ID: {CALL}\r\n".encode()
    if chance.random() < 0.2:
        return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _read(data: bytes, chance: random.Random) -> Answer | None:
    """As egress reads it, in random pieces; None for what it does not take."""
    sink = BytesSink()
    reader = AnswerReader(method="POST", max_answer_bytes=64 * 1024, sink=sink)
    try:
        position = 0
        while position < len(data):
            end = position + chance.randint(1, 80)
            reader.feed(memoryview(bytearray(data[position:end])))
            position = end
        if not reader.complete:
            reader.feed_end()
    except BadAnswer as bad:
        if bad.code not in UNKNOWN_CODES:
            raise
        return None
    return Answer(status=reader.status, headers=reader.headers, body=bytes(sink.body)) if reader.complete else None


def _judged_alike(data: bytes, reading: InitiationReading) -> bool:
    """A second reading of the bytes, by the standard library: whether a yes is one, or a listed no."""
    if not isinstance(reading, InitiationAccepted | InitiationRefused):
        return True
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    mail = Mail()
    for line in lines[1:]:
        name, _, value = line.partition(":")
        mail[name.strip()] = value.strip()
    if "chunked" in str(mail["transfer-encoding"]).lower():
        size = int(body.partition(b"\r\n")[0].split(b";")[0], 16)
        body = body.partition(b"\r\n")[2][:size]
    document = json.loads(body)
    status = int(lines[0].split(" ")[1])
    if str(mail["content-type"]).split(";")[0].strip().lower() not in ("application/json", "application/problem+json"):
        return False
    if any(value.lower() != CALL for value in mail.get_all("x-request-id", [])):
        return False
    if isinstance(reading, InitiationAccepted):
        return (
            status == 201
            and document["paymentId"] == reading.provider_payment_id
            and re.fullmatch(r"[A-Z]{4}", document["transactionStatus"]) is not None
        )
    codes = {message["code"] for message in document["tppMessages"]}
    return status in (400, 403) and codes <= {"FORMAT_ERROR", "PAYMENT_FAILED"} and "paymentId" not in document


def test_generated_answers(record_property: Record) -> None:
    """From bytes to a reading: no crash, and no yes or no that the standard library would not read there too."""
    chance = random.Random(seed() + 1)
    print(f"seed {seed()}")
    bank, yes, no, unread = connector("sandbox-bank"), 0, 0, 0
    for number in range(_count(ANSWERS)):
        data = _right_answer(chance)
        if number % 10:
            data = _mutate_bytes(data, chance)
        answer = _read(data, chance)
        if answer is None:
            unread += 1
            continue
        reading = bank.read_initiation(answer, call_id=CALL)
        bank.read_payment_status(answer, call_id=CALL)
        bank.read_accounts(answer, call_id=CALL)
        yes += isinstance(reading, InitiationAccepted)
        no += isinstance(reading, InitiationRefused)
        assert _judged_alike(data, reading), (data, reading)

    record_property("injected", _count(ANSWERS))
    assert min(yes, no, unread) > _count(ANSWERS) / 100


# --- answers of a token endpoint


def _second_reading(body: bytes) -> dict[str, Any]:
    """The members by the standard library, which must not see one of them twice. Raises ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise ValueError("twice")
        return members

    # What a string that nobody reads holds is not looked at (`tokenjson`), so it need not be UTF-8.
    document = json.loads(body.decode("utf-8", errors="replace"), object_pairs_hook=once)
    if not isinstance(document, dict):
        raise TypeError("no object")
    return document


MEMBERS: dict[str, list[object]] = {
    "access_token": ["", "a", "a\n", "é", 7, None, ["a"], {"a": 1}, "a" * 16_385, "\x7f", "a\\u0041"],
    "refresh_token": ["", "r", "r\0", None, 1, True],
    "token_type": ["bearer", "MAC", "", None, 1, ["Bearer"]],
    "expires_in": [0, -1, 1, 600, 10**12, "600", 1.5, None, True, [1]],
    "scope": ["", "a b", "a  b", 'a"b', 1, None, "x" * 5000],
    "extra": [{"a": [1, 2, {"b": None}]}, "x", 1e308],
}


def test_generated_token_answers(record_property: Record) -> None:
    """Never a crash; a grant only where the standard library reads one bearer token of printable characters, too."""
    chance = random.Random(seed() + 2)
    print(f"seed {seed()}")
    granted = 0
    for _ in range(_count(TOKENS)):
        names = chance.sample(sorted(MEMBERS), chance.randint(0, 3))
        body = grant(**{name: chance.choice(MEMBERS[name]) for name in names})
        if chance.random() < 0.5:
            body = _mutate_bytes(body, chance)

        outcome = outcome_of(chance.choice([200, 200, 200, 201, 400, 500]), body)

        if isinstance(outcome, TokenGrant):
            granted += 1
            document = _second_reading(body)
            assert document["token_type"].lower() == "bearer", body
            assert re.fullmatch(r"[\x20-\x7e]{1,16384}", document["access_token"]), body
            assert document.get("refresh_token") is None or re.fullmatch(
                r"[\x20-\x7e]{1,16384}", document["refresh_token"]
            ), body
            assert (outcome.refresh_token is None) == (document.get("refresh_token") is None), body
            assert document["access_token"].encode() not in outcome.access_token or len(document["access_token"]) < 8, (
                body
            )

    record_property("injected", _count(TOKENS))
    assert granted > _count(TOKENS) / 20


@pytest.mark.parametrize("count", [REQUESTS + ANSWERS + TOKENS])
def test_there_are_enough_of_them(count: int) -> None:
    """Each run of the tests tries this many; the whole run ten times as many."""
    assert count >= 5000
