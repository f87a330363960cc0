"""Refresh races before an OAuth server that is not ours: strict rotation, a token that is used twice ends its whole family.

The sidecars are `Tokens` over one store; their requests go through the real egress process, over mutual TLS, with private_key_jwt
and certificate-bound tokens. The server's own books are the oracle. Another database joins by one more entry in STORES.
"""

import asyncio
import base64
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from sidecar.clock import SystemClock
from sidecar.connectors.berlin_group import BerlinGroupConnector
from sidecar.connectors.oauth import OAuthClient
from sidecar.custody.owned_tasks import OwnedTasks
from sidecar.custody.tokens import Access, RefreshEnd, Tokens
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.ids import ConsentId
from sidecar.domain.provider import Answer, Header, KeyPurpose, ProviderRequest, SecretSlot, SlotEncoding
from sidecar.domain.rotation import refresh_time
from sidecar.domain.secrets import SecretKind
from sidecar.errors import Unavailable
from sidecar.ports import SecretsChange, Store, TokenEgress
from tests.fakes.egress import SoftwareKeys
from tests.fakes.hsm import FakeHsm
from tests.independent.oauth_server import IndependentServer, independent_server, installed_packages
from tests.unit.custody.support import PROVIDER, descriptor
from tests.unit.egress.certificates import TestAuthority
from tests.unit.egress.process import CLUSTER, running_egress, transport
from tests.unit.store import postgresql
from tests.unit.store.support import draft, new_claim, new_consent, new_database, opened

RACES = 1000
CONSENTS = 40
AT_ONCE = 8  # consents that are raced for at the same time
SEED = 20261128

OpenStore = Callable[[Path], AbstractAsyncContextManager[Store]]
STORES: dict[str, OpenStore] = {
    "sqlite": lambda folder: opened(new_database(folder), clock=SystemClock(), cluster=CLUSTER),
    "postgresql": lambda _folder: postgresql.opened(postgresql.new_database(), clock=SystemClock()),
}


@dataclass(slots=True, kw_only=True)
class Sidecars:
    """Twenty sidecars on one store, and the server that they all speak to."""

    store: Store
    egress: TokenEgress
    server: IndependentServer
    keys: SoftwareKeys
    connector: BerlinGroupConnector
    hsm: FakeHsm
    tasks: OwnedTasks = field(default_factory=OwnedTasks)
    ends: list[RefreshEnd] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number in range(20):
            self.tokens.append(
                Tokens(
                    cluster=CLUSTER,
                    instance=f"sidecar-{number}",
                    store=self.store,
                    egress=self.egress,
                    hsm=self.hsm,
                    clock=SystemClock(),
                    connectors={PROVIDER: self.connector},
                    tasks=self.tasks,
                    observe=lambda _provider, end: self.ends.append(end),
                )
            )

    async def consents(self, count: int) -> list[ConsentId]:
        return [await self._consent(*pair) for pair in await self.server.mint(count)]

    async def _consent(self, access_token: str, refresh_token: str) -> ConsentId:
        now = SystemClock().now()
        created = new_consent(provider=PROVIDER, create_time=now, expire_time=now + timedelta(days=90))
        await self.store.claim_consent(created, new_claim(created.id), draft(AuditEvent.CONSENT_CREATED))
        at_api, at_token = self.tokens[0].access_context(created, 1), self.tokens[0].refresh_context(created, 1)
        wrapped = (await self.egress.new_secrets(at_token)).wrapped_data_key
        pair = tuple(
            self.keys.seal(kind, token.encode(), context, wrapped_data_key=wrapped).secret
            for kind, token, context in (
                (SecretKind.ACCESS_TOKEN, access_token, at_api),
                (SecretKind.REFRESH_TOKEN, refresh_token, at_token),
            )
        )
        expires = now + timedelta(hours=1)
        active = created.to(
            ConsentState.ACTIVE,
            wrapped_data_key=wrapped,
            activate_time=now,
            access_issue_time=now,
            access_expire_time=expires,
            refresh_time=refresh_time(created.id, issued=now, expires=expires),
        )
        await self.store.change_consent(
            active, secrets=SecretsChange(put=pair), audit=[draft(AuditEvent.CONSENT_ACTIVATED)]
        )
        return created.id

    async def stored(self, consent: ConsentId) -> Consent:
        found = await self.store.consent(consent)
        assert found is not None
        return found

    async def newest(self, consent: ConsentId, kind: SecretKind) -> int:
        newest = (await self.store.secrets(consent)).newest(kind)
        assert newest is not None
        return newest.row_version

    async def race(self, consent: ConsentId, choice: random.Random) -> list[Access | BaseException]:
        """From 2 to 20 sidecars find at about the same moment that the access token must be replaced."""
        version = await self.newest(consent, SecretKind.ACCESS_TOKEN)

        async def one(tokens: Tokens, after_seconds: float) -> Access:
            await asyncio.sleep(after_seconds)
            return await tokens.access(await self.stored(consent), refuse_older_than=version)

        racers = choice.sample(self.tokens, choice.randint(2, len(self.tokens)))
        return await asyncio.gather(
            *(one(tokens, choice.choice((0.0, 0.0, choice.random() * 0.02))) for tokens in racers),
            return_exceptions=True,
        )

    async def probe(self, consent: ConsentId) -> int:
        """What the server says to the consent's access token, which any sidecar would use now."""
        access = await self.tokens[0].access(await self.stored(consent))
        slot = SecretSlot(kind=SecretKind.ACCESS_TOKEN, encoding=SlotEncoding.RAW)
        request = ProviderRequest(
            method="GET",
            origin=self.server.origin,
            target="/v1/probe",
            headers=(Header(name="Authorization", value="Bearer ", slot=slot),),
        )
        outcome = await self.egress.call(
            request, wrapped_data_key=access.consent.wrapped_data_key, secrets=[access.secret], deadline_seconds=10
        )
        assert isinstance(outcome, Answer)
        if outcome.status == 200:
            self.tokens[0].confirm(access)
        return outcome.status


