"""Egress with its calls counted: by provider and by what came of them. Adds nothing else and keeps nothing back."""

import time
from collections.abc import Mapping, Sequence

from sidecar.domain.payment import DispatchPermit
from sidecar.domain.provider import (
    Answer,
    NotSent,
    ProviderRequest,
    SendOutcome,
    TokenGrant,
    TokenOutcome,
    TokensRefused,
    Unknown,
)
from sidecar.domain.secrets import SecretContext
from sidecar.ports import ImportedTokens, ImportKey, NewSecrets, OpenSecret, Prepared, TokenEgress
from sidecar.telemetry.metrics import Metrics

__all__ = ["MeteredEgress"]


class MeteredEgress:
    """Implements `ports.TokenEgress` around another one. `providers` maps each origin to the provider it belongs to."""

    def __init__(self, *, egress: TokenEgress, metrics: Metrics, providers: Mapping[str, str]) -> None:
        self._egress = egress
        self._metrics = metrics
        self._providers = providers
        self._prepared: dict[int, str] = {}

    async def call(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes = b"",
        secrets: Sequence[OpenSecret] = (),
        deadline_seconds: float,
    ) -> SendOutcome:
        began = time.monotonic()
        outcome = await self._egress.call(
            request, wrapped_data_key=wrapped_data_key, secrets=secrets, deadline_seconds=deadline_seconds
        )
        self._note(self._provider(request), outcome, began)
        return outcome

    async def call_once(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes = b"",
        secrets: Sequence[OpenSecret] = (),
        deadline_seconds: float,
    ) -> SendOutcome:
        began = time.monotonic()
        outcome = await self._egress.call_once(
            request, wrapped_data_key=wrapped_data_key, secrets=secrets, deadline_seconds=deadline_seconds
        )
        self._note(self._provider(request), outcome, began)
        return outcome

    async def request_tokens(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes,
        secrets: Sequence[OpenSecret],
        seal_access_as: SecretContext,
        seal_refresh_as: SecretContext,
        deadline_seconds: float,
    ) -> TokenOutcome:
        began = time.monotonic()
        outcome = await self._egress.request_tokens(
            request,
            wrapped_data_key=wrapped_data_key,
            secrets=secrets,
            seal_access_as=seal_access_as,
            seal_refresh_as=seal_refresh_as,
            deadline_seconds=deadline_seconds,
        )
        self._note(self._provider(request), outcome, began)
        return outcome

    async def prepare(
        self,
        request: ProviderRequest,
        *,
        wrapped_data_key: bytes,
        secrets: Sequence[OpenSecret],
        deadline_seconds: float,
    ) -> Prepared:
        prepared = await self._egress.prepare(
            request, wrapped_data_key=wrapped_data_key, secrets=secrets, deadline_seconds=deadline_seconds
        )
        self._prepared[prepared.handle] = self._provider(request)
        return prepared

    async def send(self, prepared: Prepared, permit: DispatchPermit, *, deadline_seconds: float) -> SendOutcome:
        began = time.monotonic()
        provider = self._prepared.pop(prepared.handle, "unknown")
        outcome = await self._egress.send(prepared, permit, deadline_seconds=deadline_seconds)
        self._note(provider, outcome, began)
        return outcome

    async def discard(self, prepared: Prepared) -> None:
        self._prepared.pop(prepared.handle, None)
        await self._egress.discard(prepared)

    async def new_secrets(self, context: SecretContext) -> NewSecrets:
        return await self._egress.new_secrets(context)

    async def import_key(self) -> ImportKey:
        return await self._egress.import_key()

    async def import_tokens(
        self,
        *,
        key_id: str,
        sealed_tokens: bytes,
        info: bytes,
        seal_access_as: SecretContext,
        seal_refresh_as: SecretContext,
    ) -> ImportedTokens:
        return await self._egress.import_tokens(
            key_id=key_id,
            sealed_tokens=sealed_tokens,
            info=info,
            seal_access_as=seal_access_as,
            seal_refresh_as=seal_refresh_as,
        )

    async def forget(self, wrapped_data_key: bytes) -> None:
        await self._egress.forget(wrapped_data_key)

    def _provider(self, request: ProviderRequest) -> str:
        return self._providers.get(request.origin, "unknown")

    def _note(self, provider: str, outcome: SendOutcome | TokenOutcome, began: float) -> None:
        self._metrics.egress_calls.labels(provider, _name(outcome)).inc()
        self._metrics.egress_seconds.labels(provider).observe(time.monotonic() - began)


def _name(outcome: SendOutcome | TokenOutcome) -> str:
    match outcome:
        case Answer():
            return f"{outcome.status // 100}xx"
        case TokenGrant():
            return "granted"
        case TokensRefused():
            return "refused"
        case NotSent():
            return "not_sent"
        case Unknown():
            return "unknown"
