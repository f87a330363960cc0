"""One running bank for all tests of this folder, made anew (reset) before each."""

from collections.abc import Iterator

import pytest

from sandbox.direct import new_keys
from sandbox.directory import initialise
from sandbox.testing import SandboxProcess
from tests.sandbox.support import CLIENT_ID, REDIRECT_URI, JudgedTpp, Prepared, Session, approve


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    keys = new_keys()
    layout = initialise(
        tmp_path_factory.mktemp("sandbox"),
        client_id=CLIENT_ID,
        client_jwks=keys.client_jwks(),
        request_signing_public_key_pem=keys.signing_public_pem(),
        redirect_uris=[REDIRECT_URI],
        tell=lambda _text: None,
    )
    return Prepared(layout=layout, keys=keys)


@pytest.fixture(scope="session")
def running(prepared: Prepared) -> Iterator[SandboxProcess]:
    """A bank of class C: it knows no idempotency key."""
    with SandboxProcess.start(prepared.layout.root, arguments=["--frequency-per-day", "1000"]) as bank:
        yield bank


@pytest.fixture
def bank(running: SandboxProcess) -> SandboxProcess:
    running.reset()
    return running


@pytest.fixture
def tpp(bank: SandboxProcess, prepared: Prepared) -> Iterator[JudgedTpp]:
    tpp = prepared.tpp(bank)
    yield tpp
    tpp.close()


@pytest.fixture
def session(bank: SandboxProcess, tpp: JudgedTpp) -> Session:
    """Anna's consent to everything on all her accounts, and to payments."""
    return approve(bank, tpp)
