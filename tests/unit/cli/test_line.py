"""The command line itself: what is refused, how errors end, what a closed pipe or a narrow terminal does, what help loads."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path

import pytest
from custody.testing import FakeCustody

from sidecar import __version__
from sidecar.cli.failures import ExitCode
from sidecar.cli.main import custodyctl
from sidecar.cli.output import Marked, Output, Table, clean, relative
from sidecar.cli.plumbing import CommandGroup
from tests.unit.cli.support import ToldSidecar, assert_golden, good_status, run, sandbox, session_of

COMMAND = [sys.executable, "-m", "sidecar.cli.main"]
ROOT = Path(__file__).resolve().parents[3]
CLIENT = ROOT / "clients" / "python" / "src"
VERIFIED = ["audit", "verify", "tests/vectors/audit/export.txt", "--key", "tests/vectors/audit/export_public_key.pem"]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUSTODY_", "LC_", "LANG"))}
    return {**kept, "PYTHONPATH": f"{ROOT}{os.pathsep}{CLIENT}", **more}


def process(*arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["stat"], "No such command 'stat'"),
        (["key", "li"], "No such command 'li'"),
        (["--nonsense", "status"], "No such option '--nonsense'"),
        (["--form", "json", "status"], "No such option '--form'"),
        (["consent", "list", "--own", "x"], "No such option '--own'"),
        (["--format", "xml", "status"], "'xml' is not one of"),
        (["--timeout", "0", "status"], "0.0 is not in the range"),
        (["--timeout", "soon", "status"], "'soon' is not a valid float"),
    ],
)
def test_bi_e1_unknown_commands_flags_and_abbreviations(arguments: list[str], told: str) -> None:
    """Refused with exit status 2, naming what is unknown. So is an abbreviation: a new option would change its meaning."""
    ran = run(*arguments, session=session_of(FakeCustody()))

    assert ran.code == ExitCode.USAGE
    assert ran.out == ""
    assert told in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "json", "--format", "yaml", "status"],
        ["status", "--format", "json", "--format", "yaml"],
        ["--format", "json", "status", "--format", "yaml"],
        ["consent", "list", "--owner", "a", "--owner", "b"],
        ["--yes", "consent", "revoke", "c", "--yes"],
    ],
)
def test_bi_e2_a_flag_twice(arguments: list[str]) -> None:
    """Refused wherever the two stand: neither of two answers is silently taken."""
    ran = run(*arguments, session=session_of(FakeCustody()))

    assert ran.code == ExitCode.USAGE
    assert "was given more than once" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [["--address=", "status"], ["status", "--address="], ["consent", "list", "--owner", ""], ["key", "show", ""]],
)
def test_bi_e3_an_empty_value(arguments: list[str]) -> None:
    """Refused: an empty variable of a script must not mean "all"."""
    ran = run(*arguments, session=session_of(FakeCustody()))

    assert ran.code == ExitCode.USAGE
    assert "must not be empty" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pin=hunter22", "status"],
        ["--pin", "hunter22", "status"],
        ["hsm", "test", "--pin=hunter22"],
        ["hsm", "test", "hunter22"],
        ["status", "hunter22", "and more"],
    ],
)
def test_bi_e4_a_pin_on_the_command_line(arguments: list[str]) -> None:
    """There is no option that takes one, and the refusal does not repeat it into logs."""
    ran = run(*arguments, session=session_of(FakeCustody()))

    assert ran.code == ExitCode.USAGE
    assert "hunter22" not in ran.out + ran.err


@pytest.mark.parametrize("name", ["CUSTODY_PIN", "CUSTODY_HSM_PIN", "CUSTODY_TOKEN", "CUSTODY_API_SECRET"])
def test_bi_e4_a_pin_in_the_environment(name: str) -> None:
    """Refused by name: every process of the user could read it."""
    ran = run("version", environment={name: "hunter22"})

    assert ran.code == ExitCode.USAGE
    assert name in ran.err
    assert "hunter22" not in ran.out + ran.err


def options_of(group: CommandGroup, path: str = "") -> Iterator[str]:
    import click

    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        if isinstance(command, CommandGroup):
            yield from options_of(command, f"{path}{name} ")
        yield from (f"{path}{name} {option}" for each in command.params for option in each.opts)


def test_no_option_takes_a_secret() -> None:
    """Of the whole tree, every command of which is there."""
    options = list(options_of(custodyctl))

    assert len(options) > 100
    assert not [
        option for option in options if re.search(r"pin|token|secret|password|passphrase", option.rpartition(" ")[2])
    ]


def commands_of(group: CommandGroup, path: str = "") -> Iterator[str]:
    import click

    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, CommandGroup):
            yield from commands_of(command, f"{path}{name} ")
        else:
            yield f"{path}{name}"


def test_the_page_names_every_command() -> None:
    """docs/custodyctl.md, in its table of commands."""
    page = (ROOT / "docs" / "custodyctl.md").read_text()
    commands = list(commands_of(custodyctl))

    assert len(commands) > 15
    assert [each for each in commands if f"`{each}" not in page] == []


def test_a_session_without_an_address_says_how_to_give_one() -> None:
    """Exit status 2 with an example."""
    ran = run("status")

    assert ran.code == ExitCode.USAGE
    assert "--address unix:/" in ran.err


@pytest.mark.parametrize("address", ["host", "unix:relative", "host:1234"])
def test_an_address_that_is_none(address: str) -> None:
    """Exit status 2: neither a socket nor host and port, or a port without TLS."""
    assert run("--address", address, "status").code == ExitCode.USAGE


def test_half_of_the_tls_files() -> None:
    """Exit status 2: all three or none."""
    ran = run("--address", "localhost:1", "--tls-ca", "/x", "status")

    assert ran.code == ExitCode.USAGE
    assert "--tls-key" in ran.err


def test_nobody_at_the_address(tmp_path: Path) -> None:
    """Exit status 5, soon, with what to look at."""
    ran = run("--address", f"unix:{tmp_path}/nobody.sock", "--timeout", "3", "status")

    assert ran.code == ExitCode.UNREACHABLE
    assert "does not answer" in ran.err
    assert "doctor" in ran.err


# --- options --------------------------------------------------------------------------------------------------------------


def test_global_options_stand_before_or_behind_the_command() -> None:
    """Both say the same."""
    session = session_of(ToldSidecar(status_now=good_status()))
    before = run("--format", "json", "status", session=session)
    behind = run("status", "--format", "json", session=session_of(ToldSidecar(status_now=good_status())))

    assert before.document() == behind.document()


def test_the_environment_gives_what_flags_do_not() -> None:
    """CUSTODY_FORMAT is a default; a flag wins over it."""
    fake = FakeCustody()
    by_environment = run("status", session=session_of(fake), environment={"CUSTODY_FORMAT": "json"})
    by_flag = run("status", "--format", "table", session=session_of(fake), environment={"CUSTODY_FORMAT": "json"})

    assert by_environment.out.startswith("{")
    assert by_flag.out.startswith("status")


def test_version() -> None:
    """For people and for scripts."""
    assert __version__ in run("version").out
    assert_golden("version.json", run("--format", "json", "version").out.replace(__version__, "X.Y.Z"))


# --- what is loaded -------------------------------------------------------------------------------------------------------

PROBE = """
import sys
from sidecar.cli.main import main
code = main(sys.argv[1:])
heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"grpc", "custody", "rich", "pkcs11", "yaml", "cryptography",
    "google", "sqlalchemy", "msgspec", "jsonschema"})
