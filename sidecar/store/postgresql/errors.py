"""What PostgreSQL's errors mean, by their SQLSTATE. Their text is never passed on: it may hold values."""

import psycopg

from sidecar.errors import Corrupt, CustodyError, Internal, Unavailable
from sidecar.store.errors import StoreRefused

__all__ = ["connection_refused", "is_conflict", "is_disconnect", "is_lock_timeout", "our_error", "spoils_transaction"]

_CONFLICTS = frozenset({"40001", "40P01"})  # serialization_failure, deadlock_detected
_LOCK_TIMEOUT = "55P03"
_DAMAGED = frozenset({"XX001", "XX002"})
# Classes of errors that end at the savepoint: of the data, of a constraint or trigger of ours, of a right or a name.
_HARMLESS_CLASSES = frozenset({"0A", "21", "22", "23", "42", "P0"})
_DEFECT_CLASSES = frozenset({"21", "22", "23", "P0"})
_DISCONNECTED = frozenset({"57P01", "57P02", "57P03", "57P05", "25P03"})
_CLIENT_SIDE = psycopg.DataError | psycopg.IntegrityError | psycopg.ProgrammingError | psycopg.NotSupportedError


def our_error(error: Exception) -> CustodyError:
    state = _state(error)
    if state in _DAMAGED:
        return Corrupt("ENVELOPE_CORRUPT", "the database is damaged")
    if state[:2] in _DEFECT_CLASSES or (not state and isinstance(error, _CLIENT_SIDE)):
        return Internal("a value does not fit the database")
    if state == _LOCK_TIMEOUT:
        return Unavailable("STORE_UNAVAILABLE", "somebody holds a lock in the database for too long; try again")
    return Unavailable("STORE_UNAVAILABLE", "the database does not answer; try again")


def spoils_transaction(error: Exception) -> bool:
    """Whether the transaction cannot go on at the savepoint before the statement. What is not known to be harmless spoils it."""
    if not isinstance(error, psycopg.Error):
        return False
    state = _state(error)
    if not state:
        return not isinstance(error, _CLIENT_SIDE)
    return state != _LOCK_TIMEOUT and state[:2] not in _HARMLESS_CLASSES


def is_conflict(error: Exception) -> bool:
    """The transaction was certainly rolled back, even at COMMIT, because of another one: run again, it may well succeed."""
    return _state(error) in _CONFLICTS


def is_disconnect(error: Exception) -> bool:
    """The connection is of no more use."""
    state = _state(error)
    if not state:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return state in _DISCONNECTED or state.startswith("08")


def is_lock_timeout(error: Exception) -> bool:
    return _state(error) == _LOCK_TIMEOUT


# In the words of libpq and of the server's start of a session: neither has an SQLSTATE for us.
_REASONS = (
    ("certificate verify failed", "the server's certificate is not signed by sslrootcert"),
    ("server certificate for", "the server's certificate is for another host"),
    ("server does not support SSL", "the server does not speak TLS"),
    ("SSL", "TLS to the server fails"),
    (
        "session is read-only",
        "no server of the URL takes writes: it is a standby, or default_transaction_read_only is on",
    ),
    ("password authentication failed", "the server does not accept the role's password (passfile)"),
    ("no password supplied", "the server asks for a password, and passfile has none for it"),
    ("Peer authentication failed", "the server does not let this user be that role (peer authentication)"),
    ("pg_hba.conf", "the server's pg_hba.conf does not let this role in from here"),
    ("role ", "the server has no such role, or does not let it log in"),
    ("does not exist", "the server has no such database"),
    ("too many", "the server has no connection left"),
    ("remaining connection slots", "the server has no connection left"),
    ("starting up", "the server is starting"),
)


def connection_refused(error: Exception, *, where: str) -> StoreRefused:
    """Why there is no connection, in words of ours."""
    text = str(error)
    reason = next((ours for theirs, ours in _REASONS if theirs in text), "the server does not answer")
    return StoreRefused(f"the database cannot be reached: {reason}", path=where)


def _state(error: Exception) -> str:
    return (error.sqlstate or "") if isinstance(error, psycopg.Error) else ""
