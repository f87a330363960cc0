"""Figures of a vault that many sidecars share, and of one that has grown: PostgreSQL beside SQLite."""

import sqlite3
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.figures import Row, check_payments
from benchmarks.system import running_system, work_folder
from benchmarks.workers import Load, Result, Worker
from sidecar.store.migrate import migrate, migrate_postgresql
from tools.postgresql.cluster import OWNER, SIDECAR, ScratchCluster

__all__ = ["shared"]

_SIDECARS = 32
_PROCESSES = 2  # so that both processors take part; each holds half of the sidecars' stores
_CALLERS_OF_ONE = 16
_FEW, _MANY = 10_000, 1_000_000
_DELAY_SECONDS = 0.2
_SOME, _CROWD = 64, 500


def shared(rounds: int, seconds: float) -> list[Row]:
    """Many sidecars on one PostgreSQL; one consent among few and among many, on both databases."""

    with work_folder() as folder, _cluster() as cluster:
        rows = [*_writers(cluster, rounds, seconds), *_readers(cluster, folder, rounds, seconds)]
    return [*rows, *_payments(rounds, seconds)]


def _cluster() -> ScratchCluster:
    """On the disk, but not below the project's folder: where we are root the server runs as somebody else, who may not go there."""
    settings = {"max_connections": str(2 * _SIDECARS + 40)}
    return ScratchCluster.create(settings=settings, parent=Path(tempfile.gettempdir()))


# --- writers ------------------------------------------------------------------------------------------------------------


def _writers(cluster: ScratchCluster, rounds: int, seconds: float) -> list[Row]:
    rates: dict[str, list[float]] = {"grouped": [], "single": []}
    with ExitStack() as stack:
        halves = {
            name: stack.enter_context(_halves(cluster, options))
            for name, options in {"grouped": (), "single": ("--one-commit-per-command",)}.items()
        }
        for turn in range(rounds + 1):
            for name, workers in halves.items():
                rate = sum(result.per_second for result in _together(workers, seconds))
                if turn:
                    rates[name].append(rate)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["grouped"], rates["single"], strict=True))
    return [
        Row(what=f"{_SIDECARS} sidecars, group commit", value=f"{statistics.median(rates['grouped']):,.0f}/s"),
        Row(what=f"{_SIDECARS} sidecars, one commit a command", value=f"{statistics.median(rates['single']):,.0f}/s"),
        Row(what="group commit / one commit a command", value=f"{ratio:.1f}", target=">= 4"),
    ]


@contextmanager
def _halves(cluster: ScratchCluster, options: Sequence[str]) -> Iterator[list[Worker]]:
    """The same sidecars in the same number of processes, on a database of their own."""
    url = _database(cluster)
    each = _SIDECARS // _PROCESSES
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Worker(
                    "benchmarks.stores", "--url", url, "--first", str(number * each), "--instances", str(each), *options
                )
            )
            for number in range(_PROCESSES)
        ]


def _together(workers: Sequence[Worker], seconds: float) -> list[Result]:
    load = Load(work="change", in_flight=_SIDECARS // _PROCESSES * _CALLERS_OF_ONE, seconds=seconds)
    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(lambda worker: worker.load(load), workers))


def _database(cluster: ScratchCluster) -> str:
    name = cluster.create_database()
    migrate_postgresql(cluster.url(name, role=OWNER), grant=SIDECAR)
    return cluster.url(name)


# --- payments -----------------------------------------------------------------------------------------------------------


def _payments(rounds: int, seconds: float) -> list[Row]:
    """One sidecar on PostgreSQL, at a provider that takes 200 ms: alone, as many as leave processors free, and 500 at once."""
    crowds = (1, _SOME, _CROWD)
    ours: dict[int, list[Result]] = {crowd: [] for crowd in crowds}
    direct: dict[int, list[Result]] = {crowd: [] for crowd in crowds}
    with running_system(store="postgresql", delay_seconds=_DELAY_SECONDS) as system:
        for turn in range(rounds + 1):
            for crowd in crowds:
                theirs = system.direct.load(Load(work="payment_own@slow", in_flight=crowd, seconds=seconds))
                mine = system.application.load(Load(work="payment@slow", in_flight=crowd, seconds=seconds))
                if turn:
                    direct[crowd].append(theirs)
                    ours[crowd].append(mine)
        check_payments(system)
    added = statistics.median(
        statistics.median(mine.latencies_seconds) - statistics.median(theirs.latencies_seconds)
        for mine, theirs in zip(ours[1], direct[1], strict=True)
    )
    return [
        Row(what="PostgreSQL, 200 ms: InitiatePayment adds to p50", value=f"{added * 1e3:.2f} ms", target="<= 5 ms"),
        _compared(_SOME, ours, direct, target=""),
        _compared(_CROWD, ours, direct, target=">= 0.80"),
    ]


