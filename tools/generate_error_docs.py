"""Generate docs/errors.md from the contract, or check that the committed page is fresh.

The page says nothing of its own: meanings are the comments in errors.proto, codes, details and advice its options, and
the methods those that name the reason in their comment.

    tools/generate_error_docs.py            write docs/errors.md
    tools/generate_error_docs.py --check    write nothing; exit with 1 when the page differs
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "clients" / "python" / "src")]

from custody.v1 import errors_pb2  # noqa: E402
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet  # noqa: E402

from tools.generate_stubs import describe  # noqa: E402

PAGE = ROOT / "docs" / "errors.md"
PREFIX = "ERROR_REASON_"

# Numbers of fields in descriptor.proto, of which the paths of comments are made.
_FILE_ENUM, _ENUM_VALUE, _FILE_SERVICE, _SERVICE_METHOD = 5, 2, 6, 2

_HEAD = """\
# Errors

Generated from `protos/custody/v1` by `tools/generate_error_docs.py`; do not edit.

Every error is a `google.rpc.Status` with exactly one `google.rpc.ErrorInfo`: its `domain` is `custody.v1`, its `reason` one
of those below, and its `metadata` holds whatever varies in the message (`requestId`, `consent`, `payment`, `provider`,
`field`, `method`, `providerCode`, where they apply). No text carries a token, an account number, a name, or a value from the
request. A call that was answered with `UNAVAILABLE` may be repeated, with the same `request_id`; no other. That the outcome
of a payment is unknown is an answer, not an error: its state says so.

| reason | status | details besides ErrorInfo |
| --- | --- | --- |
"""


def main() -> int:
    """Write the page, or with --check compare it; answers with the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="fail when docs/errors.md is not what protos/ gives")
    fresh = page(describe())
    if not parser.parse_args().check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(fresh)
        return 0
    if PAGE.read_text() == fresh:
        return 0
    sys.stderr.write("stale: docs/errors.md\nRun tools/generate_error_docs.py and commit what it writes.\n")
    return 1


def page(contract: FileDescriptorSet) -> str:
    """Render the page."""
    meanings, methods = reason_comments(contract), methods_by_reason(contract)
    rows = "".join(_row(reason) for reason in meanings)
    sections = "".join(_section(reason, meaning, methods[reason]) for reason, meaning in meanings.items())
    return f"{_HEAD}{rows}{sections}"


def reason_comments(contract: FileDescriptorSet) -> dict[str, str]:
    """Answer with the comment on each reason but the unspecified one, in the order of the file."""
    file = next(file for file in contract.file if file.name == "custody/v1/errors.proto")
    values = next(enum for enum in file.enum_type if enum.name == "ErrorReason").value
    comments = comments_of(file)
    return {
        value.name.removeprefix(PREFIX): comments[(_FILE_ENUM, 0, _ENUM_VALUE, index)]
        for index, value in enumerate(values)
        if value.number
    }


def methods_by_reason(contract: FileDescriptorSet) -> Mapping[str, list[str]]:
    """Answer with the methods that name each reason in their comment; those common to all methods have none."""
    methods = defaultdict[str, list[str]](list)
    for method, comment in method_comments(contract):
        for reason in reasons_named(comment):
            methods[reason].append(method)
    return methods


def method_comments(contract: FileDescriptorSet) -> Iterator[tuple[str, str]]:
    """Go through all methods: `Service.Method` and its comment."""
    for file in contract.file:
        comments = comments_of(file)
        for service_index, service in enumerate(file.service):
            for index, method in enumerate(service.method):
                path = (_FILE_SERVICE, service_index, _SERVICE_METHOD, index)
                yield f"{service.name}.{method.name}", comments.get(path, "")


def reasons_named(comment: str) -> list[str]:
    """Read the list after `Reasons:` in a method's comment."""
    _, _, reasons = comment.partition("Reasons:")
    return re.findall(r"[A-Z][A-Z_]+[A-Z]", reasons)


def comments_of(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """Answer with the leading comment of every element that has one, by the element's path, on one line."""
    locations = file.source_code_info.location
    return {
        tuple(entry.path): " ".join(entry.leading_comments.split()) for entry in locations if entry.leading_comments
    }


def rule_of(reason: str) -> errors_pb2.ErrorRule:
    """Answer with the row of the error table that is written on a reason."""
    value = errors_pb2.ErrorReason.DESCRIPTOR.values_by_name[f"{PREFIX}{reason}"]
    rule: errors_pb2.ErrorRule = value.GetOptions().Extensions[errors_pb2.error_rule]
    return rule


def _row(reason: str) -> str:
    rule = rule_of(reason)
    return f"| [`{reason}`](#{reason.lower()}) | `{_code_name(rule)}` | {', '.join(rule.details) or '—'} |\n"


def _code_name(rule: errors_pb2.ErrorRule) -> str:
    codes = errors_pb2.ErrorRule.DESCRIPTOR.fields_by_name["code"].enum_type
    assert codes is not None
    return codes.values_by_number[rule.code].name


def _section(reason: str, meaning: str, methods: list[str]) -> str:
    named = ", ".join(f"`{method}`" for method in methods) or "any method"
    return f"\n## {reason}\n\n{meaning}\n\nClient: {rule_of(reason).client_action}\n\nAnswered by: {named}.\n"


if __name__ == "__main__":
    sys.exit(main())
