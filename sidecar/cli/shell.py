"""custodyctl completion and version: about the command line itself."""

import click

from sidecar import __version__
from sidecar.cli.documents import document
from sidecar.cli.output import Table
from sidecar.cli.plumbing import Command
from sidecar.cli.session import Session, pass_session

__all__ = ["completion", "version"]


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@pass_session
def completion(session: Session, shell: str) -> None:
    """Print the completion script of a shell.

    bash: source <(custodyctl completion bash). zsh: the same, behind compinit. fish: custodyctl completion fish | source.
    """
    from click.shell_completion import get_completion_class

    from sidecar.cli.main import custodyctl

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError("this click knows no such shell")
    session.output.raw(kind(custodyctl, {}, "custodyctl", "_CUSTODYCTL_COMPLETE").source())


@click.command(cls=Command)
@pass_session
def version(session: Session) -> None:
    """Print the version of custodyctl. The sidecar's is in custodyctl status."""
    session.show(document("version", version=__version__), Table(rows=[("custodyctl", __version__)]))
