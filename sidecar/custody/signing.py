"""Signatures over documents of a declared kind, with a key of their own: never raw bytes, never with a bank-facing key."""

import base64
import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never
from xml.parsers import expat

from sidecar.connectors.signing import base64url, jws_input
from sidecar.connectors.strict_json import is_json_text
from sidecar.custody.access import check_same_request, consent_for, request_digest
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.caller import Caller
from sidecar.domain.consent import Consent, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, RequestId, resource_name
from sidecar.domain.provider import KeyPurpose
from sidecar.errors import FieldViolation, InvalidField
from sidecar.ports import Claim, Clock, Hsm, PublicKey, Store

__all__ = ["DetachedSignature", "PayloadKind", "SignDocument", "Signing"]

MAX_PAYLOAD_BYTES = 64 * 1024


class PayloadKind(StrEnum):
    """The media type is signed too (JWS `cty`), so a signature over one kind is none over another."""

    JSON_DOCUMENT = "application/json"
    XML_DOCUMENT = "application/xml"
    TEXT_DOCUMENT = "text/plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignDocument:
    consent: ConsentId
    owner: OwnerId
    request_id: RequestId
    kind: PayloadKind
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DetachedSignature:
    """A JWS with detached payload (RFC 7515 appendix F)."""

    detached_jws: str
    key_id: str
    algorithm: str


class Signing:
    def __init__(self, *, store: Store, hsm: Hsm, clock: Clock) -> None:
        self._store = store
        self._hsm = hsm
        self._clock = clock

    async def sign(self, caller: Caller, request: SignDocument) -> DetachedSignature:
        """A signature that leaves the house only when its entry is on record; a repeat gets the same signature."""
        consent = await consent_for(self._store, caller, request.consent, request.owner)
        caller.check_purposes(frozenset({Purpose.SIGNING}))
        consent.check_usable(Purpose.SIGNING, self._clock.now())
        _check_payload(request)
        digest = request_digest(consent.id, request.kind, request.payload)
        earlier = await self._store.claim(caller.workload, request.request_id)
        if earlier is None:
            return await self._sign_new(caller, consent, request, digest)
        return _repeated(earlier, _claim(caller, request, digest, jws=""))

    async def _sign_new(
        self, caller: Caller, consent: Consent, request: SignDocument, digest: bytes
    ) -> DetachedSignature:
        key = await self._hsm.public_key(KeyPurpose.DOCUMENT_SIGNING)
        header = {
            "alg": key.algorithm,
            "kid": key.key_id,
            "typ": "custody-document+jws",
            "cty": request.kind.value,
            "iat": int(self._clock.now().timestamp()),
            "consent": resource_name("consents", consent.id),
        }
        signing_input = jws_input(header, request.payload)
        signature = await self._hsm.sign(KeyPurpose.DOCUMENT_SIGNING, _sha256(signing_input))
        jws = f"{signing_input.partition('.')[0]}..{base64url(signature)}"
        draft = AuditDraft(
            event=AuditEvent.SIGNATURE_MADE,
            outcome=AuditOutcome.SUCCEEDED,
            caller=caller.workload,
            provider=consent.provider,
            consent=consent.id,
            subject=consent.subject(),
            detail_digest=hashlib.sha256(request.payload).digest(),
        )
        claim = _claim(caller, request, digest, jws=jws)
        earlier = await self._store.record([draft], claim=claim)
        return _repeated(earlier or claim, claim)

    async def verification_keys(self) -> tuple[PublicKey, ...]:
        """The public keys that verify what this sidecar signs: documents, and its log."""
        return (
            await self._hsm.public_key(KeyPurpose.DOCUMENT_SIGNING),
            await self._hsm.public_key(KeyPurpose.AUDIT),
        )


def _claim(caller: Caller, request: SignDocument, digest: bytes, *, jws: str) -> Claim:
    return Claim(caller=caller.workload, request_id=request.request_id, method="Sign", digest=digest, resource=jws)


def _repeated(earlier: Claim, claim: Claim) -> DetachedSignature:
    """The signature that the first call made. Raises Conflict where that was a call for something else."""
    check_same_request(earlier, claim)
    header = _header(earlier.resource)
    return DetachedSignature(detached_jws=earlier.resource, key_id=str(header["kid"]), algorithm=str(header["alg"]))


def _check_payload(request: SignDocument) -> None:
    """A payload is what its kind says; a signature over something else could be taken for what it is not."""
    if not 0 < len(request.payload) <= MAX_PAYLOAD_BYTES:
        raise _violation("payload", "length", "must have 1 to 65536 bytes")
    match request.kind:
        case PayloadKind.JSON_DOCUMENT if not is_json_text(request.payload):
            raise _violation("payload", "json", "must be one JSON text in UTF-8 without duplicate names")
        case PayloadKind.XML_DOCUMENT if not _is_plain_xml(request.payload):
            raise _violation("payload", "xml", "must be well-formed XML in UTF-8 without a document type declaration")
        case PayloadKind.TEXT_DOCUMENT if not _is_text(request.payload):
            raise _violation(
                "payload", "text", "must be UTF-8 text without control characters other than tab, LF and CR"
            )
        case PayloadKind.JSON_DOCUMENT | PayloadKind.XML_DOCUMENT | PayloadKind.TEXT_DOCUMENT:
            return
        case _:
            assert_never(request.kind)


def _is_plain_xml(payload: bytes) -> bool:
    """Well-formed UTF-8 that does not call itself another encoding, and no document type: entities are where XML parsers are
    attacked."""
    parser = expat.ParserCreate("UTF-8")

    def refuse(*_: object) -> None:
        raise ValueError

    def check_encoding(_version: str, encoding: str | None, _standalone: int) -> None:
        if encoding is not None and encoding.upper() != "UTF-8":
            raise ValueError

    parser.StartDoctypeDeclHandler = refuse
    parser.XmlDeclHandler = check_encoding
    try:
        payload.decode("utf-8")
        parser.Parse(payload, True)  # noqa: FBT003 - expat's own signature: this is the final part
    except (expat.ExpatError, ValueError):
        return False
    return True


def _is_text(payload: bytes) -> bool:
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(character in "\t\n\r" or unicodedata.category(character) != "Cc" for character in text)


def _header(jws: str) -> Mapping[str, object]:
    encoded = jws.partition(".")[0]
    header: Mapping[str, object] = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    return header


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("ascii")).digest()


def _violation(field: str, rule: str, description: str) -> InvalidField:
    return InvalidField(FieldViolation(field=field, rule=rule, description=description))
