"""What a key must be before this process uses it. Pure: tables and the one function that compares.

A key that is weaker than its table is refused, and the refusal names the key and the attribute.
"""

from collections.abc import Mapping
from typing import Final

from sidecar.domain.provider import KeyPurpose
from sidecar.hsm.errors import StartRefused
from sidecar.ipc.messages import ChildExit, HsmSettings, KeyReference

__all__ = [
    "AES_256_BITS",
    "MAY_BE_UNKNOWN",
    "P256_BITS",
    "ROOT_MUST_BE",
    "SIGNING_MUST_BE",
    "check_attributes",
    "check_references",
    "key_refused",
]

AES_256_BITS: Final = 256
P256_BITS: Final = 256

ROOT_MUST_BE: Final[Mapping[str, bool]] = {
    "TOKEN": True,
    "PRIVATE": True,
    "SENSITIVE": True,
    "ALWAYS_SENSITIVE": True,
    "EXTRACTABLE": False,
    "NEVER_EXTRACTABLE": True,
    "LOCAL": True,
    "MODIFIABLE": False,
    "COPYABLE": False,
    "ENCRYPT": True,
    "DECRYPT": True,
    "WRAP": False,
    "UNWRAP": False,
    "SIGN": False,
    "VERIFY": False,
    "DERIVE": False,
}
"""PKCS#11 attribute (without CKA_) and the value that the root key must have."""

SIGNING_MUST_BE: Final[Mapping[str, bool]] = {
    "TOKEN": True,
    "PRIVATE": True,
    "SENSITIVE": True,
    "EXTRACTABLE": False,
    "SIGN": True,
    "DECRYPT": False,
    "UNWRAP": False,
    "DERIVE": False,
}
"""For a private signing key. It may have been imported (a seal key that a bank's directory knows), so LOCAL is not asked for."""

# PKCS#11 2.40 added CKA_COPYABLE; a module that does not know the attribute cannot be asked for it.
MAY_BE_UNKNOWN: Final = frozenset({"COPYABLE"})


def check_attributes(reference: KeyReference, must_be: Mapping[str, bool], found: Mapping[str, bool]) -> None:
    """`found` lacks what the module does not know. Raises StartRefused(KEY_REFUSED) at the first difference."""
    for name, value in must_be.items():
        if name not in found:
            if name in MAY_BE_UNKNOWN:
                continue
            raise key_refused(reference, f"CKA_{name} cannot be read and must be {_word(value=value)}")
        if found[name] is not value:
            raise key_refused(reference, f"CKA_{name} is {_word(value=found[name])} and must be {_word(value=value)}")


def check_references(settings: HsmSettings) -> None:
    """One root key, at most one key of each other purpose, no key under two names. Raises StartRefused(SETTINGS_REFUSED)."""
    purposes = [key.purpose for key in settings.keys]
    if KeyPurpose.ROOT not in purposes:
        raise StartRefused(ChildExit.SETTINGS_REFUSED, "the settings name no root key")
    if len(set(purposes)) != len(purposes):
        raise StartRefused(ChildExit.SETTINGS_REFUSED, "the settings name two keys for one purpose")
    if len({key.id_hex for key in settings.keys}) != len(settings.keys):
        raise StartRefused(ChildExit.SETTINGS_REFUSED, "the settings name one key id twice")
    for key in settings.keys:
        _check_id(key)


def key_refused(reference: KeyReference, what: str) -> StartRefused:
    return StartRefused(ChildExit.KEY_REFUSED, f"the {reference.purpose} key '{reference.label}' is refused: {what}")


def _check_id(reference: KeyReference) -> None:
    try:
        octets = bytes.fromhex(reference.id_hex)
    except ValueError:
        octets = b""
    # The root key's id is the key id of every master key's sealed record, whose format gives it 16 octets.
    if not octets or (reference.purpose is KeyPurpose.ROOT and len(octets) != 16):
        raise StartRefused(
            ChildExit.SETTINGS_REFUSED,
            f"the id of the {reference.purpose} key is not hexadecimal, or of another length",
        )


def _word(*, value: bool) -> str:
    return "true" if value else "false"
