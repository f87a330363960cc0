"""Periodic limits with what payments have reserved of them, and what a person found out about a payment.

The guards: a sum is never negative and never goes away; what a payment reserved is never altered or deleted and is given back
once; the limits that an owner gave never change; a person's finding is about a payment that needs attention, is the only way
out of that state, and never changes. Payments are listed by state.
"""

from alembic import op

from sidecar.store.migrations.guards import in_its_words, refuses, refuses_truncate

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_PERIOD_TYPES = "'day', 'week', 'fortnight', 'month', 'half-year', 'year'"
_ALIGNMENTS = "'calendar', 'consent'"

_TABLES = (
    f"""
    CREATE TABLE limit_windows (
      scope TEXT NOT NULL CHECK (scope <> ''),
      period_type TEXT NOT NULL CHECK (period_type IN ({_PERIOD_TYPES})),
      alignment TEXT NOT NULL CHECK (alignment IN ({_ALIGNMENTS})),
      start_time INTEGER NOT NULL,
      currency TEXT NOT NULL CHECK (length(currency) = 3),
      reserved INTEGER NOT NULL CHECK (reserved >= 0),
      PRIMARY KEY (scope, period_type, alignment, start_time, currency)
    ) STRICT
    """,
    """
    CREATE TABLE limit_reservations (
      payment TEXT NOT NULL REFERENCES payments (id),
      scope TEXT NOT NULL,
      period_type TEXT NOT NULL,
      alignment TEXT NOT NULL,
      start_time INTEGER NOT NULL,
      currency TEXT NOT NULL,
      minor_units INTEGER NOT NULL CHECK (minor_units > 0),
      released INTEGER NOT NULL CHECK (released IN (0, 1)),
      PRIMARY KEY (payment, scope, period_type, alignment),
      FOREIGN KEY (scope, period_type, alignment, start_time, currency)
        REFERENCES limit_windows (scope, period_type, alignment, start_time, currency)
    ) STRICT
    """,
)

_COLUMNS = (
    "ALTER TABLE consents ADD COLUMN periodic_limits TEXT NOT NULL DEFAULT '[]'",
    "ALTER TABLE payments ADD COLUMN resolution_finding TEXT CHECK (resolution_finding IN ('executed', 'not-executed'))",
    "ALTER TABLE payments ADD COLUMN resolution_reason TEXT CHECK (resolution_reason <> '')",
    "ALTER TABLE payments ADD COLUMN resolution_administrator TEXT CHECK (resolution_administrator <> '')",
    """
    ALTER TABLE payments ADD COLUMN resolve_time INTEGER CHECK (
      (resolve_time IS NULL) = (resolution_finding IS NULL) AND (resolve_time IS NULL) = (resolution_reason IS NULL)
      AND (resolve_time IS NULL) = (resolution_administrator IS NULL)
    )
    """,
)

# A list by state goes by id, too.
_INDEXES = ("DROP INDEX payments_by_state", "CREATE INDEX payments_by_state ON payments (state, id)")

_KEY = "scope, period_type, alignment, start_time, currency"
_TRIGGERS = (
    refuses("limit_windows_stay", "DELETE", "limit_windows", "a window of a limit is never deleted"),
    refuses("limit_windows_fixed", f"UPDATE OF {_KEY}", "limit_windows", "whose window it is never changes"),
    refuses("limit_reservations_stay", "DELETE", "limit_reservations", "a reservation is never deleted"),
    refuses(
        "limit_reservations_fixed",
        f"UPDATE OF payment, {_KEY}, minor_units",
        "limit_reservations",
        "what a payment reserved never changes",
    ),
    refuses(
        "limit_reservations_released",
        "UPDATE",
        "limit_reservations",
        "a reservation is given back once",
        "OLD.released = 1",
    ),
    refuses(
        "consents_limits",
        "UPDATE",
        "consents",
        "the periodic limits of a consent never change",
        "NEW.periodic_limits <> OLD.periodic_limits",
    ),
    refuses(
        "payments_resolved",
        "UPDATE",
        "payments",
        "only a finding takes a payment out of needs-attention",
        "OLD.state = 'needs-attention' AND NEW.state <> 'needs-attention' AND NEW.resolution_finding IS NULL",
    ),
    refuses(
        "payments_resolution",
        "UPDATE",
        "payments",
        "only a payment that needs attention is resolved, and needs none then",
        "OLD.resolution_finding IS NULL AND NEW.resolution_finding IS NOT NULL"
        " AND (OLD.state <> 'needs-attention' OR NEW.state = 'needs-attention')",
    ),
    refuses(
        "payments_resolution_fixed",
        "UPDATE",
        "payments",
        "a finding never changes",
        "OLD.resolution_finding IS NOT NULL AND (NEW.resolution_finding IS NULL"
        " OR NEW.resolution_finding <> OLD.resolution_finding OR NEW.resolution_reason <> OLD.resolution_reason"
        " OR NEW.resolution_administrator <> OLD.resolution_administrator OR NEW.resolve_time <> OLD.resolve_time)",
    ),
)


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    for statement in (*_TABLES, *_COLUMNS, *_INDEXES, *_TRIGGERS):
        op.execute(in_its_words(dialect, statement))
    if dialect == "postgresql":
        for table in ("limit_windows", "limit_reservations"):
            op.execute(refuses_truncate(table))
