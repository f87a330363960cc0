"""Make the vectors of the sealed format. Deterministic: every "random" value is SHAKE-256 of its name.

    python tests/vectors/sealed/make_vectors.py            writes the files beside this one
    python tests/vectors/sealed/make_vectors.py --check    exits with 1 if a file differs from what would be written

A case says: with this key, kind and context, these bytes open to this plaintext, or are malformed in this field, or are
refused. The files are kept for ever; a format 1 record that opens today must open in every later version.
"""

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from sidecar import hkdf, sealing  # noqa: E402
from sidecar.domain.secrets import SecretContext, SecretKind  # noqa: E402

Case = dict[str, Any]

KEY_ID = bytes.fromhex("000102030405060708090a0b0c0d0e0f")
ORIGIN = "https://api.bank.example:443"
TOKEN_CONTEXT = SecretContext(
    cluster="cluster-a", owner="owner-1", consent="consent-1", provider_origin=ORIGIN, row_version=7
)
KEY_CONTEXT = replace(TOKEN_CONTEXT, provider_origin="")
MASTER_CONTEXT = SecretContext(cluster="cluster-a", row_version=3)
TOKEN = b"example-token-not-a-real"  # 24 bytes
HEADER = struct.Struct(">4sBHBH16sI32s32sI")
FIELDS = ("magic", "format", "suite", "kind", "flags", "key_id", "key_version", "salt", "commitment", "length")


def random(name: str, length: int = 32) -> bytes:
    return hashlib.shake_256(name.encode()).digest(length)


KEY = random("wrapping key")
OTHER_KEY = random("other wrapping key")
ROOT_KEY = random("root key")


def main(arguments: list[str]) -> int:
    files = {"positive": list(positive()), "negative": list(negative()), "root": list(root()), "two_keys": two_keys()}
    stale = False
    for name, cases in files.items():
        path = Path(__file__).with_name(f"{name}.json")
        text = json.dumps({"format": 1, "cases": cases}, indent=1, ensure_ascii=True) + "\n"
        if "--check" in arguments:
            stale |= not path.exists() or path.read_text() != text
        else:
            path.write_text(text)
    return int(stale)


def positive() -> Iterator[Case]:
    for kind in (
        SecretKind.ACCESS_TOKEN,
        SecretKind.REFRESH_TOKEN,
        SecretKind.PKCE_VERIFIER,
        SecretKind.CLIENT_SECRET,
    ):
        yield opens(f"{kind.name.lower()}", seal(kind=kind), kind=kind)
    data_key = seal(kind=SecretKind.DATA_KEY, context=KEY_CONTEXT, plaintext=random("data key"))
    yield opens("data_key", data_key, kind=SecretKind.DATA_KEY, context=KEY_CONTEXT, plaintext=random("data key"))
    for length in (1, 15, 16, 17, 31, 32, 33, 255, 256, 1024):
        plaintext = random(f"plaintext {length}", length)
        yield opens(f"length_{length}", seal(plaintext=plaintext), plaintext=plaintext)
    unicode_context = replace(TOKEN_CONTEXT, owner="Zoë 東京 \U0001f511", consent="", row_version=2**64 - 1)
    yield opens("unicode_context", seal(context=unicode_context), context=unicode_context)
    longest = replace(TOKEN_CONTEXT, owner="o" * 300, cluster="c", row_version=1)
    yield opens("long_context", seal(context=longest), context=longest)
    yield opens("greatest_key_version", seal(key_version=2**32 - 1))
    yield opens("zero_key_id", seal(key_id=bytes(16)))


def negative() -> Iterator[Case]:
    yield from bad_fields()
    yield from bad_lengths()
    yield from other_contexts()
    yield from other_keys_and_kinds()
    yield from replaced_parts()


def bad_fields() -> Iterator[Case]:
    """Every field of the header, set to values that no reader may accept."""
    bad_values: dict[str, list[Any]] = {
        "magic": [b"TCST", b"tcss", bytes(4)],
        "format": [0, 2, 255],
        "suite": [0, 3, 0x0100, 0x0478, 0xFFFF],
        "kind": [0, 7, 255],
        "flags": [1, 2, 0x0100, 0x8000, 0xFFFF],
    }
    for field, values in bad_values.items():
        for value in values:
            yield malformed(f"{field}_{shown(value)}", changed(seal(), **{field: value}), field)
    yield malformed("suite_downgraded_to_hsm", changed(seal(), suite=2), "suite of this kind")
    yield malformed("kind_master_key", changed(seal(), kind=1), "suite of this kind")
    yield malformed("kind_data_key_of_other_length", changed(seal(), kind=2), "length")
    yield malformed("key_version_0", changed(seal(), key_version=0), "key version")
    yield refused("key_version_next", changed(seal(), key_version=2))
    yield refused("key_version_greatest", changed(seal(), key_version=2**32 - 1))
    yield refused("key_id_other", changed(seal(), key_id=random("other key id", 16)))
    yield refused("key_id_zero", changed(seal(), key_id=bytes(16)))
    for kind in (4, 5, 6):
        yield refused(f"kind_{kind}_in_header", changed(seal(), kind=kind))
        yield refused(f"kind_{kind}_in_header_and_expected", changed(seal(), kind=kind), kind=SecretKind(kind))


