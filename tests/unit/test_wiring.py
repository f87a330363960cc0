"""The composition root, where it decides something: who makes the first master key when two sidecars start on one database."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

from sidecar.clock import SystemClock
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.gateway.links import HsmLink
from sidecar.ports import MasterKeyRecord
from sidecar.wiring import _MasterKeys
from tests.fakes.store import FakeStore, HandClock, SoftwareSigner


class FreshHsm:
    """A new hsm process: it makes keys, and is told which to load."""

    def __init__(self) -> None:
        self.loaded: Sequence[MasterKeyRecord] = ()

    async def create_master_key(self, version: int) -> SimpleNamespace:
        return SimpleNamespace(
            key=SimpleNamespace(key_id=b"o" * 16, version=version, wrapped=b"own"), root_key_id="root"
        )

    async def load_master_keys(self, records: Sequence[MasterKeyRecord]) -> None:
        self.loaded = records


class RacedStore(FakeStore):
    """Another sidecar makes the first key after this one has looked, and before it writes."""

    def __init__(self, other: MasterKeyRecord, audit: AuditDraft) -> None:
        super().__init__(signer=SoftwareSigner(), clock=HandClock())
        self._other, self._audit = other, audit

    async def add_master_key(self, record: MasterKeyRecord, audit: AuditDraft) -> None:
        await super().add_master_key(self._other, self._audit)
        await super().add_master_key(record, audit)


def test_the_slower_of_two_sidecars_takes_the_others_master_key() -> None:
    """It loads the key that is there, and never the one that it has made itself: what it sealed with that nobody could open."""
    audit = AuditDraft(event=AuditEvent.KEY_CREATED, outcome=AuditOutcome.SUCCEEDED)
    hsm, clock = FreshHsm(), SystemClock()
    own = MasterKeyRecord(
        key_id=b"o" * 16, version=1, wrapped=b"own", root_key_id="root", current=True, create_time=clock.now()
    )
    other = replace(own, key_id=b"x" * 16, wrapped=b"other")

    asyncio.run(_MasterKeys(store=RacedStore(other, audit), clock=clock)(cast(HsmLink, hsm)))

    assert list(hsm.loaded) == [other]
