"""The real hsm process on SoftHSM, asked over bare sockets: what each socket may do, and what the process refuses to start with."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import msgspec
import pytest

from sidecar.domain.provider import KeyPurpose
from sidecar.domain.secrets import SecretContext
from sidecar.gateway.supervisor import child_environment
from sidecar.ipc.frames import HEADER, deadline_after, encode_frame
from sidecar.ipc.messages import (
    ChildExit,
    CreateDataKey,
    CreateMasterKey,
    DataKeyCreated,
    DataKeyOpened,
    EgressToHsmFrame,
    Failure,
    GatewayToHsm,
    GatewayToHsmFrame,
    GetHsmStatus,
    HsmStatus,
    KeyReference,
    LoadMasterKeys,
    MasterKeyCreated,
    MasterKeysLoaded,
    OpenDataKey,
    Ping,
    Pong,
    Sign,
    Signature,
)
from softhsm.setup import create_token
from tests.fakes.token import CLUSTER, ProvisionedToken, RawHsm, provision, received

DIGEST = hashlib.sha256(b"what is signed").digest()
CONTEXT = SecretContext(cluster=CLUSTER, owner="owner-1", consent="consent-1")
OTHER_OWNER = SecretContext(cluster=CLUSTER, owner="owner-2", consent="consent-1")


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> ProvisionedToken:
    return ProvisionedToken.make(tmp_path_factory.mktemp("hsm"))


@pytest.fixture(scope="module")
def shared(token: ProvisionedToken) -> Iterator[RawHsm]:
    """One process for the tests that leave it as it was."""
    with RawHsm(token.settings(), token.environment) as raw:
        load_first_master_key(raw)
        yield raw


@pytest.fixture
def hsm(token: ProvisionedToken) -> Iterator[RawHsm]:
    """A process of its own."""
    with RawHsm(token.settings(), token.environment) as raw:
        yield raw


def load_first_master_key(raw: RawHsm) -> None:
    made = raw.ask(CreateMasterKey(version=1))
    assert isinstance(made, MasterKeyCreated)
    loaded = raw.ask(LoadMasterKeys(keys=(msgspec.structs.replace(made.key, current=True),)))
    assert loaded == MasterKeysLoaded(count=1)


def reference(token: ProvisionedToken, purpose: KeyPurpose) -> KeyReference:
    return next(key for key in token.key_file.keys if key.purpose is purpose)


# --- data keys: egress's socket only -------------------------------------------------------------------------------------


def test_a_data_key_comes_back_for_its_context(shared: RawHsm) -> None:
    """Create and open over egress's socket: the same 32 octets under the same id."""
    with shared.connect_egress() as egress:
        made = shared.ask_as_egress(egress, CreateDataKey(context=CONTEXT))
        opened = shared.ask_as_egress(egress, OpenDataKey(wrapped=made.wrapped, context=CONTEXT))

    assert isinstance(made, DataKeyCreated)
    assert isinstance(opened, DataKeyOpened)
    assert bytes(made.key) == bytes(opened.key) != bytes(32)
    assert made.key_id == opened.key_id
    assert len(made.wrapped) == 146


def test_a_data_key_does_not_open_for_another_owner(shared: RawHsm) -> None:
    """An owner mismatch cannot be decrypted, whatever the database says; the connection goes on."""
    with shared.connect_egress() as egress:
        made = shared.ask_as_egress(egress, CreateDataKey(context=CONTEXT))
        refused = shared.ask_as_egress(egress, OpenDataKey(wrapped=made.wrapped, context=OTHER_OWNER))
        opened = shared.ask_as_egress(egress, OpenDataKey(wrapped=made.wrapped, context=CONTEXT))

    assert (refused.kind, refused.reason) == ("Corrupt", "ENVELOPE_CORRUPT")
    assert isinstance(opened, DataKeyOpened)


