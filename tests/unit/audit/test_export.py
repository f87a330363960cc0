"""The export: the written format, line by line."""

import base64
import random
from collections.abc import Iterator

import pytest

from sidecar.audit.errors import EntryRefused, LogCorrupt
from sidecar.audit.export import export_lines
from sidecar.audit.log import LogHead
from sidecar.audit.verifier import Verdict
from sidecar.domain.audit import AuditEvent
from tests.unit.audit.log_builder import KEY, ORIGIN, VECTORS, LogBuilder, random_log, verify


def small_log() -> LogBuilder:
    """Three entries, checkpoints at 1 and 3."""
    log = LogBuilder().put(AuditEvent.SIDECAR_STARTED).checkpoint()
    return log.put(AuditEvent.TOKEN_USE).put(AuditEvent.TOKEN_USE).checkpoint()


def kinds(export: bytes) -> list[str]:
    return [line.split(" ")[0] for line in export.decode().splitlines()]


def test_the_export_has_the_written_form() -> None:
    """Header, leaves in order, each checkpoint behind the last leaf that it covers, and the counts at the end."""
    log = small_log()
    lines = log.export().decode("ascii").splitlines()

    assert lines[0] == f"custody-audit-export/1 {ORIGIN}"
    assert kinds(log.export()) == ["custody-audit-export/1", "leaf", "note", "leaf", "leaf", "note", "end"]
    assert [base64.b64decode(lines[at].split(" ")[1]) for at in (1, 3, 4)] == log.leaves
    assert [base64.b64decode(lines[at].split(" ")[1]).decode() for at in (2, 5)] == log.notes
    assert lines[6] == "end 3 2"


def test_the_vectors_export_is_written_again_from_its_parts() -> None:
    """The writer reproduces the hand-made export of the vectors byte for byte."""
    export = (VECTORS / "export.txt").read_bytes()
    parts = [line.split(" ") for line in export.decode().splitlines()]
    leaves = [base64.b64decode(part[1]) for part in parts if part[0] == "leaf"]
    notes = [base64.b64decode(part[1]).decode() for part in parts if part[0] == "note"]

    assert b"".join(export_lines(parts[0][1], leaves, notes)) == export


def test_the_export_is_a_stream() -> None:
    """Lines come out while leaves still come in: nothing is collected."""
    log = small_log()
    taken: list[int] = []

    def leaves() -> Iterator[bytes]:
        for number, leaf in enumerate(log.leaves):
            taken.append(number)
            yield leaf

    lines = export_lines(ORIGIN, leaves(), log.notes)
    next(lines)
    assert taken == []
    next(lines)
    assert taken == [0]


def test_a_checkpoint_signed_twice_is_written_once() -> None:
    """A restart may sign the same size again; the export stays verifiable."""
    log = small_log()
    log.checkpoint()

    assert kinds(log.export()).count("note") == 2
    assert verify(log.export()).ok


def test_two_checkpoints_of_one_size_that_differ_are_both_written() -> None:
    """A fork is evidence for the verifier, not something that the writer hides."""
    log = small_log()
    log.notes.append(KEY.note(ORIGIN, 3, bytes(32)))

    report = verify(log.export())
    assert report.verdict is Verdict.FAILED
    assert "forked" in str(report.failure)


def test_checkpoints_beyond_the_leaves_are_written() -> None:
    """If leaves are lost, the checkpoints that prove it go out too."""
    log = small_log()
    log.leaves.pop()

    report = verify(log.export())
    assert kinds(log.export())[-2:] == ["note", "end"]
    assert "entries are missing" in str(report.failure)


@pytest.mark.parametrize("entries", [0, 1])
def test_a_log_without_checkpoint_is_exported_and_not_verified(entries: int) -> None:
    """Nothing vouches for such a log, be it empty."""
    log = LogBuilder()
    for _ in range(entries):
        log.put(AuditEvent.SIDECAR_STARTED)

    assert verify(log.export()).verdict is Verdict.NOT_COVERED


def test_an_empty_log_with_a_checkpoint_is_verified() -> None:
    """A signed checkpoint of size 0 vouches that there was nothing."""
    log = LogBuilder().checkpoint()

    assert kinds(log.export()) == ["custody-audit-export/1", "note", "end"]
    assert verify(log.export()).ok


def test_checkpoints_out_of_order_are_refused() -> None:
    """The caller reads checkpoints by growing size; the export then ends without its last line."""
    log = small_log()
    lines: list[bytes] = []

    with pytest.raises(LogCorrupt, match="order"):
        lines.extend(export_lines(ORIGIN, log.leaves, reversed(log.notes)))
    assert not any(line.startswith(b"end") for line in lines)


def test_a_log_without_a_possible_name_is_not_exported() -> None:
    """The origin stands in the first line and must not break it."""
    with pytest.raises(EntryRefused):
        list(export_lines("two\nlines", [], []))


@pytest.mark.parametrize("leaf", [b"", bytes(4097)], ids=["empty", "too long"])
def test_a_leaf_that_would_break_the_bound_of_lines_is_refused(leaf: bytes) -> None:
    """Each line is bounded, whatever the store holds."""
    with pytest.raises(LogCorrupt):
        list(export_lines(ORIGIN, [leaf], []))


def test_the_longest_line_is_within_the_written_bound() -> None:
    """docs/audit-log.md: no line is longer than 87,390 bytes; the verifier reads one of exactly that length."""
    log = LogBuilder().put(AuditEvent.SIDECAR_STARTED).checkpoint()
    note = log.notes[0]
    fill = 65_536 - len(note.encode())
    witness = "\u2014 w "  # 6 bytes, with the newline 7
    blob_length = (fill - 7) // 4 * 4
    name_fill = fill - 7 - blob_length
    note += f"\u2014 w{'w' * name_fill} {'A' * blob_length}\n"
    assert len(witness.encode()) == 6
    assert len(note.encode()) == 65_536

    lines = list(export_lines(ORIGIN, log.leaves, [note]))
    assert max(len(line) for line in lines) == 87_390
    assert verify(b"".join(lines)).ok


def test_a_restored_head_continues_an_export() -> None:
    """Entries written after a restart from the stored head verify together with those before."""
    log = random_log(random.Random(1))
    log.head = LogHead.from_bytes(log.head.to_bytes())
    log.put(AuditEvent.TOKEN_USE).checkpoint()

    assert verify(log.export()).ok
