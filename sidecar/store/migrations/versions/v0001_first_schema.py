"""The first schema.

A migration is never edited once it was released, and there is no way back: a newer file is refused by an older sidecar.
The text stands here in full, and not in terms of `sidecar.store.schema`, because that module moves on and this one must not.

What the database itself holds, whatever our code does: claims, tombstones and payments are never deleted; a final payment never
changes; what a payment orders never changes; epochs never go back; the log only grows.
"""

from alembic import op

from sidecar.store.migrations.guards import in_its_words, refuses_truncate

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TABLES = (
    """
    CREATE TABLE instances (
      id TEXT NOT NULL PRIMARY KEY,
      origin TEXT NOT NULL UNIQUE,
      create_time INTEGER NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE claims (
      caller TEXT NOT NULL,
      request_id TEXT NOT NULL,
      method TEXT NOT NULL,
      digest BLOB NOT NULL,
      resource TEXT NOT NULL,
      create_time INTEGER NOT NULL,
      PRIMARY KEY (caller, request_id)
    ) STRICT
    """,
    """
    CREATE TABLE consents (
      id TEXT NOT NULL PRIMARY KEY,
      caller TEXT NOT NULL,
      owner TEXT NOT NULL,
      provider TEXT NOT NULL,
      purposes TEXT NOT NULL,
      accounts TEXT NOT NULL,
      state TEXT NOT NULL CHECK (state IN ('created', 'awaiting-authorisation', 'completing', 'active',
        'needs-reauthorisation', 'revoked', 'expired', 'failed')),
      subject_key BLOB NOT NULL,
      redirect_uri TEXT NOT NULL,
      create_time INTEGER NOT NULL,
      expire_time INTEGER NOT NULL,
      payment_limit_currency TEXT,
      payment_limit_minor_units INTEGER,
      provider_consent_id TEXT NOT NULL,
      state_digest BLOB NOT NULL,
      authorisation_uri TEXT NOT NULL,
      wrapped_data_key BLOB NOT NULL,
      access_expire_time INTEGER,
      access_issue_time INTEGER,
      activate_time INTEGER,
      revoke_time INTEGER,
      failure_reason TEXT NOT NULL,
      version INTEGER NOT NULL CHECK (version >= 1),
      CHECK ((payment_limit_currency IS NULL) = (payment_limit_minor_units IS NULL))
    ) STRICT
    """,
    """
    CREATE TABLE secrets (
      consent TEXT NOT NULL REFERENCES consents (id),
      kind INTEGER NOT NULL CHECK (kind BETWEEN 1 AND 6),
      row_version INTEGER NOT NULL CHECK (row_version >= 1),
      sealed BLOB NOT NULL CHECK (length(sealed) > 0),
      PRIMARY KEY (consent, kind, row_version)
    ) STRICT
    """,
    """
    CREATE TABLE refresh_leases (
      consent TEXT NOT NULL PRIMARY KEY REFERENCES consents (id),
      holder TEXT NOT NULL,
      epoch INTEGER NOT NULL CHECK (epoch >= 1),
      expire_time INTEGER NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE payments (
      id TEXT NOT NULL PRIMARY KEY,
      caller TEXT NOT NULL,
      request_id TEXT NOT NULL,
      consent TEXT NOT NULL REFERENCES consents (id),
      owner TEXT NOT NULL,
      provider TEXT NOT NULL,
      amount_currency TEXT NOT NULL CHECK (length(amount_currency) = 3),
      amount_minor_units INTEGER NOT NULL CHECK (amount_minor_units > 0),
      creditor_iban TEXT NOT NULL,
      creditor_currency TEXT NOT NULL,
      creditor_name TEXT NOT NULL,
      debtor_iban TEXT NOT NULL,
      debtor_currency TEXT NOT NULL,
      product TEXT NOT NULL CHECK (product IN ('sepa-credit-transfer', 'instant-sepa-credit-transfer')),
      remittance_information TEXT NOT NULL,
      end_to_end_id TEXT NOT NULL,
      state TEXT NOT NULL CHECK (state IN ('intent', 'dispatched', 'reconciling', 'awaiting-authorisation', 'accepted',
        'settled', 'rejected', 'rejected-late', 'cancelled', 'abandoned', 'needs-attention')),
      idempotency_class TEXT NOT NULL CHECK (idempotency_class IN ('A', 'B', 'C')),
      bank_key TEXT NOT NULL UNIQUE CHECK (bank_key <> ''),
      create_time INTEGER NOT NULL,
      update_time INTEGER NOT NULL,
      epoch INTEGER NOT NULL CHECK (epoch >= 1),
      attempts INTEGER NOT NULL CHECK (attempts >= 0),
      rendered_request BLOB NOT NULL,
      dispatch_boot_id TEXT NOT NULL,
      dispatch_boot_time_ns INTEGER NOT NULL CHECK (dispatch_boot_time_ns >= 0),
      dispatch_time INTEGER,
      send_deadline_time INTEGER,
      next_attempt_time INTEGER,
      provider_payment_id TEXT NOT NULL,
      provider_status TEXT NOT NULL,
      authorisation_uri TEXT NOT NULL,
      status_reason TEXT NOT NULL,
      dispatch_epoch INTEGER NOT NULL CHECK (dispatch_epoch BETWEEN 0 AND epoch),
      UNIQUE (caller, request_id),
      FOREIGN KEY (caller, request_id) REFERENCES claims (caller, request_id),
      CHECK (state <> 'dispatched' OR dispatch_epoch = epoch)
    ) STRICT
    """,
    """
    CREATE TABLE master_keys (
      version INTEGER NOT NULL PRIMARY KEY CHECK (version >= 1),
      key_id BLOB NOT NULL UNIQUE,
      wrapped BLOB NOT NULL CHECK (length(wrapped) > 0),
      root_key_id TEXT NOT NULL,
      current INTEGER NOT NULL CHECK (current IN (0, 1)),
      create_time INTEGER NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE log_heads (
      origin TEXT NOT NULL PRIMARY KEY REFERENCES instances (origin),
      head BLOB NOT NULL,
      size INTEGER NOT NULL CHECK (size >= 0),
      covered_size INTEGER NOT NULL CHECK (covered_size BETWEEN 0 AND size),
      commits INTEGER NOT NULL CHECK (commits >= 0)
    ) STRICT
    """,
    """
    CREATE TABLE log_leaves (
      origin TEXT NOT NULL REFERENCES instances (origin),
      "index" INTEGER NOT NULL CHECK ("index" >= 0),
      entry BLOB NOT NULL CHECK (length(entry) > 0),
      PRIMARY KEY (origin, "index")
    ) STRICT
    """,
    """
    CREATE TABLE log_checkpoints (
      origin TEXT NOT NULL REFERENCES instances (origin),
      size INTEGER NOT NULL CHECK (size >= 1),
      note TEXT NOT NULL,
      create_time INTEGER NOT NULL,
      PRIMARY KEY (origin, size)
    ) STRICT
    """,
)