@pytest.mark.parametrize("body", [CreateDataKey(context=CONTEXT), OpenDataKey(wrapped=b"x", context=CONTEXT)])
def test_the_gateway_may_not_ask_for_data_keys(hsm: RawHsm, body: CreateDataKey | OpenDataKey) -> None:
    """On the gateway's socket that is no operation at all: the process ends without an answer."""
    hsm.gateway.sendall(encode_frame(EgressToHsmFrame(id=1, deadline_boot_time_ns=deadline_after(20), body=body)))

    with pytest.raises(EOFError):
        received(hsm.gateway)
    code, lines = hsm.wait()
    assert code == ChildExit.BAD_PEER
    assert lines[-1]["message"] == "the gateway's socket carried something that is not the protocol"


@pytest.mark.parametrize(
    "body",
    [
        Sign(purpose=KeyPurpose.AUDIT, digest=DIGEST),
        CreateMasterKey(version=2),
        LoadMasterKeys(keys=()),
        GetHsmStatus(),
    ],
    ids=lambda body: type(body).__name__,
)
def test_egress_may_not_sign_or_manage_keys(shared: RawHsm, body: GatewayToHsm) -> None:
    """On egress's socket that is no operation: the connection ends, and the gateway's goes on."""
    with shared.connect_egress() as egress:
        egress.sendall(encode_frame(GatewayToHsmFrame(id=1, deadline_boot_time_ns=deadline_after(20), body=body)))
        with pytest.raises(EOFError):
            received(egress)

    assert isinstance(shared.ask(Sign(purpose=KeyPurpose.AUDIT, digest=DIGEST)), Signature)


def _frames() -> dict[str, bytes]:
    good = msgspec.msgpack.encode(EgressToHsmFrame(id=1, deadline_boot_time_ns=2**62, body=Ping()))
    extra = msgspec.msgpack.encode({"id": 1, "deadline_boot_time_ns": 2**62, "body": {"type": "Ping"}, "x": 1})
    short = msgspec.msgpack.encode(
        {"id": 1, "deadline_boot_time_ns": 2**62, "body": {"type": "Sign", "purpose": "audit", "digest": b"1"}}
    )
    return {
        "length 0": HEADER.pack(0),
        "length 2^32-1": b"\xff\xff\xff\xff",
        "length over the limit": HEADER.pack(6 * 1024 * 1024 + 1),
        "no msgpack": HEADER.pack(3) + b"\xc1\xc1\xc1",
        "more after the document": HEADER.pack(len(good) + 1) + good + b"\x00",
        "cut document": HEADER.pack(len(good) - 1) + good[:-1],
        "unknown field": HEADER.pack(len(extra)) + extra,
        "digest of one octet": HEADER.pack(len(short)) + short,
        "http": b"GET / HTTP/1.1\r\n\r\n",
    }  # fmt: skip


@pytest.mark.parametrize("octets", _frames().values(), ids=_frames())
def test_a_frame_that_does_not_parse_ends_egresss_connection(shared: RawHsm, octets: bytes) -> None:
    """And only that: a new connection of egress is served."""
    with shared.connect_egress() as egress:
        egress.sendall(octets)
        with pytest.raises((EOFError, ConnectionResetError)):
            received(egress)

    with shared.connect_egress() as again:
        assert shared.ask_as_egress(again, Ping()) == Pong()


@pytest.mark.parametrize("octets", _frames().values(), ids=_frames())
def test_a_frame_that_does_not_parse_on_the_gateways_socket_ends_the_process(
    token: ProvisionedToken, octets: bytes
) -> None:
    """The parent speaks rubbish: nothing here can be trusted any more."""
    with RawHsm(token.settings(), token.environment) as raw:
        raw.gateway.sendall(octets)
        code, _ = raw.wait()

    assert code == ChildExit.BAD_PEER


def test_a_new_socket_of_egress_replaces_the_older_one(shared: RawHsm) -> None:
    """Only one egress is served: after a restart the older socket is closed."""
    with shared.connect_egress() as old, shared.connect_egress() as new:
        assert shared.ask_as_egress(new, Ping()) == Pong()
        with pytest.raises((EOFError, ConnectionResetError)):
            received(old)


