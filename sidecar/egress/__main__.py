"""python -m sidecar.egress --settings-fd N --gateway-fd N --wiring-fd N

Started by the supervisor only. The settings (JSON, EgressSettings) are read once, to the end of their descriptor; the
gateway's socket is a stream socket; over the wiring socket (SOCK_SEQPACKET) come the sockets to hsm.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys

import msgspec
import uvloop

from sidecar.egress.datakeys import DataKeys
from sidecar.egress.hsmlink import HsmLink
from sidecar.egress.log import log
from sidecar.egress.origins import Origins
from sidecar.egress.server import GatewayServer
from sidecar.egress.service import Egress
from sidecar.egress.wiring import Wiring
from sidecar.errors import CustodyError
from sidecar.hardening import ParentGone, give_back_freed_memory, harden
from sidecar.ipc.messages import ChildExit, EgressSettings

__all__ = ["main"]

_MAX_SETTINGS_BYTES = 1024 * 1024


def main() -> ChildExit:
    arguments = _arguments()
    # Ctrl-C and a service manager's stop go to the whole group; the gateway finishes its payments and then ends its children.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        posture = harden(parent_pid=os.getppid())
    except ParentGone:
        return ChildExit.STOPPED
    # Names of constants; what is missing here is the supervisor's and the operator's business.
    log("info", "starting", "egress starts", missing_hardening=",".join(posture.missing()))
    try:
        settings = _read_settings(arguments.settings_fd)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        log("error", "settings_refused", "the settings cannot be read", exit_code=int(ChildExit.SETTINGS_REFUSED))
        return ChildExit.SETTINGS_REFUSED
    # TLS is driven by our own code (connection.py), so uvloop keeps no plaintext back either.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(settings, arguments.gateway_fd, arguments.wiring_fd))


async def _run(settings: EgressSettings, gateway_fd: int, wiring_fd: int) -> ChildExit:
    asyncio.get_running_loop().set_exception_handler(_log_loop_error)
    try:
        origins = Origins(settings)
    except (OSError, ValueError, CustodyError) as error:
        reason = "a provider's transport cannot be set up: origin, CA file or client certificate"
        refusal = int(ChildExit.SETTINGS_REFUSED)
        log("error", "settings_refused", reason, error_class=type(error).__name__, exit_code=refusal)
        return ChildExit.SETTINGS_REFUSED
    hsm = HsmLink()
    keys = DataKeys(hsm=hsm, cache_seconds=settings.data_key_cache_seconds, cache_size=settings.data_key_cache_size)
    egress = Egress(
        cluster=settings.cluster,
        origins=origins,
        keys=keys,
        max_answer_bytes=settings.max_answer_bytes,
        hsm_connected=lambda: hsm.connected,
    )
    wiring = Wiring(channel=socket.socket(fileno=wiring_fd), wire=hsm.wire)
    wiring.start()
    give_back_freed_memory()
    try:
        return await _serve(egress, gateway_fd)
    finally:
        wiring.close()
        await hsm.close()
        await egress.close()


async def _serve(egress: Egress, gateway_fd: int) -> ChildExit:
    gateway = socket.socket(fileno=gateway_fd)
    gateway.settimeout(0)
    server = GatewayServer(egress)
    await asyncio.get_running_loop().create_unix_connection(lambda: server, sock=gateway)
    try:
        ended_by_gateway = await server.ended
    finally:
        await server.close()
    return ChildExit.STOPPED if ended_by_gateway else ChildExit.BAD_PEER


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    # The default handler prints reprs of whatever was at hand.
    log(
        "error",
        "loop_defect",
        "an unexpected error in the event loop",
        error_class=type(context.get("exception")).__name__,
    )


def _read_settings(descriptor: int) -> EgressSettings:
    with open(descriptor, "rb") as source:
        document = source.read(_MAX_SETTINGS_BYTES)
    return msgspec.json.decode(document, type=EgressSettings)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sidecar.egress", allow_abbrev=False)
    for name in ("--settings-fd", "--gateway-fd", "--wiring-fd"):
        parser.add_argument(name, type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
