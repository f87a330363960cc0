"""The main job, step by step in plain words: `make run`.

A consent goes into custody and pays, and the application never sees the token. Everything is real: the HSM module, the three
processes, TLS, OAuth, the database, the log. At the end stands the proof; on a terminal the system then stays up until Ctrl-C.
"""

import base64
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from sandbox.testing import SandboxProcess
from tools.development import Development, DevelopmentError, SidecarProcess

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parent.parent
_VAR = _ROOT / "var"


def main() -> int:
    """The exit status: 0 when everything went as it must."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _main_job()
    except KeyboardInterrupt:
        say("stopped")
    except DevelopmentError as error:
        say(f"failed: {error}")
        return 1
    return 0


def _main_job() -> None:
    began = time.monotonic()
    marker = "tok" + secrets.token_hex(8)
    step(1, "The development HSM: a token, and keys that cannot leave it")
    development = Development.prepare(
        _VAR, report=say, bank_arguments=["--token-prefix", marker], redirect_port=_interactive_port(), store=_store()
    )
    with development:
        step(2, "The sandbox bank and the sidecar")
        bank = development.start_bank(duration_seconds=None)
        say(f"the sandbox bank serves {bank.info.api_base_url} (OAuth at {bank.info.issuer})")
        sidecar = development.start_sidecar(bank)
        say(f"the sidecar serves {development.address}: gateway {sidecar.pid} with its children hsm and egress")
        step(3, "An example application, which uses only the Python client")
        received = _run_shop(development, bank)
        say(f"first payment after {time.monotonic() - began:.1f} s")
        step(4, "The proof")
        _prove(development, bank, sidecar, received, marker)
        step(5, "Go on from here")
        _how_to_go_on(development, sidecar)
        if sys.stdout.isatty():
            say("everything stays up until you press Ctrl-C")
            while True:
                time.sleep(3600)


def _run_shop(development: Development, bank: SandboxProcess) -> bytes:
    """Runs the application against a tap of the API socket; returns every byte that it received."""
    with _Tap(development) as tap:
        shop = subprocess.Popen(
            [
                *(sys.executable, str(_ROOT / "examples" / "shop.py")),
                *("--address", tap.address, "--redirect-port", str(development.redirect_port)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in _lines(shop):
            if line.startswith("OPEN "):
                _approve(bank, line.removeprefix("OPEN "))
            else:
                say(line)
        if shop.wait(timeout=30) != 0:
            raise DevelopmentError("the example application failed")
        return tap.received()


def _approve(bank: SandboxProcess, authorisation_uri: str) -> None:
    if os.environ.get("INTERACTIVE"):
        say("open this address in your browser (name: anna, PIN: 1234):")
        say(f"  {authorisation_uri}")
        say(f"  its certificate is signed by the sandbox's own authority: {bank.info.ca_file}")
        return
    say("the person opens the bank's page, logs in and approves (INTERACTIVE=1: you do it in a browser)")
    with urllib.request.urlopen(bank.redirect_after(authorisation_uri), timeout=30) as page:  # noqa: S310 - our own http://127.0.0.1
        page.read()


# --- the proof ----------------------------------------------------------------------------------------------------------


def _prove(
    development: Development, bank: SandboxProcess, sidecar: SidecarProcess, received: bytes, marker: str
) -> None:
    ledger = bank.ledger()
    if len(ledger) != 1:
        raise DevelopmentError(f"the bank's ledger has {len(ledger)} payments instead of one")
    say("the bank's ledger has the payment once")
    say(_verify_log(development))
    places = {
        "what the application received": received,
        "database": _content(development.database_files()),
        "logs": _content([development.log_file]),
        "metrics": sidecar.get("/metrics")[1].encode(),
    }
    if not received:
        raise DevelopmentError("nothing was recorded of what the application received")
    for place, content in places.items():
        found = [form for form in _forms(marker) if form in content]
        if found:
            raise DevelopmentError(f"a token was found in {place}")
    sizes = ", ".join(f"{place} ({len(content):,} bytes)" for place, content in places.items())
    say(f"no token, plain, hexadecimal or base64, in {sizes}")


def _verify_log(development: Development) -> str:
    export, key = development.directory / "audit-export.log", development.directory / "audit-key.pem"
    export.unlink(missing_ok=True)
    cli = [str(Path(sys.executable).with_name("custodyctl")), "--address", development.admin_address]
    _checked([*cli, "audit", "export", "--output", str(export)])
    key.write_bytes(development.public_key_pem("audit"))
    text = _checked([sys.executable, "-m", "sidecar.audit.verifier", str(export), "--key", str(key)])
    return f"the log export verifies offline with the public key alone: {text.splitlines()[0]}"


def _checked(command: list[str]) -> str:
    done = subprocess.run(
        command, cwd=_ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        raise DevelopmentError(f"{Path(command[0]).name} failed: {done.stderr or done.stdout}")
    return done.stdout.strip()


def _forms(marker: str) -> Iterator[bytes]:
    """The marker as it would look in clear, in hexadecimal, and within base64 at each of the three alignments."""
    yield marker.encode()
    yield marker.encode().hex().encode()
    for shift in range(3):
        encoded = base64.b64encode(b"\x00" * shift + marker.encode())
        yield encoded[4 if shift else 0 : len(encoded) // 4 * 4 - 4]


def _content(paths: "Iterator[Path] | list[Path]") -> bytes:
    return b"".join(path.read_bytes() for path in paths)


class _Tap:
    """A Unix socket in front of the API socket that keeps a copy of everything that comes back."""

    def __init__(self, development: Development) -> None:
        self._path = development.sockets / "tap.sock"
        self._target = development.address.removeprefix("unix:")
        self._received = bytearray()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    @property
    def address(self) -> str:
        return f"unix:{self._path}"

    def received(self) -> bytes:
        return bytes(self._received)

    def __enter__(self) -> "_Tap":
        self._path.unlink(missing_ok=True)
        self._listener.bind(str(self._path))
        self._path.chmod(0o600)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed: the application has ended
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            server.connect(self._target)
            threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, self._received), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, copy: bytearray | None) -> None:
        try:
            while data := source.recv(65536):
                if copy is not None:
                    copy += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return  # either side has gone


# --- words --------------------------------------------------------------------------------------------------------------


def _how_to_go_on(development: Development, sidecar: SidecarProcess) -> None:
    say(f"API socket       {development.address}   (the workload 'shop' is bound to it)")
    say(f"administration   {development.admin_address}")
    say(f"metrics          http://127.0.0.1:{sidecar.operations_port}/metrics")
    say(f"one command      .venv/bin/custodyctl --address {development.admin_address} status")
    say("one client call  .venv/bin/python -c 'import custody")
    say(f'                 print(list(custody.Client("{development.address}").providers.list()))\'')


def _store() -> str:
    store = os.environ.get("STORE") or "sqlite"
    if store not in ("sqlite", "postgresql"):
        raise DevelopmentError("STORE must be sqlite or postgresql")
    return store


def _interactive_port() -> int:
    """A fixed port where a person's browser comes back, so that the address stays the same from run to run."""
    return int(os.environ.get("REDIRECT_PORT", "0"))


def _lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    if process.stdout is None:
        return
    for line in process.stdout:
        yield line.rstrip("\n")


def step(number: int, text: str) -> None:
    print(f"\n{number}. {text}", flush=True)


def say(text: str) -> None:
    print(f"   {text}", flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