@pytest.mark.parametrize("number", [0, 2])
def test_a_wiring_message_brings_exactly_one_socket(hsm: RawHsm, number: int) -> None:
    """Anything else did not come from our supervisor."""
    assert hsm.ask(Ping()) == Pong()
    pairs = [socket.socketpair() for _ in range(number)]
    socket.send_fds(hsm.wiring, [b"peer"], [end.fileno() for pair in pairs for end in pair[:1]])

    code, _ = hsm.wait()

    assert code == ChildExit.BAD_PEER
    for pair in pairs:
        for end in pair:
            end.close()


def test_a_reader_that_does_not_read_is_not_waited_for(shared: RawHsm) -> None:
    """Egress asks and never reads: the gateway's calls are answered all the same."""
    with shared.connect_egress() as egress:
        egress.settimeout(0)
        frame = encode_frame(
            EgressToHsmFrame(id=1, deadline_boot_time_ns=deadline_after(60), body=CreateDataKey(context=CONTEXT))
        )
        try:
            for _ in range(20_000):
                egress.sendall(frame)
        except BlockingIOError:
            pass

        assert isinstance(shared.ask(Sign(purpose=KeyPurpose.AUDIT, digest=DIGEST)), Signature)


def test_a_slow_reader_gets_every_answer_in_order(shared: RawHsm) -> None:
    """Answers that the kernel does not take at once wait, and go out when the reader goes on."""
    number = 4_000
    frames = [
        encode_frame(EgressToHsmFrame(id=at, deadline_boot_time_ns=deadline_after(90), body=Ping()))
        if at % 2
        else encode_frame(
            EgressToHsmFrame(id=at, deadline_boot_time_ns=deadline_after(90), body=CreateDataKey(context=CONTEXT))
        )
        for at in range(1, number + 1)
    ]
    with shared.connect_egress() as egress, ThreadPoolExecutor(1) as sender:
        sent = sender.submit(egress.sendall, b"".join(frames))
        time.sleep(1.0)
        answers = [msgspec.msgpack.decode(received(egress))["id"] for _ in range(number)]
        sent.result()

    assert answers == list(range(1, number + 1))


# --- the gateway's socket --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deadline_seconds", [0.0, -1.0])
def test_a_request_whose_deadline_has_passed_is_not_worked_on(shared: RawHsm, deadline_seconds: float) -> None:
    """Nobody waits for it any more."""
    answer = shared.ask(Sign(purpose=KeyPurpose.AUDIT, digest=DIGEST), deadline_seconds=deadline_seconds)

    assert (answer.kind, answer.reason) == ("Unavailable", "HSM_UNAVAILABLE")
    assert "deadline" in answer.description


def test_the_root_key_does_not_sign(shared: RawHsm) -> None:
    """Asked past the link, which refuses it too."""
    answer = shared.ask(Sign(purpose=KeyPurpose.ROOT, digest=DIGEST))

    assert (answer.kind, answer.reason) == ("Refused", "METHOD_NOT_ALLOWED")


def test_requests_in_one_piece_are_answered_one_by_one(shared: RawHsm) -> None:
    """Many frames in one write, answers in order."""
    frames = bytearray()
    for number in range(1, 201):
        body = Ping() if number % 2 else Sign(purpose=KeyPurpose.AUDIT, digest=DIGEST)
        frames += encode_frame(GatewayToHsmFrame(id=number, deadline_boot_time_ns=deadline_after(30), body=body))
    shared.gateway.sendall(frames)

    answers = [msgspec.msgpack.decode(received(shared.gateway)) for _ in range(200)]

    assert [answer["id"] for answer in answers] == list(range(1, 201))
    assert {answer["body"]["type"] for answer in answers} == {"Pong", "Signature"}


def test_the_status_shows_what_was_read_back_and_nothing_secret(shared: RawHsm, token: ProvisionedToken) -> None:
    """Keys with their attributes, the token, the master key versions; no PIN."""
    status = shared.ask(GetHsmStatus())

    assert isinstance(status, HsmStatus)
    assert status.token_serial == token.configuration.serial
    assert (status.master_key_versions, status.current_master_key_version) == ((1,), 1)
    assert {key.purpose for key in status.keys} == set(KeyPurpose)
    root = next(key for key in status.keys if key.purpose is KeyPurpose.ROOT)
    assert (root.attributes["EXTRACTABLE"], root.attributes["WRAP"], root.spki_der) == (False, False, b"")
    assert token.configuration.pin_file.read_text() not in repr(status)


