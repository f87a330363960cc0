"""A vault moves from SQLite to PostgreSQL: `custodyctl store migrate`. See docs/store.md, From SQLite to PostgreSQL."""
