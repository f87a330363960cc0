"""The contract keeps its own rules: everything is said, everything is bounded, and nothing can carry a token out.

The rules that a reader relies on are checked on the descriptors, so that a field added later cannot slip past them.
"""

import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google.type
import protovalidate
import pytest
from buf.validate import validate_pb2
from custody.v1 import (
    account_pb2,
    account_reference_pb2,
    audit_pb2,
    consent_pb2,
    errors_pb2,
    key_pb2,
    payment_pb2,
    periodic_limit_pb2,
    provider_pb2,
    psu_context_pb2,
    purpose_pb2,
    signing_pb2,
)
from google.api import field_behavior_pb2, field_info_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodOptions,
)
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.type import date_pb2, money_pb2

from tools import generate_error_docs, generate_stubs

ROOT = Path(__file__).resolve().parents[2]
THIRD_PARTY = ROOT / "protos" / "third_party"

_FIELD_RULES = vars(validate_pb2)["field"]

Comments = dict[tuple[int, ...], str]

FILES: tuple[FileDescriptor, ...] = tuple(
    module.DESCRIPTOR
    for module in (
        account_pb2,
        account_reference_pb2,
        audit_pb2,
        consent_pb2,
        errors_pb2,
        key_pb2,
        payment_pb2,
        periodic_limit_pb2,
        provider_pb2,
        psu_context_pb2,
        purpose_pb2,
        signing_pb2,
    )
)

# The contract, method by method: (service, method) → does it change anything or act outside, so that it needs a request_id.
METHODS = {
    "ConsentService.CreateConsent": True,
    "ConsentService.CompleteConsent": True,
    "ConsentService.GetImportKey": False,
    "ConsentService.ImportConsent": True,
    "ConsentService.GetConsent": False,
    "ConsentService.ListConsents": False,
    "ConsentService.RevokeConsent": True,
    "PaymentService.InitiatePayment": True,
    "PaymentService.GetPayment": False,
    "PaymentService.ListPayments": False,
    "PaymentService.ResolvePayment": True,
    "AccountService.ListAccounts": False,
    "AccountService.ListBalances": False,
    "AccountService.ListTransactions": False,
    "SigningService.Sign": True,
    "SigningService.ListVerificationKeys": False,
    "ProviderService.ListProviders": False,
    "ProviderService.GetProvider": False,
    "KeyService.GetStatus": False,
    "KeyService.ListKeys": False,
    "AuditService.ListEntries": False,
    "AuditService.GetCheckpoint": False,
    "AuditService.ExportLog": False,
}

# Methods that act on one consent, or on what hangs on it: they name the owner on whose behalf.
OWNED = {name for name in METHODS if re.match(r"(Consent|Payment|Account)Service\.|SigningService\.Sign$", name)} - {
    "ConsentService.GetImportKey",
    "PaymentService.ResolvePayment",  # an administrator acts, on nobody's behalf
}

# Names that speak of people, accounts, or of what lets somebody in. Every field so named is redacted.
SENSITIVE = {
    "owner", "iban", "creditor_name", "debtor_name", "owner_name", "remittance_information", "code", "iss", "error",
    "error_description", "sealed_tokens", "provider_consent_id", "authorisation_uri", "payload", "ip_address", "user_agent",
}  # fmt: skip
NOT_SENSITIVE = {"custody.v1.ErrorRule.code"}

# What an answer may hold whose name sounds like a secret, and why it is none.
HARMLESS = {
    "next_page_token": "a place in a list",
    "hsm_token": "PKCS#11 calls the device a token",
    "import_key": "holds a public key",
    "verification_keys": "public keys",
    "public_key": "public",
    "public_key_pem": "public",
    "key": "a name",
    "keys": "names, labels and attributes",
    "key_id": "a name",
    "key_type": "EC or RSA",
    "root_key": "a name",
    "master_key": "a name",
    "master_key_version": "a number",
    "user_pin_count_low": "a flag",
    "user_pin_final_try": "a flag",
    "user_pin_locked": "a flag",
}
SECRET_NAME = re.compile(
    r"token|secret|password|passw|pin(_|$)|key|credential|bearer|authorization|verifier|assertion|cookie|(^|_)code$"
)
HARMLESS_CODES = {"currency_code", "region_code"}

# Answers of the right form for every string field with a pattern, and values that each rule must refuse.
NEVER_ALLOWED = ["\n", "a\n", "\x00", "\x1b[0m", "a\tb\r\n", "\u202e", "ｅ"]


