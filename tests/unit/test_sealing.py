"""The sealed format: every vector, every bit, every context; and the two primitives under it against Wycheproof."""

import hmac
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar import hkdf, sealing
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.sealing import SealedSecretMalformed, SealedSecretRefused, WrappingKey
from tests.independent import sealed_decoder

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
KEY = bytes(range(32))
KEY_ID = bytes(range(16))
CONTEXT = SecretContext(
    cluster="cluster-a", owner="owner-1", consent="consent-1", provider_origin="https://api.bank.example:443"
)
KEY_CONTEXT = replace(CONTEXT, provider_origin="")
MASTER_CONTEXT = SecretContext(cluster="cluster-a", row_version=3)
TOKEN = b"a token that nobody may see"
MASTER = bytes(reversed(range(32)))
UNTOUCHED = 0xAA

Case = dict[str, Any]


def cases(*names: str) -> list[Any]:
    found = [case for name in names for case in json.loads((VECTORS / f"sealed/{name}.json").read_text())["cases"]]
    return [pytest.param(case, id=case["name"]) for case in found]


def seal(
    *,
    plaintext: bytes = TOKEN,
    kind: SecretKind = SecretKind.ACCESS_TOKEN,
    context: SecretContext = CONTEXT,
    key: bytes = KEY,
    key_id: bytes = KEY_ID,
    key_version: int = 1,
) -> bytes:
    return sealing.seal(
        key=key, key_id=key_id, key_version=key_version, kind=kind, context=context, plaintext=plaintext
    )


def open_sealed(
    sealed: bytes,
    *,
    kind: SecretKind = SecretKind.ACCESS_TOKEN,
    context: SecretContext = CONTEXT,
    key: bytes | WrappingKey = KEY,
    buffer: bytearray | None = None,
) -> bytes:
    """Open into a buffer that is larger than needed, and show that a refusal leaves only zeros in it."""
    buffer = bytearray([UNTOUCHED]) * (sealing.MAX_PLAINTEXT_BYTES + 1) if buffer is None else buffer
    try:
        length = sealing.open_into(key=key, sealed=sealed, kind=kind, context=context, buffer=memoryview(buffer))
    except (SealedSecretRefused, ValueError):
        assert not any(buffer)
        raise
    assert buffer[length:] == bytes([UNTOUCHED]) * (len(buffer) - length)
    return bytes(buffer[:length])


def unwrap(sealed: bytes, *, key: bytes, context: SecretContext) -> bytes:
    """What the hsm process does, with software in the HSM's place."""
    parts = sealing.root_unwrap_parts(sealed, context)
    try:
        master = AESGCM(key).decrypt(parts.iv, parts.ciphertext, parts.associated_data)
    except Exception as error:
        raise SealedSecretRefused from error
    sealing.check_master_commitment(parts.header, master)
    return master


def outcome(read: Callable[[], bytes]) -> tuple[str, str | None]:
    try:
        return "opens", read().hex()
    except (SealedSecretMalformed, sealed_decoder.Malformed) as error:
        return "malformed", error.field
    except (SealedSecretRefused, sealed_decoder.Refused):
        return "refused", None


def expected(case: Case) -> tuple[str, str | None]:
    return case["result"], case.get("plaintext", case.get("field"))


@pytest.mark.parametrize("case", cases("positive", "negative", "two_keys"))
def test_vector_of_the_message_key_suite(case: Case) -> None:
    """Each record opens, is malformed in the named field, or is refused, as its vector says; a refusal leaves zeros."""
    key, sealed = bytes.fromhex(case["key"]), bytes.fromhex(case["sealed"])
    kind, context = SecretKind(case["kind"]), SecretContext(**case["context"])

    assert outcome(lambda: open_sealed(sealed, key=key, kind=kind, context=context)) == expected(case)


@pytest.mark.parametrize("case", cases("root"))
def test_vector_of_the_hsm_suite(case: Case) -> None:
    """A wrapped master key opens only under its root key, cluster and version, and only to the master it commits to."""
    key, sealed, context = bytes.fromhex(case["key"]), bytes.fromhex(case["sealed"]), SecretContext(**case["context"])
    kind = SecretKind(case["kind"])

    def read() -> bytes:
        if kind is SecretKind.MASTER_KEY:
            return unwrap(sealed, key=key, context=context)
        return open_sealed(sealed, key=key, kind=kind, context=context)

    assert outcome(read) == expected(case)


