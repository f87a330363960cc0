"""custodyctl config: reads configuration files as the sidecar does, overrides of the environment included."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sidecar.cli.documents import document
from sidecar.cli.failures import ExitCode, Failure
from sidecar.cli.hsm import config_option, read_configuration
from sidecar.cli.output import Marked, Table
from sidecar.cli.plumbing import Command, CommandGroup, Entry
from sidecar.cli.session import Session, pass_session

if TYPE_CHECKING:
    from sidecar.config import Configuration

__all__ = ["check", "config", "mistakes_in", "show"]

config = CommandGroup(
    "config",
    help="Configuration files. A file holds names of secret files, never secrets.",
    entries={
        "check": Entry("sidecar.cli.configuration:check", "Find every mistake at once, in the policy file too."),
        "show": Entry("sidecar.cli.configuration:show", "Show the effective configuration."),
    },
)


@click.command(cls=Command)
@config_option
@pass_session
def check(session: Session, config_file: str | None) -> None:
    """Find every mistake in a configuration and its policy file. Exit status 1 when there is one."""
    if config_file is None:
        raise Failure("which configuration? give --config FILE or set CUSTODY_CONFIG", code=ExitCode.USAGE)
    mistakes = mistakes_in(config_file)
    session.exit_code = ExitCode.FAILED if mistakes else ExitCode.OK
    verdict = Marked("wrong", "bad") if mistakes else Marked("valid", "good")
    session.show(
        document("config-check", file=config_file, valid=not mistakes, mistakes=mistakes),
        Table(rows=[(config_file, verdict), *(("", Marked(each, "bad")) for each in mistakes)]),
    )


@click.command(cls=Command)
@config_option
@pass_session
def show(session: Session, config_file: str | None) -> None:
    """Show the effective configuration: the file, the defaults, and what the environment overrides."""
    from sidecar.config import shown

    effective = shown(read_configuration(config_file))
    if session.output.form == "table":
        import yaml

        session.output.raw(yaml.safe_dump(effective, sort_keys=False))
    else:
        session.show(document("config", file=config_file, configuration=effective))


def mistakes_in(config_file: str) -> list[str]:
    """Every mistake of a configuration, its policy file and its providers, as a start would find them one after the other."""
    from sidecar.config import ConfigurationError, load_configuration

    try:
        configuration = load_configuration(Path(config_file), environment=os.environ)
    except ConfigurationError as error:
        return list(error.mistakes)
    return [*_policy_mistakes(configuration), *_provider_mistakes(configuration)]


def _policy_mistakes(configuration: "Configuration") -> Iterator[str]:
    from sidecar.config import ConfigurationError, load_policy
    from sidecar.wiring import build_policy

    try:
        build_policy(load_policy(Path(configuration.policy_file)))
    except ConfigurationError as error:
        yield from (f"policy_file: {mistake}" for mistake in error.mistakes)


def _provider_mistakes(configuration: "Configuration") -> Iterator[str]:
    """One provider at a time, so that a mistake in one does not hide those of the others."""
    import msgspec

    from sidecar.config import ConfigurationError
    from sidecar.ipc.messages import KeyFile
    from sidecar.wiring import build_connectors

    path = Path(configuration.hsm.keys_file)
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=KeyFile)
    except OSError as error:
        yield f"hsm.keys_file: {path} cannot be read ({error.strerror})"
        return
    except msgspec.MsgspecError:
        yield "hsm.keys_file: is not what sidecar.hsm.provisioning writes"
        return
    for provider in configuration.providers:
        try:
            build_connectors(msgspec.structs.replace(configuration, providers=(provider,)), keys)
        except ConfigurationError as error:
            yield from error.mistakes
