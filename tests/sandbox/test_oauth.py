"""The authorization server: each rule of the RFCs that a client could break, broken once."""

import base64
import http.client
import json
import secrets
import ssl
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
from joserfc import jwt

from sandbox import pki
from sandbox.direct import DirectTpp, Reply, new_keys, tls_context
from sandbox.directory import DEFAULT_ORGANISATION, certificate_pem, load_certificate, load_issuer, private_pem
from sandbox.testing import SandboxError, SandboxProcess
from tests.sandbox.support import (
    CURRENT,
    REDIRECT_URI,
    SCT,
    JudgedTpp,
    Prepared,
    Session,
    approve,
    code_of,
    create_consent,
    payment_body,
)


def push(tpp: DirectTpp, scope: str | None = None, **changes: str | None) -> Reply:
    return tpp.push(scope or f"AIS:{create_consent(tpp)}", state="s", verifier="v" * 43, **changes)


def error_of(reply: Reply) -> tuple[int, object]:
    assert reply.headers["cache-control"] == "no-store"
    return reply.status, reply.json()["error"]


def issued(prepared: Prepared, folder: Path, organisation: pki.Organisation, *, days: float = 1) -> dict[str, Path]:
    """A further TLS client certificate from the sandbox's CA."""
    key = pki.new_key()
    certificate = pki.issue_tls_client(load_issuer(prepared.layout), organisation, key.public_key(), days=days)
    paths = {"tls_certificate": folder / "c.pem", "tls_key": folder / "c.key"}
    paths["tls_certificate"].write_bytes(certificate_pem(certificate))
    paths["tls_key"].write_bytes(private_pem(key))
    return paths


def test_the_metadata_announces_what_the_server_does(bank: SandboxProcess, tpp: DirectTpp) -> None:
    """RFC 8414 metadata, the same at both listeners, with issuer, mTLS endpoints, PAR and PKCE."""
    url = f"{bank.info.issuer}/.well-known/oauth-authorization-server"
    with urllib.request.urlopen(url, context=tls_context(bank.info.ca_file)) as answer:
        document = json.load(answer)

    assert document == tpp.send("GET", "/.well-known/oauth-authorization-server", b"", {}).json()
    assert document["issuer"] == bank.info.issuer
    assert document["authorization_endpoint"].startswith(bank.info.issuer)
    assert document["token_endpoint"] == document["mtls_endpoint_aliases"]["token_endpoint"]
    assert document["token_endpoint"].startswith(bank.info.api_base_url)
    assert document["require_pushed_authorization_requests"] is True
    assert document["code_challenge_methods_supported"] == ["S256"]
    assert document["authorization_response_iss_parameter_supported"] is True


def test_the_api_wants_a_client_certificate(bank: SandboxProcess) -> None:
    """Without a TLS client certificate there is no answer at all from the API listener, not even a refusal."""
    tls = tls_context(bank.info.ca_file)
    connection = http.client.HTTPSConnection("127.0.0.1", bank.info.ports["api"], context=tls, timeout=10)

    def ask() -> http.client.HTTPResponse:
        connection.request("GET", "/v1/accounts")
        return connection.getresponse()

    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask()
    connection.close()


def test_a_foreign_ca_is_not_believed(bank: SandboxProcess, prepared: Prepared, tmp_path: Path) -> None:
    """A client certificate with the right names from another CA gives no connection."""
    key = pki.new_key()
    foreign = pki.issue_tls_client(pki.make_ca("Sandbox Bank CA"), DEFAULT_ORGANISATION, key.public_key())
    (tmp_path / "c.pem").write_bytes(certificate_pem(foreign))
    (tmp_path / "c.key").write_bytes(private_pem(key))
    tpp = prepared.tpp(bank, tls_certificate=tmp_path / "c.pem", tls_key=tmp_path / "c.key")

    with pytest.raises((ssl.SSLError, ConnectionError)):
        tpp.xs2a("GET", "/v1/accounts")


