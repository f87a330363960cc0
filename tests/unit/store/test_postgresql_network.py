"""PostgreSQL over a network: TLS that proves the server, and servers that take each other's place."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.domain.payment import PaymentState
from sidecar.errors import CustodyError, Unavailable
from sidecar.store import StoreRefused
from tests.rpc.pki import SERVER, Authority
from tests.unit.store.postgresql import migrated_on, opened, until
from tests.unit.store.support import (
    NOW,
    active_consent,
    dispatch_draft,
    draft,
    new_claim,
    stored_intent,
)
from tools.postgresql.cluster import SIDECAR, ScratchCluster

_PASSWORD = "PASSWORD-CANARY"


class Secured:
    """A server on loopback that speaks TLS and asks for a password, and what a client needs to know of it."""

    def __init__(self, cluster: ScratchCluster, database: str, folder: Path, authority: Authority) -> None:
        self.cluster = cluster
        self.database = database
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(authority.certificate)
        self.passfile = folder / "passfile"
        self.passfile.touch(0o600)
        self.passfile.write_text(f"*:*:*:*:{_PASSWORD}\n")

    def url(self, *, host: str = "localhost", ca_file: Path | None = None, passfile: Path | None = None) -> str:
        return (
            f"postgresql://{SIDECAR}@{host}:{self.cluster.port}/{self.database}"
            f"?sslrootcert={ca_file or self.ca_file}&passfile={passfile or self.passfile}"
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    authority = Authority()
    server = authority.issue(dns=["localhost"], usage=SERVER)
    settings = {"listen_addresses": "127.0.0.1", "port": str(_free_port()), "ssl": "on"}
    with ScratchCluster.create(
        settings=settings, files={"server.crt": server.certificate, "server.key": server.key}
    ) as made:
        with made.connect() as connection:
            connection.execute(f"ALTER ROLE {SIDECAR} PASSWORD '{_PASSWORD}'")
        yield Secured(made, migrated_on(made), tmp_path_factory.mktemp("tls"), authority)


def test_a_server_with_the_right_certificate_is_used(secured: Secured) -> None:
    """Every connection, of the writer and of readers, goes over TLS."""

    async def run() -> None:
        async with opened(secured.database, url=secured.url()) as store:
            await store.record([draft()])
            assert (await store.log_position()).size == 1
            with secured.cluster.connect() as connection:
                rows = connection.execute(
                    "SELECT ssl, version FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
                    " WHERE application_name LIKE 'custody%'"
                ).fetchall()
                keepalives = store._database.first.driver.execute("SHOW tcp_keepalives_idle").fetchone()  # type: ignore[attr-defined]
            assert keepalives == ("5",)  # the server, too, notices when the other end is gone
            assert len(rows) == 2
            assert all(tls and version in ("TLSv1.2", "TLSv1.3") for tls, version in rows)

    asyncio.run(run())


def _refused(url: str) -> str:
    async def run() -> None:
        async with opened("", url=url):
            pass

    with pytest.raises(StoreRefused) as refused:
        asyncio.run(run())
    assert _PASSWORD not in str(refused.value)
    return str(refused.value)


def test_a_server_that_cannot_prove_itself_is_refused(secured: Secured, tmp_path: Path) -> None:
    """Another authority, another host's certificate, a wrong or no password: one message each, and none holds the password."""
    other = tmp_path / "other.pem"
    other.write_bytes(Authority("another CA").certificate)
    wrong, empty = tmp_path / "wrong", tmp_path / "empty"
    for file, content in ((wrong, "*:*:*:*:wrong\n"), (empty, "")):
        file.touch(0o600)
        file.write_text(content)

    assert "not signed by sslrootcert" in _refused(secured.url(ca_file=other))
    assert "is for another host" in _refused(secured.url(host="127.0.0.1"))
    assert "does not accept the role's password" in _refused(secured.url(passfile=wrong))
    assert "asks for a password" in _refused(secured.url(passfile=empty))


def test_a_server_without_tls_is_refused(secured: Secured) -> None:
    """It is not talked to in the clear."""
    secured.cluster.stop()
    secured.cluster.settings["ssl"] = "off"
    secured.cluster.start()
    try:
        assert "does not speak TLS" in _refused(secured.url())
    finally:
        secured.cluster.stop()
        secured.cluster.settings["ssl"] = "on"
        secured.cluster.start()


# --- fail-over --------------------------------------------------------------------------------------------------------


