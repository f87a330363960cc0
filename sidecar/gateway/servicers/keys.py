"""KeyService: what an HSM administrator looks at first."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeAlias

import grpc
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from custody.v1 import key_pb2 as pb
from custody.v1 import key_pb2_grpc
from google.protobuf.duration_pb2 import Duration

from sidecar.domain.ids import resource_name
from sidecar.domain.provider import KeyPurpose
from sidecar.gateway.servicers.values import CONSENT_STATES, timestamp
from sidecar.ipc.messages import HsmStatus, KeyDescription
from sidecar.ports import Clock, LogPosition, MasterKeyRecord, Store

__all__ = ["Children", "HsmReporter", "KeyServicer", "SidecarFacts"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_PURPOSES = {
    KeyPurpose.ROOT: pb.Key.PURPOSE_ROOT,
    KeyPurpose.AUDIT: pb.Key.PURPOSE_AUDIT,
    KeyPurpose.REQUEST_SIGNING: pb.Key.PURPOSE_REQUEST_SIGNING,
    KeyPurpose.CLIENT_AUTHENTICATION: pb.Key.PURPOSE_CLIENT_AUTHENTICATION,
    KeyPurpose.DOCUMENT_SIGNING: pb.Key.PURPOSE_DOCUMENT_SIGNING,
}


class HsmReporter(Protocol):
    async def status(self) -> HsmStatus: ...


class Children(Protocol):
    """The child processes: those that run, by pid, and how often each was replaced."""

    @property
    def pids(self) -> Mapping[str, int]: ...

    @property
    def restarts(self) -> Mapping[str, int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarFacts:
    version: str
    cluster: str
    instance: str
    start_time: datetime


class KeyServicer(key_pb2_grpc.KeyServiceServicer):
    def __init__(
        self, *, facts: SidecarFacts, hsm: HsmReporter, children: Children, store: Store, clock: Clock
    ) -> None:
        self._facts = facts
        self._hsm = hsm
        self._children = children
        self._store = store
        self._clock = clock

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        hsm = await self._hsm.status()
        masters = await self._store.master_keys()
        current = next((record for record in masters if record.current), None)
        root = next((key for key in hsm.keys if key.purpose is KeyPurpose.ROOT), None)
        uptime = Duration()
        uptime.FromTimedelta(self._clock.now() - self._facts.start_time)
        processes = self._processes()
        status = pb.Status(
            version=self._facts.version,
            instance=self._facts.instance,
            cluster=self._facts.cluster,
            uptime=uptime,
            ready=all(process.state == pb.Process.STATE_READY for process in processes),
            processes=processes,
            hsm_token=_token_message(hsm),
            root_key=_key_name(root.id_hex) if root else "",
            master_key=_key_name(current.key_id.hex()) if current else "",
            master_key_version=current.version if current else 0,
            log=_log_message(await self._store.log_position()),
            consent_counts=await self._consent_counts(),
        )
        return pb.GetStatusResponse(status=status)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        hsm = await self._hsm.status()
        keys = [_key_message(key) for key in hsm.keys]
        keys += [_master_message(record) for record in await self._store.master_keys()]
        return pb.ListKeysResponse(keys=keys)

    async def _consent_counts(self) -> list[pb.ConsentCount]:
        counts: dict[int, int] = {}
        for state, count in (await self._store.consent_counts()).items():
            number = CONSENT_STATES[state]
            counts[number] = counts.get(number, 0) + count
        return [pb.ConsentCount(state=state, consent_count=count) for state, count in sorted(counts.items())]  # type: ignore[arg-type]

    def _processes(self) -> list[pb.Process]:
        gateway = pb.Process(
            process="gateway", state=pb.Process.STATE_READY, start_time=timestamp(self._facts.start_time)
        )
        children = [
            pb.Process(
                process=name,
                state=pb.Process.STATE_READY if name in self._children.pids else pb.Process.STATE_RESTARTING,
                restart_count=self._children.restarts.get(name, 0),
            )
            for name in ("egress", "hsm")
        ]
        return [gateway, *children]


def _token_message(hsm: HsmStatus) -> pb.HsmToken:
    return pb.HsmToken(
        label=hsm.token_label,
        serial=hsm.token_serial,
        model=hsm.token_model,
        module=hsm.module,
        logged_in=hsm.logged_in,
        user_pin_count_low=hsm.user_pin_count_low,
        user_pin_final_try=hsm.user_pin_final_try,
        user_pin_locked=hsm.user_pin_locked,
    )


def _log_message(position: LogPosition) -> pb.LogStatus:
    return pb.LogStatus(
        origin=position.origin,
        entry_count=position.size,
        checkpoint_size=position.covered_size,
        checkpoint_time=timestamp(position.checkpoint_time),
    )


def _key_message(key: KeyDescription) -> pb.Key:
    attributes = [pb.Key.Attribute(name=name, value=value) for name, value in sorted(key.attributes.items())]
    return pb.Key(
        name=_key_name(key.id_hex),
        label=key.label,
        purpose=_PURPOSES[key.purpose],
        algorithm=f"{key.key_type}-{key.size_bits}",
        attributes=attributes,
        public_key_pem=_pem(key.spki_der) if key.spki_der else "",
        state=pb.Key.STATE_ACTIVE,
    )


def _master_message(record: MasterKeyRecord) -> pb.Key:
    """A master key is no object in the HSM: it is stored wrapped, and opened only in the hsm process."""
    return pb.Key(
        name=_key_name(record.key_id.hex()),
        label=f"master/{record.version}",
        purpose=pb.Key.PURPOSE_MASTER,
        algorithm="AES-256",
        state=pb.Key.STATE_ACTIVE if record.current else pb.Key.STATE_RETIRED,
        version=record.version,
    )


def _key_name(key_id: str) -> str:
    return resource_name("keys", key_id)


def _pem(spki_der: bytes) -> str:
    return load_der_public_key(spki_der).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")
