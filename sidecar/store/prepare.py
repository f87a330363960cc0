"""Before the store is opened: is there a file, and has it the newest schema? If not, a short-lived process sees to it."""

import asyncio
import sys
from pathlib import Path

from sidecar.store.errors import StoreRefused
from sidecar.store.schema import SCHEMA_REVISION
from sidecar.store.sqlite import check_file, create_file, stored_revision

__all__ = ["migrate_in_subprocess", "migration_is_needed"]

_TIME_LIMIT_SECONDS = 300.0


async def migrate_in_subprocess(path: Path) -> None:
    """As `sidecar.store.migrate`, in a process of its own and only if a migration has to run. Raises StoreRefused."""
    create_file(path)
    if not migration_is_needed(check_file(path)):
        return
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sidecar.store.migrate",
        "--url",
        f"sqlite:///{path}",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_TIME_LIMIT_SECONDS):
            _, complaint = await process.communicate()
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise StoreRefused("the migration of the database did not end in time", path=path) from error
    if process.returncode:
        lines = complaint.decode(errors="replace").strip().splitlines()
        raise StoreRefused(f"the migration of the database failed: {lines[-1] if lines else 'no reason given'}")


def migration_is_needed(path: Path) -> bool:
    """Whether the file is empty or of an older schema. Raises StoreRefused for a newer one."""
    revision = stored_revision(path)
    if revision is not None and revision > SCHEMA_REVISION:
        raise StoreRefused("the database has a newer schema than this sidecar knows; use a newer sidecar", path=path)
    return revision != SCHEMA_REVISION
