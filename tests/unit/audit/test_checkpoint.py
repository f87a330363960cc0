"""Checkpoints: C2SP notes of other logs verify here, and ours say what they must."""

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from sidecar.audit.checkpoint import (
    MAX_SIGNATURES,
    Checkpoint,
    assemble_note,
    checkpoint_body,
    der_from_p1363,
    note_key_id,
    open_checkpoint,
    parse_checkpoint,
    parse_note,
    verify_note,
)
from sidecar.audit.errors import EntryRefused, LogCorrupt
from tests.unit.audit.log_builder import KEY, ORIGIN, OTHER_KEY, VECTORS

VECTOR: dict[str, Any] = json.loads((VECTORS / "signed_notes.json").read_text())
ROOT = bytes(range(32))
NOTE = KEY.note(ORIGIN, 7, ROOT)
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@pytest.mark.parametrize("case", VECTOR["notes"], ids=lambda case: case["name"])
def test_notes_of_logs_in_the_wild(case: dict[str, Any]) -> None:
    """Sigstore's and Google's ECDSA checkpoints verify under their published keys, and under nothing else."""
    keys = {case["key_name"]: base64.b64decode(case["spki"])}

    if case["accepted"]:
        assert note_key_id(keys[case["key_name"]]).hex() == case["key_id"]
        assert parse_checkpoint(verify_note(case["note"], keys)).size > 0
    else:
        with pytest.raises(LogCorrupt):
            verify_note(case["note"], keys)


def test_the_text_of_a_checkpoint() -> None:
    """Origin, size and root, each on a line: what C2SP tlog-checkpoint says, byte for byte."""
    body = checkpoint_body(
        "example.com/behind-the-sofa", 20852163, base64.b64decode("CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=")
    )

    assert body == b"example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"


@given(size=st.integers(0, 2**63 - 1), root=st.binary(min_size=32, max_size=32))
def test_a_checkpoint_reads_back(size: int, root: bytes) -> None:
    """Parsing undoes writing."""
    body = checkpoint_body(ORIGIN, size, root).decode()

    assert parse_checkpoint(body) == Checkpoint(origin=ORIGIN, size=size, root=root)


def test_an_assembled_note_opens_under_its_key_and_log_only() -> None:
    """The checkpoint comes out under the right origin and key; another key or origin opens nothing."""
    assert open_checkpoint(NOTE, origin=ORIGIN, spki=KEY.spki) == Checkpoint(origin=ORIGIN, size=7, root=ROOT)

    with pytest.raises(LogCorrupt):
        open_checkpoint(NOTE, origin=ORIGIN, spki=OTHER_KEY.spki)
    with pytest.raises(LogCorrupt):
        open_checkpoint(NOTE, origin="audit/test/another", spki=KEY.spki)


def test_a_checkpoint_of_another_log_under_this_logs_name_is_refused() -> None:
    """The key name does not stand in for the origin: both must be this log's."""
    note = KEY.note("audit/test/another", 7, ROOT, key_name=ORIGIN)

    with pytest.raises(LogCorrupt, match="another log"):
        open_checkpoint(note, origin=ORIGIN, spki=KEY.spki)


def test_no_note_is_made_of_a_signature_that_does_not_verify() -> None:
    """A wrong answer of the HSM must not become a checkpoint that a payment relies on."""
    body = checkpoint_body(ORIGIN, 7, ROOT)
    foreign = der_from_p1363(OTHER_KEY.sign(body))
    other_text = der_from_p1363(KEY.sign(checkpoint_body(ORIGIN, 8, ROOT)))

    for signature in (foreign, other_text, b"", b"\x30\x00"):
        with pytest.raises(LogCorrupt):
            assemble_note(body, ORIGIN, KEY.spki, signature)