def _both(one: ScratchCluster, other: ScratchCluster, database: str) -> str:
    return f"postgresql://{SIDECAR}@/{database}?host={one.sockets},{other.sockets}&port={one.port},{other.port}"


def _has_all(standby: ScratchCluster, primary: ScratchCluster) -> bool:
    with primary.connect() as connection:
        (written,) = connection.execute("SELECT pg_current_wal_lsn()").fetchall()[0]
    with standby.connect() as connection:
        return bool(connection.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", (written,)).fetchall()[0][0])


def _promote(standby: ScratchCluster) -> None:
    with standby.connect() as connection:
        assert connection.execute("SELECT pg_promote(true, 30)").fetchall() == [(True,)]


def test_after_a_fail_over_to_a_synchronous_replica_all_goes_on() -> None:
    """The first server dies in the middle of work; its synchronous replica takes over. The same sidecar goes on by the same URL:
    what was answered is there, reads follow, and each command was done once (D3)."""

    async def run() -> None:
        with ScratchCluster.create() as primary:
            name = migrated_on(primary)
            with primary.replica() as standby:
                with primary.connect() as connection:
                    connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
                    connection.execute("SELECT pg_reload_conf()")
                async with opened(name, url=_both(primary, standby, name)) as store:
                    consent = active_consent()
                    await store.claim_consent(consent, new_claim(), draft())
                    claims = [new_claim() for _ in range(200)]
                    working = asyncio.gather(
                        *(store.record([draft()], claim=claim) for claim in claims), return_exceptions=True
                    )
                    await asyncio.sleep(0.05)
                    await asyncio.to_thread(primary.stop, immediate=True)
                    outcomes = await working
                    with pytest.raises(CustodyError):
                        await store.record([draft()])
                    await asyncio.to_thread(_promote, standby)
                    with standby.connect() as connection:
                        connection.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
                        connection.execute("SELECT pg_reload_conf()")
                    assert await store.consent(consent.id) == consent
                    again = [await store.record([draft()], claim=claim) for claim in claims]
                    for claim, outcome, later in zip(claims, outcomes, again, strict=True):
                        assert later == claim if outcome is None else isinstance(outcome, Unavailable)
                    assert (await store.log_position()).size == 1 + len(claims)

    asyncio.run(run())


def test_after_a_fail_over_that_lost_commits_nothing_is_written() -> None:
    """The replica that takes over lacks what this sidecar was told is committed, dispatch records among it: every write is
    refused, and somebody is told (D3)."""
    told: list[str] = []

    async def run() -> None:
        with ScratchCluster.create() as primary:
            name = migrated_on(primary)
            with primary.replica() as standby:
                async with opened(name, url=_both(primary, standby, name), alarm=told.append) as store:
                    _, payment = await stored_intent(store)
                    await until(lambda: _has_all(standby, primary))
                    await asyncio.to_thread(standby.stop)
                    dispatched = payment.to(PaymentState.DISPATCHED, now=NOW)
                    await store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
                    await asyncio.to_thread(primary.stop, immediate=True)
                    await asyncio.to_thread(standby.start)
                    await asyncio.to_thread(_promote, standby)
                    assert await store.payment(payment.id) == payment  # as if it had never been sent
                    for _ in range(2):
                        with pytest.raises(Unavailable) as refused:
                            await store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))
                        assert refused.value.reason == "AUDIT_UNAVAILABLE"
                    assert told == ["store_lost_commits"]

    asyncio.run(run())


def test_after_a_crash_of_the_server_all_goes_on() -> None:
    """The server stops at once, as in a power cut, at some moment of the work, several times: what was answered is there (D2)."""

    async def run() -> None:
        with ScratchCluster.create() as server:
            name = migrated_on(server)
            async with opened(name, url=server.url(name)) as store:
                answered, size = [], 0
                for pause in (0.0, 0.004, 0.01, 0.02, 0.04):
                    claims = [new_claim() for _ in range(150)]
                    working = asyncio.gather(
                        *(store.record([draft()], claim=claim) for claim in claims), return_exceptions=True
                    )
                    await asyncio.sleep(pause)
                    await asyncio.to_thread(server.stop, immediate=True)
                    outcomes = await working
                    await asyncio.to_thread(server.start)
                    answered += [claim for claim, outcome in zip(claims, outcomes, strict=True) if outcome is None]
                    for claim in claims:
                        await store.record([draft()], claim=claim)
                    size += len(claims)
                for claim in answered:
                    assert await store.claim(claim.caller, claim.request_id) == claim
                assert (await store.log_position()).size == size

    asyncio.run(run())
