"""The PKCS#11 door with a token that this test plays: every error of the module, and answers that lie.

The errors are python-pkcs11's own classes; no module is loaded into this process.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import pkcs11
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sidecar.domain.provider import KeyPurpose
from sidecar.hsm import module
from sidecar.hsm.errors import HsmFault, RootRefused, StartRefused
from sidecar.hsm.keys import ROOT_MUST_BE, SIGNING_MUST_BE
from sidecar.hsm.module import ModuleFacts, RootKey, SigningKey, Token
from sidecar.hsm.pin import Pin
from sidecar.ipc.messages import ChildExit, HsmSettings, KeyReference

ROOT = KeyReference(purpose=KeyPurpose.ROOT, label="root/2026-11", id_hex="00" * 16)
AUDIT = KeyReference(purpose=KeyPurpose.AUDIT, label="audit/2026-11", id_hex="01" * 16)
DIGEST = hashlib.sha256(b"what is signed").digest()
A: type[pkcs11.Attribute] = pkcs11.Attribute
Attributes = dict[pkcs11.Attribute, object]
ModuleError = type[pkcs11.PKCS11Error]

# Every answer that the calls used here may give (reliability 3b I); `PKCS11Error` stands for codes without a class.
DEVICE_ERRORS = [
    pkcs11.GeneralError, pkcs11.DeviceError, pkcs11.DeviceMemory, pkcs11.DeviceRemoved, pkcs11.TokenNotPresent,
    pkcs11.SessionHandleInvalid, pkcs11.SessionClosed, pkcs11.SessionCount, pkcs11.UserNotLoggedIn,
    pkcs11.KeyHandleInvalid, pkcs11.ObjectHandleInvalid, pkcs11.OperationActive, pkcs11.OperationNotInitialized,
    pkcs11.EncryptedDataInvalid, pkcs11.FunctionCancelled, pkcs11.FunctionFailed, pkcs11.HostMemory,
]  # fmt: skip
KEY_ERRORS = [
    pkcs11.MechanismInvalid, pkcs11.MechanismParamInvalid, pkcs11.FunctionNotSupported, pkcs11.KeyTypeInconsistent,
    pkcs11.ArgumentsBad, pkcs11.PKCS11Error,
]  # fmt: skip
ALL_ERRORS = DEVICE_ERRORS + KEY_ERRORS


class SoftObject:
    """An object in a token, with whatever attributes a test gives it."""

    attributes: Attributes

    def __getitem__(self, attribute: pkcs11.Attribute) -> object:
        if attribute not in self.attributes:
            raise pkcs11.AttributeTypeInvalid
        return self.attributes[attribute]


class SoftRootObject(SoftObject):
    """A secret key object: AES-GCM in software, with whatever attributes and errors a test gives it."""

    def __init__(self, **attributes: bool) -> None:
        self.attributes = {A[name]: value for name, value in {**ROOT_MUST_BE, **attributes}.items()}
        self.attributes |= {A.KEY_TYPE: pkcs11.KeyType.AES, A.VALUE_LEN: 32}
        self.cipher = AESGCM(b"r" * 32)
        self.encrypt_error: ModuleError | None = None
        self.decrypt_error: ModuleError | None = None
        self.ignores_associated_data = False
        self.lie: bytes | None = None
        self.tag_error: ModuleError = pkcs11.GeneralError

    def encrypt(self, octets: bytes, *, mechanism: pkcs11.Mechanism, mechanism_param: pkcs11.GCMParams) -> bytes:
        assert mechanism is pkcs11.Mechanism.AES_GCM
        if self.encrypt_error:
            raise self.encrypt_error
        return self.cipher.encrypt(mechanism_param.nonce, octets, self._aad(mechanism_param))

    def decrypt(self, octets: bytes, *, mechanism: pkcs11.Mechanism, mechanism_param: pkcs11.GCMParams) -> bytes:
        assert mechanism is pkcs11.Mechanism.AES_GCM
        if self.decrypt_error:
            raise self.decrypt_error
        try:
            plaintext = self.cipher.decrypt(mechanism_param.nonce, octets, self._aad(mechanism_param))
        except InvalidTag:
            raise self.tag_error from None
        return bytes(bytearray(plaintext)) if self.lie is None else bytes(bytearray(self.lie))

    def _aad(self, parameters: pkcs11.GCMParams) -> bytes | None:
        return b"" if self.ignores_associated_data else parameters.aad


class SoftPrivateObject(SoftObject):
    """A private key object: ECDSA in software."""

    def __init__(self, **attributes: bool) -> None:
        self.attributes = {A[name]: value for name, value in {**SIGNING_MUST_BE, **attributes}.items()}
        self.attributes[A.KEY_TYPE] = pkcs11.KeyType.EC
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.error: ModuleError | None = None
        self.lie: bytes | None = None

    def sign(self, digest: bytes, *, mechanism: pkcs11.Mechanism) -> bytes:
        assert mechanism is pkcs11.Mechanism.ECDSA
        if self.error:
            raise self.error
        if self.lie is not None:
            return self.lie
        r, s = utils.decode_dss_signature(self.key.sign(digest, ec.ECDSA(utils.Prehashed(SHA256()))))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def public_object(self, **changes: object) -> Attributes:
        point = self.key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        found: Attributes = {
            A.KEY_TYPE: pkcs11.KeyType.EC,
            A.EC_PARAMS: module.P256_PARAMETERS,
            A.EC_POINT: b"\x04\x41" + point,
        }
        return {**found, **{A[name]: value for name, value in changes.items()}}


FoundObject = SoftObject | Attributes  # a public key is nothing but its attributes


class PlayedSession:
    """Finds what the test put into it, by class."""

    def __init__(self, **found: Sequence[FoundObject]) -> None:
        self.found = {pkcs11.ObjectClass[name]: objects for name, objects in found.items()}
        self.searches: list[Attributes] = []
        self.random = b"\x55"
        self.error: ModuleError | None = None

    def get_objects(self, template: Attributes) -> Iterator[FoundObject]:
        self.searches.append(template)
        if self.error:
            raise self.error
        wanted = template[A.CLASS]
        assert isinstance(wanted, pkcs11.ObjectClass)
        return iter(self.found.get(wanted, []))

    def generate_random(self, bits: int) -> bytes:
        if self.error:
            raise self.error
        return bytes(bytearray(self.random * (bits // 8)))


def token(**found: Sequence[FoundObject]) -> Token:
    return Token(session=PlayedSession(**found), facts=FACTS)


FACTS = ModuleFacts(
    library_description="d", library_version="1.0", token_label="t", token_serial="s", token_model="m",
    user_pin_count_low=False, user_pin_final_try=False, user_pin_locked=False,
)  # fmt: skip


def root(key: SoftRootObject) -> RootKey:
    return RootKey(key=key, reference=ROOT, attributes={})


def wrapped_by(key: RootKey, *, associated_data: bytes = b"aad") -> dict[str, bytes]:
    iv = bytes(bytearray(range(12)))
    return {"iv": iv, "ciphertext": key.encrypt(iv=iv, plaintext=b"m" * 32, associated_data=associated_data)}


# --- finding and proving keys --------------------------------------------------------------------------------------------


def test_a_key_is_searched_by_class_label_and_id_together() -> None:
    """Never by one of them alone, and never without a template: damaged objects would be met."""
    it = token(SECRET_KEY=[SoftRootObject()])

    it.root_key(ROOT)

    assert it.session.searches == [{A.CLASS: pkcs11.ObjectClass.SECRET_KEY, A.LABEL: "root/2026-11", A.ID: bytes(16)}]


@pytest.mark.parametrize("number", [0, 2, 3])
def test_anything_but_exactly_one_root_key_is_refused(number: int) -> None:
    """None, or more than one under the same label and id."""
    with pytest.raises(StartRefused, match="root/2026-11") as caught:
        token(SECRET_KEY=[SoftRootObject() for _ in range(number)]).root_key(ROOT)

    assert caught.value.code is ChildExit.KEY_REFUSED


@pytest.mark.parametrize("name", ROOT_MUST_BE)
def test_a_weaker_root_key_is_refused_by_name_of_the_attribute(name: str) -> None:
    """Read from the object itself."""
    with pytest.raises(StartRefused, match=f"CKA_{name} is"):
        token(SECRET_KEY=[SoftRootObject(**{name: not ROOT_MUST_BE[name]})]).root_key(ROOT)


@pytest.mark.parametrize("change", [{A.KEY_TYPE: pkcs11.KeyType.DES3}, {A.VALUE_LEN: 16}])
def test_a_root_key_that_is_not_aes_256_is_refused(change: Attributes) -> None:
    """Another algorithm, or 128 bits."""
    key = SoftRootObject()
    key.attributes |= change

    with pytest.raises(StartRefused, match="not an AES key of 256 bits"):
        token(SECRET_KEY=[key]).root_key(ROOT)


@pytest.mark.parametrize("error", KEY_ERRORS)
@pytest.mark.parametrize("call", ["encrypt_error", "decrypt_error"])
def test_a_root_key_that_cannot_do_aes_gcm_is_refused_for_good(call: str, error: ModuleError) -> None:
    """The module has no such mechanism, or the key may not be used for it: another start would not help."""
    key = SoftRootObject()
    setattr(key, call, error)

    with pytest.raises(StartRefused) as caught:
        root(key)

    assert caught.value.code is ChildExit.KEY_REFUSED


@pytest.mark.parametrize("error", DEVICE_ERRORS)
def test_a_device_that_fails_while_a_key_is_tried_may_be_tried_again(error: ModuleError) -> None:
    """A network HSM that is away for a moment must not stop the sidecar for good."""
    key = SoftRootObject()
    key.encrypt_error = error

    with pytest.raises(StartRefused) as caught:
        root(key)

    assert caught.value.code.may_restart


def test_a_root_key_with_another_answer_is_refused() -> None:
    """It decrypts to something else than was encrypted."""
    key = SoftRootObject()
    key.lie = b"something else of the same lengt"

    with pytest.raises(StartRefused, match="does not give the known answer"):
        root(key)


def test_a_module_that_ignores_associated_data_is_refused() -> None:
    """Such a module would open a master key for any cluster."""
    key = SoftRootObject()
    key.ignores_associated_data = True

    with pytest.raises(StartRefused, match="known answer"):
        root(key)


def test_a_module_that_makes_its_own_iv_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes the IV into the caller's memory: the record would hold another one."""
    import ctypes

    key = SoftRootObject()
    honest = key.encrypt

    def encrypt(octets: bytes, *, mechanism: pkcs11.Mechanism, mechanism_param: pkcs11.GCMParams) -> bytes:
        ctypes.memset(id(mechanism_param.nonce) + bytes.__basicsize__ - 1, 7, 12)
        return honest(octets, mechanism=mechanism, mechanism_param=mechanism_param)

    monkeypatch.setattr(key, "encrypt", encrypt)
    with pytest.raises(StartRefused, match="IV_CHOSEN_BY_MODULE") as caught:
        root(key)

    assert caught.value.code is ChildExit.KEY_REFUSED