@pytest.mark.parametrize("body", [b"", b"text\n", b"o\n07\n" + base64.b64encode(ROOT) + b"\n", b"\xff\n1\n\n"])
def test_no_note_is_made_of_another_text(body: bytes) -> None:
    """The audit key's notes are checkpoints and nothing else."""
    with pytest.raises(LogCorrupt):
        assemble_note(body, ORIGIN, KEY.spki, der_from_p1363(KEY.sign(body)))


@pytest.mark.parametrize("name", ["", "two words", "a+b", "line\nbreak"])
def test_no_note_is_made_under_a_name_that_notes_cannot_carry(name: str) -> None:
    """Key names have no blanks and no '+' (C2SP signed-note)."""
    body = checkpoint_body(ORIGIN, 7, ROOT)

    with pytest.raises(LogCorrupt):
        assemble_note(body, name, KEY.spki, der_from_p1363(KEY.sign(body)))


def test_keys_of_another_kind_are_refused() -> None:
    """Only P-256 keys sign: another curve or no key at all is refused, not tried."""
    private = ec.generate_private_key(ec.SECP384R1())
    spki = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    body = checkpoint_body(ORIGIN, 7, ROOT)

    for key in (spki, b"", b"no key"):
        with pytest.raises(LogCorrupt):
            assemble_note(body, ORIGIN, key, private.sign(body, ec.ECDSA(SHA256())))


def test_signatures_of_strangers_are_ignored_and_of_known_keys_must_hold() -> None:
    """C2SP signed-note: a witness's line does no harm; a bad line of a known key spoils the note."""
    stranger = "\u2014 witness.example.com " + base64.b64encode(b"0123signature").decode() + "\n"
    forged = f"\u2014 {ORIGIN} " + base64.b64encode(note_key_id(KEY.spki) + b"forged").decode() + "\n"

    assert open_checkpoint(NOTE + stranger, origin=ORIGIN, spki=KEY.spki).size == 7
    with pytest.raises(LogCorrupt):
        open_checkpoint(NOTE + forged, origin=ORIGIN, spki=KEY.spki)
    with pytest.raises(LogCorrupt):
        open_checkpoint(NOTE + stranger * MAX_SIGNATURES, origin=ORIGIN, spki=KEY.spki)
    assert len(parse_note(NOTE + stranger * (MAX_SIGNATURES - 1)).signatures) == MAX_SIGNATURES


def test_a_signature_under_the_known_name_by_an_unknown_key_is_ignored() -> None:
    """Name and key id together identify a key: after a change of keys both may sign."""
    other = f"\u2014 {ORIGIN} " + base64.b64encode(note_key_id(OTHER_KEY.spki) + b"other").decode() + "\n"

    assert open_checkpoint(NOTE + other, origin=ORIGIN, spki=KEY.spki).size == 7


@pytest.mark.parametrize(
    "line",
    [
        "wit\x01ness AAAAAAA=",
        "witness AAAAAAB=",
        "witness AAAAAA==",
        "witness AAAAAA\u00e4=",
        "wit+ness AAAAAAA=",
        "witness",
    ],
    ids=["control character", "unused bits", "no signature", "not ASCII", "plus", "name alone"],
)
def test_lines_of_strangers_must_be_well_formed(line: str) -> None:
    """A foreign signature is ignored only if it is one."""
    with pytest.raises(LogCorrupt):
        open_checkpoint(f"{NOTE}\u2014 {line}\n", origin=ORIGIN, spki=KEY.spki)


@pytest.mark.parametrize("body", [f"{ORIGIN}\n7\nROOT\nextension\n", f"{ORIGIN}\n9999999999999999999\nROOT\n"])
def test_checkpoints_in_another_form_are_refused(body: str) -> None:
    """Extension lines and sizes beyond 2^63-1 are not ours, whoever signed them."""
    with pytest.raises(LogCorrupt):
        parse_checkpoint(body.replace("ROOT", base64.b64encode(ROOT).decode()))


def blob(note: str) -> str:
    return note.rsplit(" ", 1)[1].strip()


