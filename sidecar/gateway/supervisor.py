"""Starts the two child processes, watches them, replaces what dies or hangs, and ends them.

Rules:
- Children are started by exec, never by fork alone, with four inherited descriptors and an environment of our making.
- A child that does not answer for a few seconds is killed, by its own process descriptor, so no other process can be hit.
- A new child is offered to callers only when it is ready: an hsm process has its master keys back before the first signature.
- Restarts come fast at first, then slower. A child that says that another try would do harm or no good (a refused PIN, a
  weak key) is not started again: `failure` resolves with its one clear message, and the sidecar stops. What it said counts,
  however it ended: a vendor's module may hang on the way out until it is killed.
- A PIN is tried once: a process that ends while its PIN is tried, and does not say what the token said, is not started again.
- hsm and egress get their socket to each other through their wiring sockets, anew whenever one of them is new, and when
  egress says that it lost it: neither has to end for that.
- No child outlives the gateway: its sockets close, and the kernel kills it when its parent dies.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Final, Protocol

import msgspec

import sidecar
from sidecar.errors import Corrupt, CustodyError
from sidecar.gateway.links import SILENCE_SECONDS, AnswerLost, Connection, EgressLink, HsmLink
from sidecar.hardening import WIPING_ENVIRONMENT
from sidecar.ipc.messages import (
    ChildExit,
    EgressSettings,
    EgressStatus,
    EgressToGatewayFrame,
    Envelope,
    GatewayToEgressFrame,
    GatewayToHsmFrame,
    GetEgressStatus,
    HsmSettings,
    HsmToGatewayFrame,
    Ping,
)
from sidecar.loglines import Value, log_line

__all__ = ["PEER_MESSAGE", "ChildRefused", "Supervisor", "SupervisorTimes", "child_environment"]

PEER_MESSAGE: Final = b"peer"
"""On a wiring socket: comes with one descriptor, the newest socket to the other child. It replaces the older one."""

HSM: Final = "hsm"
EGRESS: Final = "egress"

LOG_IN_EVENT: Final = "log_in"
LOGGED_IN_EVENT: Final = "logged_in"
"""Events of the hsm process's log: between them the PIN is tried."""

