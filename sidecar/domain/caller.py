"""Who calls, and what the policy file lets them do. An empty policy permits nothing; there are no patterns."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from sidecar.domain.consent import Purpose
from sidecar.domain.ids import OwnerId, ProviderId, WorkloadId
from sidecar.domain.limits import CALENDAR_ANCHOR, PeriodicLimit, Reservation
from sidecar.domain.money import Money
from sidecar.errors import Refused

__all__ = ["Caller", "Policy", "Role", "WorkloadPolicy"]


class Role(StrEnum):
    APPLICATION = "application"
    ADMINISTRATOR = "administrator"
    AUDITOR = "auditor"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadPolicy:
    """`owners` None means every owner (said as `any` in the file); an empty set means none."""

    workload: WorkloadId
    roles: frozenset[Role]
    purposes: frozenset[Purpose] = frozenset()
    providers: frozenset[ProviderId] = frozenset()
    owners: frozenset[OwnerId] | None = frozenset()
    payment_limits: Mapping[str, Money] = field(
        default_factory=dict
    )  # the largest single payment; none for a missing currency
    periodic_limits: tuple[PeriodicLimit, ...] = ()  # of all its payments together; aligned to the calendar
    imports: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A caller whose identity was established by the transport, with what the policy says of it."""

    workload: WorkloadId
    policy: WorkloadPolicy

    @property
    def roles(self) -> frozenset[Role]:
        return self.policy.roles

    @property
    def is_administrator(self) -> bool:
        return Role.ADMINISTRATOR in self.policy.roles

    def acting_as(self, roles: frozenset[Role]) -> "Caller":
        """This caller with only those of its roles that count where it calls."""
        return replace(self, policy=replace(self.policy, roles=self.policy.roles & roles))

    def check_import(self) -> None:
        if not self.policy.imports:
            raise _refused()

    def check_provider(self, provider: ProviderId) -> None:
        if not self.may_use(provider):
            raise _refused()

    def check_purposes(self, purposes: frozenset[Purpose]) -> None:
        if not purposes <= self.policy.purposes:
            raise _refused()

    def check_owner(self, owner: OwnerId) -> None:
        if self.policy.owners is not None and owner not in self.policy.owners:
            raise Refused("OWNER_MISMATCH", "the policy does not let this workload act for this owner")

    def may_use(self, provider: ProviderId) -> bool:
        return provider in self.policy.providers

    def check_amount(self, amount: Money) -> None:
        limit = self.policy.payment_limits.get(amount.currency_code)
        if limit is None or amount.minor_units > limit.minor_units:
            raise Refused("LIMIT_EXCEEDED", "the policy does not allow this workload a payment of this amount")

    def reservations(self, amount: Money, moment: datetime) -> tuple[Reservation, ...]:
        """What a payment of `amount` at `moment` takes of this workload's periodic limits."""
        scope = f"caller:{self.workload}"
        limits = [limit for limit in self.policy.periodic_limits if limit.amount.currency_code == amount.currency_code]
        return tuple(limit.reservation(amount, moment, scope=scope, since=CALENDAR_ANCHOR) for limit in limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    workloads: Mapping[WorkloadId, WorkloadPolicy]

    def caller(self, workload: WorkloadId) -> Caller | None:
        policy = self.workloads.get(workload)
        return Caller(workload=workload, policy=policy) if policy else None


def _refused() -> Refused:
    return Refused("POLICY_REFUSED", "the policy does not allow this workload to do this; ask an operator")
