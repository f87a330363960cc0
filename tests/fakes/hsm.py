"""An HSM in software: the `Hsm` port with keys in memory. Passes tests/contract/test_hsm_contract.py."""

import hashlib

from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sidecar.domain.provider import KeyPurpose
from sidecar.errors import Internal, Refused, Unavailable
from sidecar.ports import PublicKey

__all__ = ["FakeHsm"]


class FakeHsm:
    """Has a key for each purpose of `purposes`. While `available` is False it answers as an HSM that is away.

    `signed` lists what was signed, in order.
    """

    def __init__(self, *, purposes: frozenset[KeyPurpose] | None = None) -> None:
        wanted = frozenset(KeyPurpose) if purposes is None else purposes
        self._keys: dict[KeyPurpose, ec.EllipticCurvePrivateKey] = {
            purpose: ec.generate_private_key(ec.SECP256R1()) for purpose in wanted if purpose is not KeyPurpose.ROOT
        }
        self.available = True
        self.signed: list[tuple[KeyPurpose, bytes]] = []

    async def sign(self, purpose: KeyPurpose, digest: bytes) -> bytes:
        if len(digest) != 32:
            raise Internal("a digest has 32 bytes")
        key = self._key(purpose)
        r, s = utils.decode_dss_signature(key.sign(digest, ec.ECDSA(utils.Prehashed(SHA256()))))
        self.signed.append((purpose, digest))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    async def public_key(self, purpose: KeyPurpose) -> PublicKey:
        spki_der = self._key(purpose).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        key_id = hashlib.sha256(spki_der).hexdigest()[:16]
        return PublicKey(purpose=purpose, key_id=key_id, algorithm="ES256", spki_der=spki_der)

    def _key(self, purpose: KeyPurpose) -> ec.EllipticCurvePrivateKey:
        if not self.available:
            raise Unavailable("HSM_UNAVAILABLE", "the HSM did not answer in time; try again with the same request id")
        try:
            return self._keys[purpose]
        except KeyError:
            raise Refused("METHOD_NOT_ALLOWED", "there is no signing key for this purpose") from None