_MAX_LINE_BYTES: Final = 64 * 1024
_LAST_WORDS_SECONDS: Final = 1.0
_STALL_SECONDS: Final = 0.25
_KEPT_BY_EVERY_CHILD = frozenset(
    {"HOME", "LANG", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "TMPDIR", "TZ"}
)
_DROPPED = frozenset(
    {"ALL_PROXY", "FTP_PROXY", "GLIBC_TUNABLES", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSLKEYLOGFILE"}
)
_FINAL_CODES = frozenset(code for code in ChildExit if not code.may_restart)
_PIN_IN_DOUBT = (
    "the process ended while the PIN was tried, and nobody knows whether the token took it: it is not tried again; "
    "look at the token's PIN flags, then start the sidecar anew"
)
_DROPPED_PREFIXES = ("GRPC_", "LD_", "MALLOC_", "OTEL_", "PYTHON")


class ChildRefused(Exception):
    """A child will not run, and says why in one line. `exit_code` is None where it never ended by itself."""

    def __init__(self, *, child: str, message: str, exit_code: int | None) -> None:
        super().__init__(f"{child}: {message}")
        self.child = child
        self.message = message
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorTimes:
    """All in seconds. `restart_delays_seconds`: before the first, second, … restart in a row; the last one repeats."""

    start_seconds: float = 20.0
    ping_every_seconds: float = 0.5
    silence_seconds: float = SILENCE_SECONDS
    stop_seconds: float = 2.0
    acquaintance_every_seconds: float = 1.0
    restart_delays_seconds: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
    steady_seconds: float = 30.0


class OnHsmStarted(Protocol):
    def __call__(self, fresh: HsmLink) -> Awaitable[None]:
        """Loads the master keys through `fresh`, which nobody else has yet. Raises CustodyError when it cannot."""


class Supervisor:
    """`start`, then `failure` tells if a child is gone for good, then `stop`.

    `on_line` gets each log line of a child, without its end; `restarts` counts by child. To be used on the main thread: the
    kernel counts a child's parent by thread, and kills the child when that thread ends.
    """

    def __init__(
        self,
        *,
        hsm_settings: HsmSettings,
        egress_settings: EgressSettings,
        hsm: HsmLink,
        egress: EgressLink,
        on_hsm_started: OnHsmStarted,
        on_line: Callable[[bytes], None] | None = None,
        environment: Mapping[str, str] | None = None,
        hsm_command: Sequence[str] = (sys.executable, "-m", "sidecar.hsm"),
        egress_command: Sequence[str] = (sys.executable, "-m", "sidecar.egress"),
        times: SupervisorTimes | None = None,
    ) -> None:
        base = os.environ if environment is None else environment
        self._times = times or SupervisorTimes()
        self._on_line = on_line or _to_standard_error
        self._on_hsm_started = on_hsm_started
        self._links: dict[str, HsmLink | EgressLink] = {HSM: hsm, EGRESS: egress}
        self._plans = {
            HSM: _Plan(
                name=HSM,
                command=tuple(hsm_command),
                settings=msgspec.json.encode(hsm_settings),
                # A PKCS#11 module is configured by its vendor's variables, so all but the dangerous ones stay.
                environment=child_environment(base, keep_foreign=True),
                request_type=GatewayToHsmFrame,
                answer_type=HsmToGatewayFrame,
            ),
            EGRESS: _Plan(
                name=EGRESS,
                command=tuple(egress_command),
                settings=msgspec.json.encode(egress_settings),
                environment=child_environment(base, keep_foreign=False),
                request_type=GatewayToEgressFrame,
                answer_type=EgressToGatewayFrame,
            ),
        }
        self._children: dict[str, _Child] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._failure: asyncio.Future[ChildRefused] | None = None
        self._restarts = dict.fromkeys(self._plans, 0)

    @property
    def restarts(self) -> Mapping[str, int]:
        return dict(self._restarts)

    @property
    def pids(self) -> Mapping[str, int]:
        """Of the children that run now."""
        return {name: child.pid for name, child in self._children.items()}

    @property
    def failure(self) -> "asyncio.Future[ChildRefused]":
        """Resolves when a child has ended for good. Not to be cancelled; use asyncio.wait or shield."""
        if self._failure is None:
            self._failure = asyncio.get_running_loop().create_future()
        return self._failure

    async def start(self) -> None:
        """Both children run and are ready. Raises ChildRefused with the reason of the one that is not; then none runs."""
        try:
            async with asyncio.TaskGroup() as group:
                for name in self._plans:
                    group.create_task(self._bring_up(name))
        except BaseExceptionGroup as failures:
            await self.stop()
            raise _first_reason(failures) from failures
        except BaseException:
            await self.stop()
            raise
        keepings: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            *((name, partial(self._keep, name)) for name in self._plans),
            (EGRESS, self._keep_acquainted),
        ]
        self._keepers = [asyncio.create_task(self._unless_refused(name, keeping)) for name, keeping in keepings]

    async def stop(self) -> None:
        """Closes the children's sockets, waits for them to end, and kills what does not."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._keepers = []
        for link in self._links.values():
            link.detach()
        children, self._children = list(self._children.values()), {}
        await asyncio.gather(*(child.end(within_seconds=self._times.stop_seconds) for child in children))

    # -- one child, kept running

    async def _keep(self, name: str) -> None:
        while True:
            await self._watch(self._children[name])
            await self._replace(name)

    async def _unless_refused(self, name: str, keeping: Callable[[], Awaitable[None]]) -> None:
        try:
            await keeping()
        except ChildRefused as refused:
            self._give_up(refused)
        except Exception as error:  # noqa: BLE001 (a keeper that dies unseen would leave the sidecar without its child)
            unexpected = ChildRefused(child=name, message="an unexpected error ended its supervision", exit_code=None)
            unexpected.__cause__ = error
            self._give_up(unexpected)

    def _give_up(self, refused: ChildRefused) -> None:
        if not self.failure.done():
            self.failure.set_result(refused)

    async def _watch(self, child: "_Child") -> None:
        """Returns when the child has ended or does not answer."""
        unanswered_since = time.monotonic()
        while not child.ended.done() and not child.connection.closed.done():
            child.connection.tell(Ping())
            left_seconds = unanswered_since + self._times.silence_seconds - time.monotonic()
            stalled = await self._waited(child, min(self._times.ping_every_seconds, max(left_seconds, 0.0)))
            now = time.monotonic()
            if stalled or child.connection.last_heard >= unanswered_since:
                unanswered_since = now
            elif now - unanswered_since >= self._times.silence_seconds:
                self._say("error", "child_silent", "a child process does not answer; it is killed and replaced", child)
                return

    async def _waited(self, child: "_Child", seconds: float) -> bool:
        """Whether it was this process that stood still: then the child's silence proves nothing."""
        started = time.monotonic()
        ends = (child.ended, child.connection.closed)
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return time.monotonic() - started > seconds + _STALL_SECONDS

    # -- the children's socket to each other

    async def _keep_acquainted(self) -> None:
        """Introduces the children anew when egress is found without its hsm twice in a row; once may be a wiring under way."""
        strangers: tuple[int, ...] = ()
        while True:
            await asyncio.sleep(self._times.acquaintance_every_seconds)
            found = await self._strangers()
            if found and found == strangers:
                self._say(
                    "warning",
                    "reintroduced",
                    "egress lost its socket to hsm; both get a new one",
                    self._children[EGRESS],
                )
                self._introduce()
                found = ()
            strangers = found

    async def _strangers(self) -> tuple[int, ...]:
        """The process ids of both, if both run and egress says that it has no hsm."""
        if set(self._children) != {HSM, EGRESS}:
            return ()
        egress, seconds = self._children[EGRESS], self._times.silence_seconds
        try:
            answer = await egress.connection.ask(
                GetEgressStatus(), answer_before_seconds=seconds, child_deadline_seconds=seconds
            )
        except AnswerLost:
            return ()  # the watchdog's business
        alone = isinstance(answer, EgressStatus) and not answer.hsm_connected
        return tuple(self.pids.values()) if alone and len(self._children) == 2 else ()

    # -- a child that ended or hangs

    async def _replace(self, name: str) -> None:
        """Raises ChildRefused when there is no point in another try."""
        await self._take_down(name)
        while True:
            self._restarts[name] += 1
            await asyncio.sleep(self._delay_seconds(name))
            try:
                return await self._bring_up(name)
            except ChildRefused as refused:
                if not _may_restart(refused.exit_code):
                    raise

    async def _take_down(self, name: str) -> None:
        self._links[name].detach()
        child = self._children.pop(name)
        code = child.verdict(await child.kill())
        if time.monotonic() - child.started > self._times.steady_seconds:
            self._plans[name].tries_in_a_row = 0
        if not _may_restart(code):
            raise child.refusal(code)

    def _delay_seconds(self, name: str) -> float:
        plan, delays = self._plans[name], self._times.restart_delays_seconds
        plan.tries_in_a_row += 1
        return delays[min(plan.tries_in_a_row, len(delays)) - 1]

    async def _bring_up(self, name: str) -> None:
        """Started, ready, and offered to callers. Raises ChildRefused, with the process gone."""
        child = await _Child.started_by(self._plans[name], on_line=self._on_line)
        try:
            await child.become_ready(within_seconds=self._times.start_seconds)
            if name == HSM:
                await self._load_master_keys(child)
        except BaseException:
            await child.kill()
            raise
        self._children[name] = child
        self._introduce()
        self._links[name].attach(child.connection)
        self._say("info", "child_ready", "a child process is ready", child)

    async def _load_master_keys(self, child: "_Child") -> None:
        fresh = HsmLink()
        fresh.attach(child.connection)
        try:
            async with asyncio.timeout(self._times.start_seconds):
                await self._on_hsm_started(fresh)
        except TimeoutError as error:
            message = "the master keys were not loaded in time"
            raise ChildRefused(child=HSM, message=message, exit_code=ChildExit.UNREACHABLE) from error
        except CustodyError as error:
            # Keys that do not open never will; anything else, such as a database that is away, may heal.
            code = ChildExit.KEY_REFUSED if isinstance(error, Corrupt) else ChildExit.UNREACHABLE
            raise ChildRefused(child=HSM, message=error.message, exit_code=code) from error

    def _introduce(self) -> None:
        """Gives hsm and egress a new socket to each other, as soon as both are there."""
        if set(self._children) != {HSM, EGRESS}:
            return
        ends = socket.socketpair()
        for end, child in zip(ends, (self._children[HSM], self._children[EGRESS]), strict=True):
            with end:
                child.wire(end)

    def _say(self, level: str, event: str, message: str, child: "_Child") -> None:
        fields: dict[str, Value] = {"message": message, "child": child.name, "pid": child.pid}
        self._on_line(log_line("gateway", level, event, fields).rstrip(b"\n"))