# --- the root key at work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ALL_ERRORS)
def test_a_wrong_tag_is_told_from_a_sick_module_by_the_known_answer(error: ModuleError) -> None:
    """Whatever code the module has for a wrong tag: the HSM still computes its known answer, so the record is bad."""
    soft = SoftRootObject()
    key = root(soft)
    soft.tag_error = error
    blob = wrapped_by(key)

    with pytest.raises(RootRefused):
        key.decrypt_into(**blob, associated_data=b"other", buffer=bytearray(32))


@pytest.mark.parametrize("error", ALL_ERRORS)
def test_a_sick_module_is_a_fault_and_not_a_bad_record(error: ModuleError) -> None:
    """The same codes while the HSM does not compute its known answer: nobody may conclude that a master key is lost."""
    soft = SoftRootObject()
    key = root(soft)
    blob = wrapped_by(key)
    soft.decrypt_error = error

    with pytest.raises(HsmFault) as caught:
        key.decrypt_into(**blob, associated_data=b"aad", buffer=bytearray(32))

    assert caught.value.cause == error.__name__


@pytest.mark.parametrize("lie", [b"", b"m" * 31, b"m" * 33])
def test_an_answer_of_another_length_is_a_fault(lie: bytes) -> None:
    """Success, with too few or too many octets."""
    soft = SoftRootObject()
    key = root(soft)
    blob = wrapped_by(key)
    soft.lie = lie

    with pytest.raises(HsmFault):
        key.decrypt_into(**blob, associated_data=b"aad", buffer=bytearray(32))