@pytest.mark.parametrize("case", cases("positive", "negative", "root", "two_keys"))
def test_independent_decoder_agrees_with_the_vectors(case: Case) -> None:
    """A reader written from the document alone comes to the same result, plaintext and field on every vector."""
    key, sealed = bytes.fromhex(case["key"]), bytes.fromhex(case["sealed"])
    context = sealed_decoder.Context(**case["context"])

    def read() -> bytes:
        return sealed_decoder.decode(key=key, sealed=sealed, kind=case["kind"], context=context)

    assert outcome(read) == expected(case)


@pytest.mark.parametrize("case", cases("two_keys"))
def test_two_key_ciphertext_is_real(case: Case) -> None:
    """bi_H10: plain AES-GCM does open the record under both keys, to two texts; so only the commitment refuses it."""
    sealed, message_key = bytes.fromhex(case["sealed"]), bytes.fromhex(case["message_key"])
    context = sealed_decoder.Context(**case["context"])
    authenticated = sealed_decoder.associated_data(sealed[: sealing.HEADER_BYTES], case["kind"], context)

    opened = AESGCM(message_key).decrypt(bytes(12), sealed[sealing.HEADER_BYTES :], authenticated)

    assert opened.hex() == case["gcm_plaintext"]


def test_two_key_vectors_show_both_sides() -> None:
    """Of the six readings of two-key ciphertexts only the two that the commitment names open, to different texts."""
    found = [case.values[0] for case in cases("two_keys")]

    opened = [case["plaintext"] for case in found if case["result"] == "opens"]

    assert len(found) == 6
    assert len(set(opened)) == len(opened) == 2


def test_vectors_are_reproducible() -> None:
    """The committed vectors are what the generator writes, byte for byte."""
    generator = VECTORS / "sealed/make_vectors.py"

    done = subprocess.run([sys.executable, generator, "--check"], check=False, capture_output=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("length", [1, 24, 32])
def test_every_flipped_bit_is_refused(length: int) -> None:
    """bi_H1: whichever single bit of a record is flipped, both readers refuse it."""
    sealed = seal(plaintext=TOKEN[:1] * length)
    context = sealed_decoder.Context(**{name: getattr(CONTEXT, name) for name in CONTEXT.__dataclass_fields__})
    buffer = bytearray(length)

    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        for read in (
            lambda record=bytes(flipped): open_sealed(record, buffer=buffer),
            lambda record=bytes(flipped): sealed_decoder.decode(key=KEY, sealed=record, kind=3, context=context),
        ):
            assert outcome(read)[0] in ("malformed", "refused"), bit


def test_every_flipped_bit_of_a_wrapped_master_key_is_refused() -> None:
    """bi_H1 for the HSM's suite: header, IV, commitment, ciphertext and tag are all covered."""
    sealed = wrap_master()

    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealedSecretRefused):
            unwrap(bytes(flipped), key=KEY, context=MASTER_CONTEXT)
    assert unwrap(sealed, key=KEY, context=MASTER_CONTEXT) == MASTER


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
contexts = st.builds(
    SecretContext,
    cluster=texts.filter(bool),
    owner=texts,
    consent=texts,
    provider_origin=texts.filter(bool),
    row_version=st.integers(1, 2**64 - 1),
)
token_kinds = st.sampled_from([kind for kind in SecretKind if kind >= SecretKind.ACCESS_TOKEN])


