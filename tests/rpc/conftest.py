"""One running system for all of these tests: a bank, and a sidecar with every kind of listener and callers of every kind."""

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import custody
import grpc
import pytest

from tests.e2e.system import OWNER, System
from tests.rpc.calls import Method, every_method
from tests.rpc.pki import SERVER_NAME, TRUST_DOMAIN, Authority, Credential
from tools.development import Development, free_port

LISTENERS = ("tcp-api", "tcp-admin", "unix-api", "unix-admin")
_FULL: dict[str, Any] = {
    "purposes": ["accounts", "balances", "transactions", "payments", "signing"],
    "providers": ["sandbox-bank"],
    "owners": "any",
    "imports": True,
    "payment_limits": [{"currency_code": "EUR", "amount": "10000.00"}],
}
POLICY: dict[str, dict[str, Any]] = {
    "application": {"roles": ["application"], **_FULL},
    "other-application": {"roles": ["application"], **_FULL},
    "two-owners": {"roles": ["application"], **_FULL, "owners": [OWNER, "person-2"]},
    "accounts-only": {"roles": ["application"], **_FULL, "purposes": ["accounts"], "imports": False},
    "small-payments": {
        "roles": ["application"],
        **_FULL,
        "payment_limits": [{"currency_code": "EUR", "amount": "5.00"}],
    },
    "small-sums": {
        "roles": ["application"],
        **_FULL,
        "periodic_limits": [{"currency_code": "EUR", "amount": "6.00", "period_type": "year"}],
    },
    "no-limits": {"roles": ["application"], **_FULL, "payment_limits": []},
    "other-provider": {"roles": ["application"], **_FULL, "providers": ["another-bank"]},
    "nothing": {"roles": ["application"]},
    "administrator": {"roles": ["administrator"]},
    "auditor": {"roles": ["auditor"]},
    "all-roles": {"roles": ["application", "administrator", "auditor"], **_FULL},
}


