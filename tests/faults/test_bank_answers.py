# ruff: noqa: E501 (the table of cases: one line each)
"""What banks answer when they answer wrongly: families G and N of the bad inputs, byte for byte against the real process.

Each case names its family (`bi_G1` ...). After each the outcome's kind and code are as in the table, the bank has seen the
request exactly once, and egress goes on working. An outcome is Unknown wherever bytes were handed over and no whole,
well-formed answer came; it is never a refusal, and nothing is sent again.
"""

import asyncio
import contextlib
import gzip
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

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
    Unknown,
)
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.errors import CustodyError
from sidecar.ports import OpenSecret
from tests.fakes.egress import SoftwareKeys, data_key_context
from tests.unit.egress.bank_server import BankServer, Exchange, Script, http_answer
from tests.unit.egress.certificates import TestAuthority
from tests.unit.egress.process import CLUSTER, RunningEgress, running_egress, transport

TOKEN = b"fault-token-" + b"7" * 40
MAX_ANSWER_BYTES = 64 * 1024
Way = Literal["read", "once", "payment"]
WAYS: tuple[Way, ...] = ("read", "once", "payment")


@dataclass(slots=True, kw_only=True)
class Lab:
    egress: RunningEgress
    bank: BankServer
    keys: SoftwareKeys
    authority: TestAuthority
    wrapped: bytes

    def secret(self, origin: str | None = None) -> OpenSecret:
        context = SecretContext(
            cluster=CLUSTER, owner="o", consent="c", provider_origin=origin or self.bank.origin, row_version=1
        )
        return self.keys.seal(SecretKind.ACCESS_TOKEN, TOKEN, context, wrapped_data_key=self.wrapped)

    def request(self, **changes: object) -> ProviderRequest:
        slot = SecretSlot(kind=SecretKind.ACCESS_TOKEN, encoding=SlotEncoding.RAW)
        request = ProviderRequest(
            method="POST",
            origin=self.bank.origin,
            target="/v1/payments/sepa-credit-transfers",
            headers=(
                Header(name="Authorization", value="Bearer ", slot=slot),
                Header(name="Content-Type", value="application/json"),
            ),
            body=(b'{"instructedAmount":{"amount":"1.00","currency":"EUR"}}',),
        )
        return replace(request, **changes)  # type: ignore[arg-type]

    async def outcome(self, way: Way, *, seconds: float = 10.0) -> SendOutcome:
        """One request to the bank, by each of the ways there are."""
        link, secrets = self.egress.link, [self.secret()]
        match way:
            case "read":
                return await link.call(
                    self.request(method="GET", body=()),
                    wrapped_data_key=self.wrapped,
                    secrets=secrets,
                    deadline_seconds=seconds,
                )
            case "once":
                return await link.call_once(
                    self.request(), wrapped_data_key=self.wrapped, secrets=secrets, deadline_seconds=seconds
                )
            case "payment":
                prepared = await link.prepare(
                    self.request(), wrapped_data_key=self.wrapped, secrets=secrets, deadline_seconds=10
                )
                return await link.send(prepared, _permit(), deadline_seconds=seconds)

    async def still_works(self) -> None:
        self.bank.script = _answers(http_answer())
        assert self.egress.alive
        outcome = await self.outcome("once")
        assert isinstance(outcome, Answer)


Test = Callable[[Lab], Coroutine[None, None, None]]
Run = Callable[[Test], None]


@contextlib.asynccontextmanager
async def _lab(folder: Path) -> AsyncIterator[Lab]:
    authority, keys = TestAuthority(folder), SoftwareKeys()
    certificate = authority.issue("bank", hosts=("127.0.0.1",))
    with BankServer(certificate=certificate, script=_answers(http_answer())) as bank:
        async with running_egress(
            transports=[transport(bank.origin, authority.ca_file)],
            keys=keys,
            folder=folder,
            max_answer_bytes=MAX_ANSWER_BYTES,
            connect_timeout_seconds=3.0,
            # What would make a careless client leak or detour.
            environment={
                "HTTPS_PROXY": "http://127.0.0.1:1",
                "https_proxy": "http://127.0.0.1:1",
                "ALL_PROXY": "http://127.0.0.1:1",
                "SSLKEYLOGFILE": str(folder / "tls-keys.log"),
            },
        ) as egress:
            context = SecretContext(cluster=CLUSTER, owner="o", consent="c", provider_origin=bank.origin)
            wrapped, _ = keys.create_data_key(data_key_context(context))
            yield Lab(egress=egress, bank=bank, keys=keys, authority=authority, wrapped=wrapped)
            assert TOKEN.decode() not in egress.log()
        assert not (folder / "tls-keys.log").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        lab = runner.run(stack.enter_async_context(_lab(tmp_path_factory.mktemp("faults"))))
        yield lambda test: runner.run(test(lab))
        runner.run(stack.aclose())


def _permit() -> DispatchPermit:
    return DispatchPermit(payment=PaymentId("p"), epoch=1)


# --- scripts -------------------------------------------------------------------------------------------------------------


def _answers(data: bytes) -> Script:
    """Sends `data` and waits for another request: it neither closes nor adds anything."""

    def script(exchange: Exchange) -> None:
        exchange.keep = True
        exchange.send(data)

    return script


def _answers_and(data: bytes, end: Callable[[Exchange], None]) -> Script:
    def script(exchange: Exchange) -> None:
        if data:
            exchange.send(data)
            time.sleep(0.05)  # so that it is read before a reset overtakes it
        end(exchange)

    return script


