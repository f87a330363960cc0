"""`python -m sidecar --config FILE [--NAME=VALUE …]`: runs the sidecar until SIGTERM, SIGINT or SIGHUP.

Exit status: 0 stopped as told; 1 a defect; 2 the configuration is wrong; 5 the HSM, the database or a child process cannot be used.
"""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

# Before anything loads gRPC or TLS: these make libraries write what they carry to files and logs (hardening).
for _name in [name for name in os.environ if name.startswith("GRPC_") or name == "SSLKEYLOGFILE"]:
    del os.environ[_name]
os.environ["GRPC_VERBOSITY"] = "NONE"  # its lines are no JSON and name foreign addresses; ours say what matters

import uvloop  # noqa: E402

from sidecar.config import Configuration, ConfigurationError, load_configuration, scalar_names  # noqa: E402
from sidecar.errors import CustodyError  # noqa: E402
from sidecar.gateway.supervisor import ChildRefused  # noqa: E402
from sidecar.hardening import harden  # noqa: E402
from sidecar.telemetry.logging import Level, Log  # noqa: E402
from sidecar.wiring import Sidecar  # noqa: E402

__all__ = ["main"]

EXIT_DEFECT = 1
EXIT_CONFIGURATION = 2
EXIT_UNREACHABLE = 5


def main() -> int:
    """The exit status."""
    options = _parser().parse_args()
    flags = {name: value for name in scalar_names() if (value := getattr(options, name)) is not None}
    try:
        configuration = load_configuration(Path(options.config), flags=flags, environment=os.environ)
        harden()
        uvloop.run(_run(configuration), debug=False)  # debug mode writes arguments of callbacks to stderr
    except ConfigurationError as error:
        for mistake in error.mistakes:
            print(f"configuration: {mistake}", file=sys.stderr)
        return EXIT_CONFIGURATION
    except (ChildRefused, CustodyError) as error:
        print(f"the sidecar cannot run: {error}", file=sys.stderr)
        return EXIT_UNREACHABLE
    except Exception as error:  # noqa: BLE001 - its text may be foreign, and is said nowhere: only its class and place
        Log(process="gateway").exception("sidecar_failed", error)
        return EXIT_DEFECT
    return 0


async def _run(configuration: Configuration) -> None:
    log = Log(process="gateway", level=Level[configuration.log.level.upper()])
    sidecar = Sidecar(configuration=configuration, log=log)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, sidecar.stop)
    try:
        await sidecar.run()
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of ours in a group, which is what the operator needs to read."""
    ours = group.subgroup((ChildRefused, ConfigurationError, CustodyError))
    error: BaseException = ours or group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="token-custody-sidecar", description="The token custody sidecar.")
    parser.add_argument("--config", required=True, help="the configuration file (docs/configuration.md)")
    for name in scalar_names():
        parser.add_argument(f"--{name}", dest=name, metavar="VALUE", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
