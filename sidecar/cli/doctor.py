"""custodyctl doctor: everything that a sidecar needs, looked at from outside; works while none runs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidecar.cli import findings
from sidecar.cli.configuration import mistakes_in
from sidecar.cli.documents import document
from sidecar.cli.failures import ExitCode, Failure
from sidecar.cli.findings import Finding
from sidecar.cli.hsm import config_option, read_configuration
from sidecar.cli.inspection import hsm_settings
from sidecar.cli.output import Cell, Marked, Mood, Table
from sidecar.cli.plumbing import Command
from sidecar.cli.session import Session, pass_session
from sidecar.cli.status import degradations

if TYPE_CHECKING:
    from sidecar.config import Configuration

__all__ = ["doctor"]

_MOODS: Mapping[str, Mood] = {"success": "good", "warning": "warning", "failure": "bad"}


@click.command(cls=Command)
@config_option
@click.option("--no-login", is_flag=True, help="Do not log in to the HSM; its keys are then not looked at.")
@pass_session
def doctor(session: Session, config_file: str | None, no_login: bool) -> None:  # noqa: FBT001 (click passes options so)
    """Check everything a sidecar needs, and say what to do: configuration, files, HSM and keys, database, sockets, certificates.

    With --config it works while no sidecar runs; without, it looks at the running sidecar alone. It logs in to the HSM once, with
    the PIN file of the configuration, unless a wrong PIN is on record. Exit status: 1 after a failure, 3 after a warning.
    """
    sections = list(_sections(session, config_file, login=not no_login))
    outcomes = {finding.outcome for _, found in sections for finding in found}
    if "failure" in outcomes:
        session.exit_code = ExitCode.FAILED
    elif "warning" in outcomes:
        session.exit_code = ExitCode.DEGRADED
    checks = [_check(title, finding) for title, found in sections for finding in found]
    verdict = next((each for each in ("failure", "warning") if each in outcomes), "success")
    session.show(
        document("doctor", verdict=verdict, checks=checks),
        *(Table(title=title, rows=list(_rows(found)), empty="nothing to check") for title, found in sections),
    )


def _sections(session: Session, config_file: str | None, *, login: bool) -> Iterator[tuple[str, list[Finding]]]:
    if config_file is None:
        if session.options.address is None:
            raise Failure("nothing to look at: give --config FILE, or --address", code=ExitCode.USAGE)
        yield "Sidecar", list(_live(session))
        return
    mistakes = mistakes_in(config_file)
    if mistakes:
        yield "Configuration", [Finding(outcome="failure", message=each, advice=_ADVICE_CONFIG) for each in mistakes]
    else:
        yield "Configuration", [Finding(outcome="success", message=f"{config_file} and its policy are valid")]
    try:
        configuration = read_configuration(config_file)
    except Failure:
        return  # told above, mistake by mistake; what it names cannot be looked at
    yield "Files", list(findings.files(configuration))
    yield "HSM", list(_hsm(session, configuration, login=login))
    yield "Database", list(findings.database(configuration))
    yield "Sockets", list(findings.sockets(configuration))
    public_keys = _public_keys(configuration)
    yield "Certificates", list(findings.certificates(configuration, now=session.now(), hsm_public_keys=public_keys))
    yield "Sidecar", list(_live(_for_administration(session, configuration)))


_ADVICE_CONFIG = "see docs/configuration.md"


def _hsm(session: Session, configuration: "Configuration", *, login: bool) -> Iterator[Finding]:
    """Flags first: a PIN that may be wrong is not tried, each try counts."""
    seen: dict[str, Any] = {}

    def info() -> Iterator[Finding]:
        seen.update(_inspected(session, configuration, "info"))
        yield from findings.hsm_token(seen)

    yield from _or_failure(info)
    if not seen:
        return
    if not login:
        yield Finding(outcome="success", message="the keys were not looked at (--no-login)")
    elif any(flag.startswith("USER_PIN_") and flag in _NO_TRY for flag in seen["flags"]):
        yield Finding(
            outcome="warning",
            message="the keys were not looked at: the PIN is not tried while a wrong one is on record",
        )
    else:
        yield from _or_failure(lambda: findings.hsm_keys(_inspected(session, configuration, "keys")))


_NO_TRY = frozenset({"USER_PIN_LOCKED", "USER_PIN_FINAL_TRY", "USER_PIN_COUNT_LOW"})


def _inspected(session: Session, configuration: "Configuration", command: str) -> Mapping[str, Any]:
    from sidecar.config import ConfigurationError

    try:
        settings = hsm_settings(configuration)
    except ConfigurationError as error:
        raise Failure("; ".join(error.mistakes)) from error
    answer: Mapping[str, Any] = session.inspect(
        [command, "--settings", "-"], settings=settings, timeout_seconds=session.options.timeout_seconds
    )
    return answer


def _or_failure(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What ends any other command is one finding among others here."""
    try:
        yield from look()
    except Failure as failure:
        yield Finding(outcome="failure", message=failure.message, advice=failure.advice)


def _live(session: Session) -> Iterator[Finding]:
    try:
        with session.client() as client:
            seen = client.keys.status(timeout_seconds=session.options.timeout_seconds or 5.0)
    except Failure as failure:
        if failure.code is ExitCode.UNREACHABLE:
            yield Finding(outcome="warning", message="no sidecar answers", advice=failure.advice)
        else:
            yield Finding(outcome="failure", message=failure.message, advice=failure.advice)
        return
    degraded = list(degradations(seen))
    yield from (Finding(outcome="failure", message=each, advice="see the sidecar's log") for each in degraded)
    if not degraded:
        yield Finding(outcome="success", message=f"version {seen.version} of cluster {seen.cluster} is ready")
    for process in seen.processes:
        if process.restart_count:
            message = f"the process {process.process} was replaced {process.restart_count} times"
            yield Finding(outcome="warning", message=message, advice="see the sidecar's log")


def _for_administration(session: Session, configuration: "Configuration") -> Session:
    """The session, with the administration socket of the configuration where no address was given."""
    if session.options.address is not None:
        return session
    sockets = [
        listener.address
        for listener in configuration.listeners
        if listener.surface == "admin" and listener.tls is None and listener.address.startswith("unix:")
    ]
    return replace(session, options=replace(session.options, address=sockets[0])) if sockets else session


def _public_keys(configuration: "Configuration") -> Mapping[str, bytes]:
    """From keys.json; that it is missing or broken is told under Files and HSM."""
    import msgspec

    from sidecar.ipc.messages import KeyFile

    try:
        key_file = msgspec.json.decode(Path(configuration.hsm.keys_file).read_bytes(), type=KeyFile)
    except (OSError, msgspec.MsgspecError):
        return {}
    return {key.purpose.value: key.spki_der for key in key_file.descriptions if key.spki_der}


def _check(title: str, finding: Finding) -> dict[str, str | None]:
    advice = finding.advice or None
    return {"section": title, "outcome": finding.outcome, "message": finding.message, "advice": advice}


def _rows(found: list[Finding]) -> Iterator[tuple[Cell, Cell]]:
    for finding in found:
        yield Marked(f"  [ {finding.outcome} ]", _MOODS[finding.outcome]), finding.message
        if finding.advice:
            yield "", f"advice: {finding.advice}"
