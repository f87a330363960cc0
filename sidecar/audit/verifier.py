"""The offline verifier of an exported log: `python -m sidecar.audit.verifier EXPORT --key PUBLIC_KEY.pem`.

Rules: it imports nothing of the sidecar and implements `docs/audit-log.md` anew, parsing and hashing included, so that one
mistake cannot be in both writer and verifier; key and origin are pinned from outside, never taken from what they have to
vouch for; whatever the input is, the answer is a report, and nothing unverified is repeated in it.
"""

import argparse
import base64
import binascii
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Final, NoReturn, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["Finding", "LineSource", "Report", "Verdict", "main", "verify_export"]

EVENTS: Final[Mapping[int, str]] = {
    1: "SIDECAR_STARTED",
    2: "SIDECAR_STOPPED",
    3: "CALL_REFUSED",
    10: "CONSENT_CREATED",
    11: "CONSENT_AUTHORISATION_STARTED",
    12: "CONSENT_CODE_EXCHANGE",
    13: "CONSENT_ACTIVATED",
    14: "CONSENT_FAILED",
    15: "CONSENT_REVOKED",
    16: "CONSENT_KEY_DESTROYED",
    17: "CONSENT_EXPIRED",
    18: "CONSENT_IMPORTED",
    19: "CONSENT_NEEDS_REAUTHORISATION",
    30: "TOKEN_USE",
    31: "TOKEN_REFRESH_INTENT",
    32: "TOKEN_REFRESHED",
    33: "TOKEN_REFRESH_FAILED",
    40: "PAYMENT_INTENT",
    41: "PAYMENT_DISPATCHED",
    42: "PAYMENT_OUTCOME",
    43: "PAYMENT_RECONCILING",
    44: "PAYMENT_STATUS",
    45: "PAYMENT_NEEDS_ATTENTION",
    46: "PAYMENT_ABANDONED",
    47: "PAYMENT_RESOLVED",
    60: "SIGNATURE_MADE",
    70: "KEY_CREATED",
    80: "LOG_EXPORTED",
    81: "ADMINISTRATION",
}
OUTCOMES: Final[Mapping[int, str]] = {1: "INTENDED", 2: "SUCCEEDED", 3: "REFUSED", 4: "UNKNOWN", 5: "FAILED"}

_FINDINGS: Final = frozenset({b"EXECUTED", b"NOT_EXECUTED"})  # reasons of PAYMENT_RESOLVED

_HEADER = b"custody-audit-export/1 "
_MAX_LINE_BYTES = 87_390  # the longest note in base64, with "note " and the newline
_MAX_NOTE_BYTES = 65_536
_MAX_ENTRY_BYTES = 4_096
_MAX_NUMBER = 2**63 - 1
_MAX_SIGNATURES = 16
_MAX_LISTED_VIOLATIONS = 100

_ORIGIN = re.compile(rb"[!-*,-~]{1,255}\Z")
_VISIBLE = re.compile(rb"[!-~]*\Z")
_REASON = re.compile(rb"[A-Z_]{0,63}\Z")
_DECIMAL = re.compile(rb"(?:0|[1-9][0-9]{0,18})\Z")
_NOTE_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")
_NOTE_KEY_NAME = re.compile(r"[^\s+]+\Z")


class Verdict(StrEnum):
    VERIFIED = "verified"
    NOT_COVERED = "not covered"  # no fault found, but nothing vouches for the last entries
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong, and where: the index of the entry (the first entry is 0) and the line of the export (the first is 1)."""

    message: str
    entry: int | None = None
    line: int | None = None

    def __str__(self) -> str:
        places = [f"entry {self.entry}"] if self.entry is not None else []
        places += [f"line {self.line}"] if self.line is not None else []
        return f"{', '.join(places)}: {self.message}" if places else self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the verifier found. After a failure the figures tell how far it came; entries below `covered` stay proven."""

    verdict: Verdict
    failure: Finding | None  # the first one; the verifier stops there
    violations: tuple[Finding, ...]  # of the rules of payment, at most 100
    violation_count: int
    origin: str | None
    origin_pinned: bool
    entries: int
    covered: int  # the size of the last good checkpoint: entries 0 to covered - 1
    checkpoints: int
    witnessed: tuple[int, ...]  # sizes at which somebody else's checkpoint agrees
    events: Mapping[str, int]
    payments_dispatched: int
    first_time_ns: int | None
    last_time_ns: int | None
    clock_steps_back: int

    @property
    def ok(self) -> bool:
        """True only if every entry is proven."""
        return self.verdict is Verdict.VERIFIED


