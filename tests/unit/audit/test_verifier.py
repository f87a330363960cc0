"""The offline verifier: what it promises, what it finds, and that it answers everything with a report."""

import ast
import base64
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.audit import verifier
from sidecar.audit.checkpoint import der_from_p1363, note_key_id
from sidecar.audit.entry import AuditEntry
from sidecar.audit.merkle import CompactRange, leaf_hash, tree_root
from sidecar.audit.verifier import Report, Verdict, verify_export
from sidecar.domain.audit import AuditEvent, AuditOutcome
from tests.unit.audit.log_builder import KEY, ORIGIN, OTHER_KEY, VECTORS, LogBuilder, assemble, verify

ROOT = Path(__file__).parents[3]


def sample() -> LogBuilder:
    """Five entries with one payment; checkpoints at 3 and 5."""
    log = LogBuilder().put(AuditEvent.SIDECAR_STARTED)
    log.put(AuditEvent.PAYMENT_INTENT, AuditOutcome.INTENDED, payment="p-1", epoch=1)
    log.put(AuditEvent.PAYMENT_DISPATCHED, AuditOutcome.INTENDED, payment="p-1", epoch=1).checkpoint()
    log.put(AuditEvent.PAYMENT_OUTCOME, payment="p-1", epoch=1).put(AuditEvent.SIDECAR_STOPPED)
    return log.checkpoint()


SAMPLE = sample()
EXPORT = SAMPLE.export()
RECORDS = [
    *(("leaf", leaf) for leaf in SAMPLE.leaves[:3]),
    ("note", SAMPLE.notes[0].encode()),
    *(("leaf", leaf) for leaf in SAMPLE.leaves[3:]),
    ("note", SAMPLE.notes[1].encode()),
]


def test_a_clean_export_is_verified_and_described() -> None:
    """The report tells sizes, cover, times and events of a log without fault."""
    report = verify(EXPORT)

    assert report.ok
    assert (report.entries, report.covered, report.checkpoints, report.payments_dispatched) == (5, 5, 2, 1)
    assert report.events == {
        "PAYMENT_DISPATCHED": 1,
        "PAYMENT_INTENT": 1,
        "PAYMENT_OUTCOME": 1,
        "SIDECAR_STARTED": 1,
        "SIDECAR_STOPPED": 1,
    }
    assert (report.failure, report.violations, report.clock_steps_back) == (None, (), 0)
    assert report.last_time_ns == SAMPLE.clock_ns
    assert (report.origin, report.origin_pinned) == (ORIGIN, True)
    assert assemble(ORIGIN, RECORDS) == EXPORT


def test_the_vectors_export_is_verified() -> None:
    """The hand-made export of the vectors verifies under its key, and agrees with its witnessed checkpoint."""
    report = verify_export(
        io.BytesIO((VECTORS / "export.txt").read_bytes()),
        public_key=(VECTORS / "export_public_key.pem").read_bytes(),
        origin="audit/vectors/4be0643f1d98",
        witnessed=[(VECTORS / "export_witnessed.txt").read_bytes()],
    )

    assert report.ok
    assert (report.entries, report.witnessed) == (8, (5,))


def failure(export: bytes, **options: Any) -> str:
    report = verify(export, **options)
    assert report.verdict is Verdict.FAILED
    return str(report.failure)


def test_another_key_vouches_for_nothing() -> None:
    """The key is pinned from outside: the same export fails under another."""
    assert "not signed by the audit key" in failure(EXPORT, key=OTHER_KEY)


def test_another_origin_than_the_pinned_one_is_refused() -> None:
    """A log that names itself anew gets no fresh trust."""
    assert "another log" in failure(EXPORT, origin="audit/test/another")


def test_without_a_pinned_origin_the_report_says_so() -> None:
    """The name then is the export's own account."""
    report = verify(EXPORT, origin=None)

    assert report.ok
    assert not report.origin_pinned


