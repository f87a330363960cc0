"""Master and data keys, with a root key in software."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sidecar import sealing
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.errors import Corrupt, Unavailable
from sidecar.hsm.errors import HsmFault, RootRefused
from sidecar.hsm.vault import Vault, data_key_id
from sidecar.ipc.messages import WrappedMasterKey
from sidecar.secretbuffer import WritableBuffer

CONTEXT = SecretContext(cluster="cluster-1", owner="owner-1", consent="consent-1")

# What is loaded in place of the first and the second master key.
KeySetChange = Callable[[WrappedMasterKey, WrappedMasterKey], list[WrappedMasterKey]]


class SoftRoot:
    """AES-GCM in software, in place of the HSM's root key. `answer_with` makes it a liar."""

    def __init__(self, key_id: bytes = bytes(16), key: bytes = b"r" * 32) -> None:
        self.key_id = key_id
        self._cipher = AESGCM(key)
        self.answer_with: bytes | None = None

    def encrypt(self, *, iv: bytes, plaintext: memoryview, associated_data: bytes) -> bytes:
        return self._cipher.encrypt(iv, bytes(plaintext), associated_data)

    def decrypt_into(self, *, iv: bytes, ciphertext: bytes, associated_data: bytes, buffer: WritableBuffer) -> None:
        try:
            plaintext = self._cipher.decrypt(iv, ciphertext, associated_data)
        except InvalidTag:
            raise RootRefused from None
        buffer[:] = self.answer_with or plaintext


class Counter:
    """Random numbers that differ and can be told apart."""

    def __init__(self) -> None:
        self._next = itertools.count(1)

    def random_into(self, buffer: WritableBuffer) -> None:
        buffer[:] = next(self._next).to_bytes(len(buffer), "big")


def vault(root: SoftRoot | None = None, cluster: str = "cluster-1") -> Vault:
    return Vault(root=root or SoftRoot(), random=Counter(), cluster=cluster)


def current(key: WrappedMasterKey) -> WrappedMasterKey:
    return msgspec.structs.replace(key, current=True)


def loaded() -> Vault:
    it = vault()
    it.load([current(it.create_master_key(1))])
    return it


def test_a_data_key_opens_for_its_context() -> None:
    """Create and open give the same 32 octets under the same id."""
    it, key, again = loaded(), bytearray(32), bytearray(32)

    made = it.create_data_key(CONTEXT, key)
    key_id = it.open_data_key(made.wrapped, CONTEXT, again)

    assert key == again != bytes(32)
    assert key_id == made.key_id == data_key_id(CONTEXT)


def test_every_data_key_is_another() -> None:
    """Also for the same context."""
    it, first, second = loaded(), bytearray(32), bytearray(32)

    one, two = it.create_data_key(CONTEXT, first), it.create_data_key(CONTEXT, second)

    assert first != second
    assert one.wrapped != two.wrapped


@pytest.mark.parametrize(
    "other",
    [
        replace(CONTEXT, owner="owner-2"),
        replace(CONTEXT, owner=""),
        replace(CONTEXT, consent="consent-2"),
        replace(CONTEXT, cluster="cluster-2"),
        replace(CONTEXT, row_version=2),
        replace(CONTEXT, row_version=0),
        replace(CONTEXT, provider_origin="https://bank.example:443"),
        replace(CONTEXT, owner="owner-1consent-1", consent=""),
    ],
)
def test_a_data_key_opens_for_no_other_context(other: SecretContext) -> None:
    """One value differs: it does not open, and the buffer holds nothing."""
    it, key, buffer = loaded(), bytearray(32), bytearray(b"\xff" * 32)
    made = it.create_data_key(CONTEXT, key)

    with pytest.raises(Corrupt) as caught:
        it.open_data_key(made.wrapped, other, buffer)

    assert caught.value.reason == "ENVELOPE_CORRUPT"
    assert buffer in (bytes(32), b"\xff" * 32)