class LineSource(Protocol):
    """A file opened for reading bytes."""

    def readline(self, size: int, /) -> bytes: ...


def verify_export(
    stream: LineSource, *, public_key: bytes, origin: str | None = None, witnessed: Sequence[bytes] = ()
) -> Report:
    """Verify the export in `stream` under the audit key `public_key` (PEM, SubjectPublicKeyInfo, P-256).

    `origin` is the log that it must be; None takes the name from the export. `witnessed` are checkpoints (signed notes) of
    the log that somebody else kept. Never raises for any content: the report says what is wrong.
    """
    check = _Verification(stream, pinned_origin=origin)
    try:
        check.run(public_key, witnessed)
    except _Fault as fault:
        return check.report(Finding(message=fault.message, entry=check.current_entry, line=check.current_line))
    except OSError:
        return check.report(Finding(message="the export cannot be read to its end", line=check.current_line))
    return check.report(None)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0 verified, 4 not verified, 2 a file cannot be read."""
    options = _parse_arguments(arguments)
    try:
        public_key = _read_small_file(options.key)
        witnessed = [_read_small_file(path) for path in options.witnessed]
        with Path(options.export).open("rb") as stream:
            report = verify_export(stream, public_key=public_key, origin=options.origin, witnessed=witnessed)
    except OSError as error:
        print(f"cannot read a file: {error.strerror}", file=sys.stderr)
        return 2
    print("\n".join(_describe(report, witness_given=bool(witnessed))))
    return 0 if report.ok else 4


class _Fault(Exception):
    """Never leaves this module."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class _Verification:
    """One pass over one export."""

    def __init__(self, stream: LineSource, *, pinned_origin: str | None) -> None:
        self._stream = stream
        self._pinned_origin = pinned_origin
        self._origin: str | None = None
        self._tree = _Tree()
        self._chain = _Chain()
        self._payments = _Payments()
        self._events: Counter[str] = Counter()
        self._checkpoints = 0
        self._covered = 0
        self._covered_root = b""
        self._awaited: dict[int, bytes] = {}  # witnessed roots by size, until the tree has that size
        self._witnessed: list[int] = []
        self.current_line: int | None = None
        self.current_entry: int | None = None

    def run(self, public_key: bytes, witnessed: Sequence[bytes]) -> None:
        key = _AuditKey(public_key)
        lines = self._lines()
        origin = self._read_header(next(lines))
        self.current_line = None
        for note in witnessed:
            self._expect_witnessed(key.open_checkpoint(_note_text(note), origin))
        self._compare_with_witness()
        for line in lines:
            kind, _, rest = line.partition(b" ")
            if kind == b"end":
                self._read_end(rest)
                break
            self._read_record(key, origin, kind, rest)

    def report(self, failure: Finding | None) -> Report:
        return Report(
            verdict=self._verdict(failure),
            failure=failure,
            violations=tuple(self._payments.violations),
            violation_count=self._payments.violation_count,
            origin=self._origin,
            origin_pinned=self._pinned_origin is not None,
            entries=self._tree.size,
            covered=self._covered,
            checkpoints=self._checkpoints,
            witnessed=tuple(self._witnessed),
            events=dict(sorted(self._events.items())),
            payments_dispatched=self._payments.dispatched_count,
            first_time_ns=self._chain.first_time_ns,
            last_time_ns=self._chain.last_time_ns,
            clock_steps_back=self._chain.clock_steps_back,
        )

    def _verdict(self, failure: Finding | None) -> Verdict:
        if failure is not None or self._payments.violation_count:
            return Verdict.FAILED
        if not self._checkpoints or self._covered < self._tree.size:
            return Verdict.NOT_COVERED
        return Verdict.VERIFIED

    def _lines(self) -> Iterator[bytes]:
        """The lines without their newline, each bounded in length."""
        number = 0
        while True:
            number += 1
            self.current_line, self.current_entry = number, None
            line = self._stream.readline(_MAX_LINE_BYTES)
            if not line.endswith(b"\n"):
                _refuse("the export is cut off" if len(line) < _MAX_LINE_BYTES else "the line is too long")
            yield line[:-1]

    def _read_header(self, line: bytes) -> str:
        name = line.removeprefix(_HEADER)
        if not line.startswith(_HEADER) or not _ORIGIN.match(name):
            _refuse("this is no export of an audit log in format 1")
        self._origin = name.decode("ascii")
        if self._pinned_origin not in (None, self._origin):
            _refuse("the export is of another log than the one asked for")
        return self._origin

    def _read_record(self, key: "_AuditKey", origin: str, kind: bytes, rest: bytes) -> None:
        if kind == b"leaf":
            self._read_leaf(_unbase64(rest), origin)
        elif kind == b"note":
            self._read_note(key.open_checkpoint(_note_text(_unbase64(rest)), origin))
        else:
            _refuse("the line is neither leaf, note nor end")

    def _read_leaf(self, data: bytes, origin: str) -> None:
        self.current_entry = self._tree.size
        entry = _parse_entry(data)
        if entry.origin != origin:
            _refuse("the entry belongs to another log")
        hashed = sha256(b"\0" + data).digest()
        self._chain.follow(entry, hashed)
        self._tree.add(hashed)
        self._events[EVENTS[entry.event]] += 1
        self._payments.see(entry, covered=self._covered, line=self.current_line)
        self._compare_with_witness()

    def _read_note(self, checkpoint: "_Checkpoint") -> None:
        size, leaves = checkpoint.size, self._tree.size
        if size > leaves:
            _refuse(f"a checkpoint covers {size} entries, but only {leaves} stand before it: entries are missing")
        if size < leaves:
            _refuse(f"a checkpoint of size {size} stands behind {leaves} entries: it is out of place")
        if self._checkpoints and size == self._covered:
            same = checkpoint.root == self._covered_root
            _refuse("a checkpoint is repeated" if same else "two checkpoints of one size differ: the log was forked")
        if checkpoint.root != self._tree.root():
            _refuse(
                f"the signed root of size {size} is not the root of the entries: they were changed, or the log forked"
            )
        self._checkpoints += 1
        self._covered, self._covered_root = size, checkpoint.root

    def _read_end(self, rest: bytes) -> None:
        leaves, _, notes = rest.partition(b" ")
        if not _DECIMAL.match(leaves) or not _DECIMAL.match(notes):
            _refuse("the last line does not have the form: end LEAVES NOTES")
        if (int(leaves), int(notes)) != (self._tree.size, self._checkpoints):
            _refuse("the last line counts other numbers of entries and checkpoints: lines are missing or were added")
        if self._stream.readline(1):
            _refuse("something follows the last line")
        if self._awaited:
            most = max(self._awaited)
            _refuse(f"a witness has seen {most} entries, the export has {self._tree.size}: the log was cut back")

    def _expect_witnessed(self, checkpoint: "_Checkpoint") -> None:
        if self._awaited.setdefault(checkpoint.size, checkpoint.root) != checkpoint.root:
            _refuse("two witnessed checkpoints of one size differ: the log was forked")

    def _compare_with_witness(self) -> None:
        root = self._awaited.pop(self._tree.size, None)
        if root is None:
            return
        if root != self._tree.root():
            _refuse(f"a witness has seen other entries below size {self._tree.size}: the log was forked or changed")
        self._witnessed.append(self._tree.size)


