"""Makes tokens of the development HSM, each in a directory of its own.

Rules this module keeps:

- A token is made, never remade: a directory that holds anything is not touched.
- PINs are random, lie in files of mode 0600, and reach the module over a pipe. They are in no argument list, environment,
  message or repr.
- The system's own token directory is never used: its tokens belong to somebody else.
- Only the token is made here. The keys in it are the provisioning's business (`sidecar.hsm`).

Layout of the directory: `softhsm2.conf`, `tokens/`, `pin`, `so-pin`, and `token.json`, which is written last and so marks
the token as whole.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from softhsm.errors import TokenRefusedError
from softhsm.module import ensure_module

__all__ = ["TokenConfiguration", "create_token", "ensure_token", "open_token"]

_SYSTEM_DIRECTORIES = (Path("/var/lib/softhsm"), Path("/etc/softhsm"), Path("/etc"))
_LABEL_BYTES = 32  # CK_TOKEN_INFO
_PIN_CHARACTERS = range(4, 256)  # what SoftHSM takes
_DEADLINE_SECONDS = 60
_PIN_BYTES = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenConfiguration:
    """How to reach one token. Holds the places of the PINs, never the PINs."""

    directory: Path
    module_path: Path
    softhsm2_conf: Path
    """Must be in `SOFTHSM2_CONF` of the process that loads the module."""
    token_label: str
    serial: str
    """Select by label *and* serial: slot numbers change, labels may repeat."""
    pin_file: Path
    """The user PIN, without a line end; mode 0600."""
    so_pin_file: Path
    """The security officer's PIN, without a line end; mode 0600."""

    def environment(self) -> dict[str, str]:
        """What the process that loads the module needs in its environment."""
        return {"SOFTHSM2_CONF": str(self.softhsm2_conf)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    module_path: Path
    label: str
    so_pin: str = field(repr=False)
    pin: str = field(repr=False)


def create_token(
    directory: Path, *, label: str, so_pin: str | None = None, pin: str | None = None, module_path: Path | None = None
) -> TokenConfiguration:
    """Makes a token in an empty or new directory.

    Args:
        directory: becomes mode 0700; everything about the token lies in it.
        label: 1 to 32 bytes of UTF-8.
        so_pin: 4 to 255 characters; random if not given.
        pin: 4 to 255 characters; random if not given.
        module_path: the PKCS#11 module; the machine's SoftHSM, fetched if need be, if not given.

    Raises:
        TokenRefusedError: the directory, label or a PIN will not do, or the module refused.
        ModuleMissingError: there is no module, and none can be fetched.
    """
    order = _Order(
        module_path=module_path or ensure_module(),
        label=_checked_label(label),
        so_pin=_checked_pin(so_pin),
        pin=_checked_pin(pin),
    )
    home = _empty_directory(directory)
    try:
        return _make(home, order)
    except (
        BaseException
    ):  # also Ctrl-C: what this call made in the empty directory goes again, so that it can be tried again
        _empty(home)
        raise


def open_token(directory: Path) -> TokenConfiguration:
    """The token that `create_token` made in this directory. Touches neither the module nor the PINs.

    Raises:
        TokenRefusedError: there is no whole token here, or others may read its PINs.
    """
    home = directory.resolve()
    try:
        facts = json.loads((home / "token.json").read_text())
    except FileNotFoundError as error:
        raise TokenRefusedError(_missing(home)) from error
    except (OSError, ValueError) as error:
        raise TokenRefusedError(f"{home / 'token.json'} cannot be read: {error}") from error
    if not isinstance(facts, dict) or any(not isinstance(facts.get(key), str) for key in ("label", "serial", "module")):
        raise TokenRefusedError(f"{home / 'token.json'} does not describe a token.")
    for pin_file in (home / "pin", home / "so-pin"):
        _require_private(pin_file)
    return _token_in(home, facts)


def ensure_token(directory: Path, *, label: str) -> TokenConfiguration:
    """The token in this directory, made first if the directory is new or empty. Its keys survive; its label must be the same.

    Raises:
        TokenRefusedError: another label, a half-made token, or a directory with something else in it.
        ModuleMissingError: there is no module, and none can be fetched.
    """
    home = directory.resolve()
    if _is_new_or_empty(home):
        return create_token(directory, label=label)
    token = open_token(directory)
    if token.token_label != label:
        raise TokenRefusedError(f"{home} holds the token {token.token_label!r}, not {label!r}.")
    return token


def _make(home: Path, order: _Order) -> TokenConfiguration:
    (home / "tokens").mkdir(mode=0o700)
    _write_private(home / "softhsm2.conf", _configuration(home / "tokens"))
    _write_private(home / "so-pin", order.so_pin)
    _write_private(home / "pin", order.pin)
    serial = _initialise(order, home / "softhsm2.conf")
    facts = {"label": order.label, "serial": serial, "module": str(order.module_path)}
    _write_private(home / "token.json", json.dumps(facts, indent=2) + "\n")
    return _token_in(home, facts)


def _empty(home: Path) -> None:
    for path in home.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_new_or_empty(home: Path) -> bool:
    try:
        return not home.exists() or (home.is_dir() and not any(home.iterdir()))
    except OSError as error:
        raise TokenRefusedError(f"{home} cannot be used for a token: {error.strerror}.") from error


def _checked_label(label: str) -> str:
    if not 1 <= len(label.encode()) <= _LABEL_BYTES or not label.isprintable() or label != label.strip():
        raise TokenRefusedError(
            "A token label is 1 to 32 bytes of printable text that neither starts nor ends with a space."
        )
    return label


def _checked_pin(pin: str | None) -> str:
    chosen = secrets.token_urlsafe(_PIN_BYTES) if pin is None else pin
    if len(chosen.encode()) not in _PIN_CHARACTERS or not chosen.isprintable():
        raise TokenRefusedError("A PIN is 4 to 255 printable characters.")
    return chosen


def _empty_directory(directory: Path) -> Path:
    home = directory.resolve()
    if any(home == system or system in home.parents for system in _SYSTEM_DIRECTORIES):
        raise TokenRefusedError(f"{home} belongs to the system. Give the token a directory of its own.")
    # SoftHSM reads its configuration line by line and takes '#' as a comment: such a path would silently become another one.
    if any(character in str(home) for character in "#\n\r"):
        raise TokenRefusedError(f"{str(home)!r} holds a '#' or a line end, which softhsm2.conf cannot express.")
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(home.iterdir()):
            raise TokenRefusedError(f"{home} is not empty. A token is made only in an empty or new directory.")
        home.chmod(0o700)
    except OSError as error:
        raise TokenRefusedError(f"{home} cannot be used for a token: {error.strerror}.") from error
    return home


def _configuration(tokens: Path) -> str:
    return (
        f"directories.tokendir = {tokens}\n"
        "objectstore.backend = file\n"
        "log.level = ERROR\n"
        "slots.removable = false\n"
    )  # fmt: skip


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _initialise(order: _Order, conf: Path) -> str:
    message = {"module": str(order.module_path), "label": order.label, "so_pin": order.so_pin, "pin": order.pin}
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("initialise.py"))],
            input=json.dumps(message),
            capture_output=True,
            text=True,
            env={**os.environ, "SOFTHSM2_CONF": str(conf)},
            timeout=_DEADLINE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        # `from None`: the exception holds the process's input, and with it the PINs.
        raise TokenRefusedError(f"{order.module_path} did not make a token in {_DEADLINE_SECONDS} s.") from None
    return _serial(order, done)