def messages(file: FileDescriptor | None = None) -> Iterator[Descriptor]:
    """All messages of the contract, nested ones included."""
    pending = [message for f in ([file] if file else FILES) for message in f.message_types_by_name.values()]
    while pending:
        message = pending.pop()
        yield message
        pending += message.nested_types


def fields() -> Iterator[FieldDescriptor]:
    return (field for message in messages() for field in message.fields)


def methods() -> Iterator[MethodDescriptor]:
    return (m for file in FILES for service in file.services_by_name.values() for m in service.methods)


def reachable(message: Descriptor) -> set[Descriptor]:
    """The message and all messages that it can hold."""
    found: set[Descriptor] = set()
    pending = [message]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending += [field.message_type for field in current.fields if field.message_type]
    return found


def rules_of(field: FieldDescriptor) -> Any:  # validate_pb2.FieldRules, which comes without types
    return field.GetOptions().Extensions[_FIELD_RULES]


def name_of(method: MethodDescriptor) -> str:
    return f"{method.containing_service.name}.{method.name}"


def request_fields() -> Iterator[FieldDescriptor]:
    """Every field that a caller can fill in, however deep, that is declared in the contract."""
    inputs = set[Descriptor]()
    for method in methods():
        inputs |= reachable(method.input_type)
    return (field for message in inputs if message.file.package == "custody.v1" for field in message.fields)


def answer_fields() -> Iterator[FieldDescriptor]:
    """Every field that a caller can be answered with, however deep."""
    answers = set[Descriptor]()
    for method in methods():
        answers |= reachable(method.output_type)
    return (field for message in answers for field in message.fields)


@pytest.fixture(scope="module")
def contract() -> FileDescriptorSet:
    return generate_stubs.describe()


def test_the_contract_has_these_methods_and_no_others() -> None:
    """No method appears or goes without this table being changed: what is not implemented is not declared."""
    assert {name_of(method) for method in methods()} == set(METHODS)


def test_one_service_a_file_and_all_files_are_known(contract: FileDescriptorSet) -> None:
    """Each file holds at most one service, and this module looks at every file of the contract."""
    assert {file.name for file in FILES} == {file.name for file in contract.file}
    assert all(len(file.services_by_name) <= 1 for file in FILES)


def test_everything_has_a_comment(contract: FileDescriptorSet) -> None:
    """Every service, method, message, field, enum and enum value says what it is, in a sentence."""
    silent = [
        f"{file.name}:{name}" for file in contract.file for name, comment in elements(file) if not is_said(comment)
    ]

    assert silent == []


