"""The words of migrations: what the database itself refuses, whatever code asks for it, and the same rules in PostgreSQL's words.

Rule: released migrations are made of these, so what they give for a statement that stands in one never changes.
"""

__all__ = ["in_its_words", "refuses", "refuses_truncate"]

# Texts compare by their bytes, as in SQLite and Python, and not by a locale.
_WORDS_OF_POSTGRESQL = (
    ("INTEGER", "BIGINT"),
    ("BLOB", "BYTEA"),
    (" TEXT", ' TEXT COLLATE "C"'),
    (") STRICT", ")"),
    ("+state", "state"),
)


def refuses(name: str, event: str, table: str, why: str, when: str = "") -> str:
    """The trigger `name`, before `event` on `table`. `when` compares OLD with NEW and looks at no other row."""
    condition = f" WHEN {when}" if when else ""
    return f"CREATE TRIGGER {name} BEFORE {event} ON {table}{condition} BEGIN SELECT RAISE(ABORT, '{why}'); END"


def refuses_truncate(table: str) -> str:
    """PostgreSQL only: a TRUNCATE is no DELETE to its triggers."""
    return (
        f"CREATE TRIGGER {table}_not_truncated BEFORE TRUNCATE ON {table} FOR EACH STATEMENT"
        f" EXECUTE FUNCTION refuse('{table} is never emptied')"
    )


def in_its_words(dialect: str, statement: str) -> str:
    """A statement of SQLite's in the words of `dialect`: sqlite, or postgresql with its function `refuse`."""
    if dialect == "sqlite":
        return statement
    if statement.startswith("CREATE TRIGGER"):
        rule, _, why = statement.partition(" BEGIN SELECT RAISE(ABORT, ")
        event, _, condition = rule.partition(" WHEN ")
        when = f" WHEN ({condition})" if condition else ""
        return f"{event} FOR EACH ROW{when} EXECUTE FUNCTION refuse({why.removesuffix('); END')})"
    for ours, theirs in _WORDS_OF_POSTGRESQL:
        statement = statement.replace(ours, theirs)
    return statement
