"""All that is PostgreSQL: where the server is and by which right we trust it, connections and their settings, what errors mean."""

from sidecar.store.postgresql.database import PostgresqlDatabase

__all__ = ["PostgresqlDatabase"]
