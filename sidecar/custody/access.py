"""Which consent a call may touch. What a caller may not see looks like what does not exist."""

import hashlib
import hmac
from collections.abc import Awaitable, Mapping, Sequence
from typing import Protocol, TypeVar

from sidecar.connectors.base import Connector
from sidecar.domain.caller import Caller
from sidecar.domain.consent import Consent
from sidecar.domain.ids import ConsentId, OwnerId, ProviderId, WorkloadId
from sidecar.errors import Conflict, FieldViolation, InvalidField, NotFound
from sidecar.ports import Claim, Store

__all__ = ["check_same_request", "connector_for", "consent_for", "may_see", "permitted_page", "request_digest"]


class Listed(Protocol):
    """A row of a list: what policy and paging look at."""

    @property
    def id(self) -> str: ...

    @property
    def provider(self) -> ProviderId: ...


L = TypeVar("L", bound=Listed)
R = TypeVar("R", bound=Listed, covariant=True)


class Rows(Protocol[R]):
    """A list of the store: rows by ascending id, those after `after`, at most `limit`."""

    def __call__(self, *, after: str, limit: int) -> Awaitable[Sequence[R]]: ...


async def consent_for(store: Store, caller: Caller, consent_id: ConsentId, owner: OwnerId | None) -> Consent:
    """The consent, if `caller` made it, may use its provider and it is `owner`'s. Administrators see all and may leave the owner
    out.

    Raises NotFound, InvalidField (no owner named), Refused (an owner that the policy does not allow).
    """
    if owner is None and not caller.is_administrator:
        raise InvalidField(FieldViolation(field="owner", rule="required", description="must name the consent's owner"))
    if owner is not None and not caller.is_administrator:
        caller.check_owner(owner)
    consent = await store.consent(consent_id)
    if consent is None or not may_see(caller, consent.caller, consent.provider):
        raise NotFound("CONSENT_NOT_FOUND", "there is no such consent for this owner")
    if owner is not None:
        consent.check_owner(owner)
    return consent


def may_see(caller: Caller, maker: WorkloadId, provider: ProviderId) -> bool:
    return caller.is_administrator or (maker == caller.workload and caller.may_use(provider))


async def permitted_page(fetch: Rows[L], caller: Caller, *, after: str, limit: int) -> Sequence[L]:
    """The first `limit` rows after `after` of providers that `caller` may use; rows of others are as if they were not there."""
    found: list[L] = []
    while len(found) < limit:
        rows = await fetch(after=after, limit=limit)
        found += [row for row in rows if caller.is_administrator or caller.may_use(row.provider)]
        if len(rows) < limit:
            break
        after = rows[-1].id
    return found[:limit]


def connector_for(connectors: Mapping[ProviderId, Connector], provider: ProviderId) -> Connector:
    if provider not in connectors:
        raise NotFound("PROVIDER_NOT_FOUND", "there is no such provider")
    return connectors[provider]


def request_digest(*parts: str | bytes, key: bytes = b"") -> bytes:
    """HMAC-SHA-256 over the length-prefixed parts of a request: two requests have the same digest only if they are the same."""
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(4, "big") + data)
    return digest.digest()


def check_same_request(earlier: Claim, claim: Claim) -> None:
    """Raises Conflict unless both are the same call with the same body."""
    if earlier.method != claim.method or not hmac.compare_digest(earlier.digest, claim.digest):
        raise Conflict(
            "REQUEST_ID_REUSED",
            "this request id was used for another request; use a new one",
            metadata={"requestId": claim.request_id},
        )
