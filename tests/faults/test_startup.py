"""Mistakes of the configuration, the database and the HSM: the sidecar does not start, says why in one line, and ends with 2 or 5.

Each case is one mistake in a system that starts without it. Also: what stands in the environment cannot make it talk or call out.
"""

import copy
import fcntl
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc.pki import SERVER, SERVER_NAME, TRUST_DOMAIN, Authority
from tools.development import Development, SidecarProcess, free_port

_ROOT = Path(__file__).resolve().parent.parent.parent
# The gateway says it, of the whole sidecar: the hsm process has a "ready" of its own, also in a start that is then refused.
_READY = '"process":"gateway","event":"ready"'
AUTHORITY = Authority()
WRONG_CONFIGURATION, CANNOT_RUN = 2, 5


@dataclass(kw_only=True)
class Machine:
    """A prepared system without a running sidecar. `document` is its configuration, a new copy for each test."""

    development: Development
    document: dict[str, Any]
    folder: Path

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def tls(self, **changes: str) -> dict[str, str]:
        certificate, key = AUTHORITY.server().written(self.folder, "server")
        ca_file = self.file("client-ca.pem", AUTHORITY.certificate)
        section = {"certificate_file": str(certificate), "key_file": str(key), "client_ca_file": ca_file}
        return {**section, "trust_domain": TRUST_DOMAIN, **changes}

    def listen_with(self, **changes: str) -> None:
        """One more listener, with TLS on a free port."""
        address = f"127.0.0.1:{free_port()}"
        self.document["listeners"].append({"address": address, "surface": "api", "tls": self.tls(**changes)})

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Runs the sidecar until it ends; one that has started is ended, and has then status 0."""
        config_file = self.file("custody.yaml", json.dumps(self.document))
        log_file = self.folder / "sidecar.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sidecar", "--config", config_file, *arguments],
                cwd=_ROOT,
                env={**os.environ, **self.development.token.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + 60
        while process.poll() is None and _READY not in log_file.read_text() and time.monotonic() < end:
            time.sleep(0.02)
        process.terminate()
        return subprocess.CompletedProcess(process.args, process.wait(30), "", log_file.read_text())


@pytest.fixture(scope="module")
def prepared() -> Iterator[tuple[Development, dict[str, Any]]]:
    folder = Path(tempfile.mkdtemp(prefix="custody-start-"))
    with Development.prepare(folder) as development:
        bank = development.start_bank(duration_seconds=900)
        (folder / "policy.yaml").write_text(json.dumps(development.policy()))
        yield development, development.configuration(bank, operations_port=free_port())
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def machine(prepared: tuple[Development, dict[str, Any]]) -> Iterator[Machine]:
    development, document = prepared
    folder = Path(tempfile.mkdtemp(prefix="custody-case-"))
    document = copy.deepcopy(document)
    document["operations_address"] = f"127.0.0.1:{free_port()}"
    document["store"]["path"] = str(folder / "custody.db")
    for listener in document["listeners"]:
        listener["address"] = f"unix:{folder / listener['surface']}.sock"
    yield Machine(development=development, document=document, folder=folder)
    shutil.rmtree(folder, ignore_errors=True)


# --- the mistakes --------------------------------------------------------------------------------------------------------

Mistake = Callable[[Machine], None]


def _change(path: str, value: Any) -> Mistake:
    """Sets `a.b.0.c` of the configuration."""

    def make(machine: Machine) -> None:
        *sections, name = path.split(".")
        place: Any = machine.document
        for section in sections:
            place = place[int(section)] if section.isdigit() else place[section]
        place[name] = value

    return make


def _without(path: str) -> Mistake:
    def make(machine: Machine) -> None:
        section, name = path.split(".")
        place = machine.document[section]
        del (place[0] if isinstance(place, list) else place)[name]

    return make


def _pin_file(content: str, mode: int = 0o600) -> Mistake:
    def make(machine: Machine) -> None:
        path = Path(machine.file("pin", content))
        path.chmod(mode)
        machine.document["hsm"]["pin_file"] = str(path)

    return make


def _right_pin(machine: Machine) -> str:
    return Path(machine.document["hsm"]["pin_file"]).read_text()


def _readable_pin_file(machine: Machine) -> None:
    _pin_file(_right_pin(machine), 0o644)(machine)


def _other_file(path: str, content: str | bytes, name: str = "wrong-file") -> Mistake:
    return lambda machine: _change(path, machine.file(name, content))(machine)


def _policy(*rows: dict[str, Any]) -> Mistake:
    return lambda machine: _other_file("policy_file", json.dumps({"workloads": rows}))(machine)


def _keys_file(change: Callable[[dict[str, Any]], None]) -> Mistake:
    def make(machine: Machine) -> None:
        document = json.loads(machine.development.keys_file.read_text())
        change(document)
        _other_file("hsm.keys_file", json.dumps(document))(machine)

    return make


def _unknown_key_in_token(document: dict[str, Any]) -> None:
    for key in document["keys"]:
        if key["purpose"] == "root":
            key["id_hex"] = "00" * 16


def _no_client_key(document: dict[str, Any]) -> None:
    document["descriptions"] = [key for key in document["descriptions"] if key["purpose"] != "client-authentication"]


def _weak_root_key(attributes: dict[str, bool], bits: int = 256) -> Mistake:
    """The root key that keys.json names is there, but is weaker."""

    def make(machine: Machine) -> None:
        key_id, label = os.urandom(16).hex(), f"weak-{os.urandom(4).hex()}"
        hsm = machine.document["hsm"]
        order = {
            "module": hsm["module_path"],
            "serial": hsm["token_serial"],
            "pin_file": hsm["pin_file"],
            "keys": [{"kind": "secret", "label": label, "id_hex": key_id, "bits": bits, "attributes": attributes}],
        }
        subprocess.run(
            [sys.executable, "-m", "tests.fakes.odd_key"],
            input=json.dumps(order),
            cwd=_ROOT,
            env={**os.environ, **machine.development.token.environment()},
            text=True,
            check=True,
            timeout=60,
        )

        def change(document: dict[str, Any]) -> None:
            for key in document["keys"]:
                if key["purpose"] == "root":
                    key.update(label=label, id_hex=key_id)

        _keys_file(change)(machine)

    return make


def _database(*statements: str) -> Mistake:
    """A database that a sidecar made, changed."""

    def make(machine: Machine) -> None:
        path = machine.document["store"]["path"]
        subprocess.run(
            [sys.executable, "-m", "sidecar.store.migrate", f"sqlite:///{path}"], cwd=_ROOT, check=False, timeout=60
        )
        connection = sqlite3.connect(path)
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        connection.close()
        Path(path).chmod(0o600)

    return make


def _database_is(content: bytes, mode: int = 0o600) -> Mistake:
    def make(machine: Machine) -> None:
        path = Path(machine.document["store"]["path"])
        path.write_bytes(content)
        path.chmod(mode)

    return make


def _taken_port(machine: Machine) -> None:
    machine.listen_with()
    _occupied.append(_listening(machine.document["listeners"][-1]["address"]))


def _taken_operations_port(machine: Machine) -> None:
    _occupied.append(_listening(machine.document["operations_address"]))


_occupied: list[socket.socket] = []


def _listening(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_server((host, int(port)))


def _open_folder(machine: Machine) -> None:
    folder = machine.folder / "open"
    folder.mkdir()
    folder.chmod(0o777)
    machine.document["listeners"][0]["address"] = f"unix:{folder}/api.sock"


def _long_path(machine: Machine) -> None:
    machine.document["listeners"][0]["address"] = f"unix:/tmp/{'é' * 52}"


def _file_in_the_way(machine: Machine) -> None:
    machine.document["listeners"][0]["address"] = f"unix:{machine.file('api.socket', 'not a socket')}"


def _expired_client_certificate(machine: Machine) -> None:
    expired = AUTHORITY.issue(dns=("tpp",), starts=-timedelta(days=2), ends=-timedelta(days=1))
    certificate, key = expired.written(machine.folder, "client")
    _change("providers.0.client_certificate_file", str(certificate))(machine)
    _change("providers.0.client_key_file", str(key))(machine)


def _foreign_client_key(machine: Machine) -> None:
    _, key = AUTHORITY.server().written(machine.folder, "client")
    _change("providers.0.client_key_file", str(key))(machine)


def _expired_server(machine: Machine) -> None:
    expired = AUTHORITY.issue(dns=(SERVER_NAME,), usage=SERVER, starts=-timedelta(days=2), ends=-timedelta(days=1))
    certificate, key = expired.written(machine.folder, "expired")
    machine.listen_with(certificate_file=str(certificate), key_file=str(key))


def _foreign_server_key(machine: Machine) -> None:
    _, key = AUTHORITY.server().written(machine.folder, "another")
    machine.listen_with(key_file=str(key))


MISTAKES: dict[str, tuple[Mistake, int, str]] = {
    # the file itself
    "an unknown key": (_change("lisseners", []), WRONG_CONFIGURATION, r"unknown key: lisseners"),
    "an unknown key within": (_change("store.sync", "FULL"), WRONG_CONFIGURATION, r"store: unknown key: sync"),
    "a missing key": (_without("hsm.pin_file"), WRONG_CONFIGURATION, r"hsm: missing key: pin_file"),
    "a PIN in the file": (_change("hsm.pin", "1234567"), WRONG_CONFIGURATION, r"hsm: unknown key: pin"),
    "less than FULL": (_change("store.synchronous", "NORMAL"), WRONG_CONFIGURATION, r"store\.synchronous: .*FULL"),
    "no listener": (_change("listeners", []), WRONG_CONFIGURATION, r"listeners: "),
    "a listener without identity": (
        _without("listeners.workload"),
        WRONG_CONFIGURATION,
        r"listeners\[0\]: .*tls and workload",
    ),
    "a bound TCP port": (
        _change("listeners.0.address", "127.0.0.1:0"),
        WRONG_CONFIGURATION,
        r"listeners\[0\]: workload needs a Unix socket",
    ),
    "a relative path": (_change("store.path", "custody.db"), WRONG_CONFIGURATION, r"store\.path: "),
    "operations on a name": (
        _change("operations_address", "example.org:80"),
        WRONG_CONFIGURATION,
        r"operations_address: ",
    ),
    "operations on no port": (
        _change("operations_address", "127.0.0.1:99999"),
        WRONG_CONFIGURATION,
        r"operations_address: ",
    ),
    # the policy
    "no policy file": (
        _change("policy_file", "/nowhere/policy.yaml"),
        WRONG_CONFIGURATION,
        r"/nowhere/policy\.yaml: is no file",
    ),
    "a policy with a pattern": (
        _policy({"workload": "spiffe://custody.test/*", "roles": ["application"]}),
        WRONG_CONFIGURATION,
        r"workloads\[0\]\.workload: ",
    ),
    "a policy with another role": (
        _policy({"workload": "workload:shop", "roles": ["root"]}),
        WRONG_CONFIGURATION,
        r"workloads\[0\]\.roles",
    ),
    "a policy with a row twice": (
        _policy(*({"workload": "workload:shop", "roles": ["application"]},) * 2),
        WRONG_CONFIGURATION,
        r"workload:shop stands more than once",
    ),
    "a limit that is not exact": (
        _policy(
            {
                "workload": "workload:shop",
                "roles": ["application"],
                "payment_limits": [{"currency_code": "JPY", "amount": "1.5"}],
            }
        ),
        WRONG_CONFIGURATION,
        r"payment_limits: JPY is not exact",
    ),
    # listeners
    "a port that is taken": (_taken_port, WRONG_CONFIGURATION, r"listeners: 127\.0\.0\.1:\d+ cannot be taken"),
    "an operations port that is taken": (
        _taken_operations_port,
        WRONG_CONFIGURATION,
        r"operations_address: cannot be taken",
    ),
    "a socket in a folder of everybody": (
        _open_folder,
        WRONG_CONFIGURATION,
        r"listeners: everybody may write to the folder of",
    ),
    "a socket in no folder": (
        _change("listeners.0.address", "unix:/nowhere/api.sock"),
        WRONG_CONFIGURATION,
        r"listeners: /nowhere/api\.sock cannot be made",
    ),
    "a socket path that is too long": (
        _long_path,
        WRONG_CONFIGURATION,
        r"listeners\[0\]\.address: must be a path of at most 107 bytes",
    ),
    "a file where the socket belongs": (
        _file_in_the_way,
        WRONG_CONFIGURATION,
        r"listeners: .* exists and is no socket",
    ),
    "a certificate that is not there": (
        lambda machine: machine.listen_with(certificate_file="/nowhere/server.pem"),
        WRONG_CONFIGURATION,
        r"listeners: /nowhere/server\.pem cannot be read",
    ),
    "a certificate that is none": (
        lambda machine: machine.listen_with(certificate_file=machine.file("no.pem", "x")),
        WRONG_CONFIGURATION,
        r"listeners: .*no\.pem is no PEM certificate",
    ),
    "a CA that is none": (
        lambda machine: machine.listen_with(client_ca_file=machine.file("no.pem", "")),
        WRONG_CONFIGURATION,
        r"listeners: .*no\.pem is no PEM certificate",
    ),
    "a key that is none": (
        lambda machine: machine.listen_with(key_file=machine.file("no.key", "x")),
        WRONG_CONFIGURATION,
        r"listeners: .*no\.key is no PEM private key",
    ),
    "a key of another certificate": (_foreign_server_key, WRONG_CONFIGURATION, r"listeners: .* is not the key of "),
    "an expired certificate": (_expired_server, WRONG_CONFIGURATION, r"listeners: .*expired\.pem is not valid now"),
    # the HSM
    "no module": (_change("hsm.module_path", "/nowhere/module.so"), CANNOT_RUN, r"hsm: .*module"),
    "a module that is none": (_other_file("hsm.module_path", "x", "module.so"), CANNOT_RUN, r"hsm: .*module"),
    "another token": (_change("hsm.token_label", "no-such-token"), CANNOT_RUN, r"hsm: .*token"),
    "another serial": (_change("hsm.token_serial", "0000000000000000"), CANNOT_RUN, r"hsm: .*token"),
    "no PIN file": (_change("hsm.pin_file", "/nowhere/pin"), CANNOT_RUN, r"hsm: .*PIN"),
    "a PIN file that others may read": (_readable_pin_file, CANNOT_RUN, r"hsm: .*PIN file"),
    "an empty PIN file": (_pin_file(""), CANNOT_RUN, r"hsm: .*PIN"),
    "no keys file": (
        _change("hsm.keys_file", "/nowhere/keys.json"),
        WRONG_CONFIGURATION,
        r"hsm\.keys_file: cannot be read",
    ),
    "a keys file that is none": (_other_file("hsm.keys_file", "{}"), WRONG_CONFIGURATION, r"hsm\.keys_file: "),
    "a keys file without a client key": (
        _keys_file(_no_client_key),
        WRONG_CONFIGURATION,
        r"hsm\.keys_file: .*client-authentication",
    ),
    "a root key that is not there": (_keys_file(_unknown_key_in_token), CANNOT_RUN, r"hsm: .*root"),
    "an extractable root key": (_weak_root_key({"EXTRACTABLE": True}), CANNOT_RUN, r"hsm: .*CKA_EXTRACTABLE"),
    "a root key that is not sensitive": (_weak_root_key({"SENSITIVE": False}), CANNOT_RUN, r"hsm: .*CKA_SENSITIVE"),
    "a root key that may wrap": (_weak_root_key({"WRAP": True}), CANNOT_RUN, r"hsm: .*CKA_WRAP"),
    "a root key that may be changed": (_weak_root_key({"MODIFIABLE": True}), CANNOT_RUN, r"hsm: .*CKA_MODIFIABLE"),
    "a short root key": (_weak_root_key({}, bits=128), CANNOT_RUN, r"hsm: .*(256|VALUE_LEN)"),
    # the database
    "a database in no folder": (_change("store.path", "/nowhere/custody.db"), CANNOT_RUN, r"/nowhere"),
    "a database that is none": (_database_is(b"no database at all" * 100), CANNOT_RUN, r"custody\.db"),
    "a database that others may read": (_database_is(b"", 0o644), CANNOT_RUN, r"custody\.db: others may read"),
    # providers
    "no descriptor": (_change("providers.0.descriptor", "no-such-bank"), WRONG_CONFIGURATION, r"no-such-bank"),
    "a descriptor that is none": (
        _other_file("providers.0.descriptor", "x: 1", "bank.yaml"),
        WRONG_CONFIGURATION,
        r"providers: sandbox-bank",
    ),
    "a missing variable": (_change("providers.0.variables", {}), WRONG_CONFIGURATION, r"providers: sandbox-bank"),
    "no signing certificate": (
        _without("providers.signing_certificate_file"),
        WRONG_CONFIGURATION,
        r"sandbox-bank needs signing_certificate_file",
    ),
    "a signing certificate that is none": (
        _other_file("providers.0.signing_certificate_file", "x"),
        WRONG_CONFIGURATION,
        r"sandbox-bank: .*wrong-file: the signing certificate is not",
    ),
    "a client key without consent": (
        _change("providers.0.allow_client_key_file", False),
        WRONG_CONFIGURATION,
        r"providers\[0\]\.client_key_file: .*allow_client_key_file",
    ),
    "no CA file": (_change("providers.0.ca_file", "/nowhere/ca.pem"), CANNOT_RUN, r"(egress|providers).*ca"),
    "a CA file that is none": (_other_file("providers.0.ca_file", "x"), CANNOT_RUN, r"egress: "),
    "a client key of another certificate": (_foreign_client_key, CANNOT_RUN, r"egress: "),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_start_is_refused(machine: Machine, what: str) -> None:
    """The status says configuration (2) or what it needs (5); the message is one line that names the mistake; no traceback."""
    make, status, message = MISTAKES[what]
    make(machine)

    done = machine.run()
    while _occupied:
        _occupied.pop().close()

    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == status, done.stderr
    assert len(said) == 1, done.stderr
    assert re.search(message, said[0]), said[0]
    assert "Traceback" not in done.stderr


def test_every_mistake_at_once(machine: Machine) -> None:
    """Mistakes of the configuration are said together, one a line, each with its key."""
    for path, value in (("cluster", "Not A Name"), ("store.synchronous", "OFF"), ("shutdown_seconds", -1)):
        _change(path, value)(machine)

    done = machine.run()

    assert done.returncode == WRONG_CONFIGURATION
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        "cluster",
        "shutdown_seconds",
        "store.synchronous",
    ]


def test_expired_client_certificate_is_said(machine: Machine) -> None:
    """A provider's certificate that has expired is warned of; the sidecar still serves the others."""
    _expired_client_certificate(machine)

    done = machine.run()

    warnings = [json.loads(line) for line in done.stderr.splitlines() if "provider_certificate_expired" in line]
    assert done.returncode == 0
    assert [(line["level"], line["provider"]) for line in warnings] == [("warning", "sandbox-bank")]


