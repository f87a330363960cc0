"""The leaf of the log: one entry in its only possible encoding (`docs/audit-log.md`, "Entry").

Rules: an entry has exactly one encoding, and bytes that are not it are refused; what is not known is refused; there is no
free text; an entry that breaks the format cannot be made.
"""

import re
import struct
from dataclasses import dataclass
from typing import assert_never

from sidecar.audit.errors import EntryRefused, LogCorrupt
from sidecar.audit.merkle import HASH_BYTES
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome

__all__ = ["FIRST_PREVIOUS", "FORMAT_VERSION", "MAX_ENTRY_BYTES", "AuditEntry", "check_origin"]

FORMAT_VERSION = 1
MAX_ENTRY_BYTES = 4096
FIRST_PREVIOUS = bytes(HASH_BYTES)  # what entry 0 has for the leaf hash before it

_FIXED = struct.Struct(">BQQQHBQ32s")  # version, index, time, boot time, event, outcome, epoch, previous
_LENGTH = struct.Struct(">H")
_VARIABLE_FIELDS = 8
_MAX_NUMBER = 2**63 - 1  # fits the signed 64 bits of databases

_ORIGIN = re.compile(r"[!-*,-~]{1,255}\Z")  # visible ASCII without '+': it is a key name of signed notes, too
_CALLER = re.compile(r"[!-~]{0,2048}\Z")  # a SPIFFE ID has at most 2,048 characters
_IDENTIFIER = re.compile(r"[!-~]{0,255}\Z")
_REASON = re.compile(r"[A-Z_]{0,63}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """What is on record at `index` of the log `origin`. Times are in nanoseconds: UTC, and since the machine was started.

    Raises EntryRefused when a value breaks the format.
    """

    origin: str
    index: int
    time_ns: int
    boot_time_ns: int
    draft: AuditDraft
    previous: bytes  # leaf hash of the entry before, FIRST_PREVIOUS at index 0

    def __post_init__(self) -> None:
        check_origin(self.origin)
        _check_numbers(self)
        _check_codes(self.draft)
        _check_identifiers(self.draft)
        _check_digests(self)

    def encode(self) -> bytes:
        """The canonical bytes, at most MAX_ENTRY_BYTES."""
        draft = self.draft
        head = _FIXED.pack(
            FORMAT_VERSION,
            self.index,
            self.time_ns,
            self.boot_time_ns,
            draft.event,
            draft.outcome,
            draft.epoch,
            self.previous,
        )
        texts = (self.origin, draft.caller, draft.provider, draft.consent, draft.payment, draft.subject, draft.reason)
        return head + b"".join(_prefixed(value) for value in (*texts, draft.detail_digest))

    @classmethod
    def decode(cls, data: bytes) -> "AuditEntry":
        """The entry whose canonical bytes are `data`.

        Raises LogCorrupt for everything else.
        """
        if not _FIXED.size <= len(data) <= MAX_ENTRY_BYTES:
            raise LogCorrupt("an entry has another length")
        version, index, time_ns, boot_time_ns, event, outcome, epoch, previous = _FIXED.unpack_from(data)
        if version != FORMAT_VERSION:
            raise LogCorrupt("an entry has another format version")
        origin, caller, provider, consent, payment, subject, reason, detail_digest = _split(data[_FIXED.size :])
        try:
            return cls(
                origin=origin.decode("ascii"),
                index=index,
                time_ns=time_ns,
                boot_time_ns=boot_time_ns,
                previous=previous,
                draft=AuditDraft(
                    event=AuditEvent(event),
                    outcome=AuditOutcome(outcome),
                    caller=caller.decode("ascii"),
                    provider=provider.decode("ascii"),
                    consent=consent.decode("ascii"),
                    payment=payment.decode("ascii"),
                    subject=subject,
                    epoch=epoch,
                    reason=reason.decode("ascii"),
                    detail_digest=detail_digest,
                ),
            )
        except (EntryRefused, ValueError) as error:  # ValueError: not ASCII, or an unknown code
            raise LogCorrupt("an entry holds a value that the format does not know") from error


def check_origin(origin: str) -> None:
    """Raises EntryRefused when `origin` cannot name a log."""
    if not _ORIGIN.match(origin):
        raise EntryRefused("the log's origin must be 1 to 255 visible ASCII characters without '+'")


def _check_numbers(entry: AuditEntry) -> None:
    if not 0 <= entry.index <= _MAX_NUMBER:
        raise EntryRefused("the index of an audit entry is out of range")
    if not 1 <= entry.time_ns <= _MAX_NUMBER or not 0 <= entry.boot_time_ns <= _MAX_NUMBER:
        raise EntryRefused("a time of an audit entry is out of range")
    if not 0 <= entry.draft.epoch <= _MAX_NUMBER:
        raise EntryRefused("the epoch of an audit entry is out of range")


def _check_codes(draft: AuditDraft) -> None:
    # A plain integer would be written as well as a member of the enumeration, and refused only when read.
    if not isinstance(draft.event, AuditEvent) or not isinstance(draft.outcome, AuditOutcome):
        raise EntryRefused("an audit entry has an unknown event or outcome")


def _check_identifiers(draft: AuditDraft) -> None:
    if not _CALLER.match(draft.caller):
        raise EntryRefused("the caller of an audit entry is too long or has characters other than visible ASCII")
    if not all(_IDENTIFIER.match(value) for value in (draft.provider, draft.consent, draft.payment)):
        raise EntryRefused("an identifier of an audit entry is too long or has characters other than visible ASCII")
    if not _REASON.match(draft.reason):
        raise EntryRefused("the reason of an audit entry is not the name of an error reason")


def _check_digests(entry: AuditEntry) -> None:
    if len(entry.draft.subject) not in (0, HASH_BYTES) or len(entry.draft.detail_digest) not in (0, HASH_BYTES):
        raise EntryRefused("a digest of an audit entry has another length")
    if len(entry.previous) != HASH_BYTES:
        raise EntryRefused("the previous leaf hash of an audit entry has another length")
    if entry.index == 0 and entry.previous != FIRST_PREVIOUS:
        raise EntryRefused("the first audit entry has an entry before it")


def _prefixed(value: str | bytes) -> bytes:
    match value:
        case str():
            data = value.encode("ascii")
        case bytes():
            data = value
        case _:
            assert_never(value)
    return _LENGTH.pack(len(data)) + data


def _split(data: bytes) -> list[bytes]:
    """The eight length-prefixed fields, and nothing behind them."""
    fields: list[bytes] = []
    start = 0
    for _ in range(_VARIABLE_FIELDS):
        if len(data) - start < _LENGTH.size:
            raise LogCorrupt("an entry ends within a field")
        (length,) = _LENGTH.unpack_from(data, start)
        start += _LENGTH.size
        if len(data) - start < length:
            raise LogCorrupt("an entry ends within a field")
        fields.append(data[start : start + length])
        start += length
    if start != len(data):
        raise LogCorrupt("an entry has bytes behind its last field")
    return fields
