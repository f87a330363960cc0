"""All that is PostgreSQL: where the server is and by which right we trust it, connections and their settings, what errors mean.

Loaded only where a sidecar uses it: the driver with its TLS is 13 MiB.
"""

from sidecar.store.postgresql.store import PostgresqlStore

__all__ = ["PostgresqlStore"]
