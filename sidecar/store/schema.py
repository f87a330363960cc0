"""The tables as SQLAlchemy Core sees them. What stands in the file is made by `migrations`; a test holds the two together.

Rules: times are UTC microseconds since 1970 (integers); states and kinds are the text or number of their enumeration; amounts
are a currency and a whole number of minor units; absent is NULL only where absence means something.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeEngine

__all__ = [
    "CLAIMS",
    "CONSENTS",
    "INSTANCES",
    "LIMIT_RESERVATIONS",
    "LIMIT_WINDOWS",
    "LOG_CHECKPOINTS",
    "LOG_HEADS",
    "LOG_LEAVES",
    "MASTER_KEYS",
    "METADATA",
    "PAYMENTS",
    "REFRESH_LEASES",
    "RELOCATIONS",
    "SCHEMA_REVISION",
    "SECRETS",
    "TEXT",
]

SCHEMA_REVISION = "0004"  # the newest migration; the store works with exactly this one

METADATA = MetaData()
NUMBER = BigInteger().with_variant(Integer(), "sqlite")  # SQLite's STRICT tables know INTEGER only
TEXT = Text()
BYTES = LargeBinary()


def _column(name: str, kind: TypeEngine[Any], *constraints: ForeignKey, key: bool = False) -> Column[Any]:
    return Column(name, kind, *constraints, primary_key=key, nullable=False)


def _optional(name: str, kind: TypeEngine[Any]) -> Column[Any]:
    return Column(name, kind, nullable=True)


INSTANCES = Table(
    "instances",
    METADATA,
    _column("id", TEXT, key=True),
    Column("origin", TEXT, nullable=False, unique=True),
    _column("create_time", NUMBER),
)

CLAIMS = Table(
    "claims",
    METADATA,
    _column("caller", TEXT, key=True),
    _column("request_id", TEXT, key=True),
    _column("method", TEXT),
    _column("digest", BYTES),
    _column("resource", TEXT),
    _column("create_time", NUMBER),
)

CONSENTS = Table(
    "consents",
    METADATA,
    _column("id", TEXT, key=True),
    _column("caller", TEXT),
    _column("owner", TEXT),
    _column("provider", TEXT),
    _column("purposes", TEXT),  # JSON: sorted texts
    _column("accounts", TEXT),  # JSON: [IBAN, currency or ""] each
    _column("state", TEXT),
    _column("subject_key", BYTES),
    _column("redirect_uri", TEXT),
    _column("create_time", NUMBER),
    _column("expire_time", NUMBER),
    _optional("payment_limit_currency", TEXT),
    _optional("payment_limit_minor_units", NUMBER),
    _column("provider_consent_id", TEXT),
    _column("state_digest", BYTES),
    _column("authorisation_uri", TEXT),
    _column("wrapped_data_key", BYTES),
    _optional("access_expire_time", NUMBER),
    _optional("access_issue_time", NUMBER),
    _optional("activate_time", NUMBER),
    _optional("revoke_time", NUMBER),
    _column("failure_reason", TEXT),
    _column("version", NUMBER),
    _optional("refresh_time", NUMBER),  # when the background renews the tokens
    _column("periodic_limits", TEXT),  # JSON: [period type, alignment, currency, minor units] each
)

SECRETS = Table(
    "secrets",
    METADATA,
    _column("consent", TEXT, ForeignKey("consents.id"), key=True),
    _column("kind", NUMBER, key=True),
    _column("row_version", NUMBER, key=True),
    _column("sealed", BYTES),
)

REFRESH_LEASES = Table(
    "refresh_leases",
    METADATA,
    _column("consent", TEXT, ForeignKey("consents.id"), key=True),
    _column("holder", TEXT),
    _column("epoch", NUMBER),
    _column("expire_time", NUMBER),  # 0 once it was released
    _optional("unresolved_since", NUMBER),  # when the refresh token was first handed over, while no answer is known
)

PAYMENTS = Table(
    "payments",
    METADATA,
    _column("id", TEXT, key=True),
    _column("caller", TEXT),
    _column("request_id", TEXT),
    _column("consent", TEXT, ForeignKey("consents.id")),
    _column("owner", TEXT),
    _column("provider", TEXT),
    _column("amount_currency", TEXT),
    _column("amount_minor_units", NUMBER),
    _column("creditor_iban", TEXT),
    _column("creditor_currency", TEXT),
    _column("creditor_name", TEXT),
    _column("debtor_iban", TEXT),
    _column("debtor_currency", TEXT),
    _column("product", TEXT),
    _column("remittance_information", TEXT),
    _column("end_to_end_id", TEXT),
    _column("state", TEXT),
    _column("idempotency_class", TEXT),
    Column("bank_key", TEXT, nullable=False, unique=True),
    _column("create_time", NUMBER),
    _column("update_time", NUMBER),
    _column("epoch", NUMBER),
    _column("attempts", NUMBER),
    _column("rendered_request", BYTES),
    _column("dispatch_boot_id", TEXT),
    _column("dispatch_boot_time_ns", NUMBER),
    _optional("dispatch_time", NUMBER),
    _optional("send_deadline_time", NUMBER),
    _optional("next_attempt_time", NUMBER),
    _column("provider_payment_id", TEXT),
    _column("provider_status", TEXT),
    _column("authorisation_uri", TEXT),
    _column("status_reason", TEXT),
    _column("dispatch_epoch", NUMBER),  # of the newest permit, 0 before the first: one permit per epoch
    _optional("resolution_finding", TEXT),  # the four of a person's finding are there together or not at all
    _optional("resolution_reason", TEXT),
    _optional("resolution_administrator", TEXT),
    _optional("resolve_time", NUMBER),
    UniqueConstraint("caller", "request_id"),
    ForeignKeyConstraint(["caller", "request_id"], ["claims.caller", "claims.request_id"]),
)

LIMIT_WINDOWS = Table(
    "limit_windows",
    METADATA,
    _column("scope", TEXT, key=True),  # whose limit: `consent:ID` or `caller:WORKLOAD`
    _column("period_type", TEXT, key=True),
    _column("alignment", TEXT, key=True),
    _column("start_time", NUMBER, key=True),
    _column("currency", TEXT, key=True),
    _column("reserved", NUMBER),  # minor units of all payments that may move or have moved money
)

LIMIT_RESERVATIONS = Table(
    "limit_reservations",
    METADATA,
    _column("payment", TEXT, ForeignKey("payments.id"), key=True),
    _column("scope", TEXT, key=True),
    _column("period_type", TEXT, key=True),
    _column("alignment", TEXT, key=True),
    _column("start_time", NUMBER),
    _column("currency", TEXT),
    _column("minor_units", NUMBER),
    _column("released", NUMBER),  # 0 or 1
    ForeignKeyConstraint(
        ["scope", "period_type", "alignment", "start_time", "currency"],
        [
            "limit_windows.scope",
            "limit_windows.period_type",
            "limit_windows.alignment",
            "limit_windows.start_time",
            "limit_windows.currency",
        ],
    ),
)

MASTER_KEYS = Table(
    "master_keys",
    METADATA,
    _column("version", NUMBER, key=True),
    Column("key_id", BYTES, nullable=False, unique=True),
    _column("wrapped", BYTES),
    _column("root_key_id", TEXT),
    _column("current", NUMBER),  # 0 or 1; one row has 1
    _column("create_time", NUMBER),
)

LOG_HEADS = Table(
    "log_heads",
    METADATA,
    _column("origin", TEXT, ForeignKey("instances.origin"), key=True),
    _column("head", BYTES),  # sidecar.audit.log.LogHead
    _column("size", NUMBER),
    _column("covered_size", NUMBER),  # of the newest signed checkpoint, 0 before the first
    _column("commits", NUMBER),  # counts this instance's transactions: tells after a failed COMMIT whether it happened
)

LOG_LEAVES = Table(
    "log_leaves",
    METADATA,
    _column("origin", TEXT, ForeignKey("instances.origin"), key=True),
    _column("index", NUMBER, key=True),
    _column("entry", BYTES),
)

LOG_CHECKPOINTS = Table(
    "log_checkpoints",
    METADATA,
    _column("origin", TEXT, ForeignKey("instances.origin"), key=True),
    _column("size", NUMBER, key=True),
    _column("note", TEXT),
    _column("create_time", NUMBER),
)

# Of this database, and the one table that does not move with the vault: see `sidecar.store.relocation.marks`.
RELOCATIONS = Table(
    "relocations",
    METADATA,
    _column("number", NUMBER, key=True),  # the greatest counts
    _column("relocation", TEXT),  # a UUID, the same in both databases
    _column("step", TEXT),
    _column("origin", TEXT),  # of the log that moves
    _column("commits", NUMBER),  # of that log when the vault moved
    _column("instance", TEXT),  # the log's name where the vault moves to
    _column("place", TEXT),  # where that is
    _column("create_time", NUMBER),
)
