"""click, held to our rules: each option once and not empty, nothing repeated that could be a secret, commands loaded late."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from sidecar.cli.session import Session

__all__ = ["Command", "CommandGroup", "Entry", "global_options"]

_ENVIRONMENT = {"address": "CUSTODY_ADDRESS", "format": "CUSTODY_FORMAT"}


class _Strict(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # completion parses half-written lines
            self._check(ctx, args)
        return super().parse_args(ctx, args)

    def _check(self, ctx: click.Context, args: list[str]) -> None:
        given, left, order = self.make_parser(ctx).parse_args(args=list(args))
        if given.get("help") is True:
            return
        for parameter in order:
            if isinstance(parameter, click.Option) and not parameter.multiple and order.count(parameter) > 1:
                raise click.UsageError(f"{parameter.opts[0]} was given more than once", ctx)
        for parameter in order:
            values = given.get(parameter.name or "")
            if "" in (values if isinstance(values, list | tuple) else [values]):
                raise click.UsageError(f"{parameter.get_error_hint(ctx)} must not be empty", ctx)
        if left and not ctx.allow_extra_args:
            raise click.UsageError(
                f"{len(left)} arguments too many; they are not repeated here, in case one is a secret", ctx
            )


class Command(_Strict):
    """A command that does something. Global options may stand behind it, too."""

    def __init__(self, name: str | None, **keywords: Any) -> None:  # noqa: ANN401 (passed through to click)
        super().__init__(name, **keywords)
        self.params += global_options(hidden=True)
        self.epilog = self.epilog or "Global options, before or behind the command: custodyctl --help"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command is ("module:attribute"), and its line in the help."""

    place: str
    summary: str


class CommandGroup(_Strict, click.Group):
    """Commands that are imported when they are asked for; help alone imports none of them."""

    def __init__(self, name: str | None, *, entries: Mapping[str, Entry], **keywords: Any) -> None:  # noqa: ANN401
        super().__init__(name, **keywords)
        self._entries = dict(entries)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return list(self._entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (click's signature)
        entry = self._entries.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.place.partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (click's signature)
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in self._entries.items()])


def global_options(*, hidden: bool = False) -> list[click.Parameter]:
    """New instances of the options that every command knows. The hidden ones stand behind a command and read no environment."""

    def option(name: str, **keywords: Any) -> click.Option:  # noqa: ANN401
        field = keywords.pop("field", name.replace("-", "_"))
        variable = None if hidden else _ENVIRONMENT.get(name)
        return click.Option(
            [f"--{name}", field],
            expose_value=False,
            hidden=hidden,
            envvar=variable,
            show_envvar=True,
            callback=_remember(field),
            **keywords,
        )

    return [
        option("address", metavar="ADDRESS", help="The sidecar's administration socket: unix:/PATH or HOST:PORT."),
        option("tls-ca", metavar="FILE", help="PEM of the authority that issued the sidecar's certificate."),
        option("tls-certificate", metavar="FILE", help="PEM of your own certificate."),
        option("tls-key", metavar="FILE", help="PEM of its key."),
        option(
            "format", type=click.Choice(["table", "json", "yaml"]), help="How results are written (default: table)."
        ),
        option("no-color", is_flag=True, help="No colours; so does NO_COLOR in the environment."),
        option("no-input", is_flag=True, help="Never ask anything; fail where a question would be needed."),
        option("yes", is_flag=True, help="Answer yes where a confirmation is asked for."),
        option(
            "timeout",
            field="timeout_seconds",
            type=click.FloatRange(min=0, max=3600, min_open=True),
            metavar="SECONDS",
            help="How long one question to the sidecar or the HSM may take (default: 30).",
        ),
    ]


def _remember(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:  # noqa: ANN401
        if value is None or value is False or ctx.resilient_parsing:
            return
        session = ctx.ensure_object(Session)
        given = ctx.get_parameter_source(field) is click.core.ParameterSource.COMMANDLINE
        on_command_line = ctx.meta.setdefault("custodyctl.given", set())
        if given and field in on_command_line:
            raise click.UsageError(f"{parameter.opts[0]} was given more than once", ctx)
        if given:
            on_command_line.add(field)
        setattr(session.options, field, value)

    return remember
