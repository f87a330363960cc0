"""The tables keep their word: every family has a row, every test that a row names exists, and the documents are fresh."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.extent import sample
from tests.faults.families import Group
from tests.faults.rows import GROUPS, is_of, named_tests
from tests.faults.table import BEGIN, DOCUMENT, END, read_results, replaced

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.title)
def test_every_family_has_its_row(group: Group) -> None:
    """The ids run from 1 to as many as there are, each once, and each says what is injected."""
    expected = [
        f"{group.prefix}{number}" for number in range(1, group.count + 1)
    ]  # as the list that they come from counts them

    assert [family.id for family in group.families] == expected
    assert all(family.injected for family in group.families)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.title)
def test_a_row_has_tests_or_says_why_not(group: Group) -> None:
    """No row is silent: it is proven, or says what is missing."""
    assert [family.id for family in group.families if not family.tests and not family.open] == []


def test_every_test_of_a_row_exists() -> None:
    """pytest finds each of them, by function or by case."""
    named = named_tests()
    files = sorted({test.partition("::")[0] for test in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    cases = set(re.findall(r"^(tests/\S.*::.*)$", done.stdout, re.MULTILINE))

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [test for test in named if not any(is_of(case, test) for case in cases)] == []


def test_the_tables_are_fresh() -> None:
    """What the document shows is what the rows and the last results say: `python -m tests.faults write` makes it so."""
    document = DOCUMENT.read_text()

    assert document == replaced(document, read_results())
    assert document.count(BEGIN) == document.count(END) == 1


def test_a_sample_reaches_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """One point of each stretch; the same ones for the same seed; all of them in the whole run."""
    monkeypatch.setenv("FAULTS", "some")
    monkeypatch.setenv("FAULTS_SEED", "7")
    points = list(range(103))

    taken = sample(points, 10, of="x")

    assert [point * 10 // 103 for point in taken] == list(range(10))
    assert taken == sample(points, 10, of="x") != sample(points, 10, of="y")
    monkeypatch.setenv("FAULTS", "all")
    assert sample(points, 10, of="x") == points
