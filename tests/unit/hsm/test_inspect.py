"""`python -m sidecar.hsm.inspect` on SoftHSM, and its judgement of modules that do not keep their promises."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pkcs11
import pytest

from sidecar.domain.provider import KeyPurpose
from sidecar.gateway.supervisor import child_environment
from sidecar.hsm.errors import HsmFault, RootRefused, StartRefused
from sidecar.hsm.inspect import Check, HsmReport, TokenReport, _Promises
from sidecar.ipc.messages import ChildExit, HsmSettings, KeyReference
from tests.fakes.token import ProvisionedToken

PROMISES = (
    "AES-256-GCM with associated data",
    "signature with P-256",
    "a sensitive key's value cannot be read",
    "a private key's value cannot be read",
    "SENSITIVE cannot be taken back",
    "EXTRACTABLE cannot be given",
    "a copy cannot be made extractable",
    "a non-extractable key cannot be wrapped",
    "throwaway keys are gone",
)


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> ProvisionedToken:
    return ProvisionedToken.make(tmp_path_factory.mktemp("inspected"))


def inspect(
    token: ProvisionedToken, *arguments: str, settings: HsmSettings | bytes | None = None
) -> "subprocess.CompletedProcess[bytes]":
    given = token.settings() if settings is None else settings
    return subprocess.run(
        [sys.executable, "-m", "sidecar.hsm.inspect", *arguments],
        input=given if isinstance(given, bytes) else msgspec.json.encode(given),
        env=child_environment(token.environment, keep_foreign=True),
        capture_output=True,
        timeout=60,
        check=False,
    )


def content(token: ProvisionedToken) -> dict[str, bytes]:
    """Every file of the token, by name, but the one where SoftHSM itself keeps count of logins."""
    directory = token.configuration.directory / "tokens"
    return {
        str(path): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "token.object"
    }


# --- on SoftHSM -----------------------------------------------------------------------------------------------------------


def test_info_needs_no_pin(token: ProvisionedToken, tmp_path: Any) -> None:
    """The token's facts without a login: with a PIN file that is not there it says the same."""
    settings = token.settings(pin_file=tmp_path / "no-such-file")
    done = inspect(token, "info", "--settings", "-", settings=settings)
    report = msgspec.json.decode(done.stdout, type=TokenReport)

    assert done.returncode == 0, done.stderr
    assert report.token_serial == token.configuration.serial
    assert report.missing_mechanisms == ()
    assert "USER_PIN_INITIALIZED" in report.flags
    assert "AES_GCM" in report.mechanisms


def test_every_promise_is_kept_by_softhsm(token: ProvisionedToken) -> None:
    """All checks pass, none is skipped, and every key is proven."""
    done = inspect(token, "test", "--settings", "-")
    report = msgspec.json.decode(done.stdout, type=HsmReport)

    assert done.returncode == 0, done.stderr
    assert tuple(check.name for check in report.checks) == PROMISES
    assert {check.outcome for check in report.checks} == {"passed"}
    assert {key.purpose for key in report.keys} == set(KeyPurpose)
    assert report.rates == ()


def test_bi_e30_a_test_leaves_the_token_as_it_was(token: ProvisionedToken) -> None:
    """No object comes, goes or changes: every throwaway key is one of the session."""
    before = content(token)
    done = inspect(token, "test", "--settings", "-", "--bench", "3")

    assert done.returncode == 0, done.stderr
    assert len(before) > len(KeyPurpose)
    assert content(token) == before


def test_rates_are_measured_when_asked(token: ProvisionedToken) -> None:
    """Each operation as often as asked."""
    done = inspect(token, "test", "--settings", "-", "--bench", "20")
    rates = {rate.operation: rate for rate in msgspec.json.decode(done.stdout, type=HsmReport).rates}

    assert set(rates) == {"wrap", "unwrap", "sign"}
    assert {rate.count for rate in rates.values()} == {20}
    assert all(rate.per_second > 0 and rate.seconds > 0 for rate in rates.values())


def test_keys_proves_keys_alone(token: ProvisionedToken) -> None:
    """What doctor asks: no throwaway keys are made."""
    done = inspect(token, "keys", "--settings", "-")
    report = msgspec.json.decode(done.stdout, type=HsmReport)

    assert done.returncode == 0, done.stderr
    assert len(report.keys) == len(KeyPurpose)
    assert report.checks == ()