@asynccontextmanager
async def sidecars(folder: Path, packages: Path, open_store: OpenStore) -> AsyncIterator[Sidecars]:
    authority, keys = TestAuthority(folder), SoftwareKeys()
    server_certificate = authority.issue("server", hosts=("127.0.0.1",))
    client = authority.issue("client", client=True)
    hsm = FakeHsm(purposes=frozenset({KeyPurpose.CLIENT_AUTHENTICATION}))
    client_id = descriptor().oauth.client_id
    async with independent_server(
        packages,
        certificate=server_certificate.certificate_file.read_text(),
        key=server_certificate.key_file.read_text(),
        ca=authority.ca_file.read_text(),
        clientCertificate=client.certificate_file.read_text(),
        clientId=client_id,
        clientKey=jwk((await hsm.public_key(KeyPurpose.CLIENT_AUTHENTICATION)).spki_der),
        accessTokenSeconds=3600,
    ) as server:
        files = {
            "client_certificate_file": str(client.certificate_file),
            "client_key_file": str(client.key_file),
        }
        to_server = transport(server.origin, authority.ca_file, provider=PROVIDER, **files)
        async with (
            running_egress(transports=[to_server], keys=keys, folder=folder) as egress,
            open_store(folder) as store,
        ):
            yield Sidecars(
                store=store,
                egress=egress.link,
                server=server,
                keys=keys,
                connector=connector_to(server.origin),
                hsm=hsm,
            )


def connector_to(origin: str) -> BerlinGroupConnector:
    described = descriptor(
        api_uri=origin,
        issuer=origin,
        authorization_endpoint=f"{origin}/auth",
        pushed_authorization_request_endpoint=f"{origin}/request",
        token_endpoint=f"{origin}/token",
        revocation_endpoint=f"{origin}/token/revocation",
    )
    return BerlinGroupConnector(
        descriptor=described, oauth=OAuthClient(descriptor=described, key_id="client-key"), certificate=None
    )


