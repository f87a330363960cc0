"""Initialises one token and its user PIN, in a process of its own. Run by `softhsm.token`; reads one JSON object, answers with one.

Rules this file keeps:

- PINs arrive on standard input and go to the module: never on a command line or in the environment, where `ps` and `/proc`
  show them.
- Only a slot whose token is *not* initialised is touched: C_InitToken destroys what a token holds.
- Standard library only, and run with `python -I`: it depends on no environment and leaves nothing behind in its parent.

PKCS#11 2.40: C_InitToken (5.5), C_InitPIN (5.5), CK_TOKEN_INFO (3.2), CK_FUNCTION_LIST (3.6).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_TOKEN_INITIALIZED = 0x400
_RW_SESSION, _SERIAL_SESSION = 0x2, 0x4
_SECURITY_OFFICER = 0
_LABEL_BYTES = 32

# Places in CK_FUNCTION_LIST, whose order the standard fixes.
_FUNCTIONS = {
    "C_Initialize": 0,
    "C_Finalize": 1,
    "C_GetSlotList": 4,
    "C_GetTokenInfo": 6,
    "C_InitToken": 9,
    "C_InitPIN": 10,
    "C_OpenSession": 12,
    "C_CloseSession": 13,
    "C_Login": 18,
}


class ModuleError(Exception):
    """The module refused a call; names the call and the CK_RV, never an argument."""


class TokenInfo(ctypes.Structure):
    """CK_TOKEN_INFO."""

    _fields_ = (
        ("label", ctypes.c_char * _LABEL_BYTES),
        ("manufacturer", ctypes.c_char * 32),
        ("model", ctypes.c_char * 16),
        ("serial", ctypes.c_char * 16),
        ("flags", ctypes.c_ulong),
        ("counts", ctypes.c_ulong * 10),
        ("versions", ctypes.c_ubyte * 4),
        ("time", ctypes.c_char * 16),
    )


class FunctionList(ctypes.Structure):
    """CK_FUNCTION_LIST, as far as it is used here."""

    _fields_ = (("version", ctypes.c_ubyte * 2), ("functions", ctypes.c_void_p * (max(_FUNCTIONS.values()) + 1)))


class Module:
    """The few PKCS#11 calls that making a token takes."""

    def __init__(self, path: str) -> None:
        pointer = ctypes.POINTER(FunctionList)()
        answer = ctypes.CDLL(path).C_GetFunctionList(ctypes.byref(pointer))
        if answer != 0:
            raise ModuleError(f"C_GetFunctionList answered 0x{answer:08x}")
        self._functions = pointer.contents.functions

    def call(self, name: str, *arguments: object) -> None:
        prototype = ctypes.CFUNCTYPE(ctypes.c_ulong)
        answer = prototype(self._functions[_FUNCTIONS[name]])(*arguments)
        if answer != 0:
            raise ModuleError(f"{name} answered 0x{answer:08x}")

    @contextlib.contextmanager
    def initialised(self) -> Iterator[None]:
        self.call("C_Initialize", None)
        try:
            yield
        finally:
            self.call("C_Finalize", None)

    def tokens(self) -> Iterator[tuple[int, TokenInfo]]:
        count = ctypes.c_ulong()
        self.call("C_GetSlotList", ctypes.c_ubyte(1), None, ctypes.byref(count))
        slots = (ctypes.c_ulong * count.value)()
        self.call("C_GetSlotList", ctypes.c_ubyte(1), slots, ctypes.byref(count))
        for slot in slots:
            info = TokenInfo()
            self.call("C_GetTokenInfo", ctypes.c_ulong(slot), ctypes.byref(info))
            yield slot, info


def initialise(module: Module, *, label: str, so_pin: bytes, pin: bytes) -> str:
    """Makes the token and answers with its serial number, read back after a fresh start of the module."""
    with module.initialised():
        slot = _free_slot(module)
        module.call("C_InitToken", slot, so_pin, ctypes.c_ulong(len(so_pin)), label.encode().ljust(_LABEL_BYTES))
        _set_user_pin(module, slot, so_pin, pin)
    # SoftHSM renumbers its slots when a token is made, so label and serial are the only names that last.
    with module.initialised():
        serials = [_text(info.serial) for _, info in module.tokens() if _text(info.label) == label]
    if len(serials) != 1:
        raise ModuleError(f"after initialisation {len(serials)} tokens have the label")
    return serials[0]


def _free_slot(module: Module) -> ctypes.c_ulong:
    for slot, info in module.tokens():
        if not info.flags & _TOKEN_INITIALIZED:
            return ctypes.c_ulong(slot)
    raise ModuleError("no slot holds an uninitialised token")


def _set_user_pin(module: Module, slot: ctypes.c_ulong, so_pin: bytes, pin: bytes) -> None:
    session = ctypes.c_ulong()
    flags = ctypes.c_ulong(_RW_SESSION | _SERIAL_SESSION)
    module.call("C_OpenSession", slot, flags, None, None, ctypes.byref(session))
    module.call("C_Login", session, ctypes.c_ulong(_SECURITY_OFFICER), so_pin, ctypes.c_ulong(len(so_pin)))
    module.call("C_InitPIN", session, pin, ctypes.c_ulong(len(pin)))
    module.call("C_CloseSession", session)


def _text(padded: bytes) -> str:
    return padded.decode("utf-8", "replace").rstrip(" \0")


def main() -> int:
    """Standard input: {module, label, so_pin, pin}. Standard output: {serial} or {error}."""
    order: dict[str, Any] = json.load(sys.stdin)
    try:
        serial = initialise(
            Module(order["module"]), label=order["label"], so_pin=order["so_pin"].encode(), pin=order["pin"].encode()
        )
    except (ModuleError, OSError) as error:
        json.dump({"error": str(error)}, sys.stdout)
        return 1
    json.dump({"serial": serial}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
