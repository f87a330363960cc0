"""The sidecar's parts one by one, each next to the bare thing it is built on: store and SQLite, hsm process and PKCS#11, egress.

A worker; the part is named on its command line. `hsm` and `egress` start the two real child processes under the real supervisor;
`pkcs11` loads the module into the worker itself, as nothing of the sidecar would, to show what the module alone can do.
"""

import argparse
import hashlib
import os
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.workers import Work, run_load, serve
from sidecar.audit.checkpoint import assemble_note
from sidecar.clock import SystemClock
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.provider import Answer, Header, KeyPurpose, ProviderRequest, SecretSlot, SlotEncoding
from sidecar.domain.secrets import SealedSecret, SecretContext, SecretKind
from sidecar.gateway.links import EgressLink, HsmLink
from sidecar.gateway.supervisor import Supervisor
from sidecar.ipc.messages import EgressSettings, HsmSettings, KeyFile, ProviderTransport
from sidecar.ports import MasterKeyRecord, OpenSecret
from sidecar.store import SqliteStore

__all__ = ["Signer", "hsm_settings_of", "main"]

_DIGEST = hashlib.sha256(b"what is signed").digest()
_DRAFT = AuditDraft(event=AuditEvent.TOKEN_USE, outcome=AuditOutcome.INTENDED, caller="workload:shop")

Call = Callable[[], Awaitable[None]]


async def main(arguments: Sequence[str]) -> tuple[dict[str, Any], Work]:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("store", "sqlite", "processes", "pkcs11"))
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--hsm-settings", default="")
    parser.add_argument("--transport", default="")
    options = parser.parse_args(arguments)
    match options.part:
        case "store":
            calls = await _store(options.directory)
        case "sqlite":
            calls = _sqlite(options.directory)
        case "pkcs11":
            calls = _pkcs11(_hsm_settings(options.hsm_settings))
        case _:
            transport = msgspec.json.decode(options.transport, type=ProviderTransport)
            calls = await _processes(_hsm_settings(options.hsm_settings), transport)

    async def work(command: dict[str, Any]) -> dict[str, Any]:
        return await run_load(command, calls[command["work"]])

    return {}, work


def _hsm_settings(text: str) -> HsmSettings:
    return msgspec.json.decode(text, type=HsmSettings)


# --- store --------------------------------------------------------------------------------------------------------------


