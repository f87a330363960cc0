"""Rendered requests as they are kept: the exact bytes of a payment, so that a repeat under the same key is the same request."""

import msgspec

from sidecar.domain.provider import ProviderRequest
from sidecar.errors import Corrupt

__all__ = ["decode_request", "encode_request"]


def encode_request(request: ProviderRequest) -> bytes:
    return msgspec.msgpack.encode(request)


def decode_request(data: bytes) -> ProviderRequest:
    try:
        return msgspec.msgpack.decode(data, type=ProviderRequest)
    except msgspec.DecodeError as error:
        raise Corrupt("ENVELOPE_CORRUPT", "a stored request cannot be read") from error
