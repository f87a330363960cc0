"""The one door to the PKCS#11 module: one token, one login, one session, a few keys.

Rules:
- This is the only file that imports pkcs11, and it does so inside functions: loading a module has side effects on the process.
- One thread. python-pkcs11 tells the module that there are no threads, and then crashes with them.
- One login per process, tried once. The PIN's flags are read first; a locked PIN, or one try before, is not tried at all.
- A key is found by class, label and id together, and there is exactly one, or none is used.
- A key is used only after its attributes were read back and it computed a known answer.
- An error of the module is a fault of the process, which ends and is replaced. Only where a ciphertext may be to blame is
  the known answer asked for again: if the HSM still computes it, the ciphertext is bad.

PKCS#11 2.40: C_Login 5.6, C_FindObjects 5.7, CKM_AES_GCM 2.12, CKM_ECDSA 2.3.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256

from sidecar.hsm.errors import HsmFault, RootRefused, StartRefused
from sidecar.hsm.keys import AES_256_BITS, P256_BITS, ROOT_MUST_BE, SIGNING_MUST_BE, check_attributes, key_refused
from sidecar.hsm.pin import Pin
from sidecar.ipc.messages import ChildExit, HsmSettings, KeyDescription, KeyReference
from sidecar.secretbuffer import Buffer, SecretBuffer, WritableBuffer, wipe_bytes

__all__ = ["P256_PARAMETERS", "ModuleFacts", "RootKey", "SigningKey", "Token", "faults", "load_module"]

P256_PARAMETERS = bytes.fromhex("06082a8648ce3d030107")  # DER of the OID prime256v1 (RFC 5480)
# DER of SubjectPublicKeyInfo up to the point (RFC 5480 section 2). Written out because cryptography's serialisation would
# bring the whole of its formats into a process that needs this one.
_P256_SPKI_PREFIX = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
_P256_POINT_BYTES = 65
_SCALAR_BYTES = 32
_IV_BYTES, _TAG_BITS = 12, 128
_CAUSES_IN_THE_KEY = frozenset(
    {
        "ArgumentsBad",
        "AttributeTypeInvalid",
        "CIPHERTEXT_LENGTH",
        "FunctionNotSupported",
        "FunctionRejected",
        "IV_CHOSEN_BY_MODULE",
        "KeySizeRange",
        "KeyTypeInconsistent",
        "MechanismInvalid",
        "MechanismParamInvalid",
        "PKCS11Error",  # codes that python-pkcs11 has no name for, CKR_KEY_FUNCTION_NOT_PERMITTED among them
        "PLAINTEXT_LENGTH",
        "WRONG_SIGNATURE",
    }
)
_KNOWN_PLAINTEXT = b"known answer of a custody root key"
_KNOWN_ASSOCIATED_DATA = b"token-custody/known-answer/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFacts:
    """What the module says about itself and the PIN of its token, at login."""

    library_description: str
    library_version: str
    token_label: str
    token_serial: str
    token_model: str
    user_pin_count_low: bool
    user_pin_final_try: bool
    user_pin_locked: bool


class Token:
    """The token, logged in. Closing it logs out; a process that ends for a fault does not bother."""

    def __init__(self, *, session: Any, facts: ModuleFacts) -> None:  # noqa: ANN401 (python-pkcs11's session has no type)
        self.session = session
        self.facts = facts

    @classmethod
    def log_in(cls, settings: HsmSettings, *, writable: bool = False) -> Self:
        """Loads the module, selects the token by label and serial, and logs in, once.

        Raises StartRefused: UNREACHABLE when the token is not there, PIN_REFUSED, PIN_FILE_REFUSED or SETTINGS_REFUSED.
        """
        import pkcs11

        library = load_module(settings.module_path)
        token = _select(library, settings)
        facts = _facts(library, token)
        _check_pin_may_be_tried(facts, int(token.flags))
        with Pin(settings.pin_file) as pin:
            try:
                session = token.open(rw=writable, user_pin=pin)
            except pkcs11.PKCS11Error as error:
                raise _login_refused(error) from error
        return cls(session=session, facts=facts)

    def root_key(self, reference: KeyReference) -> "RootKey":
        """The root key, checked. Raises StartRefused(KEY_REFUSED) and says what is wrong with it."""
        import pkcs11

        key = self._find(pkcs11.ObjectClass.SECRET_KEY, reference)
        attributes = _attributes(key, ROOT_MUST_BE)
        check_attributes(reference, ROOT_MUST_BE, attributes)
        with _as_refusal(reference):
            kind, length_bytes = key[pkcs11.Attribute.KEY_TYPE], key[pkcs11.Attribute.VALUE_LEN]
        if kind != pkcs11.KeyType.AES or length_bytes * 8 != AES_256_BITS:
            raise key_refused(reference, "it is not an AES key of 256 bits")
        with _as_refusal(reference):
            return RootKey(key=key, reference=reference, attributes=attributes)

    def signing_key(self, reference: KeyReference) -> "SigningKey":
        """A signing key with its public key, checked. Raises StartRefused(KEY_REFUSED)."""
        import pkcs11

        private = self._find(pkcs11.ObjectClass.PRIVATE_KEY, reference)
        attributes = _attributes(private, SIGNING_MUST_BE)
        check_attributes(reference, SIGNING_MUST_BE, attributes)
        public = self._find(pkcs11.ObjectClass.PUBLIC_KEY, reference)
        with _as_refusal(reference):
            for key in (private, public):
                if key[pkcs11.Attribute.KEY_TYPE] != pkcs11.KeyType.EC:
                    raise key_refused(reference, "it is not an elliptic curve key")
            if public[pkcs11.Attribute.EC_PARAMS] != P256_PARAMETERS:
                raise key_refused(reference, "its curve is not P-256")
            point = public[pkcs11.Attribute.EC_POINT]
        return SigningKey(key=private, reference=reference, point=_bare_point(reference, point), attributes=attributes)

    def random_into(self, buffer: WritableBuffer) -> None:
        """Fills `buffer` from the HSM's generator and the kernel's, combined: neither alone being bad makes the result bad.

        Raises HsmFault.
        """
        with faults():
            from_hsm: bytes = self.session.generate_random(len(buffer) * 8)
        if len(from_hsm) != len(buffer):
            raise HsmFault("RANDOM_LENGTH")
        from_kernel = os.urandom(len(buffer))
        for index, pair in enumerate(zip(from_hsm, from_kernel, strict=True)):
            buffer[index] = pair[0] ^ pair[1]
        wipe_bytes(from_hsm)
        wipe_bytes(from_kernel)

    def close(self) -> None:
        import pkcs11

        with suppress(pkcs11.PKCS11Error):  # the process ends next, and with it the session
            self.session.close()

    def _find(self, object_class: Any, reference: KeyReference) -> Any:  # noqa: ANN401 (python-pkcs11's objects are untyped)
        import pkcs11

        template = {
            pkcs11.Attribute.CLASS: object_class,
            pkcs11.Attribute.LABEL: reference.label,
            pkcs11.Attribute.ID: bytes.fromhex(reference.id_hex),
        }
        with _as_refusal(reference):
            found = list(self.session.get_objects(template))
        what = object_class.name.lower().replace("_", " ")
        if len(found) != 1:
            number = "no" if not found else "more than one"
            raise key_refused(reference, f"the token has {number} {what} with this label and the id {reference.id_hex}")
        return found[0]


class RootKey:
    """AES-256 in the HSM: wraps and unwraps by CKM_AES_GCM with associated data."""

    def __init__(self, *, key: Any, reference: KeyReference, attributes: Mapping[str, bool]) -> None:  # noqa: ANN401
        """Proves that the key encrypts and decrypts. Raises StartRefused(KEY_REFUSED) when it does not."""
        self.key_id = bytes.fromhex(reference.id_hex)
        self._key = key
        self._reference = reference
        self._attributes = dict(attributes)
        self._known_iv = os.urandom(_IV_BYTES)
        try:
            self._known_ciphertext = self.encrypt(
                iv=self._known_iv, plaintext=_KNOWN_PLAINTEXT, associated_data=_KNOWN_ASSOCIATED_DATA
            )
            well = self.computes_known_answer() and self._refuses_other_data()
        except HsmFault as fault:
            raise _refusal_of(reference, fault.cause) from fault
        if not well:
            raise key_refused(reference, "AES-GCM with it does not give the known answer")

    def encrypt(self, *, iv: bytes, plaintext: Buffer, associated_data: bytes) -> bytes:
        """Ciphertext and 16-byte tag. `iv` is 12 random bytes. Raises HsmFault."""
        import pkcs11

        octets = bytes(plaintext)
        # A copy of its own: modules that make the IV themselves write it into the caller's memory.
        given_iv = bytes(bytearray(iv))
        parameters = pkcs11.GCMParams(given_iv, associated_data, _TAG_BITS)
        try:
            with faults():
                ciphertext: bytes = self._key.encrypt(
                    octets, mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=parameters
                )
        finally:
            if octets is not plaintext:
                wipe_bytes(octets)
        if given_iv != iv:
            raise HsmFault("IV_CHOSEN_BY_MODULE")
        if len(ciphertext) != len(plaintext) + _TAG_BITS // 8:
            raise HsmFault("CIPHERTEXT_LENGTH")
        return ciphertext

    def decrypt_into(self, *, iv: bytes, ciphertext: bytes, associated_data: bytes, buffer: WritableBuffer) -> None:
        """Fills `buffer`, which is exactly as long as the plaintext.

        Raises RootRefused when the ciphertext is to blame, HsmFault when the HSM is.
        """
        try:
            self._decrypt_into(iv=iv, ciphertext=ciphertext, associated_data=associated_data, buffer=buffer)
        except HsmFault as fault:
            # SoftHSM says GeneralError for a wrong tag, as it does when it is sick.
            if self.computes_known_answer():
                raise RootRefused from fault
            raise

    def computes_known_answer(self) -> bool:
        with SecretBuffer(len(_KNOWN_PLAINTEXT)) as buffer:
            try:
                self._decrypt_into(
                    iv=self._known_iv,
                    ciphertext=self._known_ciphertext,
                    associated_data=_KNOWN_ASSOCIATED_DATA,
                    buffer=buffer.view,
                )
            except HsmFault:
                return False
            return buffer.view == _KNOWN_PLAINTEXT

    def describe(self) -> KeyDescription:
        return KeyDescription(
            purpose=self._reference.purpose,
            label=self._reference.label,
            id_hex=self._reference.id_hex,
            key_type="AES",
            size_bits=AES_256_BITS,
            attributes=self._attributes,
            spki_der=b"",
            key_id=self._reference.id_hex,
        )

    def _refuses_other_data(self) -> bool:
        """A module that ignores associated data would open a master key for another cluster."""
        with SecretBuffer(len(_KNOWN_PLAINTEXT)) as buffer:
            try:
                self._decrypt_into(
                    iv=self._known_iv, ciphertext=self._known_ciphertext, associated_data=b"other", buffer=buffer.view
                )
            except HsmFault:
                return True
            return False

    def _decrypt_into(self, *, iv: bytes, ciphertext: bytes, associated_data: bytes, buffer: WritableBuffer) -> None:
        import pkcs11

        parameters = pkcs11.GCMParams(iv, associated_data, _TAG_BITS)
        with faults():
            plaintext: bytes = self._key.decrypt(
                ciphertext, mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=parameters
            )
        try:
            if len(plaintext) != len(buffer):
                raise HsmFault("PLAINTEXT_LENGTH")
            buffer[:] = plaintext
        finally:
            wipe_bytes(plaintext)  # python-pkcs11 makes this `bytes`, and nobody else holds it


class SigningKey:
    """P-256 in the HSM. Every signature is verified before it leaves: a faulty or exchanged key must not sign for us."""

    def __init__(
        self,
        *,
        key: Any,  # noqa: ANN401
        reference: KeyReference,
        point: bytes,
        attributes: Mapping[str, bool],
    ) -> None:
        """Proves that the private key belongs to the public one, an uncompressed `point`. Raises StartRefused(KEY_REFUSED)."""
        self._key = key
        self._reference = reference
        self._public_key = _on_curve(reference, point)
        self._scheme = ec.ECDSA(utils.Prehashed(SHA256()))
        self._attributes = dict(attributes)
        self.spki_der = _P256_SPKI_PREFIX + point
        self.key_id = hashlib.sha256(self.spki_der).hexdigest()[:16]
        try:
            self.sign(hashlib.sha256(_KNOWN_PLAINTEXT).digest())
        except HsmFault as fault:
            raise _refusal_of(reference, fault.cause) from fault

    def sign(self, digest: bytes) -> bytes:
        """ECDSA over a SHA-256 digest (32 bytes): r || s, 64 bytes. Raises HsmFault."""
        import pkcs11

        with faults():
            signature: bytes = self._key.sign(digest, mechanism=pkcs11.Mechanism.ECDSA)
        if not self._verifies(signature, digest):
            raise HsmFault("WRONG_SIGNATURE")
        return signature

    def describe(self) -> KeyDescription:
        return KeyDescription(
            purpose=self._reference.purpose,
            label=self._reference.label,
            id_hex=self._reference.id_hex,
            key_type="EC",
            size_bits=P256_BITS,
            attributes=self._attributes,
            spki_der=self.spki_der,
            key_id=self.key_id,
        )

    def _verifies(self, signature: bytes, digest: bytes) -> bool:
        if len(signature) != 2 * _SCALAR_BYTES:
            return False
        r, s = int.from_bytes(signature[:_SCALAR_BYTES], "big"), int.from_bytes(signature[_SCALAR_BYTES:], "big")
        try:
            encoded = utils.encode_dss_signature(r, s)
            self._public_key.verify(encoded, digest, self._scheme)
        except InvalidSignature:
            return False
        return True


@contextmanager
def faults() -> Iterator[None]:
    """Lets out only HsmFault."""
    import pkcs11

    try:
        yield
    except pkcs11.PKCS11Error as error:
        raise HsmFault(type(error).__name__) from error


@contextmanager
def _as_refusal(reference: KeyReference) -> Iterator[None]:
    """An error of the module while a key is being found and proven."""
    import pkcs11

    try:
        yield
    except pkcs11.PKCS11Error as error:
        raise _refusal_of(reference, type(error).__name__) from error


def _refusal_of(reference: KeyReference, cause: str) -> StartRefused:
    """Only what speaks about the key condemns the key: a device that is away for a moment must not stop us for good."""
    if cause in _CAUSES_IN_THE_KEY:
        return key_refused(reference, f"it does not compute what it must ({cause})")
    return StartRefused(ChildExit.UNREACHABLE, f"the HSM failed while the {reference.purpose} key was tried ({cause})")


def load_module(path: str) -> Any:  # noqa: ANN401 (python-pkcs11's library has no type of its own)
    """The PKCS#11 module, initialised. Raises StartRefused: SETTINGS_REFUSED, or UNREACHABLE when its HSM does not answer."""
    import pkcs11

    try:
        return pkcs11.lib(path)
    except pkcs11.PKCS11Error as error:
        if type(error) is pkcs11.PKCS11Error:  # the dynamic loader's refusal has no code of its own
            raise StartRefused(ChildExit.SETTINGS_REFUSED, "the PKCS#11 module cannot be loaded") from error
        raise _not_there(error) from error