def test_the_octets_that_python_pkcs11_returned_are_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decrypted master key comes as `bytes`: its memory is overwritten once it is in the buffer."""
    soft = SoftRootObject()
    key = root(soft)
    blob = wrapped_by(key)
    returned: list[bytes] = []
    honest = soft.decrypt

    def decrypt(octets: bytes, *, mechanism: pkcs11.Mechanism, mechanism_param: pkcs11.GCMParams) -> bytes:
        returned.append(honest(octets, mechanism=mechanism, mechanism_param=mechanism_param))
        return returned[-1]

    monkeypatch.setattr(soft, "decrypt", decrypt)
    buffer = bytearray(32)
    key.decrypt_into(**blob, associated_data=b"aad", buffer=buffer)

    assert buffer == b"m" * 32
    assert returned[0] == bytes(32)


# --- signing keys --------------------------------------------------------------------------------------------------------


def signing(private: SoftPrivateObject, publics: Sequence[Attributes] | None = None) -> SigningKey:
    publics = [private.public_object()] if publics is None else publics
    return token(PRIVATE_KEY=[private], PUBLIC_KEY=publics).signing_key(AUDIT)


def test_a_signing_key_is_named_by_its_public_key() -> None:
    """SPKI in DER, and the first 16 digits of its hash."""
    private = SoftPrivateObject()

    key = signing(private)

    spki = private.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert key.spki_der == spki
    assert key.key_id == hashlib.sha256(spki).hexdigest()[:16]


def test_a_bare_point_is_understood() -> None:
    """Some modules give CKA_EC_POINT without its OCTET STRING."""
    private = SoftPrivateObject()
    point = private.key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    bare = signing(private, publics=[private.public_object(EC_POINT=point)])

    assert bare.spki_der == signing(private).spki_der


@pytest.mark.parametrize("name", SIGNING_MUST_BE)
def test_a_weaker_signing_key_is_refused_by_name_of_the_attribute(name: str) -> None:
    """Extractable, or good for more than signing."""
    with pytest.raises(StartRefused, match=f"audit/2026-11.*CKA_{name} is"):
        signing(SoftPrivateObject(**{name: not SIGNING_MUST_BE[name]}))


@pytest.mark.parametrize(
    "changes",
    [
        {"EC_PARAMS": bytes.fromhex("06052b81040022")},
        {"KEY_TYPE": pkcs11.KeyType.RSA},
        {"EC_POINT": b""},
        {"EC_POINT": b"\x04\x41\x04" + bytes(64)},
        {"EC_POINT": b"\x04\x41" + b"\x04" * 64},
    ],
    ids=["P-384", "RSA", "no point", "not on the curve", "cut"],
)
def test_a_public_key_that_is_not_p256_is_refused(changes: dict[str, object]) -> None:
    """Curve, type and point are checked."""
    private = SoftPrivateObject()

    with pytest.raises(StartRefused) as caught:
        signing(private, publics=[private.public_object(**changes)])

    assert caught.value.code is ChildExit.KEY_REFUSED


def test_a_private_key_of_another_pair_is_refused() -> None:
    """Label and id fit, the key does not: its signature does not verify."""
    with pytest.raises(StartRefused, match="WRONG_SIGNATURE"):
        signing(SoftPrivateObject(), publics=[SoftPrivateObject().public_object()])


@pytest.mark.parametrize("number", [0, 2])
def test_anything_but_one_public_key_is_refused(number: int) -> None:
    """Without its public key a signature cannot be checked."""
    private = SoftPrivateObject()
    with pytest.raises(StartRefused, match="public key"):
        signing(private, publics=[private.public_object()] * number)


@pytest.mark.parametrize(
    "lie", [b"", bytes(64), b"\xff" * 64, b"\x01" * 63, b"\x01" * 65], ids=["none", "zeros", "ones", "short", "long"]
)
def test_a_wrong_signature_never_leaves(lie: bytes) -> None:
    """Success with zeros, with another length or with rubbish is a fault."""
    private = SoftPrivateObject()
    key = signing(private)
    private.lie = lie

    with pytest.raises(HsmFault, match="failed") as caught:
        key.sign(DIGEST)

    assert caught.value.cause == "WRONG_SIGNATURE"


def test_another_keys_signature_never_leaves() -> None:
    """After a reconnect a handle may point to another key: each signature is checked, so this one is found."""
    private = SoftPrivateObject()
    key = signing(private)
    private.key = ec.generate_private_key(ec.SECP256R1())

    with pytest.raises(HsmFault):
        key.sign(DIGEST)


@pytest.mark.parametrize("error", ALL_ERRORS)
def test_every_error_of_signing_is_a_fault(error: ModuleError) -> None:
    """And names the class, so that an operator can look it up."""
    private = SoftPrivateObject()
    key = signing(private)
    private.error = error

    with pytest.raises(HsmFault) as caught:
        key.sign(DIGEST)

    assert caught.value.cause == error.__name__


# --- random numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stuck", [b"\x00", b"\x55", b"\xff"])
def test_an_hsm_that_repeats_its_random_numbers_does_no_harm(stuck: bytes) -> None:
    """They are combined with the kernel's."""
    it = token()
    it.session.random = stuck
    buffers = [bytearray(32) for _ in range(3)]

    for buffer in buffers:
        it.random_into(buffer)

    assert len({bytes(buffer) for buffer in (*buffers, bytearray(stuck * 32))}) == 4


