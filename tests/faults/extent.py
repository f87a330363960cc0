"""How much of a sweep runs: all of it (`make test-faults`), or a seeded sample, spread over the whole, in each run of the tests."""

import itertools
import os
import random
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["ALL", "EXTENT", "SEED", "everything", "sample", "seed"]

EXTENT, ALL, SEED = "FAULTS", "all", "FAULTS_SEED"
T = TypeVar("T")


def everything() -> bool:
    return os.environ.get(EXTENT) == ALL


def seed() -> int:
    """The run's seed; the same for all tests of it. Whoever uses it prints it, so that a failure can be repeated."""
    if SEED not in os.environ:
        os.environ[SEED] = str(random.SystemRandom().randrange(2**32))
    return int(os.environ[SEED])


def sample(points: Sequence[T], count: int, *, of: str) -> list[T]:
    """All `points`, or `count` of them: one from each of `count` stretches of equal length, so that no part is left out.

    `of` names the sweep, so that two sweeps do not take the same places.
    """
    if everything() or len(points) <= count:
        return list(points)
    chance = random.Random(f"{seed()} {of}")
    edges = [len(points) * number // count for number in range(count + 1)]
    return [points[chance.randrange(begin, end)] for begin, end in itertools.pairwise(edges)]