def _select(library: Any, settings: HsmSettings) -> Any:  # noqa: ANN401
    """One slot at a time, because one sick slot must not hide the others."""
    import pkcs11

    try:
        slots = library.get_slots(token_present=True)
    except pkcs11.PKCS11Error as error:
        raise _not_there(error) from error
    tokens = []
    for slot in slots:
        with suppress(pkcs11.PKCS11Error):
            tokens.append(slot.get_token())
    matching = [
        token
        for token in tokens
        if token.label == settings.token_label and _text(token.serial) == settings.token_serial
    ]
    if not matching:
        raise StartRefused(ChildExit.UNREACHABLE, "the HSM shows no token with the configured label and serial")
    if len(matching) > 1:
        raise StartRefused(
            ChildExit.SETTINGS_REFUSED, "the HSM shows more than one token with the configured label and serial"
        )
    return matching[0]


def _not_there(error: Exception) -> StartRefused:
    return StartRefused(ChildExit.UNREACHABLE, f"the PKCS#11 module does not reach its HSM ({type(error).__name__})")


def _facts(library: Any, token: Any) -> ModuleFacts:  # noqa: ANN401
    import pkcs11

    flags = int(token.flags)
    return ModuleFacts(
        library_description=library.library_description.strip(),
        library_version=".".join(map(str, library.library_version)),
        token_label=token.label,
        token_serial=_text(token.serial),
        token_model=token.model,
        user_pin_count_low=bool(flags & pkcs11.TokenFlag.USER_PIN_COUNT_LOW),
        user_pin_final_try=bool(flags & pkcs11.TokenFlag.USER_PIN_FINAL_TRY),
        user_pin_locked=bool(flags & pkcs11.TokenFlag.USER_PIN_LOCKED),
    )


