"""The tables of seeded defects, as docs/reliability.md shows them."""

from tests.model.code_defects import CODE_DEFECTS, STORE_DEFECTS, CodeDefect
from tests.model.defects import DEFECTS, Defect

__all__ = ["BEGIN", "END", "defect_tables"]

BEGIN = "<!-- begin: python -m tests.model --write -->"
END = "<!-- end: python -m tests.model --write -->"


def defect_tables() -> str:
    model = ["| rule | left out of the model | where | what breaks | test |", "| --- | --- | --- | --- | --- |"]
    code = ["| rule | changed in the code | in | noticed by |", "| --- | --- | --- | --- |"]
    return "\n".join([*model, *map(_model_line, DEFECTS), "", *code, *map(_code_line, (*CODE_DEFECTS, *STORE_DEFECTS))])


def _model_line(defect: Defect) -> str:
    breaks = defect.breaks or f"nothing: {defect.why}"
    return f"| {defect.rule} | {defect.left_out} | {defect.world} | {breaks} | `{defect.name}` |"


def _code_line(defect: CodeDefect) -> str:
    noticed = f"the store's contract, `{defect.contract}`" if defect.contract else "the simulation"
    return f"| {defect.rule} | {defect.name} | `{defect.module}` | {noticed} |"