def _compared(crowd: int, ours: dict[int, list[Result]], direct: dict[int, list[Result]], *, target: str) -> Row:
    pairs = list(zip(ours[crowd], direct[crowd], strict=True))
    ratio = statistics.median(mine.per_second / theirs.per_second for mine, theirs in pairs)
    mine, theirs = (statistics.median(each.per_second for each in side) for side in zip(*pairs, strict=True))
    return Row(
        what=f"PostgreSQL, 200 ms, {crowd} in flight: / direct",
        value=f"{ratio:.2f} ({mine:,.0f} of {theirs:,.0f}/s)",
        target=target,
    )


# --- readers ------------------------------------------------------------------------------------------------------------

_VALUES = (
    "'workload:shop', 'person-' || n, 'bank', '[\"payments\"]', '[]', 'active', {bytes}, '', 0, 4102444800000000, '', {bytes},"
    " '', {bytes}, '', 1"
)
_EMPTY_OF_SQLITE, _EMPTY_OF_POSTGRESQL = "x''", "''::bytea"
_COLUMNS = (
    "id, caller, owner, provider, purposes, accounts, state, subject_key, redirect_uri, create_time, expire_time,"
    " provider_consent_id, state_digest, authorisation_uri, wrapped_data_key, failure_reason, version"
)


def _readers(cluster: ScratchCluster, folder: Path, rounds: int, seconds: float) -> list[Row]:
    rows: list[Row] = []
    for database in ("SQLite", "PostgreSQL"):
        taken: dict[int, list[float]] = {_FEW: [], _MANY: []}
        with ExitStack() as stack:
            workers = {
                count: stack.enter_context(
                    _on_sqlite(folder, count) if database == "SQLite" else _on_postgresql(cluster, count)
                )
                for count in taken
            }
            for turn in range(rounds + 1):
                for count, worker in workers.items():
                    result = worker.load(Load(work=f"read@{count}", seconds=seconds))
                    if turn:
                        taken[count].append(statistics.median(result.latencies_seconds))
        ratio = statistics.median(many / few for many, few in zip(taken[_MANY], taken[_FEW], strict=True))
        few, many = (statistics.median(taken[count]) * 1e6 for count in (_FEW, _MANY))
        rows += [
            Row(what=f"{database}: a consent among {_FEW:,} / {_MANY:,}", value=f"{few:.0f} / {many:.0f} us"),
            Row(what=f"{database}: among {_MANY:,} / among {_FEW:,}", value=f"{ratio:.2f}", target="<= 1.5"),
        ]
    return rows


@contextmanager
def _on_sqlite(folder: Path, count: int) -> Iterator[Worker]:
    path = folder / f"consents-{count}.db"
    path.touch(0o600)
    migrate(path)
    with sqlite3.connect(path) as driver:
        driver.execute(
            "WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < ?)"
            f" INSERT INTO consents ({_COLUMNS})"
            f" SELECT printf('c-%024d', n), {_VALUES.format(bytes=_EMPTY_OF_SQLITE)} FROM numbers",
            (count,),
        )
    driver.close()
    with Worker("benchmarks.stores", "--file", str(path)) as worker:
        yield worker


@contextmanager
def _on_postgresql(cluster: ScratchCluster, count: int) -> Iterator[Worker]:
    url = _database(cluster)
    name = url.partition("?")[0].rpartition("/")[2]
    with cluster.connect(name) as connection:
        connection.execute(
            f"INSERT INTO custody.consents ({_COLUMNS}) SELECT 'c-' || lpad(n::text, 24, '0'),"
            f" {_VALUES.format(bytes=_EMPTY_OF_POSTGRESQL)} FROM generate_series(0, {count - 1}) AS numbers (n)"
        )
        connection.execute("VACUUM ANALYZE custody.consents")
    with Worker("benchmarks.stores", "--url", url) as worker:
        yield worker