def test_bi_e16_all_keys_that_are_missing_are_told_at_once(token: ProvisionedToken) -> None:
    """KEY_REFUSED; the document still tells of each key, the good ones too."""
    root, *others = token.key_file.keys
    missing = [KeyReference(purpose=key.purpose, label=f"no-{key.label}", id_hex=key.id_hex) for key in others]
    done = inspect(token, "test", "--settings", "-", settings=token.settings(keys=[root, *missing]))
    report = msgspec.json.decode(done.stdout, type=HsmReport)

    assert done.returncode == ChildExit.KEY_REFUSED
    assert [bool(key.refusal) for key in report.keys] == [False, *(True for _ in missing)]
    assert len(done.stderr.splitlines()) == len(missing)


def test_bi_e8_a_wrong_pin_is_tried_once_and_named_so(token: ProvisionedToken, tmp_path: Any) -> None:
    """PIN_REFUSED in one line without the PIN; nothing on standard output."""
    pin = tmp_path / "pin"
    pin.write_text("hunter22")
    pin.chmod(0o400)
    done = inspect(token, "test", "--settings", "-", settings=token.settings(pin_file=pin))

    assert done.returncode == ChildExit.PIN_REFUSED
    assert done.stdout == b""
    assert b"tried once" in done.stderr
    assert b"hunter22" not in done.stderr


@pytest.mark.parametrize("command", ["info", "test"])
def test_bi_e14_a_token_that_is_not_there(token: ProvisionedToken, command: str) -> None:
    """UNREACHABLE: label and serial must both fit."""
    other = msgspec.structs.replace(token.settings(), token_serial="0000000000000000")
    done = inspect(token, command, "--settings", "-", settings=other)

    assert done.returncode == ChildExit.UNREACHABLE
    assert b"label and serial" in done.stderr


@pytest.mark.parametrize("module", ["/no/such/module.so", "/etc/passwd"])
def test_bi_e13_a_module_that_is_none(token: ProvisionedToken, module: str) -> None:
    """SETTINGS_REFUSED, in one line."""
    done = inspect(token, "slots", "--module", module)

    assert done.returncode == ChildExit.SETTINGS_REFUSED
    assert done.stdout == b""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("settings", [b"", b"{}", b"null", b"[" * 10_000, b'{"pin":"1234"}', b" " * 2_000_000])
def test_settings_that_are_none(token: ProvisionedToken, settings: bytes) -> None:
    """SETTINGS_REFUSED before a module is loaded; what was given is not repeated."""
    done = inspect(token, "keys", "--settings", "-", settings=settings)

    assert done.returncode == ChildExit.SETTINGS_REFUSED
    assert b"1234" not in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("bench", ["0", "-1", "100001", "many", "1e3"])
def test_a_bench_of_no_number(token: ProvisionedToken, bench: str) -> None:
    """Wrong usage."""
    assert inspect(token, "test", "--settings", "-", f"--bench={bench}").returncode == 2


# --- modules that do not keep their promises ------------------------------------------------------------------------------


class LooseKey:
    """A key of a module that refuses nothing, unless it is told to; what python-pkcs11 would show of it."""

    def __init__(self, *, strict: bool, extractable: bool = False) -> None:
        self.strict = strict
        self.attributes: dict[Any, Any] = {
            pkcs11.Attribute.SENSITIVE: True,
            pkcs11.Attribute.EXTRACTABLE: extractable,
            pkcs11.Attribute.VALUE: b"v" * 32,
        }

    def __getitem__(self, attribute: Any) -> Any:
        if self.strict and attribute is pkcs11.Attribute.VALUE:
            raise pkcs11.AttributeSensitive
        return self.attributes[attribute]

    def __setitem__(self, attribute: Any, value: Any) -> None:
        if self.strict:
            raise pkcs11.AttributeReadOnly
        self.attributes[attribute] = value

    def copy(self, attributes: dict[Any, Any]) -> "LooseKey":
        if self.strict:
            raise pkcs11.AttributeReadOnly
        return LooseKey(strict=False, extractable=attributes[pkcs11.Attribute.EXTRACTABLE])

    def wrap_key(self, key: "LooseKey", *, mechanism: Any) -> bytes:
        if self.strict and not key.attributes[pkcs11.Attribute.EXTRACTABLE]:
            raise pkcs11.KeyUnextractable
        return bytes(bytearray(40))

    def destroy(self) -> None:
        """Nothing to destroy."""


