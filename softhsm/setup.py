"""The development HSM's interface, for the main job and for tests; as a command it finds or fetches SoftHSM and can make a token.

    python -m softhsm.setup                                  print the module's path
    python -m softhsm.setup --token DIRECTORY --label NAME   make a token there, or show the one that is there

The keys in the token are made by the sidecar's own provisioning, not here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from softhsm.errors import ModuleMissingError, SoftHsmError, TokenRefusedError
from softhsm.module import ensure_module, find_module, softhsm2_util
from softhsm.token import TokenConfiguration, create_token, ensure_token, open_token

__all__ = [
    "ModuleMissingError",
    "SoftHsmError",
    "TokenConfiguration",
    "TokenRefusedError",
    "create_token",
    "ensure_module",
    "ensure_token",
    "find_module",
    "main",
    "open_token",
    "softhsm2_util",
]


def main(arguments: list[str] | None = None) -> int:
    """0: done. 1: it cannot be done, and standard error says why."""
    options = _parser().parse_args(arguments)
    try:
        for line in _answer(options.token, options.label):
            sys.stdout.write(f"{line}\n")
    except SoftHsmError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _answer(directory: Path | None, label: str) -> list[str]:
    if directory is None:
        return [str(ensure_module())]
    token = ensure_token(directory, label=label)
    return [
        f"module         {token.module_path}",
        f"SOFTHSM2_CONF  {token.softhsm2_conf}",
        f"token          {token.token_label}",
        f"serial         {token.serial}",
        f"user PIN       {token.pin_file}",
        f"SO PIN         {token.so_pin_file}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m softhsm.setup", description="Find or fetch SoftHSM; make a token.")
    parser.add_argument(
        "--token", type=Path, metavar="DIRECTORY", help="make a token in this directory, or show the one there"
    )
    parser.add_argument("--label", default="custody-dev", help="the token's label (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
