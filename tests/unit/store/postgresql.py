"""What tests of the store on PostgreSQL share: one scratch server a run, and for each test a migrated database of its own."""

import atexit
import contextlib
from collections.abc import AsyncIterator
from functools import cache

from sidecar.ports import CheckpointSigner, Clock
from sidecar.store.migrate import migrate_postgresql
from sidecar.store.postgresql import PostgresqlStore
from tests.fakes.store import HandClock, SoftwareSigner
from tools.postgresql.cluster import OWNER, SIDECAR, ScratchCluster


@cache
def cluster() -> ScratchCluster:
    made = ScratchCluster.create()
    atexit.register(made.remove)
    return made


@cache
def _template() -> str:
    name = cluster().create_database()
    migrate_postgresql(cluster().url(name, role=OWNER), grant=SIDECAR)
    return name


def new_database() -> str:
    """The name of a migrated, empty database."""
    return cluster().create_database(template=_template())


def url_of(database: str) -> str:
    return cluster().url(database)


@contextlib.asynccontextmanager
async def opened(
    database: str,
    *,
    instance: str = "pod-1",
    signer: CheckpointSigner | None = None,
    clock: Clock | None = None,
    cluster_name: str = "test",
    linger_seconds: float = 0.002,
    read_connections: int = 4,
) -> AsyncIterator[PostgresqlStore]:
    store = await PostgresqlStore.open(
        url=url_of(database),
        instance=instance,
        cluster=cluster_name,
        signer=signer or SoftwareSigner(),
        clock=clock or HandClock(),
        linger_seconds=linger_seconds,
        read_connections=read_connections,
    )
    try:
        yield store
    finally:
        await store.close()