def test_without_a_mistake_it_starts(machine: Machine) -> None:
    """The system that the cases are made from starts, and stops when told to."""
    machine.listen_with()

    done = machine.run()

    assert done.returncode == 0, done.stderr
    assert _READY in done.stderr


def test_configuration_that_is_not_there(machine: Machine) -> None:
    """The file named on the command line must be there."""
    done = machine.run("--config", "/nowhere/custody.yaml")

    assert (done.returncode, done.stderr) == (
        WRONG_CONFIGURATION,
        "configuration: /nowhere/custody.yaml: is no file\n",
    )


def test_wrong_pin_is_tried_once(machine: Machine) -> None:
    """A wrong PIN ends the start with one try used: the token is not locked, and the right PIN still opens it."""
    right = dict(machine.document["hsm"])
    _pin_file("0000000")(machine)

    first = machine.run()
    machine.document["hsm"] = right
    second = machine.run()

    assert first.returncode == CANNOT_RUN
    assert "PIN" in first.stderr
    assert "0000000" not in first.stderr
    assert second.returncode == 0, second.stderr


def test_database_of_a_newer_sidecar(machine: Machine) -> None:
    """A schema that this version does not know is not touched."""
    assert machine.run().returncode == 0
    path = Path(machine.document["store"]["path"])
    connection = sqlite3.connect(path)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()

    done = machine.run()

    assert done.returncode == CANNOT_RUN
    assert "newer schema" in done.stderr
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]
    connection.close()


