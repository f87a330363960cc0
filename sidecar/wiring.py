"""The composition root: everything is built, started, checked and stopped here, and nowhere else."""

import asyncio
import platform
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib import resources
from pathlib import Path

import msgspec
from cryptography.x509 import load_pem_x509_certificate
from prometheus_client import GCCollector, PlatformCollector, ProcessCollector

from sidecar import __version__
from sidecar.clock import SystemClock
from sidecar.config import (
    Configuration,
    ConfigurationError,
    Listener,
    PolicyFile,
    PolicyLimit,
    PolicyPeriodicLimit,
    ProviderConfiguration,
    load_policy,
    load_yaml,
)
from sidecar.connectors.base import Connector
from sidecar.connectors.berlin_group import BerlinGroupConnector
from sidecar.connectors.descriptor import Descriptor, DescriptorError, parse_descriptor
from sidecar.connectors.oauth import OAuthClient
from sidecar.connectors.signing import SigningCertificate
from sidecar.custody.accounts import Accounts
from sidecar.custody.checkpoints import HsmCheckpointSigner
from sidecar.custody.consents import Consents
from sidecar.custody.owned_tasks import OwnedTasks
from sidecar.custody.payments import Payments
from sidecar.custody.reconcile import Reconciler
from sidecar.custody.refresh import Refresher
from sidecar.custody.resolve import Resolver
from sidecar.custody.signing import Signing
from sidecar.custody.tokens import RefreshEnd, Tokens
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.caller import Policy, Role, WorkloadPolicy
from sidecar.domain.consent import ConsentState, Purpose
from sidecar.domain.ids import OwnerId, ProviderId, WorkloadId
from sidecar.domain.limits import PeriodicLimit, PeriodType
from sidecar.domain.money import Money, parse_amount
from sidecar.domain.payment import PaymentState
from sidecar.domain.provider import KeyPurpose
from sidecar.errors import CustodyError, StaleVersion
from sidecar.gateway.boundary import Boundary, Draining, Refusals
from sidecar.gateway.identity import BoundSocketIdentity, Identity, SpiffeIdentity
from sidecar.gateway.links import EgressLink, HsmLink
from sidecar.gateway.metered import MeteredEgress
from sidecar.gateway.ratelimit import RateLimiter
from sidecar.gateway.server import GrpcServers, Servicers
from sidecar.gateway.servicers.accounts import AccountServicer
from sidecar.gateway.servicers.audit import AuditServicer
from sidecar.gateway.servicers.consents import ConsentServicer
from sidecar.gateway.servicers.keys import KeyServicer, SidecarFacts
from sidecar.gateway.servicers.payments import PaymentServicer
from sidecar.gateway.servicers.providers import ProviderServicer
from sidecar.gateway.servicers.signing import SigningServicer
from sidecar.gateway.supervisor import ChildRefused, Supervisor
from sidecar.gateway.validation import RequestValidator
from sidecar.hardening import give_back_freed_memory
from sidecar.ipc.messages import EgressSettings, HsmSettings, KeyFile, ProviderTransport
from sidecar.ports import CheckpointSigner, MasterKeyRecord, Store, TokenEgress
from sidecar.store import SqliteStore, SqlStore
from sidecar.telemetry.logging import Log
from sidecar.telemetry.metrics import Metrics
from sidecar.telemetry.operations import OperationsServer

__all__ = ["Sidecar", "build_connectors", "build_policy"]


