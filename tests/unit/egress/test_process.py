"""The process from outside: how it starts, what ends it, how it is wired."""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path

import msgspec
import pytest

from sidecar.domain.provider import ProviderRequest
from sidecar.domain.secrets import SecretContext
from sidecar.errors import Unavailable
from sidecar.ipc.frames import HEADER, encode_frame
from sidecar.ipc.messages import ChildExit, EgressSettings, GatewayToEgressFrame, Ping, ProviderTransport
from tests.fakes.egress import SoftwareKeys
from tests.unit.egress.certificates import TestAuthority
from tests.unit.egress.process import CLUSTER, RunningEgress, running_egress, start_egress

ORIGIN = "https://127.0.0.1:9"


def _transport(folder: Path, **changes: str) -> ProviderTransport:
    return msgspec.structs.replace(
        ProviderTransport(provider="bank", origin=ORIGIN, ca_file=str(TestAuthority(folder).ca_file)), **changes
    )


def _run(folder: Path, test: Callable[[RunningEgress], Coroutine[None, None, None]]) -> None:
    async def run() -> None:
        async with running_egress(transports=[_transport(folder)], keys=SoftwareKeys(), folder=folder) as egress:
            await test(egress)

    asyncio.run(run())


def _exit_code(settings: bytes, folder: Path, *, sent: bytes | None) -> tuple[int, str]:
    """Starts egress, sends raw bytes to it (None: closes the gateway's socket at once), and waits for its end."""
    gateway, gateway_of_child = socket.socketpair()
    wiring, wiring_of_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log_file = folder / "log"
    with gateway, wiring, log_file.open("wb") as log:
        with gateway_of_child, wiring_of_child:
            process = start_egress(settings, gateway_of_child.fileno(), wiring_of_child.fileno(), log)
        if sent is None:
            gateway.close()
        else:
            gateway.sendall(sent)
        try:
            return process.wait(30), log_file.read_text()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _settings(*transports: ProviderTransport) -> bytes:
    return msgspec.json.encode(EgressSettings(cluster=CLUSTER, transports=transports))


def test_it_ends_when_the_gateway_closes(tmp_path: Path) -> None:
    """With the code that says so."""
    assert _exit_code(_settings(), tmp_path, sent=None)[0] == ChildExit.STOPPED


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff",
        HEADER.pack(5) + b"hello",
        HEADER.pack(1) + b"\xc0",
        bytes(encode_frame(GatewayToEgressFrame(id=1, body=Ping()))).replace(b"Ping", b"Sign"),
        bytes(encode_frame(GatewayToEgressFrame(id=1, body=Ping())))[:-1] + b"\xc1",
    ],
    ids=["empty_frame", "huge_frame", "text", "nil", "operation_of_another_socket", "cut"],
)
def test_a_frame_that_is_not_ours_ends_it(tmp_path: Path, sent: bytes) -> None:
    """There is one peer, and it speaks our protocol or is not our gateway."""
    code, log = _exit_code(_settings(), tmp_path, sent=sent)
    assert code == ChildExit.BAD_PEER
    assert "not of our protocol" in log


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_does_not_end_it(tmp_path: Path, number: int) -> None:
    """The gateway gets the same signal, and finishes its payments first."""

    async def test(egress: RunningEgress) -> None:
        os.kill(egress.pid, number)
        await asyncio.sleep(0.3)

        assert await egress.connection.ping(within_seconds=10)

    _run(tmp_path, test)


def test_settings_that_are_no_use_are_refused(tmp_path: Path) -> None:
    """Each with one clear message, and with the code that tells the supervisor not to try again."""
    good = _transport(tmp_path)
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    cases = [
        b"",
        b"{}",
        b'{"cluster":"x","transports":[],"unknown":1}',
        _settings(msgspec.structs.replace(good, ca_file=str(tmp_path / "missing.pem"))),
        _settings(msgspec.structs.replace(good, ca_file=str(empty))),
        _settings(msgspec.structs.replace(good, client_certificate_file=str(empty))),
        _settings(msgspec.structs.replace(good, origin="http://127.0.0.1:9")),
        _settings(msgspec.structs.replace(good, origin="https://Bank.example:443")),
        _settings(good, good),
    ]

    for settings in cases:
        code, log = _exit_code(settings, tmp_path, sent=b"")
        assert code == ChildExit.SETTINGS_REFUSED, settings
        assert '"level":"error"' in log


def test_it_waits_for_its_hsm_and_takes_a_new_one(tmp_path: Path) -> None:
    """Without hsm the status says so; after a new wiring message the next request works."""
    context = SecretContext(cluster=CLUSTER, owner="o", consent="c", provider_origin=ORIGIN)

    async def test(egress: RunningEgress) -> None:
        assert (await egress.link.new_secrets(context)).code_challenge
        assert (await egress.link.status()).hsm_connected
        egress.hsm.hang_up()
        await asyncio.sleep(0.2)
        assert not (await egress.link.status()).hsm_connected

        waiting = asyncio.ensure_future(egress.link.new_secrets(context))
        await asyncio.sleep(0.2)
        egress.wire()

        assert (await waiting).code_challenge
        assert (await egress.link.status()).hsm_connected

    _run(tmp_path, test)


def test_wiring_messages_that_are_wrong_change_nothing(tmp_path: Path) -> None:
    """No descriptor, two of them, a file, a datagram socket: refused, the link to hsm stays."""
    context = SecretContext(cluster=CLUSTER, owner="o", consent="c", provider_origin=ORIGIN)

    async def test(egress: RunningEgress) -> None:
        first, second = socket.socketpair()
        datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with first, second, datagram, (tmp_path / "file").open("wb") as file:
            egress.wiring.send(b"peer")
            socket.send_fds(egress.wiring, [b"peer"], [first.fileno(), second.fileno()])
            socket.send_fds(egress.wiring, [b"peer"], [file.fileno()])
            socket.send_fds(egress.wiring, [b"peer"], [datagram.fileno()])
            await asyncio.sleep(0.2)

        assert (await egress.link.new_secrets(context)).code_challenge
        assert egress.log().count('"level":"error"') == 4

    _run(tmp_path, test)


def test_a_request_whose_deadline_has_passed_is_not_begun(tmp_path: Path) -> None:
    """A call says NotSent, what needs hsm says Unavailable."""
    context = SecretContext(cluster=CLUSTER, owner="o", consent="c", provider_origin=ORIGIN)

    async def test(egress: RunningEgress) -> None:
        request = ProviderRequest(method="GET", origin=ORIGIN, target="/", headers=())
        outcome = await egress.link.call(request, deadline_seconds=0)
        assert getattr(outcome, "code", None) == "DEADLINE_BEFORE_SEND"
        egress.hsm.silent = True
        with pytest.raises(Unavailable):
            await egress.link.new_secrets(context)

    _run(tmp_path, test)


def test_the_process_guards_its_memory(tmp_path: Path) -> None:
    """Not dumpable, no core file, locked memory, wiping allocator: read from outside."""

    async def test(egress: RunningEgress) -> None:
        status = Path(f"/proc/{egress.pid}/status").read_text()
        locked = next(line for line in status.splitlines() if line.startswith("VmLck:"))
        limits = Path(f"/proc/{egress.pid}/limits").read_text()
        core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        # A process that is not dumpable belongs to root in /proc, whoever runs it.
        assert os.stat(f"/proc/{egress.pid}/maps").st_uid == 0  # noqa: PTH116
        assert int(locked.split()[1]) >= 400
        assert core.split()[4:6] == ["0", "0"]
        assert "freed_memory_wiped" not in egress.log()

    _run(tmp_path, test)
