"""The growing end of the log."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.audit.entry import AuditEntry
from sidecar.audit.errors import EntryRefused, LogCorrupt
from sidecar.audit.log import Leaf, LogHead
from sidecar.audit.merkle import CompactRange, leaf_hash, tree_root
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from tests.unit.audit.log_builder import ORIGIN, VECTORS, draft_with

VECTOR: dict[str, Any] = json.loads((VECTORS / "export_expected.json").read_text())
DRAFT = AuditDraft(event=AuditEvent.TOKEN_USE, outcome=AuditOutcome.INTENDED, consent="c-1")


def grown(count: int) -> tuple[LogHead, list[Leaf]]:
    head, leaves = LogHead.empty(ORIGIN), []
    for number in range(count):
        head, leaf = head.append(DRAFT, time_ns=1 + number, boot_time_ns=number)
        leaves.append(leaf)
    return head, leaves


@given(count=st.integers(0, 40))
def test_each_leaf_continues_the_one_before(count: int) -> None:
    """Indexes run from 0, each entry holds the hash of the one before, and the root is that of all leaf hashes."""
    head, leaves = grown(count)
    decoded = [AuditEntry.decode(leaf.entry) for leaf in leaves]

    assert [leaf.index for leaf in leaves] == [entry.index for entry in decoded] == list(range(count))
    assert [entry.previous for entry in decoded] == [bytes(32), *(leaf.leaf_hash for leaf in leaves)][:count]
    assert all(entry.draft == DRAFT and entry.origin == ORIGIN for entry in decoded)
    assert all(leaf_hash(leaf.entry) == leaf.leaf_hash for leaf in leaves)
    assert (head.size, head.root()) == (count, tree_root([leaf.leaf_hash for leaf in leaves]))


def test_appending_leaves_the_old_head_as_it_was() -> None:
    """A transaction that fails has nothing to undo: appending again to the old head gives the same leaf."""
    head, _ = grown(3)

    first = head.append(DRAFT, time_ns=9, boot_time_ns=9)
    second = head.append(DRAFT, time_ns=9, boot_time_ns=9)

    assert first == second
    assert head.size == 3


@given(count=st.integers(0, 70))
def test_a_head_restored_from_its_bytes_goes_on_alike(count: int) -> None:
    """A restart changes nothing: the restored head is equal, small, and appends the same leaf."""
    head, _ = grown(count)
    stored = head.to_bytes()
    restored = LogHead.from_bytes(stored)

    assert restored == head
    assert len(stored) < 2500
    assert restored.append(DRAFT, time_ns=99, boot_time_ns=99) == head.append(DRAFT, time_ns=99, boot_time_ns=99)


def test_known_head() -> None:
    """The head behind the vectors' export has exactly the vectors' bytes."""
    stored = bytes.fromhex(VECTOR["head"])
    head = LogHead.from_bytes(stored)

    assert head.to_bytes() == stored
    assert (head.origin, head.size, head.root().hex()) == (VECTOR["origin"], 8, VECTOR["roots"][8])
    assert head.last_leaf_hash.hex() == VECTOR["leaf_hashes"][7]


@given(count=st.integers(0, 9), data=st.data())
def test_a_damaged_head_is_refused(count: int, data: st.DataObject) -> None:
    """One changed byte, a missing or an added one: the log goes nowhere from there."""
    stored = bytearray(grown(count)[0].to_bytes())
    place = data.draw(st.integers(0, len(stored) - 1))
    stored[place] ^= data.draw(st.integers(1, 255))

    for damaged in (bytes(stored), bytes(stored[:place]), bytes(stored) + b"\0"):
        with pytest.raises(LogCorrupt):
            LogHead.from_bytes(damaged)


def with_checksum(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


BODY = grown(3)[0].to_bytes()[:-32]
NAME = ORIGIN.encode()
FOREIGN_HEADS = {
    "another version": b"\2" + BODY[1:],
    "an origin with a blank": BODY.replace(NAME, b" " * len(NAME)),
    "an origin that is not ASCII": BODY.replace(NAME, b"\xe4" * len(NAME)),
    "an origin longer than the rest": b"\1\xff\xff" + BODY[3:],
    "nothing": b"",
    "a version alone": b"\1",
    "no tree": BODY[: 3 + len(NAME) + 40],
    "a cut hash": BODY[:-1],
    "a hash too many": BODY + bytes(32),
    "another last hash": BODY[: 3 + len(NAME) + 8] + bytes(32) + BODY[3 + len(NAME) + 40 :],
}


@pytest.mark.parametrize("body", FOREIGN_HEADS.values(), ids=FOREIGN_HEADS.keys())
def test_a_head_with_a_good_checksum_must_make_sense_too(body: bytes) -> None:
    """The checksum finds bit rot; form and consistency are checked besides."""
    assert LogHead.from_bytes(with_checksum(BODY)) == grown(3)[0]
    with pytest.raises(LogCorrupt):
        LogHead.from_bytes(with_checksum(body))


@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_are_no_head(data: bytes) -> None:
    """Bytes that are no head raise LogCorrupt and nothing else, with or without a good checksum."""
    for candidate in (data, with_checksum(data), with_checksum(b"\1" + data)):
        try:
            assert LogHead.from_bytes(candidate).to_bytes() == candidate
        except LogCorrupt:
            continue


@pytest.mark.parametrize(
    "changes",
    [{"last_leaf_hash": b"\1" * 32}, {"last_leaf_hash": b""}, {"last_boot_time_ns": -1}, {"range": CompactRange()}],
    ids=str,
)
def test_a_head_that_contradicts_itself_cannot_be_made(changes: dict[str, Any]) -> None:
    """The last hash is the last leaf of the tree; an empty log has no last entry."""
    with pytest.raises(LogCorrupt):
        replace(grown(3)[0], **changes)


def test_a_leaf_has_the_hash_of_its_bytes() -> None:
    """Bytes that changed between log and store are noticed when the leaf is made from them again."""
    leaf = grown(1)[1][0]
    flipped = bytes([leaf.entry[0] ^ 1]) + leaf.entry[1:]

    with pytest.raises(LogCorrupt):
        Leaf(index=0, entry=flipped, leaf_hash=leaf.leaf_hash)


def test_an_entry_that_does_not_survive_its_encoding_never_enters_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leaf is read back before it is hashed into the tree: a flipped bit stops it."""
    encode = AuditEntry.encode

    def flipping(self: AuditEntry) -> bytes:
        encoded = bytearray(encode(self))
        encoded[16] ^= 1  # the last byte of the time: still a valid entry, but another one
        return bytes(encoded)

    monkeypatch.setattr(AuditEntry, "encode", flipping)
    with pytest.raises(LogCorrupt):
        LogHead.empty(ORIGIN).append(DRAFT, time_ns=100, boot_time_ns=1)


