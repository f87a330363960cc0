"""`python -m sidecar.hsm --settings-fd N --gateway-fd N --wiring-fd N`: hardens itself, opens the HSM, serves.

Ends when the gateway closes its socket, and says in one line on standard error why it ended. Exit codes: `ChildExit`.
"""

import os
import sys
from argparse import ArgumentParser, Namespace


def main() -> int:
    options = _options()
    parent_pid = os.getppid()
    # What is imported below may fail on a broken installation: that too is one line, not a traceback.
    try:
        from sidecar.hsm.process import run
    except ImportError as error:
        sys.stderr.write(f'{{"level": "error", "process": "hsm", "message": "cannot import {error.name}"}}\n')
        return 1
    return run(
        settings_fd=options.settings_fd,
        gateway_fd=options.gateway_fd,
        wiring_fd=options.wiring_fd,
        parent_pid=parent_pid,
    )


def _options() -> Namespace:
    parser = ArgumentParser(prog="python -m sidecar.hsm", description="The hsm process. Started by the gateway.")
    for name, what in (("settings", "HsmSettings as JSON"), ("gateway", "the gateway"), ("wiring", "egress's sockets")):
        parser.add_argument(
            f"--{name}-fd", type=int, required=True, metavar="N", help=f"inherited descriptor of {what}"
        )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
