"""Signatures over documents: of a declared kind, on record, repeatable, and verified by somebody else's code."""

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key
from joserfc import jws
from joserfc.errors import BadSignatureError
from joserfc.jwk import ECKey

from sidecar.custody.signing import PayloadKind, SignDocument
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent, ConsentState, Purpose
from sidecar.domain.provider import KeyPurpose
from sidecar.errors import Conflict, CustodyError, InvalidField, Unavailable
from tests.unit.custody.support import OWNER, World, caller, request_id

K = PayloadKind


def document(consent: Consent, kind: PayloadKind = K.JSON_DOCUMENT, payload: bytes = b'{"total":1}') -> SignDocument:
    return SignDocument(consent=consent.id, owner=OWNER, request_id=request_id(), kind=kind, payload=payload)


async def verified(world: World, detached: str, payload: bytes) -> dict[str, Any]:
    """The protected header of a detached JWS, verified by joserfc."""
    key = await world.hsm.public_key(KeyPurpose.DOCUMENT_SIGNING)
    public = ECKey.import_key(load_der_public_key(key.spki_der))  # type: ignore[arg-type]
    header, _, signature = detached.split(".")
    whole = f"{header}.{base64.urlsafe_b64encode(payload).rstrip(b'=').decode()}.{signature}"
    return dict(jws.deserialize_compact(whole, public, algorithms=["ES256"], registry=_any_header()).headers())


def _any_header() -> jws.JWSRegistry:
    return jws.JWSRegistry(algorithms=["ES256"], strict_check_header=False)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (K.JSON_DOCUMENT, b'{"total":1}'),
        (K.JSON_DOCUMENT, b'[1, "a"]'),
        (K.JSON_DOCUMENT, b"true"),
        (K.XML_DOCUMENT, b"<a>b</a>"),
        (K.XML_DOCUMENT, '<?xml version="1.0" encoding="utf-8"?><a>ä</a>'.encode()),
        (K.TEXT_DOCUMENT, "Zeile\r\n\tzwei\u00a0ä".encode()),
        (K.TEXT_DOCUMENT, b"x" * 65536),
    ],
)
async def test_a_signature_verifies_with_an_independent_library(kind: PayloadKind, payload: bytes) -> None:
    """Algorithm, key, type, kind and consent are in the signed header; another payload does not verify."""
    world = World()
    consent = await world.consent()

    signed = await world.core.signing.sign(caller(), document(consent, kind, payload))
    header = await verified(world, signed.detached_jws, payload)

    assert header["alg"] == signed.algorithm == "ES256"
    assert header["kid"] == signed.key_id
    assert (header["typ"], header["cty"]) == ("custody-document+jws", kind.value)
    assert header["consent"] == f"consents/{consent.id}"
    with pytest.raises(BadSignatureError):
        await verified(world, signed.detached_jws, payload + b" ")


async def test_a_repeat_gets_the_same_signature() -> None:
    """Byte for byte, and nothing is signed again; another content is refused without a signature."""
    world = World()
    request = document(await world.consent())
    first = await world.core.signing.sign(caller(), request)
    made = len(world.hsm.signed)

    assert await world.core.signing.sign(caller(), request) == first
    with pytest.raises(Conflict):
        await world.core.signing.sign(caller(), replace(request, payload=b"{}"))
    with pytest.raises(Conflict):
        await world.core.signing.sign(caller(), replace(request, kind=K.TEXT_DOCUMENT))
    assert len(world.hsm.signed) == made
    assert world.events().count(AuditEvent.SIGNATURE_MADE) == 1


async def test_no_entry_no_signature() -> None:
    """Where the entry cannot be written the signature does not leave the house."""
    world = World()
    request = document(await world.consent())
    world.store.failures.append(Unavailable("AUDIT_UNAVAILABLE", "away"))

    with pytest.raises(Unavailable):
        await world.core.signing.sign(caller(), request)

    assert AuditEvent.SIGNATURE_MADE not in world.events()
    assert (await world.core.signing.sign(caller(), request)).detached_jws