def test_entries_behind_the_last_checkpoint_are_not_accepted() -> None:
    """They are reported as not covered, and the export does not count as verified."""
    log = sample().put(AuditEvent.TOKEN_USE).put(AuditEvent.TOKEN_USE)
    report = verify(log.export())

    assert report.verdict is Verdict.NOT_COVERED
    assert not report.ok
    assert (report.entries, report.covered) == (7, 5)


def test_the_first_failure_is_named_with_its_entry_and_line() -> None:
    """Entry 3 stands in line 6 of this export; what came before is still reported as covered."""
    records = list(RECORDS)
    records[4] = ("leaf", RECORDS[4][1][:-1])
    report = verify(assemble(ORIGIN, records))

    assert report.failure is not None
    assert (report.failure.entry, report.failure.line) == (3, 6)
    assert (report.entries, report.covered) == (3, 3)


def test_a_witnessed_checkpoint_confirms_its_prefix() -> None:
    """Sizes at which somebody else's checkpoint agrees are listed."""
    assert verify(EXPORT, witnessed=SAMPLE.notes).witnessed == (3, 5)


def test_a_log_cut_back_to_an_older_checkpoint_is_found_by_the_witness_only() -> None:
    """Without the witness the shorter log looks whole; with it the missing entries are noticed."""
    cut = assemble(ORIGIN, RECORDS[:4])

    assert verify(cut).ok
    assert "a witness has seen 5 entries, the export has 3" in failure(cut, witnessed=[SAMPLE.notes[1]])


def test_a_forked_log_is_found_by_the_witness() -> None:
    """Another history, signed by the same key, contradicts the checkpoint that the witness kept."""
    fork = LogBuilder().put(AuditEvent.SIDECAR_STARTED).put(AuditEvent.TOKEN_USE).put(AuditEvent.TOKEN_USE).checkpoint()
    fork.put(AuditEvent.TOKEN_USE).put(AuditEvent.TOKEN_USE).checkpoint()

    assert verify(fork.export()).ok
    for note in SAMPLE.notes:
        assert "forked" in failure(fork.export(), witnessed=[note])


def test_a_witnessed_checkpoint_must_be_genuine() -> None:
    """Only notes of this log under the pinned key count; two that contradict each other are a fork already."""
    body_root = CompactRange().append(leaf_hash(b"x")).root()

    assert "audit key" in failure(EXPORT, witnessed=[OTHER_KEY.note(ORIGIN, 3, body_root)])
    assert "another log" in failure(EXPORT, witnessed=[KEY.note("audit/x", 3, body_root, key_name=ORIGIN)])
    assert "two witnessed" in failure(EXPORT, witnessed=[SAMPLE.notes[0], KEY.note(ORIGIN, 3, body_root)])
    assert "signed note" in failure(EXPORT, witnessed=["no note"])


def test_a_witnessed_empty_log_is_a_prefix_of_every_log() -> None:
    """Size 0 is compared, too: its root must be that of the empty tree."""
    empty = LogBuilder().checkpoint()

    assert verify(EXPORT, witnessed=empty.notes).witnessed == (0,)
    assert "forked" in failure(EXPORT, witnessed=[KEY.note(ORIGIN, 0, bytes(32))])


def test_cosignatures_of_witnesses_do_no_harm() -> None:
    """Signature lines under other names are ignored, as C2SP signed-note demands."""
    records = [*RECORDS[:-1], ("note", RECORDS[-1][1] + "\u2014 witness.example.com AAAAAAA=\n".encode())]

    assert verify(assemble(ORIGIN, records)).ok