class _Tree:
    """RFC 6962 as a binary counter: place h holds the root of a perfect subtree of 2^h leaves, or nothing."""

    def __init__(self) -> None:
        self.size = 0
        self._places: list[bytes | None] = []

    def add(self, leaf: bytes) -> None:
        carry = leaf
        for height, held in enumerate(self._places):
            if held is None:
                self._places[height] = carry
                break
            carry, self._places[height] = _inner(held, carry), None
        else:
            self._places.append(carry)
        self.size += 1

    def root(self) -> bytes:
        result: bytes | None = None
        for held in self._places:
            if held is not None:
                result = held if result is None else _inner(held, result)
        return sha256().digest() if result is None else result


class _Chain:
    """Each entry continues the one before: its index, its hash, its times."""

    def __init__(self) -> None:
        self._next_index = 0
        self._last_hash = bytes(32)
        self._last_boot_time_ns = 0
        self.first_time_ns: int | None = None
        self.last_time_ns: int | None = None
        self.clock_steps_back = 0

    def follow(self, entry: "_Entry", hashed: bytes) -> None:
        if entry.index != self._next_index:
            _refuse(f"the entry says that it is number {entry.index}: entries are missing, added or reordered")
        if entry.previous != self._last_hash:
            _refuse("the entry does not continue the one before")
        if entry.boot_time_ns < self._last_boot_time_ns and EVENTS[entry.event] != "SIDECAR_STARTED":
            _refuse("boot time goes back without a restart")
        self._see_clock(entry.time_ns)
        self._next_index, self._last_hash, self._last_boot_time_ns = entry.index + 1, hashed, entry.boot_time_ns

    def _see_clock(self, time_ns: int) -> None:
        if self.last_time_ns is not None and time_ns < self.last_time_ns:
            self.clock_steps_back += 1
        if self.first_time_ns is None:
            self.first_time_ns = time_ns
        self.last_time_ns = time_ns


