"""What an administrator may ask of an HSM before the sidecar runs; answers with one JSON document on standard output.

    python -m sidecar.hsm.inspect slots --module M         every slot and its token; no login
    python -m sidecar.hsm.inspect info --settings FILE     the configured token, its flags and mechanisms; no login
    python -m sidecar.hsm.inspect keys --settings FILE     logs in once, and proves every key as a start would
    python -m sidecar.hsm.inspect test --settings FILE     the same, and proves on throwaway keys that the module keeps its word

`--settings -` reads standard input. `custodyctl hsm` and `custodyctl doctor` are how people reach this.

Rules:
- A process of its own, as everything that loads a PKCS#11 module; whoever starts it kills it when the module hangs.
- `keys` and `test` spend one login with the configured PIN, under the same rules as a start: the flags are read first.
- The token is never written: the session is read-only, throwaway keys are session objects, and they are destroyed.
- What must work is tried first: a sick module refuses everything, and must not pass for a strict one.

Exit codes: 0, and those of `ChildExit`. A key that is refused, or a promise that the module breaks, is KEY_REFUSED, with the
whole document on standard output and a line for each on standard error.
"""

import hashlib
import os
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec

from sidecar.domain.provider import KeyPurpose
from sidecar.hardening import harden
from sidecar.hsm.errors import HsmFault, RootRefused, StartRefused
from sidecar.hsm.keys import AES_256_BITS, check_references
from sidecar.hsm.module import P256_PARAMETERS, RootKey, SigningKey, Token, faults, load_module
from sidecar.ipc.messages import ChildExit, HsmSettings, KeyDescription, KeyReference
from sidecar.secretbuffer import SecretBuffer, wipe_bytes

__all__ = ["Check", "HsmReport", "KeyReport", "Rate", "SlotReport", "TokenReport", "main"]

_MAX_SETTINGS_BYTES: Final = 1024 * 1024
_MAX_BENCH: Final = 100_000
_P256_POINT_BYTES: Final = 65
_NEEDED_MECHANISMS: Final = ("AES_GCM", "ECDSA")
_PLAINTEXT: Final = b"a master key's worth of octets.."
_ASSOCIATED_DATA: Final = b"token-custody/inspection/1"

Outcome: TypeAlias = Literal["passed", "failed", "skipped"]


class SlotReport(msgspec.Struct, frozen=True, kw_only=True):
    """One slot. The fields of its token are empty where it has none, or one that cannot be asked."""

    slot_id: int
    description: str
    manufacturer: str
    token_label: str = ""
    token_serial: str = ""
    token_model: str = ""
    flags: tuple[str, ...] = ()


class TokenReport(msgspec.Struct, frozen=True, kw_only=True):
    """The configured token, as it shows itself to anybody. `missing_mechanisms` are those that the sidecar cannot do without."""

    library_description: str
    library_version: str
    token_label: str
    token_serial: str
    token_model: str
    flags: tuple[str, ...]
    mechanisms: tuple[str, ...]
    missing_mechanisms: tuple[str, ...]


class KeyReport(msgspec.Struct, frozen=True, kw_only=True):
    """One configured key. `refusal` is empty where a start would use it."""

    purpose: KeyPurpose
    label: str
    id_hex: str
    refusal: str = ""
    description: KeyDescription | None = None


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One promise of the module, and whether it keeps it. `detail` says what happened."""

    name: str
    outcome: Outcome
    detail: str = ""


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one operation was, one after the other on one session."""

    operation: str
    count: int
    seconds: float
    per_second: float


class HsmReport(msgspec.Struct, frozen=True, kw_only=True):
    """The token with its keys, and what was proven of its module."""

    library_description: str
    library_version: str
    token_label: str
    token_serial: str
    token_model: str
    keys: tuple[KeyReport, ...]
    checks: tuple[Check, ...] = ()
    rates: tuple[Rate, ...] = ()

    def refusals(self) -> Iterator[str]:
        """One line for each key that is refused and each promise that is broken."""
        yield from (key.refusal for key in self.keys if key.refusal)
        yield from (f"the module fails the check '{c.name}': {c.detail}" for c in self.checks if c.outcome == "failed")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = _parser().parse_args(arguments)
    harden()
    try:
        answer = _COMMANDS[options.command](options)
    except StartRefused as refused:
        sys.stderr.write(f"{refused.message}\n")
        return refused.code
    except HsmFault as fault:
        sys.stderr.write(f"the HSM failed ({fault.cause})\n")
        return ChildExit.SICK
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
    refusals = list(answer.refusals()) if isinstance(answer, HsmReport) else []
    sys.stderr.write("".join(f"{line}\n" for line in refusals))
    return ChildExit.KEY_REFUSED if refusals else 0


