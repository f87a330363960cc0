"""custodyctl hsm: looks into an HSM, whether or not a sidecar runs. Nothing here writes to a token."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidecar.cli.documents import document
from sidecar.cli.failures import ExitCode, Failure
from sidecar.cli.inspection import hsm_settings
from sidecar.cli.output import Cell, Marked, Mood, Table
from sidecar.cli.plumbing import Command, CommandGroup, Entry
from sidecar.cli.session import Session, pass_session

if TYPE_CHECKING:
    from sidecar.config import Configuration

__all__ = ["PIN_FLAGS", "config_option", "hsm", "info", "list_slots", "read_configuration", "test"]

PIN_FLAGS: Mapping[str, str] = {
    "USER_PIN_LOCKED": "the user PIN is locked",
    "USER_PIN_FINAL_TRY": "one more wrong user PIN locks the token",
    "USER_PIN_COUNT_LOW": "a wrong user PIN was given since the last right one",
}
_MOODS: Mapping[str, Mood] = {"passed": "good", "failed": "bad", "skipped": "warning"}

hsm = CommandGroup(
    "hsm",
    help="Look into the HSM. Tokens are selected by label and serial, never by slot number.",
    entries={
        "list-slots": Entry("sidecar.cli.hsm:list_slots", "List every slot and token of a PKCS#11 module; no PIN."),
        "info": Entry("sidecar.cli.hsm:info", "Show the configured token, its flags and mechanisms; no PIN."),
        "test": Entry("sidecar.cli.hsm:test", "Log in once; prove the keys, and what the module enforces."),
    },
)

config_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    envvar="CUSTODY_CONFIG",
    show_envvar=True,
    help="The sidecar's configuration file.",
)


@click.command("list-slots", cls=Command)
@click.option("--module", metavar="FILE", help="The PKCS#11 module; else the one of the configuration.")
@config_option
@pass_session
def list_slots(session: Session, module: str | None, config_file: str | None) -> None:
    """List every slot and token of a PKCS#11 module. Needs no PIN."""
    path = module or read_configuration(config_file).hsm.module_path
    slots = session.inspect(["slots", "--module", path], timeout_seconds=session.options.timeout_seconds)
    rows: list[tuple[Cell, ...]] = [
        (
            slot["token_label"] or "-",
            slot["token_serial"] or "-",
            slot["token_model"] or "-",
            _pin_state(slot["flags"]) if slot["token_label"] else "no token",
            str(slot["slot_id"]),
        )
        for slot in slots
    ]
    session.show(
        document("hsm-slots", module=path, slots=slots),
        Table(columns=("token", "serial", "model", "PIN", "slot now"), rows=rows),
    )


@click.command(cls=Command)
@config_option
@pass_session
def info(session: Session, config_file: str | None) -> None:
    """Show the configured token as it shows itself to anybody. Needs no PIN.

    Exit status 3 when the PIN is locked or one try before, or a mechanism is missing.
    """
    seen = session.inspect(
        ["info", "--settings", "-"], settings=_settings(config_file), timeout_seconds=session.options.timeout_seconds
    )
    missing = seen["missing_mechanisms"]
    locked = {"USER_PIN_LOCKED", "USER_PIN_FINAL_TRY"} & set(seen["flags"])
    session.exit_code = ExitCode.DEGRADED if missing or locked else ExitCode.OK
    rows: list[tuple[str, Cell]] = [
        *_token_rows(seen),
        ("PIN", _pin_state(seen["flags"])),
        ("flags", ", ".join(seen["flags"])),
        ("mechanisms", f"{len(seen['mechanisms'])} (all with --format json)"),
        (
            "needed",
            Marked(f"missing: {', '.join(missing)}", "bad")
            if missing
            else Marked("AES-GCM and ECDSA are there", "good"),
        ),
    ]
    session.show(document("hsm-info", **seen), Table(rows=rows))


