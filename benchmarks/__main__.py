"""`python -m benchmarks NAME`: latency, throughput, process, parts, shared, or all. What they mean: docs/performance.md."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable

from benchmarks.figures import Row, latency, parts, process, throughput
from benchmarks.shared import shared

__all__ = ["main"]


def main() -> int:
    options = _parser().parse_args()
    groups: dict[str, Callable[[], list[Row]]] = {
        "latency": lambda: latency(options.rounds, options.calls),
        "throughput": lambda: throughput(options.rounds, options.seconds, options.in_flight),
        "process": lambda: process(options.rounds),
        "parts": lambda: parts(options.rounds, options.seconds, options.in_flight),
        "shared": lambda: shared(options.rounds, options.seconds),
    }
    names = list(groups) if options.name == "all" else [options.name]
    print(_machine())
    for name in names:
        print(
            f"\n{name}, medians of {options.rounds} rounds; load average before: {os.getloadavg()[0]:.2f}", flush=True
        )
        for row in groups[name]():
            target = f"   target {row.target}" if row.target else ""
            print(f"  {row.what:<48} {row.value}{target}", flush=True)
    return 0


def _machine() -> str:
    today = time.strftime("%Y-%m-%d")
    return f"{today}, {os.cpu_count()} processors, {platform.machine()}, Python {platform.python_version()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=("latency", "throughput", "process", "parts", "shared", "all"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=200, help="latency: calls of each kind in a round")
    parser.add_argument("--seconds", type=float, default=3.0, help="throughput, parts: length of one measurement")
    parser.add_argument("--in-flight", type=int, default=64)
    return parser


if __name__ == "__main__":
    sys.exit(main())