@dataclass(kw_only=True)
class Rpc:
    """`addresses` by listener; `application` and `operator` are the bound sockets' channels."""

    system: System
    authority: Authority
    addresses: dict[str, str]
    _channels: dict[tuple[str, str], grpc.Channel] = field(default_factory=dict)
    _more: list[grpc.Channel] = field(default_factory=list)

    @property
    def application(self) -> grpc.Channel:
        """The workload `shop` on its own socket."""
        return self._kept(self.system.development.address, "", None)

    @property
    def operator(self) -> grpc.Channel:
        """The workload `operator`, administrator and auditor, on the administration socket."""
        return self._kept(self.system.development.admin_address, "", None)

    def as_workload(self, name: str, listener: str = "tcp-api") -> grpc.Channel:
        """A channel with the certificate of a workload of the policy; kept for all tests."""
        key = (listener, name)
        if key not in self._channels:
            self._channels[key] = self.channel(self.authority.workload(name), listener)
        return self._channels[key]

    def channel(
        self, credential: Credential | None, listener: str, *, options: tuple[tuple[str, Any], ...] = ()
    ) -> grpc.Channel:
        """A new channel; without a credential it shows none."""
        ca = self.authority.certificate
        credentials = credential.for_channel(ca) if credential else grpc.ssl_channel_credentials(ca)
        channel = grpc.secure_channel(self.addresses[listener], credentials, options=(*TLS_OPTIONS, *options))
        self._more.append(channel)
        return channel

    def plaintext(self, listener: str) -> grpc.Channel:
        channel = grpc.insecure_channel(self.addresses[listener], options=OWN_CONNECTION)
        self._more.append(channel)
        return channel

    def rows(self) -> dict[str, int]:
        """How many rows there are of what a call could write, but for the log."""
        return self._counts("claims", "consents", "secrets", "payments")

    def claims(self) -> int:
        return self._counts("claims")["claims"]

    def written(self) -> bytes:
        """The database with its write-ahead log, and the sidecar's log."""
        development = self.system.development
        files = [*development.directory.glob("custody.db*"), development.log_file]
        return b"".join(path.read_bytes() for path in files if path.is_file())

    def close(self) -> None:
        for channel in (*self._channels.values(), *self._more):
            channel.close()

    def _counts(self, *tables: str) -> dict[str, int]:
        connection = sqlite3.connect(f"file:{self.system.development.database}?mode=ro", uri=True)
        try:
            return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}
        finally:
            connection.close()

    def _kept(self, address: str, name: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        if (address, name) not in self._channels:
            self._channels[(address, name)] = grpc.insecure_channel(address, options=OWN_CONNECTION)
        return self._channels[(address, name)]


# Channels to one address share a connection, and with it an identity, unless they are told not to.
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
TLS_OPTIONS = (("grpc.ssl_target_name_override", SERVER_NAME), *OWN_CONNECTION)


def tls_section(folder: Path, authority: Authority) -> dict[str, str]:
    """The files of a TLS listener, written to `folder`."""
    certificate, key = authority.server().written(folder, "server")
    ca_file = folder / "client-ca.pem"
    ca_file.write_bytes(authority.certificate)
    return {
        "certificate_file": str(certificate),
        "key_file": str(key),
        "client_ca_file": str(ca_file),
        "trust_domain": TRUST_DOMAIN,
    }


def policy(development: Development, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The development policy, and `rows` by the path of their SPIFFE ID."""
    spiffe = [{"workload": f"spiffe://{TRUST_DOMAIN}/{name}", **row} for name, row in rows.items()]
    return {"workloads": [*development.policy()["workloads"], *spiffe]}


def started(folder: Path, *, bank_arguments: tuple[str, ...] = (), **changes: Any) -> Rpc:
    """A system whose sidecar has the listeners of LISTENERS besides its two bound sockets."""
    authority = Authority()
    development = Development.prepare(folder, bank_arguments=["--token-prefix", "canary", *bank_arguments])
    bank = development.start_bank(duration_seconds=900)
    addresses = {
        "tcp-api": f"127.0.0.1:{free_port()}",
        "tcp-admin": f"127.0.0.1:{free_port()}",
        "unix-api": f"unix:{development.sockets / 'tls.sock'}",
        "unix-admin": f"unix:{development.sockets / 'tls-admin.sock'}",
    }
    policy_file = folder / "rpc-policy.yaml"
    policy_file.write_text(
        json.dumps(policy(development, POLICY))
    )  # YAML too; safe_dump would make aliases, which are refused
    bound = development.configuration(bank, operations_port=1)["listeners"]
    tls = tls_section(folder, authority)
    listeners = [
        {"address": address, "surface": name.partition("-")[2], "tls": dict(tls)} for name, address in addresses.items()
    ]
    try:
        sidecar = development.start_sidecar(
            bank, changes={"listeners": [*bound, *listeners], "policy_file": str(policy_file), **changes}
        )
    except BaseException:
        development.stop()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    system = System(
        development=development,
        bank=bank,
        sidecar=sidecar,
        client=custody.Client(development.address, owner=OWNER),
        admin=custody.Client(development.admin_address),
        marker="canary",
    )
    return Rpc(system=system, authority=authority, addresses=addresses)


@pytest.fixture(scope="session")
def rpc() -> Iterator[Rpc]:
    """The system that all tests share and none of them ends."""
    folder = Path(tempfile.mkdtemp(prefix="custody-rpc-"))
    running = started(folder)
    yield running
    running.close()
    running.system.stop()
    log = running.system.development.log_file.read_text()
    shutil.rmtree(folder, ignore_errors=True)
    defects = [line for line in log.splitlines() if "call_failed" in line]
    assert defects == []  # whatever the tests did, no call ended in an error that nobody had thought of


@pytest.fixture(scope="session")
def methods() -> dict[str, Method]:
    """Every method by its name; health and reflection by their whole path too."""
    return {name: method for method in every_method() for name in (str(method), method.path)}
