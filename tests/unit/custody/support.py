"""One sidecar's core over fakes, and the calls that tests make of it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import msgspec

from sidecar.audit.entry import AuditEntry
from sidecar.config import load_yaml
from sidecar.connectors.base import Connector
from sidecar.connectors.berlin_group import BerlinGroupConnector
from sidecar.connectors.descriptor import Descriptor, Rotation, parse_descriptor
from sidecar.connectors.oauth import OAuthClient
from sidecar.custody.accounts import Accounts
from sidecar.custody.consents import Consents, CreateConsent, Redirect
from sidecar.custody.owned_tasks import OwnedTasks
from sidecar.custody.payments import InitiatePayment, Payments
from sidecar.custody.reconcile import Reconciler
from sidecar.custody.refresh import Refresher
from sidecar.custody.signing import Signing
from sidecar.custody.tokens import RefreshEnd, Tokens
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.caller import Caller, Role, WorkloadPolicy
from sidecar.domain.consent import AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import OwnerId, ProviderId, RequestId, WorkloadId, new_consent_id
from sidecar.domain.money import Money
from sidecar.domain.payment import DispatchPermit, Payment, PaymentProduct
from sidecar.domain.provider import KeyPurpose, ProviderRequest, SendOutcome, TokenOutcome
from sidecar.domain.rotation import RotationKind, refresh_time
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.ports import Claim, OpenSecret, Prepared, SecretsChange
from tests.fakes.bank import API, IBAN, TOKENS, ScriptedBank, variables
from tests.fakes.clock import FakeClock
from tests.fakes.egress import FakeEgress, SoftwareKeys
from tests.fakes.hsm import FakeHsm
from tests.fakes.store import FakeStore, SoftwareSigner

CLUSTER = "test-cluster"
PROVIDER = ProviderId("sandbox-bank")
OWNER = OwnerId("owner-1")
SHOP = WorkloadId("workload:shop")
REDIRECT_URI = "https://app.example/callback"
CREDITOR = "DE02120300000000202051"
Row = TypeVar("Row", Consent, Payment)
Gate = Callable[[], Awaitable[None]]

SIGNER = SoftwareSigner(seed=7)  # making a key costs more than a test


def descriptor(name: str = "sandbox-bank", **variable: str) -> Descriptor:
    with resources.as_file(resources.files("sidecar.connectors.catalog").joinpath(f"{name}.yaml")) as path:
        return parse_descriptor(load_yaml(Path(path)), {**variables(), **variable})


def connector(name: str = "sandbox-bank") -> BerlinGroupConnector:
    described = descriptor(name)
    return BerlinGroupConnector(
        descriptor=described, oauth=OAuthClient(descriptor=described, key_id="client-key"), certificate=None
    )


def caller(name: WorkloadId = SHOP, **changes: Any) -> Caller:
    policy = WorkloadPolicy(
        workload=name,
        roles=frozenset({Role.APPLICATION}),
        purposes=frozenset(Purpose),
        providers=frozenset({PROVIDER}),
        owners=None,
        payment_limits={"EUR": Money(currency_code="EUR", minor_units=1_000_000)},
        imports=True,
    )
    return Caller(workload=name, policy=replace(policy, **changes))


ADMINISTRATOR = Caller(
    workload=WorkloadId("workload:admin"),
    policy=WorkloadPolicy(workload=WorkloadId("workload:admin"), roles=frozenset({Role.ADMINISTRATOR})),
)


class GatedEgress(FakeEgress):
    """Suspends where a real egress does; `gates` are awaited before the method of that name goes on.

    `trouble` holds errors that the next calls of a method raise, first in first out.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.gates: dict[str, Gate] = {}
        self.trouble: dict[str, list[Exception]] = {}
        self.deadlines: list[float] = []
        self.discarded = 0

    async def _pass(self, name: str) -> None:
        await asyncio.sleep(0)
        if name in self.gates:
            await self.gates[name]()
        if self.trouble.get(name):
            raise self.trouble[name].pop(0)

    async def prepare(self, request: ProviderRequest, **arguments: Any) -> Prepared:
        await self._pass("prepare")
        return await super().prepare(request, **arguments)

    async def send(self, prepared: Prepared, permit: DispatchPermit, *, deadline_seconds: float) -> SendOutcome:
        self.deadlines.append(deadline_seconds)
        await self._pass("send")
        return await super().send(prepared, permit, deadline_seconds=deadline_seconds)

    async def discard(self, prepared: Prepared) -> None:
        self.discarded += 1
        await self._pass("discard")
        await super().discard(prepared)

    async def request_tokens(self, request: ProviderRequest, **arguments: Any) -> TokenOutcome:
        await self._pass("request_tokens")
        return await super().request_tokens(request, **arguments)

    async def call(self, request: ProviderRequest, **arguments: Any) -> SendOutcome:
        await self._pass("call")
        return await super().call(request, **arguments)

    async def forget(self, wrapped_data_key: bytes) -> None:
        await self._pass("forget")