def test_random_numbers_of_another_length_are_a_fault() -> None:
    """Fewer octets than asked for would leave zeros in a key."""
    it = token()
    it.session.generate_random = lambda _bits: b"\x01" * 16

    with pytest.raises(HsmFault):
        it.random_into(bytearray(32))


# --- login ---------------------------------------------------------------------------------------------------------------


class PlayedToken:
    """A token in a slot; counts logins."""

    def __init__(
        self,
        *,
        label: str = "t",
        serial: bytes = b"s",
        flags: pkcs11.TokenFlag = pkcs11.TokenFlag.USER_PIN_INITIALIZED,
        error: ModuleError | None = None,
    ) -> None:
        self.label, self.serial, self.model = label, serial, "m"
        self.flags = flags
        self.error = error
        self.logins = 0

    def open(self, *, rw: bool, user_pin: Pin) -> PlayedSession:
        self.logins += 1
        user_pin.encode("utf-8")
        if self.error:
            raise self.error
        return PlayedSession()


PlayedSlot = PlayedToken | pkcs11.PKCS11Error  # a token, or what the slot fails with


class PlayedLibrary:
    library_description, library_version = "played", (1, 0)

    def __init__(self, *tokens: PlayedSlot) -> None:
        self.tokens = tokens

    def get_slots(self, token_present: bool) -> list[SimpleNamespace]:
        assert token_present

        def slot(it: PlayedSlot) -> SimpleNamespace:
            def get_token() -> PlayedToken:
                if isinstance(it, Exception):
                    raise it
                return it

            return SimpleNamespace(get_token=get_token)

        return [slot(it) for it in self.tokens]


