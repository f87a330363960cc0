"""The main job over real processes: a consent goes into custody and pays, and the application never sees the token."""

import base64
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import custody
import pytest
from custody import ConsentState, PaymentState
from joserfc import jws
from joserfc.jwk import ECKey

from tests.e2e.system import CREDITOR, System, eventually


def test_consent_reads_and_payment(system: System) -> None:
    """From the question to the settled payment, which the bank has once, also after a repeat with the same request id."""
    consent = system.consent()
    accounts = system.client.accounts.list(consent.name)
    balances = system.client.accounts.balances(consent.name, accounts[0].name)
    request_id = str(uuid.uuid4())
    payment = system.pay(consent, amount="12.34", request_id=request_id, end_to_end_id="E2E-1")
    final = system.client.payments.wait(payment.name, timeout_seconds=30)
    again = system.pay(consent, amount="12.34", request_id=request_id, end_to_end_id="E2E-1")

    assert consent.state is ConsentState.ACTIVE
    assert {account.iban for account in accounts} == {account.iban for account in consent.accounts}
    assert balances
    assert final.state is PaymentState.SETTLED
    assert again.name == payment.name
    entries = system.bank.ledger("E2E-1")
    assert [(entry["amount"], entry["creditor_iban"]) for entry in entries] == [("12.34", CREDITOR)]


def test_other_body_under_the_same_request_id(system: System) -> None:
    """The same request id with another amount is refused and pays nothing."""
    consent = system.consent()
    request_id = str(uuid.uuid4())
    system.pay(consent, amount="1.00", request_id=request_id, end_to_end_id="E2E-2")

    with pytest.raises(custody.RequestIdReusedError):
        system.pay(consent, amount="2.00", request_id=request_id, end_to_end_id="E2E-2")

    assert len(system.bank.ledger("E2E-2")) == 1


def test_payment_that_needs_the_owner(system: System) -> None:
    """Above the bank's exemption the owner approves at the bank; the application gets the address, then the settled state."""
    consent = system.consent()
    payment = system.pay(consent, amount="750.00", end_to_end_id="E2E-3")
    assert payment.state is PaymentState.AWAITING_AUTHORISATION
    assert payment.authorisation_uri is not None
    assert payment.authorisation_uri.startswith(system.bank.info.issuer)

    system.bank.redirect_after(payment.authorisation_uri)

    assert system.client.payments.wait(payment.name, timeout_seconds=60).state is PaymentState.SETTLED
    assert len(system.bank.ledger("E2E-3")) == 1


def test_denied_consent(system: System) -> None:
    """Where the owner says no the consent has failed, and nothing of it can be used."""
    pending = system.pending_consent()

    with pytest.raises(custody.PreconditionError) as refusal:
        system.client.consents.complete(pending.consent.name, system.approve(pending, decision="deny"))

    assert refusal.value.reason == "AUTHORISATION_DENIED"
    assert system.client.consents.get(pending.consent.name).state is ConsentState.FAILED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "somebody-elses-state-which-is-long-enough"}, "STATE_MISMATCH"),
        ({"iss": "https://other-bank.example"}, "ISSUER_MISMATCH"),
    ],
    ids=["bi_D9_foreign_state", "bi_D12_other_issuer"],
)
def test_wrong_redirect_leaves_the_consent_unharmed(system: System, change: dict[str, str], reason: str) -> None:
    """A redirect with a foreign state or another issuer is refused; the right one still completes the consent."""
    pending = system.pending_consent()
    right = system.approve(pending)
    parameters = {name: values[0] for name, values in parse_qs(urlsplit(right).query).items()}
    wrong = right.split("?")[0] + "?" + "&".join(f"{k}={v}" for k, v in {**parameters, **change}.items())

    with pytest.raises(custody.PreconditionError) as refusal:
        system.client.consents.complete(pending.consent.name, wrong)

    assert refusal.value.reason == reason
    assert system.client.consents.complete(pending.consent.name, right).state is ConsentState.ACTIVE