def test_a_master_key_record_survives_the_process(token: ProvisionedToken) -> None:
    """Made by one process, loaded by the next: data keys of the first open in the second, by the same root key."""
    with RawHsm(token.settings(), token.environment) as first:
        key = msgspec.structs.replace(first.ask(CreateMasterKey(version=3)).key, current=True)
        first.ask(LoadMasterKeys(keys=(key,)))
        with first.connect_egress() as egress:
            made = first.ask_as_egress(egress, CreateDataKey(context=CONTEXT))
    with RawHsm(token.settings(), token.environment) as second:
        second.ask(LoadMasterKeys(keys=(key,)))
        with second.connect_egress() as egress:
            opened = second.ask_as_egress(egress, OpenDataKey(wrapped=made.wrapped, context=CONTEXT))

    assert bytes(opened.key) == bytes(made.key)


def test_a_damaged_master_key_is_corrupt_and_the_hsm_is_not_blamed(hsm: RawHsm) -> None:
    """SoftHSM says GeneralError for a wrong tag: the known answer tells that it is well, and the process goes on."""
    key = hsm.ask(CreateMasterKey(version=1)).key
    damaged = msgspec.structs.replace(key, current=True, wrapped=key.wrapped[:-1] + bytes([key.wrapped[-1] ^ 1]))

    answer = hsm.ask(LoadMasterKeys(keys=(damaged,)))

    assert (answer.kind, answer.reason) == ("Corrupt", "ENVELOPE_CORRUPT")
    assert isinstance(hsm.ask(Sign(purpose=KeyPurpose.AUDIT, digest=DIGEST)), Signature)


def test_without_a_master_key_egress_is_told_to_wait(hsm: RawHsm) -> None:
    """A fresh process."""
    with hsm.connect_egress() as egress:
        answer = hsm.ask_as_egress(egress, CreateDataKey(context=CONTEXT))

    assert (answer.kind, answer.reason) == ("Unavailable", "HSM_UNAVAILABLE")


