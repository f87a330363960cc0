"""Starts the sandbox as a process and steers it: for tests, benchmarks and the demonstration.

Rules this module keeps:
- Unless told otherwise the process is bounded in time whatever happens to its parent; it is ended by its handle.
- `approve` does what a browser does and nothing more: it follows the bank's redirects, keeps its cookies, posts its forms,
  and stops at the first address that is not the bank's.
"""

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from http.cookies import SimpleCookie
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from sandbox.direct import tls_context
from sandbox.directory import Layout

_PACKAGE_ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT_SECONDS = 30.0
_MAX_STEPS = 10


class SandboxError(Exception):
    """The sandbox did not do what was asked; the text says what it did instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxInfo:
    """Where the running sandbox is."""

    issuer: str
    api_base_url: str
    control_url: str
    ledger_url: str
    ca_file: Path
    ports: Mapping[str, int]  # api, browser, control


class SandboxProcess:
    """A running sandbox bank. Use it in a `with`, or call `stop`."""

    def __init__(self, *, layout: Layout, process: "subprocess.Popen[bytes]", info: SandboxInfo) -> None:
        self.layout = layout
        self.info = info
        self._process = process

    @classmethod
    def start(
        cls,
        directory: Path,
        *,
        arguments: Sequence[str] = (),
        duration_seconds: float | None = 600.0,
        ready_within_seconds: float = 30.0,
        log: Path | None = None,
    ) -> Self:
        """Start `python -m sandbox serve` on an initialised directory and wait until it accepts requests.

        `arguments` are further options of `serve`; its output goes to `log`, or where this process's output goes. Without
        a duration the caller alone ends it.
        """
        layout = Layout(root=directory)
        layout.announcement.unlink(missing_ok=True)
        command = [sys.executable, "-m", "sandbox", "serve", "--directory", str(directory.resolve())]
        command += [*([] if duration_seconds is None else ["--duration", str(duration_seconds)]), *arguments]
        if log is None:
            process = subprocess.Popen(command, cwd=_PACKAGE_ROOT, stdin=subprocess.DEVNULL)
        else:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    command, cwd=_PACKAGE_ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
        try:
            return cls(layout=layout, process=process, info=_wait_until_ready(layout, process, ready_within_seconds))
        except BaseException:
            process.kill()
            process.wait()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def stop(self, *, within_seconds: float = 10.0) -> int:
        """End the process and return its exit code; one that does not end in time is killed."""
        self._process.terminate()
        try:
            return self._process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def kill(self) -> None:
        """Kill the process at once, as a crash would."""
        self._process.kill()
        self._process.wait()

    def wait(self, within_seconds: float) -> int:
        """Wait until the process ends by itself; return its exit code."""
        return self._process.wait(within_seconds)

    # What a person does

    def approve(
        self,
        url: str,
        *,
        person: str = "anna",
        pin: str = "1234",
        accounts: Sequence[str] | None = None,
        decision: str = "approve",
    ) -> dict[str, str]:
        """Log in and decide at an authorization URL or a payment's scaRedirect; return the redirect's parameters.

        `accounts` are the IBANs to tick; None leaves the ticks as the page has them. `decision` is approve or deny.
        """
        return dict(
            parse_qsl(
                urlsplit(self.redirect_after(url, person=person, pin=pin, accounts=accounts, decision=decision)).query
            )
        )

    def redirect_after(
        self,
        url: str,
        *,
        person: str = "anna",
        pin: str = "1234",
        accounts: Sequence[str] | None = None,
        decision: str = "approve",
    ) -> str:
        """As `approve`, but return the whole address to which the bank sends the browser in the end."""
        browser = BankBrowser(issuer=self.info.issuer, ca_file=self.info.ca_file)
        page = browser.open(url)
        page = browser.submit(page, {"person": [person], "pin": [pin]})
        fields: dict[str, Sequence[str]] = {"decision": [decision]}
        if accounts is not None:
            fields["account"] = accounts
        last = browser.submit(page, fields)
        if last.redirect is None:
            raise SandboxError(f"the bank did not redirect: {last.status} {last.text()!r}")
        return last.redirect

    # What only a test may do

    def ledger(self, end_to_end_id: str | None = None) -> list[dict[str, object]]:
        """Return what the bank executed, in order."""
        query = "" if end_to_end_id is None else "?" + urlencode({"end_to_end_id": end_to_end_id})
        return _objects(self._control("GET", f"/control/ledger{query}"), "entries")

    def requests(self) -> list[dict[str, object]]:
        """Return which requests reached the interface for providers (method, path, x_request_id, fault, status)."""
        return _objects(self._control("GET", "/control/requests"), "requests")

    def set_fault(self, kind: str, path_prefix: str, **fields: object) -> None:
        """Set a fault for the next request (or the next `count`) whose path begins so; see `sandbox.faults.Fault`."""
        self._control("POST", "/control/faults", {"kind": kind, "path_prefix": path_prefix, **fields})

    def clear_faults(self) -> None:
        """Be healthy again."""
        self._control("DELETE", "/control/faults")

    def pending_faults(self) -> list[dict[str, object]]:
        """Return the faults that are still to strike."""
        return _objects(self._control("GET", "/control/faults"), "faults")

    def reset(self) -> None:
        """Forget everything but the registered clients: books, consents, tokens, faults, requests seen."""
        self._control("POST", "/control/reset")

    def _control(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        connection = http.client.HTTPConnection("127.0.0.1", self.info.ports["control"], timeout=_TIMEOUT_SECONDS)
        try:
            connection.request(method, path, body=None if body is None else json.dumps(body))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise SandboxError(f"{method} {path}: {answer.status} {content.decode(errors='replace')}")
        document = json.loads(content) if content else {}
        assert isinstance(document, dict)
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the browser shows: a page of the bank, or the address outside the bank where it was sent."""

    status: int
    html: str
    headers: Mapping[str, str]
    redirect: str | None = None

    def text(self) -> str:
        """Return the visible text."""
        return " ".join(self._parsed().text.split())

    def form(self) -> "_FormReader":
        """Return the page's form."""
        parsed = self._parsed()
        if parsed.action is None:
            raise SandboxError(f"the page has no form: {self.status} {self.text()!r}")
        return parsed

    def _parsed(self) -> "_FormReader":
        reader = _FormReader()
        reader.feed(self.html)
        return reader


