"""SigningService."""

from typing import Any, TypeAlias

import grpc
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key
from custody.v1 import signing_pb2 as pb
from custody.v1 import signing_pb2_grpc

from sidecar.custody.signing import PayloadKind, SignDocument, Signing
from sidecar.domain.ids import ConsentId, OwnerId, RequestId, parse_name, resource_name
from sidecar.errors import Internal
from sidecar.gateway.boundary import current_caller
from sidecar.ports import PublicKey

__all__ = ["SigningServicer"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_KINDS = {
    pb.PAYLOAD_KIND_JSON_DOCUMENT: PayloadKind.JSON_DOCUMENT,
    pb.PAYLOAD_KIND_XML_DOCUMENT: PayloadKind.XML_DOCUMENT,
    pb.PAYLOAD_KIND_TEXT_DOCUMENT: PayloadKind.TEXT_DOCUMENT,
}


class SigningServicer(signing_pb2_grpc.SigningServiceServicer):
    def __init__(self, *, signing: Signing) -> None:
        self._signing = signing

    async def Sign(self, request: pb.SignRequest, context: Context) -> pb.SignResponse:
        signature = await self._signing.sign(
            current_caller(),
            SignDocument(
                consent=ConsentId(parse_name(request.consent, collection="consents", field="consent")),
                owner=OwnerId(request.owner),
                request_id=RequestId(request.request_id),
                kind=_KINDS[request.payload_kind],
                payload=request.payload,
            ),
        )
        return pb.SignResponse(
            detached_jws=signature.detached_jws,
            key=resource_name("keys", signature.key_id),
            algorithm=signature.algorithm,
        )

    async def ListVerificationKeys(
        self, request: pb.ListVerificationKeysRequest, context: Context
    ) -> pb.ListVerificationKeysResponse:
        keys = await self._signing.verification_keys()
        return pb.ListVerificationKeysResponse(verification_keys=[_key_message(key) for key in keys])


def _key_message(key: PublicKey) -> pb.VerificationKey:
    """RFC 7517 and 7518: a P-256 key by its coordinates, 32 bytes each."""
    public_key = load_der_public_key(key.spki_der)
    if not isinstance(public_key, EllipticCurvePublicKey):
        raise Internal
    numbers = public_key.public_numbers()
    return pb.VerificationKey(
        name=resource_name("keys", key.key_id),
        key_id=key.key_id,
        key_type="EC",
        algorithm=key.algorithm,
        curve="P-256",
        x=numbers.x.to_bytes(32, "big"),
        y=numbers.y.to_bytes(32, "big"),
    )