@dataclass(slots=True, kw_only=True)
class _Plan:
    """How a child is started."""

    name: str
    command: tuple[str, ...]
    settings: bytes
    environment: dict[str, str]
    request_type: type[Envelope]
    answer_type: type[Envelope]
    tries_in_a_row: int = field(default=0)


class _Child:
    """One process, from exec to reaping."""

    def __init__(
        self,
        *,
        name: str,
        process: "subprocess.Popen[bytes]",
        connection: Connection,
        wiring: socket.socket,
        lines: "_Lines",
    ) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.pid = process.pid
        self.connection = connection
        self.started = time.monotonic()
        self.ended: asyncio.Future[int] = loop.create_future()
        self._process = process
        self._wiring = wiring
        self._lines = lines
        # Names this very process even after its number is given to another one.
        self._descriptor = os.pidfd_open(process.pid)
        loop.add_reader(self._descriptor, self._reap)

    @classmethod
    async def started_by(cls, plan: _Plan, *, on_line: Callable[[bytes], None]) -> "_Child":
        gateway, gateway_of_child = socket.socketpair()
        wiring, wiring_of_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        wiring.settimeout(0)
        with gateway_of_child, wiring_of_child, _settings_file(plan.settings) as settings_fd:
            process = _execute(plan, settings_fd, gateway_of_child.fileno(), wiring_of_child.fileno())
        try:
            connection = await Connection.over(gateway, request_type=plan.request_type, answer_type=plan.answer_type)
            assert process.stderr is not None
            lines = await _Lines.of(process.stderr, on_line=on_line)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return cls(name=plan.name, process=process, connection=connection, wiring=wiring, lines=lines)

    async def become_ready(self, *, within_seconds: float) -> None:
        """Answers its first ping. Raises ChildRefused."""
        probe = asyncio.ensure_future(self.connection.ping(within_seconds=within_seconds))
        await asyncio.wait((probe, self.ended), return_when=asyncio.FIRST_COMPLETED)
        # A child that ends closes its socket too, and which of the two is seen first is chance.
        if await probe:
            self._lines.quiet = True
            return
        code = await self.kill()
        raise self.refusal(code)

    def verdict(self, status: int) -> int:
        """What an end with `status` means: the final code that the child gave as its reason counts more than how it ended."""
        if self._lines.final_code is not None:
            return self._lines.final_code
        return ChildExit.PIN_REFUSED if self._pin_in_doubt(status) else status

    def refusal(self, status: int) -> ChildRefused:
        message = self._lines.last_words or f"the process ended with status {status} and gave no reason"
        if self._lines.final_code is None and self._pin_in_doubt(status):
            message = _PIN_IN_DOUBT
        return ChildRefused(child=self.name, message=message, exit_code=self.verdict(status))

    def _pin_in_doubt(self, status: int) -> bool:
        # By these two the child tells that the token did not judge the PIN.
        return self._lines.pin_is_tried and status not in (ChildExit.STOPPED, ChildExit.UNREACHABLE)

    def wire(self, end: socket.socket) -> None:
        # A child that is gone or does not read is the watchdog's business, and its successor gets a socket of its own.
        with contextlib.suppress(OSError):
            socket.send_fds(self._wiring, [PEER_MESSAGE], [end.fileno()])

    async def end(self, *, within_seconds: float) -> int:
        """Closes its sockets, by which a child knows to end. The exit code."""
        self.connection.close()
        self._wiring.close()
        await asyncio.wait((self.ended,), timeout=within_seconds)
        return await self._kill_now()

    async def kill(self) -> int:
        """Makes sure that it has ended. The exit code: negative for the signal that ended it."""
        if self.connection.closed.done():
            # It closed its socket, so it is on its way out, and its exit code and last words are worth a moment.
            await asyncio.wait((self.ended,), timeout=_LAST_WORDS_SECONDS)
        return await self._kill_now()

    async def _kill_now(self) -> int:
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        code = await asyncio.shield(self.ended)
        self.connection.close()
        self._wiring.close()
        await self._lines.finished()
        return code

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self.ended.set_result(self._process.wait())


