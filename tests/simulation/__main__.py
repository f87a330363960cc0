"""`make simulate`: one seed with its whole trace, or as many payments as are wanted, with a progress bar."""

import argparse
import sys
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sidecar.domain.payment import PaymentState
from tests.simulation.support import databases
from tests.simulation.world import CLASSES, Outcome, Violation, simulate


def main() -> int:
    options = _parser().parse_args()
    try:
        if options.payments is None:
            _replay(options)
        else:
            _play(options.payments, first_seed=options.seed or 0)
    except Violation as violation:
        print(violation, file=sys.stderr)
        return 1
    return 0


def _replay(options: argparse.Namespace) -> None:
    with databases() as places, places.new() as directory:
        played = simulate(options.seed or 0, directory=directory, class_name=options.class_name)
    if options.digest:
        print(played.digest)
        return
    print(*played.lines, sep="\n")
    print(f"no violation: {_told(played.states)}; digest {played.digest}")


def _play(payments: int, *, first_seed: int) -> None:
    columns = (TextColumn("payments"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    states: Counter[PaymentState] = Counter()
    seed = first_seed
    with databases() as places, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=payments)
        while states.total() < payments:
            with places.new() as directory:
                played: Outcome = simulate(seed, directory=directory)
            states += played.states
            seed += 1
            progress.update(task, completed=min(states.total(), payments))
    print(f"no violation in {states.total()} payments of the seeds {first_seed} to {seed - 1}: {_told(states)}")


def _told(states: Counter[PaymentState]) -> str:
    return ", ".join(f"{count} {state.value}" for state, count in states.most_common())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this run and print its trace; with --payments, the first run")
    parser.add_argument("--class", dest="class_name", choices=CLASSES, help="of the provider (default: the seed's)")
    parser.add_argument("--payments", type=int, help="play runs until there are so many payments")
    parser.add_argument("--digest", action="store_true", help="print the digest of the trace only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
