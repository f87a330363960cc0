"""Faults on demand: what can go wrong on the way, for the next requests at an address.

Rules this module keeps:
- A fault says whether the bank does its work before the answer is spoiled (`commit`); the ledger always tells the truth.
- Each fault strikes `count` times, in the order in which faults were set; then the bank is healthy again.
- A spoiled answer is written to the connection as bytes, because no HTTP library writes wrong answers.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import ClassVar

from sandbox.web import Answer, parse_json_object

MAX_SECONDS = 600.0
MAX_HUGE_BYTES = 256 * 1024 * 1024
BODY_VARIANTS = ("truncated_json", "html", "duplicate_keys", "huge", "wrong_content_type", "echo_token", "empty")


class FaultInvalid(Exception):
    """The description of a fault is not one; the text says what is wrong."""


@dataclass(slots=True, kw_only=True)
class Fault:
    """One fault. Which of the later fields count depends on `kind`; `KINDS` says what each kind does."""

    KINDS: ClassVar[Mapping[str, str]] = {
        "delay_before_commit": "wait `seconds`, then work and answer",
        "delay_after_commit": "work, wait `seconds`, then answer",
        "cut_before_read": "reset the connection before the body is read; no work",
        "cut_before_commit": "read the body, then reset the connection; no work",
        "cut_after_commit": "work, then reset the connection without an answer",
        "cut_mid_header": "work, send half of the header, then close",
        "cut_mid_body": "work, send half of the body, then close",
        "answer": "answer with `status`, `body`, `content_type`, `headers`; work before only if `commit`",
        "body": "work, then answer with the body spoiled as `variant` says",
        "redirect": "answer `status` (307 unless given) with Location `location`; work before only if `commit`",
        "slow_answer": "work, then send the answer one byte every `seconds`",
        "wrong_content_length": "work, then announce `delta` bytes more than are sent, and close",
    }

    kind: str
    path_prefix: str
    method: str | None = None
    count: int = 1
    commit: bool = False
    seconds: float = 0.0
    status: int | None = None
    body: str | None = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    variant: str | None = None
    size_bytes: int = 32 * 1024 * 1024
    location: str = "https://127.0.0.1:9/elsewhere"
    delta: int = 64

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise FaultInvalid(f"kind must be one of {', '.join(self.KINDS)}")
        if self.kind == "body" and self.variant not in BODY_VARIANTS:
            raise FaultInvalid(f"variant must be one of {', '.join(BODY_VARIANTS)}")
        if self.kind == "answer" and self.status is None:
            raise FaultInvalid("an answer needs a status")
        if not self.path_prefix.startswith("/") or self.count < 1:
            raise FaultInvalid("path_prefix must begin with / and count must be at least 1")
        if not 0 <= self.seconds <= MAX_SECONDS or not 0 <= self.size_bytes <= MAX_HUGE_BYTES:
            raise FaultInvalid(f"seconds must be 0 to {MAX_SECONDS:.0f} and size_bytes 0 to {MAX_HUGE_BYTES}")

    @property
    def commits(self) -> bool:
        """Say whether the bank does its work."""
        if self.kind in ("answer", "redirect"):
            return self.commit
        return self.kind not in ("cut_before_read", "cut_before_commit")


class Faults:
    """The faults that are still to strike."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def add(self, document: Mapping[str, object]) -> Fault:
        """Set a fault from its JSON description."""
        try:
            fault = Fault(**document)  # type: ignore[arg-type]
        except TypeError as error:
            raise FaultInvalid(f"not a description of a fault: {error}") from error
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Be healthy again."""
        self._faults.clear()

    def pending(self) -> list[dict[str, object]]:
        """Return the faults that are still to strike."""
        return [asdict(fault) for fault in self._faults]

    def take(self, method: str, path: str) -> Fault | None:
        """Return the fault that strikes this request, and count it."""
        for fault in self._faults:
            if path.startswith(fault.path_prefix) and fault.method in (None, method):
                fault.count -= 1
                if fault.count == 0:
                    self._faults.remove(fault)
                return fault
        return None


def substitute(fault: Fault) -> Answer:
    """Return the answer that a fault of kind `answer` or `redirect` gives instead of the bank's."""
    if fault.kind == "redirect":
        return Answer(status=fault.status or 307, headers={"Location": fault.location})
    body = (fault.body or "").encode()
    content_type = fault.content_type if body else None
    return Answer(status=fault.status or 500, body=body, content_type=content_type, headers=fault.headers)


def spoil_body(fault: Fault, answer: Answer, authorization: str | None) -> Answer:
    """Return the bank's answer with its body spoiled; `authorization` is what the request sent."""
    body, content_type = answer.body, answer.content_type
    match fault.variant:
        case "truncated_json":
            body = body[: max(1, len(body) // 2)]
        case "html":
            body, content_type = b"<!doctype html><title>Maintenance</title><p>Please come back later.", "text/html"
        case "wrong_content_type":
            content_type = "text/plain"
        case "empty":
            body = b""
        case "duplicate_keys":
            body = _with_first_member_twice(body)
        case "huge":
            body = _with_member(body, "padding", "x" * fault.size_bytes)
        case "echo_token":
            body = _with_member(body, "debug", authorization or body.decode())
    return Answer(status=answer.status, body=body, content_type=content_type, headers=answer.headers)


async def deliver_raw(fault: Fault, answer: Answer, transport: asyncio.Transport) -> None:
    """Write an answer in a way that no HTTP library would, and end the connection."""
    announced = len(answer.body) + (fault.delta if fault.kind == "wrong_content_length" else 0)
    head = _head(answer, announced)
    if fault.kind == "slow_answer":
        await _drip(head + answer.body, fault.seconds, transport)
    elif fault.kind == "cut_mid_header":
        transport.write(head[: len(head) // 2])
    elif fault.kind == "cut_mid_body":
        transport.write(head + answer.body[: len(answer.body) // 2])
    else:
        transport.write(head + answer.body)
    transport.close()


async def _drip(content: bytes, seconds: float, transport: asyncio.Transport) -> None:
    for position in range(len(content)):
        if transport.is_closing():
            return
        transport.write(content[position : position + 1])
        await asyncio.sleep(seconds)


def _head(answer: Answer, content_length: int) -> bytes:
    headers = {"Content-Length": str(max(0, content_length)), **answer.headers}
    if answer.content_type is not None:
        headers["Content-Type"] = answer.content_type
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "\r\n"]).encode()


def _with_member(body: bytes, name: str, value: str) -> bytes:
    document = parse_json_object(body) if body else {}
    return json.dumps({**document, name: value}).encode()


def _with_first_member_twice(body: bytes) -> bytes:
    """Put the first member in front once more with another value: parsers then disagree on which counts."""
    first = next(iter(parse_json_object(body)))
    return b"{" + json.dumps(first).encode() + b':"duplicate",' + body.strip()[1:]
