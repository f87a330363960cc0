"""Set-up of a working copy: does what is missing, leaves what is there, and says plainly what it could not do."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tools.setup.__main__ import Step, carry_out, main
from tools.setup.commands import Commands, SetupError
from tools.setup.environment import Environment, clean_environ, uv_settings
from tools.setup.progress import Progress
from tools.setup.tracer import Tracer

ROOT = Path(__file__).resolve().parents[2]
START = ROOT / "tools/setup/start.sh"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Installer(Commands):
    """Commands that are noted instead of run; one of them may fail."""

    ran: list[list[str]]
    failing: str

    def __init__(self, directory: Path, *, failing: str = "") -> None:
        super().__init__(directory=directory, log=directory / "log")
        object.__setattr__(self, "ran", [])
        object.__setattr__(self, "failing", failing)

    def run(self, command: object, *, environ: object, advice: str) -> str:
        words = list(command)  # type: ignore[call-overload]
        self.ran.append(words)
        if self.failing and any(word.endswith(self.failing) for word in words):
            raise SetupError(advice)
        return ""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A working copy as far as the set-up is concerned, with an environment that was made but not filled."""
    (tmp_path / "requirements-dev.lock").write_text("a==1 --hash=sha256:0\n")
    (tmp_path / "requirements-setup.lock").write_text("uv==1 --hash=sha256:0\n")
    (tmp_path / "pyproject.toml").write_text('[project]\nscripts = { greet = "greeting.words:main" }\n')
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "lib" / f"python{version}" / "site-packages").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}.9\n")
    return tmp_path


def _environment(copy: Path, *, failing: str = "") -> Environment:
    return Environment(root=copy, commands=Installer(copy, failing=failing), environ={"HOME": "/nowhere"})


def _ran(environment: Environment) -> list[list[str]]:
    assert isinstance(environment.commands, Installer)
    return environment.commands.ran


def test_only_what_is_needed_is_done() -> None:
    """Each step is asked when its turn comes, and a step that is not needed is neither done nor shown."""
    done: list[str] = []
    out = io.StringIO()
    steps = [
        Step(title="There", needed=lambda: False, do=lambda: done.append("there")),
        Step(title="First", needed=lambda: True, do=lambda: done.append("first")),
        Step(title="Second", needed=lambda: "first" in done, do=lambda: done.append("second")),
    ]

    carry_out(steps, Progress(out))

    assert done == ["first", "second"]
    assert "There" not in out.getvalue()


def test_a_failed_step_ends_the_set_up() -> None:
    """What comes after a failed step is not tried, and the step is shown as failed."""
    done: list[str] = []
    out = io.StringIO()

    def fail() -> None:
        raise SetupError("no network")

    steps = [
        Step(title="First", needed=lambda: True, do=fail),
        Step(title="Second", needed=lambda: True, do=lambda: done.append("second")),
    ]
    with pytest.raises(SetupError, match="no network"):
        carry_out(steps, Progress(out))

    assert done == []
    assert re.search(r"(✗|failed) First  \d", out.getvalue())


def test_a_working_copy_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the operating system refuses is said with the file's name, not with a traceback."""
    (tmp_path / ".cache").write_text("a file where a folder belongs")

    assert main(tmp_path) == 1

    assert capsys.readouterr().err.startswith(
        f"set-up: {tmp_path / '.cache'}: File exists. Does the working copy belong to you"
    )


def test_an_interruption_is_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends the set-up with one line and the status that shells expect."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.setup.__main__.carry_out", interrupt)

    assert main(tmp_path) == 130
    assert capsys.readouterr().err == "set-up: interrupted; the next one goes on from here.\n"


