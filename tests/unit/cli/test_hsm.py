"""custodyctl hsm and doctor without an HSM: what they ask, what they say, how they end. The real thing is in tests/rpc."""

import asyncio
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from sidecar.cli import findings, inspection
from sidecar.cli.failures import ExitCode, Failure
from sidecar.cli.findings import Finding
from sidecar.config import load_configuration
from sidecar.domain.provider import KeyPurpose
from sidecar.hsm.inspect import Check, HsmReport, KeyReport, Rate, SlotReport, TokenReport
from sidecar.ipc.messages import HsmSettings, KeyDescription
from sidecar.store.relocation.relocation import Progress, opened_relocation
from tests.unit.cli.support import NOW, AskedHsm, ToldSidecar, assert_golden, good_status, run, session_of, some_token
from tests.unit.cli.test_files import configuration, provider, written
from tests.unit.store import postgresql
from tests.unit.store.vaults import full_vault

PIN = "hunter22"

SLOTS = [
    SlotReport(
        slot_id=7,
        description="a slot",
        manufacturer="Vendor",
        token_label="custody",
        token_serial="1a2b",
        token_model="Model 5",
        flags=("LOGIN_REQUIRED", "USER_PIN_INITIALIZED"),
    ),
    SlotReport(slot_id=8, description="an empty slot", manufacturer="Vendor"),
]


def token_report(*flags: str, missing: tuple[str, ...] = ()) -> TokenReport:
    return TokenReport(
        library_description="Vendor's module",
        library_version="5.1",
        token_label="custody",
        token_serial="1a2b",
        token_model="Model 5",
        flags=("USER_PIN_INITIALIZED", *flags),
        mechanisms=("AES_GCM", "ECDSA"),
        missing_mechanisms=missing,
    )


def hsm_report(*, refusal: str = "", outcome: Any = "passed", rates: tuple[Rate, ...] = ()) -> HsmReport:
    description = KeyDescription(
        purpose=KeyPurpose.ROOT,
        label="root/1",
        id_hex="aa",
        key_type="AES",
        size_bits=256,
        attributes={"SENSITIVE": True},
        spki_der=b"",
        key_id="aa",
    )
    good = KeyReport(purpose=KeyPurpose.ROOT, label="root/1", id_hex="aa", description=description)
    refused = KeyReport(purpose=KeyPurpose.AUDIT, label="audit/1", id_hex="bb", refusal=refusal)
    return HsmReport(
        library_description="Vendor's module",
        library_version="5.1",
        token_label="custody",
        token_serial="1a2b",
        token_model="Model 5",
        keys=(good, refused) if refusal else (good,),
        checks=(
            Check(name="a copy cannot be made extractable", outcome=outcome, detail="refused (AttributeReadOnly)"),
        ),
        rates=rates,
    )


def asked(**answers: Any) -> AskedHsm:
    """An HSM whose answers have exactly the shape that the inspection writes."""
    plain = {
        name: answer if isinstance(answer, Exception) else msgspec.to_builtins(answer)
        for name, answer in answers.items()
    }
    return AskedHsm(plain)


def installed(directory: Path, **changes: Any) -> str:
    """An installation that is well: its configuration's path."""
    document = configuration(directory)
    module = directory / "module.so"
    module.write_bytes(b"")
    (directory / "pin").write_text(PIN)
    (directory / "pin").chmod(0o400)
    ca = directory / "ca.pem"
    ca.write_text("")
    document["hsm"]["module_path"] = str(module)
    document["providers"] = [provider("bank-a", ca_file=str(ca))]
    return written(directory, {**document, **changes})


# --- hsm ------------------------------------------------------------------------------------------------------------------


def test_slots_are_listed_by_label_and_serial() -> None:
    """Needs no configuration and no PIN; a slot without a token is shown as one."""
    hsm = asked(slots=SLOTS)
    ran = run(
        "--format", "json", "hsm", "list-slots", "--module", "/opt/module.so", session=session_of(None, inspect=hsm)
    )

    assert ran.code == 0
    assert hsm.asked == [(["slots", "--module", "/opt/module.so"], b"")]
    assert_golden("hsm-slots.json", ran.out)


