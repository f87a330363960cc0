"""ProviderService: what each configured provider can do, for callers whose policy allows it."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import grpc
from custody.v1 import provider_pb2 as pb
from custody.v1 import provider_pb2_grpc
from google.protobuf.duration_pb2 import Duration

from sidecar.connectors.base import Connector
from sidecar.domain.caller import Caller
from sidecar.domain.ids import ProviderId, parse_name, resource_name
from sidecar.errors import NotFound
from sidecar.gateway.boundary import current_caller
from sidecar.gateway.servicers.paging import after_of, page_of, page_size
from sidecar.gateway.servicers.values import PRODUCT_NUMBERS, PURPOSE_NUMBERS

__all__ = ["ProviderServicer"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ProviderServicer(provider_pb2_grpc.ProviderServiceServicer):
    def __init__(self, *, connectors: Mapping[ProviderId, Connector]) -> None:
        self._connectors = connectors

    async def ListProviders(self, request: pb.ListProvidersRequest, context: Context) -> pb.ListProvidersResponse:
        caller, limit = current_caller(), page_size(request.page_size)
        after = after_of(request.page_token, "providers")
        visible = [provider for provider in sorted(self._connectors) if provider > after and _may_see(caller, provider)]
        page, token = page_of(visible, limit, "providers", str)
        providers = [_message(provider, self._connectors[provider]) for provider in page]
        return pb.ListProvidersResponse(providers=providers, next_page_token=token)

    async def GetProvider(self, request: pb.GetProviderRequest, context: Context) -> pb.GetProviderResponse:
        provider = ProviderId(parse_name(request.provider, collection="providers", field="provider"))
        if provider not in self._connectors or not _may_see(current_caller(), provider):
            raise NotFound("PROVIDER_NOT_FOUND", "there is no such provider for this caller")
        return pb.GetProviderResponse(provider=_message(provider, self._connectors[provider]))


def _may_see(caller: Caller, provider: ProviderId) -> bool:
    return caller.is_administrator or provider in caller.policy.providers


def _message(provider: ProviderId, connector: Connector) -> pb.Provider:
    descriptor = connector.descriptor
    return pb.Provider(
        name=resource_name("providers", provider),
        display_name=descriptor.display_name,
        standard=f"{descriptor.standard.family} {descriptor.standard.version}",
        region_code=descriptor.region_code,
        purposes=sorted(PURPOSE_NUMBERS[purpose] for purpose in descriptor.purposes),
        payment_products=sorted(PRODUCT_NUMBERS[product] for product in descriptor.payments.products),
        redirect_uris=descriptor.oauth.redirect_uris,
        max_consent_duration=Duration(seconds=180 * 86_400),
    )
