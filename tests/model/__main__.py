"""`make model`: the models further than the tests go, with the counter-example of each seeded defect.

python -m tests.model              both models, deep
python -m tests.model --traces     the counter-examples of all seeded defects
python -m tests.model --write      the tables of defects in docs/reliability.md
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tests.model.defects import DEFECTS, explore_with_defect, payment_model
from tests.model.explorer import Exploration, Model, explore
from tests.model.payment_model import Bounds
from tests.model.refresh_model import GRACE, NO_ROTATION, STRICT, WHEN_FIRST_USED, RefreshBounds, RefreshModel
from tests.model.table import BEGIN, END, defect_tables

DOCUMENT = Path("docs/reliability.md")
MAX_STATES = 1_500_000
_THREE_RUNS = Bounds(runs=3, crashes=4, dispatches=4, epochs=10, late=3)
_THREE_REFRESHES = RefreshBounds(runs=3, crashes=3, sends=6, late=3)
SEARCHES: Mapping[str, Callable[[], Model[Any]]] = {
    "payments, class A, two runs": lambda: payment_model(
        "A", bounds=Bounds(crashes=4, dispatches=5, epochs=10, late=3)
    ),
    "payments, class A, three runs": lambda: payment_model(
        "A", bounds=Bounds(runs=3, crashes=2, dispatches=4, epochs=8)
    ),
    "payments, class A, revoked": lambda: payment_model("A, revoked", bounds=Bounds(crashes=3, dispatches=4, epochs=8)),
    "payments, class A, followed": lambda: payment_model(
        "A, followed", bounds=Bounds(crashes=2, dispatches=3, epochs=6)
    ),
    "payments, class B, three runs": lambda: payment_model("B", bounds=_THREE_RUNS),
    "payments, class C, three runs": lambda: payment_model("C", bounds=_THREE_RUNS),
    "payments, class C, revoked": lambda: payment_model("C, revoked", bounds=_THREE_RUNS),
    "refresh, strict": lambda: RefreshModel(STRICT, bounds=_THREE_REFRESHES),
    "refresh, grace": lambda: RefreshModel(GRACE, bounds=_THREE_REFRESHES),
    "refresh, when first used": lambda: RefreshModel(WHEN_FIRST_USED, bounds=RefreshBounds(runs=3, crashes=2, sends=5)),
    "refresh, no rotation": lambda: RefreshModel(NO_ROTATION, bounds=_THREE_REFRESHES),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.model", description="Explore the models of payment and refresh."
    )
    parser.add_argument("--traces", action="store_true", help="show the counter-example of each seeded defect")
    parser.add_argument("--write", action="store_true", help="write the tables of defects into docs/reliability.md")
    parser.add_argument("--max-states", type=int, default=MAX_STATES, help="of each search (default: %(default)s)")
    arguments = parser.parse_args()
    console = Console()
    if arguments.write:
        _write_tables()
        return 0
    return _show_traces(console) if arguments.traces else _go_deep(console, arguments.max_states)


def _write_tables() -> None:
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{defect_tables()}\n{END}{after}", encoding="utf-8")


def _show_traces(console: Console) -> int:
    failures = 0
    for defect in DEFECTS:
        seen = explore_with_defect(defect)
        failures += seen.broken != defect.breaks
        console.print(
            f"[bold]rule {defect.rule}: {defect.left_out}[/] ({defect.world}; {defect.name})", highlight=False
        )
        console.print(f"{seen}\n", highlight=False, markup=False, soft_wrap=True)
    return 1 if failures else 0


def _go_deep(console: Console, max_states: int) -> int:
    """One search after the other; each shows how many of the states found so far were worked on."""
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: list[Exploration] = []
    with Progress(*columns, console=console) as progress:
        for name, build in SEARCHES.items():
            task = progress.add_task(name, total=None)

            def show(done: int, found: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=found)

            seen = explore(build(), max_states=max_states, on_progress=show)
            progress.remove_task(task)
            progress.console.print(f"{name}: {seen}", highlight=False, markup=False, soft_wrap=True)
            results.append(seen)
    console.print(f"{sum(seen.states for seen in results):,} states in all", highlight=False)
    return 1 if any(seen.broken for seen in results) else 0


if __name__ == "__main__":
    sys.exit(main())
