"""Starts `sidecar.hsm.inspect`, the only place that loads PKCS#11 for custodyctl, in a process of its own, and reads its answer.

Rules: the settings go in over standard input, and hold the PIN file's name, never the PIN; a module that hangs is killed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sidecar.cli.failures import ExitCode, Failure

if TYPE_CHECKING:
    from sidecar.config import Configuration

__all__ = ["Inspect", "hsm_settings", "inspect_hsm"]

_DEFAULT_SECONDS = 30.0


class Inspect(Protocol):
    """Asks an HSM: a command of `sidecar.hsm.inspect` with its arguments, HsmSettings as JSON for it, and how long it may take."""

    def __call__(self, arguments: Sequence[str], *, settings: bytes = b"", timeout_seconds: float | None) -> Any: ...  # noqa: ANN401 (JSON)


def inspect_hsm(arguments: Sequence[str], *, settings: bytes = b"", timeout_seconds: float | None) -> Any:  # noqa: ANN401 (JSON)
    """The JSON answer of an inspection. Raises Failure when there is none.

    A document that lists refused keys or broken promises is an answer: it tells of them itself.
    """
    seconds = timeout_seconds or _DEFAULT_SECONDS
    done = _run([sys.executable, "-m", "sidecar.hsm.inspect", *arguments], settings, seconds)
    if done.stdout:
        return json.loads(done.stdout)
    raise _failure(done.returncode, done.stderr.decode("utf-8", "replace").strip())


def hsm_settings(configuration: "Configuration") -> bytes:
    """What the hsm process would be given at a start. Raises ConfigurationError."""
    import msgspec

    from sidecar.config import ConfigurationError
    from sidecar.ipc.messages import HsmSettings, KeyFile

    hsm = configuration.hsm
    try:
        keys = msgspec.json.decode(Path(hsm.keys_file).read_bytes(), type=KeyFile).keys
    except OSError as error:
        raise ConfigurationError([f"hsm.keys_file: {hsm.keys_file} cannot be read ({error.strerror})"]) from error
    except msgspec.MsgspecError as error:
        raise ConfigurationError(["hsm.keys_file: is not what sidecar.hsm.provisioning writes"]) from error
    settings = HsmSettings(
        cluster=configuration.cluster,
        module_path=hsm.module_path,
        token_label=hsm.token_label,
        token_serial=hsm.token_serial,
        pin_file=hsm.pin_file,
        keys=keys,
    )
    return msgspec.json.encode(settings)


def _run(command: list[str], settings: bytes, seconds: float) -> "subprocess.CompletedProcess[bytes]":
    from sidecar.gateway.supervisor import child_environment

    try:
        return subprocess.run(
            command,
            input=settings,
            capture_output=True,
            env=child_environment(os.environ, keep_foreign=True),
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(
            f"the PKCS#11 module did not answer within {seconds:g} s; its process was ended",
            advice="the HSM, or the network to it, hangs; a longer --timeout helps if it is only slow",
            code=ExitCode.UNREACHABLE,
        ) from error


def _failure(exit_code: int, said: str) -> Failure:
    from sidecar.ipc.messages import ChildExit

    message = said.splitlines()[-1] if said else f"the PKCS#11 module ended its process (exit status {exit_code})"
    match exit_code:
        case ChildExit.UNREACHABLE | ChildExit.SICK:
            return Failure(message, advice=_ADVICE_REACH, code=ExitCode.UNREACHABLE)
        case ChildExit.PIN_REFUSED:
            return Failure(message, advice=_ADVICE_PIN, code=ExitCode.DEGRADED)
        case ChildExit.PIN_FILE_REFUSED:
            return Failure(message, advice="hsm.pin_file must be a regular file of mode 0400 that its reader owns")
        case ChildExit.SETTINGS_REFUSED:
            return Failure(message, advice="check hsm.module_path and hsm.keys_file in the configuration")
        case _:
            return Failure(message, advice=_ADVICE_REACH, code=ExitCode.UNREACHABLE)


_ADVICE_REACH = "custodyctl hsm list-slots --module FILE shows what the module sees; SoftHSM also needs SOFTHSM2_CONF"
_ADVICE_PIN = (
    "no further try was made, and none should be before the PIN is known to be right: tries are counted by the token"
)
