"""The bank as a process: three listeners on loopback, and the clean end.

- API listener: TLS with client certificates required; OAuth endpoints for clients, and /v1.
- Browser listener: TLS without client certificates; metadata, authorization endpoint and pages. Its address is the issuer.
- Control listener: plain HTTP; see `sandbox.control`.

Rules this module keeps:
- The bank's work on a request is one synchronous step between reading it and answering it.
- `sandbox.json` appears when all listeners accept, and goes when the bank ends.
- SIGTERM, SIGINT or the end of the duration end the process with exit code 0.
"""

import asyncio
import json
import os
import signal
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import lru_cache

import uvloop
from aiohttp import web
from cryptography import x509

from sandbox.assertions import ClientAuthenticator
from sandbox.berlin_group.accounts import AccountEndpoints
from sandbox.berlin_group.callers import Callers
from sandbox.berlin_group.consents import ConsentEndpoints
from sandbox.berlin_group.interface import Xs2a
from sandbox.berlin_group.payments import PaymentEndpoints
from sandbox.books import Books
from sandbox.browser import Browser
from sandbox.consents import Consents
from sandbox.control import Seen, control_answer
from sandbox.directory import Client, Layout, load_certificate, load_clients, write_file
from sandbox.faults import Fault, Faults, deliver_raw, spoil_body, substitute
from sandbox.memory import Memory, load_memory, opening_memory, save_memory
from sandbox.oauth import AuthorizationServer
from sandbox.oauth_endpoints import METADATA_PATH, OAuthEndpoints
from sandbox.options import Options
from sandbox.payments import IdempotencyKeys, Payments
from sandbox.pki import CertificateFacts, facts
from sandbox.signatures import SignatureVerifier
from sandbox.web import Addresses, Answer, Call, Clock