@dataclass(slots=True)
class _PaymentTrail:
    announced: bool = False  # an intent, or a take-over from another instance, is on record
    dispatched: bool = False
    last_dispatch: int = -1  # index of the entry
    last_epoch: int = -1
    acted: bool = False  # dispatched here, or taken over after a dispatch elsewhere
    resolved: bool = False  # a person has said what became of it


@dataclass(slots=True)
class _Payments:
    """The rules of payment (`docs/audit-log.md`, "Payments"), checked entry by entry."""

    violations: list[Finding] = field(default_factory=list)
    violation_count: int = 0
    dispatched_count: int = 0
    _trails: dict[bytes, _PaymentTrail] = field(default_factory=dict)

    def see(self, entry: "_Entry", *, covered: int, line: int | None) -> None:
        event = EVENTS[entry.event]
        if not event.startswith("PAYMENT_"):
            return
        for message in self._judge(event, entry, covered):
            self.violation_count += 1
            if len(self.violations) < _MAX_LISTED_VIOLATIONS:
                self.violations.append(Finding(message=message, entry=entry.index, line=line))

    def _judge(self, event: str, entry: "_Entry", covered: int) -> Iterator[str]:
        if not entry.payment:
            yield "an entry about a payment names none"
            return
        trail = self._trails.setdefault(entry.payment, _PaymentTrail())
        match event:
            case "PAYMENT_INTENT":
                trail.announced = True
            case "PAYMENT_RECONCILING":
                trail.announced = trail.acted = True
            case "PAYMENT_DISPATCHED":
                yield from self._judge_dispatch(trail, entry)
            case "PAYMENT_OUTCOME":
                yield from _judge_outcome(trail, entry, covered)
            case "PAYMENT_RESOLVED":
                yield from _judge_resolution(trail, entry)

    def _judge_dispatch(self, trail: _PaymentTrail, entry: "_Entry") -> Iterator[str]:
        if not trail.announced:
            yield "a payment was dispatched without an intent on record before"
        if trail.dispatched and entry.epoch <= trail.last_epoch:
            yield "a payment was dispatched again without a new epoch"
        if trail.resolved:
            yield "a payment was dispatched after a person had said what became of it"
        self.dispatched_count += not trail.dispatched
        trail.dispatched = trail.acted = True
        trail.last_dispatch, trail.last_epoch = entry.index, max(entry.epoch, trail.last_epoch)


def _judge_outcome(trail: _PaymentTrail, entry: "_Entry", covered: int) -> Iterator[str]:
    if trail.last_dispatch >= covered:
        yield "a payment has an outcome, but no checkpoint covered its dispatch before"
    if not trail.acted and OUTCOMES[entry.outcome] in ("SUCCEEDED", "UNKNOWN"):
        yield "a payment has an outcome, but no dispatch on record before"


def _judge_resolution(trail: _PaymentTrail, entry: "_Entry") -> Iterator[str]:
    if trail.resolved:
        yield "a payment was resolved twice"
    if not entry.caller or not entry.has_digest or entry.reason not in _FINDINGS:
        yield "a payment was resolved without saying by whom, with what finding, or what was checked"
    trail.resolved = True


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    size: int
    root: bytes


