"""The supervisor with the real hsm process on SoftHSM and a stand-in for egress: what dies, hangs or refuses."""

import asyncio
import hashlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import uvloop

from sidecar.domain.provider import KeyPurpose, ProviderRequest
from sidecar.domain.secrets import SecretContext
from sidecar.errors import Corrupt, Unavailable
from sidecar.gateway.links import HSM_DEADLINE_SECONDS, Connection, EgressLink, HsmLink
from sidecar.gateway.supervisor import ChildRefused, OnHsmStarted, Supervisor, SupervisorTimes, child_environment
from sidecar.ipc.messages import ChildExit, EgressSettings, HsmSettings, Message
from sidecar.ports import MasterKeyRecord
from tests.fakes.token import CLUSTER, ProvisionedToken

DIGEST = hashlib.sha256(b"what is signed").digest()
STAND_IN = (sys.executable, "-m", "tests.fakes.egress_process")
CONTEXT = SecretContext(cluster=CLUSTER, owner="owner-1", consent="consent-1")
# The promise is 5 s, and `test_the_promise_of_five_seconds_fits` does its sum; a busy machine gets slack here.
PATIENCE_SECONDS = 20.0


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> ProvisionedToken:
    return ProvisionedToken.make(tmp_path_factory.mktemp("supervisor"))


class House:
    """A running supervisor, its links, and what it said. Keeps its master key as the store would."""

    def __init__(self, supervisor: Supervisor, hsm: HsmLink, egress: EgressLink, lines: list[bytes]) -> None:
        self.supervisor = supervisor
        self.hsm = hsm
        self.egress = egress
        self.lines = lines

    def events(self) -> list[str]:
        return [str(msgspec.json.decode(line)["event"]) for line in self.lines]


class KeyStore:
    """Stands for the store: makes the first master key, and loads what there is into every fresh hsm process."""

    def __init__(self) -> None:
        self.records: list[MasterKeyRecord] = []
        self.loads = 0

    async def load(self, fresh: HsmLink) -> None:
        if not self.records:
            made = await fresh.create_master_key(1)
            self.records.append(
                MasterKeyRecord(
                    key_id=made.key.key_id,
                    version=1,
                    wrapped=made.key.wrapped,
                    root_key_id=made.root_key_id,
                    current=True,
                    create_time=datetime.now(UTC),
                )
            )
        self.loads += await fresh.load_master_keys(self.records)


@asynccontextmanager
async def house(
    token: ProvisionedToken,
    *,
    settings: HsmSettings | None = None,
    load: OnHsmStarted | None = None,
    times: SupervisorTimes | None = None,
) -> AsyncIterator[House]:
    hsm, egress, lines = HsmLink(), EgressLink(), list[bytes]()
    supervisor = Supervisor(
        hsm_settings=settings or token.settings(),
        egress_settings=EgressSettings(cluster=CLUSTER, transports=()),
        hsm=hsm,
        egress=egress,
        on_hsm_started=load or KeyStore().load,
        on_line=lines.append,
        environment=token.environment,
        egress_command=STAND_IN,
        times=times,
    )
    running = House(supervisor, hsm, egress, lines)
    try:
        yield running
    finally:
        await supervisor.stop()


async def until(seconds: float, attempt: Callable[[], Awaitable[object]]) -> float:
    """Repeats `attempt` while it raises Unavailable, as a caller may. How long it took; fails after `seconds`."""
    started = time.monotonic()
    while True:
        try:
            await attempt()
        except Unavailable:
            assert time.monotonic() - started < seconds, "not recovered in time"
            await asyncio.sleep(0.02)
        else:
            took = time.monotonic() - started
            assert took < seconds, "recovered too late"
            return took


def test_both_children_run_and_know_each_other(token: ProvisionedToken) -> None:
    """After `start` the HSM signs and egress gets data keys from hsm over a socket that the gateway does not hold."""

    async def check() -> None:
        async with house(token) as it:
            await it.supervisor.start()
            signature = await it.hsm.sign(KeyPurpose.AUDIT, DIGEST)
            secrets = await it.egress.new_secrets(CONTEXT)

            assert len(signature) == 64
            assert len(secrets.wrapped_data_key) == 146
            assert set(it.supervisor.pids) == {"hsm", "egress"}
            assert it.supervisor.restarts == {"hsm": 0, "egress": 0}

    asyncio.run(check())