def test_the_table_of_slots_names_the_tokens_pin_state() -> None:
    """Locked, nearly locked, once wrong, never set."""
    states = {
        "USER_PIN_LOCKED": "is locked",
        "USER_PIN_FINAL_TRY": "one more wrong",
        "USER_PIN_COUNT_LOW": "a wrong user PIN was given",
    }
    for flag, words in states.items():
        slots = [msgspec.structs.replace(SLOTS[0], flags=("USER_PIN_INITIALIZED", flag))]
        ran = run("hsm", "list-slots", "--module", "/m", session=session_of(None, inspect=asked(slots=slots)))

        assert words in ran.out
    fresh = [msgspec.structs.replace(SLOTS[0], flags=())]
    assert (
        "no user PIN yet"
        in run("hsm", "list-slots", "--module", "/m", session=session_of(None, inspect=asked(slots=fresh))).out
    )


def test_info_of_the_configured_token(tmp_path: Path) -> None:
    """The settings that are handed over name the PIN file; the PIN is in nothing."""
    hsm = asked(info=token_report())
    path = installed(tmp_path)
    ran = run("--format", "json", "hsm", "info", "--config", path, session=session_of(None, inspect=hsm))
    arguments, settings = hsm.asked[0]

    assert ran.code == 0
    assert arguments == ["info", "--settings", "-"]
    assert msgspec.json.decode(settings, type=HsmSettings).pin_file == str(tmp_path / "pin")
    assert PIN.encode() not in settings
    assert PIN not in ran.out + ran.err
    assert_golden("hsm-info.json", ran.out)


@pytest.mark.parametrize(
    "report",
    [token_report("USER_PIN_LOCKED"), token_report("USER_PIN_FINAL_TRY"), token_report(missing=("AES_GCM",))],
)
def test_info_3_where_a_start_would_fail(report: TokenReport, tmp_path: Path) -> None:
    """A locked PIN, the last try, a mechanism that the sidecar needs."""
    ran = run("hsm", "info", "--config", installed(tmp_path), session=session_of(None, inspect=asked(info=report)))

    assert ran.code == ExitCode.DEGRADED


def test_the_hsm_test_that_passes(tmp_path: Path) -> None:
    """Exit status 0, with the rates that were asked for; the document is the contract's."""
    rates = (Rate(operation="sign", count=50, seconds=0.5, per_second=100.0),)
    hsm = asked(test=hsm_report(rates=rates))
    session = session_of(None, inspect=hsm)
    ran = run("--format", "json", "hsm", "test", "--bench", "50", "--config", installed(tmp_path), session=session)

    assert ran.code == 0
    assert hsm.asked[0][0] == ["test", "--settings", "-", "--bench", "50"]
    assert_golden("hsm-test.json", ran.out)


@pytest.mark.parametrize(
    "report",
    [hsm_report(refusal="the audit key 'audit/1' is refused: CKA_EXTRACTABLE is true"), hsm_report(outcome="failed")],
)
def test_the_hsm_test_that_fails(report: HsmReport, tmp_path: Path) -> None:
    """bi_E17: exit status 4 for a weak key, and for a promise that the module breaks; both are named."""
    session = session_of(None, inspect=asked(test=report))
    ran = run("hsm", "test", "--config", installed(tmp_path), session=session)

    assert ran.code == ExitCode.VERIFICATION_FAILED
    assert "CKA_EXTRACTABLE is true" in ran.out or "failed" in ran.out


@pytest.mark.parametrize("command", ["info", "test"])
def test_keys_that_are_not_provisioned_yet(command: str, tmp_path: Path) -> None:
    """Without keys.json there is nothing to look for, and it says so."""
    path = installed(tmp_path)
    (tmp_path / "keys.json").unlink()
    ran = run("hsm", command, "--config", path, session=session_of(None, inspect=asked()))

    assert ran.code == 1
    assert "hsm.keys_file" in ran.err