print(heavy, file=sys.stderr)
raise SystemExit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [
        (["--help"], []),
        (["consent", "--help"], []),
        (["consent", "revoke", "--help"], []),
        (["doctor", "--help"], []),
        (["version"], []),
        (["completion", "zsh"], []),
        (VERIFIED, ["cryptography"]),
    ],
)
def test_what_is_not_needed_is_not_loaded(arguments: list[str], loaded: list[str]) -> None:
    """Help is instant: no gRPC, no client, no rich. The verifier needs cryptography alone."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == str(loaded)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    """Of the shell asked for."""
    ran = run("completion", shell)

    assert ran.code == 0
    assert "_CUSTODYCTL_COMPLETE" in ran.out


def test_completion_completes() -> None:
    """What the script asks for is answered, at the root and below."""
    done = process(_CUSTODYCTL_COMPLETE="bash_complete", COMP_WORDS="custodyctl key s", COMP_CWORD="2")

    assert done.stdout.split() == ["plain,show"]


# --- streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "code"), [(VERIFIED, 0), ([*VERIFIED[:-1], "pyproject.toml"], 4)])
def test_bi_e28_output_to_a_closed_pipe(arguments: list[str], code: int) -> None:
    """No word of complaint, and the verdict's exit status is not lost."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=closed,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )

    assert done.stderr == b""
    assert done.returncode == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_bi_e12_output_to_a_full_disk() -> None:
    """Exit status 1: what was not written was not done."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, *VERIFIED],
            cwd=ROOT,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )

    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_bi_e28_signals_end_it_cleanly(number: int, code: int, tmp_path: Path) -> None:
    """While it waits for a sidecar that is silent: the shell's exit status, no traceback, and no partial file."""
    import socket

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        running = subprocess.Popen(
            [
                *COMMAND,
                "--address",
                f"unix:{tmp_path}/silent.sock",
                "audit",
                "export",
                "--output",
                str(tmp_path / "export"),
            ],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            wait_for(lambda: (tmp_path / "export").exists())
            silent.settimeout(30)
            silent.accept()  # now it waits for an answer
            running.send_signal(number)
            _, err = running.communicate(timeout=30)
        finally:
            running.kill()
            running.wait()

    assert running.returncode == code, err
    assert b"Traceback" not in err
    assert not (tmp_path / "export").exists()


DEAF = """
import sys, time
from sidecar.cli import shell
from sidecar.cli.main import main

class Deaf:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)  # an exception in a finaliser is printed and lost

def version(session):
    Deaf()
    time.sleep(60)

shell.version.callback = lambda: version(None)
raise SystemExit(main(["version"]))
"""


def test_a_signal_that_foreign_code_swallows_comes_again() -> None:
    """An exception is lost inside a finaliser; the run ends all the same, without a second signal."""
    deaf = subprocess.Popen(
        [sys.executable, "-c", DEAF], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert deaf.stdout is not None
        assert deaf.stdout.readline() == b"ready\n"
        deaf.send_signal(signal.SIGTERM)
        deaf.communicate(timeout=30)
    finally:
        deaf.kill()
        deaf.wait()

    assert deaf.returncode == 143


def wait_for(condition: "object", seconds: float = 30.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_bi_e29_no_locale_no_home_no_utf8(locale: str) -> None:
    """It runs without HOME in the C locale, and arguments that are no UTF-8 are shown escaped."""
    bare = {name: value for name, value in environment(LC_ALL=locale, PYTHONUTF8="0").items() if name != "HOME"}
    done = subprocess.run(
        [*COMMAND, "audit", "verify", b"\xff\xfe.txt", "--key", "k\u00e4se"],
        cwd=ROOT,
        env=bare,
        capture_output=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert b"cannot be read" in done.stderr
    assert b"Traceback" not in done.stderr


@contextmanager
def terminal(columns: int) -> Iterator[tuple[io.TextIOWrapper, int]]:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    stream = os.fdopen(follower, "w", encoding="utf-8")
    try:
        yield stream, leader
    finally:
        stream.close()
        os.close(leader)


def drawn(table: Table, *, columns: int, colour: bool = True) -> str:
    with terminal(columns) as (stream, leader):
        with redirect_stdout(stream), pytest.MonkeyPatch.context() as patch:
            patch.setenv("TERM", "xterm-256color")
            patch.setenv("COLUMNS", str(columns))
            patch.delenv("NO_COLOR", raising=False)
            Output(colour=colour).show({}, [table])
        return os.read(leader, 65536).decode()


TABLE = Table(columns=("name", "state"), rows=[("consents/0123456789abcdef0123", Marked("ACTIVE", "good"))])


def test_bi_e28_a_terminal_of_20_columns() -> None:
    """Lines are broken, and no character is lost."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", drawn(TABLE, columns=20))
    written = "".join(("NAME", "STATE", *(str(getattr(cell, "text", cell)) for cell in TABLE.rows[0])))

    assert all(len(line.rstrip()) <= 20 for line in text.splitlines())
    assert sorted(re.sub(r"\s", "", text)) == sorted(written)


@pytest.mark.parametrize(("colour", "escapes"), [(True, True), (False, False)])
def test_colours_only_where_they_are_wanted(colour: bool, escapes: bool) -> None:
    """On a terminal, unless --no-color or NO_COLOR."""
    assert ("\x1b[32m" in drawn(TABLE, columns=80, colour=colour)) is escapes


def test_no_color_in_the_environment_is_obeyed() -> None:
    """no-color.org: set to anything but nothing."""
    session = session_of(FakeCustody())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        without = session.output.colour
        patch.setenv("NO_COLOR", "")
        empty = session.output.colour

    assert without is False
    assert empty is True


def test_text_from_outside_cannot_steer_the_terminal() -> None:
    """Controls of both kinds, and marks that turn text around, are shown as what they are; in JSON, too."""
    hostile = "ok\x1b]0;owned\x07\x9b31m\u202eDETTES\r\n"
    table = clean(hostile)

    assert table == "ok\\x1b]0;owned\\x07\\x9b31m\\u202eDETTES\\r\\n"
    assert clean("Jörg Müller-Łukasz €") == "Jörg Müller-Łukasz €"


def test_a_hostile_payment_is_shown_harmlessly() -> None:
    """What a bank or an application wrote reaches the administrator's screen without its controls, in every format."""
    fake, _ = sandbox()
    payment = next(iter(fake._payments.values()))
    payment.status_reason = "\x1b[2J\x1b]52;c;cm0gLXJmIC8=\x07\u202e"
    outputs = [
        run("--format", form, "payment", "show", payment.name, session=session_of(fake)).out
        for form in ("table", "json", "yaml")
    ]

    for output in outputs:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", output)


def test_without_a_terminal_a_table_is_never_cut_off() -> None:
    """A script that reads columns gets whole names, however long."""
    long = "x" * 500
    with redirect_stdout(io.StringIO()) as out:
        Output().show({}, [Table(columns=("name",), rows=[(long,)])])

    assert long in out.getvalue().splitlines()


@pytest.mark.parametrize(
    ("distance", "words"),
    [
        (timedelta(days=3, hours=5), "in 3 d"),
        (timedelta(hours=-2, minutes=-59), "2 h ago"),
        (timedelta(minutes=90), "in 1 h"),
        (timedelta(minutes=-5), "5 min ago"),
        (timedelta(seconds=59), "in 59 s"),
        (timedelta(milliseconds=-400), "now"),
    ],
)
def test_how_far_away_a_time_is(distance: timedelta, words: str) -> None:
    """The largest unit that fits, never rounded up."""
    assert relative(distance) == words
