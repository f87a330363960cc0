"""Refreshing in the background, and what is known of a refresh token whose answer was lost.

`consents.refresh_time` is when the tokens are renewed; `refresh_leases.unresolved_since` is since when a refresh token may have
been handed over without an answer being known. What stands in an older file is read as carefully as it can be: a lease that was
not released ended at most 80 seconds after it was taken, and its outcome is not known.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_STATEMENTS = (
    "ALTER TABLE consents ADD COLUMN refresh_time {number}",
    "ALTER TABLE refresh_leases ADD COLUMN unresolved_since {number}",
    "CREATE INDEX consents_by_refresh_time ON consents (provider, state, refresh_time)",
    "CREATE INDEX refresh_leases_unresolved ON refresh_leases (expire_time) WHERE unresolved_since IS NOT NULL",
    # Such a change is a change of the row like any other: by one version. SecretKind.REFRESH_TOKEN is 4.
    """
    UPDATE consents SET
      refresh_time = access_issue_time + (access_expire_time - access_issue_time) * 9 / 20,
      version = version + 1
    WHERE state = 'active' AND access_issue_time IS NOT NULL AND access_expire_time IS NOT NULL
      AND EXISTS (SELECT 1 FROM secrets WHERE secrets.consent = consents.id AND secrets.kind = 4)
    """,
    "UPDATE refresh_leases SET unresolved_since = expire_time - 80000000 WHERE expire_time > 0",
)


def upgrade() -> None:
    # SQLite's STRICT tables know INTEGER only.
    number = "INTEGER" if op.get_bind().dialect.name == "sqlite" else "BIGINT"
    for statement in _STATEMENTS:
        op.execute(statement.format(number=number))
