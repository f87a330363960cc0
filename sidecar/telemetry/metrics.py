"""Every metric of the sidecar. Labels have few values: methods, codes, providers, operations, states; never an id of a person,
a consent, a payment or a request."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["Metrics"]

_CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_HSM_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """One registry per sidecar; nothing is registered globally."""

    def __init__(self, *, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry(auto_describe=True)
        self._define_grpc()
        self._define_outside()
        self._define_custody()

    def _define_grpc(self) -> None:
        """The names that every gRPC dashboard knows (go-grpc-prometheus)."""
        method = ("grpc_type", "grpc_service", "grpc_method")
        self.grpc_started = Counter("grpc_server_started", "RPCs started.", method, registry=self.registry)
        self.grpc_handled = Counter(
            "grpc_server_handled", "RPCs completed, by status code.", (*method, "grpc_code"), registry=self.registry
        )
        self.grpc_seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time to complete an RPC, in seconds.",
            (*method, "grpc_code"),
            buckets=_CALL_BUCKETS,
            registry=self.registry,
        )
        self.calls_refused = Counter(
            "custody_calls_refused", "Calls refused by identity, policy or limits.", ("reason",), registry=self.registry
        )

    def _define_outside(self) -> None:
        self.egress_calls = Counter(
            "custody_egress_calls",
            "Requests to providers, by outcome: answered (by class of status), not sent, unknown.",
            ("provider", "outcome"),
            registry=self.registry,
        )
        self.egress_seconds = Histogram(
            "custody_egress_call_seconds",
            "Time of a request to a provider, in seconds.",
            ("provider",),
            buckets=_CALL_BUCKETS,
            registry=self.registry,
        )
        self.hsm_operations = Counter(
            "custody_hsm_operations",
            "Calls into the HSM process, by outcome.",
            ("operation", "outcome"),
            registry=self.registry,
        )
        self.hsm_seconds = Histogram(
            "custody_hsm_operation_seconds",
            "Time of a call into the HSM process, in seconds.",
            ("operation",),
            buckets=_HSM_BUCKETS,
            registry=self.registry,
        )
        self.process_restarts = Counter(
            "custody_process_restarts", "Restarts of a child process.", ("process",), registry=self.registry
        )
        self.process_up = Gauge(
            "custody_process_up",
            "Whether a child process is ready (1) or not (0).",
            ("process",),
            registry=self.registry,
        )

    def _define_custody(self) -> None:
        self.payments = Gauge("custody_payments", "Payments, by state.", ("state",), registry=self.registry)
        self.consents = Gauge("custody_consents", "Consents, by state.", ("state",), registry=self.registry)
        self.tokens_expiring = Gauge(
            "custody_tokens_expiring",
            "Active consents whose access token ends within the next hour.",
            ("provider",),
            registry=self.registry,
        )
        self.token_refreshes = Counter(
            "custody_token_refreshes",
            "Attempts to refresh a token, by outcome.",
            ("provider", "outcome"),
            registry=self.registry,
        )
        self.refresh_tokens_lost = Counter(
            "custody_refresh_tokens_lost",
            "Refresh tokens that were lost in transit: the consent needs its owner again.",
            ("provider",),
            registry=self.registry,
        )
        self.log_entries = Gauge("custody_log_entries", "Entries in the audit log.", registry=self.registry)
        self.log_uncovered = Gauge(
            "custody_log_uncovered_entries", "Entries that no signed checkpoint covers yet.", registry=self.registry
        )
        self.checkpoint_timestamp = Gauge(
            "custody_log_checkpoint_timestamp_seconds", "When the newest checkpoint was signed.", registry=self.registry
        )
        self.background_errors = Counter(
            "custody_background_errors", "Rounds of background work that failed.", ("work",), registry=self.registry
        )
        self.build_info = Gauge(
            "custody_build_info", "Always 1; the labels say what runs.", ("version", "python"), registry=self.registry
        )

    def set_states(self, gauge: Gauge, label: str, counts: Mapping[str, int], states: tuple[str, ...]) -> None:
        """Every state has a series, also those without a member: an absent series would look like an absent sidecar."""
        for state in states:
            gauge.labels(**{label: state}).set(counts.get(state, 0))