def test_two_set_ups_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While one set-up runs, another says that it waits, and goes on when the first has ended."""
    inside = threading.Event()
    leave = threading.Event()
    order: list[str] = []

    def hold(*_: object) -> None:
        order.append("in")
        inside.set()
        leave.wait(60)
        order.append("out")

    monkeypatch.setattr("tools.setup.__main__.carry_out", hold)
    first = threading.Thread(target=main, args=(tmp_path,))
    second = threading.Thread(target=main, args=(tmp_path,))
    first.start()
    assert inside.wait(60)
    second.start()
    output = ""
    deadline = time.monotonic() + 60
    while "waiting for it" not in output and time.monotonic() < deadline:
        output += capsys.readouterr().out
        time.sleep(0.01)
    leave.set()
    first.join(60)
    second.join(60)

    assert "Another set-up of this working copy is running; waiting for it." in output
    assert order == ["in", "out", "in", "out"]


def test_plain_output_has_no_control_characters() -> None:
    """In a log each step is a line at its start and a line with its seconds at its end."""
    out = io.StringIO()

    with Progress(out).step("Packages"):
        pass

    assert re.fullmatch(r"  (…|\.\.) Packages\n  (✓|ok) Packages  \d+\.\d s\n", out.getvalue())


def test_a_terminal_shows_that_the_step_is_alive() -> None:
    """On a terminal the running step is redrawn in place, and its end replaces it."""
    terminal = Terminal()
    before = threading.active_count()

    with Progress(terminal).step("Packages"):
        pass

    *running, end = terminal.getvalue().split("\r\x1b[2K")
    assert end.startswith("  ✓ Packages  ")
    assert end.endswith(" s\n")
    assert running
    assert threading.active_count() == before


def test_a_terminal_without_unicode_gets_plain_marks() -> None:
    """A terminal that cannot show a tick gets a word instead of an encoding error."""
    raw = io.BytesIO()
    ascii_stream = io.TextIOWrapper(raw, encoding="ascii")

    with Progress(ascii_stream).step("Packages"):
        pass

    assert b"  ok Packages  " in raw.getvalue()


def test_a_failing_command_shows_its_last_words(tmp_path: Path) -> None:
    """The error holds the advice and the end of the output; the log holds all of it."""
    commands = Commands(directory=tmp_path, log=tmp_path / "cache" / "log")
    script = "for i in range(40): print('line', i)\nraise SystemExit(3)"

    with pytest.raises(SetupError) as failed:
        commands.run([sys.executable, "-c", script], environ=os.environ, advice="Do this instead.")

    assert str(failed.value).startswith("Do this instead.\n")
    assert "line 39" in str(failed.value)
    assert "line 1\n" not in str(failed.value)
    assert "line 1\n" in (tmp_path / "cache" / "log").read_text()


def test_a_missing_command_is_said_to_be_missing(tmp_path: Path) -> None:
    """A program that is not installed is an answer, not a traceback."""
    commands = Commands(directory=tmp_path, log=tmp_path / "log")

    with pytest.raises(SetupError, match=r"no-such-program is not there\. Install it\."):
        commands.run(["no-such-program"], environ=os.environ, advice="Install it.")


def test_an_environment_that_fits_is_kept(copy: Path) -> None:
    """The environment of this Python, in this place, is not made again."""
    assert not _environment(copy).needs_making()


def test_an_environment_that_does_not_fit_is_made_again(copy: Path) -> None:
    """No Python in it, another version, or another place: it has to be made again."""
    environment = _environment(copy)
    (copy / ".venv" / "set-up.json").write_text('{"root": "/elsewhere", "locks": "x"}')
    assert environment.needs_making()

    (copy / ".venv" / "set-up.json").unlink()
    (copy / ".venv" / "pyvenv.cfg").write_text("version = 3.9.2\n")
    assert environment.needs_making()

    (copy / ".venv" / "pyvenv.cfg").write_text(f"version = {sys.version_info.major}.{sys.version_info.minor}.0\n")
    assert not environment.needs_making()

    (copy / ".venv" / "lib").rename(copy / "lost")
    assert environment.needs_making()

    (copy / "lost").rename(copy / ".venv" / "lib")
    (copy / ".venv" / "bin" / "python").unlink()
    assert environment.needs_making()


def test_packages_are_installed_once_and_again_when_the_lock_changes(copy: Path) -> None:
    """What was installed is remembered by the locks' digest."""
    environment = _environment(copy)
    assert environment.needs_packages()

    environment.install_packages()
    assert not environment.needs_packages()

    (copy / "requirements-dev.lock").write_text("a==2 --hash=sha256:1\n")
    assert environment.needs_packages()


def test_nothing_is_installed_without_its_hash(copy: Path) -> None:
    """Every installing command demands hashes and takes only what the lock names, the installer's own included."""
    environment = _environment(copy)

    environment.install_packages()

    installing = [command for command in _ran(environment) if "install" in command]
    assert [command[-1] for command in installing] == ["requirements-setup.lock", "requirements-dev.lock"]
    assert all({"--require-hashes", "--no-deps", "-r"} <= set(command) for command in installing)


@pytest.mark.parametrize("failing", ["bin/uv", "requirements-setup.lock"])
def test_pip_alone_is_enough(copy: Path, failing: str) -> None:
    """Where uv cannot be had or does not run, pip installs the same lock under the same conditions."""
    environment = _environment(copy, failing=failing)

    environment.install_packages()

    last = _ran(environment)[-1]
    assert last[:3] == [str(copy / ".venv/bin/python"), "-m", "pip"]
    assert last[-1] == "requirements-dev.lock"
    assert "--require-hashes" in last
    assert not environment.needs_packages()


def test_a_failed_installation_is_not_remembered_as_done(copy: Path) -> None:
    """If nothing can install the lock, the next set-up tries again."""
    environment = _environment(copy, failing="requirements-dev.lock")

    with pytest.raises(SetupError, match="could not be installed"):
        environment.install_packages()

    assert environment.needs_packages()


def test_a_half_written_note_means_doing_it_again(copy: Path) -> None:
    """A set-up that was killed while it noted its end leaves no trap."""
    (copy / ".venv" / "set-up.json").write_text('{"root": ')

    assert _environment(copy).needs_packages()


