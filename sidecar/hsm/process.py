"""The hsm process from its first instruction to its exit code.

Rules:
- Hardened before anything secret is read; what holds is logged and can be asked for.
- Every way to end is an exit code of ChildExit with one line that says why; nothing foreign is printed, tracebacks included.
- A refused start ends at once: no finaliser of the vendor's module runs, where it could hang until somebody takes the end
  for a crash and tries the PIN again. The lines `log_in` and `logged_in` stand around the one try of the PIN.
"""

import os
import signal
import socket
import sys
from typing import Any, NoReturn

import msgspec

from sidecar.domain.provider import KeyPurpose
from sidecar.hardening import ParentGone, Posture, give_back_freed_memory, harden
from sidecar.hsm.errors import StartRefused
from sidecar.hsm.keys import check_references
from sidecar.hsm.log import log
from sidecar.hsm.module import RootKey, SigningKey, Token, load_module
from sidecar.hsm.server import HsmServer
from sidecar.hsm.vault import Vault
from sidecar.ipc.messages import ChildExit, HsmSettings, HsmStatus

__all__ = ["run"]

_MAX_SETTINGS_BYTES = 1024 * 1024


def run(*, settings_fd: int, gateway_fd: int, wiring_fd: int, parent_pid: int) -> int:
    """The exit code. A refused start does not return: the process has ended."""
    # Ctrl-C and a service manager's stop go to the whole group; the gateway finishes its payments and then ends its children.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        posture = harden(parent_pid=parent_pid)
        settings = _read_settings(settings_fd)
        code = _Process(settings=settings, posture=posture).serve(gateway_fd=gateway_fd, wiring_fd=wiring_fd)
    except StartRefused as refused:
        log("error", "start_refused", refused.message, exit_code=int(refused.code))
        _end_at_once(refused.code)
    except ParentGone:
        return ChildExit.STOPPED
    except Exception as error:  # noqa: BLE001 (the process's last boundary: name the class, show nothing else)
        log(
            "error",
            "defect",
            "the hsm process met an unexpected error",
            exit_code=int(ChildExit.SICK),
            error_class=type(error).__name__,
            **_place(error),
        )
        return ChildExit.SICK
    log("info", "stopped", _LAST_WORDS[code], exit_code=int(code))
    return code


_LAST_WORDS = {
    ChildExit.STOPPED: "the gateway closed its socket",
    ChildExit.SICK: "the HSM failed; a new process is needed",
    ChildExit.BAD_PEER: "the gateway's socket carried something that is not the protocol",
}


class _Process:
    def __init__(self, *, settings: HsmSettings, posture: Posture) -> None:
        check_references(settings)
        self._settings = settings
        self._posture = posture

    def serve(self, *, gateway_fd: int, wiring_fd: int) -> ChildExit:
        with socket.socket(fileno=gateway_fd) as gateway, socket.socket(fileno=wiring_fd) as wiring:
            token = self._log_in()
            root, signing = self._keys(token)
            vault = Vault(root=root, random=token, cluster=self._settings.cluster)
            give_back_freed_memory()
            self._log_ready(token)
            code = HsmServer(
                gateway=gateway,
                wiring=wiring,
                vault=vault,
                root_key_id=root.key_id.hex(),
                signing_keys=dict(signing),
                status=lambda: self._status(token, vault, root, signing),
            ).run()
            vault.close()
            if code is not ChildExit.SICK:  # a sick module may hang on the way out
                token.close()
            return code

    def _log_in(self) -> Token:
        # Loaded first: a module that hangs while it looks for its HSM has not been given the PIN.
        load_module(self._settings.module_path)
        log("info", "log_in", "the PIN is tried, once")
        token = Token.log_in(self._settings)
        log("info", "logged_in", "the token took the PIN")
        return token

    def _keys(self, token: Token) -> tuple[RootKey, dict[KeyPurpose, SigningKey]]:
        root = next(key for key in self._settings.keys if key.purpose is KeyPurpose.ROOT)
        others = [key for key in self._settings.keys if key is not root]
        return token.root_key(root), {key.purpose: token.signing_key(key) for key in others}

    def _log_ready(self, token: Token) -> None:
        if token.facts.user_pin_count_low:
            log("warning", "pin_count_low", "a wrong PIN was entered at this token since the last successful login")
        log("info", "ready", "the HSM is open", missing_hardening=",".join(self._posture.missing()))

    def _status(self, token: Token, vault: Vault, root: RootKey, signing: dict[KeyPurpose, SigningKey]) -> HsmStatus:
        facts = token.facts
        return HsmStatus(
            module=self._settings.module_path,
            library_description=facts.library_description,
            library_version=facts.library_version,
            token_label=facts.token_label,
            token_serial=facts.token_serial,
            token_model=facts.token_model,
            logged_in=True,
            user_pin_count_low=facts.user_pin_count_low,
            user_pin_final_try=facts.user_pin_final_try,
            user_pin_locked=facts.user_pin_locked,
            master_key_versions=vault.versions,
            current_master_key_version=vault.current_version,
            keys=(root.describe(), *(key.describe() for key in signing.values())),
        )


def _end_at_once(code: ChildExit) -> NoReturn:
    sys.stderr.flush()
    os._exit(code)


def _read_settings(descriptor: int) -> HsmSettings:
    try:
        with os.fdopen(descriptor, "rb") as file:
            return msgspec.json.decode(file.read(_MAX_SETTINGS_BYTES), type=HsmSettings)
    except (OSError, msgspec.MsgspecError) as error:
        raise StartRefused(
            ChildExit.SETTINGS_REFUSED, "the hsm process was given settings that it cannot read"
        ) from error


def _place(error: Exception) -> dict[str, Any]:
    """File and line where it was raised: enough to find the defect, and no value of any variable."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return {}
    return {"file": os.path.basename(trace.tb_frame.f_code.co_filename), "line": trace.tb_lineno}  # noqa: PTH119
