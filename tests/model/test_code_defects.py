"""A defect in the real code is noticed: by the simulation, or by the store's contract.

The model says that a rule is needed; this says that the tests would see the product break it. A defect whose line is not there
any more fails, so that the list is kept.
"""

import importlib
import inspect
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar.errors import CustodyError
from tests.contract import test_store_contract
from tests.model.code_defects import CODE_DEFECTS, STORE_DEFECTS, CodeDefect
from tests.simulation.bank import ClassName
from tests.simulation.world import Violation, simulate
from tests.unit.store.support import new_database

MOST_SEEDS = 25  # some defects need as many as seven


def _replace_in(monkeypatch: pytest.MonkeyPatch, defect: CodeDefect) -> None:
    """The methods of the module's classes, from its source with the defect in it."""
    module = importlib.import_module(defect.module)
    source = inspect.getsource(module)
    assert source.count(defect.line) == 1, f"{defect.module} has not exactly one such line: {defect.line}"
    broken = types.ModuleType(module.__name__)
    text = source.replace(defect.line, defect.instead) + "\n" + defect.more
    exec(compile(text, f"{module.__file__} with a defect", "exec"), broken.__dict__)
    for name, value in vars(module).items():
        if (
            isinstance(value, type)
            and value.__module__ == module.__name__
            and not hasattr(value, "__dataclass_fields__")
        ):
            for method, function in vars(getattr(broken, name)).items():
                # A method that calls super() belongs to its own class; none of those has a defect.
                if inspect.isfunction(function) and "__class__" not in function.__code__.co_freevars:
                    monkeypatch.setattr(value, method, function)


def _first_failure(bank: ClassName, folder: Path) -> Violation | None:
    for seed in range(MOST_SEEDS):
        try:
            simulate(seed, directory=new_database(folder).parent, class_name=bank)
        except Violation as failure:
            return failure
    return None


@pytest.mark.parametrize("defect", CODE_DEFECTS, ids=lambda defect: f"rule {defect.rule}: {defect.name}")
def test_the_simulation_notices(defect: CodeDefect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Within a few seeds, by an invariant and not by an error that the defect raises; without the defect the same seeds pass
    (tests/simulation)."""
    _replace_in(monkeypatch, defect)

    failure = _first_failure(defect.bank, tmp_path)

    assert failure is not None
    assert failure.__cause__ is None, "the defect does not run: it raises an error"


@pytest.mark.parametrize("defect", STORE_DEFECTS, ids=lambda defect: f"rule {defect.rule}: {defect.name}")
def test_the_contract_of_the_store_notices(defect: CodeDefect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On SQLite: the contract's test passes, and fails with the defect in the store."""
    contract: Callable[[str, Path], None] = getattr(test_store_contract, defect.contract)
    (tmp_path / "as it is").mkdir()
    (tmp_path / "with the defect").mkdir()

    contract("sqlite", tmp_path / "as it is")
    _replace_in(monkeypatch, defect)
    with pytest.raises((AssertionError, CustodyError, pytest.fail.Exception)):
        contract("sqlite", tmp_path / "with the defect")