_INDEXES = (
    "CREATE INDEX consents_by_caller ON consents (caller, id)",
    "CREATE INDEX consents_by_owner ON consents (owner, id)",
    "CREATE INDEX consents_by_expiry ON consents (state, expire_time)",
    "CREATE INDEX consents_by_token_expiry ON consents (state, access_expire_time, provider)",
    "CREATE INDEX consents_holding_key ON consents (state, id) WHERE length(wrapped_data_key) > 0",
    "CREATE INDEX payments_by_caller ON payments (caller, id)",
    "CREATE INDEX payments_by_owner ON payments (owner, id)",
    "CREATE INDEX payments_by_consent ON payments (consent, id)",
    "CREATE INDEX payments_by_state ON payments (state)",
    """
    CREATE INDEX payments_due_unknown ON payments (next_attempt_time, id) WHERE next_attempt_time IS NOT NULL
      AND +state IN ('dispatched', 'reconciling')
    """,
    """
    CREATE INDEX payments_due_others ON payments (next_attempt_time, id) WHERE next_attempt_time IS NOT NULL
      AND state NOT IN ('abandoned', 'cancelled', 'dispatched', 'reconciling', 'rejected', 'rejected-late', 'settled')
    """,
    "CREATE UNIQUE INDEX one_current_master_key ON master_keys (current) WHERE current = 1",
)