@pytest.mark.parametrize("bit", range(0, 146 * 8, 37))
def test_a_changed_bit_of_a_wrapped_data_key_is_found(bit: int) -> None:
    """Any bit, header included."""
    it, key = loaded(), bytearray(32)
    wrapped = bytearray(it.create_data_key(CONTEXT, key).wrapped)
    wrapped[bit // 8] ^= 1 << bit % 8

    with pytest.raises(Corrupt):
        it.open_data_key(bytes(wrapped), CONTEXT, bytearray(32))


@pytest.mark.parametrize(
    "context",
    [
        replace(CONTEXT, cluster="cluster-2"),
        replace(CONTEXT, provider_origin="https://x:443"),
        replace(CONTEXT, row_version=0),
    ],
)
def test_no_data_key_is_made_for_a_context_that_it_cannot_have(context: SecretContext) -> None:
    """Another cluster, an origin, a row version 0: refused, and the buffer holds no key."""
    buffer = bytearray(32)

    with pytest.raises(Corrupt):
        loaded().create_data_key(context, buffer)

    assert buffer == bytes(32)


def test_a_token_is_no_data_key() -> None:
    """A record of another kind under the same master key does not open as a data key."""
    it = loaded()
    master = it._current
    assert master is not None
    token = sealing.seal(
        key=master.buffer.view,
        key_id=master.key_id,
        key_version=1,
        kind=SecretKind.ACCESS_TOKEN,
        context=replace(CONTEXT, provider_origin="https://bank.example:443"),
        plaintext=b"t" * 32,
    )

    with pytest.raises(Corrupt):
        it.open_data_key(token, CONTEXT, bytearray(32))


def test_without_master_keys_nothing_is_made_or_opened() -> None:
    """A fresh process says so, and says it in a way that can be tried again."""
    made = loaded().create_data_key(CONTEXT, bytearray(32))
    fresh = vault()

    for attempt in (
        lambda: fresh.create_data_key(CONTEXT, bytearray(32)),
        lambda: fresh.open_data_key(made.wrapped, CONTEXT, bytearray(32)),
    ):
        with pytest.raises(Unavailable) as caught:
            attempt()
        assert caught.value.reason == "HSM_UNAVAILABLE"
    assert (fresh.versions, fresh.current_version) == ((), 0)


def test_the_current_version_wraps_and_older_ones_still_open() -> None:
    """After a rotation old data keys open, and new ones name the new version."""
    it, old_key, again = vault(), bytearray(32), bytearray(32)
    first = it.create_master_key(1)
    it.load([current(first)])
    old = it.create_data_key(CONTEXT, old_key).wrapped
    second = it.create_master_key(2)
    it.load([first, current(second)])

    it.open_data_key(old, CONTEXT, again)
    new = it.create_data_key(CONTEXT, bytearray(32)).wrapped

    assert again == old_key
    assert sealing.parse(new).key_version == 2
    assert (it.versions, it.current_version) == ((1, 2), 2)


def test_a_version_that_was_taken_away_opens_nothing() -> None:
    """Loading replaces: a master key that is not in the new set is gone."""
    it = vault()
    first, second = it.create_master_key(1), it.create_master_key(2)
    it.load([current(first)])
    old = it.create_data_key(CONTEXT, bytearray(32)).wrapped
    it.load([current(second)])

    with pytest.raises(Corrupt, match="not loaded"):
        it.open_data_key(old, CONTEXT, bytearray(32))


def _sets() -> dict[str, KeySetChange]:
    """Name, what is done to (first, second), and whether it is a set that may be loaded."""
    swap = msgspec.structs.replace
    return {
        "none": lambda _1, _2: [],
        "no current": lambda one, two: [one, two],
        "two current": lambda one, two: [current(one), current(two)],
        "one version twice": lambda one, _2: [current(one), swap(one, key_id=b"x" * 16)],
        "one id twice": lambda one, two: [current(one), swap(two, key_id=one.key_id)],
        "version exchanged": lambda one, _2: [current(swap(one, version=2))],
        "version 0": lambda one, _2: [current(swap(one, version=0))],
        "bytes exchanged": lambda one, two: [current(swap(one, wrapped=two.wrapped))],
        "cut": lambda one, _2: [current(swap(one, wrapped=one.wrapped[:-1]))],
        "longer": lambda one, _2: [current(swap(one, wrapped=one.wrapped + b"\0"))],
        "empty": lambda one, _2: [current(swap(one, wrapped=b""))],
        "bit in the tag": lambda one, _2: [current(swap(one, wrapped=one.wrapped[:-1] + bytes([one.wrapped[-1] ^ 1])))],
        "bit in the commitment": lambda one, _2: [
            current(swap(one, wrapped=one.wrapped[:62] + bytes([one.wrapped[62] ^ 1]) + one.wrapped[63:]))
        ],
        "second one bad": lambda one, two: [current(one), swap(two, wrapped=one.wrapped)],
    }


@pytest.mark.parametrize("change", _sets().values(), ids=_sets())
def test_a_bad_set_of_master_keys_changes_nothing(change: KeySetChange) -> None:
    """All are loaded or none: after the refusal the old ones still work."""
    it, again = vault(), bytearray(32)
    key = bytearray(32)
    it.load([current(it.create_master_key(7))])
    wrapped = it.create_data_key(CONTEXT, key).wrapped

    with pytest.raises(Corrupt) as caught:
        it.load(change(it.create_master_key(1), it.create_master_key(2)))
    it.open_data_key(wrapped, CONTEXT, again)

    assert caught.value.reason == "ENVELOPE_CORRUPT"
    assert again == key
    assert it.versions == (7,)


@pytest.mark.parametrize(
    "other", [vault(cluster="cluster-2"), vault(SoftRoot(key=b"s" * 32)), vault(SoftRoot(key_id=b"i" * 16))]
)
def test_a_master_key_of_another_cluster_or_root_does_not_load(other: Vault) -> None:
    """Another cluster's name, another root key, another root key's id."""
    with pytest.raises(Corrupt):
        vault().load([current(other.create_master_key(1))])


def test_a_root_key_that_answers_with_something_else_is_found_out() -> None:
    """The HSM says ok and delivers another key's octets: the commitment does not fit, nothing is loaded."""
    root = SoftRoot()
    it = vault(root)
    wrapped = it.create_master_key(1)
    root.answer_with = b"another key, of the same length!"

    with pytest.raises(Corrupt):
        it.load([current(wrapped)])


def test_a_new_master_key_is_proven_to_open_before_it_is_given_out() -> None:
    """An HSM that cannot open what it just wrapped is sick, and no record of that is stored."""
    root = SoftRoot()
    root.answer_with = bytes(32)

    with pytest.raises(HsmFault):
        vault(root).create_master_key(1)


def test_a_new_master_key_is_not_loaded() -> None:
    """The gateway stores it first: a key that is used and then lost would lose tokens."""
    it = vault()

    it.create_master_key(1)

    assert it.versions == ()


def test_replaced_master_keys_are_wiped() -> None:
    """Buffers of keys that are no longer loaded are closed, which wipes them."""
    it = loaded()
    assert it._current is not None
    old = it._current.buffer
    it.load([current(it.create_master_key(2))])

    with pytest.raises(ValueError, match="closed"):
        _ = old.view


def test_data_key_ids_differ_by_context_and_not_by_where_texts_are_cut() -> None:
    """The id names the data key of one consent; it says nothing about the key."""
    contexts = [
        CONTEXT,
        replace(CONTEXT, owner="owner-2"),
        replace(CONTEXT, consent="consent-2"),
        replace(CONTEXT, row_version=2),
        replace(CONTEXT, owner="owner-1c", consent="onsent-1"),
    ]

    assert len({data_key_id(context) for context in contexts}) == len(contexts)
    assert all(len(data_key_id(context)) == 16 for context in contexts)