def test_the_project_is_on_the_path_and_its_commands_run(copy: Path) -> None:
    """Each entry point becomes a command that calls it with the environment's Python, even in a folder with a space in its name."""
    spaced = copy.rename(copy.with_name("with space"))
    environment = _environment(spaced)
    assert environment.needs_project()

    environment.install_project()

    assert not environment.needs_project()
    (pth,) = (spaced / ".venv").rglob("*.pth")
    assert pth.read_text().splitlines() == [str(spaced), str(spaced / "clients/python/src")]
    (spaced / ".venv/bin/greeting").mkdir()
    (spaced / ".venv/bin/greeting/words.py").write_text(
        "import sys\ndef main():\n    print('hello', *sys.argv[1:])\n    return 7\n"
    )
    done = subprocess.run(
        [str(spaced / ".venv/bin/greet"), "a b"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (7, "hello a b\n")


def test_a_damaged_command_is_repaired(copy: Path) -> None:
    """A command that somebody changed is written again."""
    environment = _environment(copy)
    environment.install_project()
    (copy / ".venv/bin/greet").write_text("#!/bin/false\n")

    assert environment.needs_project()


def test_uv_uses_the_machines_settings_for_pip() -> None:
    """Mirror, certificate and proxy come from pip's configuration; the environment wins; what uv does not need is left out."""
    listing = (
        "global.index-url='https://mirror.example/simple'\n"
        "global.cert='/etc/ours.pem'\n"
        "global.extra-index-url='\\nhttps://a.example/simple\\nhttps://b.example/simple'\n"
        "global.timeout='60'\n"
        ":env:.cert='/etc/theirs.pem'\n"
    )

    assert uv_settings(listing) == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "SSL_CERT_FILE": "/etc/theirs.pem",
    }


def test_other_environments_do_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """An activated environment or a PYTHONPATH of the caller does not reach the new environment's Python."""
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "/elsewhere")

    assert clean_environ().keys() & {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"} == set()
    assert clean_environ()["PATH"] == os.environ["PATH"]


def _start(directory: Path, python: str, *, system: str = "exit 1") -> subprocess.CompletedProcess[str]:
    """Runs a copy of start.sh where `$PYTHON` and every other program are what the test says."""
    (directory / "tools/setup").mkdir(parents=True)
    start = directory / "tools/setup/start.sh"
    start.write_text(START.read_text())
    for name, script in {"python": python, "apt-get": system, "id": "echo 1000"}.items():
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)
    return subprocess.run(
        ["/bin/sh", str(start)],
        env={"PATH": f"{directory}:/usr/bin:/bin", "PYTHON": str(directory / "python")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_chosen_python_runs_the_set_up(tmp_path: Path) -> None:
    """A Python that will do is handed the set-up, in the project's folder."""
    done = _start(tmp_path, '[ "$1" = -c ] || { pwd; echo "$@"; }')

    assert done.stdout.splitlines() == [str(tmp_path), "-B -m tools.setup"]


def test_the_python_of_the_last_set_up_is_kept(tmp_path: Path) -> None:
    """Whoever set up with a Python of their own gets the same one next time, without naming it again."""
    for name in ("mine", "other"):
        (tmp_path / name).write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo {name}\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "other").rename(tmp_path / "python3")
    (tmp_path / "tools/setup").mkdir(parents=True)
    (tmp_path / "tools/setup/start.sh").write_text(START.read_text())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/pyvenv.cfg").write_text(f"home = {tmp_path}\nversion = 3.13.0\nexecutable = {tmp_path}/mine\n")

    done = subprocess.run(
        ["/bin/sh", str(tmp_path / "tools/setup/start.sh")],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stdout == "mine\n"


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    """Too old is said with what to do about it."""
    done = _start(tmp_path, "exit 3")

    assert done.returncode == 1
    assert done.stderr.startswith("set-up: Python 3.11 or newer is needed.")
    assert done.stderr.count("\n") == 1


def test_a_missing_venv_package_is_one_line_to_type(tmp_path: Path) -> None:
    """Without root nothing is installed: the one line to type is printed, for the version that is there."""
    script = 'case "$2" in *ensurepip*) exit 4;; *) echo python3.11-venv;; esac'

    done = _start(tmp_path, script)

    assert done.returncode == 1
    assert done.stderr == "set-up: one package is missing. Type: sudo apt-get install python3.11-venv\n"


def test_a_python_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A wrong $PYTHON is an error, not a reason to take another one."""
    done = subprocess.run(
        ["/bin/sh", str(START)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr == f"set-up: PYTHON names {tmp_path / 'none'}, which is not there.\n"


def test_a_tracer_is_tried_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """strace is wanted where root and apt are and it is missing; whether it comes or not, the next set-up does not ask again."""
    commands = tmp_path / "bin"
    commands.mkdir()
    asked = tmp_path / "asked"
    (commands / "apt-get").write_text(f'#!/bin/sh\necho "$@" >>"{asked}"\nexit 100\n')
    (commands / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/bin-that-is-not-there")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    tracer = Tracer(note=tmp_path / "cache" / "strace.tried")

    wanted = tracer.is_wanted()
    tracer.install()

    assert wanted
    assert not tracer.is_wanted()
    assert asked.read_text().splitlines() == ["install -y --no-install-recommends strace", "update"]
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert not Tracer(note=tmp_path / "other").is_wanted()
