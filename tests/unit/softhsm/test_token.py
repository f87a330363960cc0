"""Tokens of the development HSM, made on the real SoftHSM."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from softhsm.setup import TokenConfiguration, TokenRefusedError, create_token, ensure_token, main, open_token

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]

# Opens the token by label and serial, logs in with the PIN file and makes a key: what the sidecar will do. In a process of its own,
# because the module must not be loaded into the test process.
_USE = """
import pathlib, sys, pkcs11
module, label, serial, pin_file = sys.argv[1:]
(token,) = [t for t in pkcs11.lib(module).get_tokens() if t.label == label and t.serial == serial.encode()]
with token.open(rw=True, user_pin=pathlib.Path(pin_file).read_text()) as session:
    session.generate_key(pkcs11.KeyType.AES, 256, store=True, label="probe")
    print(len(list(session.get_objects({pkcs11.Attribute.LABEL: "probe"}))))
"""


def _use(token: TokenConfiguration, *, pin_file: Path | None = None) -> subprocess.CompletedProcess[str]:
    arguments = [str(token.module_path), token.token_label, token.serial, str(pin_file or token.pin_file)]
    return subprocess.run(
        [sys.executable, "-c", _USE, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **token.environment()},
        timeout=60,
        check=False,
    )


def test_a_new_token_takes_its_pin_and_holds_keys(tmp_path: Path) -> None:
    """A token is found by label and serial, opens with the PIN in its file, and keeps a key."""
    token = create_token(tmp_path / "hsm", label="custody")

    used = _use(token)

    assert used.returncode == 0, used.stderr
    assert used.stdout.strip() == "1"
    assert token.token_label == "custody"


def test_the_security_officers_pin_is_not_the_users(tmp_path: Path) -> None:
    """The two PINs differ, and the token refuses the security officer's PIN for the user."""
    token = create_token(tmp_path / "hsm", label="custody")

    used = _use(token, pin_file=token.so_pin_file)

    assert token.pin_file.read_text() != token.so_pin_file.read_text()
    assert used.returncode != 0
    assert "PinIncorrect" in used.stderr


def test_given_pins_are_the_tokens_pins(tmp_path: Path) -> None:
    """A caller may choose the PINs; the files hold exactly these, without a line end."""
    token = create_token(tmp_path / "hsm", label="custody", so_pin="12345678", pin="4321")

    assert token.pin_file.read_bytes() == b"4321"
    assert token.so_pin_file.read_bytes() == b"12345678"
    assert _use(token).returncode == 0


def test_random_pins_never_repeat(tmp_path: Path) -> None:
    """Two tokens share no PIN, and a random PIN has at least 128 bits."""
    tokens = [create_token(tmp_path / name, label="custody") for name in ("one", "two")]

    pins = [path.read_text() for token in tokens for path in (token.pin_file, token.so_pin_file)]

    assert len(set(pins)) == 4
    assert all(len(pin) >= 22 for pin in pins)  # 22 characters of base64 hold 132 bits


def test_only_the_owner_can_read_what_a_token_is_made_of(tmp_path: Path) -> None:
    """Whatever the umask, PINs and configuration are 0600 and the directories 0700."""
    before = os.umask(0)
    try:
        token = create_token(tmp_path / "hsm", label="custody")
    finally:
        os.umask(before)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in token.directory.iterdir()}

    assert modes == {"pin": 0o600, "so-pin": 0o600, "softhsm2.conf": 0o600, "token.json": 0o600, "tokens": 0o700}
    assert stat.S_IMODE(token.directory.stat().st_mode) == 0o700


def test_an_open_directory_is_closed_to_others(tmp_path: Path) -> None:
    """An empty directory that others may look into is closed before PINs are put there."""
    (tmp_path / "hsm").mkdir(mode=0o755)

    token = create_token(tmp_path / "hsm", label="custody")

    assert stat.S_IMODE(token.directory.stat().st_mode) == 0o700


def _initialise(token: TokenConfiguration, label: str) -> subprocess.CompletedProcess[str]:
    """Runs the process that makes tokens against the place of an existing one."""
    order = {"module": str(token.module_path), "label": label, "so_pin": "12345678", "pin": "87654321"}
    return subprocess.run(
        [sys.executable, "-I", str(ROOT / "softhsm/initialise.py")],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env={**os.environ, **token.environment()},
        timeout=60,
        check=False,
    )