@click.command(cls=Command)
@config_option
@click.option(
    "--bench", type=click.IntRange(1, 100_000), metavar="N", help="Measure too, with N operations of each kind."
)
@pass_session
def test(session: Session, config_file: str | None, bench: int | None) -> None:
    """Log in once with the PIN file of the configuration; prove every key as a start would, and what the module enforces.

    The token's flags are read first: a PIN that is locked, or one try before, is not tried. Nothing is written to the token:
    what the module enforces is tried on keys of the session, which are destroyed. Exit status 4 when anything is refused.
    """
    arguments = ["test", "--settings", "-", *(["--bench", str(bench)] if bench else [])]
    seen = session.inspect(arguments, settings=_settings(config_file), timeout_seconds=session.options.timeout_seconds)
    session.exit_code = ExitCode.OK if _has_passed(seen) else ExitCode.VERIFICATION_FAILED
    session.show(document("hsm-test", **_test_document(seen)), *_test_tables(seen))


def _has_passed(seen: Mapping[str, Any]) -> bool:
    refused = any(key["refusal"] for key in seen["keys"])
    return not refused and all(check["outcome"] != "failed" for check in seen["checks"])


def _test_document(seen: Mapping[str, Any]) -> dict[str, Any]:
    """The inspection's answer, without what is only of use between processes."""
    keys = [
        {
            "purpose": key["purpose"],
            "label": key["label"],
            "id": key["id_hex"],
            "refusal": key["refusal"] or None,
            "attributes": (key["description"] or {}).get("attributes", {}),
        }
        for key in seen["keys"]
    ]
    return {"verdict": "passed" if _has_passed(seen) else "failed", **seen, "keys": keys}


def read_configuration(config_file: str | None) -> "Configuration":
    """The configuration with its overrides. Raises Failure with every mistake."""
    from sidecar.config import ConfigurationError, load_configuration

    if config_file is None:
        raise Failure("which configuration? give --config FILE or set CUSTODY_CONFIG", code=ExitCode.USAGE)
    try:
        return load_configuration(Path(config_file), environment=os.environ)
    except ConfigurationError as error:
        raise Failure("the configuration is wrong: " + "; ".join(error.mistakes)) from error


def _settings(config_file: str | None) -> bytes:
    from sidecar.config import ConfigurationError

    try:
        return hsm_settings(read_configuration(config_file))
    except ConfigurationError as error:
        raise Failure("; ".join(error.mistakes)) from error


def _pin_state(flags: list[str]) -> Cell:
    for flag, meaning in PIN_FLAGS.items():
        if flag in flags:
            return Marked(meaning, "bad")
    if "USER_PIN_INITIALIZED" not in flags:
        return Marked("no user PIN yet", "warning")
    return Marked("no wrong PIN on record", "good")


def _token_rows(seen: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    return [
        ("token", seen["token_label"]),
        ("serial", seen["token_serial"]),
        ("model", seen["token_model"]),
        ("module", f"{seen['library_description']} {seen['library_version']}"),
    ]


def _test_tables(seen: Mapping[str, Any]) -> Iterator[Table]:
    yield Table(rows=_token_rows(seen))
    yield Table(
        title="Keys",
        columns=("key", "purpose", "result"),
        rows=[
            (
                key["label"],
                key["purpose"],
                Marked(key["refusal"], "bad") if key["refusal"] else Marked("proven", "good"),
            )
            for key in seen["keys"]
        ],
    )
    yield Table(
        title="What the module enforces, on throwaway keys",
        columns=("check", "result", "detail"),
        rows=[
            (each["name"], Marked(each["outcome"], _MOODS[each["outcome"]]), each["detail"]) for each in seen["checks"]
        ],
    )
    if seen["rates"]:
        yield Table(
            title="Rates, one after the other",
            columns=("operation", "count", "per second"),
            rows=[(each["operation"], str(each["count"]), f"{each['per_second']:.0f}") for each in seen["rates"]],
        )
