"""The entry: one encoding, and nothing else is read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.audit import verifier
from sidecar.audit.entry import FIRST_PREVIOUS, MAX_ENTRY_BYTES, AuditEntry
from sidecar.audit.errors import EntryRefused, LogCorrupt
from sidecar.audit.merkle import leaf_hash
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.errors import CustodyError
from tests.unit.audit.log_builder import ORIGIN, VECTORS, draft_with

VECTOR: dict[str, Any] = json.loads((VECTORS / "entries.json").read_text())
DRAFT = AuditDraft(event=AuditEvent.TOKEN_USE, outcome=AuditOutcome.INTENDED, caller="workload:shop", consent="c-1")

visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=60)
digests = st.one_of(st.just(b""), st.binary(min_size=32, max_size=32))
numbers = st.integers(0, 2**63 - 1)
entries = st.builds(
    AuditEntry,
    origin=st.from_regex(r"\A[!-*,-~]{1,80}\Z"),
    index=st.integers(1, 2**63 - 1),
    time_ns=st.integers(1, 2**63 - 1),
    boot_time_ns=numbers,
    previous=st.binary(min_size=32, max_size=32),
    draft=st.builds(
        AuditDraft,
        event=st.sampled_from(AuditEvent),
        outcome=st.sampled_from(AuditOutcome),
        caller=visible,
        provider=visible,
        consent=visible,
        payment=visible,
        subject=digests,
        epoch=numbers,
        reason=st.from_regex(r"\A[A-Z_]{0,63}\Z"),
        detail_digest=digests,
    ),
)


def entry_of(fields: dict[str, Any]) -> AuditEntry:
    return AuditEntry(
        origin=fields["origin"],
        index=fields["index"],
        time_ns=fields["time_ns"],
        boot_time_ns=fields["boot_time_ns"],
        previous=bytes.fromhex(fields["previous"]),
        draft=AuditDraft(
            event=AuditEvent(fields["event"]),
            outcome=AuditOutcome(fields["outcome"]),
            caller=fields["caller"],
            provider=fields["provider"],
            consent=fields["consent"],
            payment=fields["payment"],
            subject=bytes.fromhex(fields["subject"]),
            epoch=fields["epoch"],
            reason=fields["reason"],
            detail_digest=bytes.fromhex(fields["detail_digest"]),
        ),
    )


def entry(draft: AuditDraft = DRAFT, **changes: Any) -> AuditEntry:
    values: dict[str, Any] = {"origin": ORIGIN, "index": 5, "time_ns": 1, "boot_time_ns": 1, "previous": bytes(32)}
    return AuditEntry(**values | {"draft": draft} | changes)


@pytest.mark.parametrize("case", VECTOR["accepted"], ids=lambda case: case["name"])
def test_known_encodings(case: dict[str, Any]) -> None:
    """The vectors' entries encode to, and decode from, exactly the vectors' bytes, with their leaf hashes."""
    known = entry_of(case["entry"])
    encoded = bytes.fromhex(case["encoded"])

    assert known.encode() == encoded
    assert AuditEntry.decode(encoded) == known
    assert leaf_hash(encoded).hex() == case["leaf_hash"]


@pytest.mark.parametrize("case", VECTOR["refused"], ids=lambda case: case["name"])
def test_refused_encodings(case: dict[str, Any]) -> None:
    """Neither the reader nor the verifier's own reader takes any of the vectors' malformed entries."""
    encoded = bytes.fromhex(case["encoded"])

    with pytest.raises(LogCorrupt):
        AuditEntry.decode(encoded)
    with pytest.raises(verifier._Fault):
        verifier._parse_entry(encoded)


@given(entry=entries)
def test_encoding_and_decoding_undo_each_other(entry: AuditEntry) -> None:
    """Every entry that can be made is at most 4 KiB long, is read back as itself, and is known to the verifier."""
    encoded = entry.encode()

    assert len(encoded) <= MAX_ENTRY_BYTES
    assert AuditEntry.decode(encoded) == entry
    assert verifier._parse_entry(encoded).payment.decode() == entry.draft.payment


@given(entry=entries, data=st.data())
def test_reader_and_verifier_agree_on_every_damaged_entry(entry: AuditEntry, data: st.DataObject) -> None:
    """Damaged bytes are refused by both or by neither, and never read as two encodings of one entry."""
    encoded = bytearray(entry.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(encoded[: data.draw(st.integers(0, len(encoded)))]) if data.draw(st.booleans()) else bytes(encoded)

    try:
        decoded = AuditEntry.decode(cut)
    except LogCorrupt:
        with pytest.raises(verifier._Fault):
            verifier._parse_entry(cut)
        return
    assert decoded.encode() == cut
    assert verifier._parse_entry(cut).index == decoded.index


@given(data=st.binary(max_size=400))
def test_arbitrary_bytes_are_refused_in_one_way(data: bytes) -> None:
    """Whatever is not an entry raises LogCorrupt and nothing else."""
    for candidate in (data, b"\1" + data):
        try:
            assert AuditEntry.decode(candidate).encode() == candidate
        except LogCorrupt:
            continue


@pytest.mark.parametrize(
    "changes",
    [
        {"caller": "work load"},
        {"caller": "workload:shop\n"},
        {"caller": "x" * 2049},
        {"provider": "b\u00e4nk"},
        {"consent": "c\x00"},
        {"payment": "p" * 256},
        {"subject": b"short"},
        {"detail_digest": b"x" * 33},
        {"reason": "the bank said no"},
        {"reason": "R" * 64},
        {"epoch": -1},
        {"epoch": 2**63},
        {"event": 41},
        {"outcome": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_draft_that_breaks_the_schema_cannot_become_an_entry(changes: dict[str, object]) -> None:
    """The writer refuses what the reader would refuse, before anything is written, and does not repeat the value."""
    with pytest.raises(EntryRefused) as caught:
        entry(draft_with(DRAFT, **changes))

    assert str(next(iter(changes.values()))) not in str(caught.value) or "epoch" in changes or "event" in changes


@pytest.mark.parametrize(
    "changes",
    [
        {"origin": ""},
        {"origin": "two words"},
        {"origin": "a+b"},
        {"index": -1},
        {"index": 2**63},
        {"time_ns": 0},
        {"time_ns": 2**63},
        {"boot_time_ns": -1},
        {"previous": b""},
        {"index": 0, "previous": b"\1" * 32},
    ],
    ids=str,
)
def test_a_frame_that_breaks_the_format_cannot_become_an_entry(changes: dict[str, Any]) -> None:
    """Origin, numbers and the previous hash are checked as the entry is made."""
    with pytest.raises(EntryRefused):
        entry(**changes)


def test_the_first_entry_has_no_entry_before_it() -> None:
    """At index 0 the previous hash is 32 zero bytes."""
    assert AuditEntry.decode(entry(index=0, previous=FIRST_PREVIOUS).encode()).previous == bytes(32)


def test_refusals_are_errors_of_the_one_tree() -> None:
    """A bad draft is a defect of ours, bad bytes are corruption: both are statuses at the boundary."""
    assert issubclass(EntryRefused, CustodyError)
    with pytest.raises(CustodyError) as caught:
        AuditEntry.decode(b"")
    assert caught.value.reason == "AUDIT_LOG_CORRUPT"