def test_tokens_come_with_type_scope_and_life(bank: SandboxProcess, tpp: DirectTpp) -> None:
    """A token answer has all of RFC 6749 section 5.1 and may not be cached."""
    consent_id, verifier = create_consent(tpp), secrets.token_urlsafe(32)
    pushed = tpp.push(f"AIS:{consent_id} PIS", state="x y&z", verifier=verifier)
    answer = bank.approve(tpp.authorisation_url(str(pushed.json()["request_uri"])))
    tokens = tpp.exchange(answer["code"], verifier)
    document = tokens.json()

    assert pushed.headers["cache-control"] == tokens.headers["cache-control"] == "no-store"
    assert pushed.json()["expires_in"] == 60
    assert answer["state"] == "x y&z"
    assert (document["token_type"], document["expires_in"]) == ("Bearer", 600)
    assert document["scope"] == f"AIS:{consent_id} PIS"


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": lambda now: now - 1},
        {"exp": lambda now: now + 120},
        {"exp": None},
        {"exp": "soon"},
        {"aud": "https://elsewhere.example"},
        {"aud": None},
        {"sub": "somebody-else"},
        {"iss": "somebody-else"},
        {"jti": None},
        {"jti": ""},
        {"iat": lambda now: now + 60},
        {"nbf": lambda now: now + 60},
    ],
)
def test_a_wrong_client_assertion_is_refused(tpp: DirectTpp, changes: dict[str, object]) -> None:
    """Each claim of private_key_jwt counts: expired, too long, wrong audience, wrong names, no jti."""
    now = int(time.time())
    claims = {name: value(now) if callable(value) else value for name, value in changes.items()}
    reply = tpp.form("/oauth/par", {}, assertion=tpp.assertion(**claims))

    assert error_of(reply) == (401, "invalid_client")


def test_the_token_endpoint_is_not_the_audience(tpp: DirectTpp) -> None:
    """FAPI 2.0: aud is the issuer; the token endpoint's address, or the issuer among others, is refused."""
    endpoint = f"{tpp.api_base_url}/oauth/token"
    replies = [
        tpp.form("/oauth/token", {}, assertion=tpp.assertion(aud=aud)) for aud in (endpoint, [tpp.issuer, endpoint])
    ]

    assert [error_of(reply) for reply in replies] == [(401, "invalid_client")] * 2


def test_a_client_assertion_is_good_once(tpp: DirectTpp) -> None:
    """The same assertion (jti) a second time is refused, also at another endpoint."""
    assertion = tpp.assertion()
    first = tpp.form("/oauth/revoke", {"token": "x"}, assertion=assertion)
    second = tpp.form("/oauth/par", {}, assertion=assertion)

    assert first.status == 200
    assert error_of(second) == (401, "invalid_client")


@pytest.mark.parametrize("spoil", ["signature", "other-key", "none", "padding", "hs256"])
def test_a_forged_client_assertion_is_refused(tpp: DirectTpp, prepared: Prepared, spoil: str) -> None:
    """Wrong signature, another key, alg none, alg HS256 over the public key, or a second spelling: refused."""
    header, claims, signature = tpp.assertion().split(".")
    document = json.loads(base64.urlsafe_b64decode(claims + "=="))
    if spoil == "signature":
        signature = signature[:20] + ("A" if signature[20] != "A" else "B") + signature[21:]
    elif spoil == "other-key":
        header, claims, signature = jwt.encode({"alg": "ES256"}, document, new_keys().jwk()).split(".")
    elif spoil == "none":
        header, signature = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode(), ""
    elif spoil == "hs256":
        header = base64.urlsafe_b64encode(b'{"alg":"HS256"}').rstrip(b"=").decode()
    else:
        signature += "=="
    reply = tpp.form("/oauth/par", {}, assertion=f"{header}.{claims}.{signature}")

    assert error_of(reply) == (401, "invalid_client")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge": "short"}, "invalid_request"),
        ({"code_challenge_method": None}, "invalid_request"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"redirect_uri": None}, "invalid_request"),
        ({"redirect_uri": f"{REDIRECT_URI}/"}, "invalid_request"),
        ({"redirect_uri": f"{REDIRECT_URI}?x=1"}, "invalid_request"),
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"request_uri": "urn:x"}, "invalid_request"),
        ({"request": "a.b.c"}, "invalid_request"),
    ],
)
def test_a_wrong_pushed_request_is_refused(tpp: DirectTpp, changes: dict[str, str | None], error: str) -> None:
    """PKCE S256, the exact redirect address and response_type code are required."""
    assert error_of(push(tpp, **changes)) == (400, error)