def elements(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    comments = generate_error_docs.comments_of(file)
    for index, message in enumerate(file.message_type):
        yield from message_elements(message, (4, index), comments)
    for index, enum in enumerate(file.enum_type):
        yield from enum_elements(enum, (5, index), comments)
    for index, service in enumerate(file.service):
        yield service.name, comments.get((6, index), "")
        for method_index, method in enumerate(service.method):
            yield method.name, comments.get((6, index, 2, method_index), "")
    for index, extension in enumerate(file.extension):
        yield extension.name, comments.get((7, index), "")


def message_elements(message: DescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[tuple[str, str]]:
    yield message.name, comments.get(path, "")
    for index, field in enumerate(message.field):
        yield f"{message.name}.{field.name}", comments.get((*path, 2, index), "")
    for index, nested in enumerate(message.nested_type):
        yield from message_elements(nested, (*path, 3, index), comments)
    for index, enum in enumerate(message.enum_type):
        yield from enum_elements(enum, (*path, 4, index), comments)


def enum_elements(enum: EnumDescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[tuple[str, str]]:
    yield enum.name, comments.get(path, "")
    for index, value in enumerate(enum.value):
        yield f"{enum.name}.{value.name}", comments.get((*path, 2, index), "")


def is_said(comment: str) -> bool:
    return len(comment) >= 4 and comment.endswith((".", "?"))


def test_each_method_says_whether_it_repeats_who_may_call_and_what_it_refuses(contract: FileDescriptorSet) -> None:
    """A client's author learns from the method alone whether to repeat it, who may call, and which reasons to expect."""
    known = set(generate_error_docs.reason_comments(contract))
    comments = dict(generate_error_docs.method_comments(contract))

    for method, comment in comments.items():
        assert re.search(r"Idempotent: .+ Callers: .+ Reasons: .+", comment), method
        unknown = set(generate_error_docs.reasons_named(comment)) - known
        assert not unknown, f"{method} names {unknown}"
    assert len(comments) == len(METHODS)


def test_each_reason_is_answered_by_some_method_or_is_common_to_all(contract: FileDescriptorSet) -> None:
    """No reason is left over: a method names it, or the head of errors.proto says that any method may answer it."""
    head = next(file for file in contract.file if file.name.endswith("errors.proto"))
    reasons = set(generate_error_docs.reason_comments(contract))
    common = reasons & set(re.findall(r"[A-Z][A-Z_]+[A-Z]", generate_error_docs.comments_of(head)[(2,)]))
    named = set(generate_error_docs.methods_by_reason(contract))

    assert named | common == reasons
    assert named.isdisjoint(common)


def test_each_reason_has_its_row_of_the_error_table() -> None:
    """A status, known details, and advice: a reason without them could not be answered or acted on."""
    known_details = {"BadRequest", "RetryInfo", "RequestInfo"}
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values[1:]:
        rule = value.GetOptions().Extensions[errors_pb2.error_rule]

        assert rule.code > 0, value.name
        assert set(rule.details) <= known_details, value.name
        assert rule.client_action.endswith("."), value.name
        assert re.fullmatch(r"[A-Z][A-Z0-9_]{1,61}[A-Z0-9]", value.name.removeprefix("ERROR_REASON_")), value.name


def test_only_unavailable_invites_a_retry() -> None:
    """RetryInfo goes with UNAVAILABLE always and else only with a rate limit; so no client repeats what it must not."""
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values[1:]:
        rule = value.GetOptions().Extensions[errors_pb2.error_rule]
        code = generate_error_docs._code_name(rule)

        if code == "UNAVAILABLE":
            assert "RetryInfo" in rule.details, value.name
        elif "RetryInfo" in rule.details:
            assert value.name == "ERROR_REASON_RATE_LIMITED"


def test_error_page_is_fresh(contract: FileDescriptorSet) -> None:
    """docs/errors.md is what the contract gives."""
    assert (ROOT / "docs" / "errors.md").read_text() == generate_error_docs.page(contract)


def test_stubs_are_fresh() -> None:
    """The committed stubs are what protos/ gives, byte for byte."""
    assert generate_stubs.stale_files(generate_stubs.TARGET) == []


def test_a_stale_stub_is_noticed(tmp_path: Path) -> None:
    """Altered, missing and left-over stubs are named: the freshness check cannot pass on an old tree."""
    generate_stubs.generate(tmp_path)
    folder = tmp_path / "custody" / "v1"
    (folder / "consent_pb2.py").write_text("altered")
    (folder / "payment_pb2.pyi").unlink()
    (folder / "refund_pb2.py").write_text("left over")

    stale = generate_stubs.stale_files(tmp_path)

    assert stale == ["custody/v1/consent_pb2.py", "custody/v1/payment_pb2.pyi", "custody/v1/refund_pb2.py"]


def test_every_string_and_list_is_bounded() -> None:
    """No message grows without bound: every string and bytes has a maximum length, every list a maximum count."""
    unbounded = [field.full_name for field in fields() if not is_bounded(field)]

    assert unbounded == []


def is_bounded(field: FieldDescriptor) -> bool:
    rules = rules_of(field)
    if field.is_repeated:
        items = rules.repeated.items
        return bool(rules.repeated.max_items > 0) and (
            field.type != FieldDescriptor.TYPE_STRING or bool(items.string.max_len > 0)
        )
    if field.type == FieldDescriptor.TYPE_STRING:
        return bool(rules.string.max_len > 0)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bool(rules.bytes.max_len > 0 or rules.bytes.len > 0)
    return True


def test_every_string_that_comes_in_has_a_form() -> None:
    """A caller's string matches an anchored pattern: control characters and look-alikes come no further."""
    free = [
        field.full_name
        for field in request_fields()
        if field.type == FieldDescriptor.TYPE_STRING and not has_form(rules_of(field).string)
    ]

    assert free == []


def has_form(rules: Any) -> bool:
    anchored = rules.pattern.startswith("^") and rules.pattern.endswith("$")
    refuses = not any(re.search(rules.pattern.removesuffix("$") + r"\Z", text) for text in NEVER_ALLOWED)
    return bool(rules.ip) or (anchored and refuses)


def test_every_enum_that_comes_in_is_defined_only() -> None:
    """An enum value that is not in the contract is refused, whatever its number."""
    for field in request_fields():
        if field.type == FieldDescriptor.TYPE_ENUM:
            rules = rules_of(field).repeated.items if field.is_repeated else rules_of(field)
            assert rules.enum.defined_only, field.full_name


def test_required_fields_are_enforced_and_others_are_not() -> None:
    """What the annotation says is what the rule does: REQUIRED has a rule, OPTIONAL has none."""
    for field in request_fields():
        behavior = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        required = field_behavior_pb2.REQUIRED in behavior

        assert required != (field_behavior_pb2.OPTIONAL in behavior), field.full_name
        assert rules_of(field).required == required, field.full_name


def test_answers_are_output_only() -> None:
    """A field of an answer, unless callers fill in the same message, says that it is output only."""
    shared = {field.full_name for field in request_fields()}
    for field in answer_fields():
        if field.full_name.startswith("custody.v1.") and field.full_name not in shared:
            behavior = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
            assert field_behavior_pb2.OUTPUT_ONLY in behavior, field.full_name


def test_comments_agree_with_the_annotations(contract: FileDescriptorSet) -> None:
    """A comment that begins with "Required." is on a required field, and so for the others."""
    words = {"Required.": field_behavior_pb2.REQUIRED, "Optional.": field_behavior_pb2.OPTIONAL}
    words["Output only."] = field_behavior_pb2.OUTPUT_ONLY
    annotated = {
        (f.full_name.split(".")[-2], f.name): f.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        for f in fields()
    }
    comments = {name: comment for file in contract.file for name, comment in elements(file)}
    for (message, name), behavior in annotated.items():
        for word, value in words.items():
            begins = comments[f"{message}.{name}"].startswith(word)
            assert begins == (value in behavior), f"{message}.{name}"


def test_whatever_acts_needs_a_request_id() -> None:
    """Each method that changes or sends something takes a required UUID of version 4, and says that it can be repeated."""
    for method in methods():
        request_id = method.input_type.fields_by_name.get("request_id")

        assert (request_id is not None) == METHODS[name_of(method)], name_of(method)
        if request_id is not None:
            assert (
                request_id.GetOptions().Extensions[field_info_pb2.field_info].format == field_info_pb2.FieldInfo.UUID4
            )
            assert rules_of(request_id).required
            assert re.search(rules_of(request_id).string.pattern, "7c9e6679-7425-40de-944b-e07fc1f90ae7")
            assert not re.search(rules_of(request_id).string.pattern, "7c9e6679-7425-10de-944b-e07fc1f90ae7")


def test_idempotency_levels_fit() -> None:
    """Clients retry by this option: reads have no side effects, the others are idempotent by their request_id."""
    for method in methods():
        level = method.GetOptions().idempotency_level

        if method.name == "ExportLog":  # a stream, which no client takes up again by itself
            assert level == MethodOptions.IDEMPOTENCY_UNKNOWN
        else:
            wanted = MethodOptions.IDEMPOTENT if METHODS[name_of(method)] else MethodOptions.NO_SIDE_EFFECTS
            assert level == wanted, name_of(method)


def test_whatever_touches_a_consent_names_its_owner() -> None:
    """The owner is in every such request, so that a consent cannot be used on another person's behalf."""
    for method in methods():
        has_owner = "owner" in method.input_type.fields_by_name

        assert has_owner == (name_of(method) in OWNED), name_of(method)


def test_only_reads_and_revocation_may_leave_the_owner_out() -> None:
    """Administrators see and end consents without naming an owner; nothing is made or used without one."""
    may_be_empty = {
        name_of(method)
        for method in methods()
        if (owner := method.input_type.fields_by_name.get("owner")) and not rules_of(owner).required
    }

    assert may_be_empty == {
        "ConsentService.GetConsent",
        "ConsentService.ListConsents",
        "ConsentService.RevokeConsent",
        "PaymentService.GetPayment",
        "PaymentService.ListPayments",
    }


def test_lists_that_grow_are_paged() -> None:
    """A list without paging is bounded by what it lists; the others page from the first day."""
    whole = {"ListAccounts", "ListBalances", "ListVerificationKeys", "ListKeys"}
    for method in methods():
        if method.name.startswith("List"):
            asked = set(method.input_type.fields_by_name)
            paged = "page_token" in asked
            answers = method.output_type.fields_by_name

            assert paged == (method.name not in whole), method.name
            assert ("next_page_token" in answers) == paged, method.name
            # A bank's pages are as long as the bank makes them: there is nothing to ask for.
            assert ("page_size" in asked) == (paged and method.name != "ListTransactions"), method.name
            assert method.output_type.fields[0].is_repeated
            assert method.output_type.fields[0].number == 1


def test_no_answer_can_carry_a_secret() -> None:
    """A field of an answer whose name sounds like a secret is on the list of harmless ones, with its reason."""
    suspicious = {field.name for field in answer_fields() if SECRET_NAME.search(field.name)}

    assert suspicious == HARMLESS.keys() | HARMLESS_CODES


def test_what_is_written_only_cannot_be_read() -> None:
    """Write-only fields are in no answer, by name: what goes in sealed does not come out."""
    write_only = {
        field.name
        for field in request_fields()
        if field_behavior_pb2.INPUT_ONLY in field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
    }

    assert write_only == {"sealed_tokens", "provider_consent_id"}
    assert write_only.isdisjoint(field.name for field in answer_fields())


def test_sensitive_fields_are_redacted() -> None:
    """Names, account numbers, references, redirect parameters and URIs carry debug_redact, by which logs leave them out."""
    naked = [
        field.full_name
        for field in fields()
        if (field.name in SENSITIVE or field.full_name == "custody.v1.CompleteConsentRequest.state")
        and field.full_name not in NOT_SENSITIVE
        and not field.GetOptions().debug_redact
    ]

    assert naked == []
    assert {field.name for field in fields()} >= SENSITIVE


def test_no_message_has_a_float() -> None:
    """Money is exact: there is no field of a floating type anywhere."""
    floating = {FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT}

    assert [field.full_name for field in fields() if field.type in floating] == []


def test_enums_begin_unspecified() -> None:
    """The value 0 of each enum is UNSPECIFIED and carries the enum's prefix like all others."""
    enums = [enum for file in FILES for enum in file.enum_types_by_name.values()]
    enums += [enum for message in messages() for enum in message.enum_types]
    for enum in enums:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()

        assert enum.values[0].name == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(prefix) for value in enum.values)


def test_buf_lint_passes() -> None:
    """The contract keeps buf's rules STANDARD, COMMENTS and UNARY_RPC, and is formatted."""
    for arguments in (["lint"], ["format", "--diff", "--exit-code", "--path", "protos/custody"]):
        result = subprocess.run([buf(), *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)

        assert result.returncode == 0, result.stdout + result.stderr


def buf() -> str:
    return str(Path(sysconfig.get_path("scripts")) / "buf")


def test_vendored_google_protos_are_those_that_are_installed() -> None:
    """The copies under third_party are the files whose generated modules we import: one file, one meaning."""
    installed = Path(google.type.__path__[0]).parents[1]
    copies = sorted((THIRD_PARTY / "google").rglob("*.proto"))

    assert len(copies) == 5
    for copy in copies:
        assert copy.read_bytes() == (installed / copy.relative_to(THIRD_PARTY)).read_bytes(), copy.name


REQUEST_ID = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
EURO = money_pb2.Money(currency_code="EUR", units=12, nanos=340_000_000)
IBAN = account_reference_pb2.AccountReference(iban="DE89370400440532013000")
AHEAD = Timestamp(seconds=1_800_000_000)
OWNED_BY: dict[str, Any] = {"consent": "consents/a-1", "owner": "user:42"}

GOOD: dict[str, Callable[[], Message]] = {
    "create": lambda: consent_pb2.CreateConsentRequest(
        owner="user:42",
        provider="providers/sandbox-bank",
        purposes=[purpose_pb2.PURPOSE_ACCOUNTS, purpose_pb2.PURPOSE_PAYMENTS],
        accounts=[IBAN],
        expire_time=AHEAD,
        redirect_uri="https://app.example/callback?from=bank",
        psu_context=psu_context_pb2.PsuContext(ip_address="2001:db8::1", user_agent="Mozilla/5.0 (X11)"),
        payment_limit=EURO,
        request_id=REQUEST_ID,
    ),
    "complete": lambda: consent_pb2.CompleteConsentRequest(
        **OWNED_BY,
        request_id=REQUEST_ID,
        code="SplxlOBeZQQYbYS6WxSbIA",
        state="af0ifjsldkj",
        iss="https://bank.example",
    ),
    "complete with error": lambda: consent_pb2.CompleteConsentRequest(
        **OWNED_BY,
        request_id=REQUEST_ID,
        state="af0ifjsldkj",
        error="access_denied",
        error_description="The owner said no.",
    ),
    "import": lambda: consent_pb2.ImportConsentRequest(
        owner="user:42",
        provider="providers/sandbox-bank",
        purposes=[purpose_pb2.PURPOSE_ACCOUNTS],
        expire_time=AHEAD,
        access_expire_time=AHEAD,
        provider_consent_id="1234-wertiq-983",
        import_key_id="import-1",
        sealed_tokens=bytes(49),
        request_id=REQUEST_ID,
    ),
    "get consent": lambda: consent_pb2.GetConsentRequest(**OWNED_BY),
    "get consent as administrator": lambda: consent_pb2.GetConsentRequest(consent="consents/a-1"),
    "list consents": lambda: consent_pb2.ListConsentsRequest(page_size=2_000_000_000, page_token="b_-9"),
    "revoke": lambda: consent_pb2.RevokeConsentRequest(**OWNED_BY, request_id=REQUEST_ID),
    "pay": lambda: payment_pb2.InitiatePaymentRequest(
        **OWNED_BY,
        request_id=REQUEST_ID,
        amount=EURO,
        creditor_account=IBAN,
        creditor_name="O'Neil + Co. (Vienna)",
        remittance_information="Invoice 2026/11: thanks",
        end_to_end_id="INV/2026/11",
        product=payment_pb2.PAYMENT_PRODUCT_SEPA_CREDIT_TRANSFER,
    ),
    "pay without words": lambda: payment_pb2.InitiatePaymentRequest(
        **OWNED_BY,
        request_id=REQUEST_ID,
        amount=money_pb2.Money(currency_code="JPY", units=1),
        debtor_account=IBAN,
        creditor_account=IBAN,
        creditor_name="X",
        product=payment_pb2.PAYMENT_PRODUCT_INSTANT_SEPA_CREDIT_TRANSFER,
    ),
    "get payment": lambda: payment_pb2.GetPaymentRequest(payment="payments/p-1", owner="user:42"),
    "list transactions": lambda: account_pb2.ListTransactionsRequest(
        **OWNED_BY, account="accounts/3dc3d5b3-7023", date_from=date_pb2.Date(year=2026, month=1, day=1)
    ),
    "list transactions from a leap day": lambda: account_pb2.ListTransactionsRequest(
        **OWNED_BY, account="accounts/1", date_from=date_pb2.Date(year=2028, month=2, day=29), page_token="x" * 2048
    ),
    "sign": lambda: signing_pb2.SignRequest(
        **OWNED_BY, request_id=REQUEST_ID, payload_kind=signing_pb2.PAYLOAD_KIND_JSON_DOCUMENT, payload=b"{}"
    ),
}


def violations(message: Message) -> set[tuple[str, str]]:
    """The fields that a message breaks, with the rule's id; the message's own rules have no field."""
    return {
        (
            ".".join(element.field_name for element in violation.proto.field.elements) if violation.proto.field else "",
            rule,
        )
        for violation in protovalidate.collect_violations(message)
        if (rule := violation.proto.rule_id)
    }


@pytest.mark.parametrize("name", GOOD)
def test_rules_let_good_requests_through(name: str) -> None:
    """The rules refuse nothing that the contract allows."""
    assert violations(GOOD[name]()) == set()


def put(path: str, value: object) -> Callable[[Message], None]:
    """Set one field, deep in the message where the path has dots."""

    def change(message: Message) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, last, value)

    return change


def add(path: str, *values: object) -> Callable[[Message], None]:
    return lambda message: getattr(message, path).extend(values)


BAD = [
    ("create", put("owner", ""), ("owner", "required")),
    ("create", put("owner", "a b"), ("owner", "string.pattern")),
    ("create", put("owner", "x" * 65), ("owner", "string.max_len")),
    ("create", put("owner", "user:42\n"), ("owner", "string.pattern")),
    ("create", put("provider", "sandbox-bank"), ("provider", "string.pattern")),
    ("create", put("provider", "providers/Sandbox"), ("provider", "string.pattern")),
    ("create", put("provider", "providers/../x"), ("provider", "string.pattern")),
    ("create", lambda m: m.ClearField("purposes"), ("purposes", "required")),
    ("create", add("purposes", 0), ("purposes", "enum.not_in")),
    ("create", add("purposes", 99), ("purposes", "enum.defined_only")),
    ("create", add("purposes", purpose_pb2.PURPOSE_ACCOUNTS), ("purposes", "repeated.unique")),
    ("create", lambda m: m.accounts.add(iban="de89370400440532013000"), ("accounts.iban", "string.pattern")),
    ("create", lambda m: m.accounts.add(), ("accounts.iban", "required")),
    (
        "create",
        lambda m: m.accounts.add(iban=IBAN.iban, currency_code="eur"),
        ("accounts.currency_code", "string.pattern"),
    ),
    ("create", lambda m: m.accounts.extend([IBAN] * 100), ("accounts", "repeated.max_items")),
    ("create", lambda m: m.ClearField("expire_time"), ("expire_time", "required")),
    ("create", put("expire_time.seconds", 0), ("expire_time", "timestamp.gte_lt")),
    ("create", put("expire_time.seconds", 2**62), ("expire_time", "timestamp.gte_lt")),
    ("create", put("redirect_uri", ""), ("redirect_uri", "required")),
    ("create", put("redirect_uri", "javascript:alert(1)"), ("redirect_uri", "string.pattern")),
    ("create", put("redirect_uri", "https://user@app.example/"), ("redirect_uri", "string.pattern")),
    ("create", put("redirect_uri", "https://app.example/#part"), ("redirect_uri", "string.pattern")),
    ("create", put("redirect_uri", "https://app.example/\r\nX: y"), ("redirect_uri", "string.pattern")),
    ("create", put("redirect_uri", "https://app.example/%zz"), ("redirect_uri", "string.uri")),
    ("create", put("psu_context.ip_address", "example.org"), ("psu_context.ip_address", "string.ip")),
    ("create", put("psu_context.ip_address", ""), ("psu_context.ip_address", "required")),
    ("create", put("psu_context.user_agent", "x\r\nAuthorization: y"), ("psu_context.user_agent", "string.pattern")),
    ("create", put("payment_limit.units", -1), ("payment_limit", "money.amount")),
    ("create", lambda m: m.purposes.remove(purpose_pb2.PURPOSE_PAYMENTS), ("", "payment_limit.without_payments")),
    ("create", put("request_id", ""), ("request_id", "required")),
    ("create", put("request_id", REQUEST_ID.upper()), ("request_id", "string.pattern")),
    ("create", put("request_id", REQUEST_ID.replace("-40de", "-10de")), ("request_id", "string.pattern")),
    ("complete", put("state", ""), ("state", "required")),
    ("complete", put("state", "\x7f"), ("state", "string.pattern")),
    ("complete", put("code", "a\nb"), ("code", "string.pattern")),
    ("complete", put("code", "x" * 2049), ("code", "string.max_len")),
    ("complete", put("code", ""), ("", "redirect.code_or_error")),
    ("complete", put("error", "access_denied"), ("", "redirect.code_or_error")),
    ("complete", put("iss", "https://bank.example/ x"), ("iss", "string.pattern")),
    ("complete with error", put("error_description", 'a "quoted" word'), ("error_description", "string.pattern")),
    ("import", put("sealed_tokens", bytes(48)), ("sealed_tokens", "bytes.min_len")),
    ("import", put("sealed_tokens", bytes(65537)), ("sealed_tokens", "bytes.max_len")),
    ("import", put("sealed_tokens", b""), ("sealed_tokens", "required")),
    ("import", put("import_key_id", "../x"), ("import_key_id", "string.pattern")),
    ("import", put("provider_consent_id", "a\r\nb"), ("provider_consent_id", "string.pattern")),
    ("import", lambda m: m.ClearField("access_expire_time"), ("access_expire_time", "required")),
    ("import", lambda m: m.payment_limit.CopyFrom(EURO), ("", "payment_limit.without_payments")),
    ("get consent", put("consent", ""), ("consent", "required")),
    ("get consent", put("consent", "consents/" + "a" * 64), ("consent", "string.pattern")),
    ("get consent", put("consent", "consents/a-1\n"), ("consent", "string.pattern")),
    ("get consent", put("owner", " "), ("owner", "string.pattern")),
    ("list consents", put("page_size", -1), ("page_size", "int32.gte")),
    ("list consents", put("page_token", "%"), ("page_token", "string.pattern")),
    ("list consents", put("page_token", "a" * 513), ("page_token", "string.max_len")),
    ("revoke", put("request_id", "1"), ("request_id", "string.pattern")),
    ("pay", lambda m: m.ClearField("amount"), ("amount", "required")),
    ("pay", lambda m: m.amount.MergeFrom(money_pb2.Money(units=-12)), ("amount", "money.amount")),
    ("pay", put("amount.nanos", -1), ("amount", "money.amount")),
    ("pay", put("amount.nanos", 1_000_000_000), ("amount", "money.amount")),
    ("pay", put("amount.nanos", 340_000_001), ("amount", "money.amount")),
    ("pay", put("amount.units", 10**14), ("amount", "money.amount")),
    ("pay", lambda m: m.amount.CopyFrom(money_pb2.Money(currency_code="EUR")), ("amount", "money.amount")),
    ("pay", put("amount.currency_code", "eur"), ("amount", "money.currency_code")),
    ("pay", put("amount.currency_code", "EURO"), ("amount", "money.currency_code")),
    ("pay", lambda m: m.ClearField("creditor_account"), ("creditor_account", "required")),
    ("pay", put("creditor_account.iban", "DE"), ("creditor_account.iban", "string.pattern")),
    ("pay", put("creditor_account.iban", "DE89 3704 0044 0532 0130 00"), ("creditor_account.iban", "string.pattern")),
    ("pay", put("creditor_name", ""), ("creditor_name", "required")),
    ("pay", put("creditor_name", " X"), ("creditor_name", "string.pattern")),
    ("pay", put("creditor_name", "X "), ("creditor_name", "string.pattern")),
    ("pay", put("creditor_name", "Müller"), ("creditor_name", "string.pattern")),
    ("pay", put("creditor_name", "X\x00"), ("creditor_name", "string.pattern")),
    ("pay", put("creditor_name", "x" * 71), ("creditor_name", "string.max_len")),
    ("pay", put("remittance_information", "x" * 141), ("remittance_information", "string.max_len")),
    ("pay", put("remittance_information", "a\nb"), ("remittance_information", "string.pattern")),
    ("pay", put("end_to_end_id", "x" * 36), ("end_to_end_id", "string.max_len")),
    ("pay", put("end_to_end_id", "/a"), ("end_to_end_id", "string.pattern")),
    ("pay", put("end_to_end_id", "a//b"), ("end_to_end_id", "string.pattern")),
    ("pay", put("end_to_end_id", "a b"), ("end_to_end_id", "string.pattern")),
    ("pay", put("product", 0), ("product", "required")),
    ("pay", put("product", 99), ("product", "enum.defined_only")),
    ("get payment", put("payment", "consents/a-1"), ("payment", "string.pattern")),
    ("list transactions", put("account", "accounts/.."), ("account", "string.pattern")),
    ("list transactions", put("account", "accounts/a/b"), ("account", "string.pattern")),
    ("list transactions", put("account", "accounts/a%2Fb"), ("account", "string.pattern")),
    ("list transactions", put("date_from.month", 0), ("date_from", "date.full")),
    ("list transactions", put("date_to.year", 2026), ("date_to", "date.full")),
    ("list transactions", put("booking_filter", 7), ("booking_filter", "enum.defined_only")),
    ("list transactions", put("date_from.day", 32), ("date_from", "date.full")),
    ("list transactions", lambda m: m.date_from.MergeFrom(date_pb2.Date(month=2, day=29)), ("date_from", "date.full")),
    ("list transactions", lambda m: m.date_from.MergeFrom(date_pb2.Date(month=11, day=31)), ("date_from", "date.full")),
    ("sign", put("payload_kind", 0), ("payload_kind", "required")),
    ("sign", put("payload_kind", 9), ("payload_kind", "enum.defined_only")),
    ("sign", put("payload", b""), ("payload", "required")),
    ("sign", put("payload", bytes(65537)), ("payload", "bytes.max_len")),
]


@pytest.mark.parametrize(("name", "change", "expected"), BAD, ids=[f"{i}-{bad[0]}" for i, bad in enumerate(BAD)])
def test_rules_refuse(name: str, change: Callable[[Message], None], expected: tuple[str, str]) -> None:
    """Each bad value is refused by naming its field and rule, and no other field is blamed."""
    message = GOOD[name]()
    change(message)

    found = violations(message)

    assert expected in found
    assert {field for field, _ in found} <= {expected[0], ""}


def test_refusals_do_not_echo() -> None:
    """What the rules say of a bad value never holds the value."""
    message: Any = GOOD["pay"]()
    for field in ("consent", "owner", "request_id", "creditor_name", "remittance_information", "end_to_end_id"):
        setattr(message, field, "CANARY\n" * 30)
    message.creditor_account.iban = "CANARY"

    said = " ".join(violation.proto.message for violation in protovalidate.collect_violations(message))

    assert said
    assert "CANARY" not in said
