"""What the image's recipe promises, as far as it can be read without an engine. docs/packaging.md has the build that was tried."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stages() -> dict[str, str]:
    """The Dockerfile's stages by name, continued lines joined, comments removed."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    parts = re.split(r"^FROM (?P<base>\S+) AS (?P<name>\S+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def test_the_default_target_is_runtime_and_holds_no_software_hsm(stages: dict[str, str]) -> None:
    """`docker build .` gives the production image: no SoftHSM in it or in what it is built from."""
    assert list(stages)[-1] == "runtime"
    assert [name for name, text in stages.items() if "softhsm" in text] == ["dev"]


def test_packages_come_from_the_lock_with_their_hashes(stages: dict[str, str]) -> None:
    """One installation, of the runtime lock, with hashes, without compiling; pip does not stay."""
    (install,) = re.findall(r"pip install (.*?) &&", " ".join(stages.values()))

    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(install.split())
    assert install.split()[-1] == "/build/requirements.lock"
    assert "pip uninstall --yes --quiet setuptools pip" in stages["build"]


@pytest.mark.parametrize("target", ["runtime", "dev"])
def test_both_images_run_as_a_numeric_user_and_were_tried(stages: dict[str, str], target: str) -> None:
    """The last user is 65532 by number, and as that user the build loads each of the three processes."""
    users = re.findall(r"^USER (.*)$", stages[target], re.MULTILINE)

    assert users == ["65532:65532"]
    tried = stages[target].partition("USER ")[2]
    assert re.search(
        r"^RUN \[.*import sidecar.__main__, sidecar.cli.main, sidecar.egress.__main__, sidecar.hsm.__main__",
        tried,
        re.MULTILINE,
    )


def test_the_process_is_hardened_and_gets_its_signals(stages: dict[str, str]) -> None:
    """Freed memory is overwritten, symbols are bound at start, and the sidecar itself is process 1."""
    environment = dict(re.findall(r"([A-Z_]+)=(\S+)", stages["base"].partition("ENV ")[2].partition("LABEL")[0]))

    assert environment["PYTHONMALLOC"] == "malloc"
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.perturb=90:glibc.malloc.tcache_count=0"
    assert environment["LD_BIND_NOW"] == "1"
    assert environment["PYTHONSAFEPATH"] == "1"
    assert 'ENTRYPOINT ["/opt/custody/venv/bin/python", "-m", "sidecar"]' in stages["base"]
    assert "STOPSIGNAL SIGTERM" in stages["base"]


def test_no_step_hides_a_failure() -> None:
    """A build step that fails ends the build."""
    text = (ROOT / "Dockerfile").read_text()

    assert re.findall(r"\|\| *true|\|\| *:|; *exit 0|set \+e", text) == []


def test_only_named_folders_reach_the_build() -> None:
    """Everything is excluded but what the recipe copies: no key, database or environment can slip into an image."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copied = set(re.findall(r"^COPY (?!--from)(\S+) ", (ROOT / "Dockerfile").read_text(), re.MULTILINE))

    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} - {"clients", "clients/python"} == copied
    assert all((ROOT / path).exists() for path in copied)


def _build(directory: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs `image.sh` where the engines are stand-ins that say what they were asked."""
    for name, answer in {"podman": "exit 1", "buildah": "exit 0", "docker": "exit 0"}.items():
        script = f'#!/bin/sh\n[ "$1" = info ] && {answer}\nfor word; do echo "$word"; done\n'
        (directory / name).write_text(script.replace("for word", f"echo {name}; for word"))
        (directory / name).chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(ROOT / "tools/image.sh")],
        env={"PATH": f"{directory}:/usr/bin:/bin", **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_first_engine_that_works_builds_runtime(tmp_path: Path) -> None:
    """An engine whose command is there but does not work is passed over."""
    done = _build(tmp_path)

    words = done.stdout.splitlines()
    assert words[:6] == ["buildah", "build", "--target", "runtime", "--tag", "token-custody-sidecar:runtime"]
    assert done.returncode == 0


def test_settings_reach_the_engine(tmp_path: Path) -> None:
    """Engine with arguments, target, base, certificate and mirror are handed on, the last two as secrets that do not stay."""
    done = _build(
        tmp_path, ENGINE="docker --context x", TARGET="dev", BASE="debian@sha256:0", CA="/ca.pem", PIP_CONF="/pip.conf"
    )

    words = done.stdout.splitlines()
    assert words[:5] == ["docker", "--context", "x", "build", "--target"]
    assert words[5] == "dev"
    assert "BASE=debian@sha256:0" in words
    assert words[words.index("id=ca,src=/ca.pem") - 1] == "--secret"
    assert words[words.index("id=pip,src=/pip.conf") - 1] == "--secret"


def test_without_an_engine_it_says_what_to_install(tmp_path: Path) -> None:
    """No engine is one line and a status, not a traceback."""
    for name in ("podman", "buildah", "docker"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)

    done = subprocess.run(
        ["/bin/sh", str(ROOT / "tools/image.sh")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr.startswith("image: no podman, buildah or docker works here.")