# --- the inspection's process ---------------------------------------------------------------------------------------------


def script(directory: Path, source: str) -> list[str]:
    path = directory / "inspect.py"
    path.write_text(source)
    return [sys.executable, str(path)]


def test_bi_e13_a_module_that_hangs_is_ended_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 5 after --timeout, and the process is gone."""
    pid_file = tmp_path / "pid"
    command = script(
        tmp_path, f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    real = inspection._run
    monkeypatch.setattr(inspection, "_run", lambda _, settings, seconds: real(command, settings, seconds))

    began = time.monotonic()
    with pytest.raises(Failure) as failure:
        inspection.inspect_hsm(["slots"], timeout_seconds=2.0)

    assert failure.value.code is ExitCode.UNREACHABLE
    assert time.monotonic() - began < 60
    assert not Path(f"/proc/{pid_file.read_text()}").exists()


@pytest.mark.parametrize(
    ("exit_code", "code", "advice"),
    [
        (41, ExitCode.UNREACHABLE, "list-slots"),
        (40, ExitCode.UNREACHABLE, "list-slots"),
        (51, ExitCode.DEGRADED, "no further try"),
        (52, ExitCode.FAILED, "mode 0400"),
        (50, ExitCode.FAILED, "hsm.module_path"),
        (-11, ExitCode.UNREACHABLE, "list-slots"),
    ],
)
def test_how_an_inspection_without_an_answer_ends(
    exit_code: int, code: ExitCode, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bi_E8, bi_E9: its last words are passed on, with what to do; a wrong PIN is not tried again."""
    done = subprocess.CompletedProcess(args=[], returncode=exit_code, stdout=b"", stderr=b"noise\nits last words\n")
    monkeypatch.setattr(inspection, "_run", lambda *_: done)

    with pytest.raises(Failure) as failure:
        inspection.inspect_hsm(["test"], timeout_seconds=None)

    assert failure.value.code is code
    assert failure.value.message == "its last words"
    assert advice in failure.value.advice


# --- doctor ---------------------------------------------------------------------------------------------------------------


def doctor(path: str, sidecar: Any = None, hsm: AskedHsm | None = None, *options: str) -> Any:
    hsm = hsm or asked(info=token_report(), keys=hsm_report())
    session = session_of(sidecar or ToldSidecar(status_now=good_status(processes=())), inspect=hsm)
    return run("--format", "json", "doctor", "--config", path, *options, session=session)


def failures(ran: Any, outcome: str = "failure") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for check in ran.document()["checks"]:
        if check["outcome"] == outcome:
            found.setdefault(check["section"], []).append(check["message"])
    return found


def test_an_installation_that_is_well(tmp_path: Path) -> None:
    """Exit status 0, every section with what was found; the document is the contract's."""
    ran = doctor(installed(tmp_path, providers=[]))
    # A configuration needs a provider, which is the one thing that this one lacks.
    assert failures(ran) == {"Configuration": ["providers: must satisfy minItems 1"]}

    ran = doctor(well(tmp_path))

    assert ran.code == 0, ran.out
    assert ran.document()["verdict"] == "success"
    assert_golden("doctor.json", ran.out.replace(str(tmp_path), "/DIRECTORY"))


def well(directory: Path, **changes: Any) -> str:
    """The same with a provider that needs no certificates of ours."""
    keys = TppKeys(directory)
    bank = provider(
        "bank-a",
        ca_file=str(directory / "ca.pem"),
        signing_certificate_file=keys.certificate("signing", keys.signing, days=90),
        variables=_VARIABLES,
    )
    return installed(directory, **{"providers": [bank], **changes})


_ENDPOINTS = (
    "issuer",
    "authorization_endpoint",
    "pushed_authorization_request_endpoint",
    "token_endpoint",
    "revocation_endpoint",
)
_VARIABLES = {
    **dict.fromkeys(_ENDPOINTS, "https://bank.example/x"),
    "api_uri": "https://bank.example",
    "client_id": "tpp",
    "redirect_uri": "https://app.example/callback",
}