def test_replayed_redirect(system: System) -> None:
    """bi_D10: a redirect that was used is refused, and the consent stays active."""
    pending = system.pending_consent()
    redirect = system.approve(pending)
    system.client.consents.complete(pending.consent.name, redirect)

    with pytest.raises(custody.PreconditionError):
        system.client.consents.complete(pending.consent.name, redirect)

    assert system.client.consents.get(pending.consent.name).state is ConsentState.ACTIVE


def test_revoked_consent_opens_nothing(system: System) -> None:
    """After revocation nothing can be done with the consent, the bank knows, and the tombstone and the log entries stay."""
    consent = system.consent()
    revoked = system.client.consents.revoke(consent.name)

    with pytest.raises(custody.ConsentUnusableError) as refusal:
        system.client.accounts.list(consent.name)

    assert revoked.state is ConsentState.REVOKED
    assert refusal.value.reason == "CONSENT_REVOKED"
    assert system.client.consents.get(consent.name).revoke_time is not None
    events = [entry.event for entry in system.admin.audit.entries(consent=consent.name)]
    assert events.index("CONSENT_REVOKED") < events.index("CONSENT_KEY_DESTROYED")


def test_signature_over_a_document(system: System) -> None:
    """Sign gives a detached JWS that an independent library verifies with the published key; a repeat gives the same one."""
    consent = system.consent()
    request_id = str(uuid.uuid4())
    payload = b'{"mandate":"M-1","amount":"10.00"}'
    signature = system.client.signing.sign(
        consent.name, payload=payload, payload_kind=custody.PayloadKind.JSON_DOCUMENT, request_id=request_id
    )
    again = system.client.signing.sign(
        consent.name, payload=payload, payload_kind=custody.PayloadKind.JSON_DOCUMENT, request_id=request_id
    )
    keys = {key.name: key for key in system.client.signing.verification_keys()}
    key = keys[signature.key]

    header, _, mac = signature.detached_jws.partition("..")
    body = base64.urlsafe_b64encode(payload).rstrip(b"=").decode()
    public = ECKey.import_key({"kty": "EC", "crv": "P-256", "x": _b64(key.x), "y": _b64(key.y)})
    registry = jws.JWSRegistry(algorithms=["ES256"], strict_check_header=False)
    verified = jws.deserialize_compact(f"{header}.{body}.{mac}", public, registry=registry)
    assert verified.payload == payload
    assert again == signature


def test_log_export_verifies_offline(system: System, tmp_path: Path) -> None:
    """The exported log verifies with the public key alone; one changed byte is found."""
    system.pay(system.consent(), end_to_end_id="E2E-9")
    export, key = tmp_path / "log", tmp_path / "key.pem"
    export.write_bytes(b"".join(system.admin.audit.export()))
    key.write_bytes(system.development.public_key_pem("audit"))
    command = [sys.executable, "-m", "sidecar.audit.verifier", str(export), "--key", str(key)]

    assert subprocess.run(command, capture_output=True, check=False).returncode == 0

    content = bytearray(export.read_bytes())
    content[len(content) // 2] ^= 1
    export.write_bytes(content)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 4


def test_no_token_is_written_or_said(system: System) -> None:
    """The canary that begins every token stands nowhere: database, log, metrics, files; and it does stand at the bank."""
    consent = system.consent()
    system.client.accounts.list(consent.name)
    system.pay(consent)
    forms = [
        system.marker.encode(),
        system.marker.encode().hex().encode(),
        base64.b64encode(system.marker.encode())[:-4],
    ]

    found = [place for place, content in system.everything_written().items() for form in forms if form in content]

    assert found == []


def test_restart_keeps_consents_usable(new_system: Callable[..., System]) -> None:
    """After SIGTERM (exit status 0) and a new start, a consent of before still opens."""
    system = new_system()
    consent = system.consent()
    assert system.sidecar.stop() == 0

    system.restart_sidecar()

    assert system.client.accounts.list(consent.name)
    statuses = eventually(lambda: system.sidecar.get("/readyz")[0], lambda status: status == 200)
    assert statuses == 200


def _b64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
