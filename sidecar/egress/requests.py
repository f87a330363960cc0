"""What egress agrees to send, and how it is written without a secret ever becoming a `str` or `bytes`.

Rules:
- The origin is one of the configured ones, compared as text; https only. Every secret is sealed for exactly that origin.
- Host, Content-Length, Connection and codings are egress's own; the caller cannot name them, nor smuggle a line or a header in.
- Answers come whole and as JSON, so that one that holds tokens can be told: no Range, no other Accept.
- A secret goes into a header (as it is) or into a form body (encoded), never into the target.
- Each slot has its secret and each secret its slot.
- A secret in the clear exists only inside `Bench.rendered` and `Bench.opened`: written there, used there, wiped there.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from sidecar.domain.provider import Header, ProviderRequest, SecretSlot, SlotEncoding
from sidecar.domain.secrets import SecretKind
from sidecar.errors import Corrupt, Internal
from sidecar.ipc.messages import OpenSecretMessage
from sidecar.sealing import MAX_PLAINTEXT_BYTES, SealedSecretRefused, WrappingKey, open_into, parse
from sidecar.secretbuffer import SecretBuffer, scrub, wipe

__all__ = ["Bench", "CheckedRequest", "check_request", "plaintext_bytes", "split_origin"]

OpeningKey = memoryview | WrappingKey

_MAX_BODY_BYTES: Final = 1024 * 1024
_MAX_TARGET_BYTES: Final = 8 * 1024
_MAX_HEADERS: Final = 64
_HEAD_BYTES: Final = 160 * 1024  # 64 KiB of literals, one token of the largest size, and room
_FORM_BYTES: Final = 256 * 1024
_MAX_HEAD_LITERAL_BYTES: Final = 64 * 1024

_ORIGIN = re.compile(r"https://([a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?|\[[0-9a-f:.]{2,45}\]):([1-9][0-9]{0,4})\Z")
_TARGET = re.compile(r"/(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*\Z")
_ENCODED_CONTROL = re.compile(r"%(?:[01][0-9A-Fa-f]|7[Ff])")
_DOT_SEGMENT = re.compile(r"/(?:\.|%2[eE]){1,2}(?:/|\Z)")
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,128}\Z")
_VALUE = re.compile(r"[\x20-\x7e]{0,16384}\Z")
# RFC 6749 VSCHAR, without blanks at the ends, where a recipient would drop them.
_HEADER_SECRET = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z")

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_OURS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "cookie",
        "expect",
        "host",
        "http2-settings",
        "if-range",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "range",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_FORM_LITERAL = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._*")
_HEX = b"0123456789ABCDEF"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """A request that keeps the rules. `head` lacks only the last lines, which egress writes itself."""

    origin: str
    method: str
    head: tuple[bytes | SecretSlot, ...]
    form: tuple[bytes | SecretSlot, ...]  # the body, where it has slots
    body: bytes  # the body, where it has none
    secrets: dict[SecretKind, OpenSecretMessage]
    forms: frozenset[tuple[SecretKind, SlotEncoding]]  # in which an answer could repeat a secret


def check_request(
    request: ProviderRequest, secrets: Sequence[OpenSecretMessage], *, cluster: str, own_connection: bool
) -> CheckedRequest:
    """Raises Internal for a request that egress does not send (a defect of the caller), Corrupt for a secret that was not
    sealed for this request's origin."""
    split_origin(request.origin)
    _require(request.method in _METHODS, "method")
    _check_target(request.target)
    _check_headers(request.headers)
    _check_body(request)
    _check_secrets(request, secrets, cluster)
    has_slots = any(isinstance(part, SecretSlot) for part in request.body)
    return CheckedRequest(
        origin=request.origin,
        method=request.method,
        head=tuple(_head_parts(request, own_connection=own_connection)),
        form=request.body if has_slots else (),
        body=b"" if has_slots else b"".join(part for part in request.body if isinstance(part, bytes)),
        secrets={secret.secret.kind: secret for secret in secrets},
        forms=frozenset(
            (slot.kind, encoding) for slot in request.slots for encoding in (SlotEncoding.RAW, slot.encoding)
        ),
    )


def split_origin(origin: str) -> tuple[str, int]:
    """Host (an IPv6 address with its brackets) and port. Raises Internal unless it is https://host:port in lower case."""
    match = _ORIGIN.match(origin)
    _require(match is not None and int(match[2]) < 65536, "origin")
    assert match is not None
    return match[1], int(match[2])