def _slots(options: Namespace) -> list[SlotReport]:
    library = load_module(str(options.module))
    with faults():
        return [_slot(slot) for slot in library.get_slots()]


def _slot(slot: Any) -> SlotReport:  # noqa: ANN401 (python-pkcs11's slots are untyped here)
    import pkcs11

    report = SlotReport(
        slot_id=slot.slot_id, description=slot.slot_description.strip(), manufacturer=slot.manufacturer_id.strip()
    )
    with suppress(pkcs11.PKCS11Error):  # empty, or sick: the others are still worth showing
        token = slot.get_token()
        report = msgspec.structs.replace(
            report,
            token_label=token.label,
            token_serial=_text(token.serial),
            token_model=token.model,
            flags=_flags(token),
        )
    return report


def _info(options: Namespace) -> TokenReport:
    settings = _read(options.settings)
    library = load_module(settings.module_path)
    token = _configured_token(library, settings)
    with faults():
        mechanisms = sorted(
            getattr(mechanism, "name", "") or hex(mechanism) for mechanism in token.slot.get_mechanisms()
        )
    return TokenReport(
        library_description=library.library_description.strip(),
        library_version=".".join(map(str, library.library_version)),
        token_label=token.label,
        token_serial=_text(token.serial),
        token_model=token.model,
        flags=_flags(token),
        mechanisms=tuple(mechanisms),
        missing_mechanisms=tuple(name for name in _NEEDED_MECHANISMS if name not in mechanisms),
    )


def _keys(options: Namespace) -> HsmReport:
    settings = _read(options.settings)
    check_references(settings)
    with _logged_in(settings) as token:
        return _report(token, settings)


def _test(options: Namespace) -> HsmReport:
    settings = _read(options.settings)
    check_references(settings)
    with _logged_in(settings) as token:
        report = _report(token, settings)
        throwaway = _ThrowawayKeys(token.session)
        checks = tuple(_Promises(throwaway).checks())
        broken = any(check.outcome == "failed" for check in checks)
        rates = tuple(_rates(throwaway, options.bench)) if options.bench and not broken else ()
        return msgspec.structs.replace(report, checks=checks, rates=rates)


_COMMANDS: Final[dict[str, Callable[[Namespace], object]]] = {
    "slots": _slots,
    "info": _info,
    "keys": _keys,
    "test": _test,
}


@contextmanager
def _logged_in(settings: HsmSettings) -> Iterator[Token]:
    token = Token.log_in(settings)
    try:
        yield token
    finally:
        token.close()


def _report(token: Token, settings: HsmSettings) -> HsmReport:
    facts = token.facts
    return HsmReport(
        library_description=facts.library_description,
        library_version=facts.library_version,
        token_label=facts.token_label,
        token_serial=facts.token_serial,
        token_model=facts.token_model,
        keys=tuple(_key(token, reference) for reference in settings.keys),
    )


def _key(token: Token, reference: KeyReference) -> KeyReport:
    """All keys are looked at: an administrator wants every mistake at once, not the first one."""
    report = KeyReport(purpose=reference.purpose, label=reference.label, id_hex=reference.id_hex)
    try:
        prove = token.root_key if reference.purpose is KeyPurpose.ROOT else token.signing_key
        return msgspec.structs.replace(report, description=prove(reference).describe())
    except StartRefused as refused:
        if refused.code is not ChildExit.KEY_REFUSED:
            raise
        return msgspec.structs.replace(report, refusal=refused.message)


# --- promises of the module, on throwaway keys -----------------------------------------------------------------------------


