"""Finds the SoftHSM PKCS#11 module, or fetches it.

Rules this module keeps:

- `find_module` only looks. `ensure_module` may install: as root with apt, otherwise into the project's own `.cache/softhsm`,
  never with sudo.
- `$PKCS11_MODULE` is the operator's word: if it is set and wrong that is an error, not a reason to look elsewhere.
- A module counts as found only when the dynamic loader accepts it. The trial runs in a process of its own, because a
  PKCS#11 library in a process that later forks is the classic way to a hung child.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from softhsm.debian import DebianError, install, unpack
from softhsm.errors import ModuleMissingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["MODULE_VARIABLE", "cache_directory", "candidates", "ensure_module", "find_module", "softhsm2_util"]

MODULE_VARIABLE = "PKCS11_MODULE"

_LIBRARY = "libsofthsm2.so"
_UTILITY = "softhsm2-util"
_BREW_PREFIXES = (Path("/opt/homebrew"), Path("/usr/local"), Path("/home/linuxbrew/.linuxbrew"))
_DEBIAN_PACKAGES = ("softhsm2", "libsofthsm2")
_TRIAL_DEADLINE_SECONDS = 30


def find_module(*, environ: Mapping[str, str] | None = None, search: Sequence[Path] | None = None) -> Path:
    """The PKCS#11 module of the development HSM, already installed or already unpacked.

    Args:
        environ: where to read `$PKCS11_MODULE`; the process's environment if not given.
        search: files to try in order; `candidates()` if not given.

    Raises:
        ModuleMissingError: there is none, or `$PKCS11_MODULE` names a file that cannot be loaded.
    """
    chosen = (os.environ if environ is None else environ).get(MODULE_VARIABLE)
    if chosen:
        return _operators_choice(Path(chosen))
    faults: list[str] = []
    for path in candidates() if search is None else search:
        fault = _loading_fault(path) if path.is_file() else None
        if path.is_file() and fault is None:
            return path
        if fault is not None:
            faults.append(f"{path}: {fault}")
    raise ModuleMissingError("; ".join([*faults, _how_to_install()]))


def ensure_module(*, cache: Path | None = None) -> Path:
    """The PKCS#11 module, fetched first if this machine has none.

    Raises:
        ModuleMissingError: it can be neither found nor fetched; the message holds the one line to type.
    """
    try:
        return find_module()
    except ModuleMissingError:
        if os.environ.get(MODULE_VARIABLE):
            raise
    _fetch(cache or cache_directory())
    return find_module()


def softhsm2_util(*, search: Sequence[Path] | None = None) -> Path:
    """SoftHSM's own command, for people who want to look into a token. Nothing here calls it: it takes PINs on its command line.

    Raises:
        ModuleMissingError: it is not installed.
    """
    unpacked = cache_directory() / "usr/bin" / _UTILITY
    installed = shutil.which(_UTILITY)
    found = [path for path in search or (*([Path(installed)] if installed else []), unpacked) if path.is_file()]
    if not found:
        raise ModuleMissingError(f"{_UTILITY} is not installed. {_how_to_install()}")
    return found[0]


def candidates(*, cache: Path | None = None) -> Iterator[Path]:
    """Where SoftHSM's module may lie, best first: Debian and Ubuntu, Homebrew, Fedora, then our own unpacked copy."""
    yield Path("/usr/lib/softhsm") / _LIBRARY
    yield from sorted(Path("/usr/lib").glob(f"*-linux-*/softhsm/{_LIBRARY}"))
    for prefix in _BREW_PREFIXES:
        yield prefix / "lib/softhsm" / _LIBRARY
    yield Path("/usr/lib64/pkcs11") / _LIBRARY
    yield Path("/usr/lib64/softhsm") / _LIBRARY
    unpacked = cache_directory() if cache is None else cache
    yield from sorted((unpacked / "usr/lib").glob(f"*-linux-*/softhsm/{_LIBRARY}"))


def cache_directory() -> Path:
    """Where a SoftHSM that is not installed is unpacked: inside the project, ignored by git."""
    return Path(__file__).resolve().parent.parent / ".cache" / "softhsm"


def _operators_choice(path: Path) -> Path:
    if not path.is_file():
        raise ModuleMissingError(f"${MODULE_VARIABLE} names {path}, which is not a file. Correct it or unset it.")
    fault = _loading_fault(path)
    if fault is not None:
        raise ModuleMissingError(f"${MODULE_VARIABLE} names {path}, which does not load: {fault}")
    return path.resolve()


def _loading_fault(path: Path) -> str | None:
    """None if the loader takes the file and it is a PKCS#11 module; otherwise the loader's reason."""
    trial = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).C_GetFunctionList"
    done = subprocess.run(
        [sys.executable, "-I", "-c", trial, str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TRIAL_DEADLINE_SECONDS,
        check=False,
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"the loader ended with status {done.returncode}"])[-1]


def _fetch(cache: Path) -> None:
    if shutil.which("apt-get") is None:
        _refuse("this system has no apt-get")
    if os.geteuid() == 0 and install("softhsm2"):
        return
    try:
        unpack(cache, lambda options: _DEBIAN_PACKAGES)  # noqa: ARG005 - known, wherever apt finds them
    except DebianError as error:
        _refuse(str(error))


def _refuse(reason: str) -> NoReturn:
    raise ModuleMissingError(f"SoftHSM is not installed, and {reason}. {_how_to_install()}")


def _how_to_install() -> str:
    command = "sudo apt-get install softhsm2"
    if shutil.which("apt-get") is None:
        command = "brew install softhsm" if shutil.which("brew") else "sudo dnf install softhsm"
    return f"Install SoftHSM 2 ({command}), or set {MODULE_VARIABLE} to the file of a PKCS#11 module."