def _check_target(target: str) -> None:
    _require(len(target) <= _MAX_TARGET_BYTES and bool(_TARGET.match(target)), "target")
    path = target.partition("?")[0]
    _require("//" not in path, "target")
    _require(not _DOT_SEGMENT.search(path), "target")
    _require(not _ENCODED_CONTROL.search(target), "target")


def _check_headers(headers: Sequence[Header]) -> None:
    names = [header.name.lower() for header in headers]
    _require(len(headers) <= _MAX_HEADERS and len(set(names)) == len(names), "headers")
    for name, header in zip(names, headers, strict=True):
        _require(bool(_NAME.match(header.name)) and name not in _OURS, "header name")
        _require(name != "accept" or (header.value == "application/json" and header.slot is None), "accept")
        # "Bearer " may end with the blank that stands before the token.
        bare = header.value.removesuffix(" ") if header.slot else header.value
        _require(bool(_VALUE.match(header.value)) and bare == bare.strip(" "), "header value")
        _require(header.slot is None or header.slot.encoding is SlotEncoding.RAW, "header slot")


def _check_body(request: ProviderRequest) -> None:
    literal_bytes = sum(len(part) for part in request.body if isinstance(part, bytes))
    slots = [part for part in request.body if isinstance(part, SecretSlot)]
    _require(literal_bytes <= _MAX_BODY_BYTES, "body size")
    _require(not request.body or request.method in _METHODS_WITH_BODY, "body of this method")
    _require(all(slot.encoding is SlotEncoding.FORM for slot in slots), "body slot")
    _require(not slots or literal_bytes <= _MAX_HEAD_LITERAL_BYTES, "form size")


def _check_secrets(request: ProviderRequest, secrets: Sequence[OpenSecretMessage], cluster: str) -> None:
    kinds = [secret.secret.kind for secret in secrets]
    _require(len(set(kinds)) == len(kinds), "secrets of one kind")
    _require({slot.kind for slot in request.slots} == set(kinds), "slots and secrets")
    for secret in secrets:
        context = secret.context
        ours = context.provider_origin == request.origin and context.cluster == cluster
        same = (context.owner, context.consent) == (secrets[0].context.owner, secrets[0].context.consent)
        if not ours or not same:
            raise _corrupt()


def _head_parts(request: ProviderRequest, *, own_connection: bool) -> Iterator[bytes | SecretSlot]:
    host, port = split_origin(request.origin)
    host_field = host if port == 443 else f"{host}:{port}"
    lines = f"{request.method} {request.target} HTTP/1.1\r\nHost: {host_field}\r\nAccept-Encoding: identity\r\n"
    if own_connection:
        lines += "Connection: close\r\n"
    for header in request.headers:
        lines += f"{header.name}: {header.value}"
        if header.slot is not None:
            yield lines.encode("ascii")
            yield header.slot
            lines = ""
        lines += "\r\n"
    yield lines.encode("ascii")


