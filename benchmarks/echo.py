"""The baseline for calls: a bare gRPC echo on the kind of server that the gateway is (grpc.aio, uvloop, Unix socket).

The first four bytes of a message say how long the answer is to be. Nothing is parsed, checked, counted or written.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc
import grpc.aio

from benchmarks.workers import Work, serve

__all__ = ["main"]

_Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"  # generic in the stubs only


async def main(arguments: Sequence[str]) -> tuple[dict[str, Any], Work]:
    (address,) = arguments
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {"Echo": handler}),))
    server.add_insecure_port(address)
    await server.start()

    async def work(command: dict[str, Any]) -> dict[str, Any]:
        """Ends the server; to take part in this also keeps it from being collected."""
        assert command == {"work": "stop"}
        await server.stop(None)
        return {}

    return {}, work


async def _echo(request: bytes, context: _Context) -> bytes:  # noqa: ARG001 (gRPC passes it)
    return bytes(int.from_bytes(request[:4], "big"))


if __name__ == "__main__":
    serve(main)