class _Promises:
    """What we trust the module to enforce, tried on session keys that end with the check."""

    def __init__(self, keys: "_ThrowawayKeys") -> None:
        self._keys = keys

    def checks(self) -> Iterator[Check]:
        """In order: first what must work, then what must be refused, then that nothing is left."""
        yield self._tried("AES-256-GCM with associated data", self._encrypts)
        yield self._tried("signature with P-256", self._signs)
        yield self._tried("a sensitive key's value cannot be read", self._keeps_value)
        yield self._tried("a private key's value cannot be read", self._keeps_private_value)
        yield self._tried("SENSITIVE cannot be taken back", lambda: self._keeps_attribute("SENSITIVE", unwanted=False))
        yield self._tried("EXTRACTABLE cannot be given", lambda: self._keeps_attribute("EXTRACTABLE", unwanted=True))
        yield self._tried("a copy cannot be made extractable", self._refuses_looser_copy)
        yield self._tried("a non-extractable key cannot be wrapped", self._refuses_wrapping)
        yield self._tried("throwaway keys are gone", self._is_clean)

    def _tried(self, name: str, check: Callable[[], str]) -> Check:
        """`check` returns what happened, or raises _Broken or _Skipped."""
        import pkcs11

        try:
            return Check(name=name, outcome="passed", detail=check())
        except _Broken as broken:
            return Check(name=name, outcome="failed", detail=str(broken))
        except _Skipped as skipped:
            return Check(name=name, outcome="skipped", detail=str(skipped))
        except pkcs11.PKCS11Error as error:
            return Check(name=name, outcome="failed", detail=f"the module answered {type(error).__name__}")
        except HsmFault as fault:
            return Check(name=name, outcome="failed", detail=f"the module answered {fault.cause}")
        except StartRefused as refused:
            return Check(name=name, outcome="failed", detail=refused.message)

    def _encrypts(self) -> str:
        with self._keys.aes() as key:
            root = self._keys.root(key)  # proves: opens what it sealed, and refuses other associated data
            iv = os.urandom(12)
            ciphertext = root.encrypt(iv=iv, plaintext=_PLAINTEXT, associated_data=_ASSOCIATED_DATA)
            self._must_open(root, iv, ciphertext)
            spoilt = bytes([ciphertext[0] ^ 1]) + ciphertext[1:]
            with SecretBuffer(len(_PLAINTEXT)) as buffer, suppress(RootRefused):
                root.decrypt_into(iv=iv, ciphertext=spoilt, associated_data=_ASSOCIATED_DATA, buffer=buffer.view)
                raise _Broken("a changed ciphertext was opened")
        return "opens what it sealed; refuses other associated data and a changed ciphertext"

    def _must_open(self, root: RootKey, iv: bytes, ciphertext: bytes) -> None:
        with SecretBuffer(len(_PLAINTEXT)) as buffer:
            root.decrypt_into(iv=iv, ciphertext=ciphertext, associated_data=_ASSOCIATED_DATA, buffer=buffer.view)
            if bytes(buffer.view) != _PLAINTEXT:
                raise _Broken("another plaintext came back")

    def _signs(self) -> str:
        with self._keys.pair() as (public, private):
            signing = self._keys.signing(public, private)  # proves: its signatures verify outside of the module
            signing.sign(hashlib.sha256(os.urandom(32)).digest())
        return "verified outside of the module"

    def _keeps_value(self) -> str:
        with self._keys.aes() as key:
            return self._unreadable(key)

    def _keeps_private_value(self) -> str:
        with self._keys.pair() as (_, private):
            return self._unreadable(private)

    def _unreadable(self, key: Any) -> str:  # noqa: ANN401
        import pkcs11

        try:
            value = key[pkcs11.Attribute.VALUE]
        except pkcs11.PKCS11Error as error:
            return f"refused ({type(error).__name__})"
        wipe_bytes(value)
        raise _Broken("the value was read")

    def _keeps_attribute(self, name: str, *, unwanted: bool) -> str:
        import pkcs11

        attribute = pkcs11.Attribute[name]
        with self._keys.aes() as key:
            before = bool(key[attribute])
            if before is unwanted:
                raise _Broken(f"the key was made with CKA_{name} {before}")
            answer = "ignored"
            try:
                key[attribute] = unwanted
            except pkcs11.PKCS11Error as error:
                answer = f"refused ({type(error).__name__})"
            if bool(key[attribute]) is unwanted:
                raise _Broken(f"CKA_{name} was changed")
            return answer

    def _refuses_looser_copy(self) -> str:
        import pkcs11

        with self._keys.aes() as key:
            try:
                copy = key.copy({pkcs11.Attribute.EXTRACTABLE: True})
            except pkcs11.PKCS11Error as error:
                return f"refused ({type(error).__name__})"
            try:
                if bool(copy[pkcs11.Attribute.EXTRACTABLE]):
                    raise _Broken("the copy is extractable")
            finally:
                copy.destroy()
        return "ignored"

    def _refuses_wrapping(self) -> str:
        import pkcs11

        with (
            self._keys.aes(uses="WRAP") as wrapping,
            self._keys.aes(extractable=True) as control,
            self._keys.aes() as kept,
        ):
            mechanism = self._wrapping_mechanism(wrapping, control)
            try:
                wrapped = wrapping.wrap_key(kept, mechanism=mechanism)
            except pkcs11.PKCS11Error as error:
                return f"refused ({type(error).__name__}); an extractable key was wrapped with {mechanism.name}"
        wipe_bytes(wrapped)
        raise _Broken("it was wrapped")

    def _wrapping_mechanism(self, wrapping: Any, control: Any) -> Any:  # noqa: ANN401
        """One that wraps a key that may leave: only then does a refusal say anything."""
        import pkcs11

        for name in ("AES_KEY_WRAP", "AES_KEY_WRAP_PAD"):
            mechanism = pkcs11.Mechanism[name]
            with suppress(pkcs11.PKCS11Error):
                wrapping.wrap_key(control, mechanism=mechanism)
                return mechanism
        raise _Skipped("the module wraps no key with AES key wrap")

    def _is_clean(self) -> str:
        left_count = self._keys.count_left()
        if left_count:
            raise _Broken(f"{left_count} objects are left until the session ends")
        return "none is left"


