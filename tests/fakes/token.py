"""A SoftHSM token with the sidecar's keys, and the real hsm process on bare sockets. For tests that need the real thing."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from sidecar.gateway.supervisor import child_environment
from sidecar.hsm.provisioning import KeyFile
from sidecar.ipc.frames import HEADER, deadline_after, encode_frame, frame_length
from sidecar.ipc.messages import (
    EgressToHsmFrame,
    GatewayToHsmFrame,
    HsmSettings,
    HsmToEgressFrame,
    HsmToGatewayFrame,
    KeyReference,
    Message,
    decoder_for,
)
from softhsm.setup import TokenConfiguration, create_token

__all__ = ["CLUSTER", "ProvisionedToken", "RawHsm", "provision"]

CLUSTER = "cluster-of-tests"
_DEADLINE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionedToken:
    """A token in its own directory, with one key of each purpose."""

    configuration: TokenConfiguration
    key_file: KeyFile

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.configuration.environment()}

    def settings(self, *, keys: Sequence[KeyReference] | None = None, pin_file: Path | None = None) -> HsmSettings:
        return HsmSettings(
            cluster=CLUSTER,
            module_path=str(self.configuration.module_path),
            token_label=self.configuration.token_label,
            token_serial=self.configuration.serial,
            pin_file=str(pin_file or self.configuration.pin_file),
            keys=self.key_file.keys if keys is None else tuple(keys),
        )

    @classmethod
    def make(cls, directory: Path) -> Self:
        """Makes token and keys in `directory`, with the commands that an operator uses."""
        configuration = create_token(directory / "token", label="custody-tests")
        done = provision(configuration, output=directory / "keys.json")
        assert done.returncode == 0, done.stderr
        key_file = msgspec.json.decode((directory / "keys.json").read_bytes(), type=KeyFile)
        return cls(configuration=configuration, key_file=key_file)


def provision(
    configuration: TokenConfiguration, *, output: Path, suffix: str = "2026-11"
) -> "subprocess.CompletedProcess[str]":
    """Runs the provisioning command."""
    command = [sys.executable, "-m", "sidecar.hsm.provisioning"]
    options = {
        "--module": str(configuration.module_path),
        "--token-label": configuration.token_label,
        "--token-serial": configuration.serial,
        "--pin-file": str(configuration.pin_file),
        "--output": str(output),
        "--suffix": suffix,
    }
    return subprocess.run(
        [*command, *(text for pair in options.items() for text in pair)],
        env=child_environment({**os.environ, **configuration.environment()}, keep_foreign=True),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class RawHsm:
    """The hsm process with our ends of its sockets, for asking it what its links never would."""

    def __init__(self, settings: HsmSettings | bytes, environment: dict[str, str]) -> None:
        self.gateway, gateway_of_child = socket.socketpair()
        self.wiring, wiring_of_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.gateway.settimeout(_DEADLINE_SECONDS)
        self._ids = 0
        document = settings if isinstance(settings, bytes) else msgspec.json.encode(settings)
        settings_fd = os.memfd_create("settings")
        os.write(settings_fd, document)
        os.lseek(settings_fd, 0, os.SEEK_SET)
        descriptors = (settings_fd, gateway_of_child.fileno(), wiring_of_child.fileno())
        names = ("--settings-fd", "--gateway-fd", "--wiring-fd")
        arguments = [text for name, number in zip(names, descriptors, strict=True) for text in (name, str(number))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sidecar.hsm", *arguments],
            env=child_environment(environment, keep_foreign=True),
            pass_fds=descriptors,
            stderr=subprocess.PIPE,
        )
        os.close(settings_fd)
        gateway_of_child.close()
        wiring_of_child.close()

    def ask(self, body: Message, *, deadline_seconds: float = _DEADLINE_SECONDS) -> Any:
        """Over the gateway's socket."""
        return self.exchange(self.gateway, GatewayToHsmFrame, HsmToGatewayFrame, body, deadline_seconds)

    def ask_as_egress(self, peer: socket.socket, body: Message, *, deadline_seconds: float = _DEADLINE_SECONDS) -> Any:
        return self.exchange(peer, EgressToHsmFrame, HsmToEgressFrame, body, deadline_seconds)

    def exchange(self, peer: socket.socket, request: Any, answer: Any, body: Message, deadline_seconds: float) -> Any:
        self._ids += 1
        frame = request(id=self._ids, deadline_boot_time_ns=deadline_after(deadline_seconds), body=body)
        peer.sendall(encode_frame(frame))
        envelope = decoder_for(answer).decode(received(peer))
        assert envelope.id == self._ids
        return envelope.body

    def connect_egress(self) -> socket.socket:
        ours, of_child = socket.socketpair()
        ours.settimeout(_DEADLINE_SECONDS)
        with of_child:
            socket.send_fds(self.wiring, [b"peer"], [of_child.fileno()])
        return ours

    def wait(self) -> tuple[int, list[dict[str, Any]]]:
        """The exit code and the log lines."""
        _, errors = self.process.communicate(timeout=_DEADLINE_SECONDS)
        return self.process.returncode, [msgspec.json.decode(line) for line in errors.splitlines()]

    def close(self) -> None:
        self.gateway.close()
        self.wiring.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=_DEADLINE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def received(peer: socket.socket) -> bytes:
    """One frame's document. Raises EOFError when the peer has closed."""
    header = _exactly(peer, HEADER.size)
    return _exactly(peer, frame_length(header))


def _exactly(peer: socket.socket, length: int) -> bytes:
    octets = b""
    while len(octets) < length:
        part = peer.recv(length - len(octets))
        if not part:
            raise EOFError
        octets += part
    return octets
