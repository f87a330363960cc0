"""The sandbox as a command: init, serve, and a clean end."""

import http.client
import json
import os
import pickle
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox.cli import main
from sandbox.direct import new_keys, tls_context
from sandbox.directory import Layout, load_clients
from sandbox.testing import SandboxError, SandboxProcess
from tests.sandbox.support import (
    CURRENT_ID,
    PSU,
    SCT,
    JudgedTpp,
    Prepared,
    Session,
    approve,
    consent_body,
    create_consent,
    payment_body,
)

ROOT = Path(__file__).resolve().parents[2]


def sandbox(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command as a process of its own."""
    command = [sys.executable, "-m", "sandbox", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Arguments of `init` with fresh keys."""
    keys = new_keys()
    (tmp_path / "jwks.json").write_text(json.dumps(keys.client_jwks()))
    (tmp_path / "signing.pem").write_bytes(keys.signing_public_pem())
    return [
        "--directory",
        str(tmp_path / "d"),
        "--client-id",
        "demo",
        "--client-jwks",
        str(tmp_path / "jwks.json"),
        "--request-signing-public-key",
        str(tmp_path / "signing.pem"),
    ]


@pytest.fixture
def own(prepared: Prepared, tmp_path: Path) -> Layout:
    """A directory of this test alone, with the session's keys and certificates."""
    shutil.copytree(prepared.layout.root, tmp_path / "own", ignore=shutil.ignore_patterns("sandbox.json"))
    return Layout(root=tmp_path / "own")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_init_makes_everything_and_says_so(inputs: list[str], tmp_path: Path) -> None:
    """init makes the files of the layout, private keys as 0600, and tells each in plain words."""
    done = sandbox("init", *inputs, "--redirect-uri", "http://127.0.0.1:1/a")
    layout = Layout(root=tmp_path / "d")

    assert done.returncode == 0, done.stderr
    for words in ("the sandbox's CA", "server certificate", "QWAC", "QSEAL", "registered the client demo"):
        assert words in done.stdout
    assert set(contents(layout.root)) == {
        "ca/ca.pem",
        "ca/ca.key",
        "bank/server.pem",
        "bank/server.key",
        "tpp/client.pem",
        "tpp/client.key",
        "tpp/signing.pem",
        "clients.json",
    }
    for path in (layout.ca_key, layout.server_key, layout.tpp_key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_init_again_changes_nothing(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second init leaves every file as it is."""
    main(["init", *inputs])
    before = contents(tmp_path / "d")
    capsys.readouterr()
    again = main(["init", *inputs])

    assert again == 0
    assert "made" not in capsys.readouterr().out
    assert contents(tmp_path / "d") == before


def test_init_makes_only_what_is_missing(inputs: list[str], tmp_path: Path) -> None:
    """A missing server certificate is made anew, the CA stays; more redirect addresses are added to the known ones."""
    main(["init", *inputs, "--redirect-uri", "http://127.0.0.1:1/a"])
    layout = Layout(root=tmp_path / "d")
    before = contents(layout.root)
    layout.server_certificate.unlink()
    main(["init", *inputs, "--redirect-uri", "http://127.0.0.1:1/b"])
    changed = {name for name, content in contents(layout.root).items() if content != before[name]}

    assert changed == {"bank/server.pem", "bank/server.key", "clients.json"}
    assert load_clients(layout)["demo"].redirect_uris == ("http://127.0.0.1:1/a", "http://127.0.0.1:1/b")


def test_a_new_signing_key_is_certified(inputs: list[str], tmp_path: Path) -> None:
    """Another request-signing key gets a certificate of its own; nothing else changes."""
    main(["init", *inputs])
    before = contents(tmp_path / "d")
    (tmp_path / "signing.pem").write_bytes(new_keys().signing_public_pem())
    main(["init", *inputs])
    changed = {name for name, content in contents(tmp_path / "d").items() if content != before[name]}

    assert changed == {"tpp/signing.pem"}


def private_jwks(folder: Path) -> None:
    keys = new_keys()
    (folder / "jwks.json").write_text(json.dumps({"keys": [keys.jwk().as_dict(private=True)]}))


def rsa_key(folder: Path) -> None:
    public = rsa.generate_private_key(65537, 2048).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "signing.pem").write_bytes(pem)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (private_jwks, "holds a private key"),
        (rsa_key, "EC key on P-256"),
        (lambda folder: (folder / "jwks.json").write_text("{}"), "RFC 7517"),
        (lambda folder: (folder / "jwks.json").write_text("["), "not JSON"),
        (lambda folder: (folder / "jwks.json").write_text('{"keys":[{"kty":"EC"}]}'), "not valid"),
        (lambda folder: (folder / "signing.pem").write_text("x"), "not a PEM public key"),
        (lambda folder: (folder / "signing.pem").unlink(), "No such file"),
    ],
)
def test_init_refuses_wrong_keys(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object, words: str
) -> None:
    """Wrong keys are refused with one plain line and exit code 1."""
    assert callable(spoil)
    spoil(tmp_path)
    code = main(["init", *inputs])
    told = capsys.readouterr().err

    assert code == 1
    assert words in told
    assert told.count("\n") == 1


def test_serve_without_init_says_what_to_do(tmp_path: Path) -> None:
    """serve on an empty directory ends with exit code 1 and points to init."""
    done = sandbox("serve", "--directory", str(tmp_path))

    assert done.returncode == 1
    assert "run `init` first" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--port", "70000"], ["--duration", "-1"], ["--signature", "maybe"], ["--token-prefix", "a b"], ["--x"]],
)
def test_serve_refuses_wrong_options(prepared: Prepared, arguments: list[str]) -> None:
    """Wrong options give exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(["serve", "--directory", str(prepared.layout.root), *arguments])

    assert end.value.code == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(own: Layout, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end with exit code 0, and sandbox.json is gone."""
    bank = SandboxProcess.start(own.root)
    announced = json.loads(own.announcement.read_text())
    os.kill(bank.pid, number)

    assert bank.wait(10) == 0
    assert announced["pid"] == bank.pid
    assert not own.announcement.exists()


def test_it_ends_by_itself(own: Layout) -> None:
    """After --duration it ends with exit code 0."""
    bank = SandboxProcess.start(own.root, duration_seconds=1.0)

    assert bank.wait(15) == 0


def test_requests_in_flight_do_not_hold_up_the_end(own: Layout, prepared: Prepared) -> None:
    """A request that is being delayed for minutes does not keep the process alive."""
    bank = SandboxProcess.start(own.root)
    bank.set_fault("delay_before_commit", "/v1/", seconds=300)
    tpp = prepared.tpp(bank)
    tpp._connection.request("GET", "/v1/accounts", headers=tpp.headers(token=None, body=b""))
    deadline = time.monotonic() + 5
    while not bank.requests() and time.monotonic() < deadline:
        time.sleep(0.02)
    code = bank.stop()
    tpp.close()

    assert code == 0


def test_a_port_that_is_taken_is_told(own: Layout) -> None:
    """A second bank on the same port ends with exit code 1 and a plain line; the first goes on."""
    with SandboxProcess.start(own.root) as bank:
        done = sandbox("serve", "--directory", str(own.root), "--port", str(bank.info.ports["api"]))
        alive = bank.ledger()

    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert alive == []


def test_the_helper_says_when_it_does_not_start(tmp_path: Path) -> None:
    """SandboxProcess.start reports a bank that ends instead of becoming ready."""
    with pytest.raises(SandboxError, match="exit code 1"):
        SandboxProcess.start(tmp_path, log=tmp_path / "log")


def test_latency_can_be_set(own: Layout, prepared: Prepared) -> None:
    """--delay-seconds delays every answer below /v1 and nothing else."""
    with SandboxProcess.start(own.root, arguments=["--delay-seconds", "0.5"]) as bank:
        tpp = prepared.tpp(bank)
        started = time.monotonic()
        tpp.form("/oauth/revoke", {"token": "x"})
        oauth_seconds = time.monotonic() - started
        tpp.xs2a("GET", "/v1/accounts")
        xs2a_seconds = time.monotonic() - started - oauth_seconds
        tpp.close()

    assert xs2a_seconds >= 0.5
    assert oauth_seconds < xs2a_seconds


def test_certificates_stand_strict_checks(own: Layout) -> None:
    """openssl accepts server, client and signing certificates under -x509_strict for their purposes."""
    checks: Sequence[tuple[Path, str]] = (
        (own.server_certificate, "sslserver"),
        (own.tpp_certificate, "sslclient"),
        (own.signing_certificate, "any"),
    )
    for path, purpose in checks:
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(own.ca_certificate)]
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("listener", ["api", "browser"])
def test_old_tls_is_refused(bank: SandboxProcess, prepared: Prepared, listener: str) -> None:
    """A client that offers TLS 1.1 at most is turned away by the bank; one with TLS 1.2 gets its handshake."""
    context = tls_context(bank.info.ca_file, prepared.layout.tpp_certificate, prepared.layout.tpp_key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    address = ("127.0.0.1", bank.info.ports[listener])

    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(address, timeout=10) as raw, pytest.raises(ssl.SSLError) as refusal:
        context.wrap_socket(raw, server_hostname="127.0.0.1")
    assert "NO_PROTOCOLS_AVAILABLE" not in str(refusal.value), "that would be the client's own refusal"

    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(address, timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
    ):
        assert tls.version() == "TLSv1.2"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_body_makes_the_bank_stumble(tpp: JudgedTpp, session: Session, data: st.DataObject) -> None:
    """Consents and payments with any member replaced by anything get an answer of the standard, never a 500."""
    path, body = data.draw(st.sampled_from([("/v1/consents", consent_body()), (SCT, payment_body())]))
    body = {**body, data.draw(st.sampled_from(sorted(body))): data.draw(JSON)}
    reply = tpp.xs2a("POST", path, token=session.access_token, body=body, headers=PSU)

    assert reply.status in (201, 400, 401)


def test_the_whole_way_with_the_helper(own: Layout, prepared: Prepared) -> None:
    """The happy path of a demonstration: consent, reads, payment, ledger, in one short run."""
    with SandboxProcess.start(own.root) as bank:
        tpp = prepared.tpp(bank)
        session = approve(bank, tpp)
        accounts = session.read(tpp, "/v1/accounts").json()["accounts"]
        paid = session.pay(tpp)
        ledger = bank.ledger()
        tpp.close()

    assert isinstance(accounts, list)
    assert len(accounts) == 3
    assert [entry["payment_id"] for entry in ledger] == [paid.json()["paymentId"]]


def test_a_killed_bank_remembers(own: Layout, prepared: Prepared, tmp_path: Path) -> None:
    """With --state a bank that was killed after executing a payment still has it, its consent, tokens, and keys."""
    arguments = ["--state", str(tmp_path / "state"), "--idempotency", "header"]
    with SandboxProcess.start(own.root, arguments=arguments) as bank:
        tpp = prepared.tpp(bank)
        session = approve(bank, tpp)
        bank.set_fault("cut_after_commit", SCT)
        with pytest.raises((http.client.HTTPException, OSError)):
            session.pay(tpp, Idempotency_Key="k-1")
        executed = bank.ledger()
        bank.kill()
        tpp.close()
    with SandboxProcess.start(own.root, arguments=arguments) as bank:
        tpp = prepared.tpp(bank)
        after_kill = bank.ledger()
        again = session.pay(tpp, Idempotency_Key="k-1")
        refreshed = tpp.refresh(session.refresh_token)
        balances = session.read(tpp, f"/v1/accounts/{CURRENT_ID}/balances")
        ledger = bank.ledger()
        bank.reset()
        after_reset = bank.ledger()
        tpp.close()

    assert len(executed) == 1
    assert after_kill == executed == ledger
    assert again.json()["paymentId"] == executed[0]["payment_id"]
    assert refreshed.status == 200
    assert b"12468.05" in balances.body
    assert after_reset == []
    state = (tmp_path / "state").read_bytes()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o600
    assert session.access_token.encode() not in state
    assert session.refresh_token.encode() not in state


def test_a_code_is_good_once_over_a_restart(own: Layout, prepared: Prepared, tmp_path: Path) -> None:
    """With --state the second use of a code is found out by the next process too, and revokes what the first gave."""
    arguments = ["--state", str(tmp_path / "state")]
    with SandboxProcess.start(own.root, arguments=arguments) as bank:
        tpp = prepared.tpp(bank)
        session = approve(bank, tpp)
        bank.kill()
        tpp.close()
    with SandboxProcess.start(own.root, arguments=arguments) as bank:
        tpp = prepared.tpp(bank)
        again = tpp.exchange(session.code, session.verifier)
        read = session.read(tpp, "/v1/accounts")
        tpp.close()

    assert (again.status, read.status) == (400, 401)


def test_what_a_person_decided_survives(own: Layout, prepared: Prepared, tmp_path: Path) -> None:
    """With --state a code that was given before the kill can be exchanged after it; a reset before a kill stays one."""
    arguments = ["--state", str(tmp_path / "state")]
    with SandboxProcess.start(own.root, arguments=arguments) as bank:
        tpp = prepared.tpp(bank)
        session = approve(bank, tpp)
        session.pay(tpp)
        bank.reset()
        consent_id = create_consent(tpp)
        pushed = tpp.push(f"AIS:{consent_id}", state="s", verifier="v" * 43)
        answer = bank.approve(tpp.authorisation_url(str(pushed.json()["request_uri"])))
        bank.kill()
        tpp.close()
    with SandboxProcess.start(own.root, arguments=arguments) as bank:
        tpp = prepared.tpp(bank)
        exchanged = tpp.exchange(answer["code"], "v" * 43)
        bank.reset()
        bank.kill()
        tpp.close()
    with SandboxProcess.start(own.root, arguments=arguments) as bank:
        tpp = prepared.tpp(bank)
        forgotten = tpp.xs2a("GET", f"/v1/consents/{consent_id}")
        ledger = bank.ledger()
        tpp.close()

    assert exchanged.status == 200
    assert (forgotten.status, ledger) == (403, [])


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps((0, None)), pickle.dumps(1)])
def test_a_foreign_state_file_is_refused(own: Layout, tmp_path: Path, content: bytes) -> None:
    """A state file that is none ends the start with exit code 1 and a plain line."""
    (tmp_path / "state").write_bytes(content)
    done = sandbox("serve", "--directory", str(own.root), "--state", str(tmp_path / "state"))

    assert done.returncode == 1
    assert "remove it to start anew" in done.stderr
    assert "Traceback" not in done.stderr