def _check_pin_may_be_tried(facts: ModuleFacts, flags: int) -> None:
    import pkcs11

    if facts.user_pin_locked:
        raise StartRefused(ChildExit.PIN_REFUSED, "the token says that its user PIN is locked: it was not tried")
    if facts.user_pin_final_try:
        raise StartRefused(
            ChildExit.PIN_REFUSED, "the token says that one more wrong user PIN locks it: it was not tried"
        )
    if not flags & pkcs11.TokenFlag.USER_PIN_INITIALIZED:
        raise StartRefused(ChildExit.PIN_REFUSED, "the token has no user PIN yet")


def _login_refused(error: Exception) -> StartRefused:
    import pkcs11

    wrong = (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange)
    unusable = (pkcs11.PinLocked, pkcs11.PinExpired, pkcs11.UserPinNotInitialized)
    if isinstance(error, wrong):
        return StartRefused(
            ChildExit.PIN_REFUSED, "the token refused the PIN: it was tried once and is not tried again"
        )
    if isinstance(error, unusable):
        return StartRefused(ChildExit.PIN_REFUSED, f"the token's PIN cannot be used ({type(error).__name__})")
    return StartRefused(
        ChildExit.UNREACHABLE, f"the login failed for another reason than the PIN ({type(error).__name__})"
    )


def _attributes(key: Any, names: Mapping[str, bool]) -> dict[str, bool]:  # noqa: ANN401
    """Those that the module knows, one at a time: in a list one unknown attribute spoils the others on some modules."""
    import pkcs11

    found = {}
    for name in names:
        with suppress(pkcs11.AttributeTypeInvalid):
            found[name] = bool(key[pkcs11.Attribute[name]])
    return found


def _bare_point(reference: KeyReference, ec_point: bytes) -> bytes:
    """CKA_EC_POINT is a DER OCTET STRING by the standard; some modules give the bare point."""
    header = bytes([0x04, _P256_POINT_BYTES])
    point = ec_point[len(header) :] if ec_point.startswith(header) else ec_point
    if len(point) != _P256_POINT_BYTES:
        raise key_refused(reference, "its public point has an unknown form")
    return point


def _on_curve(reference: KeyReference, point: bytes) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    except ValueError as error:
        raise key_refused(reference, "its public point is not on the curve") from error


def _text(serial: bytes) -> str:
    return serial.decode("ascii", "replace").strip("\0 ")