def bad_lengths() -> Iterator[Case]:
    sealed = seal()
    for length in range(len(sealed)):
        field = "header" if length < HEADER.size else "length"
        yield malformed(f"truncated_to_{length}", sealed[:length], field)
    for name, tail in (("zero", b"\x00"), ("block", bytes(16)), ("itself", sealed)):
        yield malformed(f"extended_by_{name}", sealed + tail, "length")
    right = len(sealed) - HEADER.size
    for length in (0, 1, 15, 16, right - 1, right + 1, 65_552, 65_553, 2**31, 2**32 - 1):
        yield malformed(f"length_field_{length}", changed(sealed, length=length), "length")
    shorter = changed(sealed, length=right - 1)[:-1]
    yield refused("truncated_with_matching_length_field", shorter)
    yield refused("extended_with_matching_length_field", changed(sealed, length=right + 1) + b"\x00")
    only_tag = changed(sealed, length=16)[: HEADER.size + 16]
    yield malformed("nothing_but_a_tag", only_tag, "length")


def other_contexts() -> Iterator[Case]:
    """The same bytes, found in another row or under another configuration."""
    swaps: dict[str, list[Any]] = {
        "cluster": ["cluster-b", "Cluster-a", "cluster-a ", "cluster-", ""],
        "owner": ["owner-2", "", "OWNER-1", "owner-1\u0000", "owner-1consent-1"],
        "consent": ["consent-2", "", "consent-1 "],
        "provider_origin": [
            "https://api.bank.example:8443",
            "http://api.bank.example:443",
            "https://api.bank.example",
            "https://evil.example:443",
            "https://API.bank.example:443",
            "",
        ],
        "row_version": [6, 8, 1, 0, -1, 2**64 - 1, 2**64, 7 << 8],
    }
    for field, values in swaps.items():
        for number, value in enumerate(values):
            yield refused(f"other_{field}_{number}", seal(), context=replace(TOKEN_CONTEXT, **{field: value}))
    yield refused("owner_and_consent_swapped", seal(), context=swapped(TOKEN_CONTEXT, "owner", "consent"))
    moved = replace(TOKEN_CONTEXT, owner="owner-1c", consent="onsent-1")
    yield refused("boundary_between_owner_and_consent_moved", seal(), context=moved)
    composed = replace(TOKEN_CONTEXT, owner="Zo\u00eb")
    yield refused("owner_decomposed", seal(context=composed), context=replace(composed, owner="Zoe\u0308"))
    yield refused("older_row_version", seal(context=replace(TOKEN_CONTEXT, row_version=6)))
    yield refused("surrogate_in_owner", seal(), context=replace(TOKEN_CONTEXT, owner="\ud800"))
    yield refused("owner_of_65536_bytes", seal(), context=replace(TOKEN_CONTEXT, owner="o" * 65_536))


def other_keys_and_kinds() -> Iterator[Case]:
    yield refused("other_key", seal(), key=OTHER_KEY)
    yield refused("key_with_one_bit_flipped", seal(), key=bytes([KEY[0] ^ 1]) + KEY[1:])
    for kind in (SecretKind.REFRESH_TOKEN, SecretKind.PKCE_VERIFIER, SecretKind.CLIENT_SECRET):
        yield refused(f"{kind.name.lower()}_expected", seal(), kind=kind)
    data_key = seal(kind=SecretKind.DATA_KEY, context=KEY_CONTEXT, plaintext=random("data key"))
    yield refused("data_key_where_token_expected", data_key)
    long_token = seal(plaintext=random("token of 32 bytes"))
    yield refused("token_where_data_key_expected", long_token, kind=SecretKind.DATA_KEY, context=KEY_CONTEXT)
    relabelled = changed(long_token, kind=2)
    yield refused("token_relabelled_as_data_key", relabelled, kind=SecretKind.DATA_KEY, context=KEY_CONTEXT)
    with_owner = replace(KEY_CONTEXT, provider_origin=ORIGIN)
    yield refused("data_key_with_an_origin", data_key, kind=SecretKind.DATA_KEY, context=with_owner)