@settings(deadline=None, max_examples=150)
@given(
    key=st.binary(min_size=32, max_size=32),
    key_id=st.binary(min_size=16, max_size=16),
    key_version=st.integers(1, 2**32 - 1),
    kind=token_kinds,
    context=contexts,
    plaintext=st.binary(min_size=1, max_size=300),
)
def test_round_trip(
    key: bytes, key_id: bytes, key_version: int, kind: SecretKind, context: SecretContext, plaintext: bytes
) -> None:
    """What is sealed opens to the same bytes, in both readers, and its header says what was asked for."""
    sealed = seal(key=key, key_id=key_id, key_version=key_version, kind=kind, context=context, plaintext=plaintext)
    header = sealing.parse(memoryview(sealed))
    independent = sealed_decoder.Context(**{name: getattr(context, name) for name in CONTEXT.__dataclass_fields__})

    assert open_sealed(sealed, key=key, kind=kind, context=context, buffer=bytearray(len(plaintext))) == plaintext
    assert sealed_decoder.decode(key=key, sealed=sealed, kind=kind, context=independent) == plaintext
    assert (header.key_id, header.key_version, header.kind) == (key_id, key_version, kind)
    assert header.plaintext_bytes == len(plaintext)
    assert len(sealed) == sealing.HEADER_BYTES + len(plaintext) + sealing.TAG_BYTES


@settings(deadline=None, max_examples=150)
@given(sealed_for=contexts, opened_for=contexts)
@example(sealed_for=replace(CONTEXT, owner="ab", consent="c"), opened_for=replace(CONTEXT, owner="a", consent="bc"))
def test_no_other_context_opens(sealed_for: SecretContext, opened_for: SecretContext) -> None:
    """Two contexts that differ anywhere never open each other's records."""
    sealed = seal(context=sealed_for)

    result = outcome(lambda: open_sealed(sealed, context=opened_for, buffer=bytearray(len(TOKEN))))

    assert (result[0] == "opens") == (sealed_for == opened_for)


@settings(deadline=None, max_examples=300)
@given(noise=st.binary(max_size=400))
def test_noise_is_malformed(noise: bytes) -> None:
    """Whatever is not a record is refused as malformed, with a field's name and nothing of the content."""
    with pytest.raises(SealedSecretMalformed) as refusal:
        sealing.parse(noise)

    assert refusal.value.field in {"header", "magic"}


def test_records_of_one_secret_differ() -> None:
    """Sealing twice gives another salt, commitment, ciphertext and tag: nothing tells that the secret is the same."""
    first, second = seal(), seal()

    parts = [(30, 62), (62, 94), (98, len(first) - 16), (len(first) - 16, len(first))]
    assert all(first[start:end] != second[start:end] for start, end in parts)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("key", {"key": KEY[1:] + b"x"}),
        ("kind", {"kind": SecretKind.REFRESH_TOKEN}),
        ("context", {"context": replace(CONTEXT, owner="owner-2")}),
        ("impossible context", {"context": replace(CONTEXT, cluster="")}),
    ],
)
def test_refusals_cannot_be_told_apart(name: str, changes: dict[str, Any]) -> None:
    """Wrong key, kind, context, tag and commitment give one message, with no cause and no value of the call in it."""
    with pytest.raises(SealedSecretRefused) as refusal:
        open_sealed(seal(), **changes)

    assert type(refusal.value) is SealedSecretRefused
    assert str(refusal.value) == "the sealed secret cannot be opened"
    assert refusal.value.__cause__ is None
    assert refusal.value.__context__ is None or refusal.value.__suppress_context__


