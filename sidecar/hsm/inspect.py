"""What an administrator may ask of an HSM before the sidecar runs; answers with one JSON document on standard output.

    python -m sidecar.hsm.inspect slots --module M          every slot and its token; no login
    python -m sidecar.hsm.inspect test --settings FILE      logs in once, proves every key as a start would, shows the status

Rules:
- A process of its own, as everything that loads a PKCS#11 module.
- `test` spends one login with the configured PIN, under the same rules as a start, and changes nothing in the token.

Exit codes: 0, and those of `ChildExit`.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from sidecar.domain.provider import KeyPurpose
from sidecar.hardening import harden
from sidecar.hsm.errors import HsmFault, StartRefused
from sidecar.hsm.keys import check_references
from sidecar.hsm.module import Token, faults, load_module
from sidecar.ipc.messages import ChildExit, HsmSettings, KeyDescription

__all__ = ["HsmReport", "SlotReport", "main"]


class SlotReport(msgspec.Struct, frozen=True, kw_only=True):
    """One slot. The fields of its token are empty where it has none, or one that cannot be asked."""

    slot_id: int
    description: str
    manufacturer: str
    token_label: str = ""
    token_serial: str = ""
    token_model: str = ""
    flags: tuple[str, ...] = ()


class HsmReport(msgspec.Struct, frozen=True, kw_only=True):
    """A token that passed: its keys are there, strong enough, and compute what they must."""

    library_description: str
    library_version: str
    token_label: str
    token_serial: str
    keys: tuple[KeyDescription, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = _parser().parse_args(arguments)
    harden()
    try:
        answer = _slots(options) if options.command == "slots" else _test(options)
    except StartRefused as refused:
        sys.stderr.write(f"{refused.message}\n")
        return refused.code
    except HsmFault as fault:
        sys.stderr.write(f"the HSM failed ({fault.cause})\n")
        return ChildExit.SICK
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n")
    return 0


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
            token_serial=token.serial.decode("ascii", "replace").strip("\0 "),
            token_model=token.model,
            flags=tuple(flag.name for flag in pkcs11.TokenFlag if flag.name and int(token.flags) & flag),
        )
    return report


def _test(options: Namespace) -> HsmReport:
    settings = _read(options.settings)
    check_references(settings)
    token = Token.log_in(settings)
    try:
        keys = tuple(
            (token.root_key(key) if key.purpose is KeyPurpose.ROOT else token.signing_key(key)).describe()
            for key in settings.keys
        )
    finally:
        token.close()
    facts = token.facts
    return HsmReport(
        library_description=facts.library_description,
        library_version=facts.library_version,
        token_label=facts.token_label,
        token_serial=facts.token_serial,
        keys=keys,
    )


def _read(path: Path) -> HsmSettings:
    try:
        return msgspec.json.decode(path.read_bytes(), type=HsmSettings)
    except (OSError, msgspec.MsgspecError) as error:
        raise StartRefused(ChildExit.SETTINGS_REFUSED, "the settings file cannot be read") from error


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m sidecar.hsm.inspect", description="Look into an HSM.")
    commands = parser.add_subparsers(dest="command", required=True)
    slots = commands.add_parser("slots", help="list slots and tokens, without a login")
    slots.add_argument("--module", type=Path, required=True, help="the PKCS#11 module, a shared library")
    test = commands.add_parser("test", help="log in once and prove every key")
    test.add_argument("--settings", type=Path, required=True, help="HsmSettings as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