def _serial(order: _Order, done: subprocess.CompletedProcess[str]) -> str:
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if done.returncode == 0 and isinstance(answer.get("serial"), str):
        return str(answer["serial"])
    reason = answer.get("error", f"its process ended with status {done.returncode}")
    raise TokenRefusedError(f"{order.module_path} made no token: {reason}.")


def _token_in(home: Path, facts: dict[str, str]) -> TokenConfiguration:
    return TokenConfiguration(
        directory=home,
        module_path=Path(facts["module"]),
        softhsm2_conf=home / "softhsm2.conf",
        token_label=facts["label"],
        serial=facts["serial"],
        pin_file=home / "pin",
        so_pin_file=home / "so-pin",
    )


def _missing(home: Path) -> str:
    if _is_new_or_empty(home):
        return f"There is no token in {home}."
    return f"{home} holds something else, or a token whose making was interrupted. Move it away and start again."


def _require_private(pin_file: Path) -> None:
    try:
        mode = pin_file.stat().st_mode & 0o777
    except OSError as error:
        raise TokenRefusedError(f"{pin_file} cannot be read: {error.strerror}.") from error
    if mode & 0o077:
        raise TokenRefusedError(f"{pin_file} can be read by others (mode {mode:04o}). Run: chmod 600 {pin_file}")
