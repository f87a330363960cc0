"""Why nothing was sent, and why an outcome is not known. The only texts that egress says about a request that got no answer.

A code of the first group promises that not one byte of the request left this machine; a code of the second group promises
nothing. Both go into metrics and records as they are: never renumber a meaning, never put a value into one.
"""

from typing import Final

__all__ = [
    "ALREADY_SENT",
    "ANSWER_ECHOES_SECRET",
    "ANSWER_ENCODED",
    "ANSWER_HOLDS_TOKENS",
    "ANSWER_MALFORMED",
    "ANSWER_TOO_LARGE",
    "ANSWER_TRUNCATED",
    "CONNECTION_LOST",
    "CONNECTION_LOST_BEFORE_SEND",
    "CONNECT_FAILED",
    "CONNECT_TIMED_OUT",
    "DEADLINE_AFTER_SEND",
    "DEADLINE_BEFORE_SEND",
    "DEFECT_AFTER_SEND",
    "NAME_NOT_RESOLVED",
    "NOT_SENT_CODES",
    "PREPARED_GONE",
    "TLS_FAILED",
    "TOKEN_ANSWER_MALFORMED",
    "TOKEN_ANSWER_STATUS",
    "UNKNOWN_CODES",
]

# --- not sent

NAME_NOT_RESOLVED: Final = "NAME_NOT_RESOLVED"
CONNECT_FAILED: Final = "CONNECT_FAILED"  # refused, unreachable, no descriptor left
CONNECT_TIMED_OUT: Final = "CONNECT_TIMED_OUT"  # TCP or TLS was not through in time
TLS_FAILED: Final = "TLS_FAILED"  # certificate, name, version, alert during the handshake
CONNECTION_LOST_BEFORE_SEND: Final = "CONNECTION_LOST_BEFORE_SEND"  # the peer closed it, or spoke unasked
DEADLINE_BEFORE_SEND: Final = "DEADLINE_BEFORE_SEND"
PREPARED_GONE: Final = "PREPARED_GONE"  # expired, discarded, or prepared by an earlier run of egress

# --- unknown

ALREADY_SENT: Final = "ALREADY_SENT"  # the handle was sent before: what became of it was answered then
CONNECTION_LOST: Final = "CONNECTION_LOST"  # reset, alert or close before the first byte of an answer
DEADLINE_AFTER_SEND: Final = "DEADLINE_AFTER_SEND"
ANSWER_TRUNCATED: Final = "ANSWER_TRUNCATED"  # the connection ended inside the answer
ANSWER_MALFORMED: Final = "ANSWER_MALFORMED"  # not HTTP/1.1, ambiguous in length, or followed by more
ANSWER_TOO_LARGE: Final = "ANSWER_TOO_LARGE"
ANSWER_ENCODED: Final = "ANSWER_ENCODED"  # a content coding nobody asked for
ANSWER_ECHOES_SECRET: Final = "ANSWER_ECHOES_SECRET"  # noqa: S105 (a code)
ANSWER_HOLDS_TOKENS: Final = "ANSWER_HOLDS_TOKENS"  # a token endpoint's answer to what was not asked as a token request
TOKEN_ANSWER_MALFORMED: Final = "TOKEN_ANSWER_MALFORMED"  # noqa: S105 (a code)
# neither a grant (2xx) nor a definite refusal (4xx)
TOKEN_ANSWER_STATUS: Final = "TOKEN_ANSWER_STATUS"  # noqa: S105 (a code)
DEFECT_AFTER_SEND: Final = "DEFECT_AFTER_SEND"  # our own mistake, after the bytes were handed over

NOT_SENT_CODES: Final = frozenset(
    {
        NAME_NOT_RESOLVED,
        CONNECT_FAILED,
        CONNECT_TIMED_OUT,
        TLS_FAILED,
        CONNECTION_LOST_BEFORE_SEND,
        DEADLINE_BEFORE_SEND,
        PREPARED_GONE,
    }
)
UNKNOWN_CODES: Final = frozenset(
    {
        ALREADY_SENT,
        CONNECTION_LOST,
        DEADLINE_AFTER_SEND,
        ANSWER_TRUNCATED,
        ANSWER_MALFORMED,
        ANSWER_TOO_LARGE,
        ANSWER_ENCODED,
        ANSWER_ECHOES_SECRET,
        ANSWER_HOLDS_TOKENS,
        TOKEN_ANSWER_MALFORMED,
        TOKEN_ANSWER_STATUS,
        DEFECT_AFTER_SEND,
    }
)
