"""What the sandbox promises about itself: independence, and a page that tells everything."""

import ast
import re
from pathlib import Path

import pytest

from sandbox.cli import main
from sandbox.faults import BODY_VARIANTS, Fault, spoil_body
from sandbox.web import json_answer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "sandbox.md").read_text()


def imported_by(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_the_judge_shares_no_code_with_the_judged() -> None:
    """No module of the sandbox imports the sidecar, its clients, or its stubs."""
    files = list((ROOT / "sandbox").rglob("*.py"))
    imported = set().union(*(imported_by(path) for path in files))

    assert len(files) > 20
    assert "joserfc" in imported
    assert not imported & {"sidecar", "custody", "custody_client", "tests"}


@pytest.mark.parametrize("command", ["init", "serve"])
def test_the_page_tells_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each option that `--help` shows is in docs/sandbox.md."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}

    assert len(options) >= 5
    assert sorted(option for option in options if option not in PAGE) == []


def test_the_page_tells_every_fault() -> None:
    """Each kind of fault and each variant of a spoiled body is in docs/sandbox.md."""
    assert [name for name in (*Fault.KINDS, *BODY_VARIANTS) if f"`{name}`" not in PAGE] == []


def test_every_variant_of_a_body_is_one() -> None:
    """Each listed variant makes a fault; the list is what the faults really know."""
    answer = json_answer(201, {"transactionStatus": "RCVD", "paymentId": "1"})
    spoiled = [
        spoil_body(Fault(kind="body", path_prefix="/v1", variant=name, size_bytes=9), answer, "Bearer x")
        for name in BODY_VARIANTS
    ]

    assert all((result.body, result.content_type) != (answer.body, answer.content_type) for result in spoiled)
