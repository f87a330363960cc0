"""The whole harness in one run: every test that a row names, with all points instead of a sample, a progress bar, and the result
of each family written down."""

import os
import random
import sys
from collections import defaultdict
from collections.abc import Mapping

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.faults.extent import ALL, EXTENT, SEED
from tests.faults.rows import families, is_of
from tests.faults.table import DOCUMENT, Outcome, key, read_results, replaced, write_results

__all__ = ["run"]


def run(*, seed: int | None, only: str) -> int:
    """pytest's exit status."""
    chosen = [(group, family) for group, family in families() if family.id.startswith(only) and family.tests]
    tests = list(dict.fromkeys(_runnable(test) for _, family in chosen for test in family.tests))
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    os.environ[EXTENT], os.environ[SEED] = ALL, str(seed)
    console = Console()
    console.print(f"{len(chosen)} families, {len(tests)} tests; seed {seed}")
    watcher = _Watcher(console)
    status = int(pytest.main(["-p", "no:cacheprovider", "-p", "no:terminal", *_options(), *tests], plugins=[watcher]))
    for name, report in watcher.failures.items():
        console.print(f"[red]FAILED[/red] {name}", highlight=False)
        console.print(report, markup=False, highlight=False)
    results = {key(group, family): watcher.outcome(family.tests) for group, family in chosen}
    for name, outcome in results.items():
        console.print(f"{name:24} {outcome.said()}", highlight=False, soft_wrap=True)
    if not only:
        write_results(results)
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), read_results()))
    return status


def _options() -> list[str]:
    """Every point of every kill takes longer than a test of the ordinary suite may."""
    return ["--timeout=3600", "--override-ini=addopts=--strict-markers --strict-config --import-mode=importlib"]


def _runnable(test: str) -> str:
    """What pytest can be given: it knows no cases that begin so."""
    return test.partition("[")[0] if test.endswith("*") else test


class _Watcher:
    """Counts and shows. Reports reach it as pytest's hooks."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._ended: dict[str, str] = {}
        self._injected: dict[str, int] = defaultdict(int)
        self.failures: dict[str, str] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, console=console, disable=not sys.stderr.isatty() and not console.is_terminal
        )
        self._task = self._progress.add_task("collecting", total=None)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._progress.update(self._task, total=len(session.items))
        self._progress.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._progress.update(self._task, description=nodeid.partition("::")[2][:60])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._ended[report.nodeid] = report.outcome
            for name, value in report.user_properties:
                if name == "injected" and isinstance(value, int):
                    self._injected[report.nodeid] += value
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext
        if report.when == "teardown":
            self._progress.advance(self._task)

    def pytest_sessionfinish(self) -> None:
        self._progress.stop()

    def outcome(self, tests: tuple[str, ...]) -> Outcome:
        mine = {name: ended for name, ended in self._ended.items() if any(is_of(name, test) for test in tests)}
        counts: Mapping[str, int] = {
            ended: sum(1 for other in mine.values() if other == ended) for ended in ("passed", "failed", "skipped")
        }
        return Outcome(**counts, injected=sum(self._injected.get(name, 1) for name in mine))