class _AuditKey:
    """The pinned key: the only thing that makes a checkpoint worth reading."""

    def __init__(self, pem: bytes) -> None:
        try:
            key = serialization.load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm):
            _refuse("the audit key is not a public key in PEM")
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            _refuse("the audit key is not an ECDSA key on the curve P-256")
        self._key = key
        spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self._key_id = sha256(spki).digest()[:4]

    def open_checkpoint(self, note: str, origin: str) -> _Checkpoint:
        """The checkpoint in `note`. Its text is looked at only after the signature has been verified."""
        head, blank_line, tail = note.rpartition("\n\n")
        if not head or not blank_line or tail[-1:] != "\n":
            _refuse("a checkpoint is not a signed note")
        text = f"{head}\n".encode()
        blobs = [blob for name, blob in _signature_lines(tail) if name == origin and blob[:4] == self._key_id]
        if len(blobs) != 1:
            _refuse("a checkpoint is not signed by the audit key of this log (once)")
        self._verify(blobs[0][4:], text)
        return _parse_checkpoint(text, origin)

    def _verify(self, signature: bytes, text: bytes) -> None:
        try:
            self._key.verify(signature, text, ec.ECDSA(hashes.SHA256()))  # refuses BER and padding, too
        except InvalidSignature:
            _refuse("the signature of a checkpoint is wrong")


def _note_text(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        _refuse("a checkpoint is not UTF-8")
    if len(data) > _MAX_NOTE_BYTES or _NOTE_CONTROL.search(text):
        _refuse("a checkpoint is too long or has control characters")
    return text


def _signature_lines(tail: str) -> Iterator[tuple[str, bytes]]:
    """Key name, and key id with signature, of each line."""
    lines = tail[:-1].split("\n")
    if len(lines) > _MAX_SIGNATURES:
        _refuse("a checkpoint has too many signatures")
    for line in lines:
        parts = line.split(" ")
        if len(parts) != 3 or parts[0] != "\u2014" or not _NOTE_KEY_NAME.match(parts[1]) or not parts[2].isascii():
            _refuse("a checkpoint has a malformed signature line")
        blob = _unbase64(parts[2].encode("ascii"))
        if len(blob) < 5:
            _refuse("a checkpoint has an empty signature")
        yield parts[1], blob


def _parse_checkpoint(text: bytes, origin: str) -> _Checkpoint:
    lines = text.split(b"\n")
    if len(lines) != 4 or lines[3] or not _DECIMAL.match(lines[1]):
        _refuse("a checkpoint does not have the form origin, size, root")
    if lines[0] != origin.encode("ascii"):
        _refuse("a checkpoint belongs to another log")
    size, root = int(lines[1]), _unbase64(lines[2])
    if size > _MAX_NUMBER or len(root) != 32:
        _refuse("the size or root of a checkpoint is out of range")
    return _Checkpoint(size=size, root=root)


@dataclass(frozen=True, slots=True)
class _Entry:
    index: int
    time_ns: int
    boot_time_ns: int
    event: int
    outcome: int
    epoch: int
    previous: bytes
    origin: str
    caller: bytes
    payment: bytes
    reason: bytes
    has_digest: bool


def _parse_entry(data: bytes) -> _Entry:
    """Refuses every byte string that is not the one encoding of one entry of version 1."""
    if not 1 <= len(data) <= _MAX_ENTRY_BYTES:
        _refuse("the entry has another length")
    reader = _Reader(data)
    if reader.number(1) != 1:
        _refuse("the entry has an unknown format version")
    index, time_ns, boot_time_ns = reader.number(8), reader.number(8), reader.number(8)
    event, outcome, epoch = reader.number(2), reader.number(1), reader.number(8)
    previous = reader.take(32)
    origin, caller, provider, consent, payment, subject, reason, digest = (reader.field() for _ in range(8))
    reader.finish()
    if max(index, time_ns, boot_time_ns, epoch) > _MAX_NUMBER or time_ns == 0:
        _refuse("a number of the entry is out of range")
    if index == 0 and any(previous):
        _refuse("the first entry has an entry before it")
    if event not in EVENTS or outcome not in OUTCOMES:
        _refuse("the entry has an unknown event or outcome")
    if not _ORIGIN.match(origin) or not _REASON.match(reason):
        _refuse("the origin or reason of the entry is malformed")
    for value, limit in ((caller, 2048), (provider, 255), (consent, 255), (payment, 255)):
        if len(value) > limit or not _VISIBLE.match(value):
            _refuse("an identifier of the entry is malformed")
    if len(subject) not in (0, 32) or len(digest) not in (0, 32):
        _refuse("a digest of the entry has another length")
    return _Entry(
        index=index,
        time_ns=time_ns,
        boot_time_ns=boot_time_ns,
        event=event,
        outcome=outcome,
        epoch=epoch,
        previous=previous,
        origin=origin.decode("ascii"),
        caller=caller,
        payment=payment,
        reason=reason,
        has_digest=bool(digest),
    )


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def take(self, length: int) -> bytes:
        part = self._data[self._place : self._place + length]
        if len(part) != length:
            _refuse("the entry ends too early")
        self._place += length
        return part

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "big")

    def field(self) -> bytes:
        return self.take(self.number(2))

    def finish(self) -> None:
        if self._place != len(self._data):
            _refuse("the entry goes on behind its end")