STRANGERS = {
    "a control character": "\u2014 wit\x01ness AAAAAAA=\n",
    "a plus in the name": "\u2014 wit+ness AAAAAAA=\n",
    "no name": "\u2014  AAAAAAA=\n",
    "no signature": "\u2014 witness\n",
    "an empty signature": "\u2014 witness AAAAAA==\n",
    "letters that are not ASCII": "\u2014 witness AAAAAA\u00e4=\n",
    "not base64": "\u2014 witness AAAA-AA=\n",
    "unused bits": "\u2014 witness AAAAAAB=\n",
    "a hyphen": "- witness AAAAAAA=\n",
    "no newline": "\u2014 witness AAAAAAA=",
    "another character for the newline": "\u2014 witness AAAAAAA=x",
    "not a line of a signature": "remark\n",
    "more than sixteen signatures": "\u2014 witness AAAAAAA=\n" * 16,
    "too long": f"\u2014 {'w' * 66_000} AAAAAAA=\n",
}


@pytest.mark.parametrize("line", STRANGERS.values(), ids=STRANGERS.keys())
def test_lines_of_strangers_must_be_well_formed(line: str) -> None:
    """A foreign signature is ignored only if it is one: the note has no room for anything else."""
    note = SAMPLE.notes[1] + line

    assert "checkpoint" in failure(EXPORT, witnessed=[note]) or "base64" in failure(EXPORT, witnessed=[note])


def test_sixteen_signatures_are_taken() -> None:
    """C2SP signed-note: at least sixteen must be accepted."""
    note = SAMPLE.notes[1] + "\u2014 witness AAAAAAA=\n" * 15

    assert verify(EXPORT, witnessed=[note]).witnessed == (5,)


def signed(text: str) -> bytes:
    """A note over any text, under the audit key and the log's name."""
    blob = note_key_id(KEY.spki) + der_from_p1363(KEY.sign(text.encode()))
    return f"{text}\n\u2014 {ORIGIN} {base64.b64encode(blob).decode()}\n".encode()


LAST_NOTE = SAMPLE.notes[1].split("\n\n")[0] + "\n"
LAST_ROOT = LAST_NOTE.splitlines()[2]
SIGNED_NONSENSE = {
    "an extension line": LAST_NOTE + "extension\n",
    "an empty line": LAST_NOTE + "\n",
    "no root": f"{ORIGIN}\n5\n",
    "no size": f"{ORIGIN}\n\n{LAST_ROOT}\n",
    "size with a zero before": f"{ORIGIN}\n05\n{LAST_ROOT}\n",
    "size with a sign": f"{ORIGIN}\n+5\n{LAST_ROOT}\n",
    "size in other digits": f"{ORIGIN}\n\u0665\n{LAST_ROOT}\n",
    "size out of range": f"{ORIGIN}\n9999999999999999999\n{LAST_ROOT}\n",
    "size beyond any number": f"{ORIGIN}\n{'9' * 5000}\n{LAST_ROOT}\n",
    "root of 31 bytes": f"{ORIGIN}\n5\n{base64.b64encode(bytes(31)).decode()}\n",
    "root without padding": f"{ORIGIN}\n5\n{LAST_ROOT.rstrip('=')}\n",
    "another origin": LAST_NOTE.replace(ORIGIN, "audit/x"),
    "a statement of another kind": "pay 5 EUR\n",
}


@pytest.mark.parametrize("text", SIGNED_NONSENSE.values(), ids=SIGNED_NONSENSE.keys())
def test_a_signature_does_not_make_a_checkpoint_of_every_text(text: str) -> None:
    """Only the exact form counts, even under the audit key itself."""
    assert verify(assemble(ORIGIN, [*RECORDS[:-1], ("note", signed(LAST_NOTE))])).ok
    assert verify(assemble(ORIGIN, [*RECORDS[:-1], ("note", signed(text))])).verdict is Verdict.FAILED


def genuine(entries: list[AuditEntry]) -> bytes:
    """These entries, whatever they say, under a genuine checkpoint of the audit key."""
    leaves = [entry.encode() for entry in entries]
    note = KEY.note(ORIGIN, len(leaves), tree_root([leaf_hash(leaf) for leaf in leaves]))
    return assemble(ORIGIN, [*(("leaf", leaf) for leaf in leaves), ("note", note.encode())])


