"""The table of seeded defects, as docs/reliability.md shows it."""

from tests.model.defects import DEFECTS, Defect

__all__ = ["BEGIN", "END", "defect_table"]

BEGIN = "<!-- begin: python -m tests.model --write -->"
END = "<!-- end -->"


def defect_table() -> str:
    lines = ["| rule | left out | where | what breaks | test |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(lines + [_line(defect) for defect in DEFECTS]) + "\n"


def _line(defect: Defect) -> str:
    breaks = defect.breaks or f"nothing: {defect.why}"
    return f"| {defect.rule} | {defect.left_out} | {defect.world} | {breaks} | `{defect.name}` |"
