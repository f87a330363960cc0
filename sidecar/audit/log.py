"""The growing end of a log.

Rules: the head is a value, so a transaction that fails leaves nothing to undo; a leaf is read back from its own bytes and
hashed again before it enters the tree; nothing is appended that the verifier would refuse.
"""

import struct
from dataclasses import dataclass
from hashlib import sha256

from sidecar.audit.entry import FIRST_PREVIOUS, AuditEntry, check_origin
from sidecar.audit.errors import EntryRefused, LogCorrupt
from sidecar.audit.merkle import HASH_BYTES, CompactRange, leaf_hash
from sidecar.domain.audit import AuditDraft, AuditEvent

__all__ = ["Leaf", "LogHead"]

_HEAD_VERSION = 1
_HEAD_START = struct.Struct(">BH")  # version, length of the origin
_HEAD_LAST = struct.Struct(">Q32s")  # boot time, leaf hash of the last entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One entry as it is stored. Raises LogCorrupt when the bytes do not have the hash."""

    index: int
    entry: bytes
    leaf_hash: bytes

    def __post_init__(self) -> None:
        if leaf_hash(self.entry) != self.leaf_hash:
            raise LogCorrupt("the bytes of an entry do not have its leaf hash")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogHead:
    """Where the log `origin` stands: enough to append and to sign a checkpoint, without reading any entry."""

    origin: str
    range: CompactRange
    last_leaf_hash: bytes
    last_boot_time_ns: int

    def __post_init__(self) -> None:
        check_origin(self.origin)
        if len(self.last_leaf_hash) != HASH_BYTES or not 0 <= self.last_boot_time_ns < 2**63:
            raise LogCorrupt("the head of the log is damaged")
        if self.range.size == 0 and (self.last_leaf_hash != FIRST_PREVIOUS or self.last_boot_time_ns):
            raise LogCorrupt("the head of an empty log names a last entry")
        if self.range.size & 1 and self.range.hashes[-1] != self.last_leaf_hash:
            raise LogCorrupt("the head of the log contradicts itself")

    @classmethod
    def empty(cls, origin: str) -> "LogHead":
        """The head of a new log. Raises EntryRefused when `origin` cannot name one."""
        return cls(origin=origin, range=CompactRange(), last_leaf_hash=FIRST_PREVIOUS, last_boot_time_ns=0)

    @property
    def size(self) -> int:
        """How many entries the log has; also the index of the next one."""
        return self.range.size

    def root(self) -> bytes:
        """The tree head over all entries, 32 bytes."""
        return self.range.root()

    def append(self, draft: AuditDraft, *, time_ns: int, boot_time_ns: int) -> tuple["LogHead", Leaf]:
        """The log with `draft` put on record: its new head and the new leaf, to be stored in one transaction.

        `time_ns` is UTC, `boot_time_ns` the time since the machine was started (CLOCK_BOOTTIME). Raises EntryRefused when the
        draft breaks the format or boot time goes back other than in SIDECAR_STARTED.
        """
        if boot_time_ns < self.last_boot_time_ns and draft.event is not AuditEvent.SIDECAR_STARTED:
            raise EntryRefused("boot time goes back: a restarted sidecar records SIDECAR_STARTED first")
        entry = AuditEntry(
            origin=self.origin,
            index=self.size,
            time_ns=time_ns,
            boot_time_ns=boot_time_ns,
            draft=draft,
            previous=self.last_leaf_hash,
        )
        leaf = _leaf(entry)
        head = LogHead(
            origin=self.origin,
            range=self.range.append(leaf.leaf_hash),
            last_leaf_hash=leaf.leaf_hash,
            last_boot_time_ns=boot_time_ns,
        )
        return head, leaf

    def to_bytes(self) -> bytes:
        """The head for the store (`docs/audit-log.md`, "Tree"), at most about 2.4 KiB."""
        origin = self.origin.encode("ascii")
        body = _HEAD_START.pack(_HEAD_VERSION, len(origin)) + origin
        body += _HEAD_LAST.pack(self.last_boot_time_ns, self.last_leaf_hash) + self.range.to_bytes()
        return body + sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> "LogHead":
        """The inverse of `to_bytes`. Raises LogCorrupt."""
        body, checksum = data[:-HASH_BYTES], data[-HASH_BYTES:]
        if len(body) < _HEAD_START.size or sha256(body).digest() != checksum:
            raise LogCorrupt("the head of the log is damaged")
        version, origin_length = _HEAD_START.unpack_from(body)
        last = _HEAD_START.size + origin_length
        if version != _HEAD_VERSION or len(body) < last + _HEAD_LAST.size:
            raise LogCorrupt("the head of the log has another format")
        last_boot_time_ns, last_leaf_hash = _HEAD_LAST.unpack_from(body, last)
        try:
            return cls(
                origin=body[_HEAD_START.size : last].decode("ascii"),
                range=CompactRange.from_bytes(body[last + _HEAD_LAST.size :]),
                last_leaf_hash=last_leaf_hash,
                last_boot_time_ns=last_boot_time_ns,
            )
        except (EntryRefused, UnicodeDecodeError) as error:
            raise LogCorrupt("the head of the log names no possible log") from error


def _leaf(entry: AuditEntry) -> Leaf:
    """The leaf of `entry`, read back: one flipped bit below a signed root would make the log unusable for good."""
    encoded = entry.encode()
    hashed = leaf_hash(encoded)
    if AuditEntry.decode(encoded) != entry:
        raise LogCorrupt("an entry did not survive its own encoding")
    return Leaf(index=entry.index, entry=encoded, leaf_hash=hashed)