@dataclass(slots=True, kw_only=True)
class Core:
    """The services of one sidecar. A crash is a new one on the same store, clock, bank and keys."""

    store: FakeStore
    egress: GatedEgress
    hsm: FakeHsm
    clock: FakeClock
    connectors: dict[ProviderId, Connector]
    instance: str = "one"
    tasks: OwnedTasks = field(default_factory=OwnedTasks)
    tokens: Tokens = field(init=False)
    payments: Payments = field(init=False)
    consents: Consents = field(init=False)
    reconciler: Reconciler = field(init=False)
    refresher: Refresher = field(init=False)
    refreshes: list[RefreshEnd] = field(default_factory=list)
    accounts: Accounts = field(init=False)
    signing: Signing = field(init=False)

    def __post_init__(self) -> None:
        outside = {"store": self.store, "egress": self.egress, "hsm": self.hsm, "clock": self.clock}
        parts = {**outside, "connectors": self.connectors}
        self.tokens = Tokens(
            cluster=CLUSTER,
            instance=self.instance,
            tasks=self.tasks,
            observe=lambda _provider, end: self.refreshes.append(end),
            **parts,  # type: ignore[arg-type]
        )
        self.refresher = Refresher(
            store=self.store, clock=self.clock, connectors=self.connectors, tokens=self.tokens, tasks=self.tasks
        )
        self.payments = Payments(tokens=self.tokens, tasks=self.tasks, **parts)  # type: ignore[arg-type]
        self.consents = Consents(tokens=self.tokens, tasks=self.tasks, **parts)  # type: ignore[arg-type]
        self.reconciler = Reconciler(tokens=self.tokens, payments=self.payments, **parts)  # type: ignore[arg-type]
        self.accounts = Accounts(tokens=self.tokens, **parts)  # type: ignore[arg-type]
        self.signing = Signing(store=self.store, hsm=self.hsm, clock=self.clock)


