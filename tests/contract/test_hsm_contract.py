"""The contract of the `Hsm` port, on the fake and on the real process with SoftHSM."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from sidecar.domain.provider import KeyPurpose
from sidecar.errors import Internal, Refused, Unavailable
from sidecar.gateway.links import Connection, HsmLink
from sidecar.ipc.messages import GatewayToHsmFrame, HsmToGatewayFrame
from sidecar.ports import Hsm, PublicKey
from tests.fakes.hsm import FakeHsm
from tests.fakes.token import ProvisionedToken, RawHsm

DIGEST = hashlib.sha256(b"what is signed").digest()
SIGNING: list[KeyPurpose] = [purpose for purpose in KeyPurpose if purpose is not KeyPurpose.ROOT]


class Subject:
    """An Hsm and how to take it away."""

    def __init__(self, hsm: Hsm, take_away: Callable[[], None]) -> None:
        self.hsm = hsm
        self.take_away = take_away


NewSubject = Callable[[], AbstractAsyncContextManager[Subject]]


@asynccontextmanager
async def fake_subject() -> AsyncIterator[Subject]:
    fake = FakeHsm()

    def take_away() -> None:
        fake.available = False

    yield Subject(fake, take_away)


@asynccontextmanager
async def real_subject(token: ProvisionedToken) -> AsyncIterator[Subject]:
    with RawHsm(token.settings(), token.environment) as raw:
        connection = await Connection.over(
            raw.gateway.dup(), request_type=GatewayToHsmFrame, answer_type=HsmToGatewayFrame
        )
        raw.gateway.close()
        link = HsmLink()
        link.attach(connection)
        try:
            yield Subject(link, raw.process.kill)
        finally:
            connection.close()


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> ProvisionedToken:
    directory: Path = tmp_path_factory.mktemp("contract")
    return ProvisionedToken.make(directory)


@pytest.fixture(params=["fake", "real"])
def subject(request: pytest.FixtureRequest) -> Iterator[NewSubject]:
    if request.param == "fake":
        yield fake_subject
    else:
        token = request.getfixturevalue("token")
        yield lambda: real_subject(token)


def verifies(key: PublicKey, signature: bytes, digest: bytes) -> bool:
    public = load_der_public_key(key.spki_der)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    encoded = utils.encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
    try:
        public.verify(encoded, digest, ec.ECDSA(utils.Prehashed(SHA256())))
    except InvalidSignature:
        return False
    return True


@pytest.mark.parametrize("purpose", SIGNING)
def test_a_signature_verifies_under_the_public_key_of_its_purpose_only(
    subject: NewSubject, purpose: KeyPurpose
) -> None:
    """`sign` gives r || s over the digest, under exactly the key that `public_key` names."""

    async def check() -> None:
        async with subject() as it:
            signature = await it.hsm.sign(purpose, DIGEST)
            keys = {other: await it.hsm.public_key(other) for other in SIGNING}

        assert len(signature) == 64
        assert [other for other in SIGNING if verifies(keys[other], signature, DIGEST)] == [purpose]
        assert not verifies(keys[purpose], signature, hashlib.sha256(b"something else").digest())

    asyncio.run(check())


def test_a_public_key_is_named_by_its_hash(subject: NewSubject) -> None:
    """`key_id` is the first 16 hexadecimal digits of SHA-256 over the SPKI, and stays the same."""

    async def check() -> None:
        async with subject() as it:
            key = await it.hsm.public_key(KeyPurpose.AUDIT)
            again = await it.hsm.public_key(KeyPurpose.AUDIT)

        assert key.key_id == hashlib.sha256(key.spki_der).hexdigest()[:16]
        assert (key.purpose, key.algorithm) == (KeyPurpose.AUDIT, "ES256")
        assert key == again

    asyncio.run(check())


def test_the_root_key_neither_signs_nor_has_a_public_key(subject: NewSubject) -> None:
    """The root key wraps and does nothing else."""

    async def check() -> None:
        async with subject() as it:
            with pytest.raises(Refused):
                await it.hsm.sign(KeyPurpose.ROOT, DIGEST)
            with pytest.raises(Refused):
                await it.hsm.public_key(KeyPurpose.ROOT)

    asyncio.run(check())


@pytest.mark.parametrize("length", [0, 20, 31, 33, 64])
def test_a_digest_of_another_length_is_refused(subject: NewSubject, length: int) -> None:
    """Only SHA-256 digests are signed: nothing is hashed, cut or padded on the way."""

    async def check() -> None:
        async with subject() as it:
            with pytest.raises(Internal):
                await it.hsm.sign(KeyPurpose.AUDIT, bytes(length))

    asyncio.run(check())


def test_many_signatures_at_once_each_fit_their_digest(subject: NewSubject) -> None:
    """Answers are paired with their questions, however many are under way."""

    async def check() -> None:
        digests = [hashlib.sha256(str(number).encode()).digest() for number in range(100)]
        async with subject() as it:
            key = await it.hsm.public_key(KeyPurpose.REQUEST_SIGNING)
            signatures = await asyncio.gather(*(it.hsm.sign(KeyPurpose.REQUEST_SIGNING, digest) for digest in digests))

        assert all(verifies(key, signature, digest) for signature, digest in zip(signatures, digests, strict=True))

    asyncio.run(check())


def test_an_hsm_that_is_away_is_unavailable(subject: NewSubject) -> None:
    """No HSM, no signature: the caller is told to try again with the same request id, and never gets something else."""

    async def check() -> None:
        async with subject() as it:
            await it.hsm.sign(KeyPurpose.AUDIT, DIGEST)
            it.take_away()
            with pytest.raises(Unavailable) as caught:
                await it.hsm.sign(KeyPurpose.AUDIT, DIGEST)

        assert caught.value.reason == "HSM_UNAVAILABLE"

    asyncio.run(check())