class Sidecar:
    """One sidecar: `run` serves until it is told to stop."""

    def __init__(self, *, configuration: Configuration, log: Log) -> None:
        self._configuration = configuration
        self._log = log
        self._clock = SystemClock()
        self._metrics = Metrics()
        self._tasks = OwnedTasks()
        self._draining = Draining()
        self._stop = asyncio.Event()
        self._started = False
        self._supervisor: Supervisor | None = None

    def stop(self) -> None:
        """Begins a graceful stop; `run` returns when it is done."""
        self._stop.set()

    async def run(self) -> None:
        """Serves. Raises ConfigurationError or CustodyError with one clear message when it cannot start, ChildRefused when a
        child process ends for good."""
        configuration = self._configuration
        policy = build_policy(load_policy(Path(configuration.policy_file)))
        keys = _key_file(configuration)
        connectors = build_connectors(configuration, keys)
        self._warn_of_ended_certificates()
        async with AsyncExitStack() as stack:
            operations = OperationsServer(
                registry=self._metrics.registry, is_started=lambda: self._started, is_ready=self._is_ready
            )
            await self._open_operations(operations, stack)
            hsm = HsmLink(observe=self._observe_hsm)
            egress = EgressLink()
            store = await self._open_store(HsmCheckpointSigner(hsm=hsm))
            stack.push_async_callback(store.close)
            await store.record([_life(AuditEvent.SIDECAR_STARTED)])
            supervisor = self._supervise(hsm, egress, store, keys, connectors)
            await supervisor.start()
            stack.push_async_callback(supervisor.stop)
            await store.sign_pending()
            metered = MeteredEgress(egress=egress, metrics=self._metrics, providers=_origins(connectors))
            await self._serve(store, hsm, metered, supervisor, connectors, policy)

    async def _open_store(self, signer: CheckpointSigner) -> SqlStore:
        store = self._configuration.store
        if store.path is not None:
            return await SqliteStore.open(
                path=Path(store.path),
                cluster=self._configuration.cluster,
                signer=signer,
                clock=self._clock,
                synchronous=store.synchronous,
                alarm=self._log.error,
            )
        if store.url is None:
            raise ConfigurationError(["store: must have exactly one of path and url"])
        # Here, because a sidecar with a file of its own has no use for the driver.
        from sidecar.store.postgresql import PostgresqlStore

        return await PostgresqlStore.open(
            url=store.url,
            instance=store.instance or _host_name(),
            cluster=self._configuration.cluster,
            signer=signer,
            clock=self._clock,
            synchronous_commit=store.synchronous_commit,
            read_connections=store.read_connections,
            alarm=self._log.error,
        )

    async def _serve(
        self,
        store: SqlStore,
        hsm: HsmLink,
        egress: TokenEgress,
        supervisor: Supervisor,
        connectors: Mapping[ProviderId, Connector],
        policy: Policy,
    ) -> None:
        origin = (await store.log_position()).origin
        tokens = Tokens(
            cluster=self._configuration.cluster,
            instance=origin,
            store=store,
            egress=egress,
            hsm=hsm,
            clock=self._clock,
            connectors=connectors,
            tasks=self._tasks,
            observe=self._observe_refresh,
        )
        refresher = Refresher(store=store, clock=self._clock, connectors=connectors, tokens=tokens, tasks=self._tasks)
        consents = Consents(
            store=store,
            egress=egress,
            hsm=hsm,
            clock=self._clock,
            connectors=connectors,
            tokens=tokens,
            tasks=self._tasks,
        )
        payments = Payments(
            store=store,
            egress=egress,
            hsm=hsm,
            clock=self._clock,
            connectors=connectors,
            tokens=tokens,
            tasks=self._tasks,
        )
        reconciler = Reconciler(
            store=store,
            egress=egress,
            hsm=hsm,
            clock=self._clock,
            connectors=connectors,
            tokens=tokens,
            payments=payments,
        )
        facts = SidecarFacts(
            version=__version__,
            cluster=self._configuration.cluster,
            instance=origin,
            start_time=self._clock.now(),
        )
        servicers = Servicers(
            consents=ConsentServicer(consents=consents),
            payments=PaymentServicer(
                payments=payments,
                reconciler=reconciler,
                resolver=Resolver(store=store, clock=self._clock, payments=payments),
            ),
            accounts=AccountServicer(
                accounts=Accounts(
                    store=store, egress=egress, hsm=hsm, clock=self._clock, connectors=connectors, tokens=tokens
                )
            ),
            signing=SigningServicer(signing=Signing(store=store, hsm=hsm, clock=self._clock)),
            providers=ProviderServicer(connectors=connectors),
            keys=KeyServicer(facts=facts, hsm=hsm, children=supervisor, store=store, clock=self._clock),
            audit=AuditServicer(store=store),
        )
        servers = GrpcServers(
            listeners=self._configuration.listeners,
            limits=self._configuration.limits,
            servicers=servicers,
            boundary_for=self._boundaries(store, policy),
            log=self._log,
        )
        give_back_freed_memory()
        await servers.start()
        self._describe_providers(connectors)
        background = self._background(store, supervisor, consents, reconciler, refresher)
        self._started = True
        for address, port in servers.ports.items():
            self._log.info("listening", address=address, count=port)
        self._log.info("ready", version=__version__)
        async with asyncio.TaskGroup() as group:
            work = [group.create_task(loop) for loop in background]
            try:
                await self._until_stopped(supervisor)
            except ChildRefused:
                # What is in flight may still come to its end: egress and the store work without the child that is gone.
                with suppress(CustodyError):
                    await self._drain(servers, store)
                raise
            await self._drain(servers, store)
            for task in work:
                task.cancel()

    async def _until_stopped(self, supervisor: Supervisor) -> None:
        """Returns when told to stop. Raises ChildRefused when a child process is gone for good."""
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait((stop, supervisor.failure), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if supervisor.failure.done():
            raise supervisor.failure.result()

    async def _drain(self, servers: GrpcServers, store: Store) -> None:
        """New calls are refused at once; what is in flight comes to a definite or reconcilable state."""
        self._draining.began = True
        self._log.info("stopping")
        await servers.begin_to_stop()
        left = await self._tasks.drain(seconds=self._configuration.shutdown_seconds)
        if left:
            self._log.warning("work_left_to_reconciliation", count=left)
        await servers.stop(grace_seconds=1.0)
        await store.record([_life(AuditEvent.SIDECAR_STOPPED)])
        await store.sign_pending()

    # -- parts

    def _supervise(
        self,
        hsm: HsmLink,
        egress: EgressLink,
        store: Store,
        keys: KeyFile,
        connectors: Mapping[ProviderId, Connector],
    ) -> Supervisor:
        supervisor = Supervisor(
            hsm_settings=_hsm_settings(self._configuration, keys),
            egress_settings=_egress_settings(self._configuration, connectors),
            hsm=hsm,
            egress=egress,
            on_hsm_started=_MasterKeys(store=store, clock=self._clock),
        )
        self._supervisor = supervisor
        return supervisor

    def _boundaries(self, store: Store, policy: Policy) -> Callable[[Listener], Boundary]:
        limits = self._configuration.limits
        # One per surface: a flood of an application's calls must not lock the administrators out.
        limiters = {
            surface: RateLimiter(calls_per_second=limits.calls_per_second, concurrent_calls=limits.concurrent_calls)
            for surface in ("api", "admin")
        }
        validator = RequestValidator(message_bytes=limits.message_bytes)
        refusals = Refusals(store=store, log=self._log)

        def boundary(listener: Listener) -> Boundary:
            return Boundary(
                surface=listener.surface,
                identity=self._identity(listener),
                policy=policy,
                limiter=limiters[listener.surface],
                validator=validator,
                refusals=refusals,
                draining=self._draining,
                metrics=self._metrics,
                log=self._log,
            )

        return boundary

    def _identity(self, listener: Listener) -> Identity:
        if listener.tls is not None:
            return SpiffeIdentity(trust_domain=listener.tls.trust_domain, clock=self._clock)
        if listener.workload is None:
            raise ConfigurationError([f"listeners: {listener.address} has no identity"])
        return BoundSocketIdentity(name=listener.workload)

    def _warn_of_ended_certificates(self) -> None:
        """Said, not refused: the other providers' consents can still be used."""
        for provider in self._configuration.providers:
            for name in (provider.client_certificate_file, provider.signing_certificate_file):
                if name and _has_ended(name, self._clock.now()):
                    self._log.warning("provider_certificate_expired", provider=provider.id, path=name)

    async def _open_operations(self, operations: OperationsServer, stack: AsyncExitStack) -> None:
        host, _, port = self._configuration.operations_address.rpartition(":")
        try:
            taken = await operations.start(host.strip("[]"), int(port))
        except (OSError, OverflowError) as error:  # a port above 65535 is an OverflowError
            reason = error.strerror if isinstance(error, OSError) else "there is no such port"
            raise ConfigurationError([f"operations_address: cannot be taken ({reason})"]) from error
        stack.push_async_callback(operations.stop)
        self._log.info("operations_listening", address=self._configuration.operations_address, count=taken)

    def _is_ready(self) -> bool:
        children = self._supervisor.pids if self._supervisor else {}
        return self._started and not self._draining.began and {"hsm", "egress"} <= children.keys()

    # -- telemetry

    def _observe_hsm(self, operation: str, outcome: str, seconds: float) -> None:
        self._metrics.hsm_operations.labels(operation, outcome).inc()
        self._metrics.hsm_seconds.labels(operation).observe(seconds)

    def _observe_refresh(self, provider: ProviderId, end: RefreshEnd) -> None:
        self._metrics.token_refreshes.labels(provider, end.value).inc()
        if end is RefreshEnd.LOST:
            self._metrics.refresh_tokens_lost.labels(provider).inc()
            self._log.warning("refresh_token_lost", provider=provider)

    def _describe_providers(self, connectors: Mapping[ProviderId, Connector]) -> None:
        """A counter that is born with its first loss would show no increase, and the alert on it would stay silent."""
        for provider in connectors:
            self._metrics.refresh_tokens_lost.labels(provider)
            for end in RefreshEnd:
                self._metrics.token_refreshes.labels(provider, end.value)

    # -- background

    def _background(
        self,
        store: SqlStore,
        supervisor: Supervisor,
        consents: Consents,
        reconciler: Reconciler,
        refresher: Refresher,
    ) -> list[Coroutine[None, None, None]]:
        gauges = _Gauges(metrics=self._metrics, store=store, supervisor=supervisor, clock=self._clock)
        gauges.describe_build()
        return [
            # Rounds overlap, so that a bank that hangs keeps no payment at another bank waiting.
            *(self._every(1.0, "reconcile", reconciler.run_due, begin_after_seconds=0.25 * n) for n in range(4)),
            self._every(1.0, "refresh_tokens", refresher.run_due),
            self._every(1.0, "sign_checkpoint", store.sign_pending),
            self._every(2.0, "gauges", gauges.refresh),
            self._every(15.0, "expire_consents", consents.expire_due),
            self._every(60.0, "finish_ended_consents", consents.finish_ended),
        ]

    async def _every(
        self, seconds: float, work: str, run: Callable[[], Awaitable[object]], *, begin_after_seconds: float = 0.0
    ) -> None:
        """Runs `run` again and again. A round that fails is counted and said, and the next one tries again; one that fails
        by a defect of ours too: it must not take down those who can still be served."""
        await self._clock.sleep(begin_after_seconds)
        while True:
            try:
                await run()
            except CustodyError as error:
                self._metrics.background_errors.labels(work).inc()
                self._log.warning("background_work_failed", work=work, reason=error.reason)
            except Exception as error:  # noqa: BLE001
                self._metrics.background_errors.labels(work).inc()
                self._log.exception("background_work_failed", error, work=work)
            await self._clock.sleep(seconds)


class _MasterKeys:
    """Gives a new hsm process the master keys before anybody may use it; makes the first one where there is none."""

    def __init__(self, *, store: Store, clock: SystemClock) -> None:
        self._store = store
        self._clock = clock

    async def __call__(self, fresh: HsmLink) -> None:
        records = list(await self._store.master_keys())
        if not records:
            try:
                records = [await self._first(fresh)]
            except StaleVersion:  # another sidecar on the same database was faster
                records = list(await self._store.master_keys())
        await fresh.load_master_keys(records)

    async def _first(self, fresh: HsmLink) -> MasterKeyRecord:
        created = await fresh.create_master_key(1)
        record = MasterKeyRecord(
            key_id=created.key.key_id,
            version=created.key.version,
            wrapped=created.key.wrapped,
            root_key_id=created.root_key_id,
            current=True,
            create_time=self._clock.now(),
        )
        draft = AuditDraft(event=AuditEvent.KEY_CREATED, outcome=AuditOutcome.SUCCEEDED)
        await self._store.add_master_key(record, draft)
        return record


@dataclass(slots=True, kw_only=True)
class _Gauges:
    """Numbers that are read from the store and the children when it is time, not counted along the way."""

    metrics: Metrics
    store: Store
    supervisor: Supervisor
    clock: SystemClock
    _restarts: dict[str, int] = field(default_factory=dict)

    def describe_build(self) -> None:
        self.metrics.build_info.labels(__version__, platform.python_version()).set(1)
        ProcessCollector(registry=self.metrics.registry)
        PlatformCollector(registry=self.metrics.registry)
        GCCollector(registry=self.metrics.registry)

    async def refresh(self) -> None:
        metrics = self.metrics
        consents = {state.value: count for state, count in (await self.store.consent_counts()).items()}
        payments = {state.value: count for state, count in (await self.store.payment_counts()).items()}
        metrics.set_states(metrics.consents, "state", consents, tuple(state.value for state in ConsentState))
        metrics.set_states(metrics.payments, "state", payments, tuple(state.value for state in PaymentState))
        for provider, count in (await self.store.tokens_expiring(self.clock.now() + timedelta(hours=1))).items():
            metrics.tokens_expiring.labels(provider).set(count)
        await self._log_gauges()
        for name in ("hsm", "egress"):
            metrics.process_up.labels(name).set(1 if name in self.supervisor.pids else 0)
            restarts = self.supervisor.restarts.get(name, 0)
            metrics.process_restarts.labels(name).inc(restarts - self._restarts.get(name, 0))
            self._restarts[name] = restarts

    async def _log_gauges(self) -> None:
        position = await self.store.log_position()
        self.metrics.log_entries.set(position.size)
        self.metrics.log_uncovered.set(position.size - position.covered_size)
        if position.checkpoint_time:
            self.metrics.checkpoint_timestamp.set(position.checkpoint_time.timestamp())


# --- from the configuration to values ------------------------------------------------------------------------------------


def build_policy(file: PolicyFile) -> Policy:
    """Raises ConfigurationError for an amount that is not exact in its currency."""
    workloads = {}
    for index, entry in enumerate(file.workloads):
        where = f"workloads[{index}]"
        limits = {limit.currency_code: _exact(limit, f"{where}.payment_limits") for limit in entry.payment_limits}
        workload = WorkloadId(entry.workload)
        workloads[workload] = WorkloadPolicy(
            workload=workload,
            roles=frozenset(Role(role) for role in entry.roles),
            purposes=frozenset(Purpose(purpose) for purpose in entry.purposes),
            providers=frozenset(ProviderId(provider) for provider in entry.providers),
            owners=None if entry.owners == "any" else frozenset(OwnerId(owner) for owner in entry.owners),
            payment_limits=limits,
            periodic_limits=tuple(
                PeriodicLimit(
                    amount=_exact(limit, f"{where}.periodic_limits"), period_type=PeriodType(limit.period_type)
                )
                for limit in entry.periodic_limits
            ),
            imports=entry.imports,
        )
    return Policy(workloads=workloads)


def _host_name() -> str:
    """In Kubernetes the pod's name; of a StatefulSet it stays from pod to pod."""
    return socket.gethostname().lower()


def _exact(limit: PolicyLimit | PolicyPeriodicLimit, where: str) -> Money:
    amount = parse_amount(limit.currency_code, limit.amount)
    if amount is None:
        raise ConfigurationError([f"{where}: {limit.currency_code} is not exact"])
    return amount


def build_connectors(configuration: Configuration, keys: KeyFile) -> dict[ProviderId, Connector]:
    """Raises ConfigurationError, naming the provider."""
    clients = [key.key_id for key in keys.descriptions if key.purpose is KeyPurpose.CLIENT_AUTHENTICATION]
    if len(clients) != 1:
        raise ConfigurationError(["hsm.keys_file: must describe exactly one key for client-authentication"])
    return {ProviderId(provider.id): _connector(provider, clients[0]) for provider in configuration.providers}


def _connector(provider: ProviderConfiguration, client_key_id: str) -> Connector:
    descriptor = _descriptor(provider)
    certificate = None
    if descriptor.signing.scheme != "none":
        if provider.signing_certificate_file is None:
            raise ConfigurationError([f"providers: {provider.id} needs signing_certificate_file"])
        certificate = _signing_certificate(provider.signing_certificate_file, provider.id)
    oauth = OAuthClient(descriptor=descriptor, key_id=provider.client_assertion_key_id or client_key_id)
    return BerlinGroupConnector(descriptor=descriptor, oauth=oauth, certificate=certificate)


def _signing_certificate(name: str, provider: str) -> SigningCertificate:
    try:
        return SigningCertificate.from_pem(_file(name, provider))
    except DescriptorError as error:
        raise ConfigurationError([f"providers: {provider}: {name}: {error}"]) from error


def _has_ended(certificate_file: str, now: datetime) -> bool:
    """Whether the certificate in this file is past its end. A file that is none is egress's to refuse."""
    try:
        return now >= load_pem_x509_certificate(Path(certificate_file).read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return False


def _descriptor(provider: ProviderConfiguration) -> Descriptor:
    try:
        if provider.descriptor.startswith("/"):
            return parse_descriptor(load_yaml(Path(provider.descriptor)), provider.variables)
        resource = resources.files("sidecar.connectors.catalog").joinpath(f"{provider.descriptor}.yaml")
        with resources.as_file(resource) as path:
            return parse_descriptor(load_yaml(path), provider.variables)
    except DescriptorError as error:
        raise ConfigurationError([f"providers: {provider.id}: {error}"]) from error


def _key_file(configuration: Configuration) -> KeyFile:
    try:
        return msgspec.json.decode(Path(configuration.hsm.keys_file).read_bytes(), type=KeyFile)
    except OSError as error:
        raise ConfigurationError([f"hsm.keys_file: cannot be read ({error.strerror})"]) from error
    except msgspec.DecodeError as error:
        raise ConfigurationError(["hsm.keys_file: is not what sidecar.hsm.provisioning writes"]) from error


def _hsm_settings(configuration: Configuration, keys: KeyFile) -> HsmSettings:
    hsm = configuration.hsm
    return HsmSettings(
        cluster=configuration.cluster,
        module_path=hsm.module_path,
        token_label=hsm.token_label,
        token_serial=hsm.token_serial,
        pin_file=hsm.pin_file,
        keys=keys.keys,
    )


def _egress_settings(configuration: Configuration, connectors: Mapping[ProviderId, Connector]) -> EgressSettings:
    transports = [
        ProviderTransport(
            provider=provider.id,
            origin=origin,
            ca_file=provider.ca_file,
            client_certificate_file=provider.client_certificate_file or "",
            client_key_file=provider.client_key_file or "",
        )
        for provider in configuration.providers
        for origin in sorted(connectors[ProviderId(provider.id)].descriptor.origins)
    ]
    return EgressSettings(cluster=configuration.cluster, transports=tuple(transports))


def _origins(connectors: Mapping[ProviderId, Connector]) -> dict[str, str]:
    return {origin: provider for provider, connector in connectors.items() for origin in connector.descriptor.origins}


def _file(name: str, provider: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigurationError([f"providers: {provider}: {name} cannot be read ({error.strerror})"]) from error


def _life(event: AuditEvent) -> AuditDraft:
    return AuditDraft(event=event, outcome=AuditOutcome.SUCCEEDED)