@pytest.mark.parametrize("scope", ["AIS:unknown", "accounts", "", "AIS: PIS", "PIS PIS", "PIS payments"])
def test_a_wrong_scope_is_refused(tpp: DirectTpp, scope: str) -> None:
    """Scope is AIS of a consent that waits, PIS, or both; nothing else."""
    assert error_of(tpp.push(scope, state="s", verifier="v" * 43)) == (400, "invalid_scope")


def test_a_decided_consent_cannot_be_asked_for_again(tpp: DirectTpp, session: Session) -> None:
    """A consent that is valid already gives no second authorization."""
    assert error_of(push(tpp, f"AIS:{session.consent_id}")) == (400, "invalid_scope")


def test_a_parameter_given_twice_is_refused(tpp: DirectTpp) -> None:
    """RFC 6749 section 3.1: parameters must not be included more than once."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = tpp.send("POST", "/oauth/token", b"grant_type=refresh_token&grant_type=authorization_code", headers)

    assert error_of(reply) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("grant", "expected"), [({}, "invalid_request"), ({"grant_type": "password"}, "unsupported_grant_type")]
)
def test_an_unknown_grant_is_refused(tpp: DirectTpp, grant: dict[str, str], expected: str) -> None:
    """Only authorization_code and refresh_token are offered."""
    assert error_of(tpp.form("/oauth/token", grant)) == (400, expected)


def test_authorization_without_a_pushed_request_is_refused(bank: SandboxProcess, tpp: DirectTpp) -> None:
    """The authorization endpoint takes no parameters but client_id and a request_uri that was pushed."""
    url = f"{bank.info.issuer}/oauth/authorize?client_id={tpp.client_id}&response_type=code&redirect_uri={REDIRECT_URI}"
    with pytest.raises(SandboxError, match="400"):
        bank.approve(url)


def test_a_request_uri_is_good_once(bank: SandboxProcess, tpp: DirectTpp) -> None:
    """A request_uri opens the consent page once; the second time it is not known."""
    url = tpp.authorisation_url(str(push(tpp).json()["request_uri"]))
    bank.approve(url)

    with pytest.raises(SandboxError, match="was used before"):
        bank.approve(url)


def test_a_request_uri_is_for_its_client_only(bank: SandboxProcess, tpp: DirectTpp) -> None:
    """Another client_id with the request_uri is refused."""
    url = tpp.authorisation_url(str(push(tpp).json()["request_uri"])).replace(tpp.client_id, "other")

    with pytest.raises(SandboxError, match="400"):
        bank.approve(url)


def test_a_code_used_twice_revokes_what_it_gave(tpp: DirectTpp, session: Session) -> None:
    """A second exchange of a code fails, and the tokens of the first are dead (RFC 6749 section 4.1.2)."""
    before = session.read(tpp, "/v1/accounts").status
    again = tpp.exchange(session.code, session.verifier)
    after = session.read(tpp, "/v1/accounts")

    assert before == 200
    assert error_of(again) == (400, "invalid_grant")
    assert (after.status, code_of(after)) == (401, "TOKEN_INVALID")
    assert error_of(tpp.refresh(session.refresh_token)) == (400, "invalid_grant")


@pytest.mark.parametrize("wrong", [{"code_verifier": "w" * 43}, {"redirect_uri": "http://127.0.0.1:8791/other"}])
def test_a_code_needs_its_verifier_and_redirect_address(
    bank: SandboxProcess, tpp: DirectTpp, wrong: dict[str, str]
) -> None:
    """A wrong verifier or redirect address gives nothing, and uses the code up."""
    answer = bank.approve(tpp.authorisation_url(str(push(tpp).json()["request_uri"])))
    first = tpp.exchange(answer["code"], "v" * 43, **wrong)
    second = tpp.exchange(answer["code"], "v" * 43)

    assert error_of(first) == error_of(second) == (400, "invalid_grant")


def test_refreshing_gives_a_new_pair(tpp: DirectTpp, session: Session) -> None:
    """A refresh gives another access token and another refresh token, and both work."""
    new = tpp.refresh(session.refresh_token).json()
    read = tpp.xs2a("GET", f"/v1/consents/{session.consent_id}", token=str(new["access_token"]))

    assert new["access_token"] != session.access_token
    assert new["refresh_token"] != session.refresh_token
    assert read.status == 200
    assert tpp.refresh(str(new["refresh_token"])).status == 200


def test_a_refresh_token_used_twice_kills_the_family(tpp: DirectTpp, session: Session) -> None:
    """Reuse of a rotated refresh token revokes the newest pair too (RFC 9700 section 4.14.2)."""
    new = tpp.refresh(session.refresh_token).json()
    reuse = tpp.refresh(session.refresh_token)
    newest = tpp.refresh(str(new["refresh_token"]))
    read = tpp.xs2a("GET", f"/v1/consents/{session.consent_id}", token=str(new["access_token"]))

    assert error_of(reuse) == error_of(newest) == (400, "invalid_grant")
    assert (read.status, code_of(read)) == (401, "TOKEN_INVALID")


def test_a_token_works_only_with_its_certificate(
    bank: SandboxProcess, tpp: DirectTpp, session: Session, prepared: Prepared, tmp_path: Path
) -> None:
    """The same organisation with another certificate can neither use nor refresh the tokens (RFC 8705)."""
    other = prepared.tpp(bank, **issued(prepared, tmp_path, DEFAULT_ORGANISATION))
    read = session.read(other, "/v1/accounts")
    paid = session.pay(other)
    refreshed = other.refresh(session.refresh_token)
    other.close()

    assert (read.status, code_of(read)) == (401, "TOKEN_INVALID")
    assert (paid.status, code_of(paid)) == (401, "TOKEN_INVALID")
    assert error_of(refreshed) == (400, "invalid_grant")
    assert tpp.refresh(session.refresh_token).status == 200, "the theft that failed must not hurt the owner"


def test_the_certificate_must_be_the_clients(bank: SandboxProcess, prepared: Prepared, tmp_path: Path) -> None:
    """A certificate of another organisation does not authenticate this client, and is no registered provider."""
    stranger = pki.Organisation(name="Stranger", identifier="PSDDE-BAFIN-999999")
    other = prepared.tpp(bank, **issued(prepared, tmp_path, stranger))
    oauth = other.form("/oauth/par", {})
    xs2a = other.xs2a("GET", "/v1/accounts")
    other.close()

    assert error_of(oauth) == (401, "invalid_client")
    assert (xs2a.status, code_of(xs2a)) == (401, "CERTIFICATE_INVALID")


def test_a_provider_without_the_role_may_not_pay(
    bank: SandboxProcess, session: Session, prepared: Prepared, tmp_path: Path
) -> None:
    """A certificate with the role PSP_AI alone reads consents, and is refused for payments."""
    reader = pki.Organisation(
        name=DEFAULT_ORGANISATION.name, identifier=DEFAULT_ORGANISATION.identifier, roles=(pki.ROLE_ACCOUNTS,)
    )
    other = prepared.tpp(bank, **issued(prepared, tmp_path, reader))
    consent = other.xs2a("GET", f"/v1/consents/{session.consent_id}")
    payment = session.pay(other)
    other.close()

    assert consent.status == 200
    assert (payment.status, code_of(payment)) == (401, "ROLE_INVALID")


def test_a_token_names_its_certificate(tpp: DirectTpp, session: Session, prepared: Prepared) -> None:
    """Introspection shows cnf x5t#S256 of the client certificate, and active only while the token lives."""
    alive = tpp.form("/oauth/introspect", {"token": session.access_token}).json()
    tpp.form("/oauth/revoke", {"token": session.access_token})
    dead = tpp.form("/oauth/introspect", {"token": session.access_token}).json()

    thumbprint = pki.facts(load_certificate(prepared.layout.tpp_certificate)).thumbprint
    assert (alive["active"], alive["cnf"]) == (True, {"x5t#S256": thumbprint})
    assert dead == {"active": False}