def test_two_sidecars(machine: Machine) -> None:
    """A second sidecar takes neither the database nor the socket of one that runs, and harms it not."""
    config_file = Path(machine.file("first.yaml", json.dumps(machine.document)))
    port = int(machine.document["operations_address"].rpartition(":")[2])
    first = SidecarProcess.start(
        config_file,
        operations_port=port,
        environment=machine.development.token.environment(),
        log_file=machine.folder / "first.log",
    )
    try:
        machine.document["operations_address"] = f"127.0.0.1:{free_port()}"
        same_database = machine.run()
        machine.document["store"]["path"] = str(machine.folder / "another.db")
        same_socket = machine.run()
        channel = grpc.insecure_channel(machine.document["listeners"][0]["address"])
        channel.unary_unary("/custody.v1.ProviderService/ListProviders", None, None)(b"", timeout=10)
        channel.close()
    finally:
        assert first.stop() == 0

    assert same_database.returncode == CANNOT_RUN
    assert re.search(r"custody\.db: .*another", same_database.stderr), same_database.stderr
    assert same_socket.returncode == WRONG_CONFIGURATION
    assert "another process serves" in same_socket.stderr


def test_lock_of_a_socket_is_a_lock(machine: Machine) -> None:
    """It is the lock that keeps others off, not the file: a file that nobody holds is no obstacle, one that is held is."""
    path = machine.document["listeners"][0]["address"].removeprefix("unix:")
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = machine.run()
    free = machine.run()

    assert (held.returncode, free.returncode) == (WRONG_CONFIGURATION, 0)