class _Lines(asyncio.Protocol):
    """A child's standard error. Once the child is `quiet` (it handles secrets now), only our own log lines pass."""

    def __init__(self, *, on_line: Callable[[bytes], None]) -> None:
        self.quiet = False
        self.last_words = ""
        self.final_code: ChildExit | None = None
        self.pin_is_tried = False
        self._on_line = on_line
        self._rest = bytearray()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def of(cls, pipe: IO[bytes], *, on_line: Callable[[bytes], None]) -> "_Lines":
        _, lines = await asyncio.get_running_loop().connect_read_pipe(lambda: cls(on_line=on_line), pipe)
        return lines

    async def finished(self) -> None:
        """A grandchild may hold the pipe open, so this waits a moment only."""
        await asyncio.wait((self._closed,), timeout=0.5)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest[:_MAX_LINE_BYTES]
        for line in lines:
            self._take(bytes(line[:_MAX_LINE_BYTES]))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._closed.set_result(None)

    def _take(self, line: bytes) -> None:
        record = _record_of(line)
        if record is not None:
            self._note(record)
            self._on_line(line)
        elif line and not self.quiet:
            self._on_line(line)

    def _note(self, record: "_Record") -> None:
        if record.event in (LOG_IN_EVENT, LOGGED_IN_EVENT):
            self.pin_is_tried = record.event == LOG_IN_EVENT
        if record.level != "info" or record.exit_code is not None:
            self.last_words = record.message
        if record.exit_code in _FINAL_CODES:
            self.final_code = ChildExit(record.exit_code)


