"""Marks of a vault that moves from one database to another: which of the two may be used.

The newest mark of a database counts, so marks are only ever added.
"""

from alembic import op

from sidecar.store.migrations.guards import in_its_words, refuses, refuses_truncate

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_STATEMENTS = (
    """
    CREATE TABLE relocations (
      number INTEGER NOT NULL PRIMARY KEY CHECK (number >= 1),
      relocation TEXT NOT NULL,
      step TEXT NOT NULL CHECK (step IN ('begun', 'verified', 'open', 'withdrawn', 'left', 'returned')),
      origin TEXT NOT NULL,
      commits INTEGER NOT NULL CHECK (commits >= 0),
      instance TEXT NOT NULL,
      place TEXT NOT NULL,
      create_time INTEGER NOT NULL
    ) STRICT
    """,
    refuses("relocations_stay", "DELETE", "relocations", "a mark of a relocation is never deleted"),
    refuses("relocations_fixed", "UPDATE", "relocations", "a mark of a relocation never changes"),
)


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    for statement in _STATEMENTS:
        op.execute(in_its_words(dialect, statement))
    if dialect == "postgresql":
        op.execute(refuses_truncate("relocations"))