def test_the_audit_key_cannot_make_a_broken_chain_good() -> None:
    """Index, previous hash and origin hold by themselves: a thief of the audit key, or a defect of the writer, is noticed."""
    first, second, *_ = (AuditEntry.decode(leaf) for leaf in SAMPLE.leaves)
    assert verify(genuine([first, second])).ok

    assert "number 2" in failure(genuine([first, replace(second, index=2)]))
    assert "number 1" in failure(genuine([replace(first, index=1)]))
    assert "does not continue" in failure(genuine([first, replace(second, previous=bytes(32))]))
    assert "another log" in failure(genuine([first, replace(second, origin="audit/test/another")]))


def test_a_checkpoint_stands_directly_behind_what_it_covers() -> None:
    """One line too late or too early is out of place, and is named so."""
    late = [*RECORDS[:3], RECORDS[4], RECORDS[3], *RECORDS[5:]]
    early = [*RECORDS[:2], RECORDS[3], RECORDS[2], *RECORDS[4:]]

    assert "out of place" in failure(assemble(ORIGIN, late))
    assert "entries are missing" in failure(assemble(ORIGIN, early))


def test_base64_has_one_form() -> None:
    """Unused bits behind the last byte are refused in leaves and notes, though lenient decoders read the same bytes."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    log = LogBuilder()
    for consent in ("c-1", "c-12", "c-123"):  # three lengths: two of three need padding
        log.put(AuditEvent.CONSENT_CREATED, consent=consent)
    lines = log.checkpoint().export().splitlines(keepends=True)
    tried = 0
    for at, line in enumerate(lines):
        if line.endswith(b"=\n"):
            text = line.decode().rstrip("=\n")
            loose = text[:-1] + letters[letters.index(text[-1]) + 1] + line.decode()[len(text) :]
            assert "canonical" in failure(b"".join([*lines[:at], loose.encode(), *lines[at + 1 :]]))
            tried += 1

    assert tried > 1


def signature_of(note: str) -> bytes:
    return base64.b64decode(note.rsplit(" ", 1)[1])


def test_a_signature_has_one_form() -> None:
    """A signature with a number padded beyond DER, or given twice, is refused."""
    note = SAMPLE.notes[1]
    text, der = note.rsplit(" ", 1)[0], signature_of(note)[4:]
    assert der[2] == 2
    padded = bytes([0x30, der[1] + 1, 2, der[3] + 1, 0]) + der[4:]
    line = f"{text} {base64.b64encode(note_key_id(KEY.spki) + padded).decode()}\n"

    for forged in (line, note + "\u2014" + note.rsplit("\u2014", 1)[1]):
        assert not verify(assemble(ORIGIN, [*RECORDS[:-1], ("note", forged.encode())])).ok


def test_boot_time_that_goes_back_without_a_start_is_refused() -> None:
    """An entry from another machine, or a clone of the instance, does not slip in."""
    log = LogBuilder().put(AuditEvent.SIDECAR_STARTED)
    head = log.head
    forged = type(head)(origin=ORIGIN, range=head.range, last_leaf_hash=head.last_leaf_hash, last_boot_time_ns=0)
    log.head, log.boot_ns = forged, 0
    log.put(AuditEvent.TOKEN_USE).checkpoint()

    assert "boot time goes back" in failure(log.export())


def test_a_clock_that_stepped_back_is_counted() -> None:
    """No fault, but an auditor wants to know."""
    log = sample()
    log.clock_ns -= 10**12
    report = verify(log.put(AuditEvent.TOKEN_USE).checkpoint().export())

    assert report.ok
    assert report.clock_steps_back == 1


LINES = EXPORT.splitlines(keepends=True)
BROKEN = {
    "nothing": b"",
    "header alone": LINES[0],
    "no header": b"".join(LINES[1:]),
    "header without format": EXPORT.removeprefix(b"custody-audit-export/1 "),
    "another format version": EXPORT.replace(b"export/1", b"export/2", 1),
    "header with two blanks": EXPORT.replace(b"/1 ", b"/1  ", 1),
    "no last line": b"".join(LINES[:-1]),
    "no newline at the end": EXPORT[:-1],
    "another character for the last newline": EXPORT[:-1] + b"x",
    "something behind the end": EXPORT + b"\n",
    "a second end": EXPORT + LINES[-1],
    "an empty line": LINES[0] + b"\n" + b"".join(LINES[1:]),
    "carriage returns": EXPORT.replace(b"\n", b"\r\n"),
    "an unknown kind of line": LINES[0] + b"remark hello\n" + b"".join(LINES[1:]),
    "a capital kind": EXPORT.replace(b"leaf ", b"Leaf ", 1),
    "a count too high": EXPORT.replace(b"end 5 2", b"end 6 2"),
    "a count too low": EXPORT.replace(b"end 5 2", b"end 5 1"),
    "a count with a zero before": EXPORT.replace(b"end 5 2", b"end 05 2"),
    "a count in words": EXPORT.replace(b"end 5 2", b"end five two"),
    "a third count": EXPORT.replace(b"end 5 2", b"end 5 2 0"),
    "base64 with a blank": EXPORT.replace(b"leaf A", b"leaf A ", 1),
    "base64 without padding": b"".join([LINES[0], LINES[1].rstrip(b"=\n") + b"A\n", *LINES[2:]]),
    "an empty leaf": LINES[0] + b"leaf \n" + b"".join(LINES[1:]),
    "an endless line": LINES[0] + b"leaf " + b"A" * 200_000,
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("export", BROKEN.values(), ids=BROKEN.keys())
def test_malformed_exports_are_refused(export: bytes) -> None:
    """The format has one form; everything else is a failure, never an exception."""
    assert export != EXPORT
    assert verify(export).verdict is Verdict.FAILED


class Endless:
    """A source that never ends and remembers how much was asked for at once."""

    def __init__(self) -> None:
        self.largest = 0

    def readline(self, size: int, /) -> bytes:
        self.largest = max(self.largest, size)
        return b"x" * size


def test_lines_are_read_within_a_bound() -> None:
    """A line without end takes no more memory than the longest line of the format."""
    source = Endless()

    assert verify_export(source, public_key=KEY.pem).verdict is Verdict.FAILED
    assert 0 < source.largest <= 87_390


class Failing(io.BytesIO):
    def readline(self, size: int | None = -1, /) -> bytes:
        raise OSError("disk")


def test_a_source_that_fails_is_reported() -> None:
    """A read error is a failure of the verification, with its line."""
    report = verify_export(Failing(), public_key=KEY.pem)

    assert report.verdict is Verdict.FAILED
    assert "cannot be read" in str(report.failure)


def pem_of(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@pytest.mark.parametrize(
    "pem",
    [b"", b"no key", KEY.spki, KEY.pem[:60], pem_of(ec.generate_private_key(ec.SECP384R1())),
     pem_of(ed25519.Ed25519PrivateKey.generate())],
    ids=["empty", "text", "DER", "cut", "P-384", "Ed25519"],
)  # fmt: skip
def test_an_unusable_key_is_reported(pem: bytes) -> None:
    """Without the right kind of key nothing is verified."""
    report = verify_export(io.BytesIO(EXPORT), public_key=pem)

    assert report.verdict is Verdict.FAILED
    assert "the audit key is not" in str(report.failure)


@settings(max_examples=400)
@given(data=st.data())
def test_the_verifier_answers_every_damage_with_a_report(data: st.DataObject) -> None:
    """Spliced, cut, doubled and overwritten exports give a report and never an exception; none is verified."""
    export = bytearray(EXPORT)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(export)))
        end = data.draw(st.integers(start, min(len(export), start + 200)))
        export[start:end] = data.draw(
            st.one_of(st.binary(max_size=20), st.sampled_from([b"", b"\n", b"leaf ", b"note ", b"end 0 0\n", *LINES]))
        )
    report = verify(bytes(export))

    assert isinstance(report, Report)
    assert report.ok == (bytes(export) == EXPORT)


@settings(max_examples=200)
@given(export=st.binary(max_size=300), key=st.binary(max_size=100), note=st.binary(max_size=300), origin=st.text())
def test_the_verifier_answers_arbitrary_input_with_a_report(
    export: bytes, key: bytes, note: bytes, origin: str
) -> None:
    """Random bytes as export, key, witnessed note and origin never raise."""
    with_note = LINES[0] + b"note " + base64.b64encode(note) + b"\n" + export

    for pem in (key, KEY.pem):
        for content in (export, LINES[0] + export, with_note):
            report = verify_export(io.BytesIO(content), public_key=pem, origin=origin, witnessed=[note])
            assert report.verdict is Verdict.FAILED
            report = verify_export(io.BytesIO(content), public_key=pem)
            assert not report.ok


@settings(max_examples=300)
@given(body=st.text(max_size=120), tail=st.text(max_size=60), data=st.data())
def test_texts_signed_by_the_key_itself_are_judged_too(body: str, tail: str, data: st.DataObject) -> None:
    """Even a genuine signature over nonsense gives a report: only the exact form of a checkpoint counts."""
    lines = [ORIGIN, "0", base64.b64encode(bytes(32)).decode(), *body.split("\n")]
    text = "\n".join(data.draw(st.permutations(lines))[: data.draw(st.integers(1, len(lines)))]) + "\n"
    signature = der_from_p1363(KEY.sign(text.encode(errors="replace")))
    note = f"{text}\n\u2014 {ORIGIN} {base64.b64encode(note_key_id(KEY.spki) + signature).decode()}\n{tail}"

    assert not verify(assemble(ORIGIN, [("note", note.encode(errors="replace"))])).ok


def test_the_verifier_imports_nothing_of_the_sidecar() -> None:
    """Its source imports the standard library and `cryptography` only, so no mistake can be in writer and verifier both."""
    tree = ast.parse((ROOT / "sidecar" / "audit" / "verifier.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {name.split(".")[0] for name in imported}

    assert tops <= sys.stdlib_module_names | {"cryptography"}


def test_running_the_verifier_loads_nothing_of_the_sidecar() -> None:
    """The packages on its path import nothing: only they and the verifier itself are loaded."""
    code = "import sys, sidecar.audit.verifier as v; print(sorted(m for m in sys.modules if m.startswith('sidecar')))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )

    assert ast.literal_eval(result.stdout) == ["sidecar", "sidecar.audit", "sidecar.audit.verifier"]


def test_the_verifiers_codes_are_those_of_the_log() -> None:
    """The verifier's own tables name every event and outcome, with the same code; so does the documentation."""
    page = (ROOT / "docs" / "audit-log.md").read_text()
    documented = {int(code): name for code, name in re.findall(r"\| (\d+) \| ([A-Z_]+) (?=\|)", page)}

    assert dict(verifier.EVENTS) == {event.value: event.name for event in AuditEvent} == documented
    assert dict(verifier.OUTCOMES) == {outcome.value: outcome.name for outcome in AuditOutcome}
    for outcome in AuditOutcome:
        assert f"{outcome.value} {outcome.name.lower()}" in page