class SoftRoot:
    """Stands where a proven root key would; keeps what it sealed, and opens by `opens`."""

    def __init__(self, opens: str) -> None:
        self._opens = opens
        self._sealed = (b"", b"")

    def encrypt(self, *, iv: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
        self._sealed = (b"c" * len(plaintext) + b"t" * 16, plaintext)
        return self._sealed[0]

    def decrypt_into(self, *, iv: bytes, ciphertext: bytes, associated_data: bytes, buffer: Any) -> None:
        if ciphertext != self._sealed[0] and self._opens != "everything":
            raise RootRefused
        buffer[:] = self._sealed[1] if self._opens != "something else" else bytes(len(buffer))


class LooseKeys:
    """A module's throwaway keys, as strict as the test wants them."""

    def __init__(
        self, *, strict: bool = True, opens: str = "its own", signs: bool = True, left: int = 0, wraps: bool = True
    ) -> None:
        self._strict, self._opens, self._signs, self._left, self._wraps = strict, opens, signs, left, wraps

    @contextmanager
    def aes(self, *, uses: str = "", extractable: bool = False) -> Iterator[LooseKey]:
        key = LooseKey(strict=self._strict, extractable=extractable)
        if not self._wraps:
            key.wrap_key = self._no_wrapping  # type: ignore[method-assign]
        yield key

    @contextmanager
    def pair(self) -> Iterator[tuple[LooseKey, LooseKey]]:
        yield LooseKey(strict=False), LooseKey(strict=self._strict)

    def root(self, key: LooseKey) -> SoftRoot:
        return SoftRoot(self._opens)

    def signing(self, public: LooseKey, private: LooseKey) -> "LooseKeys":
        if not self._signs:
            raise StartRefused(ChildExit.KEY_REFUSED, "it does not compute what it must (WRONG_SIGNATURE)")
        return self

    def sign(self, digest: bytes) -> bytes:
        return b"s" * 64

    def count_left(self) -> int:
        return self._left

    def _no_wrapping(self, key: LooseKey, *, mechanism: Any) -> bytes:
        raise pkcs11.MechanismInvalid


def outcomes(keys: Any) -> dict[str, str]:
    checks: list[Check] = list(_Promises(keys).checks())
    assert tuple(check.name for check in checks) == PROMISES
    return {check.name: check.outcome for check in checks}


def failed(keys: Any) -> set[str]:
    return {name for name, outcome in outcomes(keys).items() if outcome == "failed"}


def test_a_strict_module_passes() -> None:
    """The fake's strict side is what the others are measured against."""
    assert failed(LooseKeys()) == set()


def test_a_module_that_enforces_nothing_fails_every_promise_of_secrecy() -> None:
    """Six promises, each named: what NSS did with copies and wraps (measured), and worse."""
    assert failed(LooseKeys(strict=False)) == set(PROMISES[2:8])


@pytest.mark.parametrize("opens", ["everything", "something else"])
def test_a_module_whose_encryption_proves_nothing(opens: str) -> None:
    """One that opens a changed ciphertext, or opens to something else."""
    assert failed(LooseKeys(opens=opens)) == {PROMISES[0]}


def test_a_module_that_signs_wrongly() -> None:
    """Found outside of the module."""
    assert failed(LooseKeys(signs=False)) == {PROMISES[1]}


def test_objects_that_are_left() -> None:
    """Told, since they stay until the session ends."""
    assert failed(LooseKeys(left=1)) == {PROMISES[8]}


def test_what_cannot_be_asked_is_skipped_not_passed() -> None:
    """A module without AES key wrap refuses every wrap, which says nothing."""
    assert outcomes(LooseKeys(wraps=False))[PROMISES[7]] == "skipped"


class Sick(LooseKeys):
    """A module that answers everything with an error."""

    @contextmanager
    def aes(self, *, uses: str = "", extractable: bool = False) -> Iterator[LooseKey]:
        raise pkcs11.DeviceError
        yield

    @contextmanager
    def pair(self) -> Iterator[tuple[LooseKey, LooseKey]]:
        raise HsmFault("DeviceError")
        yield


def test_a_sick_module_does_not_pass_for_a_strict_one() -> None:
    """Whatever it refuses, it refuses for the wrong reason."""
    assert failed(Sick()) == set(PROMISES[:8])


def test_the_answer_is_one_document(token: ProvisionedToken) -> None:
    """Standard output is JSON and nothing else."""
    for arguments in (("info", "--settings", "-"), ("keys", "--settings", "-")):
        assert isinstance(json.loads(inspect(token, *arguments).stdout), dict)
