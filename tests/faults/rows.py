"""All rows of both lists, and the tests that they name."""

from collections.abc import Iterator

from tests.faults.bad_input import BAD_INPUT
from tests.faults.families import FAULTS, Family, Group

__all__ = ["GROUPS", "families", "is_of", "named_tests"]

GROUPS = (*FAULTS, *BAD_INPUT)


def families() -> Iterator[tuple[Group, Family]]:
    for group in GROUPS:
        for family in group.families:
            yield group, family


def named_tests() -> tuple[str, ...]:
    """Every test that a row names, once, in the order of the rows."""
    return tuple(dict.fromkeys(test for _, family in families() for test in family.tests))


def is_of(case: str, test: str) -> bool:
    """Whether the case is the named test, or one of its cases."""
    if test.endswith("*"):
        return case.startswith(test[:-1])
    return case == test or ("[" not in test and case.partition("[")[0] == test)