class Bench:
    """The one piece of locked memory in which requests with secrets are put together, one at a time.

    All of its work is synchronous, so no two requests ever meet here.
    """

    def __init__(self) -> None:
        self._memory = SecretBuffer(_HEAD_BYTES + _FORM_BYTES + MAX_PLAINTEXT_BYTES)
        view = self._memory.view
        self._head = view[:_HEAD_BYTES]
        self._form = view[_HEAD_BYTES : _HEAD_BYTES + _FORM_BYTES]
        self._opened = view[_HEAD_BYTES + _FORM_BYTES :]

    @contextmanager
    def rendered(self, request: CheckedRequest, key: OpeningKey | None) -> Iterator[tuple[memoryview | bytes, ...]]:
        """The request's bytes, in parts; inside the block only. Raises Corrupt where a secret does not open."""
        head_used = form_used = 0
        try:
            form_used = self._write(self._form, request.form, request, key, reserve=0)
            body: memoryview | bytes = self._form[:form_used] if request.form else request.body
            head_used = self._write(self._head, request.head, request, key, reserve=64)
            last = b"\r\n" if request.method not in _METHODS_WITH_BODY else b"Content-Length: %d\r\n\r\n" % len(body)
            self._head[head_used : head_used + len(last)] = last
            head_used += len(last)
            yield (self._head[:head_used], body) if len(body) else (self._head[:head_used],)
        finally:
            self._wipe_used(request, head_used, form_used)

    @contextmanager
    def opened(
        self, secret: OpenSecretMessage, key: OpeningKey, encoding: SlotEncoding = SlotEncoding.RAW
    ) -> Iterator[memoryview]:
        """One secret as it stands in a request; inside the block only. Raises Corrupt where it does not open."""
        plain, encoded = self._opened[: plaintext_bytes(secret)], self._form[:0]
        try:
            _open(secret, key, plain)
            if encoding is SlotEncoding.RAW:
                yield plain
            else:
                encoded = self._form[: 3 * len(plain)]
                yield encoded[: _write_form_encoded(plain, encoded)]
        finally:
            wipe(plain)
            wipe(encoded)
            scrub()

    def check_opens(self, request: CheckedRequest, key: OpeningKey | None) -> None:
        """Raises Corrupt unless every secret of the request opens and fits its place."""
        with self.rendered(request, key):
            pass

    def close(self) -> None:
        for view in (self._head, self._form, self._opened):
            view.release()
        self._memory.close()

    def _write(
        self,
        area: memoryview,
        parts: Sequence[bytes | SecretSlot],
        request: CheckedRequest,
        key: OpeningKey | None,
        *,
        reserve: int,
    ) -> int:
        used = 0
        for part in parts:
            if isinstance(part, bytes):
                _require(used + len(part) + reserve <= len(area), "size")
                area[used : used + len(part)] = part
                used += len(part)
            else:
                used += self._write_slot(area[used : len(area) - reserve], part, request, key)
        return used

    def _write_slot(self, room: memoryview, slot: SecretSlot, request: CheckedRequest, key: OpeningKey | None) -> int:
        secret = request.secrets[slot.kind]
        if key is None:
            raise _corrupt()
        if slot.encoding is SlotEncoding.FORM:
            length = self._open(secret, key)
            return _write_form_encoded(self._opened[:length], room)
        length = plaintext_bytes(secret)
        _require(length <= len(room), "size")
        _open(secret, key, room[:length])
        # A secret that would end the line, or that the far side would trim, must not go out.
        if not _HEADER_SECRET.match(room[:length]):
            raise _corrupt()
        return length

    def _open(self, secret: OpenSecretMessage, key: OpeningKey) -> int:
        return _open(secret, key, self._opened[: plaintext_bytes(secret)])

    def _wipe_used(self, request: CheckedRequest, head_used: int, form_used: int) -> None:
        if not request.secrets:
            return
        # The whole areas when something was raised half way: nobody knows how far it came.
        wipe(self._head[:head_used] if head_used else self._head)
        if request.form:
            wipe(self._form[:form_used] if form_used else self._form)
            wipe(self._opened)
        scrub()


def _write_form_encoded(plain: memoryview, room: memoryview) -> int:
    """application/x-www-form-urlencoded, byte by byte (RFC 6749 appendix B). Returns the length."""
    used = 0
    for octet in plain:
        if octet in _FORM_LITERAL:
            _require(used < len(room), "size")
            room[used] = octet
            used += 1
        elif octet == 0x20:
            _require(used < len(room), "size")
            room[used] = 0x2B
            used += 1
        else:
            _require(used + 3 <= len(room), "size")
            room[used] = 0x25
            room[used + 1] = _HEX[octet >> 4]
            room[used + 2] = _HEX[octet & 15]
            used += 3
    return used


def plaintext_bytes(secret: OpenSecretMessage) -> int:
    """The length of the secret, which the sealed form does not hide. Raises Corrupt for what is no sealed secret."""
    try:
        return parse(secret.secret.sealed).plaintext_bytes
    except SealedSecretRefused:
        raise _corrupt() from None


def _open(secret: OpenSecretMessage, key: OpeningKey, into: memoryview) -> int:
    try:
        return open_into(
            key=key, sealed=secret.secret.sealed, kind=secret.secret.kind, context=secret.context, buffer=into
        )
    except (SealedSecretRefused, ValueError):
        raise _corrupt() from None


def _corrupt() -> Corrupt:
    return Corrupt("ENVELOPE_CORRUPT", "a sealed secret does not open for this request")


def _require(condition: bool, rule: str) -> None:  # noqa: FBT001 (reads as a sentence)
    if not condition:
        raise Internal(f"egress does not send this request: {rule}")
