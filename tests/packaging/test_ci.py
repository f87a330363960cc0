"""`.ci/run` with a stand-in for make: its last lines are pytest's, and its status tells the truth."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PASSED = "tests/a.py ..  [100%]\n============ 2 passed in 0.10s ============"
FAILED = """tests/a.py F.  [100%]
=== short test summary info ===
FAILED tests/a.py::one - assert 1 == 2
=== 1 failed, 1 passed in 0.10s ==="""


def _run_ci(directory: Path, *, tests: str, tests_status: int, check_status: int) -> subprocess.CompletedProcess[str]:
    (directory / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", directory / ".ci/run")
    (directory / "tests.txt").write_text(f"{tests}\n")
    make = directory / "make"
    make.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"*check*) echo 'checking everything'; exit {check_status};;\n"
        f"*test*) cat tests.txt; [ {tests_status} -eq 0 ] || echo 'make: *** [test] Error 1' >&2; exit {tests_status};;\n"
        "esac\n"
        "exit 99\n"
    )
    make.chmod(0o755)
    return subprocess.run(
        ["bash", str(directory / ".ci/run")],
        env={**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("tests", "tests_status", "check_status", "succeeds"),
    [
        pytest.param(PASSED, 0, 0, True, id="all well"),
        pytest.param(PASSED, 0, 2, False, id="only the checks fail"),
        pytest.param(FAILED, 2, 0, False, id="only the tests fail"),
        pytest.param(FAILED, 2, 2, False, id="both fail"),
    ],
)
def test_the_status_is_that_of_tests_and_checks(
    tmp_path: Path, tests: str, tests_status: int, check_status: int, succeeds: bool
) -> None:
    """It succeeds only if both did, runs the checks whatever the tests said, and ends with pytest's summary."""
    done = _run_ci(tmp_path, tests=tests, tests_status=tests_status, check_status=check_status)

    assert (done.returncode == 0) is succeeds
    assert "checking everything" in done.stdout
    assert done.stdout.splitlines()[-1] == tests.splitlines()[-1]


def test_the_failed_tests_are_named_at_the_end(tmp_path: Path) -> None:
    """The last lines name what failed, so that nobody scrolls."""
    done = _run_ci(tmp_path, tests=FAILED, tests_status=2, check_status=0)

    assert done.stdout.endswith("\n".join(FAILED.splitlines()[1:]) + "\n")


def test_a_set_up_that_fails_is_a_failure(tmp_path: Path) -> None:
    """Without any test run there is no summary to show, and the status says so."""
    done = _run_ci(tmp_path, tests="set-up: no network", tests_status=2, check_status=2)

    assert done.returncode != 0
    assert "set-up: no network" in done.stdout