def _inner(left: bytes, right: bytes) -> bytes:
    return sha256(struct.pack("B32s32s", 1, left, right)).digest()


def _unbase64(data: bytes) -> bytes:
    try:
        decoded = binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error:
        _refuse("a part is not base64")
    if base64.b64encode(decoded) != data:  # unused bits, missing padding: several texts of the same bytes
        _refuse("a part is base64, but not canonical")
    return decoded


def _refuse(message: str) -> NoReturn:
    raise _Fault(message)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sidecar.audit.verifier",
        description="Verify an exported audit log with the public key alone.",
        epilog="exit status: 0 every entry is proven; 4 not verified; 2 wrong usage or unreadable file",
    )
    parser.add_argument("export", metavar="EXPORT", help="file written by the export of the log")
    parser.add_argument(
        "--key", required=True, metavar="PUBLIC_KEY.pem", help="the public audit key, from a safe source"
    )
    parser.add_argument("--origin", metavar="ORIGIN", help="the log that it must be (default: the name in the export)")
    parser.add_argument(
        "--witnessed",
        action="append",
        default=[],
        metavar="NOTE_FILE",
        help="a checkpoint of the log that was kept elsewhere; finds a log that was cut back or forked; repeatable",
    )
    return parser.parse_args(arguments)


def _read_small_file(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(_MAX_NOTE_BYTES + 1)


def _describe(report: Report, *, witness_given: bool) -> Iterator[str]:
    yield _headline(report)
    yield from (f"  violation: {violation}" for violation in report.violations)
    if report.violation_count > len(report.violations):
        yield f"  violations: {report.violation_count} in all"
    if report.origin is not None:
        yield f"  log:         {report.origin}" + (
            "" if report.origin_pinned else " (by its own account; pin it with --origin)"
        )
    yield f"  entries:     {report.entries}{_describe_period(report)}"
    yield f"  covered:     {_describe_cover(report)}"
    yield f"  checkpoints: {report.checkpoints}"
    yield f"  witnessed:   {_describe_witness(report, witness_given=witness_given)}"
    yield f"  payments:    {report.payments_dispatched} dispatched"
    if report.clock_steps_back:
        yield f"  clock:       stepped back {report.clock_steps_back} times"
    yield from (f"    {count:>7} {event}" for event, count in report.events.items())


def _headline(report: Report) -> str:
    match report.verdict:
        case Verdict.VERIFIED:
            return "VERIFIED: every entry is proven by a signed checkpoint"
        case Verdict.NOT_COVERED:
            return f"NOT YET COVERED: no fault, but no checkpoint vouches for the entries from {report.covered} on"
        case Verdict.FAILED if report.failure is not None:
            return f"FAILED: {report.failure}"
        case Verdict.FAILED:
            return f"FAILED: the log is genuine and breaks the rules of payment, {report.violation_count} times"


def _describe_period(report: Report) -> str:
    if report.first_time_ns is None or report.last_time_ns is None:
        return ""
    return f" ({_utc(report.first_time_ns)} to {_utc(report.last_time_ns)})"


def _describe_cover(report: Report) -> str:
    if not report.checkpoints:
        return "nothing: there is no checkpoint"
    uncovered = report.entries - report.covered
    return f"until size {report.covered}" + (f"; the last {uncovered} NOT YET COVERED" if uncovered else "")


def _describe_witness(report: Report, *, witness_given: bool) -> str:
    if not witness_given:
        return "not checked: a log cut back to an older checkpoint would look whole (--witnessed)"
    if not report.witnessed:
        return "no witnessed checkpoint was confirmed"
    return "agrees at size " + ", ".join(str(size) for size in sorted(report.witnessed))


def _utc(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns // 10**9, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


if __name__ == "__main__":
    sys.exit(main())
