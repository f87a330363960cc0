"""What belongs to somebody else looks exactly like what does not exist, for every method that takes it."""

import uuid
from collections.abc import Iterator

import custody
import grpc
import pytest
from custody.v1 import payment_pb2
from google.protobuf.message import Message

from sidecar.domain.caller import Role
from sidecar.gateway.methods import METHODS as ALLOWED
from tests.e2e.system import CREDITOR, OWNER
from tests.rpc.calls import Method, Outcome, call, contract_methods, valid
from tests.rpc.conftest import Rpc

NOT_THERE = {"consent": "consents/c-000000000000000000000000", "payment": "payments/p-000000000000000000000000"}
APPLICATION_METHODS = [method for method in contract_methods() if Role.APPLICATION in ALLOWED[method.path]]
TAKE_A_NAME = [
    (method, field)
    for method in APPLICATION_METHODS
    for field in NOT_THERE
    if field in method.request_type.DESCRIPTOR.fields_by_name
]


@pytest.fixture(scope="module")
def consent(rpc: Rpc) -> custody.Consent:
    """An active consent of the workload `shop` and of person-1."""
    return rpc.system.shared_consent()


@pytest.fixture(scope="module")
def payment(rpc: Rpc, consent: custody.Consent) -> custody.Payment:
    return rpc.system.pay(consent, amount="1.00")


@pytest.fixture(scope="module")
def there(consent: custody.Consent, payment: custody.Payment) -> dict[str, str]:
    return {"consent": consent.name, "payment": payment.name}


def test_methods_that_take_a_name() -> None:
    """The tests below are about more than a few methods; a new one that takes a name is among them by itself."""
    assert len(TAKE_A_NAME) >= 10


@pytest.mark.parametrize(("method", "field"), TAKE_A_NAME, ids=lambda value: str(value))
def test_another_workload(rpc: Rpc, there: dict[str, str], method: Method, field: str) -> None:
    """Another workload, with every right of the policy, gets the same answer as for a name that nothing has."""
    channel = rpc.as_workload("other-application")
    before = rpc.rows()

    assert _same(_asked(channel, method, field, there[field]), _asked(channel, method, field, NOT_THERE[field]))
    assert rpc.rows() == before


@pytest.mark.parametrize(("method", "field"), TAKE_A_NAME, ids=lambda value: str(value))
def test_another_owner(rpc: Rpc, there: dict[str, str], method: Method, field: str) -> None:
    """The same workload on behalf of another person gets the same answer as for a name that nothing has."""
    channel = rpc.application
    before = rpc.rows()

    mine = _asked(channel, method, field, there[field], owner="person-2")

    assert _same(mine, _asked(channel, method, field, NOT_THERE[field], owner="person-2"))
    assert rpc.rows() == before


@pytest.mark.parametrize(("method", "field"), TAKE_A_NAME, ids=lambda value: str(value))
def test_without_an_owner(rpc: Rpc, there: dict[str, str], method: Method, field: str) -> None:
    """An application that leaves the owner out does not get around the check."""
    mine = _asked(rpc.application, method, field, there[field], owner="")

    assert _same(mine, _asked(rpc.application, method, field, NOT_THERE[field], owner=""))
    assert mine.code is not grpc.StatusCode.OK


def test_lists_hold_only_what_is_ones_own(rpc: Rpc, methods: dict[str, Method], there: dict[str, str]) -> None:
    """Neither another workload nor another owner finds the consent or the payment in a list; who made them does."""
    for name in ("ListConsents", "ListPayments"):
        request = {"consent": "", "states": []} if name == "ListPayments" else {}
        method = methods[name]

        assert _names(call(rpc.application, method, valid(method, **request)))
        assert _names(call(rpc.as_workload("other-application"), method, valid(method, **request))) == []
        others = _names(call(rpc.application, method, valid(method, **{**request, "owner": "person-2"})))
        assert not set(others) & set(there.values())


def test_page_token_of_another_workload(rpc: Rpc, methods: dict[str, Method], there: dict[str, str]) -> None:
    """A page token is no key: with it another workload still sees its own rows only."""
    first = call(rpc.operator, methods["ListConsents"], methods["ListConsents"].request_type(page_size=1)).answer
    assert first is not None
    token = getattr(first, "next_page_token", "") or "Y29uc2VudHMvYw"  # consents/c: before every id

    answer = call(
        rpc.as_workload("other-application"), methods["ListConsents"], valid(methods["ListConsents"], page_token=token)
    )

    assert _names(answer) == []


def test_request_ids_are_each_workloads_own(rpc: Rpc, methods: dict[str, Method], consent: custody.Consent) -> None:
    """A request id that one workload used tells another nothing: not even that it was used."""
    request_id = str(uuid.uuid4())
    rpc.system.pay(consent, amount="1.00", request_id=request_id)
    channel = rpc.as_workload("other-application")

    used = _pay(channel, methods, consent.name, request_id)
    unused = _pay(channel, methods, consent.name, str(uuid.uuid4()))

    assert _same(used, unused)


def test_lists_by_state(rpc: Rpc, methods: dict[str, Method], payment: custody.Payment) -> None:
    """A list holds the payments in the states that were asked for, and no others."""
    settled, unsettled = payment_pb2.Payment.STATE_SETTLED, payment_pb2.Payment.STATE_IN_PROGRESS
    rpc.system.client.payments.wait(payment.name)

    def listed(*states: payment_pb2.Payment.State.ValueType) -> list[str]:
        request = valid(methods["ListPayments"], consent="", page_size=200, states=states)
        return _names(call(rpc.application, methods["ListPayments"], request))

    assert payment.name in listed(settled)
    assert payment.name in listed(settled, unsettled)
    assert payment.name not in listed(unsettled)


def test_administrators_see_all(rpc: Rpc, methods: dict[str, Method], there: dict[str, str]) -> None:
    """What was hidden above is there: an administrator reads both without naming an owner."""
    for name, field in (("GetConsent", "consent"), ("GetPayment", "payment")):
        request = methods[name].request_type(**{field: there[field]})
        assert call(rpc.as_workload("administrator", "tcp-admin"), methods[name], request).code is grpc.StatusCode.OK


def _asked(channel: grpc.Channel, method: Method, field: str, name: str, *, owner: str = OWNER) -> Outcome:
    return call(channel, method, valid(method, **{field: name, "owner": owner}))


def _pay(channel: grpc.Channel, methods: dict[str, Method], consent: str, request_id: str) -> Outcome:
    method = methods["InitiatePayment"]
    account = {"iban": CREDITOR, "currency_code": "EUR"}
    return call(channel, method, valid(method, consent=consent, request_id=request_id, creditor_account=account))


def _same(one: Outcome, other: Outcome) -> bool:
    """Whether a caller could tell the two apart."""
    assert one.code in (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT), one
    if one.code is grpc.StatusCode.OK:
        return one.answer == other.answer and not _names(one)
    return (one.code, one.message, one.status) == (other.code, other.message, other.status)


def _names(outcome: Outcome) -> list[str]:
    assert outcome.answer is not None, outcome
    return list(_all_names(outcome.answer))


def _all_names(answer: Message) -> Iterator[str]:
    for _, value in answer.ListFields():
        if not isinstance(value, str):
            yield from (item.name for item in value)