def test_a_killed_hsm_is_replaced_and_signs_within_five_seconds(token: ProvisionedToken) -> None:
    """kill -9 of hsm: master keys come back first, then signatures, then data keys for egress."""

    async def check() -> None:
        keys = KeyStore()
        async with house(token, load=keys.load) as it:
            await it.supervisor.start()
            before = it.supervisor.pids["hsm"]
            wrapped = (await it.egress.new_secrets(CONTEXT)).wrapped_data_key
            os.kill(before, signal.SIGKILL)

            await until(PATIENCE_SECONDS, lambda: it.hsm.sign(KeyPurpose.AUDIT, DIGEST))
            await until(PATIENCE_SECONDS, lambda: it.egress.new_secrets(CONTEXT))
            assert it.supervisor.pids["hsm"] != before
            assert it.supervisor.restarts == {"hsm": 1, "egress": 0}
            assert keys.loads == 2
            assert len(wrapped) == 146

    asyncio.run(check())


def test_a_killed_egress_is_replaced_and_wired_to_the_same_hsm(token: ProvisionedToken) -> None:
    """kill -9 of egress does not touch hsm, and the new egress gets data keys from it."""

    async def check() -> None:
        async with house(token) as it:
            await it.supervisor.start()
            pids = it.supervisor.pids
            os.kill(pids["egress"], signal.SIGKILL)

            await until(PATIENCE_SECONDS, lambda: it.egress.new_secrets(CONTEXT))
            assert it.supervisor.pids["hsm"] == pids["hsm"]
            assert it.supervisor.pids["egress"] != pids["egress"]
            assert it.supervisor.restarts == {"hsm": 0, "egress": 1}

    asyncio.run(check())


def test_children_that_lost_their_socket_to_each_other_get_a_new_one(token: ProvisionedToken) -> None:
    """Both live, and egress has no hsm any more: they are introduced anew, and neither has to end with what it works on."""

    async def check() -> None:
        async with house(token) as it:
            await it.supervisor.start()
            pids = it.supervisor.pids
            request = ProviderRequest(method="GET", origin="https://bank.example:443", target="/lose-hsm", headers=())
            await it.egress.call(request, deadline_seconds=10)
            with pytest.raises(Unavailable):
                await it.egress.new_secrets(CONTEXT)

            await until(PATIENCE_SECONDS, lambda: it.egress.new_secrets(CONTEXT))
            assert it.supervisor.pids == pids
            assert it.events().count("reintroduced") == 1

    asyncio.run(check())


def test_children_that_know_each_other_keep_their_socket(token: ProvisionedToken) -> None:
    """Looking after them is no reason to replace what works: who waits on a replaced socket would fail."""

    async def check() -> None:
        async with house(token, times=SupervisorTimes(acquaintance_every_seconds=0.05)) as it:
            await it.supervisor.start()
            await asyncio.sleep(1.0)

            assert "reintroduced" not in it.events()

    asyncio.run(check())


def test_the_promise_of_five_seconds_fits() -> None:
    """A caller gives up, and a hanging child is found and replaced, within 5 s by the limits themselves."""
    times = SupervisorTimes()

    assert HSM_DEADLINE_SECONDS < 5.0
    assert times.silence_seconds + times.ping_every_seconds + times.restart_delays_seconds[0] < 5.0