@pytest.mark.parametrize("offset", [10, 30, 62, 98, -1], ids=["key id", "salt", "commitment", "ciphertext", "tag"])
def test_every_refusal_does_the_same_work(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever part is wrong, keys are derived once and the ciphertext is decrypted once, so time does not tell."""
    work: list[str] = []
    sealed = bytearray(seal())
    sealed[offset] ^= 1
    for owner, name in ((hkdf, "extract_into"), (hkdf, "expand_into"), (sealing, "_aead_open_into")):
        monkeypatch.setattr(owner, name, _counted(getattr(owner, name), name, work))

    with pytest.raises(SealedSecretRefused):
        open_sealed(bytes(sealed))

    assert work == ["extract_into", "expand_into", "expand_into", "_aead_open_into"]


def _counted(function: Callable[..., Any], name: str, work: list[str]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        work.append(name)
        return function(**arguments)

    return call


def test_derived_keys_are_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    """After sealing and after opening, the message key's memory is zero."""
    seen: list[bytearray] = []

    class Watched(sealing._DerivedKeys):
        def derive(self, *, key: Any, salt: bytes) -> None:
            super().derive(key=key, salt=salt)
            assert any(self.message_key)
            room = self.message_key.obj
            assert isinstance(room, bytearray)
            seen.append(room)

    monkeypatch.setattr(sealing, "_DerivedKeys", Watched)
    open_sealed(seal())

    assert len(seen) == 2
    assert not any(map(any, seen))


def test_a_wrapping_key_derives_once_for_each_salt_in_the_memory_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """One secret opened three times is derived for once; another secret replaces what was derived for the first."""
    salts: list[bytes] = []
    extract = hkdf.extract_into

    def watched(**given: Any) -> None:
        salts.append(given["salt"])
        extract(**given)

    monkeypatch.setattr(hkdf, "extract_into", watched)
    first, second = seal(), seal(plaintext=b"another")
    room = bytearray(WrappingKey.ROOM_BYTES)
    room[: len(KEY)] = KEY
    key = WrappingKey(memoryview(room))
    salts.clear()

    opened = [open_sealed(sealed, key=key) for sealed in (first, first, first, second, second, first)]

    assert opened == [TOKEN, TOKEN, TOKEN, b"another", b"another", TOKEN]
    assert salts == [sealing.parse(sealed).salt for sealed in (first, second, first)]
    assert any(room[len(KEY) :])


def test_what_a_wrapping_key_has_derived_opens_nothing_else() -> None:
    """Neither another context nor another ciphertext under the same salt opens, and the right one still does."""
    room = bytearray(WrappingKey.ROOM_BYTES)
    room[: len(KEY)] = KEY
    key = WrappingKey(memoryview(room))
    sealed = seal()
    open_sealed(sealed, key=key)
    damaged = sealed[:-1] + bytes([sealed[-1] ^ 1])

    with pytest.raises(SealedSecretRefused):
        open_sealed(damaged, key=key)
    with pytest.raises(SealedSecretRefused):
        open_sealed(sealed, key=key, context=replace(CONTEXT, owner="somebody-else"))
    assert open_sealed(sealed, key=key) == TOKEN


def test_a_wrapping_key_takes_exactly_its_room() -> None:
    for size in (0, len(KEY), WrappingKey.ROOM_BYTES - 1, WrappingKey.ROOM_BYTES + 1):
        with pytest.raises(ValueError, match="room"):
            WrappingKey(memoryview(bytearray(size)))


def test_intermediate_keys_of_the_derivation_are_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `bytes` that an HMAC returned on the way is zero afterwards; only the caller's buffer has the result."""
    returned: list[bytes] = []
    digest = hmac.digest

    def kept(*arguments: Any) -> bytes:
        returned.append(digest(*arguments))
        assert any(returned[-1])
        return returned[-1]

    monkeypatch.setattr(hmac, "digest", kept)
    output = bytearray(100)
    hkdf.derive_into(digest="sha512", key=KEY, salt=b"salt", info=b"info", into=output)

    assert any(output)
    assert returned == [bytes(64)] * 3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"key": KEY[1:]}, "wrapping key"),
        ({"key_id": KEY_ID[1:]}, "key id"),
        ({"key_version": 0}, "key version"),
        ({"key_version": 2**32}, "key version"),
        ({"plaintext": b""}, "length"),
        ({"plaintext": bytes(sealing.MAX_PLAINTEXT_BYTES + 1)}, "length"),
        ({"kind": SecretKind.DATA_KEY, "context": KEY_CONTEXT, "plaintext": bytes(31)}, "length"),
        ({"kind": SecretKind.DATA_KEY, "plaintext": bytes(32)}, "provider origin"),
        ({"kind": SecretKind.MASTER_KEY, "context": MASTER_CONTEXT, "plaintext": bytes(32)}, "suite of this kind"),
        ({"context": replace(CONTEXT, cluster="")}, "cluster"),
        ({"context": replace(CONTEXT, provider_origin="")}, "provider origin"),
        ({"context": replace(CONTEXT, row_version=0)}, "row version"),
        ({"context": replace(CONTEXT, row_version=2**64)}, "row version"),
        ({"context": replace(CONTEXT, owner="o" * 65_536)}, "65535 bytes"),
        ({"context": replace(CONTEXT, owner="\ud800")}, "Unicode"),
    ],
)
def test_what_could_not_be_opened_is_not_sealed(changes: dict[str, Any], complaint: str) -> None:
    """An argument outside the format is a ValueError that names it and repeats none of it."""
    with pytest.raises(ValueError, match=complaint) as refusal:
        seal(**changes)

    assert refusal.value.__cause__ is None
    assert "\ud800" not in str(refusal.value)