class World:
    """A bank, a store, and the sidecar that is in service."""

    def __init__(
        self,
        *,
        name: str = "sandbox-bank",
        store: FakeStore | None = None,
        rotation: str = "strict",
        grace_seconds: float | None = None,
        **bank: Any,
    ) -> None:
        self.clock = FakeClock()
        window = 86_400.0 if name.endswith("idempotent") else None
        self.bank = ScriptedBank(
            clock=self.clock, window_seconds=window, rotation=rotation, grace_seconds=grace_seconds or 0.0, **bank
        )
        self.store = store or FakeStore(signer=SIGNER, clock=self.clock)
        self.keys = SoftwareKeys()
        self.hsm = FakeHsm(
            purposes=frozenset({KeyPurpose.CLIENT_AUTHENTICATION, KeyPurpose.DOCUMENT_SIGNING, KeyPurpose.AUDIT})
        )
        self.connector = connector(name)
        self.core = self.start()
        rules = Rotation(kind=RotationKind(rotation), seconds=grace_seconds)
        self.replace_connector(oauth=msgspec.structs.replace(self.connector.descriptor.oauth, rotation=rules))

    def start(self, instance: str = "one") -> Core:
        """A sidecar on this store. The one before it, if it was killed, is simply not used any more."""
        origins = {API: PROVIDER, TOKENS: PROVIDER}
        egress = GatedEgress(
            cluster=CLUSTER, origins=origins, bank=self.bank, keys=self.keys, boot_time_ns=self.clock.boot_time_ns
        )
        self.core = Core(
            store=self.store,
            egress=egress,
            hsm=self.hsm,
            clock=self.clock,
            connectors={PROVIDER: self.connector},
            instance=instance,
        )
        return self.core

    def replace_connector(self, **changes: Any) -> None:
        """The provider with another descriptor, as after a change of the configuration."""
        described = msgspec.structs.replace(self.connector.descriptor, **changes)
        self.connector = BerlinGroupConnector(
            descriptor=described, oauth=OAuthClient(descriptor=described, key_id="client-key"), certificate=None
        )
        self.core.connectors[PROVIDER] = self.connector

    # -- states to start from

    async def consent(self, *, life_seconds: float | None = None, refresh: bool = True, **changes: Any) -> Consent:
        """An active consent with tokens that the bank knows, as if it had been created and completed."""
        now = self.clock.now()
        consent = Consent(
            id=new_consent_id(now),
            caller=SHOP,
            owner=OWNER,
            provider=PROVIDER,
            purposes=frozenset(Purpose),
            accounts=(AccountReference(iban=IBAN, currency_code="EUR"),),
            state=ConsentState.CREATED,
            subject_key=b"s" * 16,
            redirect_uri=REDIRECT_URI,
            create_time=now,
            expire_time=now + timedelta(days=90),
            provider_consent_id="bank-consent-0",
        )
        consent = replace(consent, **changes)
        claim = Claim(
            caller=consent.caller,
            request_id=request_id(),
            method="CreateConsent",
            digest=b"d" * 32,
            resource=consent.id,
        )
        await self.store.claim_consent(consent, claim, draft(AuditEvent.CONSENT_CREATED))
        return await self._activated(consent, life_seconds or self.bank.token_seconds or 600, refresh=refresh)

    async def _activated(self, consent: Consent, life_seconds: float, *, refresh: bool) -> Consent:
        now = self.clock.now()
        context = SecretContext(
            cluster=CLUSTER, owner=consent.owner, consent=consent.id, provider_origin=API, row_version=1
        )
        made = await self.core.egress.new_secrets(replace(context, provider_origin=TOKENS))
        access, renewing = self.bank.mint()
        pair = [
            self.keys.seal(SecretKind.ACCESS_TOKEN, access.encode(), context, wrapped_data_key=made.wrapped_data_key)
        ]
        if refresh:
            at_tokens = replace(context, provider_origin=TOKENS)
            pair.append(
                self.keys.seal(
                    SecretKind.REFRESH_TOKEN, renewing.encode(), at_tokens, wrapped_data_key=made.wrapped_data_key
                )
            )
        active = consent.to(
            ConsentState.ACTIVE,
            wrapped_data_key=made.wrapped_data_key,
            activate_time=now,
            access_issue_time=now,
            access_expire_time=now + timedelta(seconds=life_seconds),
            refresh_time=(
                refresh_time(consent.id, issued=now, expires=now + timedelta(seconds=life_seconds)) if refresh else None
            ),
        )
        change = SecretsChange(put=tuple(secret.secret for secret in pair))
        await self.store.change_consent(active, secrets=change, audit=[draft(AuditEvent.CONSENT_ACTIVATED)])
        return active

    async def stored(self, thing: Row) -> Row:
        """The row as it stands now."""
        found = await (self.store.consent(thing.id) if isinstance(thing, Consent) else self.store.payment(thing.id))
        assert isinstance(found, type(thing))
        return found

    async def token(self, consent: Consent, kind: SecretKind = SecretKind.ACCESS_TOKEN) -> str:
        """The newest token of a consent, in the clear."""
        newest = (await self.store.secrets(consent.id)).newest(kind)
        assert newest is not None
        origin = API if kind is SecretKind.ACCESS_TOKEN else TOKENS
        context = SecretContext(
            cluster=CLUSTER,
            owner=consent.owner,
            consent=consent.id,
            provider_origin=origin,
            row_version=newest.row_version,
        )
        opened = self.keys.open(OpenSecret(secret=newest, context=context), wrapped_data_key=consent.wrapped_data_key)
        return opened.decode()

    def events(self) -> list[AuditEvent]:
        """What is on record, in order."""
        return [AuditEntry.decode(leaf.entry).draft.event for leaf in self.store._state.leaves]


def draft(event: AuditEvent) -> AuditDraft:
    return AuditDraft(event=event, outcome=AuditOutcome.SUCCEEDED)


def request_id() -> RequestId:
    return RequestId(str(uuid4()))


def payment_request(consent: Consent, **changes: Any) -> InitiatePayment:
    identifier = changes.pop("request_id", None) or request_id()
    request = InitiatePayment(
        consent=consent.id,
        owner=consent.owner,
        request_id=identifier,
        amount=Money(currency_code="EUR", minor_units=1250),
        creditor_account=AccountReference(iban=CREDITOR),
        creditor_name="Example Shop",
        product=PaymentProduct.SEPA_CREDIT_TRANSFER,
        end_to_end_id=str(identifier).replace("-", "")[:30],
    )
    return replace(request, **changes)


def create_request(world: World, **changes: Any) -> CreateConsent:
    request = CreateConsent(
        owner=OWNER,
        provider=PROVIDER,
        purposes=frozenset({Purpose.ACCOUNTS, Purpose.PAYMENTS}),
        accounts=(AccountReference(iban=IBAN),),
        expire_time=world.clock.now() + timedelta(days=30),
        redirect_uri=REDIRECT_URI,
        request_id=request_id(),
    )
    return replace(request, **changes)


def redirect(state: str, code: str = "code-1", **changes: str) -> Redirect:
    return Redirect(**{"state": state, "iss": variables()["issuer"], "code": code, **changes})