def _refuses(name: str, event: str, table: str, why: str, when: str = "") -> str:
    condition = f" WHEN {when}" if when else ""
    return f"CREATE TRIGGER {name} BEFORE {event} ON {table}{condition} BEGIN SELECT RAISE(ABORT, '{why}'); END"


_TRIGGERS = (
    _refuses("instances_stay", "DELETE", "instances", "an instance is never deleted"),
    _refuses("instances_fixed", "UPDATE", "instances", "an instance never changes"),
    _refuses("claims_stay", "DELETE", "claims", "a claim is never deleted"),
    _refuses("claims_fixed", "UPDATE", "claims", "a claim never changes"),
    _refuses("consents_stay", "DELETE", "consents", "a consent is never deleted"),
    _refuses(
        "consents_identity",
        "UPDATE OF id, caller, owner, provider, create_time",
        "consents",
        "whose consent it is never changes",
    ),
    _refuses(
        "consents_version", "UPDATE", "consents", "a consent changes by one version", "NEW.version <> OLD.version + 1"
    ),
    _refuses(
        "consents_revoked",
        "UPDATE",
        "consents",
        "a revoked consent stays revoked",
        "OLD.state = 'revoked' AND NEW.state <> 'revoked'",
    ),
    _refuses("payments_stay", "DELETE", "payments", "a payment is never deleted"),
    _refuses(
        "payments_instruction",
        "UPDATE OF id, caller, request_id, consent, owner, provider, amount_currency, amount_minor_units, creditor_iban,"
        " creditor_currency, creditor_name, debtor_iban, debtor_currency, product, remittance_information, end_to_end_id,"
        " idempotency_class, bank_key, create_time",
        "payments",
        "what a payment orders never changes",
    ),
    _refuses(
        "payments_final",
        "UPDATE",
        "payments",
        "a final payment never changes",
        "OLD.state IN ('abandoned', 'cancelled', 'rejected', 'rejected-late', 'settled')",
    ),
    _refuses(
        "payments_epoch",
        "UPDATE",
        "payments",
        "an epoch never goes back",
        "NEW.epoch < OLD.epoch OR NEW.dispatch_epoch < OLD.dispatch_epoch",
    ),
    _refuses("log_heads_stay", "DELETE", "log_heads", "the head of the log is never deleted"),
    _refuses(
        "log_heads_grow",
        "UPDATE",
        "log_heads",
        "the log only grows",
        "NEW.origin <> OLD.origin OR NEW.size < OLD.size OR NEW.covered_size < OLD.covered_size"
        " OR NEW.commits <> OLD.commits + 1",
    ),
    _refuses("log_leaves_stay", "DELETE", "log_leaves", "an entry of the log is never deleted"),
    _refuses("log_leaves_fixed", "UPDATE", "log_leaves", "an entry of the log never changes"),
    _refuses("log_checkpoints_stay", "DELETE", "log_checkpoints", "a checkpoint is never deleted"),
    _refuses("log_checkpoints_fixed", "UPDATE", "log_checkpoints", "a checkpoint never changes"),
)


# On PostgreSQL, whose planner takes an index on the state for many rows, and then goes through all by id.
_OF_POSTGRESQL = {
    "CREATE INDEX consents_holding_key ON consents (state, id) WHERE length(wrapped_data_key) > 0": """
    CREATE INDEX consents_holding_key ON consents (id) WHERE length(wrapped_data_key) > 0
      AND state IN ('expired', 'failed', 'revoked')
    """,
}
# A TRUNCATE is no DELETE to its triggers.
_KEPT = ("instances", "claims", "consents", "payments", "log_heads", "log_leaves", "log_checkpoints")
_REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation';
END
$$
"""


def upgrade() -> None:
    statements: tuple[str, ...] = (*_TABLES, *_INDEXES, *_TRIGGERS)
    if op.get_bind().dialect.name == "postgresql":
        chosen = [in_its_words("postgresql", _OF_POSTGRESQL.get(statement, statement)) for statement in statements]
        statements = (_REFUSE, *chosen, *map(refuses_truncate, _KEPT))
    for statement in statements:
        op.execute(statement)
