"""AccountService."""

from typing import Any, TypeAlias

import grpc
from custody.v1 import account_pb2 as pb
from custody.v1 import account_pb2_grpc

from sidecar.custody.accounts import AccountRead, Accounts, TransactionQuery
from sidecar.domain.ids import ConsentId, OwnerId, parse_name
from sidecar.errors import FieldViolation, InvalidField
from sidecar.gateway.boundary import current_caller
from sidecar.gateway.servicers.values import (
    BOOKING_FILTERS,
    account_message,
    balance_message,
    date_value,
    psu_value,
    transaction_message,
)

__all__ = ["AccountServicer"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AccountServicer(account_pb2_grpc.AccountServiceServicer):
    def __init__(self, *, accounts: Accounts) -> None:
        self._accounts = accounts

    async def ListAccounts(self, request: pb.ListAccountsRequest, context: Context) -> pb.ListAccountsResponse:
        accounts = await self._accounts.list_accounts(current_caller(), _read(request))
        return pb.ListAccountsResponse(accounts=[account_message(account) for account in accounts])

    async def ListBalances(self, request: pb.ListBalancesRequest, context: Context) -> pb.ListBalancesResponse:
        balances = await self._accounts.list_balances(current_caller(), _read(request, account=request.account))
        return pb.ListBalancesResponse(balances=[balance_message(balance) for balance in balances])

    async def ListTransactions(
        self, request: pb.ListTransactionsRequest, context: Context
    ) -> pb.ListTransactionsResponse:
        query = TransactionQuery(
            booking_status=BOOKING_FILTERS[request.booking_filter],
            date_from=date_value(request.date_from),
            date_to=date_value(request.date_to),
            page_token=request.page_token,
        )
        read = _read(request, account=request.account)
        page, token = await self._accounts.list_transactions(current_caller(), read, query)
        transactions = [transaction_message(transaction) for transaction in page.transactions]
        return pb.ListTransactionsResponse(transactions=transactions, next_page_token=token)


def _read(
    request: pb.ListAccountsRequest | pb.ListBalancesRequest | pb.ListTransactionsRequest, *, account: str = ""
) -> AccountRead:
    return AccountRead(
        consent=ConsentId(parse_name(request.consent, collection="consents", field="consent")),
        owner=OwnerId(request.owner),
        account=_resource_id(account) if account else "",
        psu=psu_value(request.psu_context, present=request.HasField("psu_context")),
    )


def _resource_id(name: str) -> str:
    """The provider's own id, which keeps other characters than our names do."""
    prefix, separator, identifier = name.partition("/")
    if prefix != "accounts" or not separator or not identifier:
        raise InvalidField(
            FieldViolation(field="account", rule="resource_name", description="must have the form accounts/ID")
        )
    return identifier
