"""ConsentService."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc
from custody.v1 import consent_pb2 as pb
from custody.v1 import consent_pb2_grpc

from sidecar.custody.consents import Consents, CreateConsent, ImportTokens, Redirect
from sidecar.domain.consent import AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, ProviderId, RequestId, parse_name
from sidecar.domain.money import Money
from sidecar.gateway.boundary import current_caller
from sidecar.gateway.servicers.paging import after_of, page_of, page_size
from sidecar.gateway.servicers.values import (
    PURPOSES,
    account_reference,
    consent_message,
    datetime_value,
    money_value,
    periodic_limits,
    psu_value,
)
from sidecar.ports import ConsentFilter

__all__ = ["ConsentServicer"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ConsentServicer(consent_pb2_grpc.ConsentServiceServicer):
    def __init__(self, *, consents: Consents) -> None:
        self._consents = consents

    async def CreateConsent(self, request: pb.CreateConsentRequest, context: Context) -> pb.CreateConsentResponse:
        consent = await self._consents.create(
            current_caller(),
            CreateConsent(
                owner=OwnerId(request.owner),
                provider=_provider(request.provider),
                purposes=_purposes(request.purposes),
                accounts=_accounts(request.accounts),
                expire_time=datetime_value(request.expire_time),
                redirect_uri=request.redirect_uri,
                psu=psu_value(request.psu_context, present=request.HasField("psu_context")),
                payment_limit=_limit(request),
                periodic_limits=periodic_limits(request.periodic_limits),
                request_id=RequestId(request.request_id),
            ),
        )
        return pb.CreateConsentResponse(consent=consent_message(consent), authorisation_uri=_uri(consent))

    async def CompleteConsent(self, request: pb.CompleteConsentRequest, context: Context) -> pb.CompleteConsentResponse:
        consent = await self._consents.complete(
            current_caller(),
            _consent(request.consent),
            OwnerId(request.owner),
            Redirect(state=request.state, iss=request.iss, code=request.code, error=request.error),
            RequestId(request.request_id),
        )
        return pb.CompleteConsentResponse(consent=consent_message(consent))

    async def GetImportKey(self, request: pb.GetImportKeyRequest, context: Context) -> pb.GetImportKeyResponse:
        key = await self._consents.import_key(current_caller())
        return pb.GetImportKeyResponse(
            import_key=pb.ImportKey(key_id=key.key_id, public_key=key.public_key, suite=IMPORT_SUITE)
        )

    async def ImportConsent(self, request: pb.ImportConsentRequest, context: Context) -> pb.ImportConsentResponse:
        provider = _provider(request.provider)
        consent = await self._consents.import_tokens(
            current_caller(),
            ImportTokens(
                owner=OwnerId(request.owner),
                provider=provider,
                purposes=_purposes(request.purposes),
                accounts=_accounts(request.accounts),
                expire_time=datetime_value(request.expire_time),
                access_expire_time=datetime_value(request.access_expire_time),
                provider_consent_id=request.provider_consent_id,
                import_key_id=request.import_key_id,
                sealed_tokens=request.sealed_tokens,
                info=import_info(request.owner, request.provider, request.request_id),
                payment_limit=_limit(request),
                periodic_limits=periodic_limits(request.periodic_limits),
                request_id=RequestId(request.request_id),
            ),
        )
        return pb.ImportConsentResponse(consent=consent_message(consent))

    async def GetConsent(self, request: pb.GetConsentRequest, context: Context) -> pb.GetConsentResponse:
        owner = OwnerId(request.owner) if request.owner else None
        consent = await self._consents.get(current_caller(), _consent(request.consent), owner)
        return pb.GetConsentResponse(consent=consent_message(consent))

    async def ListConsents(self, request: pb.ListConsentsRequest, context: Context) -> pb.ListConsentsResponse:
        limit = page_size(request.page_size)
        where = ConsentFilter(owner=OwnerId(request.owner) if request.owner else None)
        found = await self._consents.list(
            current_caller(), where, after=after_of(request.page_token, "consents"), limit=limit + 1
        )
        page, token = page_of(found, limit, "consents", lambda consent: consent.id)
        return pb.ListConsentsResponse(consents=[consent_message(consent) for consent in page], next_page_token=token)

    async def RevokeConsent(self, request: pb.RevokeConsentRequest, context: Context) -> pb.RevokeConsentResponse:
        owner = OwnerId(request.owner) if request.owner else None
        consent = await self._consents.revoke(
            current_caller(), _consent(request.consent), owner, RequestId(request.request_id)
        )
        return pb.RevokeConsentResponse(consent=consent_message(consent))


IMPORT_SUITE = "DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM"


def import_info(owner: str, provider: str, request_id: str) -> bytes:
    """HPKE's `info` of an import: four length-prefixed strings bind the ciphertext to this one request."""
    parts = ("custody/v1/import", owner, provider, request_id)
    return b"".join(len(data).to_bytes(4, "big") + data for data in (part.encode() for part in parts))


def _uri(consent: Consent) -> str:
    return consent.authorisation_uri if consent.state is ConsentState.AWAITING_AUTHORISATION else ""


def _consent(name: str) -> ConsentId:
    return ConsentId(parse_name(name, collection="consents", field="consent"))


def _provider(name: str) -> ProviderId:
    return ProviderId(parse_name(name, collection="providers", field="provider"))


def _purposes(numbers: Sequence[int]) -> frozenset[Purpose]:
    return frozenset(PURPOSES[number] for number in numbers)


def _accounts(messages: Sequence[Any]) -> tuple[AccountReference, ...]:
    return tuple(account_reference(message) for message in messages)


def _limit(request: pb.CreateConsentRequest | pb.ImportConsentRequest) -> Money | None:
    present = request.HasField("payment_limit")
    return money_value(request.payment_limit, field="payment_limit") if present else None