def test_the_process_ends_when_the_gateway_closes(hsm: RawHsm) -> None:
    """Exit status 0, and it says why."""
    assert hsm.ask(Ping()) == Pong()
    hsm.gateway.close()

    code, lines = hsm.wait()

    assert code == ChildExit.STOPPED
    assert lines[-1]["event"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_does_not_end_it(shared: RawHsm, number: int) -> None:
    """Ctrl-C or a service manager's stop: the gateway still needs signatures to finish its payments."""
    assert shared.ask(Ping()) == Pong()
    shared.process.send_signal(number)

    assert isinstance(shared.ask(Sign(purpose=KeyPurpose.AUDIT, digest=DIGEST)), Signature)


def test_a_token_that_vanishes_fails_the_call_and_ends_the_process(tmp_path: Path) -> None:
    """Nothing recovers by itself: the caller gets an answer, and a new process is needed."""
    token = ProvisionedToken.make(tmp_path)
    with RawHsm(token.settings(), token.environment) as raw:
        load_first_master_key(raw)
        (token.configuration.directory / "tokens").rename(tmp_path / "gone")
        answer = raw.ask(CreateMasterKey(version=2))
        code, lines = raw.wait()

    assert answer == Failure(kind="Unavailable", reason="HSM_UNAVAILABLE", description="the HSM failed; try again")
    assert code == ChildExit.SICK
    assert [line["event"] for line in lines[-2:]] == ["hsm_fault", "stopped"]


def test_the_process_is_hardened_before_it_is_ready(shared: RawHsm) -> None:
    """The kernel says so: no core file, no new privileges; and the log line names nothing that is missing but capabilities."""
    proc = Path(f"/proc/{shared.process.pid}")

    assert re.search(r"Max core file size\s+0\s+0", (proc / "limits").read_text())
    assert re.search(r"NoNewPrivs:\s+1", (proc / "status").read_text())


# --- what it does not start with -------------------------------------------------------------------------------------------


def refused(
    token: ProvisionedToken, *, keys: Sequence[KeyReference] | None = None, pin_file: Path | None = None
) -> tuple[int, str]:
    with RawHsm(token.settings(keys=keys, pin_file=pin_file), token.environment) as raw:
        code, lines = raw.wait()
    assert lines[-1]["event"] == "start_refused"
    return code, lines[-1]["message"]


class KeyOrder(TypedDict):
    """One key that `tests.fakes.odd_key` is asked to make. Only a secret key has `bits`."""

    kind: Literal["secret", "pair"]
    label: str
    id_hex: str
    attributes: dict[str, bool]
    bits: NotRequired[int]


def secret_key(label: str, *, attributes: dict[str, bool] | None = None, bits: int = 256, id_hex: str = "") -> KeyOrder:
    """A secret key; without `id_hex` under a random id."""
    return KeyOrder(
        kind="secret", label=label, id_hex=id_hex or os.urandom(16).hex(), attributes=attributes or {}, bits=bits
    )


def key_pair(label: str, *, attributes: dict[str, bool] | None = None) -> KeyOrder:
    return KeyOrder(kind="pair", label=label, id_hex=os.urandom(16).hex(), attributes=attributes or {})


WEAK_ROOT = {
    "EXTRACTABLE": True,
    "SENSITIVE": False,
    "WRAP": True,
    "UNWRAP": True,
    "SIGN": True,
    "VERIFY": True,
    "DERIVE": True,
    "MODIFIABLE": True,
    "COPYABLE": True,
    "ENCRYPT": False,
    "DECRYPT": False,
    "PRIVATE": False,
}
WEAK_PAIR = {"EXTRACTABLE": True, "SENSITIVE": False, "DERIVE": True, "DECRYPT": True}
TWIN_ID = os.urandom(16).hex()


@pytest.fixture(scope="module")
def odd(token: ProvisionedToken) -> dict[str, KeyReference]:
    """Keys with odd attributes in the token, by label."""
    keys = [
        *(secret_key(f"weak-{name}/1", attributes={name: value}) for name, value in WEAK_ROOT.items()),
        *(key_pair(f"pair-{name}/1", attributes={name: value}) for name, value in WEAK_PAIR.items()),
        secret_key("small/1", bits=128),
        secret_key("twin/1", id_hex=TWIN_ID),
        secret_key("twin/1", id_hex=TWIN_ID),
        key_pair("document-signing/taken"),
    ]
    configuration = token.configuration
    facts = {"module": configuration.module_path, "serial": configuration.serial, "pin_file": configuration.pin_file}
    subprocess.run(
        [sys.executable, "-m", "tests.fakes.odd_key"],
        input=json.dumps({**{name: str(value) for name, value in facts.items()}, "keys": keys}),
        env=child_environment(token.environment, keep_foreign=True),
        text=True,
        check=True,
        timeout=60,
    )
    purposes = {"secret": KeyPurpose.ROOT, "pair": KeyPurpose.AUDIT}
    return {
        key["label"]: KeyReference(purpose=purposes[key["kind"]], label=key["label"], id_hex=key["id_hex"])
        for key in keys
    }


@pytest.mark.parametrize(("name", "value"), WEAK_ROOT.items())
def test_a_weaker_root_key_in_the_token_is_refused_by_name(
    token: ProvisionedToken, odd: dict[str, KeyReference], name: str, value: bool
) -> None:
    """A real key with one attribute that it must not have: not started, and the message names attribute and key."""
    code, message = refused(token, keys=[odd[f"weak-{name}/1"]])

    assert code == ChildExit.KEY_REFUSED
    assert f"'weak-{name}/1'" in message
    assert f"CKA_{name} is {str(value).lower()} and must be {str(not value).lower()}" in message


def test_a_root_key_of_128_bits_is_refused(token: ProvisionedToken, odd: dict[str, KeyReference]) -> None:
    """AES-256 or nothing."""
    assert refused(token, keys=[odd["small/1"]]) == (
        ChildExit.KEY_REFUSED,
        "the root key 'small/1' is refused: it is not an AES key of 256 bits",
    )


@pytest.mark.parametrize("name", WEAK_PAIR)
def test_a_weaker_signing_key_in_the_token_is_refused_by_name(
    token: ProvisionedToken, odd: dict[str, KeyReference], name: str
) -> None:
    """The same for keys that sign."""
    code, message = refused(token, keys=[reference(token, KeyPurpose.ROOT), odd[f"pair-{name}/1"]])

    assert code == ChildExit.KEY_REFUSED
    assert f"'pair-{name}/1'" in message
    assert f"CKA_{name} is" in message


def test_two_root_keys_with_one_label_and_id_are_refused(token: ProvisionedToken, odd: dict[str, KeyReference]) -> None:
    """The HSM allows it, and then nobody knows which one is meant."""
    code, message = refused(token, keys=[odd["twin/1"]])

    assert code == ChildExit.KEY_REFUSED
    assert "more than one secret key" in message


@pytest.mark.parametrize("change", [{"label": "root/1999-01"}, {"id_hex": "ab" * 16}])
def test_a_missing_key_is_refused(token: ProvisionedToken, change: dict[str, str]) -> None:
    """Label and id must both fit."""
    wrong = msgspec.structs.replace(reference(token, KeyPurpose.ROOT), **change)

    code, message = refused(token, keys=[wrong])

    assert code == ChildExit.KEY_REFUSED
    assert "the token has no secret key with this label and the id" in message


def test_a_wrong_pin_is_refused_with_its_own_code(token: ProvisionedToken, tmp_path: Path) -> None:
    """And the token says afterwards that one was tried."""
    wrong = tmp_path / "pin"
    wrong.write_text("0000-not-it")
    wrong.chmod(0o600)

    code, message = refused(token, pin_file=wrong)
    with RawHsm(token.settings(), token.environment) as raw:
        status = raw.ask(GetHsmStatus())
        raw.gateway.close()
        _, lines = raw.wait()

    assert code == ChildExit.PIN_REFUSED
    assert message == "the token refused the PIN: it was tried once and is not tried again"
    assert status.user_pin_count_low
    assert "pin_count_low" in [line["event"] for line in lines]


def test_a_refused_start_runs_no_finaliser(token: ProvisionedToken, tmp_path: Path) -> None:
    """A vendor's module may hang on the way out: the process ends at once, with its code and its reason."""
    wrong = tmp_path / "pin"
    wrong.write_text("0000-not-it")
    wrong.chmod(0o600)
    gateway, gateway_of_child = socket.socketpair()
    wiring, wiring_of_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    settings = tmp_path / "settings"
    settings.write_bytes(msgspec.json.encode(token.settings(pin_file=wrong)))
    program = (
        "import atexit, os, time\n"
        "from sidecar.hsm.process import run\n"
        "atexit.register(time.sleep, 600)\n"
        f"settings = os.open({str(settings)!r}, os.O_RDONLY)\n"
        f"run(settings_fd=settings, gateway_fd={gateway_of_child.fileno()},"
        f" wiring_fd={wiring_of_child.fileno()}, parent_pid=os.getppid())\n"
    )

    with gateway, gateway_of_child, wiring, wiring_of_child:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=child_environment(token.environment, keep_foreign=True),
            pass_fds=(gateway_of_child.fileno(), wiring_of_child.fileno()),
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )

    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == ChildExit.PIN_REFUSED
    assert [line["event"] for line in lines] == ["log_in", "start_refused"]
    assert lines[-1]["exit_code"] == ChildExit.PIN_REFUSED