def test_largest_secret() -> None:
    """64 KiB is sealed and opened; the buffer may be exactly as large."""
    plaintext = bytes(range(256)) * 256

    assert open_sealed(seal(plaintext=plaintext), buffer=bytearray(len(plaintext))) == plaintext


def test_buffer_too_small() -> None:
    """A buffer that cannot hold the secret is a ValueError and comes back wiped, not partly filled."""
    buffer = bytearray([UNTOUCHED]) * (len(TOKEN) - 1)

    with pytest.raises(ValueError, match="smaller"):
        open_sealed(seal(), buffer=buffer)


def wrap_master(*, master: bytes = MASTER, iv: bytes = bytes(range(12))) -> bytes:
    parts = sealing.root_wrap_header(key_id=KEY_ID, key_version=2, iv=iv, master_key=master, context=MASTER_CONTEXT)
    return sealing.assemble(parts.header, AESGCM(KEY).encrypt(iv, master, parts.associated_data))


def test_master_key_round_trip() -> None:
    """A master key wrapped by the root key says which root key and IV, and unwraps to itself."""
    sealed = wrap_master()

    parts = sealing.root_unwrap_parts(memoryview(sealed), MASTER_CONTEXT)

    assert unwrap(sealed, key=KEY, context=MASTER_CONTEXT) == MASTER
    assert (parts.header.key_id, parts.header.key_version, parts.iv) == (KEY_ID, 2, bytes(range(12)))
    assert parts.header.kind is SecretKind.MASTER_KEY


@pytest.mark.parametrize("answer", [bytes(32), MASTER[::-1], MASTER[:-1], MASTER + b"\x00", b""])
def test_hsm_that_answers_with_something_else(answer: bytes) -> None:
    """A decryption result that is not the wrapped master (zeros, another key's, cut off) is refused."""
    header = sealing.parse(wrap_master())

    with pytest.raises(SealedSecretRefused):
        sealing.check_master_commitment(header, answer)


@pytest.mark.parametrize("returned", [b"", bytes(32), bytes(47), bytes(49)])
def test_hsm_that_returns_another_length(returned: bytes) -> None:
    """Ciphertext and tag that are not 48 bytes are not assembled."""
    parts = sealing.root_wrap_header(
        key_id=KEY_ID, key_version=1, iv=bytes(12), master_key=MASTER, context=MASTER_CONTEXT
    )

    with pytest.raises(SealedSecretMalformed):
        sealing.assemble(parts.header, returned)


@pytest.mark.parametrize(
    "changes",
    [
        {"iv": bytes(11)},
        {"iv": bytes(16)},
        {"master_key": bytes(31)},
        {"key_id": b""},
        {"context": CONTEXT},
        {"context": replace(MASTER_CONTEXT, consent="consent-1")},
        {"context": replace(MASTER_CONTEXT, row_version=0)},
    ],
)
def test_root_wrap_refuses_what_breaks_the_format(changes: dict[str, Any]) -> None:
    """Wrong sizes and contexts that no master key has are ValueErrors before anything reaches the HSM."""
    arguments: dict[str, Any] = {
        "key_id": KEY_ID, "key_version": 1, "iv": bytes(12), "master_key": MASTER, "context": MASTER_CONTEXT
    }  # fmt: skip

    with pytest.raises(ValueError):
        sealing.root_wrap_header(**(arguments | changes))


def test_token_is_not_unwrapped_as_a_master_key() -> None:
    """The HSM's side takes only its own suite."""
    for context in (MASTER_CONTEXT, CONTEXT):
        with pytest.raises(SealedSecretRefused):
            sealing.root_unwrap_parts(seal(), context)
    with pytest.raises(SealedSecretRefused):
        sealing.check_master_commitment(sealing.parse(seal()), MASTER)


