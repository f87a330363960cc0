"""The alert rules ask for metrics that exist, with labels and values that they have: a rule that names no series never fires."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.custody.tokens import RefreshEnd
from sidecar.domain.consent import ConsentState
from sidecar.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus-rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
_SERIES = re.compile(r"\b((?:custody|grpc)_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(?:=|!=)"([^"]*)"')
_VALUES = {"outcome": {end.value for end in RefreshEnd}, "state": {state.value for state in ConsentState}}


def _series() -> dict[str, set[str]]:
    """Every series that the sidecar gives, with the names of its labels."""
    found = {}
    for metric in vars(Metrics()).values():
        if hasattr(metric, "_labelnames"):
            suffix = "_total" if metric._type == "counter" else ""
            found[metric._name + suffix] = set(metric._labelnames)
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_asks_for_what_there_is(rule: dict[str, Any]) -> None:
    """Names, labels and their values are the sidecar's own; brackets are closed; whoever is called learns what to do."""
    series = _series()
    asked = _SERIES.findall(rule["expr"])

    assert asked
    for name, matchers in asked:
        assert name in series, name
        for label, value in _MATCHER.findall(matchers):
            assert label in series[name], (name, label)
            assert value in _VALUES[label], (name, label, value)
    assert all(rule["expr"].count(opening) == rule["expr"].count(closing) for opening, closing in ("()", "{}", "[]"))
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "description"}


def test_each_name_is_given_once() -> None:
    """Two alerts of one name would silence each other."""
    names = [rule["alert"] for rule in RULES]

    assert len(set(names)) == len(names)


def test_a_lost_refresh_token_calls_somebody() -> None:
    """One loss is enough, and the rule does not wait."""
    (rule,) = [rule for rule in RULES if "custody_refresh_tokens_lost_total" in rule["expr"]]

    assert rule["expr"].endswith("> 0")
    assert "for" not in rule
    assert rule["labels"]["severity"] == "critical"