def _in_pieces(*pieces: bytes, pause_seconds: float = 0.02) -> Script:
    def script(exchange: Exchange) -> None:
        for piece in pieces:
            exchange.send(piece)
            time.sleep(pause_seconds)
        exchange.keep = True

    return script


def _for_ever(start: bytes, piece: bytes, pause_seconds: float = 0.0) -> Script:
    """Until the peer hangs up (or a bound is reached that no correct peer would wait for)."""

    def script(exchange: Exchange) -> None:
        exchange.send(start)
        for _ in range(100_000):
            exchange.send(piece)
            time.sleep(pause_seconds)

    return script


def _alert_mid_body(exchange: Exchange) -> None:
    """A fatal TLS record in the middle of the answer: garbage where a record should be."""
    exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 10)
    raw = socket.socket(fileno=exchange.connection.detach())
    with raw:
        raw.sendall(b"\x15\x03\x03\x00\x02\x02\x28")  # handshake_failure, unprotected
        time.sleep(0.2)


def _waits(exchange: Exchange) -> None:
    exchange.stopping.wait(10)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def _head(*lines: bytes, body: bytes = b"") -> bytes:
    return OK + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


# --- the table -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`expected` is a status for a whole answer, a code for an unknown outcome."""

    id: str
    script: Script
    expected: int | str
    body: bytes | None = None
    seconds: float = 10.0


STALL = 0.7

