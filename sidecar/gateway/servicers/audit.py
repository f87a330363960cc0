"""AuditService: the log for those who check it. Entries are read back from their canonical bytes."""

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, TypeAlias, cast

import grpc
from custody.v1 import audit_pb2 as pb
from custody.v1 import audit_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from sidecar.audit.checkpoint import parse_checkpoint, parse_note
from sidecar.audit.entry import AuditEntry
from sidecar.audit.export import export_lines
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.ids import resource_name
from sidecar.errors import FieldViolation, InvalidField, Unavailable
from sidecar.gateway.boundary import current_caller
from sidecar.gateway.servicers.paging import after_of, page_size
from sidecar.ports import Store, StoredLeaf

__all__ = ["AuditServicer"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_BATCH = 500
_LONGEST_SCAN = 20_000  # leaves looked at for one page of a filtered list; the page token goes on from there
_CHUNK_BYTES = 64 * 1024


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    def __init__(self, *, store: Store) -> None:
        self._store = store

    async def ListEntries(self, request: pb.ListEntriesRequest, context: Context) -> pb.ListEntriesResponse:
        limit = page_size(request.page_size, largest=_BATCH)
        size = (await self._store.log_position()).size
        start = _index_of(request.page_token)
        if start is None:
            start = size - 1 if request.newest_first else 0
        entries: list[pb.AuditEntry] = []
        scanned = 0
        while len(entries) < limit and 0 <= start < size and scanned < _LONGEST_SCAN:
            leaves = await self._batch(start, newest_first=request.newest_first)
            for leaf in leaves:
                entry = AuditEntry.decode(leaf.entry)
                start = leaf.index + (-1 if request.newest_first else 1)
                if _matches(entry.draft, request):
                    entries.append(_entry_message(leaf, entry))
                    if len(entries) == limit:
                        break
            scanned += len(leaves)
        more = 0 <= start < size
        return pb.ListEntriesResponse(entries=entries, next_page_token=_token(start) if more else "")

    async def GetCheckpoint(self, request: pb.GetCheckpointRequest, context: Context) -> pb.GetCheckpointResponse:
        await self._store.sign_pending()
        position = await self._store.log_position()
        notes = await self._store.checkpoints(start_size=position.covered_size, limit=1)
        if not notes or position.checkpoint_time is None:
            raise Unavailable("AUDIT_UNAVAILABLE", "the log has no signed checkpoint yet; try again")
        size, note = notes[0]
        created = Timestamp()
        created.FromDatetime(position.checkpoint_time)
        root = parse_checkpoint(parse_note(note).body).root
        checkpoint = pb.Checkpoint(signed_note=note, size=size, root_hash=root, create_time=created)
        return pb.GetCheckpointResponse(checkpoint=checkpoint)

    async def ExportLog(self, request: pb.ExportLogRequest, context: Context) -> AsyncIterator[pb.ExportLogResponse]:
        """The whole log up to a checkpoint that is signed first, so that nothing in the file is uncovered."""
        draft = AuditDraft(
            event=AuditEvent.LOG_EXPORTED, outcome=AuditOutcome.SUCCEEDED, caller=current_caller().workload
        )
        await self._store.record([draft])
        await self._store.sign_pending()
        position = await self._store.log_position()
        loop = asyncio.get_running_loop()
        reader = _BlockingReader(store=self._store, loop=loop, size=position.covered_size)
        lines = export_lines(position.origin, reader.leaves(), reader.notes())
        while chunk := await loop.run_in_executor(None, _chunk, lines):
            yield pb.ExportLogResponse(chunk=chunk)

    async def _batch(self, start: int, *, newest_first: bool) -> Sequence[StoredLeaf]:
        if not newest_first:
            return await self._store.leaves(start=start, limit=_BATCH)
        first = max(0, start + 1 - _BATCH)
        leaves = await self._store.leaves(start=first, limit=start + 1 - first)
        return tuple(reversed(leaves))


class _BlockingReader:
    """The store for the exporter, which is an ordinary generator and runs in a thread of its own."""

    def __init__(self, *, store: Store, loop: asyncio.AbstractEventLoop, size: int) -> None:
        self._store = store
        self._loop = loop
        self._size = size

    def leaves(self) -> Iterator[bytes]:
        start = 0
        while start < self._size:
            read = self._store.leaves(start=start, limit=min(_BATCH, self._size - start))
            leaves = asyncio.run_coroutine_threadsafe(read, self._loop).result()
            if not leaves:
                return  # entries are missing: the verifier will say so, the export does not judge
            yield from (leaf.entry for leaf in leaves)
            start = leaves[-1].index + 1

    def notes(self) -> Iterator[str]:
        start = 0
        while True:
            read = self._store.checkpoints(start_size=start, limit=_BATCH)
            notes = asyncio.run_coroutine_threadsafe(read, self._loop).result()
            yield from (note for size, note in notes if size <= self._size)
            if not notes or notes[-1][0] >= self._size:
                return
            start = notes[-1][0] + 1


def _chunk(lines: Iterator[bytes]) -> bytes:
    chunk = bytearray()
    for line in lines:
        chunk += line
        if len(chunk) >= _CHUNK_BYTES:
            break
    return bytes(chunk)


def _matches(draft: AuditDraft, request: pb.ListEntriesRequest) -> bool:
    return (not request.consent or request.consent == resource_name("consents", draft.consent)) and (
        not request.payment or request.payment == resource_name("payments", draft.payment)
    )


def _entry_message(leaf: StoredLeaf, entry: AuditEntry) -> pb.AuditEntry:
    draft = entry.draft
    created = Timestamp()
    created.FromNanoseconds(entry.time_ns)
    return pb.AuditEntry(
        index=leaf.index,
        create_time=created,
        event=draft.event.name,
        outcome=cast(
            pb.AuditEntry.Outcome.ValueType, draft.outcome.value
        ),  # the contract numbers outcomes as the log does; a test holds it
        caller=draft.caller,
        provider=resource_name("providers", draft.provider) if draft.provider else "",
        consent=resource_name("consents", draft.consent) if draft.consent else "",
        payment=resource_name("payments", draft.payment) if draft.payment else "",
        epoch=draft.epoch,
        reason=draft.reason,
        subject=draft.subject,
        detail_digest=draft.detail_digest,
    )


def _token(index: int) -> str:
    return base64.urlsafe_b64encode(f"entries/{index}".encode("ascii")).rstrip(b"=").decode("ascii")


def _index_of(token: str) -> int | None:
    if not token:
        return None
    after = after_of(token, "entries")
    if not after.isdigit():
        raise InvalidField(
            FieldViolation(field="page_token", rule="page_token", description="must be one that the page before gave")
        )
    return int(after)