class LogIn(Protocol):
    def __call__(self, *tokens: PlayedSlot) -> Token: ...


@pytest.fixture
def log_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LogIn:
    pin = tmp_path / "pin"
    pin.write_text("1234")
    pin.chmod(0o400)
    settings = HsmSettings(cluster="c", module_path="m", token_label="t", token_serial="s", pin_file=str(pin), keys=())

    def run(*tokens: PlayedSlot) -> Token:
        monkeypatch.setattr(module, "load_module", lambda _path: PlayedLibrary(*tokens))
        return Token.log_in(settings)

    return run


def test_the_token_is_selected_by_label_and_serial(log_in: LogIn) -> None:
    """Labels may repeat and slots are renumbered: only both together name a token."""
    right = PlayedToken(serial=b"s\0 ")
    others = [PlayedToken(label="u"), PlayedToken(serial=b"z")]

    log_in(others[0], right, others[1])

    assert right.logins == 1
    assert [other.logins for other in others] == [0, 0]


def test_a_sick_slot_does_not_hide_the_token(log_in: LogIn) -> None:
    """One slot that fails is skipped."""
    right = PlayedToken()

    log_in(pkcs11.GeneralError(), right)

    assert right.logins == 1


def test_no_token_may_come_back_and_two_are_a_mistake(log_in: LogIn) -> None:
    """A missing token is tried again later; two that cannot be told apart never get a PIN."""
    twins = [PlayedToken(), PlayedToken()]

    with pytest.raises(StartRefused) as missing:
        log_in(PlayedToken(label="u"))
    with pytest.raises(StartRefused) as double:
        log_in(*twins)

    assert missing.value.code is ChildExit.UNREACHABLE
    assert double.value.code is ChildExit.SETTINGS_REFUSED
    assert [twin.logins for twin in twins] == [0, 0]