@pytest.mark.parametrize("child", ["hsm", "egress"])
def test_a_stopped_child_is_replaced(token: ProvisionedToken, child: str) -> None:
    """SIGSTOP: the process lives and does not answer, as one does that hangs in a call. It is killed and replaced."""

    async def check() -> None:
        async with house(token) as it:
            await it.supervisor.start()
            stopped = it.supervisor.pids[child]
            process = psutil.Process(stopped)
            os.kill(stopped, signal.SIGSTOP)
            started = time.monotonic()
            with pytest.raises(Unavailable):
                await (it.hsm.sign(KeyPurpose.AUDIT, DIGEST) if child == "hsm" else it.egress.new_secrets(CONTEXT))
            failed_after_seconds = time.monotonic() - started

            attempt = (
                (lambda: it.hsm.sign(KeyPurpose.AUDIT, DIGEST))
                if child == "hsm"
                else (lambda: it.egress.new_secrets(CONTEXT))
            )
            await until(PATIENCE_SECONDS, attempt)
            assert failed_after_seconds < PATIENCE_SECONDS
            assert not process.is_running()
            assert it.supervisor.restarts[child] == 1
            assert "child_silent" in it.events()

    asyncio.run(check())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_gateway_that_stands_still_does_not_blame_its_children(
    token: ProvisionedToken, run: Callable[[Coroutine[Any, Any, None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop is blocked, with a ping unwritten, for longer than the silence that a child may keep: nobody is killed.

    The two loops differ in what comes first after a standstill, timers or sockets.
    """
    ping, standstills_seconds = Connection.tell, [1.5, 1.5]

    def ping_and_stand_still(connection: Connection, body: Message) -> None:
        if standstills_seconds:  # runs before the ping is written
            asyncio.get_running_loop().call_soon(time.sleep, standstills_seconds.pop())
        ping(connection, body)

    async def check() -> None:
        async with house(token, times=SupervisorTimes(ping_every_seconds=0.2, silence_seconds=1.0)) as it:
            monkeypatch.setattr(Connection, "tell", ping_and_stand_still)
            await it.supervisor.start()
            while standstills_seconds:
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.5)

            assert it.supervisor.restarts == {"hsm": 0, "egress": 0}

    run(check())


def test_a_call_during_the_restart_waits_for_the_new_process(token: ProvisionedToken) -> None:
    """A caller that comes while there is no process is served by the next one, within its own deadline."""

    async def check() -> None:
        async with house(token) as it:
            await it.supervisor.start()
            os.kill(it.supervisor.pids["hsm"], signal.SIGKILL)
            while it.hsm.connected:
                await asyncio.sleep(0.005)

            assert len(await it.hsm.sign(KeyPurpose.AUDIT, DIGEST)) == 64

    asyncio.run(check())


def test_a_wrong_pin_is_tried_once_and_stops_the_start(token: ProvisionedToken, tmp_path: Path) -> None:
    """The token refuses the PIN: one login, one clear message, and no second start of the process."""

    async def check() -> None:
        wrong = tmp_path / "pin"
        wrong.write_text("0000-not-it")
        wrong.chmod(0o600)
        async with house(token, settings=token.settings(pin_file=wrong)) as it:
            with pytest.raises(ChildRefused) as caught:
                await it.supervisor.start()

            assert caught.value.exit_code == ChildExit.PIN_REFUSED
            assert caught.value.message == "the token refused the PIN: it was tried once and is not tried again"
            assert it.events().count("start_refused") == 1
            assert it.supervisor.restarts["hsm"] == 0
            assert "0000-not-it" not in repr(it.lines) + repr(caught.value)

    asyncio.run(check())


def test_a_pin_that_is_changed_while_running_stops_the_sidecar_after_one_try(
    token: ProvisionedToken, tmp_path: Path
) -> None:
    """A restart with a PIN that no longer fits: `failure` resolves, and nobody tries a second time."""

    async def check() -> None:
        pin = tmp_path / "pin"
        pin.write_bytes(token.configuration.pin_file.read_bytes())
        pin.chmod(0o600)
        async with house(token, settings=token.settings(pin_file=pin)) as it:
            await it.supervisor.start()
            pin.write_text("0000-not-it")
            os.kill(it.supervisor.pids["hsm"], signal.SIGKILL)
            refused = await asyncio.wait_for(asyncio.shield(it.supervisor.failure), 20)
            await asyncio.sleep(1.0)

            assert refused.exit_code == ChildExit.PIN_REFUSED
            assert it.supervisor.restarts["hsm"] == 1
            assert it.events().count("start_refused") == 1

    asyncio.run(check())


STUB = """
import os, socket, sys, time
from pathlib import Path
from sidecar.hsm.log import log
from sidecar.ipc.frames import HEADER, encode_frame
from sidecar.ipc.messages import GatewayToHsmFrame, HsmToGatewayFrame, Pong, decoder_for

tries = Path({tries!r})
number = len(tries.read_text()) if tries.exists() else 0
tries.write_text("x" * (number + 1))
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
gateway = socket.socket(fileno=int(arguments["--gateway-fd"]))


def well():
    decoder = decoder_for(GatewayToHsmFrame)
    while header := gateway.recv(HEADER.size, socket.MSG_WAITALL):
        request = decoder.decode(gateway.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL))
        gateway.sendall(encode_frame(HsmToGatewayFrame(id=request.id, body=Pong())))
        if number == 0:
            os._exit(40)  # it was ready once, and must be replaced


def refuses_and_hangs():
    log("error", "start_refused", "the PIN is refused", exit_code=51)
    gateway.close()
    time.sleep(60)


def hangs_while_the_pin_is_tried():
    log("info", "log_in", "the PIN is tried, once")
    time.sleep(60)


def dies_while_the_pin_is_tried():
    log("info", "log_in", "the PIN is tried, once")
    os.abort()


def is_told_something_else_than_a_refusal():
    log("info", "log_in", "the PIN is tried, once")
    log("error", "start_refused", "the login failed for another reason than the PIN", exit_code=41)
    os._exit(41)


def hangs_after_the_login():
    log("info", "log_in", "the PIN is tried, once")
    log("info", "logged_in", "the token took the PIN")
    time.sleep(60)


(well if number in (0, 2) else {behaviour})()
"""
"""An hsm process whose second start goes wrong, and whose third would go well."""


@asynccontextmanager
async def house_of_stub(
    token: ProvisionedToken, folder: Path, behaviour: str
) -> AsyncIterator[tuple[Supervisor, Callable[[], int]]]:
    """And how often the stub was started."""
    tries, program = folder / "tries", folder / "stub.py"
    program.write_text(STUB.format(tries=str(tries), behaviour=behaviour))

    async def load(fresh: HsmLink) -> None:
        assert fresh.connected

    supervisor = Supervisor(
        hsm_settings=token.settings(),
        egress_settings=EgressSettings(cluster=CLUSTER, transports=()),
        hsm=HsmLink(),
        egress=EgressLink(),
        on_hsm_started=load,
        on_line=lambda _: None,
        environment=token.environment,
        hsm_command=(sys.executable, str(program)),
        egress_command=STAND_IN,
        times=SupervisorTimes(start_seconds=4.0),
    )
    try:
        await supervisor.start()
        yield supervisor, lambda: len(tries.read_text())
    finally:
        await supervisor.stop()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("refuses_and_hangs", "the PIN is refused"),
        ("hangs_while_the_pin_is_tried", "nobody knows whether the token took it"),
        ("dies_while_the_pin_is_tried", "nobody knows whether the token took it"),
    ],
)
def test_a_pin_is_not_tried_again_however_the_process_ends(
    token: ProvisionedToken, tmp_path: Path, behaviour: str, message: str
) -> None:
    """What hsm said counts although it was killed afterwards; and where it said nothing, the one try counts as used up."""

    async def check() -> None:
        async with house_of_stub(token, tmp_path, behaviour) as (supervisor, starts):
            refused = await asyncio.wait_for(asyncio.shield(supervisor.failure), PATIENCE_SECONDS)
            await asyncio.sleep(0.5)

            assert refused.exit_code == ChildExit.PIN_REFUSED
            assert message in refused.message
            assert starts() == 2

    asyncio.run(check())


@pytest.mark.parametrize("behaviour", ["is_told_something_else_than_a_refusal", "hangs_after_the_login"])
def test_a_start_that_fails_for_another_reason_than_the_pin_is_tried_again(
    token: ProvisionedToken, tmp_path: Path, behaviour: str
) -> None:
    """The token took the PIN, or did not judge it: the next process may log in."""

    async def check() -> None:
        async with house_of_stub(token, tmp_path, behaviour) as (supervisor, starts):
            started = time.monotonic()
            while starts() < 3 or "hsm" not in supervisor.pids:
                assert time.monotonic() - started < PATIENCE_SECONDS
                assert not supervisor.failure.done()
                await asyncio.sleep(0.05)

    asyncio.run(check())


def test_master_keys_that_do_not_open_stop_the_start(token: ProvisionedToken) -> None:
    """A database with another HSM's master key: the reason is given, and no child is left behind."""

    async def check() -> None:
        async def load(fresh: HsmLink) -> None:
            raise Corrupt("ENVELOPE_CORRUPT", "a wrapped master key does not open in this cluster under this version")

        children = set(psutil.Process().children())
        async with house(token, load=load) as it:
            with pytest.raises(ChildRefused) as caught:
                await it.supervisor.start()

        assert caught.value.exit_code == ChildExit.KEY_REFUSED
        assert caught.value.message.startswith("a wrapped master key does not open")
        assert set(psutil.Process().children()) <= children

    asyncio.run(check())


def test_a_database_that_is_away_during_a_restart_is_waited_for(token: ProvisionedToken) -> None:
    """Master keys cannot be loaded just now: the supervisor goes on trying, and offers the HSM only afterwards."""

    async def check() -> None:
        keys = KeyStore()
        away = 0

        async def load(fresh: HsmLink) -> None:
            nonlocal away
            if away:
                away -= 1
                raise Unavailable("STORE_UNAVAILABLE", "the database does not answer")
            await keys.load(fresh)

        async with house(token, load=load) as it:
            await it.supervisor.start()
            away = 2
            os.kill(it.supervisor.pids["hsm"], signal.SIGKILL)
            await until(30, lambda: it.hsm.sign(KeyPurpose.AUDIT, DIGEST))

            assert it.supervisor.restarts["hsm"] == 3

    asyncio.run(check())


def test_an_unexpected_error_while_restarting_is_not_lost(token: ProvisionedToken) -> None:
    """A defect in what reloads the master keys: the supervisor says so instead of going on without an HSM."""

    async def check() -> None:
        keys, broken = KeyStore(), False

        async def load(fresh: HsmLink) -> None:
            if broken:
                raise RuntimeError("a defect")
            await keys.load(fresh)

        async with house(token, load=load) as it:
            await it.supervisor.start()
            broken = True
            os.kill(it.supervisor.pids["hsm"], signal.SIGKILL)
            refused = await asyncio.wait_for(asyncio.shield(it.supervisor.failure), 30)

        assert isinstance(refused.__cause__, RuntimeError)
        assert refused.child == "hsm"

    asyncio.run(check())


def test_a_child_that_cannot_be_started_gives_the_status(token: ProvisionedToken) -> None:
    """A command that ends at once, without a word of ours, is reported with its exit status."""

    async def check() -> None:
        supervisor = Supervisor(
            hsm_settings=token.settings(),
            egress_settings=EgressSettings(cluster=CLUSTER, transports=()),
            hsm=HsmLink(),
            egress=EgressLink(),
            on_hsm_started=KeyStore().load,
            on_line=lambda _: None,
            environment=token.environment,
            egress_command=(sys.executable, "-c", "raise SystemExit(9)"),
        )
        with pytest.raises(ChildRefused) as caught:
            await supervisor.start()

        assert caught.value.child == "egress"
        assert caught.value.exit_code == 9

    asyncio.run(check())


def test_stop_ends_both_children(token: ProvisionedToken) -> None:
    """After `stop` no child is left, and each ended by itself."""

    async def check() -> None:
        async with house(token) as it:
            await it.supervisor.start()
            processes = [psutil.Process(pid) for pid in it.supervisor.pids.values()]
            await it.supervisor.stop()

            assert not any(process.is_running() for process in processes)
            assert "stopped" in it.events()

    asyncio.run(check())


def test_children_end_with_a_gateway_that_is_killed(token: ProvisionedToken, tmp_path: Path) -> None:
    """SIGKILL of the gateway: nobody tells the children anything, and none is left."""
    script = f"""
import asyncio, sys
from pathlib import Path
import msgspec
from tests.unit.gateway.test_supervisor import KeyStore, STAND_IN
from sidecar.gateway.links import EgressLink, HsmLink
from sidecar.gateway.supervisor import Supervisor
from sidecar.ipc.messages import EgressSettings, HsmSettings

async def main():
    supervisor = Supervisor(
        hsm_settings=msgspec.json.decode({msgspec.json.encode(token.settings())!r}, type=HsmSettings),
        egress_settings=EgressSettings(cluster="c", transports=()),
        hsm=HsmLink(), egress=EgressLink(), on_hsm_started=KeyStore().load, egress_command=STAND_IN,
    )
    await supervisor.start()
    Path({str(tmp_path / "pids")!r}).write_text(" ".join(map(str, supervisor.pids.values())))
    await asyncio.sleep(60)

asyncio.run(main())
"""

    async def check() -> None:
        gateway = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            script,
            env={**token.environment, "PYTHONPATH": "."},
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            for _ in range(600):
                if (tmp_path / "pids").exists() and (tmp_path / "pids").read_text():
                    break
                await asyncio.sleep(0.05)
            children = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
            assert len(children) == 2
        finally:
            gateway.kill()
            await gateway.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []

    asyncio.run(check())


def test_foreign_words_of_a_child_are_dropped_once_it_is_ready(token: ProvisionedToken, tmp_path: Path) -> None:
    """Whatever a library prints while a child handles secrets does not reach our log; our own lines do."""
    program = tmp_path / "talker.py"
    program.write_text(
        "import sys, threading, time\n"
        "sys.stderr.write('before\\n'); sys.stderr.flush()\n"
        "def talk():\n"
        "    time.sleep(1.5)\n"
        '    sys.stderr.write(\'token-canary\\n{"event": "x", "message": "ours"}\\n\'); sys.stderr.flush()\n'
        "threading.Thread(target=talk, daemon=True).start()\n"
        "from tests.fakes.egress_process import main\n"
        "main()\n"
    )

    async def check() -> None:
        lines = list[bytes]()
        supervisor = Supervisor(
            hsm_settings=token.settings(),
            egress_settings=EgressSettings(cluster=CLUSTER, transports=()),
            hsm=HsmLink(),
            egress=EgressLink(),
            on_hsm_started=KeyStore().load,
            on_line=lines.append,
            environment=token.environment,
            egress_command=(sys.executable, str(program)),
        )
        try:
            await supervisor.start()
            for _ in range(200):
                if b'{"event": "x", "message": "ours"}' in lines:
                    break
                await asyncio.sleep(0.05)
        finally:
            await supervisor.stop()

        assert b"before" in lines
        assert b'{"event": "x", "message": "ours"}' in lines
        assert not any(b"canary" in line for line in lines)

    asyncio.run(check())


HOSTILE = {
    "GRPC_TRACE": "all",
    "LD_PRELOAD": "/x.so",
    "SSLKEYLOGFILE": "/keys",
    "https_proxy": "http://x",
    "HTTPS_PROXY": "http://x",
    "PYTHONPATH": "/evil",
    "PYTHONSTARTUP": "/evil.py",
    "MALLOC_PERTURB_": "0",
    "GLIBC_TUNABLES": "glibc.malloc.perturb=0",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x",
}


@pytest.mark.parametrize("keep_foreign", [True, False])
def test_a_childs_environment_holds_nothing_that_traces_or_preloads(keep_foreign: bool) -> None:
    """What traces, preloads, proxies or writes key logs does not reach a child; the allocator's switches do."""
    base = {**HOSTILE, "PATH": "/bin", "LC_ALL": "C", "SOFTHSM2_CONF": "/conf"}

    environment = child_environment(base, keep_foreign=keep_foreign)

    assert not {name: value for name, value in HOSTILE.items() if environment.get(name) == value}
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.perturb=90:glibc.malloc.tcache_count=0"
    assert (environment["PYTHONMALLOC"], environment["LD_BIND_NOW"]) == ("malloc", "1")
    assert (environment["PATH"], environment["LC_ALL"]) == ("/bin", "C")
    assert ("SOFTHSM2_CONF" in environment) is keep_foreign
    assert Path(environment["PYTHONPATH"], "sidecar", "hsm").is_dir()
