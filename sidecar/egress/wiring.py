"""The wiring socket: over it the supervisor hands egress its end of a new socket pair to hsm, at start and after every
restart of hsm (SCM_RIGHTS, one descriptor in each message)."""

import asyncio
import os
import socket
from collections.abc import Callable

from sidecar.egress.log import log

__all__ = ["Wiring"]

_MAX_DESCRIPTORS = 4


class Wiring:
    def __init__(self, *, channel: socket.socket, wire: Callable[[socket.socket], None]) -> None:
        channel.settimeout(0)
        self._channel = channel
        self._wire = wire

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._receive)

    def close(self) -> None:
        if self._channel.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()

    def _receive(self) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._channel, 16, _MAX_DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError:
            message, descriptors = b"", []
        if len(descriptors) == 1:
            self._take(descriptors[0])
            return
        for descriptor in descriptors:
            os.close(descriptor)
        if not message:
            self.close()  # the supervisor is gone; the gateway's socket tells the rest
        else:
            log("error", "bad_wiring", "a wiring message carried another number of descriptors than one")

    def _take(self, descriptor: int) -> None:
        try:
            peer = socket.socket(fileno=descriptor)
        except OSError:
            os.close(descriptor)
            log("error", "bad_wiring", "a wiring message carried a descriptor that is no socket")
            return
        if peer.family != socket.AF_UNIX or peer.type != socket.SOCK_STREAM:
            peer.close()
            log("error", "bad_wiring", "a wiring message carried another kind of socket")
            return
        self._wire(peer)
