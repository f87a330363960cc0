"""Runs the real egress process for a test: its three sockets, an hsm in this process, and the gateway's own link to it."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from sidecar.errors import CustodyError
from sidecar.gateway.links import Connection, EgressLink
from sidecar.hardening import WIPING_ENVIRONMENT
from sidecar.ipc.frames import HEADER, encode_frame
from sidecar.ipc.messages import (
    CreateDataKey,
    DataKeyCreated,
    DataKeyOpened,
    EgressSettings,
    EgressToGatewayFrame,
    EgressToHsm,
    EgressToHsmFrame,
    GatewayToEgressFrame,
    HsmToEgress,
    HsmToEgressFrame,
    OpenDataKey,
    Ping,
    Pong,
    ProviderTransport,
    decoder_for,
    failure_of,
)
from tests.fakes.egress import SoftwareKeys

__all__ = ["CLUSTER", "HsmStandIn", "RunningEgress", "running_egress", "transport"]

CLUSTER = "test"
ROOT = Path(__file__).resolve().parents[3]


def transport(origin: str, ca_file: Path, *, provider: str = "bank", **files: str) -> ProviderTransport:
    return ProviderTransport(provider=provider, origin=origin, ca_file=str(ca_file), **files)


class HsmStandIn:
    """Answers egress's questions for data keys, as the hsm process does, from keys in software.

    `silent` makes it swallow questions; `questions` counts them.
    """

    def __init__(self, keys: SoftwareKeys) -> None:
        self.keys = keys
        self.silent = False
        self.questions = 0
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def new_end(self) -> socket.socket:
        """The end for egress."""
        ours, theirs = socket.socketpair()
        self.serve(ours)
        return theirs

    def serve(self, end: socket.socket) -> None:
        """Answers what comes in over `end`, and what is in it already."""
        self._ends.append(end)
        thread = threading.Thread(target=self._serve, args=(end,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def hang_up(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _serve(self, end: socket.socket) -> None:
        decoder = decoder_for(EgressToHsmFrame)
        # Either side may hang up at any moment, with questions still unread.
        with contextlib.suppress(OSError), end, end.makefile("rb") as source:
            while header := source.read(HEADER.size):
                frame = decoder.decode(source.read(int.from_bytes(header, "big")))
                self.questions += 1
                if self.silent:
                    continue
                end.sendall(encode_frame(HsmToEgressFrame(id=frame.id, body=self._answer(frame.body))))

    def _answer(self, question: EgressToHsm) -> HsmToEgress:
        try:
            match question:
                case Ping():
                    return Pong()
                case CreateDataKey(context=context):
                    wrapped, key = self.keys.create_data_key(context)
                    return DataKeyCreated(wrapped=wrapped, key_id=self.keys.key_id(context), key=memoryview(key))
                case OpenDataKey(wrapped=wrapped, context=context):
                    key = self.keys.open_data_key(wrapped, context)
                    return DataKeyOpened(key_id=self.keys.key_id(context), key=memoryview(key))
        except CustodyError as error:
            return failure_of(error)


@dataclass(slots=True, kw_only=True)
class RunningEgress:
    link: EgressLink
    connection: Connection
    process: "subprocess.Popen[bytes]"
    hsm: HsmStandIn
    wiring: socket.socket
    log_file: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wire(self) -> None:
        """Gives egress a new socket to hsm, as the supervisor does after a restart."""
        with self.hsm.new_end() as end:
            socket.send_fds(self.wiring, [b"peer"], [end.fileno()])

    def log(self) -> str:
        return self.log_file.read_text()


@contextlib.asynccontextmanager
async def running_egress(
    *,
    transports: Sequence[ProviderTransport],
    keys: SoftwareKeys,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    **settings: float,  # of EgressSettings, where a test needs another than the default
) -> AsyncIterator[RunningEgress]:
    """The real process, wired and answering; it must end by itself when the gateway's socket closes."""
    defaults = EgressSettings(cluster=CLUSTER, transports=tuple(transports))
    document = msgspec.json.encode(msgspec.structs.replace(defaults, **settings))
    gateway, gateway_of_child = socket.socketpair()
    wiring, wiring_of_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log_file = folder / f"egress-{os.urandom(4).hex()}.log"
    with gateway_of_child, wiring_of_child, log_file.open("wb") as log:
        process = start_egress(document, gateway_of_child.fileno(), wiring_of_child.fileno(), log, environment)
    connection = await Connection.over(gateway, request_type=GatewayToEgressFrame, answer_type=EgressToGatewayFrame)
    link = EgressLink()
    link.attach(connection)
    egress = RunningEgress(
        link=link, connection=connection, process=process, hsm=HsmStandIn(keys), wiring=wiring, log_file=log_file
    )
    try:
        egress.wire()
        assert await connection.ping(within_seconds=30), egress.log()
        yield egress
    finally:
        connection.close()
        wiring.close()
        await _end(process)
        egress.hsm.close()


def start_egress(
    settings: bytes, gateway_fd: int, wiring_fd: int, log: IO[bytes], environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    settings_fd = os.memfd_create("settings")
    try:
        os.write(settings_fd, settings)
        os.lseek(settings_fd, 0, os.SEEK_SET)
        descriptors = {"--settings-fd": settings_fd, "--gateway-fd": gateway_fd, "--wiring-fd": wiring_fd}
        arguments = [text for name, number in descriptors.items() for text in (name, str(number))]
        kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "sidecar.egress", *arguments],
            env={**kept, **WIPING_ENVIRONMENT, **(environment or {})},
            pass_fds=tuple(descriptors.values()),
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    finally:
        os.close(settings_fd)


async def _end(process: "subprocess.Popen[bytes]") -> None:
    """Waits for it to end by itself; kills it, and says so, if it does not."""
    try:
        await asyncio.to_thread(process.wait, 15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError("egress did not end when its gateway did") from None
