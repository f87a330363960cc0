"""One run of custodyctl: what its global options said, and its doors to the outside, which tests replace."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from sidecar.cli.failures import ExitCode, Failure, failure_of
from sidecar.cli.inspection import Inspect, inspect_hsm
from sidecar.cli.output import Document, Format, Output, Table

if TYPE_CHECKING:
    from custody.client import Client

__all__ = ["Options", "Session", "pass_session"]


@dataclass(slots=True, kw_only=True)
class Options:
    """The global options as given; None and False where they were not."""

    address: str | None = None
    tls_ca: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    format: Format | None = None
    no_color: bool = False
    no_input: bool = False
    yes: bool = False
    timeout_seconds: float | None = None


@dataclass(slots=True, kw_only=True)
class Session:
    """What every command is given. `exit_code` is what the run ends with when no error ends it."""

    options: Options = field(default_factory=Options)
    connect: "Callable[[Options], Client]" = field(default_factory=lambda: _connect)
    inspect: Inspect = inspect_hsm
    now: Callable[[], datetime] = field(default_factory=lambda: lambda: datetime.now(UTC))
    sleep: Callable[[float], None] = time.sleep
    can_ask: Callable[[], bool] = field(default_factory=lambda: _is_terminal)
    exit_code: ExitCode = ExitCode.OK

    @property
    def output(self) -> Output:
        """Where to write to, as the options want it."""
        colour = not (self.options.no_color or os.environ.get("NO_COLOR"))  # no-color.org: set and not empty
        return Output(form=self.options.format or "table", colour=colour)

    def show(self, document: Document, *tables: Table) -> None:
        """Write a result."""
        self.output.show(document, tables)

    def say(self, text: str) -> None:
        """Tell the person something, on standard error."""
        self.output.say(text)

    @contextmanager
    def client(self) -> "Iterator[Client]":
        """A client of the sidecar. Lets out only Failure."""
        from custody.errors import CustodyError

        try:
            with self.connect(self.options) as client:
                yield client
        except CustodyError as error:
            raise failure_of(error) from error

    def confirm(self, what: str, *, type_this: str) -> None:
        """Have a person type `type_this` before something that cannot be undone. Raises Failure unless they do, or --yes."""
        if self.options.yes:
            return
        self.say(what)
        if self.options.no_input or not self.can_ask():
            raise Failure(
                "nobody can be asked to confirm this", advice="give --yes to do it all the same", code=ExitCode.USAGE
            )
        sys.stderr.write(f"Type {type_this} to go on: ")
        sys.stderr.flush()
        if sys.stdin.readline().strip() != type_this:
            raise Failure("not confirmed; nothing was changed")


pass_session = click.make_pass_decorator(Session)


def _connect(options: Options) -> "Client":
    if not (options.address or os.environ.get("CUSTODY_ADDRESS")):
        raise Failure(
            "which sidecar? give --address or set CUSTODY_ADDRESS", advice=_ADDRESS_ADVICE, code=ExitCode.USAGE
        )
    _close_side_doors()
    from custody import Client, Tls

    tls_files = (options.tls_ca, options.tls_certificate, options.tls_key)
    if any(tls_files) and not all(tls_files):
        raise Failure("TLS needs all of --tls-ca, --tls-certificate and --tls-key", code=ExitCode.USAGE)
    tls = None
    if options.tls_ca and options.tls_certificate and options.tls_key:
        tls = Tls(ca=options.tls_ca, certificate=options.tls_certificate, key=options.tls_key)
    try:
        return Client(options.address, tls=tls, timeout_seconds=options.timeout_seconds)
    except ValueError as error:
        raise Failure(str(error), advice=_ADDRESS_ADVICE, code=ExitCode.USAGE) from error
    except OSError as error:
        raise Failure(f"{error.filename} cannot be read ({error.strerror})") from error


_ADDRESS_ADVICE = "such as --address unix:/run/custody/admin.sock, the sidecar's listener with surface: admin"


def _close_side_doors() -> None:
    """Before gRPC is loaded: these make it write what it carries to files and logs, or send it through a proxy."""
    for name in list(os.environ):
        if name.startswith("GRPC_") or name in _SIDE_DOORS or name.lower() in _PROXIES:
            del os.environ[name]
    os.environ["GRPC_VERBOSITY"] = "NONE"  # its own chatter; errors reach us as errors


_SIDE_DOORS = frozenset({"SSLKEYLOGFILE"})
_PROXIES = frozenset({"http_proxy", "https_proxy", "grpc_proxy", "all_proxy"})


def _is_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
