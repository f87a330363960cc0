"""The tables of `docs/reliability.md`, made from `families` and from what the last whole run found (`results.json`)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.families import Family, Group
from tests.faults.rows import GROUPS

__all__ = [
    "BEGIN",
    "DOCUMENT",
    "END",
    "RESULTS",
    "Outcome",
    "Results",
    "read_results",
    "replaced",
    "table",
    "write_results",
]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/reliability.md"
RESULTS = Path(__file__).with_name("results.json")
BEGIN = "<!-- made by `python -m tests.faults write`: begin -->"
END = "<!-- made by `python -m tests.faults write`: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one family: tests by how they ended, and how many faults they injected altogether."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    injected: int = 0

    def said(self) -> str:
        parts = [f"{self.failed} FAILED"] if self.failed else []
        parts += [f"{self.passed} passed"] if self.passed else []
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        return ", ".join(parts) + (f" ({self.injected:,} injected)" if self.injected > self.passed else "")


Results = Mapping[str, Outcome]  # by the group's title and the family's id


def key(group: Group, family: Family) -> str:
    return f"{group.title} {family.id}"


def read_results() -> Results:
    if not RESULTS.exists():
        return {}
    return {name: Outcome(**values) for name, values in json.loads(RESULTS.read_text()).items()}


def write_results(results: Results) -> None:
    RESULTS.write_text(json.dumps({name: asdict(outcome) for name, outcome in results.items()}, indent=1) + "\n")


def table(results: Results) -> str:
    """All groups, as Markdown."""
    return "\n".join(_section(group, results) for group in GROUPS)


def replaced(document: str, results: Results) -> str:
    """`document` with its tables made anew. Raises ValueError where the marks are not there."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the document has no place for the tables")
    return f"{before}{BEGIN}\n\n{table(results)}\n{END}{after}"


def _section(group: Group, results: Results) -> str:
    lines = [
        f"### {group.title}",
        "",
        "| family | what is injected | tests | standing | last whole run |",
        "| --- | --- | --- | --- | --- |",
        *(_row(group, family, results) for family in group.families),
        "",
    ]
    return "\n".join(lines)


def _row(group: Group, family: Family, results: Results) -> str:
    outcome = results.get(key(group, family))
    standing = f"{family.standing}: {family.open}" if family.open else family.standing
    cells = (family.id, family.injected, _tests(family), standing, outcome.said() if outcome else "")
    return "| " + " | ".join(cells) + " |"


def _tests(family: Family) -> str:
    """Function names under their files; the cases of one function together."""
    named: dict[str, dict[str, int]] = {}
    for test in family.tests:
        file, _, name = test.removeprefix("tests/").partition("::")
        function, bracket, _ = name.partition("[")
        counts = named.setdefault(file.removesuffix(".py"), {})
        counts[function] = counts.get(function, 0) + (1 if bracket else 0)
    return "; ".join(
        f"`{file}`: " + ", ".join(f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in counts.items())
        for file, counts in named.items()
    )