def test_a_bad_draft_leaves_the_log_unchanged() -> None:
    """No entry, no act: a draft that breaks the schema is refused."""
    head, _ = grown(2)

    with pytest.raises(EntryRefused):
        head.append(draft_with(DRAFT, reason="free text"), time_ns=9, boot_time_ns=9)


def test_boot_time_goes_back_only_with_a_start() -> None:
    """After a restart of the machine the first entry is SIDECAR_STARTED; the verifier would refuse another."""
    head, _ = grown(5)

    with pytest.raises(EntryRefused):
        head.append(DRAFT, time_ns=9, boot_time_ns=3)
    started, leaf = head.append(draft_with(DRAFT, event=AuditEvent.SIDECAR_STARTED), time_ns=9, boot_time_ns=3)
    assert (started.last_boot_time_ns, leaf.index) == (3, 5)


def test_the_clock_may_step_back() -> None:
    """A corrected clock must not stop payments: UTC may go back."""
    head, _ = grown(5)

    assert head.append(DRAFT, time_ns=1, boot_time_ns=9)[1].index == 5


@pytest.mark.parametrize("origin", ["", "two words", "a+b", "o" * 256, "\u00e4", "line\n"])
def test_a_log_needs_a_name_that_notes_can_carry(origin: str) -> None:
    """The origin is the key name of its checkpoints: visible ASCII without '+'."""
    with pytest.raises(EntryRefused):
        LogHead.empty(origin)