_HOST = "127.0.0.1"
_SEEN_MAX = 10_000
_SHUTDOWN_SECONDS = 0.5
_RAW_KINDS = ("cut_mid_header", "cut_mid_body", "slow_answer", "wrong_content_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """Everything that a reset makes anew."""

    books: Books
    oauth: OAuthEndpoints
    xs2a: Xs2a
    browser: Browser


def build_bank(
    *,
    options: Options,
    memory: Memory,
    clients: Mapping[str, Client],
    ca: x509.Certificate,
    addresses: Addresses,
    clock: Clock,
) -> Bank:
    """Put the bank together on what it remembers."""
    books = Books(clock=clock, memory=memory.books)
    consents = Consents(clock=clock, frequency_per_day=options.frequency_per_day, memory=memory.consents)
    payments = Payments(clock=clock, books=books, memory=memory.payments)
    server = AuthorizationServer(
        clock=clock,
        consents=consents,
        access_token_seconds=options.access_token_seconds,
        token_prefix=options.token_prefix,
        memory=memory.oauth,
    )
    authenticator = ClientAuthenticator(clients=clients, issuer=addresses.issuer, clock=clock)
    callers = Callers(clock=clock, clients=clients, oauth=server)
    return Bank(
        books=books,
        oauth=OAuthEndpoints(clock=clock, server=server, authenticator=authenticator, addresses=addresses),
        xs2a=Xs2a(
            callers=callers,
            signatures=SignatureVerifier(ca=ca, clock=clock),
            signature_required=_signature_rule(options.signature),
            consents=ConsentEndpoints(
                clock=clock, consents=consents, oauth=server, callers=callers, addresses=addresses
            ),
            accounts=AccountEndpoints(clock=clock, books=books, consents=consents, callers=callers),
            payments=PaymentEndpoints(
                clock=clock,
                payments=payments,
                idempotency=_idempotency(options, memory, clock),
                lookup=options.payment_lookup,
                callers=callers,
                addresses=addresses,
            ),
        ),
        browser=Browser(clock=clock, issuer=addresses.issuer, books=books, server=server, payments=payments),
    )


def _idempotency(options: Options, memory: Memory, clock: Clock) -> IdempotencyKeys | None:
    if options.idempotency == "none":
        return None
    window = options.idempotency_window_seconds
    return IdempotencyKeys(clock=clock, window_seconds=window, memory=memory.payments)


def run(layout: Layout, options: Options) -> None:
    """Serve until the duration has passed or a signal comes."""
    uvloop.run(_serve(layout, options))


async def _serve(layout: Layout, options: Options) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.duration_seconds is not None:
        loop.call_later(options.duration_seconds, stop.set)
    layout.announcement.unlink(missing_ok=True)
    async with AsyncExitStack() as stack:
        listeners = Listeners(layout=layout, options=options)
        await listeners.start(stack)
        stack.callback(layout.announcement.unlink, missing_ok=True)
        await stop.wait()


class Listeners:
    """The three listeners and what they hand requests to."""

    def __init__(self, *, layout: Layout, options: Options) -> None:
        self._layout = layout
        self._options = options
        self._clients = load_clients(layout)
        self._ca = load_certificate(layout.ca_certificate)
        self._faults = Faults()
        self._seen: deque[Seen] = deque(maxlen=_SEEN_MAX)
        self._addresses = Addresses(issuer="", api="")
        state = load_memory(options.state) if options.state is not None else None
        self._memory = state if state is not None else opening_memory(time.time())
        self._bank: Bank | None = None

    async def start(self, stack: AsyncExitStack) -> None:
        """Listen, then announce the addresses; the stack ends what was started."""
        browser = await _listen(
            stack, self._on_browser, self._options.browser_port, self._tls(client_certificates=False)
        )
        api = await _listen(stack, self._on_api, self._options.port, self._tls(client_certificates=True))
        control = await _listen(stack, self._on_control, self._options.control_port, None)
        self._addresses = Addresses(issuer=f"https://{_HOST}:{browser}", api=f"https://{_HOST}:{api}")
        self._bank = self._new_bank()
        self._announce(control)
        print(
            f"Sandbox bank is up. Pages: {self._addresses.issuer}  Providers: {self._addresses.api}  "
            f"Ledger: http://{_HOST}:{control}/control/ledger",
            flush=True,
        )

    def _announce(self, control_port: int) -> None:
        control = f"http://{_HOST}:{control_port}"
        document = {
            "pid": os.getpid(),
            "issuer": self._addresses.issuer,
            "api_base_url": self._addresses.api,
            "control_url": f"{control}/control",
            "ledger_url": f"{control}/control/ledger",
            "ports": {
                "api": int(self._addresses.api.rpartition(":")[2]),
                "browser": int(self._addresses.issuer.rpartition(":")[2]),
                "control": control_port,
            },
            "ca_file": str(self._layout.ca_certificate.resolve()),
            "idempotency": self._options.idempotency,
            "signature": self._options.signature,
        }
        write_file(self._layout.announcement, json.dumps(document, indent=2).encode() + b"\n")

    def _new_bank(self) -> Bank:
        return build_bank(
            options=self._options,
            memory=self._memory,
            clients=self._clients,
            ca=self._ca,
            addresses=self._addresses,
            clock=time.time,
        )

    def _tls(self, *, client_certificates: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._layout.server_certificate, self._layout.server_key)
        if client_certificates:
            context.load_verify_locations(self._layout.ca_certificate)
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    def _ready(self) -> Bank:
        assert self._bank is not None, "listeners hand over requests only after start"
        return self._bank

    async def _on_api(self, request: web.BaseRequest) -> web.StreamResponse:
        fault = self._faults.take(request.method, request.path)
        seen = self._note(request, fault)
        if fault is not None and fault.kind == "cut_before_read":
            return _reset(request)
        call = await _call(request)
        if self._options.delay_seconds and call.path.startswith("/v1/"):
            await asyncio.sleep(self._options.delay_seconds)
        if fault is not None:
            return await self._spoiled(request, call, fault, seen)
        answer = self._work(call)
        seen.status = answer.status
        return _response(answer)

    def _work(self, call: Call) -> Answer:
        bank = self._ready()
        answer = bank.xs2a.answer(call) if call.path.startswith("/v1/") else bank.oauth.answer(call)
        if call.method != "GET":
            self._save()
        return answer

    def _save(self) -> None:
        """Keep the memory, before anybody is told what it says. Reads change nothing worth the write."""
        if self._options.state is not None:
            save_memory(self._options.state, self._memory)

    async def _spoiled(self, request: web.BaseRequest, call: Call, fault: Fault, seen: Seen) -> web.StreamResponse:
        if fault.kind == "delay_before_commit":
            await asyncio.sleep(fault.seconds)
        answer = self._work(call) if fault.commits else None
        if fault.kind in ("cut_before_commit", "cut_after_commit"):
            return _reset(request)
        if fault.kind == "delay_after_commit":
            await asyncio.sleep(fault.seconds)
        if fault.kind in ("answer", "redirect"):
            answer = substitute(fault)
        assert answer is not None
        if fault.kind == "body":
            answer = spoil_body(fault, answer, call.header("authorization"))
        if fault.kind in _RAW_KINDS:
            if request.transport is not None:
                await deliver_raw(fault, answer, request.transport)
            return web.Response()  # the connection is closing: nothing of this is sent
        seen.status = answer.status
        return _response(answer)

    def _note(self, request: web.BaseRequest, fault: Fault | None) -> Seen:
        seen = Seen(
            method=request.method,
            path=request.path,
            x_request_id=request.headers.get("X-Request-ID"),
            fault=fault.kind if fault is not None else None,
        )
        self._seen.append(seen)
        return seen

    async def _on_browser(self, request: web.BaseRequest) -> web.StreamResponse:
        call = await _call(request)
        bank = self._ready()
        answer = bank.oauth.answer(call) if call.path == METADATA_PATH else bank.browser.answer(call)
        self._save()  # after a GET too: it uses a request_uri up
        return _response(answer)

    async def _on_control(self, request: web.BaseRequest) -> web.StreamResponse:
        call = await _call(request)
        answer = control_answer(call, books=self._ready().books, faults=self._faults, seen=self._seen)
        if answer is None:
            self._memory = opening_memory(time.time())
            self._bank = self._new_bank()
            self._save()
            self._faults.clear()
            self._seen.clear()
            answer = Answer(status=204)
        return _response(answer)


async def _listen(
    stack: AsyncExitStack,
    handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    port: int,
    tls: ssl.SSLContext | None,
) -> int:
    """Listen on loopback and return the port."""
    runner = web.ServerRunner(web.Server(handler), access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, _HOST, port, ssl_context=tls)
    await site.start()
    return int(runner.addresses[0][1])


async def _call(request: web.BaseRequest) -> Call:
    headers: dict[str, list[str]] = {}
    for name, value in request.headers.items():
        headers.setdefault(name.lower(), []).append(value)
    return Call(
        method=request.method,
        path=request.path,
        query=request.raw_path.partition("?")[2],
        headers=headers,
        body=await request.read(),
        certificate=_peer(request),
    )


def _peer(request: web.BaseRequest) -> CertificateFacts | None:
    connection = request.get_extra_info("ssl_object")
    der = connection.getpeercert(binary_form=True) if connection is not None else None
    return _read(der) if der else None


@lru_cache(maxsize=64)
def _read(der: bytes) -> CertificateFacts:
    return facts(x509.load_der_x509_certificate(der))


def _response(answer: Answer) -> web.Response:
    headers = dict(answer.headers)
    if answer.content_type is not None:
        headers["Content-Type"] = answer.content_type
    return web.Response(status=answer.status, body=answer.body or None, headers=headers)


def _reset(request: web.BaseRequest) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()  # the connection is gone: nothing of this is sent


def _signature_rule(name: str) -> Callable[[str], bool]:
    rules: dict[str, Callable[[str], bool]] = {
        "required": lambda _method: True,
        "writes": lambda method: method not in ("GET", "HEAD"),
        "optional": lambda _method: False,
    }
    return rules[name]