LAST = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def loosened(text: str) -> str:
    """The same bytes for a lenient decoder: an unused bit of the last character before the padding is set."""
    bare = text.rstrip("=")
    return bare[:-1] + LAST[LAST.index(bare[-1]) + 1] + text[len(bare) :]


ROOT_TEXT = base64.b64encode(ROOT).decode()
MALFORMED = {
    "nothing": "",
    "no signature": NOTE.split("\u2014")[0],
    "no empty line": NOTE.replace("\n\n", "\n"),
    "no newline at the end": NOTE[:-1],
    "carriage returns": NOTE.replace("\n", "\r\n"),
    "a control character": NOTE.replace(ORIGIN, ORIGIN + "\x00", 1),
    "hyphen instead of dash": NOTE.replace("\u2014", "-"),
    "two blanks": NOTE.replace("\u2014 ", "\u2014  "),
    "signature without padding": NOTE.replace(blob(NOTE), blob(KEY.note(ORIGIN, 7, ROOT)).rstrip("=")[:-1]),
    "a signature of four bytes": NOTE.replace(blob(NOTE), "AAAAAA=="),
    "size with a zero before": NOTE.replace("\n7\n", "\n07\n"),
    "size with a sign": NOTE.replace("\n7\n", "\n+7\n"),
    "size in other digits": NOTE.replace("\n7\n", "\n\u0667\n"),
    "size too large": NOTE.replace("\n7\n", "\n9999999999999999999\n"),
    "an extension line": NOTE.replace("\n\n", "\nextension\n\n"),
    "root with unused bits": NOTE.replace(ROOT_TEXT, loosened(ROOT_TEXT)),
    "root of 31 bytes": NOTE.replace(ROOT_TEXT, base64.b64encode(ROOT[:31]).decode()),
    "another size": NOTE.replace("\n7\n", "\n8\n"),
    "surrogates": NOTE.replace(ORIGIN, ORIGIN + "\ud800"),
    "too long": NOTE + "\u2014 w " + "A" * 65_536 + "\n",
}


@pytest.mark.parametrize("note", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_notes_are_refused(note: str) -> None:
    """Everything that is not exactly a signed checkpoint is LogCorrupt."""
    assert note != NOTE
    with pytest.raises(LogCorrupt):
        open_checkpoint(note, origin=ORIGIN, spki=KEY.spki)


@given(text=st.text(max_size=300))
def test_arbitrary_text_is_refused_in_one_way(text: str) -> None:
    """Parsing raises LogCorrupt and nothing else; what parses keeps its text."""
    for candidate in (text, text + "\n\n\u2014 k AAAAAAA=\n"):
        try:
            assert candidate.startswith(parse_note(candidate).body)
        except LogCorrupt:
            continue


@given(r=st.integers(1, P256_ORDER - 1), s=st.integers(1, P256_ORDER - 1))
def test_signatures_of_pkcs11_become_der(r: int, s: int) -> None:
    """`r || s` in 64 bytes is the DER sequence of the two numbers."""
    assert der_from_p1363(r.to_bytes(32, "big") + s.to_bytes(32, "big")) == encode_dss_signature(r, s)


@pytest.mark.parametrize(
    "signature",
    [b"", bytes(64), b"\1" * 63, b"\1" * 65, b"\xff" * 32 + b"\1" * 32, b"\1" * 32 + bytes(32)],
    ids=["empty", "zeros", "short", "long", "r too large", "s zero"],
)
def test_impossible_signatures_are_refused(signature: bytes) -> None:
    """What no P-256 key can have made is not passed on."""
    with pytest.raises(LogCorrupt):
        der_from_p1363(signature)


def test_a_checkpoint_is_written_only_within_its_limits() -> None:
    """Origin, size and root are checked before the HSM is asked to sign."""
    with pytest.raises(EntryRefused):
        checkpoint_body("two words", 1, ROOT)
    for size, root in ((-1, ROOT), (2**63, ROOT), (1, ROOT[:31])):
        with pytest.raises(LogCorrupt):
            checkpoint_body(ORIGIN, size, root)