class Signer:
    """A checkpoint signer with its key in memory: what is left is the store's own cost."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        self._spki = self._key.public_key().public_bytes(serialization.Encoding.DER, form)

    async def sign_checkpoint(self, body: bytes) -> str:
        origin = body.partition(b"\n")[0].decode("ascii")
        return assemble_note(body, origin, self._spki, self._key.sign(body, ec.ECDSA(hashes.SHA256())))


async def _store(directory: Path) -> dict[str, Call]:
    store = await SqliteStore.open(
        path=directory / f"store-{uuid.uuid4()}.db", cluster="benchmark", signer=Signer(), clock=SystemClock()
    )
    await store.record([AuditDraft(event=AuditEvent.SIDECAR_STARTED, outcome=AuditOutcome.SUCCEEDED)])

    async def record() -> None:
        await store.record([_DRAFT])

    return {"record": record}


def _sqlite(directory: Path) -> dict[str, Call]:
    """One row and one durable commit a call, and nothing else: what the disk allows a writer without group commit."""
    database = sqlite3.connect(directory / f"bare-{uuid.uuid4()}.db", isolation_level=None)
    for pragma in ("journal_mode = WAL", "synchronous = FULL"):
        database.execute(f"PRAGMA {pragma}")
    database.execute("CREATE TABLE entries (position INTEGER PRIMARY KEY, content BLOB NOT NULL) STRICT")

    async def insert() -> None:
        database.execute("BEGIN IMMEDIATE")
        database.execute("INSERT INTO entries (content) VALUES (?)", (os.urandom(200),))
        database.execute("COMMIT")

    return {"commit": insert}


# --- pkcs11 -------------------------------------------------------------------------------------------------------------


def _pkcs11(settings: HsmSettings) -> dict[str, Call]:
    import pkcs11

    library = pkcs11.lib(settings.module_path)
    token = next(slot.get_token() for slot in library.get_slots() if _label(slot) == settings.token_label)
    session = token.open(user_pin=Path(settings.pin_file).read_text().strip())
    reference = next(key for key in settings.keys if key.purpose is KeyPurpose.DOCUMENT_SIGNING)
    key: Any = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, label=reference.label)

    async def sign() -> None:
        key.sign(_DIGEST, mechanism=pkcs11.Mechanism.ECDSA)

    return {"sign": sign}


def _label(slot: Any) -> str:  # noqa: ANN401 (python-pkcs11's slot has no type)
    return str(slot.get_token().label)


# --- the child processes ------------------------------------------------------------------------------------------------


async def _processes(settings: HsmSettings, transport: ProviderTransport) -> dict[str, Call]:
    hsm, egress = HsmLink(), EgressLink()
    supervisor = Supervisor(
        hsm_settings=settings,
        egress_settings=EgressSettings(cluster=settings.cluster, transports=(transport,)),
        hsm=hsm,
        egress=egress,
        on_hsm_started=_load_new_master_key,
    )
    await supervisor.start()
    context = SecretContext(
        cluster=settings.cluster, owner="person-1", consent="consent-1", provider_origin=transport.origin, row_version=1
    )
    made = await egress.new_secrets(context)
    sealed = SealedSecret(kind=SecretKind.PKCE_VERIFIER, row_version=1, sealed=made.pkce_verifier)
    secret = OpenSecret(secret=sealed, context=context)

    async def sign() -> None:
        await hsm.sign(KeyPurpose.DOCUMENT_SIGNING, _DIGEST)

    async def call() -> None:
        answer = await egress.call(
            _read_request(transport.origin),
            wrapped_data_key=made.wrapped_data_key,
            secrets=[secret],
            deadline_seconds=10,
        )
        assert isinstance(answer, Answer)
        assert answer.status == 200

    async def status() -> None:
        await egress.status()

    # The supervisor is among the calls so that it lives as long as they do.
    return {"sign": sign, "call": call, "status": status, "stop": supervisor.stop}


def _read_request(origin: str) -> ProviderRequest:
    slot = SecretSlot(kind=SecretKind.PKCE_VERIFIER, encoding=SlotEncoding.RAW)
    headers = (
        Header(name="X-Request-ID", value=str(uuid.uuid4())),
        Header(name="Accept", value="application/json"),
        Header(name="Authorization", value="Bearer ", slot=slot),
    )
    return ProviderRequest(
        origin=origin, method="GET", target="/v1/accounts/account-1/balances", headers=headers, body=()
    )


async def _load_new_master_key(fresh: HsmLink) -> None:
    created = await fresh.create_master_key(1)
    record = MasterKeyRecord(
        key_id=created.key.key_id,
        version=created.key.version,
        wrapped=created.key.wrapped,
        root_key_id=created.root_key_id,
        current=True,
        create_time=SystemClock().now(),
    )
    await fresh.load_master_keys([record])


def hsm_settings_of(development_configuration: dict[str, Any]) -> str:
    """The settings of the hsm process as JSON, from the configuration of a development sidecar."""
    hsm = development_configuration["hsm"]
    keys = msgspec.json.decode(Path(hsm["keys_file"]).read_bytes(), type=KeyFile)
    settings = HsmSettings(
        cluster="benchmark",
        module_path=hsm["module_path"],
        token_label=hsm["token_label"],
        token_serial=hsm["token_serial"],
        pin_file=hsm["pin_file"],
        keys=keys.keys,
    )
    return msgspec.json.encode(settings).decode()


if __name__ == "__main__":
    serve(main)
