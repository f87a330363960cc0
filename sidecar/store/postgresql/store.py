"""`sidecar.ports.Store` on a PostgreSQL that many sidecars share."""

import asyncio
from typing import Self

from sidecar.ports import CheckpointSigner, Clock
from sidecar.store.postgresql.database import PostgresqlDatabase
from sidecar.store.store import Alarm, SqlStore, instance_origin, no_alarm

__all__ = ["PostgresqlStore"]


class PostgresqlStore(SqlStore):
    """On a database that many sidecars share, each with a log of its own. Made by `open`, ended by `close`."""

    @classmethod
    async def open(
        cls,
        *,
        url: str,
        instance: str,
        cluster: str,
        signer: CheckpointSigner,
        clock: Clock,
        linger_seconds: float = 0.002,
        synchronous_commit: str = "on",
        read_connections: int = 4,
        alarm: Alarm = no_alarm,
    ) -> Self:
        """Goes on with the log of the process that had the name `instance` before, or begins one.

        Raises StoreRefused where address, server, role or schema are not as they must be, where another process has the name,
        or where the log is damaged. As with `SqliteStore`, SIDECAR_STARTED comes first on record.
        """

        def checked() -> tuple[PostgresqlDatabase, str]:
            database = PostgresqlDatabase(
                url, instance=instance, synchronous_commit=synchronous_commit, read_connections=read_connections
            )
            try:
                return database, instance_origin(database, database.first, cluster=cluster, clock=clock, name=instance)
            except BaseException:
                database.first.close()
                raise

        database, origin = await asyncio.to_thread(checked)
        return cls(
            database=database, origin=origin, signer=signer, clock=clock, linger_seconds=linger_seconds, alarm=alarm
        )