def test_the_one_try_of_the_pin_is_announced(hsm: RawHsm) -> None:
    """By its last line before the end the supervisor knows whether a process died while the PIN was tried."""
    assert hsm.ask(Ping()) == Pong()
    hsm.gateway.close()
    _, lines = hsm.wait()

    assert [line["event"] for line in lines if "log" in line["event"]] == ["log_in", "logged_in"]


def test_an_open_pin_file_is_refused_without_a_login(token: ProvisionedToken, tmp_path: Path) -> None:
    """Others may read it: the PIN is not even tried."""
    loose = tmp_path / "pin"
    loose.write_bytes(token.configuration.pin_file.read_bytes())
    loose.chmod(0o644)

    code, message = refused(token, pin_file=loose)

    assert code == ChildExit.PIN_FILE_REFUSED
    assert "others than its owner" in message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"token_label": "another"}, ChildExit.UNREACHABLE),
        ({"token_serial": "0000"}, ChildExit.UNREACHABLE),
        ({"module_path": "/nowhere/module.so"}, ChildExit.SETTINGS_REFUSED),
        ({"module_path": "/dev/null"}, ChildExit.SETTINGS_REFUSED),
        ({"keys": ()}, ChildExit.SETTINGS_REFUSED),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    token: ProvisionedToken, change: dict[str, object], code: ChildExit
) -> None:
    """One clear line each, and no login."""
    settings = msgspec.structs.replace(token.settings(), **change)
    with RawHsm(settings, token.environment) as raw:
        found, lines = raw.wait()

    assert (found, lines[-1]["event"]) == (code, "start_refused")