CASES = [
    # whole answers, passed on as they are
    Case(id="bi_G0_plain", script=_answers(http_answer(200, b"{}")), expected=200, body=b"{}"),
    Case(id="bi_G0_chunked", script=_answers(CHUNKED + b"1\r\n{\r\n1;x=y\r\n}\r\n0\r\n\r\n"), expected=200, body=b"{}"),
    Case(id="bi_G0_byte_by_byte", script=_in_pieces(*(bytes([o]) for o in http_answer(201, b"{}")), pause_seconds=0.001), expected=201, body=b"{}"),
    Case(id="bi_G0_close_delimited_with_close_notify", script=_answers_and(OK + b"\r\n{}", Exchange.close_notify), expected=200, body=b"{}"),
    Case(id="bi_G0_http_1_0_with_length", script=_answers(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"), expected=200, body=b"{}"),
    Case(id="bi_G0_largest_allowed", script=_answers(http_answer(200, b"x" * MAX_ANSWER_BYTES)), expected=200),
    Case(id="bi_G0_100_continue_first", script=_answers(b"HTTP/1.1 100 Continue\r\n\r\n" + http_answer(200, b"{}")), expected=200, body=b"{}"),
    Case(id="bi_G0_identity_coding", script=_answers(http_answer(200, b"{}", (("Content-Encoding", "identity"),))), expected=200),
    Case(id="bi_G1_204_without_body", script=_answers(b"HTTP/1.1 204 No Content\r\n\r\n"), expected=204, body=b""),
    Case(id="bi_G1_202_empty", script=_answers(http_answer(202, b"")), expected=202, body=b""),
    *(
        Case(id=f"bi_G8_{status}_is_not_followed", script=_answers(http_answer(status, b"", (("Location", "https://127.0.0.1/else"),))), expected=status)
        for status in (301, 302, 303, 307, 308)
    ),
    *(
        Case(id=f"bi_{family}_{status}_is_passed_on", script=_answers(http_answer(status, b"{}")), expected=status)
        for family, statuses in {
            "G9": (400,), "G10": (401,), "G11": (403,), "G12": (404,), "G13": (405, 406, 415), "G14": (408, 425), "G15": (409,), "G16": (429,),
            "G17": (500, 502, 503, 504), "G18": (299, 499, 599),
        }.items()
        for status in statuses
    ),
    Case(id="bi_G2_html_is_the_connectors_business", script=_answers(http_answer(200, b"<html>log in", (("Content-Type", "text/html"),))), expected=200),
    Case(id="bi_G3_duplicate_json_keys_are_the_connectors_business", script=_answers(http_answer(200, b'{"a":1,"a":2}')), expected=200),
    # truncated
    Case(id="bi_G36_close_before_any_byte", script=_answers_and(b"", Exchange.close_plainly), expected="CONNECTION_LOST"),
    Case(id="bi_G36_close_notify_before_any_byte", script=_answers_and(b"", Exchange.close_notify), expected="CONNECTION_LOST"),
    Case(id="bi_G36_reset_before_any_byte", script=_answers_and(b"", Exchange.reset), expected="CONNECTION_LOST"),
    Case(id="bi_G36_close_in_status_line", script=_answers_and(b"HTTP/1.1 2", Exchange.close_plainly), expected="ANSWER_TRUNCATED"),
    Case(id="bi_G36_close_in_headers", script=_answers_and(OK + b"Content-Le", Exchange.close_notify), expected="ANSWER_TRUNCATED"),
    Case(id="bi_G36_close_in_body", script=_answers_and(_head(b"Content-Length: 10", body=b"12345"), Exchange.close_plainly), expected="ANSWER_TRUNCATED"),
    Case(id="bi_G36_close_notify_in_body", script=_answers_and(_head(b"Content-Length: 10", body=b"12345"), Exchange.close_notify), expected="ANSWER_TRUNCATED"),
    Case(id="bi_G36_reset_in_body", script=_answers_and(_head(b"Content-Length: 10", body=b"12345"), Exchange.reset), expected="ANSWER_TRUNCATED"),
    Case(id="bi_G36_close_between_chunks", script=_answers_and(CHUNKED + b"1\r\n{\r\n", Exchange.close_notify), expected="ANSWER_TRUNCATED"),
    Case(id="bi_G36_last_chunk_missing", script=_answers_and(CHUNKED + b"2\r\n{}\r\n", Exchange.close_plainly), expected="ANSWER_TRUNCATED"),
    Case(id="bi_G36_interim_answer_only", script=_answers_and(b"HTTP/1.1 100 Continue\r\n\r\n", Exchange.close_notify), expected="ANSWER_TRUNCATED"),
    Case(id="bi_G29_close_delimited_without_close_notify", script=_answers_and(OK + b"\r\n{}", Exchange.close_plainly), expected="ANSWER_TRUNCATED"),
    Case(id="bi_G29_alert_mid_body", script=_alert_mid_body, expected="ANSWER_TRUNCATED"),
    # lengths
    Case(id="bi_G3_length_too_long", script=_answers(_head(b"Content-Length: 9", body=b"{}")), expected="DEADLINE_AFTER_SEND", seconds=STALL),
    Case(id="bi_G3_length_too_short", script=_answers(_head(b"Content-Length: 1", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_two_lengths_that_differ", script=_answers(_head(b"Content-Length: 2", b"Content-Length: 3", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_two_lengths_alike", script=_answers(_head(b"Content-Length: 2", b"Content-Length: 2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_length_list", script=_answers(_head(b"Content-Length: 2, 2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_negative_length", script=_answers(_head(b"Content-Length: -2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_signed_length", script=_answers(_head(b"Content-Length: +2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_hexadecimal_length", script=_answers(_head(b"Content-Length: 0x2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_huge_length", script=_answers(_head(b"Content-Length: 99999999999999999999999999", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_length_above_the_bound", script=_answers(_head(b"Content-Length: %d" % (MAX_ANSWER_BYTES + 1))), expected="ANSWER_TOO_LARGE"),
    Case(id="bi_G3_length_and_chunked", script=_answers(_head(b"Content-Length: 2", b"Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_chunked_twice", script=_answers(_head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_unknown_transfer_coding", script=_answers(_head(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_chunked_in_http_1_0", script=_answers(b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_blank_before_colon", script=_answers(_head(b"Content-Length : 2", body=b"{}")), expected="ANSWER_MALFORMED"),
    # chunks
    Case(id="bi_G3_chunk_size_not_hexadecimal", script=_answers(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_negative_chunk_size", script=_answers(CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_chunk_longer_than_said", script=_answers(CHUNKED + b"1\r\n{}\r\n0\r\n\r\n"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_chunk_without_end_of_line", script=_answers(CHUNKED + b"2\r\n{}XX0\r\n\r\n"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_bare_line_feeds", script=_answers(CHUNKED + b"2\n{}\n0\n\n"), expected="DEADLINE_AFTER_SEND", seconds=STALL),
    Case(id="bi_G3_huge_chunk_size", script=_answers(CHUNKED + b"f" * 30 + b"\r\n"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_endless_chunks", script=_for_ever(CHUNKED, b"400\r\n" + b"x" * 0x400 + b"\r\n"), expected="ANSWER_TOO_LARGE"),
    Case(id="bi_G3_endless_chunk_extension", script=_for_ever(CHUNKED + b"1;", b"x" * 1000), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_endless_trailers", script=_for_ever(CHUNKED + b"0\r\n", b"X: y\r\n" * 100), expected="ANSWER_MALFORMED"),
    Case(id="bi_G3_tiny_chunks_for_ever", script=_for_ever(CHUNKED, b"1\r\nx\r\n" * 500), expected="ANSWER_TOO_LARGE"),
    # headers
    Case(id="bi_G4_one_megabyte_of_headers", script=_answers(_head(*(b"X-%d: " % n + b"v" * 10_000 for n in range(100)))), expected="ANSWER_TOO_LARGE"),
    Case(id="bi_G4_one_endless_header", script=_for_ever(OK + b"X: ", b"v" * 10_000), expected="ANSWER_TOO_LARGE"),
    Case(id="bi_G4_ten_thousand_headers", script=_answers(_head(*(b"X:" for _ in range(10_000)))), expected="ANSWER_TOO_LARGE"),
    Case(id="bi_G4_folded_header", script=_answers(_head(b"X-A: 1", b" folded", b"Content-Length: 2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G4_bare_cr_in_header", script=_answers(_head(b"X-A: 1\rX-B: 2", b"Content-Length: 2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G4_bare_lf_in_header", script=_answers(_head(b"X-A: 1\nX-B: 2", b"Content-Length: 2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G4_nul_in_header", script=_answers(_head(b"X-A: 1\x002", b"Content-Length: 2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G4_control_character_in_header", script=_answers(_head(b"X-A: 1\x1b[2J", b"Content-Length: 2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G4_header_without_name", script=_answers(_head(b": v", b"Content-Length: 2", body=b"{}")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G4_header_without_colon", script=_answers(_head(b"nothing", b"Content-Length: 2", body=b"{}")), expected="ANSWER_MALFORMED"),
    # status lines
    Case(id="bi_G18_not_http", script=_answers(b"SSH-2.0-OpenSSH_9.2\r\n"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G44_http_2_frames", script=_answers(bytes.fromhex("00000604000000000000030000006400000408000000000000ef0001")), expected="ANSWER_MALFORMED"),
    Case(id="bi_G44_http_2_version", script=_answers(b"HTTP/2 200\r\nContent-Length: 2\r\n\r\n{}"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G18_http_1_2", script=_answers(b"HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\n{}"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G18_status_99", script=_answers(b"HTTP/1.1 099 X\r\nContent-Length: 2\r\n\r\n{}"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G18_status_600", script=_answers(b"HTTP/1.1 600 X\r\nContent-Length: 2\r\n\r\n{}"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G18_status_2000", script=_answers(b"HTTP/1.1 2000 X\r\nContent-Length: 2\r\n\r\n{}"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G18_no_status", script=_answers(b"HTTP/1.1 OK\r\nContent-Length: 2\r\n\r\n{}"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G18_blank_line_first", script=_answers(b"\r\n" + http_answer()), expected="ANSWER_MALFORMED"),
    # interim answers
    Case(id="bi_G5_flood_of_interim_answers", script=_for_ever(b"", b"HTTP/1.1 102 Processing\r\n\r\n"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G5_switching_protocols", script=_answers(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), expected="ANSWER_MALFORMED"),
    # codings
    Case(id="bi_G3_gzip_nobody_asked_for", script=_answers(http_answer(200, gzip.compress(b"{}"), (("Content-Encoding", "gzip"),))), expected="ANSWER_ENCODED"),
    Case(id="bi_G3_unknown_coding", script=_answers(http_answer(200, b"{}", (("Content-Encoding", "x"),))), expected="ANSWER_ENCODED"),
    # time
    Case(id="bi_G34_silence", script=_answers_and(b"", Exchange.stall), expected="DEADLINE_AFTER_SEND", seconds=STALL),
    Case(id="bi_G34_slow_loris_headers", script=_for_ever(OK, b"X", 0.1), expected="DEADLINE_AFTER_SEND", seconds=STALL),
    Case(id="bi_G34_slow_loris_body", script=_for_ever(_head(b"Content-Length: 1000"), b"x", 0.1), expected="DEADLINE_AFTER_SEND", seconds=STALL),
    # more than one answer
    Case(id="bi_G32_two_answers", script=_answers(http_answer() + http_answer(500)), expected="ANSWER_MALFORMED"),
    Case(id="bi_G32_garbage_behind_the_answer", script=_answers(http_answer() + b"\x00"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G32_body_to_204", script=_answers(b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n{}"), expected="ANSWER_MALFORMED"),
    Case(id="bi_G32_garbage_behind_chunks", script=_answers(CHUNKED + b"0\r\n\r\nx"), expected="ANSWER_MALFORMED"),
    # size
    Case(id="bi_G3_endless_body_until_close", script=_for_ever(OK + b"\r\n", b"x" * 10_000), expected="ANSWER_TOO_LARGE"),
    # secrets
    Case(id="bi_G0_echo_in_body", script=_answers(http_answer(400, b"token " + TOKEN)), expected="ANSWER_ECHOES_SECRET"),
    Case(id="bi_G0_echo_in_header", script=_answers(http_answer(400, b"", (("X-Debug", TOKEN.decode()),))), expected="ANSWER_ECHOES_SECRET"),
    Case(id="bi_G0_tokens_in_a_plain_answer", script=_answers(http_answer(200, b'{"access_token":"x"}')), expected="ANSWER_HOLDS_TOKENS"),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_wrong_answer_has_its_honest_outcome(run: Run, case: Case, way: Way) -> None:
    """Outcome and code as in the table, one request at the bank, egress alive afterwards; for reads, writes and payments."""

    async def test(lab: Lab) -> None:
        # A request of its own connection for each case: what is kept from the case before must not answer here.
        await _drop_kept_connections(lab)
        lab.bank.requests.clear()
        lab.bank.script = case.script

        outcome = await lab.outcome(way, seconds=case.seconds)

        if isinstance(case.expected, int):
            assert isinstance(outcome, Answer)
            assert outcome.status == case.expected
            assert case.body is None or outcome.body == case.body
        else:
            assert outcome == Unknown(code=case.expected)
        assert len(lab.bank.requests) == 1
        assert lab.egress.alive
        assert lab.bank.failures == []

    run(test)


async def _drop_kept_connections(lab: Lab) -> None:
    """An answer followed by a close: the pool keeps nothing."""
    lab.bank.script = _answers(_head(b"Content-Length: 2", b"Connection: close", body=b"{}"))
    assert isinstance(await lab.outcome("read"), Answer)


def test_egress_works_after_all_of_them(run: Run) -> None:
    """The process that took all of the above still answers."""
    run(Lab.still_works)


# --- kept connections ------------------------------------------------------------------------------------------------------


def _keeps(exchange: Exchange) -> None:
    exchange.send(http_answer(200, b'{"n":%d}' % exchange.number))
    exchange.keep = True


def test_reads_share_a_connection_and_writes_never_do(run: Run) -> None:
    """Reads go over a kept connection one after the other; every write has one of its own, and says so."""

    async def test(lab: Lab) -> None:
        await _drop_kept_connections(lab)
        lab.bank.requests.clear()
        lab.bank.script = _keeps
        before = lab.bank.connections

        for way in ("read", "once", "read", "payment", "read"):
            assert isinstance(await lab.outcome(way), Answer)

        assert lab.bank.connections - before == 3
        closing = [b"\r\nConnection: close\r\n" in request for request in lab.bank.requests]
        assert closing == [False, True, False, True, False]

    run(test)


def test_a_kept_connection_that_the_bank_closed_is_replaced(run: Run) -> None:
    """bi_N21: it is found closed before anything is written, so a new one is no repetition."""

    async def test(lab: Lab) -> None:
        for end in (Exchange.close_notify, Exchange.close_plainly, Exchange.reset):
            await _drop_kept_connections(lab)
            lab.bank.requests.clear()
            lab.bank.script = _answers_and(http_answer(), end)
            first = await lab.outcome("read")
            await asyncio.sleep(0.1)
            lab.bank.script = _keeps
            second = await lab.outcome("read")
            assert (type(first), type(second)) == (Answer, Answer)
            assert len(lab.bank.requests) == 2

    run(test)


def test_an_answer_nobody_asked_for_is_never_given_to_the_next_request(run: Run) -> None:
    """bi_G31: a second answer that comes later ends the kept connection; the next request gets its own answer."""

    async def test(lab: Lab) -> None:
        await _drop_kept_connections(lab)

        def late_second_answer(exchange: Exchange) -> None:
            exchange.send(http_answer(200, b'"first"'))
            time.sleep(0.1)
            exchange.send(http_answer(200, b'"foreign"'))
            exchange.keep = True

        lab.bank.script = late_second_answer
        first = await lab.outcome("read")
        await asyncio.sleep(0.3)
        lab.bank.script = _answers(http_answer(200, b'"second"'))
        second = await lab.outcome("read")

        assert isinstance(first, Answer)
        assert isinstance(second, Answer)
        assert (first.body, second.body) == (b'"first"', b'"second"')

    run(test)


def test_a_cancelled_answer_does_not_reach_the_next_request(run: Run) -> None:
    """bi_G33: the answer that comes after our deadline goes nowhere; the next request gets its own."""

    async def test(lab: Lab) -> None:
        await _drop_kept_connections(lab)

        def late(exchange: Exchange) -> None:
            time.sleep(1.0)
            exchange.send(http_answer(200, b'"late"'))
            exchange.keep = True

        lab.bank.script = late
        first = await lab.outcome("read", seconds=0.4)
        lab.bank.script = _answers(http_answer(200, b'"second"'))
        second = await lab.outcome("read")

        assert first == Unknown(code="DEADLINE_AFTER_SEND")
        assert isinstance(second, Answer)
        assert second.body == b'"second"'

    run(test)


def test_cookies_are_ignored(run: Run) -> None:
    """bi_G43: what the bank sets is neither passed on nor sent back."""

    async def test(lab: Lab) -> None:
        lab.bank.requests.clear()
        lab.bank.script = _answers(http_answer(200, b"{}", (("Set-Cookie", "session=abc"), ("X-Other", "kept"))))

        outcomes = [await lab.outcome("read") for _ in range(2)]

        for outcome in outcomes:
            assert isinstance(outcome, Answer)
            assert outcome.header("x-other") == "kept"
            assert outcome.header("set-cookie") is None
        assert all(b"session" not in request for request in lab.bank.requests)

    run(test)


# --- cuts at every byte ------------------------------------------------------------------------------------------------------


class CuttingRelay:
    """TCP in the middle. After `arm`, so many bytes of ciphertext pass in one direction, and then both sides get a reset."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._left: dict[str, int | None] = {"out": None, "back": None}
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def arm(self, direction: str, after_bytes: int) -> None:
        self._left[direction] = after_bytes
        if after_bytes == 0 and direction == "out":
            self._cut()

    def close(self) -> None:
        self._stopped.set()
        self._listener.close()
        self._cut()
        self._thread.join(10)

    def _accept(self) -> None:
        self._listener.settimeout(0.05)
        while not self._stopped.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._left = {"out": None, "back": None}
            self._pair = (near, far)
            pumps = [
                threading.Thread(target=self._pump, args=(near, far, "out"), daemon=True),
                threading.Thread(target=self._pump, args=(far, near, "back"), daemon=True),
            ]
            for pump in pumps:
                pump.start()
            for pump in pumps:
                pump.join(30)

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            while data := source.recv(65536):
                left = self._left[direction]
                if left is not None and len(data) >= left:
                    sink.sendall(data[:left])
                    time.sleep(0.01)  # so that it is read before the reset overtakes it
                    self._cut()
                    return
                sink.sendall(data)
                if left is not None:
                    self._left[direction] = left - len(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._cut()

    def _cut(self) -> None:
        pair, self._pair = self._pair, None
        for end in pair or ():
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                end.shutdown(socket.SHUT_RD)
            end.close()


@contextlib.asynccontextmanager
async def _behind_relay(folder: Path) -> AsyncIterator[tuple[Lab, CuttingRelay]]:
    authority, keys = TestAuthority(folder), SoftwareKeys()
    certificate = authority.issue("bank", hosts=("127.0.0.1",))
    with BankServer(certificate=certificate, script=_answers(http_answer(201, b'{"paymentId":"p"}'))) as bank:
        relay = CuttingRelay(("127.0.0.1", bank.port))
        origin = f"https://127.0.0.1:{relay.port}"
        try:
            async with running_egress(
                transports=[transport(origin, authority.ca_file)], keys=keys, folder=folder
            ) as egress:
                context = SecretContext(cluster=CLUSTER, owner="o", consent="c", provider_origin=origin)
                wrapped, _ = keys.create_data_key(data_key_context(context))
                yield Lab(egress=egress, bank=bank, keys=keys, authority=authority, wrapped=wrapped), relay
                assert egress.alive
        finally:
            relay.close()


def test_a_reset_at_any_byte_of_request_or_answer_is_unknown(tmp_path: Path) -> None:
    """bi_G36: once the request was handed over, a reset at any offset leaves it unknown; only a whole answer is one. A reset
    before the send is NotSent. No cut makes the bank see a second request."""
    outcomes: dict[tuple[str, int], SendOutcome] = {}

    async def test() -> None:
        async with _behind_relay(tmp_path) as (lab, relay):
            origin = f"https://127.0.0.1:{relay.port}"
            offsets = [("out", 0), *(("out", n) for n in range(1, 330, 24)), *(("back", n) for n in range(1, 120, 8))]
            for direction, offset in offsets:
                lab.bank.requests.clear()
                prepared = await lab.egress.link.prepare(
                    lab.request(origin=origin),
                    wrapped_data_key=lab.wrapped,
                    secrets=[lab.secret(origin)],
                    deadline_seconds=10,
                )
                await asyncio.sleep(0.05)  # TLS 1.3 session tickets are through
                relay.arm(direction, offset)
                await asyncio.sleep(0.05)
                outcomes[direction, offset] = await lab.egress.link.send(prepared, _permit(), deadline_seconds=10)
                assert len(lab.bank.requests) <= 1
            relay.arm("back", 10**6)

    asyncio.run(test())

    assert outcomes.pop(("out", 0)) == NotSent(code="CONNECTION_LOST_BEFORE_SEND")
    cut_answers = [outcome for (direction, _), outcome in outcomes.items() if direction == "out"]
    assert set(cut_answers) == {Unknown(code="CONNECTION_LOST")}
    for (direction, offset), outcome in outcomes.items():
        if direction == "back":
            whole = isinstance(outcome, Answer) and outcome.status == 201
            cut = outcome in (Unknown(code="CONNECTION_LOST"), Unknown(code="ANSWER_TRUNCATED"))
            assert whole or cut, (offset, outcome)
    assert outcomes["back", 1] == Unknown(code="CONNECTION_LOST")


# --- before the send -----------------------------------------------------------------------------------------------------------


def test_a_connection_that_dies_while_prepared_is_not_sent(run: Run) -> None:
    """The bank closes, resets, or speaks before it was asked (bi_G30): NotSent, and the bank gets no request."""

    async def test(lab: Lab) -> None:
        endings: list[Callable[[ssl.SSLSocket], None]] = [
            lambda connection: connection.sendall(http_answer()),
            lambda connection: connection.shutdown(socket.SHUT_RDWR),
        ]
        for ending in endings:
            certificate = lab.authority.issue("closing", hosts=("127.0.0.1",))
            with BankServer(certificate=certificate, script=_answers(http_answer()), on_connect=ending) as bank:
                await _with_transports(lab, bank, _prepared_and_killed)

    async def _prepared_and_killed(lab: Lab) -> None:
        prepared = await lab.egress.link.prepare(
            lab.request(), wrapped_data_key=lab.wrapped, secrets=[lab.secret()], deadline_seconds=10
        )
        await asyncio.sleep(0.3)
        outcome = await lab.egress.link.send(prepared, _permit(), deadline_seconds=5)
        assert outcome == NotSent(code="CONNECTION_LOST_BEFORE_SEND")
        assert [request for request in lab.bank.requests if request] == []

    run(test)


async def _with_transports(lab: Lab, bank: BankServer, test: Test, **files: str) -> None:
    """The test against another bank, with an egress of its own."""
    ca_file = Path(files.pop("ca_file", str(lab.authority.ca_file)))
    folder = ca_file.parent
    async with running_egress(
        transports=[transport(bank.origin, ca_file, **files)],
        keys=lab.keys,
        folder=folder,
        connect_timeout_seconds=1.0,
    ) as egress:
        await test(replace_lab(lab, egress, bank))
        assert egress.alive


def replace_lab(lab: Lab, egress: RunningEgress, bank: BankServer) -> Lab:
    return Lab(egress=egress, bank=bank, keys=lab.keys, authority=lab.authority, wrapped=lab.wrapped)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsCase:
    id: str
    hosts: tuple[str, ...] = ("127.0.0.1",)
    days: int = 1
    other_ca: bool = False
    maximum: ssl.TLSVersion | None = None
    client: Literal["none", "given", "expired"] = "none"
    asks_for_client: bool = False
    expected: str | int = "TLS_FAILED"


TLS_CASES = [
    TlsCase(id="right_certificate", expected=200),
    TlsCase(id="bi_G28_other_ca", other_ca=True),
    TlsCase(id="bi_G28_expired", days=-1),
    TlsCase(id="bi_G28_other_host", hosts=("bank.example",)),
    TlsCase(id="bi_G28_no_name_but_a_common_name", hosts=()),
    TlsCase(id="tls_1_2", maximum=ssl.TLSVersion.TLSv1_2, expected=200),
    TlsCase(id="tls_1_1_is_too_old", maximum=ssl.TLSVersion.TLSv1_1),
    TlsCase(id="client_certificate", asks_for_client=True, client="given", expected=200),
    TlsCase(
        id="client_certificate_missing_tls_1_2",
        asks_for_client=True,
        maximum=ssl.TLSVersion.TLSv1_2,
    ),
    TlsCase(
        id="client_certificate_expired_tls_1_2", asks_for_client=True, client="expired", maximum=ssl.TLSVersion.TLSv1_2
    ),
]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("case", TLS_CASES, ids=lambda case: case.id)
def test_only_the_right_bank_gets_a_connection(tmp_path: Path, case: TlsCase) -> None:
    """CA, name, time and version of the bank's certificate decide; without a handshake not a byte of the request leaves."""
    authority, keys = TestAuthority(tmp_path), SoftwareKeys()
    issuer = TestAuthority(tmp_path, name="other CA") if case.other_ca else authority
    certificate = issuer.issue("127.0.0.1", hosts=case.hosts, days=case.days)
    files = {}
    if case.client != "none":
        client = authority.issue("client", client=True, days=-1 if case.client == "expired" else 1)
        files = {"client_certificate_file": str(client.certificate_file), "client_key_file": str(client.key_file)}

    async def test() -> None:
        with BankServer(
            certificate=certificate,
            script=_answers(http_answer()),
            client_ca_file=str(authority.ca_file) if case.asks_for_client else None,
        ) as bank:
            if case.maximum is not None:
                bank.context.minimum_version = ssl.TLSVersion.TLSv1
                bank.context.set_ciphers("DEFAULT:@SECLEVEL=0")
                bank.context.maximum_version = case.maximum
            async with running_egress(
                transports=[transport(bank.origin, authority.ca_file, **files)], keys=keys, folder=tmp_path
            ) as egress:
                context = SecretContext(cluster=CLUSTER, owner="o", consent="c", provider_origin=bank.origin)
                wrapped, _ = keys.create_data_key(data_key_context(context))
                lab = Lab(egress=egress, bank=bank, keys=keys, authority=authority, wrapped=wrapped)
                outcome = await lab.outcome("once")
                if isinstance(case.expected, int):
                    assert isinstance(outcome, Answer)
                else:
                    assert outcome == NotSent(code=case.expected)
                    assert bank.requests == []

    asyncio.run(test())


@pytest.mark.parametrize(
    ("first_bytes", "expected"),
    [(b"", "CONNECT_TIMED_OUT"), (b"HTTP/1.1 400 plain\r\n\r\n", "TLS_FAILED"), (os.urandom(64), "TLS_FAILED")],
    ids=["silent", "plain_http", "garbage"],
)
def test_a_peer_that_speaks_no_tls_gets_nothing(tmp_path: Path, first_bytes: bytes, expected: str) -> None:
    """bi_N2, bi_N3: silence ends at the connect time-out, anything else at once."""
    authority, keys = TestAuthority(tmp_path), SoftwareKeys()

    async def test() -> None:
        received = bytearray()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if first_bytes:
                writer.write(first_bytes)
            received.extend(await reader.read(-1 if not first_bytes else 100_000))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        origin = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with (
            server,
            running_egress(
                transports=[transport(origin, authority.ca_file)],
                keys=keys,
                folder=tmp_path,
                connect_timeout_seconds=0.5,
            ) as egress,
        ):
            request = ProviderRequest(method="GET", origin=origin, target="/", headers=())
            outcome = await egress.link.call_once(request, deadline_seconds=5)
            assert outcome == NotSent(code=expected)
        assert b"GET" not in received

    asyncio.run(test())


def test_a_request_that_the_bank_does_not_read_is_unknown_at_the_deadline(run: Run) -> None:
    """bi_G35: a peer with a closed window holds nobody longer than the deadline."""

    async def test(lab: Lab) -> None:
        certificate = lab.authority.issue("stuck", hosts=("127.0.0.1",))
        with BankServer(certificate=certificate, script=_waits, reads=False) as bank:

            async def big(lab: Lab) -> None:
                started = time.monotonic()
                outcome = await lab.egress.link.call_once(
                    lab.request(body=(b"x" * 1024 * 1024,)),
                    wrapped_data_key=lab.wrapped,
                    secrets=[lab.secret()],
                    deadline_seconds=1.0,
                )
                assert outcome == Unknown(code="DEADLINE_AFTER_SEND")
                assert time.monotonic() - started < 8

            await _with_transports(lab, bank, big)

    run(test)


# --- N: where a request may go ------------------------------------------------------------------------------------------------

BAD_ORIGINS = {
    "bi_N1_any_address": "https://0.0.0.0:{port}",
    "bi_N2_short_address": "https://127.1:{port}",
    "bi_N2_hexadecimal": "https://0x7f000001:{port}",
    "bi_N2_decimal": "https://2130706433:{port}",
    "bi_N2_octal": "https://0177.0.0.1:{port}",
    "bi_N3_loopback_v6": "https://[::1]:{port}",
    "bi_N3_mapped": "https://[::ffff:127.0.0.1]:{port}",
    "bi_N3_scoped": "https://[fe80::1%25eth0]:{port}",
    "bi_N4_metadata_service": "http://169.254.169.254:80",
    "bi_N4_metadata_service_tls": "https://169.254.169.254:443",
    "bi_N5_trailing_dot": "https://127.0.0.1.:{port}",
    "bi_N5_suffix": "https://127.0.0.1.evil.io:{port}",
    "bi_N5_user_info": "https://127.0.0.1:{port}@evil.io:443",
    "bi_N5_user_info_first": "https://evil.io@127.0.0.1:{port}",
    "bi_N5_fragment": "https://127.0.0.1:{port}#@evil.io:443",
    "bi_N5_backslash": "https://127.0.0.1:{port}\\@evil.io",
    "bi_N5_percent_encoded_dot": "https://127%2e0.0.1:{port}",
    "bi_N5_upper_case_scheme": "HTTPS://127.0.0.1:{port}",
    "bi_N6_other_port": "https://127.0.0.1:1",
    "bi_N6_no_port": "https://127.0.0.1",
    "bi_N6_port_with_zero": "https://127.0.0.1:0{port}",
    "bi_N6_port_with_blank": "https://127.0.0.1:{port} ",
    "bi_N6_port_too_high": "https://127.0.0.1:99999",
    "bi_N6_path": "https://127.0.0.1:{port}/",
    "bi_N6_line_feed": "https://127.0.0.1:{port}\n",
    "bi_N6_plain_http": "http://127.0.0.1:{port}",
    "bi_N6_other_scheme": "file:///etc/passwd",
    "bi_N6_empty": "",
}


@pytest.mark.parametrize("origin", BAD_ORIGINS.values(), ids=BAD_ORIGINS.keys())
def test_no_spelling_of_an_origin_gets_past_the_list(run: Run, origin: str) -> None:
    """Origins are compared as text with the configured ones; even a token that was sealed for the other spelling stays here."""

    async def test(lab: Lab) -> None:
        spelt = origin.replace("{port}", str(lab.bank.port))
        lab.bank.requests.clear()
        secrets = [lab.secret(spelt)] if spelt else []
        headers = lab.request().headers if spelt else ()

        for attempt in (lab.egress.link.call, lab.egress.link.call_once, lab.egress.link.prepare):
            with pytest.raises(CustodyError):
                await attempt(
                    lab.request(origin=spelt, headers=headers),
                    wrapped_data_key=lab.wrapped,
                    secrets=secrets,
                    deadline_seconds=5,
                )

        assert lab.bank.requests == []
        assert lab.egress.alive

    run(test)


BAD_REQUESTS: dict[str, dict[str, object]] = {
    "bi_N10_absolute_form": {"target": "https://evil.io/"},
    "bi_N10_no_slash": {"target": "v1/accounts"},
    "bi_N10_authority": {"target": "//evil.io/"},
    "bi_N10_asterisk": {"target": "*"},
    "bi_N10_empty": {"target": ""},
    "bi_N11_cr_lf": {"target": "/v1\r\nX: y"},
    "bi_N11_line_feed_at_the_end": {"target": "/v1\n"},
    "bi_N11_blank": {"target": "/v1 HTTP/1.1"},
    "bi_N11_nul": {"target": "/v1\x00"},
    "bi_N11_not_ascii": {"target": "/v1/ä"},
    "bi_N11_encoded_cr_lf": {"target": "/v1/%0d%0aX"},
    "bi_N11_fragment": {"target": "/v1#x"},
    "bi_N11_half_escape": {"target": "/v1/%2"},
    "bi_N11_backslash": {"target": "/v1\\x"},
    "bi_N12_dots": {"target": "/v1/../admin"},
    "bi_N12_dots_at_the_end": {"target": "/v1/.."},
    "bi_N12_encoded_dots": {"target": "/v1/%2e%2E/admin"},
    "bi_N12_half_encoded_dots": {"target": "/v1/.%2e/admin"},
    "bi_N12_too_long": {"target": "/" + "x" * 9000},
    "method_unknown": {"method": "CONNECT"},
    "method_in_lower_case": {"method": "post"},
    "method_with_line": {"method": "GET / HTTP/1.1\r\nX:"},
    "body_of_get": {"method": "GET"},
    **{
        f"bi_N13_header_{name}": {"headers": (Header(name=name, value="1"),)}
        for name in [
            "Host",
            "host",
            "Content-Length",
            "Transfer-Encoding",
            "Connection",
            "Upgrade",
            "TE",
            "Trailer",
            "Expect",
            "Cookie",
            "Proxy-Authorization",
            "Accept-Encoding",
            "Content-Encoding",
            "Keep-Alive",
        ]
    },
    "header_name_with_line": {"headers": (Header(name="X\r\nY", value="1"),)},
    "header_name_with_colon": {"headers": (Header(name="X:", value="1"),)},
    "header_name_empty": {"headers": (Header(name="", value="1"),)},
    "header_value_with_line": {"headers": (Header(name="X", value="1\r\nHost: evil"),)},
    "header_value_with_line_feed": {"headers": (Header(name="X", value="1\n"),)},
    "header_value_with_nul": {"headers": (Header(name="X", value="1\x00"),)},
    "header_value_not_ascii": {"headers": (Header(name="X", value="ä"),)},
    "header_value_with_blank_before": {"headers": (Header(name="X", value=" 1"),)},
    "header_twice": {"headers": (Header(name="X", value="1"), Header(name="x", value="2"))},
    "headers_too_many": {"headers": tuple(Header(name=f"X-{n}", value="1") for n in range(65))},
    "body_too_large": {"body": (b"x" * (1024 * 1024 + 1),)},
}


@pytest.mark.parametrize("changes", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_request_that_breaks_the_rules_is_never_sent(run: Run, changes: dict[str, object]) -> None:
    """A method, target, header or body that could mean something else to the bank ends here, and nothing of it is repeated."""

    async def test(lab: Lab) -> None:
        lab.bank.requests.clear()
        headers = changes.get("headers", ())
        request = lab.request(**{"headers": headers, **changes})

        with pytest.raises(CustodyError) as caught:
            await lab.egress.link.call_once(request, deadline_seconds=5)

        assert caught.value.reason == "INTERNAL"
        assert "evil" not in str(caught.value)
        assert lab.bank.requests == []

    run(test)
