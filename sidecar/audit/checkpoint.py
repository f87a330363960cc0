"""Checkpoints of the log: C2SP tlog-checkpoint in C2SP signed-note, signature type 0x02 (ECDSA P-256 with SHA-256).

Rules: the HSM signs, this module only assembles and checks; a note is made only if its signature verifies; the text of a note
is worth nothing before a signature of a known key over it has been verified; everything has one form only.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from sidecar.audit.entry import check_origin
from sidecar.audit.errors import LogCorrupt
from sidecar.audit.merkle import HASH_BYTES

__all__ = [
    "MAX_NOTE_BYTES",
    "MAX_SIGNATURES",
    "Checkpoint",
    "Note",
    "NoteSignature",
    "assemble_note",
    "checkpoint_body",
    "der_from_p1363",
    "note_key_id",
    "open_checkpoint",
    "parse_checkpoint",
    "parse_note",
    "verify_note",
]

MAX_NOTE_BYTES = 65_536  # sixteen signatures, the post-quantum ones of 2.4 kB among them
MAX_SIGNATURES = 16

_KEY_ID_BYTES = 4
_SIGNATURE_MARK = "\N{EM DASH} "
_SIZE = re.compile(r"(?:0|[1-9][0-9]{0,18})\Z")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")  # all below U+0020 but the newline
_KEY_NAME = re.compile(r"[^\s+]+\Z")
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The log `origin` had `root` when it had `size` entries."""

    origin: str
    size: int
    root: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteSignature:
    """One signature line: which key claims it, and the signature without its key id."""

    key_name: str
    key_id: bytes
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A note in its parts. Nothing is verified yet."""

    body: str
    signatures: tuple[NoteSignature, ...]


def checkpoint_body(origin: str, size: int, root: bytes) -> bytes:
    """What the HSM signs (C2SP tlog-checkpoint): origin, size and root, each on a line. Extension lines are not written."""
    check_origin(origin)
    if not 0 <= size < 2**63 or len(root) != HASH_BYTES:
        raise LogCorrupt("the size or root of a checkpoint is out of range")
    return f"{origin}\n{size}\n{base64.b64encode(root).decode('ascii')}\n".encode("ascii")


def note_key_id(spki: bytes) -> bytes:
    """The key id of an ECDSA key (C2SP signed-note, type 0x02): of its DER SubjectPublicKeyInfo alone, 4 bytes."""
    return sha256(spki).digest()[:_KEY_ID_BYTES]


def der_from_p1363(signature: bytes) -> bytes:
    """The DER form of the 64 bytes `r || s` that PKCS#11 answers for CKM_ECDSA on P-256.

    Raises LogCorrupt when they cannot be a signature.
    """
    if len(signature) != 64:
        raise LogCorrupt("the HSM answered a signature of another length")
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if not (0 < r < _P256_ORDER and 0 < s < _P256_ORDER):
        raise LogCorrupt("the HSM answered a signature out of range")
    return encode_dss_signature(r, s)


def assemble_note(body: bytes, key_name: str, spki_der: bytes, der_signature: bytes) -> str:
    """The signed note over the checkpoint `body`. For a log, `key_name` is its origin.

    Raises LogCorrupt when the body is no checkpoint or the signature does not verify: no money leaves without a note.
    """
    text = _text(body)
    parse_checkpoint(text)
    blob = base64.b64encode(note_key_id(spki_der) + der_signature).decode("ascii")
    note = f"{text}\n{_SIGNATURE_MARK}{key_name} {blob}\n"
    verify_note(note, {key_name: spki_der})
    return note


def open_checkpoint(note: str, *, origin: str, spki: bytes) -> Checkpoint:
    """The checkpoint in `note`, verified to be of the log `origin` and signed by its key.

    Raises LogCorrupt.
    """
    checkpoint = parse_checkpoint(verify_note(note, {origin: spki}))
    if checkpoint.origin != origin:
        raise LogCorrupt("a checkpoint belongs to another log")
    return checkpoint


def verify_note(note: str, keys: Mapping[str, bytes]) -> str:
    """The text of `note`, signed by at least one of `keys` (key name to DER SubjectPublicKeyInfo).

    Signatures of other keys are ignored; one of a known key that does not verify spoils the note. Raises LogCorrupt.
    """
    parsed = parse_note(note)
    known = [line for line in parsed.signatures if _is_of(line, keys)]
    if not known:
        raise LogCorrupt("no known key has signed the note")
    body = parsed.body.encode("utf-8")
    if not all(_verifies(keys[line.key_name], body, line.signature) for line in known):
        raise LogCorrupt("a signature of a known key does not verify")
    return parsed.body


def parse_note(note: str) -> Note:
    """The parts of a signed note (C2SP signed-note, "Format"). Raises LogCorrupt."""
    try:
        length = len(note.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise LogCorrupt("a note is not UTF-8") from error
    if length > MAX_NOTE_BYTES or _CONTROL.search(note):
        raise LogCorrupt("a note is too long or has control characters")
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not text or not signatures.endswith("\n"):
        raise LogCorrupt("a note does not have the form text, empty line, signatures")
    lines = signatures.removesuffix("\n").split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise LogCorrupt("a note has too many signatures")
    return Note(body=text + "\n", signatures=tuple(_parse_signature(line) for line in lines))


def parse_checkpoint(body: str) -> Checkpoint:
    """The checkpoint in the text of a note (C2SP tlog-checkpoint), without extension lines. Raises LogCorrupt."""
    origin, _, rest = body.partition("\n")
    size, _, rest = rest.partition("\n")
    root, newline, rest = rest.partition("\n")
    if not origin or not _SIZE.match(size) or not newline or rest:
        raise LogCorrupt("a checkpoint does not have the form origin, size, root")
    decoded = _unbase64(root)
    if len(decoded) != HASH_BYTES or int(size) >= 2**63:
        raise LogCorrupt("the size or root of a checkpoint is out of range")
    return Checkpoint(origin=origin, size=int(size), root=decoded)


def _parse_signature(line: str) -> NoteSignature:
    name, blank, blob = line.removeprefix(_SIGNATURE_MARK).partition(" ")
    if not line.startswith(_SIGNATURE_MARK) or not blank or not _KEY_NAME.match(name):
        raise LogCorrupt("a signature line does not have the form dash, key name, signature")
    data = _unbase64(blob)
    if len(data) <= _KEY_ID_BYTES:
        raise LogCorrupt("a signature line has no signature")
    return NoteSignature(key_name=name, key_id=data[:_KEY_ID_BYTES], signature=data[_KEY_ID_BYTES:])


def _is_of(line: NoteSignature, keys: Mapping[str, bytes]) -> bool:
    spki = keys.get(line.key_name)
    return spki is not None and line.key_id == note_key_id(spki)


def _verifies(spki: bytes, message: bytes, der_signature: bytes) -> bool:
    try:
        _public_key(spki).verify(der_signature, message, ec.ECDSA(SHA256()))  # refuses BER and padding, too
    except InvalidSignature:
        return False
    return True


def _public_key(spki: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise LogCorrupt("the audit key is not a public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise LogCorrupt("the audit key is not on the curve P-256")
    return key


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LogCorrupt("a note is not UTF-8") from error


def _unbase64(text: str) -> bytes:
    """RFC 4648 §4, canonical: of the several texts that lenient decoders read as the same bytes only one is taken."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise LogCorrupt("a note has a part that is not base64") from error
    if base64.b64encode(data).decode("ascii") != text:
        raise LogCorrupt("a note has base64 that is not canonical")
    return data