class BankBrowser:
    """A browser without eyes: redirects within the bank, cookies, forms."""

    def __init__(self, *, issuer: str, ca_file: Path) -> None:
        self._issuer = issuer
        self._host, _, port = urlsplit(issuer).netloc.partition(":")
        self._port = int(port)
        self._tls = tls_context(ca_file)
        self._cookies: dict[str, str] = {}

    def open(self, url: str) -> Page:
        """Open an address of the bank."""
        return self._go("GET", url, b"")

    def submit(self, page: Page, fields: Mapping[str, Sequence[str]]) -> Page:
        """Submit the page's form with its own values, save those that `fields` replace."""
        form = page.form()
        values = {**form.values, **fields}
        pairs = [(name, value) for name, some in values.items() for value in some]
        return self._go("POST", f"{self._issuer}{form.action}", urlencode(pairs).encode())

    def _go(self, method: str, url: str, body: bytes) -> Page:
        for _ in range(_MAX_STEPS):
            if not url.startswith(f"{self._issuer}/"):
                return Page(status=303, html="", headers={}, redirect=url)
            page = self._fetch(method, url.removeprefix(self._issuer), body)
            location = page.headers.get("location")
            if page.status != 303 or location is None:
                return page
            method, body = "GET", b""
            url = location if "://" in location else self._issuer + location
        raise SandboxError("the bank redirects in a circle")

    def _fetch(self, method: str, target: str, body: bytes) -> Page:
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self._cookies.items())}
        if body:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        connection = http.client.HTTPSConnection(self._host, self._port, context=self._tls, timeout=_TIMEOUT_SECONDS)
        try:
            connection.request(method, target, body=body or None, headers=headers)
            answer = connection.getresponse()
            html = answer.read().decode()
        finally:
            connection.close()
        for line in answer.headers.get_all("Set-Cookie") or ():
            self._cookies.update({name: morsel.value for name, morsel in SimpleCookie(line).items()})
        return Page(status=answer.status, html=html, headers={k.lower(): v for k, v in answer.getheaders()})


class _FormReader(HTMLParser):
    """Reads the first form of a page: where it goes, and what it would send untouched (without its buttons)."""

    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.values: dict[str, list[str]] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect forms and inputs."""
        attributes = {name: value or "" for name, value in attrs}
        if tag == "form" and self.action is None:
            self.action = attributes["action"]
        if tag == "input" and (attributes.get("type") != "checkbox" or "checked" in attributes):
            self.values.setdefault(attributes["name"], []).append(attributes.get("value", ""))

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.text += f"{data} "


def _wait_until_ready(layout: Layout, process: "subprocess.Popen[bytes]", seconds: float) -> SandboxInfo:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SandboxError(f"the sandbox ended with exit code {process.returncode} before it was ready")
        if layout.announcement.exists():
            document = json.loads(layout.announcement.read_text())
            if document["pid"] == process.pid:
                return SandboxInfo(
                    issuer=document["issuer"],
                    api_base_url=document["api_base_url"],
                    control_url=document["control_url"],
                    ledger_url=document["ledger_url"],
                    ca_file=Path(document["ca_file"]),
                    ports=document["ports"],
                )
        time.sleep(0.02)
    raise SandboxError(f"the sandbox was not ready within {seconds} s")


def _objects(document: Mapping[str, object], name: str) -> list[dict[str, object]]:
    values = document[name]
    assert isinstance(values, list)
    return values
