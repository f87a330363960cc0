"""Where the database is, and how it is reached: `postgresql://ROLE@HOST,HOST/DATABASE?sslrootcert=…`, checked before it is used.

Rules: TLS with `verify-full` for every host that is not the directory of a local socket; a password comes from a file that only
we can read, never from the URL or the environment; parameters that are not known to be harmless are refused; nothing that is
refused is repeated, because it may hold a password.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

from sidecar.store.errors import StoreRefused

__all__ = ["Address", "is_postgresql"]

CONNECT_SECONDS = 3  # for each host

_REQUIRED = ("host", "user", "dbname")
_PARAMETERS = frozenset(
    {"host", "hostaddr", "port", "user", "dbname", "passfile", "target_session_attrs"}
    | {"sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "channel_binding"}
)
# What libpq would take from the environment behind the configuration's back.
_ENVIRONMENT = (
    "PGPASSWORD",
    "PGOPTIONS",
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGSSLMODE",
    "PGSSLROOTCERT",
    "PGHOSTADDR",
    "PGREQUIRESSL",
)
_FILES = ("passfile", "sslrootcert", "sslcert", "sslkey", "sslcrl")
_SECRET_FILES = ("passfile", "sslkey")
_WRITABLE = ("read-write", "primary")
_ESTABLISHED: Mapping[str, str | int] = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "gssencmode": "disable",  # it would take the place of TLS, and verify no host
    "ssl_min_protocol_version": "TLSv1.2",
    "options": "",
    "client_encoding": "UTF8",
}


def is_postgresql(url: str) -> bool:
    return url.startswith(("postgresql://", "postgres://"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """`parameters` are libpq's, complete: nothing is left to its defaults that matters here."""

    parameters: Mapping[str, str | int]

    @classmethod
    def of_url(cls, url: str, *, application: str) -> "Address":
        """Raises StoreRefused, naming the rule and never the value."""
        if not is_postgresql(url):
            raise StoreRefused("the database URL must begin with postgresql://")
        if re.search(r"://[^/?#]*:[^/?#@]*@", url) or re.search(r"[?&](password|sslpassword)=", url):
            raise StoreRefused("the database URL must not hold a password: name a file, passfile=/ABSOLUTE/PATH")
        try:
            given = {name: str(value) for name, value in conninfo_to_dict(url).items()}
        except psycopg.ProgrammingError:
            raise StoreRefused("the database URL has no form or a parameter that PostgreSQL does not know") from None
        _check_parameters(given)
        _check_environment()
        for name in _FILES:
            _check_file(name, given.get(name))
        return cls(parameters={**_ESTABLISHED, **given, **_safe(given), "application_name": application})

    @property
    def is_local(self) -> bool:
        """Whether every host is the directory of a local socket."""
        return _are_local(str(self.parameters["host"]).split(","))

    def __str__(self) -> str:
        """For people: hosts and database. No role, no file."""
        return f"{self.parameters['host']}/{self.parameters['dbname']}"


def _check_parameters(given: Mapping[str, str]) -> None:
    unknown = sorted(given.keys() - _PARAMETERS)
    if unknown:
        raise StoreRefused(f"the database URL has a parameter that is not supported: {', '.join(unknown)}")
    for name in _REQUIRED:
        if not all(given.get(name, "").split(",")):
            raise StoreRefused(f"the database URL must name its {name}")
    if given.get("target_session_attrs", "read-write") not in _WRITABLE:
        raise StoreRefused("target_session_attrs must be read-write: what is read decides about money")


def _check_environment() -> None:
    found = [name for name in _ENVIRONMENT if os.environ.get(name)]
    if found:
        raise StoreRefused(f"the environment must not set {', '.join(found)}: the URL alone says how to connect")


def _check_file(name: str, value: str | None) -> None:
    if value is None or (name == "sslrootcert" and value == "system"):
        return
    path = Path(value)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise StoreRefused(f"{name} cannot be read", path=path) from error
    if not path.is_absolute() or not stat.S_ISREG(mode):
        raise StoreRefused(f"{name} must be a regular file, given by its absolute path", path=path)
    if name in _SECRET_FILES and mode & 0o077:
        raise StoreRefused(f"others may read or write {name}; set its mode to 0600", path=path)


def _safe(given: Mapping[str, str]) -> dict[str, str]:
    """The parameters that make it safe, where the URL does not say them. Raises StoreRefused where it says less."""
    hosts = given["host"].split(",")
    safe = {"passfile": given.get("passfile", "/dev/null/none")}  # else ~/.pgpass would be read
    if len(hosts) > 1:
        safe["target_session_attrs"] = given.get("target_session_attrs", "read-write")
    if _are_local(hosts) and not given.get("hostaddr"):
        return {**safe, "sslmode": "disable"}  # a local socket: nobody is in between
    if given.get("sslmode", "verify-full") != "verify-full":
        raise StoreRefused("sslmode must be verify-full for every host that is not the directory of a local socket")
    if "sslrootcert" not in given:
        raise StoreRefused("the database URL must name sslrootcert: the authority that signs the server's certificate")
    return {**safe, "sslmode": "verify-full"}


def _are_local(hosts: Sequence[str]) -> bool:
    return all(host.startswith(("/", "@")) for host in hosts)
