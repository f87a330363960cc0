"""Claims: each request id is used once by each caller, for ever."""

from datetime import datetime

from sqlalchemy import select

from sidecar.domain.ids import RequestId, WorkloadId
from sidecar.errors import Internal
from sidecar.ports import Claim
from sidecar.store.rows import claim_of, to_microseconds
from sidecar.store.schema import CLAIMS
from sidecar.store.statements import Connection, SqlDialect, Statement, Value, named

__all__ = ["ClaimTable"]


class ClaimTable:
    def __init__(self, dialect: SqlDialect) -> None:
        table = CLAIMS
        self._use = Statement(dialect.insert_unless_there(table), dialect)
        self._get = Statement(
            select(table.c.caller, table.c.request_id, table.c.method, table.c.digest, table.c.resource).where(
                table.c.caller == named("caller"), table.c.request_id == named("request_id")
            ),
            dialect,
        )

    def use(self, connection: Connection, claim: Claim, now: datetime) -> Claim | None:
        """None when the request id is used up by this call, else the claim that was there first (nothing is written)."""
        values: dict[str, Value] = {
            "caller": claim.caller,
            "request_id": claim.request_id,
            "method": claim.method,
            "digest": claim.digest,
            "resource": claim.resource,
            "create_time": to_microseconds(now),
        }
        if connection.change(self._use, values) == 1:
            return None
        earlier = self.get(connection, claim.caller, claim.request_id)
        if earlier is None:
            raise Internal("a request id is neither free nor used")
        return earlier

    def get(self, connection: Connection, caller: WorkloadId, request_id: RequestId) -> Claim | None:
        rows = connection.rows(self._get, {"caller": caller, "request_id": request_id})
        return claim_of(rows[0]) if rows else None