def replaced_parts() -> Iterator[Case]:
    sealed, other = seal(), seal(salt=random("other salt"))
    other_fields = fields(other)
    yield refused("commitment_zero", changed(sealed, commitment=bytes(32)))
    yield refused("commitment_of_another_record", changed(sealed, commitment=other_fields["commitment"]))
    yield refused("commitment_of_another_key", changed(sealed, commitment=fields(seal(key=OTHER_KEY))["commitment"]))
    yield refused("salt_of_another_record", changed(sealed, salt=other_fields["salt"]))
    yield refused("salt_zero", changed(sealed, salt=bytes(32)))
    both = changed(sealed, salt=other_fields["salt"], commitment=other_fields["commitment"])
    yield refused("salt_and_commitment_of_another_record", both)
    yield refused("ciphertext_of_another_record", sealed[: HEADER.size] + other[HEADER.size :])
    yield refused("tag_of_another_record", sealed[:-16] + other[-16:])
    yield refused("tag_zero", sealed[:-16] + bytes(16))
    plain_gcm = sealed[: HEADER.size] + AESGCM(KEY).encrypt(bytes(12), TOKEN, authenticated(sealed))
    yield refused("encrypted_with_the_wrapping_key_itself", plain_gcm)
    without_context = AESGCM(derived(KEY, sealed)).encrypt(bytes(12), TOKEN, None)
    yield refused("encrypted_without_associated_data", sealed[: HEADER.size] + without_context)


def root() -> Iterator[Case]:
    """Suite 0x0002, with a root key that is known here, as it never is in an HSM."""
    master = random("master key")
    common: dict[str, Any] = {"key": ROOT_KEY, "kind": SecretKind.MASTER_KEY, "context": MASTER_CONTEXT}
    sealed = wrap(ROOT_KEY, master)
    yield opens("master_key", sealed, plaintext=master, **common)
    yield refused("other_root_key", sealed, **{**common, "key": OTHER_KEY})
    yield refused("other_cluster", sealed, **{**common, "context": replace(MASTER_CONTEXT, cluster="cluster-b")})
    yield refused("older_version", sealed, **{**common, "context": replace(MASTER_CONTEXT, row_version=2)})
    yield refused("with_an_owner", sealed, **{**common, "context": replace(MASTER_CONTEXT, owner="owner-1")})
    yield refused("commitment_zero", changed(sealed, commitment=bytes(32)), **common)
    other = wrap(ROOT_KEY, random("other master key"))
    yield refused("ciphertext_of_another_master", sealed[: HEADER.size] + other[HEADER.size :], **common)
    foreign = changed(sealed, commitment=fields(other)["commitment"])
    reencrypted = AESGCM(ROOT_KEY).encrypt(fields(sealed)["salt"][:12], master, authenticated(foreign, MASTER_CONTEXT))
    yield refused("right_tag_but_commitment_of_another_master", foreign[: HEADER.size] + reencrypted, **common)
    yield malformed("salt_padding_not_zero", changed(sealed, salt=random("salt")), "salt", **common)
    yield malformed("suite_downgraded_to_message_key", changed(sealed, suite=1), "suite of this kind", **common)
    yield malformed("kind_token", changed(sealed, kind=3), "suite of this kind", **common)
    yield malformed("length_of_a_shorter_key", changed(sealed, length=32)[:-16], "length", **common)
    yield malformed("truncated", sealed[:-1], "length", **common)
    yield malformed("extended", sealed + b"\x00", "length", **common)
    yield refused("read_as_a_token", sealed, key=ROOT_KEY)


def two_keys() -> list[Case]:
    """One ciphertext and tag that plain AES-256-GCM opens under both keys (an "invisible salamander")."""
    cases: list[Case] = []
    first, second = fields(seal())["commitment"], fields(seal(key=OTHER_KEY))["commitment"]
    for name, commitment in (("first", first), ("second", second), ("neither", random("commitment"))):
        head = changed(seal(plaintext=bytes(48)), commitment=commitment)[: HEADER.size]
        keys = [derived(key, head) for key in (KEY, OTHER_KEY)]
        sealed = head + salamander(keys[0], keys[1], authenticated(head))
        for number, (key, message_key) in enumerate(zip((KEY, OTHER_KEY), keys, strict=True)):
            plaintext = AESGCM(message_key).decrypt(bytes(12), sealed[HEADER.size :], authenticated(head))
            committed = name == ("first", "second")[number]
            title = f"committed_to_{name}_opened_with_{('first', 'second')[number]}"
            verdict = (
                opens(title, sealed, key=key, plaintext=plaintext) if committed else refused(title, sealed, key=key)
            )
            # What a reader without the commitment would have believed.
            cases.append({**verdict, "message_key": message_key.hex(), "gcm_plaintext": plaintext.hex()})
    return cases