def child_environment(base: Mapping[str, str], *, keep_foreign: bool) -> dict[str, str]:
    """What a child gets: nothing that traces, preloads, proxies or logs keys; the allocator's switches; where `sidecar` is.

    With `keep_foreign`, variables that we do not know stay; otherwise only a short list does.
    """
    kept = {name: value for name, value in base.items() if _is_kept(name, keep_foreign=keep_foreign)}
    source = str(Path(sidecar.__file__).resolve().parent.parent)
    return {**kept, **WIPING_ENVIRONMENT, "PYTHONPATH": source, "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}


def _is_kept(name: str, *, keep_foreign: bool) -> bool:
    if name in _KEPT_BY_EVERY_CHILD or name.startswith("LC_"):
        return True
    dangerous = name.upper() in _DROPPED or name.startswith(_DROPPED_PREFIXES)
    return keep_foreign and not dangerous


def _execute(plan: _Plan, settings_fd: int, gateway_fd: int, wiring_fd: int) -> "subprocess.Popen[bytes]":
    descriptors = {"--settings-fd": settings_fd, "--gateway-fd": gateway_fd, "--wiring-fd": wiring_fd}
    arguments = [text for name, number in descriptors.items() for text in (name, str(number))]
    return subprocess.Popen(
        [*plan.command, *arguments],
        env=plan.environment,
        pass_fds=tuple(descriptors.values()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@contextlib.contextmanager
def _settings_file(settings: bytes) -> Iterator[int]:
    descriptor = os.memfd_create("settings", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, settings)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _may_restart(code: int | None) -> bool:
    try:
        return ChildExit(code).may_restart  # type: ignore[arg-type]
    except ValueError:
        return True  # a crash, or our own kill


def _first_reason(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The child's own refusal, where one is among the failures."""
    refused, others = failures.split(ChildRefused)
    first: BaseException = refused or others or failures
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


class _Record(msgspec.Struct, frozen=True):
    """What the supervisor reads of a log line of ours; a line without a `message` is none."""

    message: str
    event: str = ""
    level: str = ""
    exit_code: int | None = None


def _record_of(line: bytes) -> _Record | None:
    try:
        return msgspec.json.decode(line, type=_Record)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _to_standard_error(line: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.buffer.write(line + b"\n")
        sys.stderr.buffer.flush()