class TppKeys:
    """Keys and certificates, made here."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.signing = ec.generate_private_key(ec.SECP256R1())

    def certificate(
        self, name: str, key: ec.EllipticCurvePrivateKey, *, days: float, begins: timedelta = -timedelta(days=400)
    ) -> str:
        """PEM of a certificate that ends `days` after NOW."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(NOW + begins)
            .not_valid_after(NOW + timedelta(days=days))
            .sign(key, SHA256())
        )
        path = self._directory / f"{name}.pem"
        path.write_bytes(certificate.public_bytes(Encoding.PEM))
        return str(path)

    def key_file(self, name: str, key: ec.EllipticCurvePrivateKey) -> str:
        path = self._directory / f"{name}.key"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        path.chmod(0o400)
        return str(path)


def test_a_wrong_configuration_is_told_mistake_by_mistake(tmp_path: Path) -> None:
    """And what it names is not looked at, since it is not known."""
    hsm = asked()
    ran = doctor(well(tmp_path, shutdown_seconds=0, surprise=1), None, hsm)

    assert ran.code == 1
    assert len(failures(ran)["Configuration"]) == 2
    assert hsm.asked == []


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda d: (d / "pin").chmod(0o440), "others than its owner may open"),
        (lambda d: (d / "pin").unlink(), "cannot be read"),
        (lambda d: ((d / "pin").rename(d / "real"), (d / "pin").symlink_to(d / "real")), "is not a regular file"),
        (
            lambda d: subprocess.run(["sh", "-c", f"rm {d}/pin; mkfifo -m 600 {d}/pin"], check=True),
            "is not a regular file",
        ),
        (lambda d: ((d / "pin").unlink(), (d / "pin").mkdir()), "is not a regular file"),
        (lambda d: (d / "module.so").unlink(), "hsm.module_path"),
        (lambda d: (d / "module.so").chmod(0o757), "everybody may write to"),
        (lambda d: (d / "policy.yaml").chmod(0o666), "everybody may write to"),
        (lambda d: (d / "ca.pem").unlink(), "bank-a: ca_file"),
    ],
)
def test_bi_e6_e13_files_that_are_not_as_they_must_be(spoil: Any, told: str, tmp_path: Path) -> None:
    """Each is a failure with the file's name; a FIFO is not opened, which would hang."""
    path = well(tmp_path)
    spoil(tmp_path)
    ran = doctor(path)

    assert ran.code == 1
    assert told in " ".join(failures(ran)["Files"])


@pytest.mark.parametrize(
    ("flag", "outcome", "code"),
    [("USER_PIN_LOCKED", "failure", 1), ("USER_PIN_FINAL_TRY", "failure", 1), ("USER_PIN_COUNT_LOW", "warning", 3)],
)
def test_bi_e8_doctor_does_not_try_a_pin_that_may_be_wrong(flag: str, outcome: str, code: int, tmp_path: Path) -> None:
    """The flags are read first, and the login is left out."""
    hsm = asked(info=token_report(flag), keys=hsm_report())
    ran = doctor(well(tmp_path), None, hsm)

    assert ran.code == code
    assert [arguments[0] for arguments, _ in hsm.asked] == ["info"]
    assert failures(ran, outcome)["HSM"]


def test_no_login_leaves_the_login_out(tmp_path: Path) -> None:
    """It says that the keys were not looked at."""
    hsm = asked(info=token_report())
    ran = doctor(well(tmp_path), None, hsm, "--no-login")

    assert ran.code == 0
    assert [arguments[0] for arguments, _ in hsm.asked] == ["info"]
    assert "--no-login" in ran.out


def test_an_hsm_that_is_away_and_a_key_that_is_refused(tmp_path: Path) -> None:
    """Failures among the other findings: the rest is looked at all the same."""
    away = doctor(well(tmp_path), None, asked(info=Failure("no token", advice="look", code=ExitCode.UNREACHABLE)))
    weak = doctor(well(tmp_path), None, asked(info=token_report(), keys=hsm_report(refusal="the audit key is refused")))

    assert failures(away)["HSM"] == ["no token"]
    assert failures(weak)["HSM"] == ["the audit key is refused"]
    assert {"Database", "Certificates"} <= {check["section"] for check in away.document()["checks"]}