@pytest.mark.parametrize("document", [b"", b"{}", b"[]", b'{"cluster": 1}', b"\xff", b"null"])
def test_settings_that_do_not_parse_are_refused(token: ProvisionedToken, document: bytes) -> None:
    """Nothing is guessed."""
    with RawHsm(document, token.environment) as raw:
        code, lines = raw.wait()

    assert code == ChildExit.SETTINGS_REFUSED
    assert len(lines) == 1


# --- provisioning ----------------------------------------------------------------------------------------------------------


def test_provisioning_makes_one_key_of_each_purpose(token: ProvisionedToken) -> None:
    """Labels as documented, random ids, public keys for those that sign, and nothing secret in the file."""
    file = token.key_file

    assert {key.purpose: key.label for key in file.keys} == {purpose: f"{purpose}/2026-11" for purpose in KeyPurpose}
    assert len({key.id_hex for key in file.keys}) == len(KeyPurpose)
    assert all(re.fullmatch("[0-9a-f]{32}", key.id_hex) for key in file.keys)
    assert all(bool(key.spki_der) is (key.purpose is not KeyPurpose.ROOT) for key in file.descriptions)
    assert (file.token_label, file.token_serial) == ("custody-tests", token.configuration.serial)


def test_provisioning_refuses_where_a_label_is_taken_and_makes_nothing(token: ProvisionedToken, tmp_path: Path) -> None:
    """The second run with the same suffix: no key, no file."""
    done = provision(token.configuration, output=tmp_path / "again.json")

    assert done.returncode == ChildExit.KEY_REFUSED
    assert "'root/2026-11' already" in done.stderr
    assert not (tmp_path / "again.json").exists()


@pytest.mark.usefixtures("odd")
def test_provisioning_with_one_label_taken_leaves_no_other_key(token: ProvisionedToken, tmp_path: Path) -> None:
    """All or none: an object with the last label, and the first is not made either."""
    first = provision(token.configuration, output=tmp_path / "one.json", suffix="taken")
    second = provision(token.configuration, output=tmp_path / "two.json", suffix="taken")

    assert first.returncode == second.returncode == ChildExit.KEY_REFUSED
    assert "'document-signing/taken' already" in first.stderr
    assert "'document-signing/taken' already" in second.stderr


def test_provisioning_never_replaces_a_file(token: ProvisionedToken, tmp_path: Path) -> None:
    """Where the output exists no key is made."""
    (tmp_path / "keys.json").write_text("mine")

    done = provision(token.configuration, output=tmp_path / "keys.json", suffix="unused")
    again = provision(token.configuration, output=tmp_path / "other.json", suffix="unused")

    assert done.returncode == ChildExit.SETTINGS_REFUSED
    assert (tmp_path / "keys.json").read_text() == "mine"
    assert again.returncode == 0, again.stderr


