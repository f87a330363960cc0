"""The hsm process's two sockets in this process, with keys that only keep a record: who is served when."""

import socket
import threading
from itertools import groupby
from typing import cast

from sidecar.domain.provider import KeyPurpose
from sidecar.domain.secrets import SecretContext
from sidecar.errors import Corrupt
from sidecar.hsm import server
from sidecar.hsm.server import HsmServer
from sidecar.hsm.vault import Vault
from sidecar.ipc.frames import deadline_after, encode_frame
from sidecar.ipc.messages import (
    ChildExit,
    EgressToHsm,
    EgressToHsmFrame,
    GatewayToHsmFrame,
    GetHsmStatus,
    HsmStatus,
    HsmToEgressFrame,
    HsmToGatewayFrame,
    OpenDataKey,
    Sign,
    decoder_for,
)
from tests.fakes.token import received

NUMBER = 100
OPEN: EgressToHsm = OpenDataKey(wrapped=b"w", context=SecretContext(cluster="c", owner="o", consent="x"))


class Recording:
    """Stands for the vault and for the signing key."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def sign(self, digest: bytes) -> bytes:
        self.order.append("gateway")
        return digest * 2

    def open_data_key(self, wrapped: bytes, context: SecretContext, into: memoryview) -> None:
        self.order.append("egress")
        raise Corrupt("ENVELOPE_CORRUPT", "there are no keys here")


def _no_status() -> HsmStatus:
    raise AssertionError(f"nobody asks {GetHsmStatus.__name__}")


def test_a_full_socket_does_not_keep_the_other_waiting() -> None:
    """A hundred requests lie in each socket: they are answered in turns of a few, in order, and none is forgotten."""
    gateway, gateway_of_hsm = socket.socketpair()
    wiring, wiring_of_hsm = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    egress, egress_of_hsm = socket.socketpair()
    deadline = deadline_after(60)
    for at in range(1, NUMBER + 1):
        sign = Sign(purpose=KeyPurpose.AUDIT, digest=bytes(32))
        gateway.sendall(encode_frame(GatewayToHsmFrame(id=at, deadline_boot_time_ns=deadline, body=sign)))
        egress.sendall(encode_frame(EgressToHsmFrame(id=at, deadline_boot_time_ns=deadline, body=OPEN)))
    recording = Recording()
    with gateway, gateway_of_hsm, wiring, wiring_of_hsm, egress:
        with egress_of_hsm:
            socket.send_fds(wiring, [b"peer"], [egress_of_hsm.fileno()])
        hsm = HsmServer(
            gateway=gateway_of_hsm,
            wiring=wiring_of_hsm,
            vault=cast(Vault, recording),
            root_key_id="00",
            signing_keys={KeyPurpose.AUDIT: recording},
            status=_no_status,
        )
        ends: list[ChildExit] = []
        running = threading.Thread(target=lambda: ends.append(hsm.run()), daemon=True)
        running.start()
        for end in (gateway, egress):
            end.settimeout(20)
        of_gateway, of_egress = decoder_for(HsmToGatewayFrame), decoder_for(HsmToEgressFrame)
        signed = [of_gateway.decode(received(gateway)).id for _ in range(NUMBER)]
        opened = [of_egress.decode(received(egress)).id for _ in range(NUMBER)]
        gateway.close()
        running.join(20)

    turns = [len(list(turn)) for _, turn in groupby(recording.order)]
    assert signed == opened == list(range(1, NUMBER + 1))
    # Two turns of one socket may follow each other at the start, before the other one is known, and at the end.
    assert max(turns[1:-1]) == server._FRAMES_PER_TURN < NUMBER / 10
    assert max(turns) <= 2 * server._FRAMES_PER_TURN
    assert ends == [ChildExit.STOPPED]
