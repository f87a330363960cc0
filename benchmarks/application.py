"""An application pod: calls the sidecar through the generated stubs, and the bare echo in the same way."""

import argparse
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from custody.v1 import (
    account_pb2,
    account_pb2_grpc,
    account_reference_pb2,
    payment_pb2,
    payment_pb2_grpc,
    signing_pb2,
    signing_pb2_grpc,
)
from google.type import money_pb2

from benchmarks.workers import Work, run_load, serve

__all__ = ["OWNER", "balances_request", "main", "sign_request"]

OWNER = "person-1"
_DOCUMENT = json.dumps({"invoice": "2026-1123", "total": "1190.00", "note": "x" * 180}).encode()
_GOOD_STATES = frozenset({payment_pb2.Payment.State.STATE_ACCEPTED, payment_pb2.Payment.State.STATE_SETTLED})


def balances_request(consent: str) -> account_pb2.ListBalancesRequest:
    return account_pb2.ListBalancesRequest(consent=consent, owner=OWNER, account="accounts/account-1")


def sign_request(consent: str) -> signing_pb2.SignRequest:
    return signing_pb2.SignRequest(
        consent=consent,
        owner=OWNER,
        request_id=str(uuid.uuid4()),
        payload_kind=signing_pb2.PayloadKind.PAYLOAD_KIND_JSON_DOCUMENT,
        payload=_DOCUMENT,
    )


async def main(arguments: Sequence[str]) -> tuple[dict[str, Any], Work]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--echo-address", required=True)
    parser.add_argument("--consent", action="append", required=True, help="PROVIDER=consents/ID")
    options = parser.parse_args(arguments)
    application = _Application(options.address, options.echo_address)
    consents = dict(text.split("=", 1) for text in options.consent)

    async def work(command: dict[str, Any]) -> dict[str, Any]:
        what, _, where = command["work"].partition("@")
        call = application.works[what]
        return await run_load(command, lambda: call(consents.get(where, where)))

    return {}, work


class _Application:
    """`works`: each takes the name of the consent (for an echo: how many bytes go and come, `GO:COME`)."""

    def __init__(self, address: str, echo_address: str) -> None:
        channel = grpc.aio.insecure_channel(address)
        self._payments = payment_pb2_grpc.PaymentServiceStub(channel)
        self._accounts = account_pb2_grpc.AccountServiceStub(channel)
        self._signing = signing_pb2_grpc.SigningServiceStub(channel)
        self._echo = grpc.aio.insecure_channel(echo_address).unary_unary("/bench.Echo/Echo", _as_it_is, _as_it_is)
        self.works: dict[str, Callable[[str], Awaitable[None]]] = {
            "payment": self.pay,
            "balances": self.balances,
            "sign": self.sign,
            "echo": self.echo,
        }

    async def pay(self, consent: str) -> None:
        request = payment_pb2.InitiatePaymentRequest(
            consent=consent,
            owner=OWNER,
            request_id=str(uuid.uuid4()),
            amount=money_pb2.Money(currency_code="EUR", units=10),
            creditor_account=account_reference_pb2.AccountReference(iban="DE75512108001245126199"),
            creditor_name="Wholesale Ltd",
            product=payment_pb2.PaymentProduct.PAYMENT_PRODUCT_SEPA_CREDIT_TRANSFER,
        )
        answer = await self._payments.InitiatePayment(request, timeout=30)
        assert answer.payment.state in _GOOD_STATES, answer.payment.state

    async def balances(self, consent: str) -> None:
        answer = await self._accounts.ListBalances(balances_request(consent), timeout=30)
        assert len(answer.balances) == 2

    async def sign(self, consent: str) -> None:
        answer = await self._signing.Sign(sign_request(consent), timeout=30)
        assert answer.detached_jws

    async def echo(self, sizes: str) -> None:
        go, _, come = sizes.partition(":")
        answer = await self._echo(int(come).to_bytes(4, "big") + bytes(int(go) - 4), timeout=30)
        assert len(answer) == int(come)


def _as_it_is(message: bytes) -> bytes:
    return message


if __name__ == "__main__":
    serve(main)