class _ThrowawayKeys:
    """Makes session keys of the kinds that the sidecar uses, non-extractable unless asked; each is destroyed at its end."""

    def __init__(self, session: Any) -> None:  # noqa: ANN401 (python-pkcs11's session has no type)
        self._session = session
        self._label = f"inspection-{os.urandom(8).hex()}"

    @contextmanager
    def aes(self, *, uses: str = "", extractable: bool = False) -> Iterator[Any]:
        """An AES-256 key that encrypts and decrypts, or is for `uses` alone, a name of MechanismFlag."""
        import pkcs11

        attribute, flags = pkcs11.Attribute, pkcs11.MechanismFlag
        key = self._session.generate_key(
            pkcs11.KeyType.AES,
            AES_256_BITS,
            label=self._label,
            store=False,
            capabilities=flags[uses] if uses else flags.ENCRYPT | flags.DECRYPT,
            template={attribute.PRIVATE: True, attribute.SENSITIVE: True, attribute.EXTRACTABLE: extractable},
        )
        try:
            yield key
        finally:
            key.destroy()

    @contextmanager
    def pair(self) -> Iterator[tuple[Any, Any]]:
        """A public and a private key on P-256."""
        import pkcs11

        attribute, flags = pkcs11.Attribute, pkcs11.MechanismFlag
        curve = self._session.create_domain_parameters(
            pkcs11.KeyType.EC, {attribute.EC_PARAMS: P256_PARAMETERS}, local=True
        )
        public, private = curve.generate_keypair(
            label=self._label,
            store=False,
            capabilities=flags.SIGN | flags.VERIFY,
            private_template={attribute.PRIVATE: True, attribute.SENSITIVE: True, attribute.EXTRACTABLE: False},
        )
        try:
            yield public, private
        finally:
            private.destroy()
            public.destroy()

    def root(self, key: Any) -> RootKey:  # noqa: ANN401
        """The key behind the seam that the sidecar uses, which proves it first."""
        return RootKey(key=key, reference=self._reference(KeyPurpose.ROOT), attributes={})

    def signing(self, public: Any, private: Any) -> SigningKey:  # noqa: ANN401
        """The pair behind the seam that the sidecar uses, which verifies every signature outside of the module."""
        import pkcs11

        with faults():
            point: bytes = public[pkcs11.Attribute.EC_POINT]
        # A DER OCTET STRING by the standard, the bare point on some modules: the point is what it ends with.
        reference = self._reference(KeyPurpose.DOCUMENT_SIGNING)
        return SigningKey(key=private, reference=reference, point=point[-_P256_POINT_BYTES:], attributes={})

    def count_left(self) -> int:
        import pkcs11

        return len(list(self._session.get_objects({pkcs11.Attribute.LABEL: self._label})))

    def _reference(self, purpose: KeyPurpose) -> KeyReference:
        return KeyReference(purpose=purpose, label=self._label, id_hex="00" * 16)


