"""How a request is checked and written. What must not be sent at all is in tests/faults/test_bank_answers.py."""

from dataclasses import replace
from urllib.parse import quote_plus, unquote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.domain.provider import Header, ProviderRequest, SecretSlot, SlotEncoding
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.egress.requests import Bench, check_request
from sidecar.errors import Corrupt, Internal
from sidecar.ipc.messages import OpenSecretMessage
from sidecar.secretbuffer import SecretBuffer
from tests.fakes.egress import SoftwareKeys, data_key_context

ORIGIN = "https://api.bank.example:8443"
CONTEXT = SecretContext(cluster="test", owner="o", consent="c", provider_origin=ORIGIN, row_version=1)
KEYS = SoftwareKeys()
WRAPPED, KEY = KEYS.create_data_key(data_key_context(CONTEXT))


def _secret(kind: SecretKind, plaintext: bytes) -> OpenSecretMessage:
    sealed = KEYS.seal(kind, plaintext, CONTEXT, wrapped_data_key=WRAPPED)
    return OpenSecretMessage(secret=sealed.secret, context=sealed.context)


def _slot(kind: SecretKind, encoding: SlotEncoding) -> SecretSlot:
    return SecretSlot(kind=kind, encoding=encoding)


def _read_request(**changes: object) -> ProviderRequest:
    slot = _slot(SecretKind.ACCESS_TOKEN, SlotEncoding.RAW)
    request = ProviderRequest(
        method="GET",
        origin=ORIGIN,
        target="/v1/accounts?a=%20b",
        headers=(Header(name="X-Request-ID", value="1"), Header(name="Authorization", value="Bearer ", slot=slot)),
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def _written(request: ProviderRequest, *secrets: OpenSecretMessage, own_connection: bool = False) -> bytes:
    bench = Bench()
    checked = check_request(request, secrets, cluster="test", own_connection=own_connection)
    with bench.rendered(checked, memoryview(bytearray(KEY))) as parts:
        written = b"".join(bytes(part) for part in parts)
    bench.close()
    return written


def test_a_read_is_written_byte_for_byte() -> None:
    """Host with the port, identity coding, the headers in their order, the token in its slot; no length without a body."""
    assert _written(_read_request(), _secret(SecretKind.ACCESS_TOKEN, b"tok")) == (
        b"GET /v1/accounts?a=%20b HTTP/1.1\r\nHost: api.bank.example:8443\r\nAccept-Encoding: identity\r\n"
        b"X-Request-ID: 1\r\nAuthorization: Bearer tok\r\n\r\n"
    )


def test_a_write_is_written_byte_for_byte() -> None:
    """A connection of its own says so; the length is that of the body as it is sent; the default port is left out."""
    request = ProviderRequest(
        method="POST",
        origin="https://api.bank.example:443",
        target="/par",
        headers=(Header(name="Content-Type", value="text/plain"),),
        body=(b"a=1&", b"b=2"),
    )

    assert _written(request, own_connection=True) == (
        b"POST /par HTTP/1.1\r\nHost: api.bank.example\r\nAccept-Encoding: identity\r\nConnection: close\r\n"
        b"Content-Type: text/plain\r\nContent-Length: 7\r\n\r\na=1&b=2"
    )


@given(st.binary(min_size=1, max_size=80))
def test_form_encoding_is_the_standard_one(secret: bytes) -> None:
    """Byte for byte as urllib writes it (RFC 6749 appendix B), for any bytes, and the length counts the encoded form."""
    slot = _slot(SecretKind.REFRESH_TOKEN, SlotEncoding.FORM)
    request = ProviderRequest(method="POST", origin=ORIGIN, target="/token", headers=(), body=(b"t=", slot, b"&x=1"))

    head, _, body = _written(request, _secret(SecretKind.REFRESH_TOKEN, secret)).partition(b"\r\n\r\n")

    assert body == b"t=" + quote_plus(secret, safe="*").encode().replace(b"~", b"%7E") + b"&x=1"
    assert unquote_plus(body[2:-4].decode(), encoding="latin-1").encode("latin-1") == secret
    assert head.endswith(b"Content-Length: %d" % len(body))


@pytest.mark.parametrize("token", [b"a\r\nHost: evil", b"a\nb", b"a\x00b", b" a", b"a ", b"\xc3\xa4", b"\x7f"])
def test_a_token_that_would_break_a_header_is_not_written(token: bytes) -> None:
    """Even a token that was sealed with a line end in it does not get one into a request."""
    with pytest.raises(Corrupt):
        _written(_read_request(), _secret(SecretKind.ACCESS_TOKEN, token))


def test_slots_have_their_places() -> None:
    """A form slot in a header, a raw one in a body, a secret of no slot: refused."""
    form_in_header = (Header(name="X", value="", slot=_slot(SecretKind.ACCESS_TOKEN, SlotEncoding.FORM)),)
    raw_in_body = (_slot(SecretKind.ACCESS_TOKEN, SlotEncoding.RAW),)
    token = _secret(SecretKind.ACCESS_TOKEN, b"tok")

    for request in (_read_request(headers=form_in_header), _read_request(method="POST", headers=(), body=raw_in_body)):
        with pytest.raises(Internal):
            _written(request, token)
    with pytest.raises(Internal):
        _written(_read_request(headers=()), token)


def test_a_secret_that_is_too_large_for_its_place_is_refused() -> None:
    """The largest token fits; one whose form would not is refused before anything is sent."""
    slot = _slot(SecretKind.REFRESH_TOKEN, SlotEncoding.FORM)
    largest = _secret(SecretKind.ACCESS_TOKEN, b"t" * 65536)
    assert b"t" * 65536 in _written(_read_request(), largest)

    request = ProviderRequest(
        method="POST", origin=ORIGIN, target="/t", headers=(), body=(b"x" * 64 * 1024, slot, slot)
    )
    with pytest.raises(Internal):
        _written(request, _secret(SecretKind.REFRESH_TOKEN, b"/" * 65536))


@pytest.mark.parametrize("failing", [False, True], ids=["written", "refused"])
def test_the_bench_is_wiped_whatever_happens(failing: bool) -> None:
    """After the block nothing of a secret is on the bench: neither of one that was written nor of one that was refused half way."""
    bench = Bench()
    slots = (_slot(SecretKind.REFRESH_TOKEN, SlotEncoding.FORM), _slot(SecretKind.CLIENT_SECRET, SlotEncoding.FORM))
    request = ProviderRequest(method="POST", origin=ORIGIN, target="/t", headers=(), body=(b"a=", *slots))
    second = _secret(SecretKind.CLIENT_SECRET, b"client/secret" * 3)
    if failing:
        second = OpenSecretMessage(
            secret=replace(second.secret, sealed=second.secret.sealed[:-1] + b"\x00"), context=CONTEXT
        )
    secrets = [_secret(SecretKind.REFRESH_TOKEN, b"refresh/secret" * 3), second]
    checked = check_request(request, secrets, cluster="test", own_connection=True)

    try:
        with bench.rendered(checked, memoryview(bytearray(KEY))):
            assert not failing
    except Corrupt:
        assert failing

    memory = bytes(bench._memory.view)
    assert b"secret" not in memory
    assert b"%2F" not in memory


def test_an_opened_secret_is_wiped_after_its_block() -> None:
    """In both forms."""
    bench = Bench()
    secret = _secret(SecretKind.REFRESH_TOKEN, b"refresh/secret")

    with bench.opened(secret, memoryview(bytearray(KEY))) as raw:
        assert bytes(raw) == b"refresh/secret"
    with bench.opened(secret, memoryview(bytearray(KEY)), SlotEncoding.FORM) as encoded:
        assert bytes(encoded) == b"refresh%2Fsecret"

    assert b"secret" not in bytes(bench._memory.view)
    assert isinstance(bench._memory, SecretBuffer)


@pytest.mark.parametrize(
    "header",
    [
        Header(name="Range", value="bytes=0-99"),
        Header(name="if-range", value="x"),
        Header(name="Accept", value="text/html"),
        Header(name="ACCEPT", value="application/json, */*"),
        Header(name="accept", value="application/jwt"),
    ],
    ids=lambda header: f"{header.name}-{header.value}",
)
def test_an_answer_is_asked_for_whole_and_as_json(header: Header) -> None:
    """A part of an answer, or another form of it, could carry tokens past the look for them."""
    with pytest.raises(Internal):
        check_request(_read_request(headers=(header,)), [], cluster="test", own_connection=False)

    json = Header(name="Accept", value="application/json")
    check_request(_read_request(headers=(json,)), [], cluster="test", own_connection=False)
