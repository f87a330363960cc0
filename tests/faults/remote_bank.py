"""The bank's side of a kill: a `ScriptedBank` behind a Unix socket, so that its books outlive the sidecar that asks it.

Before it looks at an initiation it looks into the sidecar's database: the dispatch must be on record under a signed checkpoint.
"""

import asyncio
import base64
import json
import socketserver
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from sidecar.audit.entry import AuditEntry
from sidecar.domain.audit import AuditEvent
from sidecar.domain.provider import Answer, NotSent, SendOutcome, Unknown
from tests.fakes.bank import ScriptedBank
from tests.fakes.egress import BankRequest

__all__ = ["BankSocket", "ask_bank_at"]

_ANSWER_SECONDS = 20.0


class BankSocket:
    """Serves `bank` until `close`. `off_record` lists the initiations that came without a record of their dispatch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bank: ScriptedBank
        self.database = Path()
        self.off_record: list[str] = []
        self._lock = threading.Lock()
        self._open = 0
        self._server = _Server(str(path), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def serve(self, bank: ScriptedBank, database: Path) -> None:
        self.settle()
        self.bank, self.database, self.off_record = bank, database, []

    def settle(self) -> None:
        """Waits until whoever has died is not in the line any more: a request that is under way arrives."""
        quiet_since = time.monotonic()
        end = quiet_since + 10
        while time.monotonic() < end and time.monotonic() - quiet_since < 0.003:
            if self._open:
                quiet_since = time.monotonic()
            time.sleep(0.001)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def answer(self, line: bytes) -> bytes:
        request = _request(json.loads(line))
        with self._lock:
            if ScriptedBank.kind(request) == "initiate":
                self._check_on_record(request)
            outcome = self.bank(request)
        assert not asyncio.iscoroutine(outcome)
        return json.dumps(_outcome_document(outcome)).encode() + b"\n"

    def _check_on_record(self, request: BankRequest) -> None:
        """As many signed dispatches of this payment as initiations of it have come, this one included."""
        key = request.headers["x-request-id"]
        driver = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=10)
        try:
            covered = driver.execute("SELECT coalesce(max(size), 0) FROM log_checkpoints").fetchone()[0]
            leaves = driver.execute('SELECT entry FROM log_leaves WHERE "index" < ?', (covered,)).fetchall()
            (payment,) = driver.execute("SELECT id FROM payments WHERE bank_key = ?", (key,)).fetchone()
        finally:
            driver.close()
        drafts = [AuditEntry.decode(entry).draft for (entry,) in leaves]
        recorded = sum(draft.event is AuditEvent.PAYMENT_DISPATCHED and draft.payment == payment for draft in drafts)
        earlier = sum(
            ScriptedBank.kind(other) == "initiate" and other.headers["x-request-id"] == key
            for other in self.bank.requests
        )
        if recorded < earlier + 1:
            self.off_record.append(key)

    def began(self) -> None:
        with self._lock:
            self._open += 1

    def ended(self) -> None:
        with self._lock:
            self._open -= 1


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: str, bank: BankSocket) -> None:
        self.bank = bank
        super().__init__(path, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who was killed reads no answer."""


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        bank = self.server.bank
        bank.began()
        try:
            line = self.rfile.readline()
            if line.endswith(b"\n"):
                self.wfile.write(bank.answer(line))
        finally:
            bank.ended()


async def ask_bank_at(path: Path, request: BankRequest) -> SendOutcome:
    """One request on a connection of its own, as egress sends what moves money. Whatever is lost on the way is Unknown."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return NotSent(code="CONNECT_FAILED")
    try:
        writer.write(json.dumps(_request_document(request)).encode() + b"\n")
        await writer.drain()
        line = await asyncio.wait_for(reader.readline(), _ANSWER_SECONDS)
        return _outcome(json.loads(line)) if line.endswith(b"\n") else Unknown(code="CONNECTION_LOST")
    except (OSError, TimeoutError):
        return Unknown(code="CONNECTION_LOST")
    finally:
        writer.close()


def _request_document(request: BankRequest) -> dict[str, object]:
    return {
        "method": request.method,
        "origin": request.origin,
        "target": request.target,
        "headers": dict(request.headers),
        "body": base64.b64encode(request.body).decode(),
    }


def _request(document: dict[str, Any]) -> BankRequest:
    return BankRequest(**{**document, "body": base64.b64decode(document["body"])})


def _outcome_document(outcome: SendOutcome) -> dict[str, object]:
    match outcome:
        case Answer():
            body = base64.b64encode(outcome.body).decode()
            return {"status": outcome.status, "headers": list(outcome.headers), "body": body}
        case NotSent():
            return {"not_sent": outcome.code}
        case Unknown():
            return {"unknown": outcome.code}


def _outcome(document: dict[str, Any]) -> SendOutcome:
    if "not_sent" in document:
        return NotSent(code=document["not_sent"])
    if "unknown" in document:
        return Unknown(code=document["unknown"])
    headers = tuple((name, value) for name, value in document["headers"])
    return Answer(status=document["status"], headers=headers, body=base64.b64decode(document["body"]))