def salamander(first: bytes, second: bytes, associated_data: bytes) -> bytes:
    """The tag is linear in each ciphertext block: solve for the last of three so that both keys give one tag."""
    blocks = [number(random(f"block {index}", 16)) for index in range(2)] + [0]
    subkeys = [number(aes(key, bytes(16))) for key in (first, second)]
    masks = [number(aes(key, bytes(15) + b"\x01")) for key in (first, second)]

    def tag(index: int) -> int:
        state = 0
        for block in (*padded(associated_data), *blocks, len(associated_data) * 8 << 64 | 48 * 8):
            state = multiply(state ^ block, subkeys[index])
        return state ^ masks[index]

    squares = [multiply(subkey, subkey) for subkey in subkeys]
    blocks[2] = multiply(tag(0) ^ tag(1), inverse(squares[0] ^ squares[1]))
    assert tag(0) == tag(1)
    return b"".join(block.to_bytes(16, "big") for block in (*blocks, tag(0)))


def multiply(left: int, right: int) -> int:
    product = 0
    for bit in range(127, -1, -1):
        if left >> bit & 1:
            product ^= right
        right = right >> 1 ^ 0xE1 << 120 if right & 1 else right >> 1
    return product


def inverse(value: int) -> int:
    result, exponent = 1 << 127, (1 << 128) - 2
    while exponent:
        if exponent & 1:
            result = multiply(result, value)
        value = multiply(value, value)
        exponent >>= 1
    return result


def seal(
    *,
    key: bytes = KEY,
    key_id: bytes = KEY_ID,
    key_version: int = 1,
    kind: SecretKind = SecretKind.ACCESS_TOKEN,
    context: SecretContext = TOKEN_CONTEXT,
    plaintext: bytes = TOKEN,
    salt: bytes = random("salt"),
) -> bytes:
    return sealing._seal_with_salt(
        salt=salt,
        key=key,
        key_id=key_id,
        key_version=key_version,
        kind=kind,
        context=context,
        plaintext=plaintext,
    )


def wrap(root_key: bytes, master: bytes) -> bytes:
    iv = random("iv of " + master.hex(), 12)
    parts = sealing.root_wrap_header(key_id=KEY_ID, key_version=1, iv=iv, master_key=master, context=MASTER_CONTEXT)
    return sealing.assemble(parts.header, AESGCM(root_key).encrypt(iv, master, parts.associated_data))


def derived(key: bytes, sealed: bytes) -> bytes:
    message_key = bytearray(32)
    info = b"token-custody/sealed/1\x00\x01DERIVEKEY"
    hkdf.derive_into(digest="sha512", key=key, salt=fields(sealed)["salt"], info=info, into=message_key)
    return bytes(message_key)


def authenticated(sealed: bytes, context: SecretContext = TOKEN_CONTEXT) -> bytes:
    texts = (context.cluster, context.owner, context.consent, context.provider_origin)
    parts = (sealed[: HEADER.size], *(text.encode() for text in texts), context.row_version.to_bytes(8, "big"))
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def fields(sealed: bytes) -> dict[str, Any]:
    padded_head = sealed[: HEADER.size]
    return dict(zip(FIELDS, HEADER.unpack(padded_head), strict=True))


def changed(sealed: bytes, **changes: Any) -> bytes:
    return HEADER.pack(*{**fields(sealed), **changes}.values()) + sealed[HEADER.size :]


def swapped(context: SecretContext, first: str, second: str) -> SecretContext:
    return replace(context, **{first: getattr(context, second), second: getattr(context, first)})


def opens(name: str, sealed: bytes, *, plaintext: bytes = TOKEN, **given: Any) -> Case:
    return {**case(name, sealed, **given), "result": "opens", "plaintext": plaintext.hex()}


def malformed(name: str, sealed: bytes, field: str, **given: Any) -> Case:
    return {**case(name, sealed, **given), "result": "malformed", "field": field}


def refused(name: str, sealed: bytes, **given: Any) -> Case:
    return {**case(name, sealed, **given), "result": "refused"}


def case(
    name: str,
    sealed: bytes,
    *,
    key: bytes = KEY,
    kind: SecretKind = SecretKind.ACCESS_TOKEN,
    context: SecretContext = TOKEN_CONTEXT,
) -> Case:
    return {"name": name, "key": key.hex(), "kind": int(kind), "context": asdict(context), "sealed": sealed.hex()}


def aes(key: bytes, block: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)


def padded(data: bytes) -> list[int]:
    data += bytes(-len(data) % 16)
    return [number(data[start : start + 16]) for start in range(0, len(data), 16)]


def number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def shown(value: bytes | int) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