def test_master_key_is_not_opened_with_a_wrapping_key() -> None:
    """Even a record of the HSM's suite that was made with derived keys, commitment and all, is refused by open_into."""
    salt, kind = bytes(12 * [7]) + bytes(20), SecretKind.MASTER_KEY
    with sealing._derived(KEY, salt) as derived:
        header = sealing.SealedHeader(
            suite=sealing.Suite.HSM_AES_256_GCM,
            kind=kind,
            key_id=KEY_ID,
            key_version=1,
            salt=salt,
            commitment=bytes(derived.commitment),
            length=48,
        )
        encoded = sealing._encode(header)
        authenticated = sealing._associated_data(encoded, kind, MASTER_CONTEXT)
        forged = encoded + AESGCM(derived.message_key).encrypt(bytes(12), MASTER, authenticated)

    with pytest.raises(SealedSecretRefused):
        open_sealed(forged, kind=kind, context=MASTER_CONTEXT)


def test_commitment_of_a_master_key_counts_only_in_its_own_suite() -> None:
    """A header of another suite is refused even if it carries the right commitment."""
    wrapped = sealing.parse(wrap_master())
    relabelled = replace(wrapped, suite=sealing.Suite.HKDF_SHA512_AES_256_GCM)

    sealing.check_master_commitment(wrapped, MASTER)
    with pytest.raises(SealedSecretRefused):
        sealing.check_master_commitment(relabelled, MASTER)


def test_repr_of_derived_keys_and_errors_is_empty_of_secrets() -> None:
    """No repr or pickle of what this module hands out holds a key or plaintext."""
    with pytest.raises(SealedSecretMalformed) as refusal:
        sealing.parse(TOKEN)

    shown = repr(refusal.value) + str(refusal.value) + repr(sealing.parse(seal())) + repr(pickle.dumps(refusal.value))
    assert "nobody" not in shown
    assert KEY.hex() not in shown


def wycheproof(name: str) -> list[Any]:
    groups = json.loads((VECTORS / f"wycheproof/{name}.json").read_text())["testGroups"]
    return [pytest.param(group, test, id=f"tc{test['tcId']}") for group in groups for test in group["tests"]]


AES_GCM_ROWS = [
    row for row in wycheproof("aes_gcm_test") if (row.values[0]["keySize"], row.values[0]["ivSize"]) == (256, 96)
]


@pytest.mark.parametrize(("group", "test"), AES_GCM_ROWS)
def test_wycheproof_aes_gcm(group: Case, test: Case) -> None:
    """The opening function accepts every valid row and refuses every invalid one; the sealing function makes the same."""
    key, nonce, aad, plaintext = (bytes.fromhex(test[name]) for name in ("key", "iv", "aad", "msg"))
    sealed, buffer = bytes.fromhex(test["ct"] + test["tag"]), bytearray(len(plaintext))
    remade = bytearray(len(sealed))

    opened = sealing._aead_open_into(
        key=key, nonce=nonce, ciphertext=sealed, associated_data=aad, buffer=memoryview(buffer)
    )
    sealing._aead_seal_into(key=key, nonce=nonce, plaintext=plaintext, associated_data=aad, buffer=remade)

    assert opened == (test["result"] == "valid")
    assert (remade == sealed) == (test["result"] == "valid")
    if opened:
        assert buffer == plaintext


def test_wycheproof_aes_gcm_rows_are_there() -> None:
    """The filter above leaves the rows it is meant to leave: valid and invalid ones with our key and IV size."""
    results = [row.values[1]["result"] for row in AES_GCM_ROWS]

    assert {row.values[0]["tagSize"] for row in AES_GCM_ROWS} == {128}
    assert len(results) == 66
    assert set(results) == {"valid", "invalid"}


@pytest.mark.parametrize(("group", "test"), wycheproof("hkdf_sha512_test"))
def test_wycheproof_hkdf_sha512(group: Case, test: Case) -> None:
    """The derivation gives every expected output and refuses sizes beyond RFC 5869's limit."""
    key, salt, info = (bytes.fromhex(test[name]) for name in ("ikm", "salt", "info"))
    output = bytearray(test["size"])

    def derive() -> None:
        hkdf.derive_into(digest="sha512", key=key, salt=salt, info=info, into=output)

    if test["result"] == "invalid":
        with pytest.raises(ValueError, match="255"):
            derive()
    else:
        derive()
        assert output.hex() == test["okm"]
