"""Signs the log's checkpoints with the audit key in the HSM."""

import hashlib

from sidecar.audit.checkpoint import assemble_note, der_from_p1363
from sidecar.domain.provider import KeyPurpose
from sidecar.ports import Hsm

__all__ = ["HsmCheckpointSigner"]


class HsmCheckpointSigner:
    """Implements `ports.CheckpointSigner`. The key's name in the note is the log's origin, the body's first line."""

    def __init__(self, *, hsm: Hsm) -> None:
        self._hsm = hsm

    async def sign_checkpoint(self, body: bytes) -> str:
        key = await self._hsm.public_key(KeyPurpose.AUDIT)
        signature = await self._hsm.sign(KeyPurpose.AUDIT, hashlib.sha256(body).digest())
        origin = body.partition(b"\n")[0].decode("ascii")
        return assemble_note(body, origin, key.spki_der, der_from_p1363(signature))
