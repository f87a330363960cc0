"""Metrics: names that dashboards know, labels of few values, every state a series."""

import re

import pytest
from prometheus_client import REGISTRY, generate_latest

from sidecar.domain.consent import ConsentState
from sidecar.domain.payment import PaymentState
from sidecar.telemetry.metrics import Metrics

LABELS = {
    "grpc_type", "grpc_service", "grpc_method", "grpc_code", "reason", "provider", "outcome", "operation", "process", "state",
    "work", "version", "python", "le",
}  # fmt: skip


def test_the_metrics_that_operators_rely_on_are_there() -> None:
    """Each of the names that the issue and docs/telemetry.md give."""
    text = generate_latest(Metrics().registry).decode()

    for name in (
        "grpc_server_handled_total",
        "grpc_server_handling_seconds",
        "custody_egress_calls_total",
        "custody_hsm_operations_total",
        "custody_hsm_operation_seconds",
        "custody_payments",
        "custody_consents",
        "custody_tokens_expiring",
        "custody_token_refreshes_total",
        "custody_refresh_tokens_lost_total",
        "custody_log_entries",
        "custody_log_checkpoint_timestamp_seconds",
        "custody_process_restarts_total",
        "custody_build_info",
    ):
        assert f"# TYPE {name.removesuffix('_total')}" in text or f"# TYPE {name}" in text


def test_labels_are_those_of_few_values() -> None:
    """Never an id of a person, a consent, a payment or a request."""
    metrics = Metrics()
    names = {label for metric in vars(metrics).values() for label in getattr(metric, "_labelnames", ())}

    assert names <= LABELS


def test_nothing_is_registered_globally() -> None:
    """Two sidecars in one process (tests) do not meet, and importing registers nothing."""
    first, second = Metrics(), Metrics()
    first.log_entries.set(7)

    assert "custody_log_entries 7.0" in generate_latest(first.registry).decode()
    assert "custody_log_entries 0.0" in generate_latest(second.registry).decode()
    assert "custody_" not in generate_latest(REGISTRY).decode()


@pytest.mark.parametrize(("gauge", "states"), [("payments", PaymentState), ("consents", ConsentState)])
def test_every_state_has_a_series_also_when_it_becomes_empty(gauge: str, states: type) -> None:
    """An absent series would look like an absent sidecar, and an old number like a payment."""
    metrics = Metrics()
    names = tuple(state.value for state in states)  # type: ignore[attr-defined]
    metrics.set_states(getattr(metrics, gauge), "state", {names[0]: 3}, names)
    metrics.set_states(getattr(metrics, gauge), "state", {names[1]: 2}, names)
    text = generate_latest(metrics.registry).decode()

    found = dict(re.findall(rf'custody_{gauge}{{state="([a-z-]+)"}} ([0-9.]+)', text))
    assert found == {name: "2.0" if name == names[1] else "0.0" for name in names}