@given(count=st.integers(0, 200))
def test_the_verifiers_tree_agrees_with_the_writers(count: int) -> None:
    """Two implementations of RFC 6962, written apart, have the same root at every size."""
    tree, edge = verifier._Tree(), CompactRange()
    for number in range(count):
        tree.add(leaf_hash(bytes([number])))
        edge = edge.append(leaf_hash(bytes([number])))

    assert (tree.size, tree.root()) == (edge.size, edge.root())


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sidecar.audit.verifier", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "export.txt").write_bytes(EXPORT)
    (tmp_path / "cut.txt").write_bytes(assemble(ORIGIN, RECORDS[:4]))
    (tmp_path / "tail.txt").write_bytes(assemble(ORIGIN, RECORDS[:-1]))
    (tmp_path / "broken.txt").write_bytes(EXPORT.replace(b"leaf A", b"leaf B", 1))
    (tmp_path / "key.pem").write_bytes(KEY.pem)
    (tmp_path / "other.pem").write_bytes(OTHER_KEY.pem)
    (tmp_path / "witnessed.txt").write_text(SAMPLE.notes[1], encoding="utf-8")
    return tmp_path


def test_the_command_verifies(files: Path) -> None:
    """Exit status 0, and plain words: log, entries, cover, witness and events."""
    result = run(
        files / "export.txt", "--key", files / "key.pem", "--origin", ORIGIN, "--witnessed", files / "witnessed.txt"
    )

    assert (result.returncode, result.stderr) == (0, "")
    for words in ("VERIFIED", ORIGIN, "entries:     5", "until size 5", "agrees at size 5", "1 PAYMENT_DISPATCHED"):
        assert words in result.stdout