def test_revoking_a_refresh_token_ends_the_family(tpp: DirectTpp, session: Session) -> None:
    """RFC 7009: revoking the refresh token ends the access token too; unknown tokens are no error."""
    statuses = [tpp.form("/oauth/revoke", {"token": token}).status for token in (session.refresh_token, "unknown")]
    read = session.read(tpp, "/v1/accounts")

    assert statuses == [200, 200]
    assert (read.status, code_of(read)) == (401, "TOKEN_INVALID")


@pytest.mark.parametrize(("token", "code"), [(None, "TOKEN_UNKNOWN"), ("made-up", "TOKEN_UNKNOWN")])
def test_a_missing_or_unknown_token_is_refused(tpp: DirectTpp, session: Session, token: str | None, code: str) -> None:
    """Reads and payments need a token that the bank issued; the answer challenges as RFC 6750 says."""
    reply = tpp.xs2a("GET", "/v1/accounts", token=token, headers={"Consent-ID": session.consent_id})

    assert (reply.status, code_of(reply)) == (401, code)
    assert reply.headers["www-authenticate"].startswith("Bearer")


def test_a_token_without_pis_cannot_pay(bank: SandboxProcess, tpp: DirectTpp) -> None:
    """A token for accounts alone starts no payment."""
    session = approve(bank, tpp, pis=False)
    reply = session.pay(tpp)

    assert (reply.status, code_of(reply)) == (401, "TOKEN_INVALID")
    assert bank.ledger() == []


