"""custodyctl's tree of commands, and the one place where its errors become words and exit codes."""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TextIO

import click

from sidecar.cli.failures import ExitCode, Failure
from sidecar.cli.output import ReaderGone, clean
from sidecar.cli.plumbing import CommandGroup, Entry, global_options
from sidecar.cli.session import Session

__all__ = ["custodyctl", "main"]

_PIN_VARIABLE = re.compile(r"CUSTODY_(?:.*_)?(?:PIN|TOKEN|SECRET|PASSWORD)\Z")


def main(arguments: Sequence[str] | None = None, *, session: Session | None = None) -> int:
    """The exit code. `arguments` are those of the process unless given."""
    session = session or Session()
    for stream in (sys.stdout, sys.stderr):
        _show_anything(stream)
    try:
        with _termination_as_exception():
            _refuse_secrets_in_environment()
            custodyctl.main(
                args=None if arguments is None else list(arguments),
                prog_name="custodyctl",
                standalone_mode=False,
                obj=session,
            )
            sys.stdout.flush()
        return session.exit_code
    except click.UsageError as error:
        return _end_with(ExitCode.USAGE, error.format_message(), _usage_hint(error))
    except click.ClickException as error:
        return _end_with(ExitCode.FAILED, error.format_message())
    except Failure as failure:
        return _end_with(failure.code, failure.message, failure.advice)
    except (click.Abort, KeyboardInterrupt):
        return _end_with(ExitCode.INTERRUPTED, "interrupted")
    except _Terminated as terminated:
        return 128 + terminated.number
    except ReaderGone:
        _forget_standard_output()  # whoever read it has seen enough
        return session.exit_code
    except OSError as error:
        _forget_standard_output()
        return _end_with(ExitCode.FAILED, f"a file or stream failed: {error.strerror or type(error).__name__}")


custodyctl = CommandGroup(
    "custodyctl",
    params=global_options(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Administer a token custody sidecar.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 3 degraded or locked, 4 verification failed, "
    "5 sidecar or HSM not reachable, 130 interrupted.",
    entries={
        "status": Entry("sidecar.cli.status:status", "How the sidecar, its processes, its HSM and its log are."),
        "doctor": Entry("sidecar.cli.doctor:doctor", "Check everything a sidecar needs, and say what to do."),
        "hsm": Entry("sidecar.cli.hsm:hsm", "Look into the HSM: list-slots, info, test."),
        "key": Entry("sidecar.cli.keys:key", "The keys that the sidecar uses: list, show."),
        "consent": Entry("sidecar.cli.consents:consent", "Consents in custody: list, show, revoke."),
        "payment": Entry("sidecar.cli.payments:payment", "Payments that were made: list, show."),
        "audit": Entry("sidecar.cli.audit:audit", "The log: tail, export, verify."),
        "store": Entry("sidecar.cli.store:store", "The database, while no sidecar uses it: migrate."),
        "config": Entry("sidecar.cli.configuration:config", "Configuration files: check, show."),
        "completion": Entry("sidecar.cli.shell:completion", "Print the completion script of a shell."),
        "version": Entry("sidecar.cli.shell:version", "Print the version of custodyctl."),
    },
)


class _Terminated(BaseException):
    """SIGTERM, SIGHUP or SIGALRM, as an exception, so that what was begun is tidied up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _termination_as_exception() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may have handlers
        return

    ended_by: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        if number != signal.SIGALRM or not ended_by:
            ended_by.append(number)
        # An exception that comes while foreign code calls back into Python (gRPC, a finaliser) is printed and lost; so it
        # comes again until somebody has heard it.
        signal.setitimer(signal.ITIMER_REAL, _REPEAT_SECONDS)
        if ended_by[-1] == signal.SIGINT:
            raise KeyboardInterrupt
        raise _Terminated(ended_by[-1])

    before = {number: signal.signal(number, end) for number in _ENDING_SIGNALS}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


_ENDING_SIGNALS = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REPEAT_SECONDS = 1.0  # longer than any tidying up that the exception sets off


def _refuse_secrets_in_environment() -> None:
    """Every process of this user can read it, and children inherit it."""
    for name in sorted(os.environ):
        if _PIN_VARIABLE.match(name):
            raise click.UsageError(f"{name} is refused: secrets do not belong into the environment, only into files")


def _usage_hint(error: click.UsageError) -> str:
    return f"try {error.ctx.command_path} --help" if error.ctx else ""


def _end_with(code: ExitCode, message: str, advice: str = "") -> ExitCode:
    lines = [f"custodyctl: {message}", *([f"  advice: {advice}"] if advice else [])]
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more; the exit code still tells
        sys.stderr.write("".join(f"{clean(line)}\n" for line in lines))
        sys.stderr.flush()
    return code


def _show_anything(stream: TextIO) -> None:
    """A terminal that cannot show a character gets its escape, not an error (LC_ALL=C, arguments that are no UTF-8)."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _forget_standard_output() -> None:
    """What is still buffered cannot be written; Python would try again at its exit, and complain."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


if __name__ == "__main__":
    sys.exit(main())