async def test_documents_are_signed_with_a_key_of_their_own() -> None:
    """Never with a key that a bank trusts, and never a digest of the payload alone."""
    world = World()

    await world.core.signing.sign(caller(), document(await world.consent()))

    assert [purpose for purpose, _ in world.hsm.signed] == [KeyPurpose.DOCUMENT_SIGNING]


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (K.JSON_DOCUMENT, b""),
        (K.JSON_DOCUMENT, b"{"),
        (K.JSON_DOCUMENT, b'{"a":1,"a":2}'),
        (K.JSON_DOCUMENT, b'{"a":NaN}'),
        (K.JSON_DOCUMENT, b'{"a":1e999}'),
        (K.JSON_DOCUMENT, b"\xef\xbb\xbf{}"),
        (K.JSON_DOCUMENT, '{"a":1}'.encode("utf-16")),
        (K.JSON_DOCUMENT, b'{"a":1} x'),
        (K.JSON_DOCUMENT, b"[" * 10_000 + b"]" * 10_000),
        (K.XML_DOCUMENT, b"<a>"),
        (K.XML_DOCUMENT, b"<a/><b/>"),
        (K.XML_DOCUMENT, b'<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>'),
        (K.XML_DOCUMENT, b'<!DOCTYPE a SYSTEM "http://evil.example/a.dtd"><a/>'),
        (K.XML_DOCUMENT, '<?xml version="1.0" encoding="iso-8859-1"?><a>ä</a>'.encode()),
        (K.XML_DOCUMENT, "<a>ä</a>".encode("iso-8859-1")),
        (K.XML_DOCUMENT, "<a/>".encode("utf-16")),
        (K.TEXT_DOCUMENT, b"a\x00b"),
        (K.TEXT_DOCUMENT, b"a\x1bb"),
        (K.TEXT_DOCUMENT, "a\u0085b".encode()),
        (K.TEXT_DOCUMENT, b"\xff"),
        (K.TEXT_DOCUMENT, b"x" * 65537),
    ],
)
async def test_a_payload_that_is_not_of_its_kind_is_not_signed(kind: PayloadKind, payload: bytes) -> None:
    """Nothing is signed, nothing is on record; the refusal does not repeat the payload."""
    world = World()
    consent = await world.consent()
    entries = len(world.events())

    with pytest.raises(InvalidField) as refused:
        await world.core.signing.sign(caller(), document(consent, kind, payload))

    assert refused.value.violations[0].field == "payload"
    assert not world.hsm.signed
    assert len(world.events()) == entries


@pytest.mark.parametrize(
    ("consent_changes", "policy", "reason"),
    [
        ({"purposes": frozenset({Purpose.PAYMENTS})}, {}, "PURPOSE_NOT_CONSENTED"),
        ({}, {"purposes": frozenset()}, "POLICY_REFUSED"),
        ({}, {"providers": frozenset()}, "CONSENT_NOT_FOUND"),
        ({"owner": "owner-2"}, {}, "CONSENT_NOT_FOUND"),
    ],
)
async def test_who_may_not_sign_does_not(consent_changes: dict[str, Any], policy: dict[str, Any], reason: str) -> None:
    """Policy, consent, provider, owner."""
    world = World()
    consent = await world.consent(**consent_changes)

    with pytest.raises(CustodyError) as refused:
        await world.core.signing.sign(caller(**policy), document(consent))

    assert refused.value.reason == reason
    assert not world.hsm.signed


async def test_an_ended_consent_signs_nothing_more() -> None:
    """Revoked is revoked."""
    world = World()
    consent = await world.consent()
    await world.core.consents.revoke(caller(), consent.id, OWNER, request_id())
    made = len(world.hsm.signed)

    with pytest.raises(CustodyError) as refused:
        await world.core.signing.sign(caller(), document(consent))

    assert refused.value.reason == "CONSENT_REVOKED"
    assert len(world.hsm.signed) == made
    assert (await world.stored(consent)).state is ConsentState.REVOKED


async def test_the_keys_to_verify_with_are_public() -> None:
    """That of documents and that of the log, each named as in its signatures."""
    world = World()

    keys = await world.core.signing.verification_keys()
    signed = await world.core.signing.sign(caller(), document(await world.consent()))

    assert [key.purpose for key in keys] == [KeyPurpose.DOCUMENT_SIGNING, KeyPurpose.AUDIT]
    assert signed.key_id == keys[0].key_id
    assert json.loads(base64.urlsafe_b64decode(signed.detached_jws.partition(".")[0] + "=="))["kid"] == signed.key_id