def test_a_token_that_is_there_is_never_initialised_again(tmp_path: Path) -> None:
    """Initialising destroys a token's keys, so only a slot without a token is taken: the first token keeps its key."""
    first = create_token(tmp_path / "hsm", label="custody")
    assert _use(first).stdout.strip() == "1"

    done = _initialise(first, "second")

    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["serial"] != first.serial
    assert _use(first).stdout.strip() == "2"


def test_two_tokens_with_one_label_are_refused(tmp_path: Path) -> None:
    """Where the label does not tell which token was made, no serial is guessed."""
    first = create_token(tmp_path / "hsm", label="custody")

    done = _initialise(first, "custody")

    assert done.returncode == 1
    assert json.loads(done.stdout) == {"error": "after initialisation 2 tokens have the label"}


def test_the_configuration_names_absolute_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token made under a relative path works from any working directory."""
    monkeypatch.chdir(tmp_path)

    token = create_token(Path("hsm"), label="custody")

    assert f"directories.tokendir = {tmp_path}/hsm/tokens\n" in token.softhsm2_conf.read_text()
    assert _use(token).returncode == 0


def test_pins_travel_only_over_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that makes the token gets the PINs neither as arguments nor in its environment, where others could read them."""
    seen: list[tuple[list[str], dict[str, str]]] = []
    run = subprocess.run

    def watching(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        seen.append((command, dict(options.get("env") or os.environ)))  # type: ignore[call-overload]
        return run(command, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(subprocess, "run", watching)
    create_token(tmp_path / "hsm", label="custody", so_pin="canary-officer", pin="canary-user")

    assert seen
    assert "canary" not in repr(seen)


def test_the_token_configuration_shows_no_pin(tmp_path: Path) -> None:
    """Neither the value's repr nor the file that describes the token holds a PIN."""
    token = create_token(tmp_path / "hsm", label="custody", so_pin="canary-officer", pin="canary-user")

    assert "canary" not in repr(token)
    assert "canary" not in (token.directory / "token.json").read_text()
    assert "canary" not in token.softhsm2_conf.read_text()


def test_ensuring_twice_keeps_the_token_and_its_keys(tmp_path: Path) -> None:
    """The second call returns the first one's token: same serial, same PIN, the key still there."""
    first = ensure_token(tmp_path / "hsm", label="custody")
    pin = first.pin_file.read_text()
    assert _use(first).stdout.strip() == "1"

    second = ensure_token(tmp_path / "hsm", label="custody")

    assert second == first
    assert second.pin_file.read_text() == pin
    assert _use(second).stdout.strip() == "2"


def test_creating_twice_is_refused(tmp_path: Path) -> None:
    """A token is made once: the second making is refused and harms nothing."""
    token = create_token(tmp_path / "hsm", label="custody")

    with pytest.raises(TokenRefusedError, match="not empty"):
        create_token(tmp_path / "hsm", label="custody")

    assert open_token(tmp_path / "hsm") == token
    assert _use(token).returncode == 0


def test_another_label_is_refused(tmp_path: Path) -> None:
    """A directory that holds one token is not silently taken for another."""
    ensure_token(tmp_path / "hsm", label="custody")

    with pytest.raises(TokenRefusedError, match="holds the token 'custody', not 'other'"):
        ensure_token(tmp_path / "hsm", label="other")


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    """A directory with something else in it is refused by both calls, and nothing in it changes."""
    (tmp_path / "letter.txt").write_text("dear diary")

    for make in (create_token, ensure_token):
        with pytest.raises(TokenRefusedError):
            make(tmp_path, label="custody")

    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_token_whose_making_was_interrupted_is_not_used(tmp_path: Path) -> None:
    """Without the file that is written last, the token counts as half-made."""
    token = create_token(tmp_path / "hsm", label="custody")
    (token.directory / "token.json").unlink()

    with pytest.raises(TokenRefusedError, match="interrupted"):
        ensure_token(tmp_path / "hsm", label="custody")


@pytest.mark.parametrize(
    ("directory", "reason"),
    [
        pytest.param("/var/lib/softhsm/tokens/mine", "belongs to the system", id="the system's tokens"),
        pytest.param("/etc/softhsm", "belongs to the system", id="the system's configuration"),
        pytest.param("{tmp}/with#hash", "cannot express", id="a comment sign"),
        pytest.param("{tmp}/two\nlines", "cannot express", id="a line end"),
        pytest.param("{tmp}/file", "Not a directory|File exists", id="a file"),
        pytest.param("{tmp}/file/below", "Not a directory", id="below a file"),
    ],
)
def test_a_wrong_directory_is_refused(tmp_path: Path, directory: str, reason: str) -> None:
    """A directory that will not do is refused with the reason, before anything is written."""
    (tmp_path / "file").write_text("")

    with pytest.raises(TokenRefusedError, match=reason):
        create_token(Path(directory.replace("{tmp}", str(tmp_path))), label="custody")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("make", [create_token, ensure_token])
def test_a_directory_that_the_system_refuses_is_refused_with_its_reason(
    tmp_path: Path, make: Callable[..., object]
) -> None:
    """What the operating system will not have (no permission, too long a name) is our error with its reason, not a traceback."""
    with pytest.raises(TokenRefusedError, match="cannot be used for a token: File name too long"):
        make(tmp_path / ("x" * 300), label="custody")


def test_opening_where_there_is_nothing_says_so(tmp_path: Path) -> None:
    """An absent token is told apart from a damaged one."""
    with pytest.raises(TokenRefusedError, match="There is no token in"):
        open_token(tmp_path / "none")


@pytest.mark.parametrize("label", ["", "x" * 33, "é" * 17, " custody", "two\nlines"])
def test_a_wrong_label_is_refused(tmp_path: Path, label: str) -> None:
    """PKCS#11 pads labels with spaces to 32 bytes: what would not come back the same is refused."""
    with pytest.raises(TokenRefusedError, match="label"):
        create_token(tmp_path / "hsm", label=label)

    assert not (tmp_path / "hsm").exists()


@pytest.mark.parametrize("pin", ["", "123", "x" * 256, "1234\n"])
def test_a_wrong_pin_is_refused_without_being_shown(tmp_path: Path, pin: str) -> None:
    """A PIN that the token could not take is refused before anything is made."""
    with pytest.raises(TokenRefusedError, match=r"^A PIN is 4 to 255 printable characters\.$"):
        create_token(tmp_path / "hsm", label="custody", pin=pin)

    assert not (tmp_path / "hsm").exists()


def test_a_refusing_module_leaves_an_empty_directory(tmp_path: Path) -> None:
    """What was made before the module refused goes again, so that the next attempt starts clean; the message shows no PIN."""
    with pytest.raises(TokenRefusedError, match="made no token") as refused:
        create_token(tmp_path / "hsm", label="custody", pin="canary-user", module_path=Path("/nonexistent/libhsm.so"))

    assert list((tmp_path / "hsm").iterdir()) == []
    assert "canary" not in str(refused.value)


def test_a_hanging_module_is_given_up_without_showing_the_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for the module is bounded, and neither the error nor its causes hold the input that was sent."""

    def hang(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 60, output=str(options["input"]))

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(TokenRefusedError, match="did not make a token") as refused:
        create_token(tmp_path / "hsm", label="custody", pin="canary-user", module_path=Path("/usr/lib/libhsm.so"))

    assert refused.value.__suppress_context__
    assert "canary" not in str(refused.value)


def test_a_pin_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """A token whose PIN file was opened to others is not used until that is corrected."""
    token = create_token(tmp_path / "hsm", label="custody")
    token.pin_file.chmod(0o640)

    with pytest.raises(TokenRefusedError, match="chmod 600"):
        open_token(token.directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"label": "custody", "serial": 7, "module": "m"}'])
def test_a_damaged_description_is_refused(tmp_path: Path, text: str) -> None:
    """A description that cannot be read is an error, never a guess."""
    token = create_token(tmp_path / "hsm", label="custody")
    (token.directory / "token.json").write_text(text)

    with pytest.raises(TokenRefusedError, match=r"token\.json"):
        open_token(token.directory)


def test_the_command_makes_a_token_and_shows_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m softhsm.setup --token` prints the places, not the PINs, and does so again the second time."""
    assert main(["--token", str(tmp_path / "hsm"), "--label", "custody"]) == 0
    first = capsys.readouterr().out
    assert main(["--token", str(tmp_path / "hsm"), "--label", "custody"]) == 0
    second = capsys.readouterr().out

    serial = json.loads((tmp_path / "hsm" / "token.json").read_text())["serial"]
    assert first == second
    assert f"serial         {serial}" in first
    assert (tmp_path / "hsm" / "pin").read_text() not in first


def test_the_command_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal is one line on standard error and status 1."""
    (tmp_path / "letter.txt").write_text("")

    assert main(["--token", str(tmp_path)]) == 1

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Move it away" in captured.err
