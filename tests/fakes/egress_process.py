"""A stand-in for the egress process, with the same arguments and the same frames, and no network.

`python -m tests.fakes.egress_process --settings-fd N --gateway-fd N --wiring-fd N`. What a request does is in its target:
`/die` ends the process, `/hang` never answers, `/late` answers after a second, `/lose-hsm` closes the socket to hsm,
anything else answers 200 with the target as body.
NewSecrets asks the hsm process for a data key, which proves that the two are wired to each other.
"""

import argparse
import os
import selectors
import socket
import sys
import time

from sidecar.domain.provider import ProviderRequest
from sidecar.ipc.frames import HEADER, deadline_after, encode_frame, frame_length
from sidecar.ipc.messages import (
    Answered,
    Call,
    CreateDataKey,
    DataKeyCreated,
    Discard,
    Done,
    EgressStatus,
    EgressToGateway,
    EgressToGatewayFrame,
    EgressToHsmFrame,
    Failure,
    Forget,
    GatewayToEgress,
    GatewayToEgressFrame,
    GetEgressStatus,
    HsmToEgressFrame,
    NewSecrets,
    NewSecretsMade,
    Ping,
    Pong,
    Prepare,
    PreparedHandle,
    Send,
    decoder_for,
)


class StandIn:
    def __init__(self, gateway: socket.socket, wiring: socket.socket) -> None:
        self.gateway = gateway
        self.wiring = wiring
        self.hsm: socket.socket | None = None
        self.prepared: dict[int, ProviderRequest] = {}
        self.handles = 0

    def run(self) -> None:
        decoder = decoder_for(GatewayToEgressFrame)
        with selectors.DefaultSelector() as selector:
            selector.register(self.gateway, selectors.EVENT_READ)
            selector.register(self.wiring, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self.wiring:
                        self.take_peer()
                        continue
                    request = decoder.decode(read_frame(self.gateway))
                    answer = self.answer(request.body)
                    if answer is not None:
                        self.gateway.sendall(encode_frame(EgressToGatewayFrame(id=request.id, body=answer)))

    def take_peer(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self.wiring, 64, 1)
        if not message:
            sys.exit(0)
        if self.hsm is not None:
            self.hsm.close()
        self.hsm = socket.socket(fileno=descriptors[0])
        self.hsm.settimeout(5)

    def answer(self, body: GatewayToEgress) -> EgressToGateway | None:
        match body:
            case Ping():
                return Pong()
            case GetEgressStatus():
                return EgressStatus(cached_data_keys=0, prepared=len(self.prepared), hsm_connected=self.hsm is not None)
            case NewSecrets():
                return self.new_secrets(body)
            case Prepare():
                self.handles += 1
                self.prepared[self.handles] = body.request
                if body.request.target == "/prepare-late":
                    time.sleep(1)
                return PreparedHandle(handle=self.handles)
            case Discard():
                self.prepared.pop(body.handle, None)
                return Done()
            case Call():
                if body.request.target == "/lose-hsm" and self.hsm is not None:
                    self.hsm.close()
                    self.hsm = None
                return act(body.request)
            case Send():
                return act(self.prepared.pop(body.handle))
            case Forget():
                return Done()
            case _:
                return Failure(kind="Unavailable", reason="PROVIDER_UNAVAILABLE", description="not in the stand-in")

    def new_secrets(self, body: NewSecrets) -> EgressToGateway:
        unavailable = Failure(kind="Unavailable", reason="HSM_UNAVAILABLE", description="no hsm")
        if self.hsm is None:
            return unavailable
        question = CreateDataKey(context=body.context)
        try:
            self.hsm.sendall(
                encode_frame(EgressToHsmFrame(id=1, deadline_boot_time_ns=deadline_after(5), body=question))
            )
            made = decoder_for(HsmToEgressFrame).decode(read_frame(self.hsm)).body
        except OSError:
            return unavailable
        if not isinstance(made, DataKeyCreated):
            return unavailable
        return NewSecretsMade(wrapped_data_key=made.wrapped, pkce_verifier=b"sealed", code_challenge="challenge")


def act(request: ProviderRequest) -> EgressToGateway | None:
    if request.target == "/die":
        os._exit(1)
    if request.target == "/hang":
        return None
    if request.target == "/late":
        time.sleep(1)
    return Answered(status=200, headers=(), body=request.target.encode())


def read_frame(peer: socket.socket) -> bytes:
    return exactly(peer, frame_length(exactly(peer, HEADER.size)))


def exactly(peer: socket.socket, length: int) -> bytes:
    octets = b""
    while len(octets) < length:
        part = peer.recv(length - len(octets))
        if not part:
            if peer.family == socket.AF_UNIX and not octets:
                raise ConnectionResetError
            raise EOFError
        octets += part
    return octets


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("settings", "gateway", "wiring"):
        parser.add_argument(f"--{name}-fd", type=int, required=True)
    options = parser.parse_args()
    os.close(options.settings_fd)
    stand_in = StandIn(socket.socket(fileno=options.gateway_fd), socket.socket(fileno=options.wiring_fd))
    try:
        stand_in.run()
    except ConnectionResetError:
        sys.exit(0)


if __name__ == "__main__":
    main()