def test_the_command_names_what_was_not_checked(files: Path) -> None:
    """Without witness and origin it says what that leaves open."""
    result = run(files / "export.txt", "--key", files / "key.pem")

    assert result.returncode == 0
    assert "pin it with --origin" in result.stdout
    assert "would look whole" in result.stdout


@pytest.mark.parametrize(
    ("export", "key", "witnessed", "words"),
    [
        ("broken.txt", "key.pem", False, "FAILED: entry 0, line 2"),
        ("export.txt", "other.pem", False, "not signed by the audit key"),
        ("cut.txt", "key.pem", True, "cut back"),
        ("tail.txt", "key.pem", False, "NOT YET COVERED"),
    ],
)
def test_the_command_fails_with_4(files: Path, export: str, key: str, words: str, *, witnessed: bool) -> None:
    """Whatever is not proven has exit status 4 and says why."""
    extra = ("--witnessed", files / "witnessed.txt") if witnessed else ()
    result = run(files / export, "--key", files / key, *extra)

    assert (result.returncode, result.stderr) == (4, "")
    assert words in result.stdout


def test_the_command_says_when_it_is_used_wrongly(files: Path) -> None:
    """A missing file or option has exit status 2, without a traceback."""
    missing = run(files / "nothing.txt", "--key", files / "key.pem")
    keyless = run(files / "export.txt")

    assert (missing.returncode, keyless.returncode) == (2, 2)
    assert "cannot read a file" in missing.stderr
    assert "Traceback" not in missing.stderr + keyless.stderr


def test_the_description_lists_violations() -> None:
    """A genuine log that shows a broken rule of payment is not verified, and the rule is named."""
    log = LogBuilder().put(AuditEvent.PAYMENT_DISPATCHED, payment="p-1").checkpoint()
    lines = "\n".join(verifier._describe(verify(log.export()), witness_given=False))

    assert "the log is genuine and breaks the rules of payment, 1 times" in lines
    assert "entry 0, line 2: a payment was dispatched without an intent on record before" in lines


def test_nothing_of_a_foreign_export_is_repeated_before_it_is_checked() -> None:
    """Control sequences in an unverified export do not reach the terminal."""
    report = verify(b"custody-audit-export/1 \x1b[2Jevil\n", origin=None)

    assert report.origin is None
    assert "\x1b" not in json.dumps("\n".join(verifier._describe(report, witness_given=False)))
    assert "evil" not in "\n".join(verifier._describe(report, witness_given=False))
