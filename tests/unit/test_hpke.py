"""HPKE opening: the published vector of exactly our suite, and both directions against `cryptography`."""

from typing import cast

import pytest
from cryptography.hazmat.primitives import hpke as reference
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar import hpke
from sidecar.secretbuffer import SecretBuffer

SUITE = reference.Suite(reference.KEM.X25519, reference.KDF.HKDF_SHA256, reference.AEAD.AES_256_GCM)
KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))
TOKEN = b"a token that nobody may see"
UNTOUCHED = 0xAA

# RFC 9180's test vectors (cfrg/draft-irtf-cfrg-hpke, test-vectors.json at 5f503c564da00b0687b3de75f1dfbdfc4079ad31):
# mode 0, KEM 0x0020, KDF 0x0001, AEAD 0x0002, first encryption. The RFC's own appendix prints other suites only.
VECTOR = {
    "skRm": "497b4502664cfea5d5af0b39934dac72242a74f8480451e1aee7d6a53320333d",
    "pkRm": "430f4b9859665145a6b1ba274024487bd66f03a2dd577d7753c68d7d7d00c00c",
    "enc": "6c93e09869df3402d7bf231bf540fadd35cd56be14f97178f0954db94b7fc256",
    "info": "4f6465206f6e2061204772656369616e2055726e",
    "aad": "436f756e742d30",
    "pt": "4265617574792069732074727574682c20747275746820626561757479",
    "ct": "e5d84cd531cfb583096e7cfa9641bd3079cf3a91cda813c52deb5f512be9931980a41de125a925cdad859d5b7a",
}


def open_message(
    message: bytes,
    *,
    key: X25519PrivateKey = KEY,
    info: bytes = b"info",
    aad: bytes = b"",
    buffer: bytearray | None = None,
) -> bytes:
    """Open, and show that a refusal leaves only zeros in the buffer."""
    buffer = bytearray([UNTOUCHED]) * (len(message) + 1) if buffer is None else buffer
    try:
        length = hpke.open_into(
            private_key=key, enc_and_ciphertext=message, info=info, aad=aad, buffer=memoryview(buffer)
        )
    except (hpke.HpkeRefused, ValueError):
        assert not any(buffer)
        raise
    assert buffer[length:] == bytes([UNTOUCHED]) * (len(buffer) - length)
    return bytes(buffer[:length])


def test_published_vector() -> None:
    """The vector published with RFC 9180 for our suite opens, with its info and associated data."""
    raw = {name: bytes.fromhex(value) for name, value in VECTOR.items()}
    key = X25519PrivateKey.from_private_bytes(raw["skRm"])

    opened = open_message(raw["enc"] + raw["ct"], key=key, info=raw["info"], aad=raw["aad"])

    assert key.public_key().public_bytes_raw() == raw["pkRm"]
    assert opened == raw["pt"]


@pytest.mark.parametrize("part", ["enc", "ct", "info", "aad", "skRm"])
def test_published_vector_with_one_bit_changed(part: str) -> None:
    """Each of the five inputs decides: with one bit changed the vector is refused."""
    raw = {name: bytearray.fromhex(value) for name, value in VECTOR.items()}
    raw[part][1] ^= 0x10
    key = X25519PrivateKey.from_private_bytes(raw["skRm"])

    with pytest.raises(hpke.HpkeRefused):
        open_message(bytes(raw["enc"] + raw["ct"]), key=key, info=bytes(raw["info"]), aad=bytes(raw["aad"]))


@settings(deadline=None, max_examples=100)
@given(private=st.binary(min_size=32, max_size=32), info=st.binary(max_size=100), plaintext=st.binary(max_size=300))
def test_opens_what_cryptography_seals(private: bytes, info: bytes, plaintext: bytes) -> None:
    """A client that seals with `cryptography` is understood, for every key, info and length, the empty one included."""
    key = X25519PrivateKey.from_private_bytes(private)

    message = SUITE.encrypt(plaintext, key.public_key(), info)

    assert open_message(message, key=key, info=info) == plaintext
    assert len(message) == len(plaintext) + hpke.OVERHEAD_BYTES


def test_every_flipped_bit_is_refused() -> None:
    """Whichever bit of encapsulated key, ciphertext or tag is flipped, the message is refused.

    X25519 masks the highest bit of a public key (RFC 7748, section 5), yet HPKE binds the bytes as sent: refused too.
    """
    message = SUITE.encrypt(TOKEN, KEY.public_key(), b"info")

    for bit in range(8 * len(message)):
        flipped = bytearray(message)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(hpke.HpkeRefused):
            open_message(bytes(flipped))


def test_every_truncation_is_refused() -> None:
    """A message cut anywhere, or extended, is refused."""
    message = SUITE.encrypt(TOKEN, KEY.public_key(), b"info")

    for wrong in (*(message[:length] for length in range(len(message))), message + b"\x00"):
        with pytest.raises(hpke.HpkeRefused):
            open_message(wrong)


@pytest.mark.parametrize(
    "point",
    [
        bytes(32),
        (1).to_bytes(32, "little"),
        (2**255 - 20).to_bytes(32, "little"),
        (2**255 - 19).to_bytes(32, "little"),
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    ],
)
def test_points_of_small_order_are_refused(point: bytes) -> None:
    """A public key that makes the shared secret zero for every private key is refused (RFC 9180, section 7.1.4)."""
    with pytest.raises(hpke.HpkeRefused) as refusal:
        open_message(point + bytes(40))

    assert str(refusal.value) == "the encrypted message cannot be opened"


def test_buffer_too_small() -> None:
    """A buffer that cannot hold the plaintext is a ValueError and comes back wiped."""
    message = SUITE.encrypt(TOKEN, KEY.public_key(), b"info")

    with pytest.raises(ValueError, match="smaller"):
        open_message(message, buffer=bytearray([UNTOUCHED]) * (len(TOKEN) - 1))


def test_shared_secret_is_wiped() -> None:
    """The `bytes` that the key agreement returns is zero after opening."""
    returned: list[bytes] = []

    class Watched:
        """The private key, keeping what it gave away."""

        def exchange(self, peer: X25519PublicKey) -> bytes:
            returned.append(KEY.exchange(peer))
            assert any(returned[-1])
            return returned[-1]

        def public_key(self) -> X25519PublicKey:
            return KEY.public_key()

    message = SUITE.encrypt(TOKEN, KEY.public_key(), b"info")

    assert open_message(message, key=cast(X25519PrivateKey, Watched())) == TOKEN
    assert returned == [bytes(32)]


def test_opens_into_a_secret_buffer() -> None:
    """The plaintext goes straight into the locked buffer of the caller."""
    message = SUITE.encrypt(TOKEN, KEY.public_key(), b"info")

    with SecretBuffer(100) as buffer:
        length = hpke.open_into(private_key=KEY, enc_and_ciphertext=message, info=b"info", aad=b"", buffer=buffer.view)
        assert buffer.view[:length] == TOKEN
