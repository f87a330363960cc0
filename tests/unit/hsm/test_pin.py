"""The PIN file, and what is left of a PIN."""

import os
import pickle
from pathlib import Path

import pytest

from sidecar.hsm.errors import StartRefused
from sidecar.hsm.pin import Pin
from sidecar.ipc.messages import ChildExit


def pin_file(directory: Path, content: bytes, mode: int = 0o400) -> str:
    path = directory / "pin"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize("mode", [0o400, 0o600])
@pytest.mark.parametrize("content", [b"1234", b"1234\n", b"1234\r\n"])
def test_the_content_without_one_line_end_is_the_pin(tmp_path: Path, content: bytes, mode: int) -> None:
    """A line end that an editor left is not part of the PIN."""
    with Pin(pin_file(tmp_path, content, mode)) as pin:
        assert pin.encode("utf-8") == b"1234"


def test_blanks_and_bytes_beyond_ascii_are_part_of_the_pin(tmp_path: Path) -> None:
    """Nothing else is trimmed or decoded."""
    with Pin(pin_file(tmp_path, " pä:ss ".encode("latin-1"))) as pin:
        assert pin.encode("utf-8") == " pä:ss ".encode("latin-1")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\r\n", b"12\n34", b"1234\n\n", b"12\x0034", b"1" * 256, b"1" * 100_000]
)
def test_content_that_is_no_single_line_is_refused(tmp_path: Path, content: bytes) -> None:
    """Empty, two lines, NUL, too long: not a PIN, so no try is spent on it."""
    with pytest.raises(StartRefused) as caught:
        Pin(pin_file(tmp_path, content))

    assert caught.value.code is ChildExit.PIN_FILE_REFUSED


def test_the_longest_pin_is_taken(tmp_path: Path) -> None:
    """255 octets, with a line end after them."""
    with Pin(pin_file(tmp_path, b"1" * 255 + b"\r\n")) as pin:
        assert len(pin.encode("utf-8")) == 255


@pytest.mark.parametrize("mode", [0o440, 0o404, 0o420, 0o402, 0o410, 0o644, 0o666, 0o777])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    """Any right for group or others, even to run it."""
    with pytest.raises(StartRefused, match="others than its owner"):
        Pin(pin_file(tmp_path, b"1234", mode))


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    """A link says nothing about whose content it delivers."""
    pin_file(tmp_path, b"1234")
    (tmp_path / "link").symlink_to(tmp_path / "pin")

    with pytest.raises(StartRefused, match="symbolic link"):
        Pin(str(tmp_path / "link"))


def test_a_fifo_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    """Opening a FIFO for reading would hang the start."""
    os.mkfifo(tmp_path / "fifo", 0o600)

    with pytest.raises(StartRefused, match="not a regular file"):
        Pin(str(tmp_path / "fifo"))


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    """Missing, or a directory."""
    with pytest.raises(StartRefused):
        Pin(str(tmp_path / name))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    """Its owner could change it under us."""
    path = pin_file(tmp_path, b"1234")
    os.chown(path, 12345, 0)

    with pytest.raises(StartRefused, match="another user"):
        Pin(path)


def test_what_was_handed_out_is_wiped(tmp_path: Path) -> None:
    """After the block no buffer that held the PIN holds it."""
    with Pin(pin_file(tmp_path, b"12345678")) as pin:
        handed_out = pin.encode("utf-8")

    assert handed_out == bytes(8)
    with pytest.raises(ValueError, match="closed"):
        pin.encode("utf-8")


def test_a_pin_shows_nothing(tmp_path: Path) -> None:
    """Neither its repr nor a copy nor an error about its file holds it."""
    with Pin(pin_file(tmp_path, b"pin-canary")) as pin:
        assert "canary" not in repr(pin) + str(pin)
        with pytest.raises(TypeError):
            pickle.dumps(pin)
    other = tmp_path / "x"
    other.mkdir()
    with pytest.raises(StartRefused) as caught:
        Pin(pin_file(other, b"pin-canary\nsecond"))
    assert "canary" not in repr(caught.value) + caught.value.message
