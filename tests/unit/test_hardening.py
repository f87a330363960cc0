"""The posture that a process takes, tried on processes of its own: measures cannot be taken back."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sidecar import hardening
from sidecar.hardening import WIPING_ENVIRONMENT, Posture

SOURCE = Path(hardening.__file__).read_text()
REPORT = """
import dataclasses, json, os
posture = harden(parent_pid=os.getppid())
print(json.dumps({**dataclasses.asdict(posture), "missing": posture.missing()}), flush=True)
"""
NOBODY = 65534


def run(after: str, *, environment: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """The module's own source and then `after`, in a fresh interpreter."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GLIBC_", "LD_"))}
    return subprocess.run(
        [sys.executable, "-c", SOURCE + after],
        env={**clean, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def report(environment: dict[str, str]) -> dict[str, object]:
    done = run(REPORT, environment=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_with_the_supervisors_environment_every_measure_holds() -> None:
    """All but the capabilities, which whoever runs the container takes away."""
    found = report(WIPING_ENVIRONMENT)

    assert all(
        found[name]
        for name in ("not_dumpable", "no_core_file", "no_new_privileges", "dies_with_parent", "freed_memory_wiped")
    )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PYTHONMALLOC": "malloc"},
        {"GLIBC_TUNABLES": WIPING_ENVIRONMENT["GLIBC_TUNABLES"]},
        {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.perturb=90"},
        {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.pertrub=90:glibc.malloc.tcache_count=0"},
    ],
    ids=["nothing", "malloc alone", "tunables alone", "thread cache on", "misspelt"],
)
def test_an_allocator_that_does_not_wipe_is_found_out(environment: dict[str, str]) -> None:
    """A switch that is missing or misspelt is ignored without a word: the self-test says so."""
    assert report(environment)["freed_memory_wiped"] is False


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have capabilities")
def test_capabilities_are_reported() -> None:
    """As root they are there, and the report says so."""
    missing = report(WIPING_ENVIRONMENT)["missing"]

    assert isinstance(missing, list)
    assert "no_capabilities" in missing


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
@pytest.mark.parametrize("hardened", [True, False])
def test_the_same_user_cannot_look_inside(hardened: bool) -> None:
    """A process of the same user reads our environment and memory unless we are hardened."""
    as_nobody = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--inh-caps=-all"]
    after = "\nharden()\n" if hardened else ""
    target = subprocess.Popen(
        [
            *as_nobody,
            "/usr/bin/python3",
            "-c",
            f"{SOURCE}{after}\nprint('ready', flush=True)\nimport time\ntime.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        cwd="/",
    )
    try:
        assert target.stdout is not None
        assert target.stdout.readline() == b"ready\n"
        look = f"open('/proc/{target.pid}/environ', 'rb').read(); open('/proc/{target.pid}/mem', 'rb')"
        looked = subprocess.run([*as_nobody, "/usr/bin/python3", "-c", look], capture_output=True, cwd="/", check=False)
    finally:
        target.kill()
        target.communicate()

    assert (looked.returncode != 0) is hardened
    assert (b"PermissionError" in looked.stderr) is hardened


def test_no_core_file_is_written(tmp_path: Path) -> None:
    """After SIGABRT nothing lies in the directory, though the limit of the parent would allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    done = run(f"\nos.chdir({str(tmp_path)!r})\nharden()\nos.kill(os.getpid(), signal.SIGABRT)\n")

    assert done.returncode == -signal.SIGABRT
    assert list(tmp_path.iterdir()) == []
    assert (soft, hard) == resource.getrlimit(resource.RLIMIT_CORE)


def test_a_child_dies_with_its_parent() -> None:
    """SIGKILL of the parent: the child, which waits for nothing and reads nothing, is gone too."""
    child = SOURCE + "\nharden(parent_pid=os.getppid())\nprint(os.getpid(), flush=True)\nsignal.pause()\n"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    orphan = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()

    _, alive = psutil.wait_procs([orphan], timeout=20)

    assert alive == []


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    """Between exec and the binding the parent may end: then no signal would ever come."""
    done = run("\nharden(parent_pid=1 if os.getppid() != 1 else 2)\n")

    assert "ParentGone" in done.stderr


def test_missing_names_what_does_not_hold() -> None:
    """The report is for people too."""
    posture = Posture(
        not_dumpable=True,
        no_core_file=False,
        no_new_privileges=True,
        dies_with_parent=True,
        freed_memory_wiped=False,
        no_capabilities=True,
    )

    assert posture.missing() == ("no_core_file", "freed_memory_wiped")


def test_freed_memory_is_given_back() -> None:
    """Many small blocks, freed in between others: the process is smaller afterwards."""
    done = run(
        """
def resident():
    return int(open("/proc/self/statm").read().split()[1])
blocks = [bytearray(3000) for _ in range(20_000)]
kept = blocks[::100]
del blocks
before = resident()
give_back_freed_memory()
print(before, resident())
""",
        environment=WIPING_ENVIRONMENT,
    )
    before, after = map(int, done.stdout.split())

    assert after < before * 0.7
