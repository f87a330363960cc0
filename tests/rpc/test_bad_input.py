"""Every field of every request, wrong in every way: INVALID_ARGUMENT that names field and rule, nothing written, nothing echoed.

The fields come from the contract's descriptors, so a field that is added is tried, too; what is wrong comes from the tables here.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from buf.validate import validate_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from sidecar.domain.caller import Role
from sidecar.gateway.methods import METHODS as ALLOWED
from tests.rpc.calls import Method, Outcome, call, contract_methods, details_of, valid
from tests.rpc.conftest import Rpc

MARK = "zzechoed"  # stands in every text that is sent here, and must be in nothing that comes back or stays
RTL = "\u202e"
# Redirects and headers are opaque text of others: in these a blank is as good as any other character.
BLANKS_ALLOWED = frozenset({"code", "state", "error", "error_description", "user_agent"})
# OAuth's own character sets (RFC 6749 appendix A) allow what elsewhere is a wrong form.
ANY_PRINTABLE = BLANKS_ALLOWED | {"iss", "reason"}  # an administrator's words are shown to people only
METHODS = {str(method): method for method in contract_methods()}


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """`field` is the path that the answer must name."""

    method: str
    what: str
    field: str
    request: Message

    def __str__(self) -> str:
        return f"{self.method}: {self.field} {self.what}"


def cases(method: Method) -> Iterator[Wrong]:
    base = valid(method)
    for path, field, parent_path in _fields(base):
        for what, named, change in _changes(field, path):
            request = copy.deepcopy(base)
            change(_at(request, parent_path))
            yield Wrong(method=str(method), what=what, field=named, request=request)
    for parent in _messages(base):
        request = copy.deepcopy(base)
        _add_unknown_field(_at(request, parent))
        yield Wrong(
            method=str(method), what="has an unknown field", field=_text(parent) or "(request)", request=request
        )


# --- the tables ---------------------------------------------------------------------------------------------------------

Change = tuple[str, str, Callable[[Any], None]]


def _changes(field: FieldDescriptor, path: str) -> Iterator[Change]:
    """What can be wrong with a field: name, the path that must be named, and how to make it so in the parent message."""
    if field.is_repeated:
        yield from _wrong_lists(field, path)
    elif field.message_type is not None:
        yield from _wrong_messages(field, path)
    elif field.type == FieldDescriptor.TYPE_STRING:
        for what, value in _wrong_texts(field):
            yield what, path, _set(field.name, value)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        for what, data in _wrong_bytes(field):
            yield what, path, _set(field.name, data)
    elif field.enum_type is not None:
        numbers = {"is an unknown value": 999, "is negative": -1, "is the last number": 2**31 - 1}
        if _is_required(field):
            numbers["is unspecified"] = 0
        for what, number in numbers.items():
            yield what, path, _set(field.name, number)
    elif field.name == "page_size":
        yield "is negative", path, _set(field.name, -1)
        yield "is the least number", path, _set(field.name, -(2**31))


def _wrong_texts(field: FieldDescriptor) -> Iterator[tuple[str, str]]:
    longest = _rules(field).string.max_len
    good = MARK if field.name != "user_agent" else f"{MARK}/1.0"
    yield "is 1 too long", (MARK + "a" * longest)[: longest + 1]
    yield "is 10 times too long", MARK + "a" * (longest * 10)
    for name, character in {"NUL": "\0", "LF": "\n", "CR": "\r", "ESC": "\x1b", "DEL": "\x7f", "C1": "\x85"}.items():
        yield f"has a {name}", f"{good}{character}x"
        yield f"ends with a {name}", f"{good}{character}"
    yield "has a right-to-left override", f"{good}{RTL}x"
    yield "has a zero-width space", f"{good}\u200bx"
    yield "has full-width digits", f"{good}\uff11"
    yield "has a letter that looks like another", f"{good}\u0430"
    if _is_required(field):
        yield "is empty", ""
    if field.name not in BLANKS_ALLOWED:
        yield "begins with a blank", f" {good}"
        yield "ends with a blank", f"{good} "
    if field.name not in ANY_PRINTABLE and field.name not in ("creditor_name", "remittance_information"):
        yield "has another form", f"{MARK} ' ; -- ../%00${{x}}"
        yield "is JSON", f'{{"{MARK}": 1}}'


def _wrong_bytes(field: FieldDescriptor) -> Iterator[tuple[str, bytes]]:
    longest = _rules(field).bytes.max_len
    yield "is empty", b""
    yield "is 1 too long", MARK.encode() + bytes(longest + 1 - len(MARK))


def _wrong_lists(field: FieldDescriptor, path: str) -> Iterator[Change]:
    most = _rules(field).repeated.max_items

    def fill(parent: Any) -> None:
        items = getattr(parent, field.name)
        first = copy.deepcopy(items[0])
        while len(items) <= most:
            items.append(first)

    yield "has too many members", path, fill
    if field.enum_type is not None:
        for what, number in {"is unknown": 999, "is negative": -1, "is unspecified": 0}.items():
            yield f"has a member that {what}", f"{path}[1]", _replace(field.name, 1, number)
        yield (
            "has a member twice",
            path,
            lambda parent: getattr(parent, field.name).append(getattr(parent, field.name)[0]),
        )
    if _is_required(field):
        yield "is empty", path, lambda parent: parent.ClearField(field.name)


def _wrong_messages(field: FieldDescriptor, path: str) -> Iterator[Change]:
    if _is_required(field):
        yield "is missing", path, lambda parent: parent.ClearField(field.name)
    kind = field.message_type
    assert kind is not None
    match kind.full_name:
        case "google.type.Money":
            for what, values in WRONG_MONEY.items():
                yield what, path, _merge(field.name, values)
        case "google.type.Date":
            for what, values in WRONG_DATES.items():
                yield what, path, _merge(field.name, values)
        case "google.protobuf.Timestamp":
            for what, values in WRONG_TIMES.items():
                yield what, path, _merge(field.name, values)


WRONG_MONEY: dict[str, dict[str, Any]] = {
    "is nothing": {"units": 0, "nanos": 0},
    "is negative": {"units": -1, "nanos": 0},
    "has negative nanos": {"units": 1, "nanos": -1_000_000},
    "has negative units and positive nanos": {"units": -1, "nanos": 1_000_000},
    "has too many nanos": {"units": 1, "nanos": 1_000_000_000},
    "has the most nanos": {"units": 1, "nanos": 2**31 - 1},
    "has the least nanos": {"units": 1, "nanos": -(2**31)},
    "has a fraction of a thousandth": {"units": 1, "nanos": 1},
    "has the most units": {"units": 2**63 - 1, "nanos": 0},
    "has the least units": {"units": -(2**63), "nanos": 0},
    "is 10^14": {"units": 10**14, "nanos": 0},
    "has no currency": {"currency_code": ""},
    "has a currency in small letters": {"currency_code": "eur"},
    "has a currency that ends with a line": {"currency_code": "EUR\n"},
    "has a currency with a NUL": {"currency_code": "EU\0"},
    "has a long currency": {"currency_code": "EURO"},
    "has a currency of 10 kB": {"currency_code": "E" * 10_000},
    "has a full-width currency": {"currency_code": "\uff25\uff35\uff32"},
}
WRONG_DATES: dict[str, dict[str, Any]] = {
    "has no year": {"year": 0},
    "has no month": {"month": 0},
    "has no day": {"day": 0},
    "is the 30th of February": {"month": 2, "day": 30},
    "is the 29th of February of a common year": {"year": 2025, "month": 2, "day": 29},
    "is the 31st of April": {"month": 4, "day": 31},
    "is the 32nd": {"day": 32},
    "is in the 13th month": {"month": 13},
    "is negative": {"day": -1},
    "is in the year 10000": {"year": 10_000},
    "is in the year 1": {"year": 1},
    "has the last number": {"year": 2**31 - 1},
}
WRONG_TIMES: dict[str, dict[str, Any]] = {
    "is the beginning of time": {"seconds": 0, "nanos": 0},
    "is before it": {"seconds": -1, "nanos": 0},
    "is in the year 1": {"seconds": -62135596800, "nanos": 0},
    "is in the year 9999": {"seconds": 253402300799, "nanos": 0},
    "is after the year 9999": {"seconds": 253402300800, "nanos": 0},
    "has the last number": {"seconds": 2**63 - 1, "nanos": 0},
    "has the least number": {"seconds": -(2**63), "nanos": 0},
    "has negative nanos": {"nanos": -1},
    "has 10^9 nanos": {"nanos": 10**9},
    "has the most nanos": {"nanos": 2**31 - 1},
    "has the least nanos": {"nanos": -(2**31)},
}


# --- the tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.request_type.DESCRIPTOR.fields])
def test_every_field_in_every_way(rpc: Rpc, name: str) -> None:
    """Each wrong request is answered with INVALID_ARGUMENT, the field and a rule; no row is written; nothing is echoed."""
    method = METHODS[name]
    channel = _channel(rpc, method)
    before = rpc.rows()
    wrong = list(cases(method))
    failures = [failure for case in wrong if (failure := _judged(case, call(channel, method, case.request)))]

    assert len(wrong) >= 5
    assert failures == []
    assert rpc.rows() == before
    assert MARK.encode() not in rpc.written()


@pytest.mark.parametrize("name", METHODS)
def test_valid_requests_are_valid(rpc: Rpc, name: str) -> None:
    """The requests that the cases are made from keep every rule: what was refused was refused for the one thing wrong."""
    if METHODS[name].path.startswith("/custody.v1.ConsentService/CreateConsent"):
        request = valid(METHODS[name], provider="providers/no-such-bank")  # a real one would make a consent
    else:
        request = valid(METHODS[name])
    channel = _channel(rpc, METHODS[name])

    outcome = call(channel, METHODS[name], request)

    assert outcome.code is not grpc.StatusCode.INTERNAL
    assert not [field for field in outcome.violations if field != "sealed_tokens"], outcome.violations


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.request_type.DESCRIPTOR.fields])
def test_bytes_that_are_no_text(rpc: Rpc, name: str) -> None:
    """Text that is not UTF-8, in any field at any depth, is refused with a reason, not by gRPC without one."""
    method = METHODS[name]
    channel = _channel(rpc, method)
    before = rpc.rows()
    tried = 0

    for path, field, parent in _fields(valid(method)):
        if field.type != FieldDescriptor.TYPE_STRING or field.is_repeated:
            continue
        request = valid(method)
        setattr(_at(request, parent), field.name, MARK)
        for broken in (b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80"):
            data = request.SerializeToString()
            outcome = call(channel, method, data.replace(MARK.encode(), (broken + MARK.encode())[: len(MARK)], 1))
            assert (outcome.code, outcome.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"), path
            assert outcome.violations == {"(request)": "ENCODING"}
            tried += 1

    assert tried
    assert rpc.rows() == before


BROKEN_MESSAGES = {
    "a tag without a value": b"\x0a",
    "a length beyond the end": b"\x0a\x7f\x41",
    "an endless text": b"\x0a\xff\xff\xff\xff\x07",
    "an endless varint": b"\x08" + b"\xff" * 11,
    "a group that is not closed": b"\x0b",
    "a group that was not opened": b"\x0c",
    "wire type 7": b"\x0f\x01",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "noise": bytes(range(255, 0, -1)),
}


@pytest.mark.parametrize("what", BROKEN_MESSAGES)
def test_bytes_that_are_no_message(rpc: Rpc, what: str) -> None:
    """Bytes that do not parse are INVALID_ARGUMENT with a reason, for every method."""
    for method in METHODS.values():
        channel = _channel(rpc, method)
        outcome = call(channel, method, BROKEN_MESSAGES[what])

        assert (outcome.code, outcome.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"), method
        assert outcome.violations == {"(request)": "ENCODING"}


def test_wrong_wire_type_is_an_unknown_field(rpc: Rpc) -> None:
    """A number where text belongs does not pass as absence."""
    outcome = call(rpc.application, METHODS["GetProvider"], b"\x08\x01")

    assert outcome.reason == "FIELD_INVALID"
    assert outcome.violations == {"provider": "REQUIRED", "(request)": "UNKNOWN_FIELD"}


def test_last_of_a_scalar_given_twice_is_checked(rpc: Rpc) -> None:
    """Protobuf lets the last one win: so it is the last one that is checked, and no rule is passed with the first."""
    good = valid(METHODS["GetProvider"]).SerializeToString()
    bad = METHODS["GetProvider"].request_type(provider=f"providers/{MARK}!").SerializeToString()

    assert call(rpc.application, METHODS["GetProvider"], good + bad).violations == {"provider": "STRING_PATTERN"}


RULES_BETWEEN_FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    **{
        f"{what} without payments: {name}": (name, {"purposes": [1], other: None}, rule)
        for name in ("CreateConsent", "ImportConsent")
        for what, other, rule in (
            ("a limit", "periodic_limits", "PAYMENT_LIMIT_WITHOUT_PAYMENTS"),
            ("a limit of a period", "payment_limit", "PERIODIC_LIMITS_WITHOUT_PAYMENTS"),
        )
    },
    "both code and error": ("CompleteConsent", {"error": "access_denied"}, "REDIRECT_CODE_OR_ERROR"),
    "neither code nor error": ("CompleteConsent", {"code": ""}, "REDIRECT_CODE_OR_ERROR"),
}


@pytest.mark.parametrize("what", RULES_BETWEEN_FIELDS)
def test_rules_between_fields(rpc: Rpc, what: str) -> None:
    """What two fields break together is said of the request."""
    name, changes, rule = RULES_BETWEEN_FIELDS[what]
    before = rpc.rows()

    outcome = call(rpc.application, METHODS[name], valid(METHODS[name], **changes))

    assert outcome.violations == {"(request)": rule}
    assert rpc.rows() == before


WRONG_LIMITS: dict[str, tuple[Callable[[Any], None], dict[str, str]]] = {
    "a period twice": (
        lambda limits: limits[1].CopyFrom(limits[0]),
        {"periodic_limits[1]": "UNIQUE"},
    ),
    "another currency than the single limit's": (
        lambda limits: _merge("amount", {"currency_code": "GBP"})(limits[1]),
        {"periodic_limits[1].amount.currency_code": "CURRENCY"},
    ),
    "more decimals than the currency has": (
        lambda limits: _merge("amount", {"units": 1, "nanos": 5_000_000})(limits[0]),
        {"periodic_limits[0].amount.nanos": "DECIMALS"},
    ),
    "a currency that is none": (
        lambda limits: _merge("amount", {"currency_code": "XXX"})(limits[0]),
        {"periodic_limits[0].amount.currency_code": "CURRENCY"},
    ),
}


@pytest.mark.parametrize("what", WRONG_LIMITS)
def test_limits_that_contradict_each_other(rpc: Rpc, what: str) -> None:
    """Each mistake between the limits of a consent is named by the place of the limit; no consent is made."""
    change, violations = WRONG_LIMITS[what]
    request: Any = valid(METHODS["CreateConsent"], redirect_uri=rpc.system.development.redirect_uri)
    change(request.periodic_limits)
    before = rpc.rows()

    outcome = call(rpc.application, METHODS["CreateConsent"], request)

    assert outcome.violations == violations
    assert rpc.rows() == before


def test_more_mistakes_than_an_answer_holds(rpc: Rpc) -> None:
    """A request with hundreds of mistakes gets an answer that a client can read, with the first of them."""
    accounts = [{"iban": f"{MARK}{number}", "currency_code": "?"} for number in range(300)]
    request = valid(METHODS["CreateConsent"], accounts=accounts)

    outcome = call(rpc.application, METHODS["CreateConsent"], request)

    assert outcome.reason == "FIELD_INVALID"
    assert 1 <= len(outcome.violations) <= 16
    assert len(outcome.shown()) < 8000
    assert MARK.encode() not in outcome.shown()


PAGE_TOKENS = {
    "of another collection": "cGF5bWVudHMvcC0x",
    "without an id": "Y29uc2VudHMv",
    "that is no base64": "A",
    "that is no text": "_____w",
    "with a blank": "Y29uc2VudHMvIA",
    "that goes up": "Y29uc2VudHMvLi4vLi4v",
    "with a NUL": "Y29uc2VudHMvAA",
    "of text": "Y29uc2VudHM",
}


@pytest.mark.parametrize("what", PAGE_TOKENS)
@pytest.mark.parametrize("name", ["ListConsents", "ListPayments", "ListProviders", "ListEntries", "ListTransactions"])
def test_page_tokens_that_no_page_gave(rpc: Rpc, name: str, what: str) -> None:
    """A token that was made up is refused as such, or begins a page of nothing but what the caller may see; never a defect."""
    method = METHODS[name]
    channel = _channel(rpc, method)
    fields = {"consent": ""} if name == "ListPayments" else {}

    outcome = call(channel, method, valid(method, page_token=PAGE_TOKENS[what], **fields))

    if outcome.code is grpc.StatusCode.OK or outcome.code is grpc.StatusCode.NOT_FOUND:
        return
    assert outcome.violations == {"page_token": "PAGE_TOKEN"}


def test_largest_page(rpc: Rpc) -> None:
    """A page size above the largest is clamped, the greatest number too (AIP-158)."""
    for name in ("ListConsents", "ListPayments", "ListProviders", "ListEntries"):
        channel = _channel(rpc, METHODS[name])
        fields = {"consent": "", "payment": ""} if name == "ListEntries" else {}
        if name == "ListPayments":
            fields = {"consent": ""}
        assert (
            call(channel, METHODS[name], valid(METHODS[name], page_size=2**31 - 1, **fields)).code is grpc.StatusCode.OK
        )


# --- helpers ------------------------------------------------------------------------------------------------------------


def _channel(rpc: Rpc, method: Method) -> grpc.Channel:
    """One on which the method may be called."""
    return rpc.application if Role.APPLICATION in ALLOWED[method.path] else rpc.operator


Step = tuple[str, int | None]


def _fields(message: Message, at: tuple[Step, ...] = ()) -> Iterator[tuple[str, Any, tuple[Step, ...]]]:
    """Every field of the contract in `message`, at any depth: its path, itself, and where the message that has it stands."""
    for field in message.DESCRIPTOR.fields:
        yield _text((*at, (field.name, None))), field, at
        if field.message_type is None or not field.message_type.full_name.startswith("custody."):
            continue
        if field.is_repeated:
            for index, item in enumerate(getattr(message, field.name)):
                yield from _fields(item, (*at, (field.name, index)))
        else:
            yield from _fields(getattr(message, field.name), (*at, (field.name, None)))


def _messages(message: Message, at: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """Where every message stands in `message`, itself first."""
    yield at
    for field, value in message.ListFields():
        if field.message_type is not None:
            for index, item in enumerate(value if field.is_repeated else [value]):
                yield from _messages(item, (*at, (field.name, index if field.is_repeated else None)))


def _at(message: Any, path: tuple[Step, ...]) -> Any:
    for name, index in path:
        message = getattr(message, name)
        if index is not None:
            message = message[index]
    return message


def _text(path: tuple[Step, ...]) -> str:
    return ".".join(name if index is None else f"{name}[{index}]" for name, index in path)


def _set(name: str, value: object) -> Callable[[Any], None]:
    return lambda parent: setattr(parent, name, value)


def _replace(name: str, index: int, value: object) -> Callable[[Any], None]:
    def change(parent: Any) -> None:
        getattr(parent, name)[index] = value

    return change


def _merge(name: str, values: dict[str, Any]) -> Callable[[Any], None]:
    def change(parent: Any) -> None:
        message = getattr(parent, name)
        for key, value in values.items():
            setattr(message, key, value)
        message.SetInParent()

    return change


def _add_unknown_field(message: Any) -> None:
    text = MARK.encode()
    message.MergeFromString(b"\xfa\xff\x0f" + bytes([len(text)]) + text)  # field 32767, length-delimited


def _rules(field: FieldDescriptor) -> Any:
    return field.GetOptions().Extensions[validate_pb2.field]  # type: ignore[attr-defined]


def _is_required(field: FieldDescriptor) -> bool:
    return bool(_rules(field).required)


def _judged(case: Wrong, outcome: Outcome) -> str:
    """What is wrong with the answer to a wrong request; "" for nothing."""
    if outcome.code is not grpc.StatusCode.INVALID_ARGUMENT or outcome.status is None:
        return f"{case}: answered {outcome.code} {outcome.message!r}"
    if outcome.reason != "FIELD_INVALID" or outcome.info.domain != "custody.v1":
        return f"{case}: reason {outcome.reason}"
    if case.field not in outcome.violations:
        return f"{case}: named {outcome.violations}"
    kinds = [packed.TypeName() for packed in outcome.status.details]
    if sorted(kinds) != ["google.rpc.BadRequest", "google.rpc.ErrorInfo"]:
        return f"{case}: details {kinds}"
    (request,) = details_of(outcome.status, error_details_pb2.BadRequest)
    if not all(re.fullmatch(r"[A-Z][A-Z0-9_]*", v.reason) and v.description for v in request.field_violations):
        return f"{case}: a violation without rule or description"
    return f"{case}: echoed" if MARK.encode() in outcome.shown() else ""
