"""`python -m tests.faults run` runs every test that the tables name, all kill points of each, and writes results and tables;
`write` makes the tables anew from the last results."""

import argparse
import sys

from tests.faults import harness_run
from tests.faults.table import DOCUMENT, read_results, replaced


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("command", choices=("run", "write"))
    parser.add_argument("--seed", type=int, default=None, help="of the samples; printed, so that a run can be repeated")
    parser.add_argument("--only", default="", help="only families whose id begins so, such as P or N1; writes nothing")
    options = parser.parse_args()
    if options.command == "run":
        return harness_run.run(seed=options.seed, only=options.only)
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(), read_results()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