def jwk(spki_der: bytes) -> dict[str, Any]:
    key = load_der_public_key(spki_der)
    assert isinstance(key, EllipticCurvePublicKey)
    numbers = key.public_numbers()
    x, y = (base64.urlsafe_b64encode(n.to_bytes(32, "big")).rstrip(b"=").decode() for n in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": "client-key", "use": "sig"}


@pytest.mark.timeout(900)  # the first time, packages are installed
@pytest.mark.parametrize("store", STORES)
def test_no_race_uses_a_refresh_token_twice(store: str, tmp_path: Path) -> None:
    """R6, 1,000 times: of 2 to 20 sidecars one refreshes; the server sees no token twice, and every consent ends with a token that
    works there, and with the pair before it gone."""
    packages = installed_packages()

    async def run() -> None:
        async with sidecars(tmp_path, packages, STORES[store]) as fleet:
            choice = random.Random(SEED)
            consents = await fleet.consents(CONSENTS)
            turns = asyncio.Semaphore(AT_ONCE)

            async def races(consent: ConsentId) -> None:
                async with turns:
                    for number in range(RACES // CONSENTS):
                        results = await fleet.race(consent, choice)
                        others = [r for r in results if not isinstance(r, Access)]
                        assert all(isinstance(result, Unavailable) for result in others), others
                        assert len(others) < len(results)
                        assert await fleet.newest(consent, SecretKind.REFRESH_TOKEN) == number + 2

            await asyncio.gather(*map(races, consents))
            report = await fleet.server.report()
            works = [await fleet.probe(consent) for consent in consents]
            await fleet.tasks.drain(seconds=10)
            kept = [len((await fleet.store.secrets(consent)).secrets) for consent in consents]
            ended = [(await fleet.stored(consent)).state for consent in consents]

        assert (report["refreshes"], report["granted"], report["reused"], report["revoked"]) == (RACES, RACES, 0, 0)
        assert report["refused"] == []
        assert fleet.ends == [RefreshEnd.GRANTED] * RACES
        assert set(works) == {200}
        assert set(ended) == {ConsentState.ACTIVE}
        assert set(kept) == {2}

    asyncio.run(run())


@pytest.mark.timeout(900)
def test_a_token_that_is_lost_on_its_way_is_never_sent_again(tmp_path: Path) -> None:
    """The server has rotated and its answer is lost: no sidecar sends the old token again, the consent asks for its owner, and the
    old access token works at the server as before."""
    packages = installed_packages()

    async def run() -> None:
        async with sidecars(tmp_path, packages, STORES["sqlite"]) as fleet:
            (consent,) = await fleet.consents(1)
            await fleet.server.lose(1)
            for tokens in fleet.tokens:
                await tokens.renew(await fleet.stored(consent))
            flagged = await fleet.stored(consent)
            status = await fleet.probe(consent)
            report = await fleet.server.report()

        assert flagged.state is ConsentState.NEEDS_REAUTHORISATION
        assert fleet.ends == [RefreshEnd.LOST]
        assert status == 200
        assert (report["refreshes"], report["reused"], report["revoked"]) == (1, 0, 0)

    asyncio.run(run())


@pytest.mark.timeout(900)
def test_the_server_punishes_what_we_must_never_do(tmp_path: Path) -> None:
    """The oracle works: the same token twice, and the server revokes the family and says so in its books."""
    packages = installed_packages()

    async def run() -> None:
        async with sidecars(tmp_path, packages, STORES["sqlite"]) as fleet:
            (consent,) = await fleet.consents(1)
            await fleet.server.lose(1)
            await fleet.tokens[0].renew(await fleet.stored(consent))
            lease = await fleet.store.refresh_lease(consent)
            flagged = await fleet.stored(consent)
            assert lease is not None
            await fleet.store.release_refresh_lease(consent, epoch=lease.epoch)  # as if nothing were open
            reactivated = flagged.to(ConsentState.ACTIVE, failure_reason="")
            await fleet.store.change_consent(reactivated, audit=[draft()])
            await fleet.tokens[1].renew(reactivated)
            report = await fleet.server.report()
            ended = await fleet.stored(consent)

        assert (report["reused"], report["revoked"]) == (1, 1)
        assert fleet.ends == [RefreshEnd.LOST, RefreshEnd.ENDED]
        assert not ended.is_usable(SystemClock().now())

    asyncio.run(run())
