"""Each rule earns its place: the models find what happens without it. The tables in docs/reliability.md are this data."""

from pathlib import Path

import pytest

from tests.model.defects import DEFECTS, EQUIVALENT, Defect, explore_with_defect, is_payment_world
from tests.model.explorer import Exploration
from tests.model.table import BEGIN, END, defect_tables

DOCUMENT = Path("docs/reliability.md")
RULES = [*(str(number) for number in range(1, 13)), "consent", *(f"R{number}" for number in range(1, 7))]


@pytest.mark.parametrize("defect", [defect for defect in DEFECTS if defect.breaks], ids=lambda defect: defect.name)
def test_a_rule_that_is_left_out_is_missed(defect: Defect) -> None:
    """The invariant that must break does, and the trace that leads there can be read."""
    seen = explore_with_defect(defect)

    assert seen.broken == defect.breaks, f"{defect.left_out}: {seen}"
    assert len(seen.trace) >= 2
    assert all(seen.trace)


@pytest.mark.parametrize("defect", EQUIVALENT, ids=lambda defect: defect.name)
def test_a_rule_with_another_behind_it_is_not_missed_alone(defect: Defect) -> None:
    """Stated as a fact, so that it is noticed when the rule behind it goes."""
    seen = explore_with_defect(defect)

    assert not seen.broken, str(seen)
    assert seen.is_exhaustive
    assert defect.why


def test_at_least_95_in_100_defects_are_caught() -> None:
    assert len(DEFECTS) >= 40
    assert len(EQUIVALENT) <= 0.05 * len(DEFECTS)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_has_a_defect_that_is_caught(rule: str) -> None:
    assert [defect for defect in DEFECTS if defect.rule == rule and defect.breaks]


def test_names_are_unique_and_each_switch_is_left_out_by_some_defect() -> None:
    """No rule of the models stands there untried."""
    from dataclasses import fields

    from tests.model.payment_model import Rules
    from tests.model.refresh_model import RefreshRules

    names = [defect.name for defect in DEFECTS]
    payment = {name for defect in DEFECTS if is_payment_world(defect.world) for name in defect.fields}
    refresh = {name for defect in DEFECTS if not is_payment_world(defect.world) for name in defect.fields}

    assert len(set(zip(names, (defect.world for defect in DEFECTS), strict=True))) == len(DEFECTS)
    assert payment == {field.name for field in fields(Rules)}
    assert refresh == {field.name for field in fields(RefreshRules)}


def test_the_document_shows_the_tables_as_they_are() -> None:
    """`python -m tests.model --write` brings them up to date."""
    text = DOCUMENT.read_text(encoding="utf-8")

    assert text.count(BEGIN) == text.count(END) == 1
    assert text.split(BEGIN)[1].split(END)[0].strip() == defect_tables().strip()


def test_a_counter_example_can_be_read() -> None:
    """Numbered steps in plain words, the shortest way there."""
    (defect,) = [defect for defect in DEFECTS if defect.name == "no-timeout-is-unknown"]

    seen = explore_with_defect(defect)

    assert isinstance(seen, Exploration)
    assert str(seen).splitlines() == [
        "told rejected, and executed, after 5 steps:",
        "   1. a call claims the request id, intent 1",
        "   2. the run of epoch 1 records its dispatch under a signed checkpoint",
        "   3. the run of epoch 1 sends key 1",
        "   4. the bank takes the payment as accepted, key 1; the run of epoch 1 gets no answer",
        "   5. the run of epoch 1 writes rejected",
    ]
