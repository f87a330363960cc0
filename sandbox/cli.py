"""`python -m sandbox init | serve`."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sandbox.directory import DirectoryError, Layout, initialise
from sandbox.options import Options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0 done, 1 it could not be done, 2 it was asked wrongly."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "init":
            _init(options)
        else:
            _serve(options)
    except (DirectoryError, OSError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    return 0


def _init(options: argparse.Namespace) -> None:
    try:
        jwks = json.loads(options.client_jwks.read_text())
    except ValueError as error:
        raise DirectoryError(f"{options.client_jwks} is not JSON: {error}") from error
    if not isinstance(jwks, dict):
        raise DirectoryError(f"{options.client_jwks} is not a key set (RFC 7517)")
    initialise(
        options.directory,
        client_id=options.client_id,
        client_jwks=jwks,
        request_signing_public_key_pem=options.request_signing_public_key.read_bytes(),
        redirect_uris=options.redirect_uri,
    )
    print(
        f"the sandbox in {options.directory} is ready; start it with: python -m sandbox serve --directory {options.directory}"
    )


def _serve(options: argparse.Namespace) -> None:
    from sandbox.server import run  # here, because `init` need not wait for a web server to be loaded

    run(Layout(root=options.directory), _serve_options(options))


def _serve_options(options: argparse.Namespace) -> Options:
    return Options(
        port=options.port,
        browser_port=options.browser_port,
        control_port=options.control_port,
        idempotency=options.idempotency,
        idempotency_window_seconds=options.idempotency_window_seconds,
        payment_lookup=options.payment_lookup,
        signature=options.signature,
        access_token_seconds=options.access_token_seconds,
        token_prefix=options.token_prefix,
        frequency_per_day=options.frequency_per_day,
        delay_seconds=options.delay_seconds,
        duration_seconds=options.duration,
        state=options.state,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description="A bank to try against. No real money.")
    commands = parser.add_subparsers(dest="command", required=True)

    init = commands.add_parser("init", help="make CA, certificates and clients.json, where missing")
    init.add_argument("--directory", type=Path, required=True)
    init.add_argument("--client-id", required=True)
    init.add_argument("--client-jwks", type=Path, required=True, help="public keys of private_key_jwt (JSON, RFC 7517)")
    init.add_argument("--request-signing-public-key", type=Path, required=True, help="PEM, EC P-256")
    init.add_argument(
        "--redirect-uri", action="append", default=[], help="may be repeated; adds to the registered ones"
    )

    serve = commands.add_parser("serve", help="serve until a signal or the end of the duration")
    serve.add_argument("--directory", type=Path, required=True)
    serve.add_argument("--port", type=_port, default=0, help="API listener; 0 lets the system choose")
    serve.add_argument("--browser-port", type=_port, default=0)
    serve.add_argument("--control-port", type=_port, default=0)
    serve.add_argument("--idempotency", choices=("header", "none"), default="none")
    serve.add_argument("--idempotency-window-seconds", type=_seconds, default=86400.0)
    serve.add_argument("--payment-lookup", action="store_true", help="list payments by their instructionIdentification")
    serve.add_argument(
        "--signature",
        choices=("required", "writes", "optional"),
        default="required",
        help="on which requests below /v1 a signature is required: all, all but GET, none",
    )
    serve.add_argument("--access-token-seconds", type=int, default=600)
    serve.add_argument(
        "--token-prefix", type=_token_text, default="", help="how every token begins, for a search to find it by"
    )
    serve.add_argument("--frequency-per-day", type=int, help="agreed reads a day without the person, per address")
    serve.add_argument("--delay-seconds", type=_seconds, default=0.0, help="latency of every answer below /v1")
    serve.add_argument("--state", type=Path, help="file that keeps consents, tokens and ledger over a restart")
    serve.add_argument("--duration", type=_seconds, help="end after so many seconds")
    return parser


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError("a port is 0 to 65535")
    return value


def _token_text(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._~-]{0,64}", text):
        raise argparse.ArgumentTypeError("a token begins with letters, digits and . _ ~ - (RFC 6750 section 2.1)")
    return text


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("seconds must be 0 or more")
    return value