class Nobody:
    """A sidecar that is not there."""

    def __enter__(self) -> None:
        raise Failure("nobody", code=ExitCode.UNREACHABLE)

    def __exit__(self, *_: object) -> None: ...


def test_doctor_works_while_no_sidecar_runs(tmp_path: Path) -> None:
    """That none answers is a warning: exit status 3."""
    ran = doctor(well(tmp_path), Nobody())

    assert ran.code == 3
    assert failures(ran, "warning") == {"Sidecar": ["no sidecar answers"]}


def test_doctor_of_a_running_sidecar_alone() -> None:
    """Without a configuration it looks at what answers at the address."""
    sick = ToldSidecar(status_now=good_status(hsm_token=some_token(logged_in=False)))
    ran = run("--format", "json", "--address", "unix:/x", "doctor", session=session_of(sick))
    nothing = run("doctor", session=session_of(sick))

    assert ran.code == 1
    assert failures(ran)["Sidecar"] == ["the HSM token is not logged in"]
    assert failures(ran, "warning")["Sidecar"] == ["the process hsm was replaced 2 times"]
    assert nothing.code == 2


def test_sockets(tmp_path: Path) -> None:
    """A file in its place, a folder that everybody may write to, a socket for everybody: failures. A stale one is none."""
    import socket

    path = tmp_path / "admin.sock"

    def looked() -> Finding:
        return findings._socket(path)

    assert looked().outcome == "success"
    path.write_text("")
    assert "is no socket" in looked().message
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        assert "left over" in looked().message
        listener.listen()
        assert "takes connections" in looked().message
        path.chmod(0o606)
        assert looked().outcome == "failure"
    path.unlink()
    tmp_path.chmod(0o777)
    assert "everybody may write" in looked().message
    tmp_path.chmod(0o1777)
    assert looked().outcome == "success"
    tmp_path.chmod(stat.S_IRWXU)


def certificate_findings(path: str, public_keys: Mapping[str, bytes] | None = None) -> dict[str, str]:
    loaded = load_configuration(Path(path))
    found = findings.certificates(loaded, now=NOW, hsm_public_keys=public_keys or {})
    return {each.message: each.outcome for each in found}


@pytest.mark.parametrize(
    ("days", "outcome", "words"),
    [
        (90, "success", "for 90 d"),
        (30, "success", "for 30 d"),
        (29.9, "warning", "in 29 d"),
        (0, "failure", "expired on 2026-11-23"),
        (-10, "failure", "expired on 2026-11-13"),
    ],
)
def test_when_certificates_end(days: float, outcome: str, words: str, tmp_path: Path) -> None:
    """A month before the end it warns; at the end it fails."""
    keys = TppKeys(tmp_path)
    signing = keys.certificate("signing", keys.signing, days=days)
    bank = provider("bank-a", ca_file=str(tmp_path / "ca.pem"), signing_certificate_file=signing)
    ((message, found),) = certificate_findings(installed(tmp_path, providers=[bank])).items()

    assert found == outcome
    assert words in message
    assert "bank-a: signing_certificate_file" in message


def test_a_certificate_that_is_not_valid_yet(tmp_path: Path) -> None:
    """bi_E26: the clock may be wrong, and the advice says so."""
    keys = TppKeys(tmp_path)
    signing = keys.certificate("signing", keys.signing, days=9, begins=timedelta(days=1))
    bank = provider("bank-a", signing_certificate_file=signing)
    loaded = load_configuration(Path(installed(tmp_path, providers=[bank])))
    (finding,) = findings.certificates(loaded, now=NOW, hsm_public_keys={})

    assert finding.outcome == "failure"
    assert "clock" in finding.advice


