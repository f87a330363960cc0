"""Generate docs/configuration.md from the configuration's schema, or check that the committed page is fresh.

The page says nothing of its own: keys, types, bounds and defaults are those of the structures in sidecar/config.py, and the
words beside them are their docstrings.

    tools/generate_configuration_docs.py            write docs/configuration.md
    tools/generate_configuration_docs.py --check    write nothing; exit with 1 when the page differs
"""

import argparse
import inspect as python
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import msgspec  # noqa: E402
from msgspec import inspect  # noqa: E402

from sidecar.config import Configuration, PolicyFile, scalar_names  # noqa: E402

__all__ = ["PAGE", "main", "page"]

PAGE = ROOT / "docs" / "configuration.md"

_HEAD = """\
# Configuration

Generated from `sidecar/config.py` by `tools/generate_configuration_docs.py`; do not edit.

One YAML file (`--config custody.yaml`), read once and checked whole: every mistake is reported at once, each with the key it
is at, and no value is repeated in a message. Unknown keys, keys that stand twice, aliases and tags are refused. Secrets stand
in files; the configuration only names them. `custodyctl config check` checks a file, `custodyctl config show` shows what is in
force. `examples/` and `deploy/` hold files to begin with.

A value that has one place in the file can be given on the command line (`--store.path=/data/custody.db`) or in the environment
(`CUSTODY_STORE_PATH`). The command line wins over the environment, and that over the file.
"""


def main() -> int:
    """Write the page, or with --check compare it; answers with the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--check", action="store_true", help="fail when docs/configuration.md is not what the schema gives"
    )
    fresh = page()
    if not parser.parse_args().check:
        PAGE.write_text(fresh)
        return 0
    if PAGE.exists() and PAGE.read_text() == fresh:
        return 0
    sys.stderr.write(
        "stale: docs/configuration.md\nRun tools/generate_configuration_docs.py and commit what it writes.\n"
    )
    return 1


def page() -> str:
    parts = [_HEAD, *_tables(Configuration, "The configuration file"), _overrides()]
    return "\n".join([*parts, *_tables(PolicyFile, "The policy file")]).rstrip() + "\n"


def _tables(root: type[msgspec.Struct], title: str) -> Iterator[str]:
    """A table for the structure and for each that it holds, in the order of their keys."""
    yield f"## {title}\n"
    for kind, name in _structures(_struct(root), ""):
        if name:
            yield f"### {name}\n"
        if words := _words(kind.cls):
            yield f"{words}\n"
        yield "| key | value | default |\n| --- | --- | --- |"
        yield "".join(
            f"| `{field.encode_name}` | {_cell(_said(field.type))} | {_default(field)} |\n" for field in kind.fields
        )


def _structures(kind: inspect.StructType, name: str) -> Iterator[tuple[inspect.StructType, str]]:
    yield kind, name
    for field in kind.fields:
        prefix = f"{name}.{field.encode_name}" if name else field.encode_name
        inner, is_list = _held(field.type)
        if inner is not None:
            yield from _structures(inner, prefix + ("[]" if is_list else ""))


def _held(kind: inspect.Type) -> tuple[inspect.StructType | None, bool]:
    """The structure that a value holds, and whether it is a list of them."""
    match kind:
        case inspect.Metadata():
            return _held(kind.type)
        case inspect.StructType():
            return kind, False
        case inspect.VarTupleType():
            return _held(kind.item_type)[0], True
        case inspect.UnionType():
            return next((held for one in kind.types if (held := _held(one))[0] is not None), (None, False))
        case _:
            return None, False


def _said(kind: inspect.Type) -> str:
    """A value's form in words."""
    match kind:
        case inspect.Metadata():
            extra = (kind.extra_json_schema or {}).get("description")
            return f"{_said(kind.type)}: {extra}" if extra else _said(kind.type)
        case inspect.StrType():
            return _with(
                "text",
                f"`{kind.pattern}`" if kind.pattern else "",
                _bounds(kind.min_length, kind.max_length, "characters"),
            )
        case inspect.IntType() | inspect.FloatType():
            name = "whole number" if isinstance(kind, inspect.IntType) else "number"
            above = f"above {kind.gt:g}" if kind.gt is not None else ""
            return _with(name, above, _bounds(kind.ge, kind.le, ""))
        case inspect.BoolType():
            return "`true` or `false`"
        case inspect.LiteralType():
            return " or ".join(f"`{value}`" for value in kind.values)
        case inspect.VarTupleType():
            held = _held(kind)[0]
            return _with(
                f"list of {'what follows' if held else _said(kind.item_type)}",
                _bounds(kind.min_length, kind.max_length, "entries"),
            )
        case inspect.DictType():
            return f"mapping of {_said(kind.key_type)} to {_said(kind.value_type)}"
        case inspect.UnionType():
            return " or ".join(_said(one) for one in kind.types if not isinstance(one, inspect.NoneType))
        case inspect.StructType():
            return "section, see below"
        case _:
            raise TypeError(f"the page has no words for {kind}")


def _with(name: str, *more: str) -> str:
    return ", ".join([name, *filter(None, more)])


def _bounds(least: float | None, most: float | None, unit: str) -> str:
    words = [f"at least {least:g}" if least is not None else "", f"at most {most:g}" if most is not None else ""]
    said = " and ".join(filter(None, words))
    return f"{said} {unit}".strip() if said else ""


def _default(field: inspect.Field) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    plain = msgspec.to_builtins(value)
    return "none" if plain in (None, [], {}) else "as below" if isinstance(plain, dict) else f"`{json.dumps(plain)}`"


def _overrides() -> str:
    rows = "".join(f"| `{name}` | `CUSTODY_{name.replace('.', '_').upper()}` |\n" for name in scalar_names())
    return f"## Overriding\n\n| command line `--NAME=VALUE` | environment |\n| --- | --- |\n{rows}"


def _words(kind: type) -> str:
    """The structure's docstring; msgspec gives none of its own."""
    text = kind.__dict__.get("__doc__") or ""
    return python.cleandoc(text).replace("\n", " ")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _struct(kind: type[msgspec.Struct]) -> inspect.StructType:
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return described


if __name__ == "__main__":
    sys.exit(main())