def _rates(keys: _ThrowawayKeys, count: int) -> Iterator[Rate]:
    """Each operation `count` times, one after the other, as the hsm process does them."""
    iv, digest = os.urandom(12), hashlib.sha256(_PLAINTEXT).digest()
    with keys.aes() as key, keys.pair() as (public, private), SecretBuffer(len(_PLAINTEXT)) as buffer:
        root, signing = keys.root(key), keys.signing(public, private)
        ciphertext = root.encrypt(iv=iv, plaintext=_PLAINTEXT, associated_data=_ASSOCIATED_DATA)
        work: dict[str, Callable[[], object]] = {
            "wrap": lambda: root.encrypt(iv=os.urandom(12), plaintext=_PLAINTEXT, associated_data=_ASSOCIATED_DATA),
            "unwrap": lambda: root.decrypt_into(
                iv=iv, ciphertext=ciphertext, associated_data=_ASSOCIATED_DATA, buffer=buffer.view
            ),
            "sign": lambda: signing.sign(digest),
        }
        for operation, once in work.items():
            began = time.perf_counter()
            for _ in range(count):
                once()
            seconds = time.perf_counter() - began
            yield Rate(operation=operation, count=count, seconds=seconds, per_second=count / seconds)


class _Broken(Exception):
    """The module did what it must not. Never leaves this module."""


class _Skipped(Exception):
    """The module cannot be asked. Never leaves this module."""


def _text(serial: bytes) -> str:
    return serial.decode("ascii", "replace").strip("\0 ")


def _flags(token: Any) -> tuple[str, ...]:  # noqa: ANN401
    import pkcs11

    return tuple(flag.name for flag in pkcs11.TokenFlag if flag.name and int(token.flags) & flag)


def _configured_token(library: Any, settings: HsmSettings) -> Any:  # noqa: ANN401
    """The one token with this label and serial. Raises StartRefused(UNREACHABLE)."""
    import pkcs11

    with faults():
        slots = library.get_slots(token_present=True)
    tokens = []
    for slot in slots:
        with suppress(pkcs11.PKCS11Error):  # one sick slot must not hide the others
            tokens.append(slot.get_token())
    wanted = (settings.token_label, settings.token_serial)
    matching = [token for token in tokens if (token.label, _text(token.serial)) == wanted]
    if len(matching) != 1:
        number = "no token" if not matching else "more than one token"
        raise StartRefused(ChildExit.UNREACHABLE, f"the HSM shows {number} with the configured label and serial")
    return matching[0]


def _read(path: str) -> HsmSettings:
    try:
        if path == "-":
            document = sys.stdin.buffer.read(_MAX_SETTINGS_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                document = file.read(_MAX_SETTINGS_BYTES + 1)
        if len(document) > _MAX_SETTINGS_BYTES:
            raise StartRefused(ChildExit.SETTINGS_REFUSED, "the settings are larger than 1 MiB")
        return msgspec.json.decode(document, type=HsmSettings)
    except (OSError, msgspec.MsgspecError) as error:
        raise StartRefused(ChildExit.SETTINGS_REFUSED, "the settings cannot be read") from error


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m sidecar.hsm.inspect", description="Look into an HSM.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    slots = commands.add_parser("slots", help="list slots and tokens, without a login")
    slots.add_argument("--module", type=Path, required=True, help="the PKCS#11 module, a shared library")
    summaries = {
        "info": "show the configured token, without a login",
        "keys": "log in once and prove every key",
        "test": "log in once, prove every key, and what the module enforces",
    }
    for name, summary in summaries.items():
        command = commands.add_parser(name, help=summary, allow_abbrev=False)
        command.add_argument("--settings", required=True, help="HsmSettings as JSON; - for standard input")
        if name == "test":
            command.add_argument("--bench", type=_bench_count, default=0, help="measure with so many operations each")
    return parser


def _bench_count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= _MAX_BENCH:
        raise ArgumentTypeError(f"must be 1 to {_MAX_BENCH}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