def test_provisioning_with_a_wrong_pin_says_so_once(tmp_path: Path) -> None:
    """Same rules as the process: one try, its own code, no PIN in any output."""
    configuration = create_token(tmp_path / "token", label="custody-tests")
    configuration.pin_file.write_text("0000-not-it")

    done = provision(configuration, output=tmp_path / "keys.json")

    assert done.returncode == ChildExit.PIN_REFUSED
    assert done.stderr == "No key was made: the token refused the PIN: it was tried once and is not tried again.\n"
    assert not (tmp_path / "keys.json").exists()


# --- inspection ------------------------------------------------------------------------------------------------------------


def inspect(token: ProvisionedToken, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "sidecar.hsm.inspect", *arguments],
        env=child_environment(token.environment, keep_foreign=True),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_slots_are_listed_without_a_login(token: ProvisionedToken) -> None:
    """The token with its label, serial and flags; the empty slot too."""
    done = inspect(token, "slots", "--module", str(token.configuration.module_path))

    slots = json.loads(done.stdout)
    mine = [slot for slot in slots if slot["token_serial"] == token.configuration.serial]
    assert [slot["token_label"] for slot in mine] == ["custody-tests"]
    assert "USER_PIN_INITIALIZED" in mine[0]["flags"]
    assert len(slots) == 2


def test_the_test_command_proves_every_key_as_a_start_would(
    token: ProvisionedToken, odd: dict[str, KeyReference], tmp_path: Path
) -> None:
    """Good keys: shown. A weak one: refused with the same code and words as the process."""
    settings = tmp_path / "settings.json"
    settings.write_bytes(msgspec.json.encode(token.settings()))
    good = inspect(token, "test", "--settings", str(settings))
    settings.write_bytes(msgspec.json.encode(token.settings(keys=[odd["weak-WRAP/1"]])))
    weak = inspect(token, "test", "--settings", str(settings))

    assert good.returncode == 0, good.stderr
    assert {key["purpose"] for key in json.loads(good.stdout)["keys"]} == {purpose.value for purpose in KeyPurpose}
    assert weak.returncode == ChildExit.KEY_REFUSED
    assert "CKA_WRAP is true and must be false" in weak.stderr


# --- what is left in memory ------------------------------------------------------------------------------------------------


def memory_holds(pid: int, secrets: list[bytes]) -> list[bool]:
    """Whether each secret occurs in any readable mapping of the process. Needs root: the process is not dumpable."""
    found = [False] * len(secrets)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            if not rights.startswith("r") or "[v" in line:
                continue
            start, end = (int(text, 16) for text in span.split("-"))
            memory.seek(start)
            try:
                content = memory.read(end - start)
            except OSError:
                continue
            found = [before or secret in content for before, secret in zip(found, secrets, strict=True)]
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into the process")
def test_neither_pin_nor_data_keys_are_left_in_memory(token: ProvisionedToken) -> None:
    """After login and 50 openings, no copy of the PIN and none of any data key; the positive control is found."""
    control = b"consent-control-" + os.urandom(8).hex().encode()
    keys: list[bytes] = []
    with RawHsm(token.settings(), {**token.environment, "CONTROL": control.decode()}) as raw:
        load_first_master_key(raw)
        with raw.connect_egress() as egress:
            for number in range(25):
                context = SecretContext(cluster=CLUSTER, owner="owner-1", consent=f"consent-{number}")
                made = raw.ask_as_egress(egress, CreateDataKey(context=context))
                raw.ask_as_egress(egress, OpenDataKey(wrapped=made.wrapped, context=context))
                keys.append(bytes(made.key))
            pin = token.configuration.pin_file.read_bytes()
            time.sleep(0.1)
            found = memory_holds(raw.process.pid, [control, pin, *keys, *(key[:16] for key in keys)])

    assert found[0], "the scan finds nothing at all"
    assert not any(found[1:])