@pytest.mark.parametrize("flag", [pkcs11.TokenFlag.USER_PIN_LOCKED, pkcs11.TokenFlag.USER_PIN_FINAL_TRY, None], ids=str)
def test_a_pin_that_is_locked_or_nearly_is_not_tried(log_in: LogIn, flag: pkcs11.TokenFlag | None) -> None:
    """Locked, one try before, or never set: no login is attempted at all."""
    flags = pkcs11.TokenFlag.USER_PIN_INITIALIZED | flag if flag else pkcs11.TokenFlag.RNG
    it = PlayedToken(flags=flags)

    with pytest.raises(StartRefused) as caught:
        log_in(it)

    assert caught.value.code is ChildExit.PIN_REFUSED
    assert it.logins == 0


def test_a_low_count_is_tried_and_reported(log_in: LogIn) -> None:
    """Somebody typed a wrong PIN once: ours is tried, and the flag is shown."""
    it = PlayedToken(flags=pkcs11.TokenFlag.USER_PIN_INITIALIZED | pkcs11.TokenFlag.USER_PIN_COUNT_LOW)

    assert log_in(it).facts.user_pin_count_low
    assert it.logins == 1


@pytest.mark.parametrize(
    "error",
    [pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange, pkcs11.PinLocked, pkcs11.PinExpired],
)
def test_a_refused_pin_is_tried_exactly_once_and_never_again(log_in: LogIn, error: ModuleError) -> None:
    """One login, and an exit code that forbids another start."""
    it = PlayedToken(error=error)

    with pytest.raises(StartRefused) as caught:
        log_in(it)

    assert caught.value.code is ChildExit.PIN_REFUSED
    assert not caught.value.code.may_restart
    assert it.logins == 1


@pytest.mark.parametrize(
    "error", [pkcs11.DeviceError, pkcs11.SessionCount, pkcs11.TokenNotPresent, pkcs11.GeneralError]
)
def test_a_login_that_fails_for_another_reason_may_be_tried_again(log_in: LogIn, error: ModuleError) -> None:
    """The PIN was not judged, so a new process may try."""
    with pytest.raises(StartRefused) as caught:
        log_in(PlayedToken(error=error))

    assert caught.value.code.may_restart
