"""What is installed is exactly what was reviewed: every package pinned and hashed, wherever it is fetched from."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-setup.lock")

_REQUIREMENT = re.compile(r"^(?P<name>[a-z0-9-]+)(\[[a-z0-9,-]+\])?==(?P<version>[^ ;]+)(?P<marker> ; .+?)? \\$")
_HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def _pins(lock: str) -> dict[str, str]:
    lines = (ROOT / lock).read_text().splitlines()
    return {found["name"]: found["version"] for line in lines if (found := _REQUIREMENT.match(line))}


def _wanted(requirements: list[str]) -> set[str]:
    """Names as the index spells them (PEP 503)."""
    names = (re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0] for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_is_pins_with_hashes_and_nothing_else(lock: str) -> None:
    """Each line is a pin, a SHA-256 of one of its files, or a comment; and each pin has a hash on the next line."""
    lines = (ROOT / lock).read_text().splitlines()

    strange = [
        line for line in lines if not (_REQUIREMENT.match(line) or _HASH.match(line) or line.lstrip().startswith("#"))
    ]
    unhashed = [a for a, b in zip(lines, [*lines[1:], ""], strict=True) if _REQUIREMENT.match(a) and not _HASH.match(b)]

    assert strange == []
    assert unhashed == []
    assert _pins(lock)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_place(lock: str) -> None:
    """Where packages come from is the machine's setting: no address, index or folder is in a lock."""
    text = (ROOT / lock).read_text()

    assert re.findall(r"://|--(?:extra-)?index|--find-links|--trusted-host| @ |^-e ", text, re.MULTILINE) == []


def test_the_locks_hold_everything_the_project_asks_for() -> None:
    """A dependency that is added without locking it is noticed here and not on somebody's fresh clone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = _wanted(project["project"]["dependencies"])
    groups = _wanted([name for group in project["dependency-groups"].values() for name in group])

    assert runtime - _pins("requirements.lock").keys() == set()
    assert (runtime | groups) - _pins("requirements-dev.lock").keys() == set()


def test_what_is_tested_is_what_is_shipped() -> None:
    """Every package of the image has the same version where the tests run."""
    shipped, tested = _pins("requirements.lock"), _pins("requirements-dev.lock")

    assert shipped.items() <= tested.items()


def test_the_image_gets_no_tools() -> None:
    """Packages that only the sandbox, the tests or the set-up need are not in the image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = _wanted([name for group in project["dependency-groups"].values() for name in group])

    assert groups & _pins("requirements.lock").keys() == set()


def _imports(*folders: str) -> dict[str, set[str]]:
    """The outer names of all modules that the files below these folders import, and which files do."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            for name in _imported(node):
                found.setdefault(name.partition(".")[0], set()).add(str(path.relative_to(ROOT)))
    return found


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def _foreign(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    own = {"sidecar", "custody", "buf", "sandbox", "softhsm", "tests", "tools", "benchmarks"}
    return {name: files for name, files in imports.items() if name not in sys.stdlib_module_names | own}


def _unlocked(imports: dict[str, set[str]], allowed: set[str]) -> dict[str, set[str]]:
    """Imported modules that come from no allowed package."""
    providers = packages_distributions()
    return {name: files for name, files in _foreign(imports).items() if not _wanted(providers.get(name, [])) & allowed}


def test_the_sidecar_imports_only_what_it_asks_for() -> None:
    """Each package that the product imports is one of its own dependencies, not something that came along with another."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert _unlocked(_imports("sidecar"), _wanted(project["project"]["dependencies"])) == {}


def test_everything_that_is_imported_anywhere_is_locked() -> None:
    """Tests, sandbox and tools import nothing that a fresh clone would lack."""
    local = {path.stem: set[str]() for path in (ROOT / "tests").rglob("*.py")}
    imports = _imports("clients/python/src", "sandbox", "softhsm", "tests", "tools")

    unlocked = _unlocked(
        {name: files for name, files in imports.items() if name not in local}, set(_pins("requirements-dev.lock"))
    )

    assert unlocked == {}


def test_the_set_up_needs_nothing_installed() -> None:
    """What runs before anything is installed imports the standard library and itself."""
    assert _foreign(_imports("softhsm", "tools/setup")) == {}