def test_a_token_for_payments_alone_pays_and_reads_nothing(bank: SandboxProcess, tpp: JudgedTpp) -> None:
    """Scope PIS without a consent gives payments from the ticked accounts and no reads."""
    pushed = tpp.push("PIS", state="s", verifier="v" * 43)
    answer = bank.approve(tpp.authorisation_url(str(pushed.json()["request_uri"])), accounts=[CURRENT])
    token = str(tpp.exchange(answer["code"], "v" * 43).json()["access_token"])
    headers = {"PSU-IP-Address": "192.0.2.1"}
    paid = tpp.xs2a("POST", SCT, token=token, body=payment_body(), headers=headers)
    other = payment_body(debtorAccount={"iban": "DE41100100100000000202"})
    refused = tpp.xs2a("POST", SCT, token=token, body=other, headers=headers)
    read = tpp.xs2a("GET", "/v1/accounts", token=token, headers={"Consent-ID": str(uuid.uuid4())})

    assert (paid.status, refused.status, read.status) == (201, 401, 403)


def test_tokens_can_be_marked(prepared: Prepared) -> None:
    """--token-prefix begins every token, so that a search can find what must be nowhere."""
    with SandboxProcess.start(prepared.layout.root, arguments=["--token-prefix", "canary-"]) as bank:
        tpp = prepared.tpp(bank)
        session = approve(bank, tpp)
        refreshed = tpp.refresh(session.refresh_token).json()
        tpp.close()

    tokens = [session.access_token, session.refresh_token, refreshed["access_token"], refreshed["refresh_token"]]
    assert all(str(token).startswith("canary-") for token in tokens)
    assert len(set(tokens)) == 4
