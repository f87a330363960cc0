"""Why the hsm process does not start, or does not go on. Messages are one line for an operator: no PIN, no key, no vendor text."""

from sidecar.ipc.messages import ChildExit

__all__ = ["HsmFault", "RootRefused", "StartRefused"]


class StartRefused(Exception):
    """This process must not work with what it found. `code` tells the supervisor whether another try makes sense."""

    def __init__(self, code: ChildExit, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class HsmFault(Exception):
    """The module, the session or the device is sick. Nothing recovers by itself: answer the caller, then end the process.

    `cause` is the name of python-pkcs11's exception class, such as `DeviceError`, or a word of ours.
    """

    def __init__(self, cause: str) -> None:
        super().__init__("the HSM failed")
        self.cause = cause


class RootRefused(Exception):
    """The root key does not open this ciphertext, and a known answer has just proven that the HSM is well."""