ENVIRONMENT = {
    "SSLKEYLOGFILE": "keylog",
    "GRPC_TRACE": "all",
    "GRPC_VERBOSITY": "DEBUG",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "ALL_PROXY": "http://127.0.0.1:9",
    "grpc_proxy": "http://127.0.0.1:9",
    "PYTHONDEBUG": "1",
    "PYTHONASYNCIODEBUG": "1",
}


def test_environment_cannot_make_it_talk(machine: Machine) -> None:
    """Key logs, traces and proxies of the environment: nothing is written, nothing is said, nothing goes elsewhere."""
    machine.listen_with()
    keylog = machine.folder / "keylog"
    variables = {**ENVIRONMENT, "SSLKEYLOGFILE": str(keylog)}
    config_file = Path(machine.file("custody.yaml", json.dumps(machine.document)))
    log_file = machine.folder / "sidecar.log"
    sidecar = SidecarProcess.start(
        config_file,
        operations_port=int(machine.document["operations_address"].rpartition(":")[2]),
        environment={**machine.development.token.environment(), **variables},
        log_file=log_file,
    )
    try:
        channel = grpc.insecure_channel(machine.document["listeners"][0]["address"])
        call = channel.unary_unary("/custody.v1.ProviderService/ListProviders", None, None)
        call(b"", timeout=10, metadata=(("x-canary", "zzcanary"),))
        channel.close()
    finally:
        assert sidecar.stop() == 0

    lines = log_file.read_text().splitlines()
    assert not keylog.exists()
    assert "zzcanary" not in log_file.read_text()
    assert [line for line in lines if not line.startswith('{"')] == []
