"""The log as a file for auditors (`docs/audit-log.md`, "Export"), written line by line.

Rules: the writer reports, it does not judge: what the store holds goes out unchanged, contradictions too, and the verifier finds
them; memory is bounded by one line.
"""

import base64
from collections.abc import Iterable, Iterator

from sidecar.audit.checkpoint import Checkpoint, parse_checkpoint, parse_note
from sidecar.audit.entry import MAX_ENTRY_BYTES, check_origin
from sidecar.audit.errors import LogCorrupt

__all__ = ["EXPORT_FORMAT", "export_lines"]

EXPORT_FORMAT = "custody-audit-export/1"


def export_lines(origin: str, leaves: Iterable[bytes], notes: Iterable[str]) -> Iterator[bytes]:
    """The lines of the export of the log `origin`, each with its newline.

    `leaves` are the encoded entries from index 0 on, `notes` the checkpoints by growing size; read both in one snapshot. For
    full verification the last note covers the last leaf. Raises LogCorrupt, then the export lacks its last line and no
    verifier takes it.
    """
    check_origin(origin)
    yield f"{EXPORT_FORMAT} {origin}\n".encode("ascii")
    pending = _distinct(notes)
    note = next(pending, None)
    leaf_count = note_count = 0
    for leaf in leaves:
        while note is not None and note[0].size <= leaf_count:
            yield _line(b"note", note[1].encode("utf-8"))
            note_count, note = note_count + 1, next(pending, None)
        yield _leaf_line(leaf)
        leaf_count += 1
    while note is not None:  # those of the last size, and those beyond the leaves: evidence of missing leaves
        yield _line(b"note", note[1].encode("utf-8"))
        note_count, note = note_count + 1, next(pending, None)
    yield f"end {leaf_count} {note_count}\n".encode("ascii")


def _distinct(notes: Iterable[str]) -> Iterator[tuple[Checkpoint, str]]:
    """The notes with what they say, without those that only repeat the one before (signed again after a restart)."""
    last: Checkpoint | None = None
    for note in notes:
        checkpoint = parse_checkpoint(parse_note(note).body)
        if last is not None and checkpoint.size < last.size:
            raise LogCorrupt("the checkpoints to export are not in the order of their sizes")
        if checkpoint != last:
            yield checkpoint, note
        last = checkpoint


def _leaf_line(leaf: bytes) -> bytes:
    if not 0 < len(leaf) <= MAX_ENTRY_BYTES:
        raise LogCorrupt("an entry has another length")
    return _line(b"leaf", leaf)


def _line(kind: bytes, data: bytes) -> bytes:
    return kind + b" " + base64.b64encode(data) + b"\n"
