"""How custodyctl ends: its exit codes, and the one error that its commands raise.

0 done; 1 failed; 2 wrong usage; 3 degraded or locked; 4 verification failed; 5 sidecar or HSM not reachable; 130 interrupted
"""

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from custody.errors import CustodyError

__all__ = ["ExitCode", "Failure", "failure_of"]


class ExitCode(IntEnum):
    """A contract with scripts: numbers are never reused."""

    OK = 0
    FAILED = 1
    USAGE = 2
    DEGRADED = 3
    VERIFICATION_FAILED = 4
    UNREACHABLE = 5
    INTERRUPTED = 130


class Failure(Exception):
    """What went wrong in one line, and in `advice` what to try next."""

    def __init__(self, message: str, *, advice: str = "", code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.code = code


def failure_of(error: "CustodyError") -> Failure:
    """What an error of the client means here."""
    if error.reason is None and error.code in _NO_ANSWER:
        return Failure(
            "the sidecar does not answer at this address",
            advice="check that it runs and that --address names its administration socket; "
            "custodyctl doctor --config FILE looks further",
            code=ExitCode.UNREACHABLE,
        )
    code = ExitCode.UNREACHABLE if error.reason == "HSM_UNAVAILABLE" else ExitCode.FAILED
    violations = "".join(f"; {each.field}: {each.description}" for each in error.field_violations)
    reason = f" ({error.reason})" if error.reason else ""
    return Failure(f"{error.message}{violations}{reason}", advice=_ADVICE.get(error.code, ""), code=code)


_NO_ANSWER = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})
_ADVICE = {
    "UNAUTHENTICATED": "give a certificate that the sidecar trusts: --tls-ca, --tls-certificate, --tls-key",
    "PERMISSION_DENIED": "administration has a socket of its own, and the policy file must give you the role administrator",
    "UNIMPLEMENTED": "this socket does not serve administration; give the listener with surface: admin",
    "NOT_FOUND": "check the name; custodyctl has list commands for consents, payments and keys",
    "UNAVAILABLE": "try again in a moment; custodyctl status tells what is missing",
    "DEADLINE_EXCEEDED": "it may have been done all the same; look, then run the same command again, or give a longer --timeout",
    "DATA_LOSS": "stored data was changed or lost; keep everything as it is; a backup lacks the newest claims (docs/store.md)",
    "INTERNAL": "this is a defect; the sidecar's log has the request id",
}