def test_a_signing_certificate_of_another_key(tmp_path: Path) -> None:
    """The bank would refuse each signature: found before it does."""
    keys = TppKeys(tmp_path)
    bank = provider("bank-a", signing_certificate_file=keys.certificate("signing", keys.signing, days=90))
    path = installed(tmp_path, providers=[bank])

    def der(key: ec.EllipticCurvePrivateKey) -> bytes:
        return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    right = certificate_findings(path, {"request-signing": der(keys.signing)})
    wrong = certificate_findings(path, {"request-signing": der(ec.generate_private_key(ec.SECP256R1()))})

    assert set(right.values()) == {"success"}
    assert wrong["bank-a: signing_certificate_file: is not of the HSM's request-signing key"] == "failure"


def test_a_client_certificate_and_its_key(tmp_path: Path) -> None:
    """Together they pass; with another's key, or one behind a passphrase, they do not, and nobody is asked for it."""
    keys = TppKeys(tmp_path)
    own, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def outcomes(key_file: str) -> set[str]:
        bank = provider(
            "bank-a",
            client_certificate_file=keys.certificate("client", own, days=90),
            client_key_file=key_file,
            allow_client_key_file=True,
        )
        return set(certificate_findings(installed(tmp_path, providers=[bank])).values())

    encrypted = tmp_path / "encrypted.key"
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption

    encrypted.write_bytes(own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")))

    assert outcomes(keys.key_file("own", own)) == {"success"}
    assert outcomes(keys.key_file("other", other)) == {"success", "failure"}
    assert outcomes(str(encrypted)) == {"success", "failure"}


def test_certificate_files_that_are_none(tmp_path: Path) -> None:
    """Missing, or something else: a failure each."""
    (tmp_path / "text.pem").write_text("hello")
    for name, words in (("no.pem", "cannot be read"), ("text.pem", "holds no certificate")):
        bank = provider("bank-a", signing_certificate_file=str(tmp_path / name))
        ((message, outcome),) = certificate_findings(installed(tmp_path, providers=[bank])).items()

        assert outcome == "failure"
        assert words in message


def test_a_shared_database(tmp_path: Path) -> None:
    """Looked at as a start would, but without taking the name of the sidecar that runs on it."""
    name = postgresql.new_database()
    url = postgresql.url_of(name)
    path = well(tmp_path, store={"url": url, "instance": "pod-1"})

    async def run() -> None:
        async with postgresql.opened(name, instance="pod-1"):
            assert "Database" not in failures(await asyncio.to_thread(doctor, path))

    asyncio.run(run())
    postgresql.execute(name, "GRANT DELETE ON custody.claims TO PUBLIC")
    assert "must not have DELETE on claims" in failures(doctor(path))["Database"][0]


def test_a_vault_that_moves(tmp_path: Path) -> None:
    """The database that it is moving into is told of, and then the file that it has left."""
    name, file = postgresql.new_database(), full_vault(tmp_path)
    move: dict[str, Any] = {"path": file, "url": postgresql.url_of(name), "instance": "pod-1", "now": lambda: NOW}
    on_database = well(tmp_path, store={"url": postgresql.url_of(name), "instance": "pod-1"})

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened_relocation(**move, observe=stop) as interrupted:
        interrupted.run()
    half_way = failures(doctor(on_database))["Database"]
    with opened_relocation(**move) as relocation:
        relocation.run()
    moved = doctor(on_database)

    assert "a vault is moving into this database" in half_way[0]
    assert "Database" not in failures(moved)
    assert "the vault has moved to" in failures(doctor(well(tmp_path, store={"path": str(file)})))["Database"][0]


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    """In the store's own words; one that is not there yet is none."""
    path = well(tmp_path)
    database = tmp_path / "custody.db"
    before = doctor(path)
    database.write_bytes(b"not a database at all" * 100)
    database.chmod(0o600)
    broken = doctor(path)
    database.chmod(0o644)
    exposed = doctor(path)

    assert "Database" not in failures(before)
    assert failures(broken)["Database"]
    assert "0600" in failures(exposed)["Database"][0]
