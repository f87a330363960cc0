"""The figures. Each function measures one group and returns its rows; how to read them is in docs/performance.md.

Rules: a baseline runs in the same rounds as what it is compared with, turn about, so that what else the machine does hits both;
a figure is the median over the rounds; a ratio is formed within each round first.
"""

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import grpc
import msgspec

from benchmarks.application import balances_request, sign_request
from benchmarks.parts import hsm_settings_of
from benchmarks.system import System, pss_bytes, running_system
from benchmarks.workers import Load, Result, Worker
from sidecar.ipc.messages import ProviderTransport
from tools.development import DevelopmentError

__all__ = ["Row", "check_payments", "latency", "parts", "process", "throughput"]

_IDLE_SECONDS = 15.0
_RECOVERY_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure: what, how much in which unit, and the target where the project has one."""

    what: str
    value: str
    target: str = ""


def latency(rounds: int, calls: int) -> list[Row]:
    """One call at a time, of a provider that answers at once."""
    works = {"own": "payment_own@instant", "kept": "payment_kept@instant", "balances": "balances@instant"}
    with running_system() as system:
        measured: dict[str, list[Result]] = {}
        for turn in range(rounds + 1):
            for name, work in works.items():
                _keep(measured, turn, f"direct {name}", system.direct.load(Load(work=work, calls=calls)))
            for name, work in {"payment": "payment@instant", "balances": "balances@instant"}.items():
                _keep(measured, turn, f"sidecar {name}", system.application.load(Load(work=work, calls=calls)))
            for name in ("balances", "sign"):
                size = system.message_sizes(name)
                _keep(measured, turn, f"echo {name}", system.application.load(Load(work=f"echo@{size}", calls=calls)))
        check_payments(system)
    rows = [Row(what=f"{name}: p50 / p99", value=_percentiles(results)) for name, results in measured.items()]
    added_own = _added(measured["sidecar payment"], measured["direct own"])
    added_kept = _added(measured["sidecar payment"], measured["direct kept"])
    return [
        *rows,
        Row(what="InitiatePayment adds to p50 (own connection)", value=f"{added_own * 1e3:.2f} ms", target="<= 5 ms"),
        Row(what="InitiatePayment adds to p50 (kept connection)", value=f"{added_kept * 1e3:.2f} ms"),
        Row(
            what="ListBalances adds to p50",
            value=f"{_added(measured['sidecar balances'], measured['direct balances']) * 1e3:.2f} ms",
        ),
    ]


def throughput(rounds: int, seconds: float, in_flight: int) -> list[Row]:
    """Many callers at once, of a provider that takes 50 ms and of one that answers at once."""
    with running_system() as system:
        measured: dict[str, list[Result]] = {}
        cpu: dict[str, list[dict[str, float]]] = {}
        plan = _throughput_plan(system)
        for turn in range(rounds + 1):
            for name, (worker, work) in plan.items():
                before = system.cpu_seconds()
                result = worker.load(Load(work=work, in_flight=in_flight, seconds=seconds))
                after = system.cpu_seconds()
                _keep(measured, turn, name, result)
                if turn:
                    used = {process: (after[process] - before[process]) / result.count for process in after}
                    cpu.setdefault(name, []).append({**used, "caller": result.cpu_seconds / result.count})
        check_payments(system)
    return [*_rates(measured, cpu), *_ratios(measured)]


def _throughput_plan(system: System) -> dict[str, tuple[Worker, str]]:
    return {
        "direct payment, 50 ms": (system.direct, "payment_own@slow"),
        "sidecar payment, 50 ms": (system.application, "payment@slow"),
        "direct balances, 50 ms": (system.direct, "balances@slow"),
        "sidecar balances, 50 ms": (system.application, "balances@slow"),
        "direct balances, at once": (system.direct, "balances@instant"),
        "sidecar balances, at once": (system.application, "balances@instant"),
        "echo, size of balances": (system.application, f"echo@{system.message_sizes('balances')}"),
        "sidecar sign": (system.application, "sign@instant"),
        "echo, size of sign": (system.application, f"echo@{system.message_sizes('sign')}"),
        "direct payment, at once": (system.direct, "payment_own@instant"),
        "sidecar payment, at once": (system.application, "payment@instant"),
    }


def _rates(measured: dict[str, list[Result]], cpu: dict[str, list[dict[str, float]]]) -> list[Row]:
    rows = []
    for name, results in measured.items():
        rate = statistics.median(result.per_second for result in results)
        used = [_microseconds(process, cpu[name]) for process in cpu[name][0]]
        shown = [text for text in used if not name.startswith(("direct", "echo")) or text.startswith("caller")]
        rows.append(Row(what=name, value=f"{rate:,.0f}/s   CPU per call: {', '.join(shown)}"))
    return rows


def _microseconds(process: str, rounds: Sequence[dict[str, float]]) -> str:
    return f"{process} {statistics.median(used[process] for used in rounds) * 1e6:,.0f} us"


def _ratios(measured: dict[str, list[Result]]) -> list[Row]:
    pairs = [
        ("InitiatePayment / direct, 50 ms", "sidecar payment, 50 ms", "direct payment, 50 ms", ">= 0.95"),
        ("ListBalances / direct, 50 ms", "sidecar balances, 50 ms", "direct balances, 50 ms", ">= 0.95"),
        ("ListBalances / echo", "sidecar balances, at once", "echo, size of balances", ">= 0.25"),
        ("Sign / echo", "sidecar sign", "echo, size of sign", ">= 0.25"),
        ("ListBalances / direct, at once", "sidecar balances, at once", "direct balances, at once", ""),
        ("InitiatePayment / direct, at once", "sidecar payment, at once", "direct payment, at once", ""),
    ]
    return [
        Row(what=what, value=f"{_ratio(measured[ours], measured[theirs]):.2f}", target=target)
        for what, ours, theirs, target in pairs
    ]


def process(rounds: int) -> list[Row]:
    """Memory at rest, the time to become ready, the time to recover."""
    with running_system() as system:
        starts = [system.restart_sidecar() for _ in range(rounds)]
        memory = _memory_at_rest(system)
        recoveries = {name: [_recovery(system, name) for _ in range(rounds)] for name in ("egress", "hsm")}
    return [
        *memory,
        Row(what="exec to ready", value=_seconds(starts), target="<= 2 s"),
        *(
            Row(what=f"kill -9 of {name} to the next answer", value=_seconds(taken), target="<= 5 s")
            for name, taken in recoveries.items()
        ),
    ]


def _memory_at_rest(system: System) -> list[Row]:
    if os.geteuid() != 0:
        return [Row(what="memory at rest", value="not measured: the processes are not dumpable, so only root may look")]
    time.sleep(_IDLE_SECONDS)
    sizes = {name: pss_bytes(found.pid) for name, found in system.processes().items()}
    rows = [Row(what=f"memory of {name} at rest (PSS)", value=_mebibytes(size)) for name, size in sizes.items()]
    return [*rows, Row(what="memory at rest, together", value=_mebibytes(sum(sizes.values())), target="<= 128 MiB")]


def _recovery(system: System, name: str) -> float:
    """Seconds from the death of a child to the first call that needs it and succeeds."""
    call = {"egress": _read_balances, "hsm": _sign}[name]
    call(system)
    system.processes()[name].kill()
    began = time.monotonic()
    while time.monotonic() - began < _RECOVERY_SECONDS:
        try:
            call(system)
        except grpc.RpcError:
            time.sleep(0.005)
        else:
            return time.monotonic() - began
    raise TimeoutError(f"the sidecar did not recover from the death of {name}")


def _read_balances(system: System) -> None:
    system.client.stub.accounts.ListBalances(balances_request(system.consents["instant"]), timeout=10)


def _sign(system: System) -> None:
    system.client.stub.signing.Sign(sign_request(system.consents["instant"]), timeout=10)


def parts(rounds: int, seconds: float, in_flight: int) -> list[Row]:
    """What the parts cost: store, hsm process, egress; each next to the bare thing."""
    with running_system() as system, ExitStack() as stack:
        workers = _part_workers(system, stack)
        measured: dict[str, list[Result]] = {}
        for turn in range(rounds + 1):
            for name, (worker, load) in _part_loads(workers, system, seconds, in_flight).items():
                _keep(measured, turn, name, worker.load(load))
    rates = [
        Row(what=name, value=f"{statistics.median(result.per_second for result in results):,.0f}/s")
        for name, results in measured.items()
    ]
    adds = _added(measured["egress link, one call"], measured["direct balances, one"])
    return [
        *rates,
        Row(
            what="sign: link / bare module, one",
            value=f"{_ratio(measured['hsm link, one'], measured['bare module']):.2f}",
        ),
        Row(
            what="sign: link / bare module, many",
            value=f"{_ratio(measured['hsm link, many'], measured['bare module']):.2f}",
        ),
        Row(what="egress adds to a direct read (p50)", value=f"{adds * 1e3:.2f} ms"),
    ]


def _part_workers(system: System, stack: ExitStack) -> dict[str, Worker]:
    development = system.development
    folder = development.directory / "parts"
    folder.mkdir()
    settings = hsm_settings_of(development.configuration(system.bank, operations_port=0))
    layout = system.bank.layout
    transport = ProviderTransport(
        provider="instant",
        origin=f"https://127.0.0.1:{system.provider.hello['ports']['instant']}",
        ca_file=str(layout.ca_certificate),
        client_certificate_file=str(layout.tpp_certificate),
        client_key_file=str(layout.tpp_key),
    )
    options = ["--hsm-settings", settings, "--transport", msgspec.json.encode(transport).decode()]
    environment = {**os.environ, **development.token.environment()}
    return {
        part: stack.enter_context(
            Worker("benchmarks.parts", part, "--directory", str(folder), *options, environment=environment)
        )
        for part in ("store", "sqlite", "processes", "pkcs11")
    }


def _part_loads(
    workers: dict[str, Worker], system: System, seconds: float, in_flight: int
) -> dict[str, tuple[Worker, Load]]:
    def one(work: str) -> Load:
        return Load(work=work, seconds=seconds)

    def many(work: str) -> Load:
        return Load(work=work, in_flight=in_flight, seconds=seconds)

    return {
        "SQLite, a durable commit, one": (workers["sqlite"], one("commit")),
        "store, a command, one": (workers["store"], one("record")),
        "store, a command, many": (workers["store"], many("record")),
        "bare module": (workers["pkcs11"], one("sign")),
        "hsm link, one": (workers["processes"], one("sign")),
        "hsm link, many": (workers["processes"], many("sign")),
        "direct balances, one": (system.direct, one("balances@instant")),
        "egress link, one call": (workers["processes"], one("call")),
        "egress link, a question of its own, one": (workers["processes"], one("status")),
        "direct balances, many": (system.direct, many("balances@instant")),
        "egress link, many calls": (workers["processes"], many("call")),
    }


# --- statistics ---------------------------------------------------------------------------------------------------------


def _keep(measured: dict[str, list[Result]], turn: int, name: str, result: Result) -> None:
    """The first round warms up connections, caches and imports; it is not kept."""
    if turn:
        measured.setdefault(name, []).append(result)


def check_payments(system: System) -> None:
    """The provider's own count: a fast sidecar that pays twice would be worth nothing."""
    if repeated := system.provider.ask(work="counts")["repeated"]:
        raise DevelopmentError(f"{repeated} payments reached the provider more than once")


def _median(result: Result) -> float:
    return statistics.median(result.latencies_seconds)


def _added(ours: Sequence[Result], theirs: Sequence[Result]) -> float:
    return statistics.median(_median(a) - _median(b) for a, b in zip(ours, theirs, strict=True))


def _ratio(ours: Sequence[Result], theirs: Sequence[Result]) -> float:
    return statistics.median(a.per_second / b.per_second for a, b in zip(ours, theirs, strict=True))


def _percentiles(results: Sequence[Result]) -> str:
    everything = sorted(value for result in results for value in result.latencies_seconds)
    p99 = everything[int(len(everything) * 0.99)]
    return f"{statistics.median(_median(result) for result in results) * 1e3:.2f} / {p99 * 1e3:.2f} ms"


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} s (worst of {len(values)}: {max(values):.2f} s)"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
