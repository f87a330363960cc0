"""Requests and answers as plain values, and the form of JSON that the bank accepts.

Rules this module keeps:
- Everything behind the listeners is a synchronous function from `Call` to `Answer`: what it changes, it changes at once,
  so no other request sees half of it, and a lost connection cannot leave half of it.
- JSON with a member twice is refused (RFC 8259 section 4 leaves its meaning open), and so is a parameter given twice
  (RFC 6749 section 3.1).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import parse_qsl

from sandbox.pki import CertificateFacts

T = TypeVar("T")
Clock = Callable[[], float]  # seconds since 1970


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request as it arrived, with the TLS client certificate that its connection proved."""

    method: str
    path: str
    query: str
    headers: Mapping[str, Sequence[str]]  # names in lower case
    body: bytes
    certificate: CertificateFacts | None

    @property
    def thumbprint(self) -> str | None:
        """The certificate's `x5t#S256`."""
        return self.certificate.thumbprint if self.certificate is not None else None

    def header(self, name: str) -> str | None:
        """Return a header's only value, None if it is absent; ValueError if it came twice."""
        values = self.headers.get(name)
        if not values:
            return None
        if len(values) > 1:
            raise ValueError(f"header {name} was sent more than once")
        return values[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer; `headers` holds those besides Content-Type and Content-Length."""

    status: int
    body: bytes = b""
    content_type: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the bank is reached."""

    issuer: str  # the browser's listener; also OAuth's issuer
    api: str  # the listener with client certificates


def json_answer(status: int, document: object, headers: Mapping[str, str] | None = None) -> Answer:
    """Answer with a JSON document."""
    body = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    return Answer(status=status, body=body, content_type="application/json", headers=headers or {})


def parse_json_object(body: bytes) -> dict[str, object]:
    """Parse a JSON object; ValueError if it is anything else or has a member twice."""
    try:
        document = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("the body is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError("the body is not a JSON object")
    return document


def parse_parameters(text: str) -> dict[str, str]:
    """Parse a query or form; ValueError if a name comes twice or the encoding is wrong."""
    return _unique(parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), errors="strict"))


def parse_form(body: bytes) -> dict[str, list[str]]:
    """Parse a browser's form, where one name (a list of ticks) may come several times."""
    values: dict[str, list[str]] = {}
    for name, value in parse_qsl(body.decode("utf-8"), keep_blank_values=True, errors="strict"):
        values.setdefault(name, []).append(value)
    return values


def _unique(pairs: Sequence[tuple[str, T]]) -> dict[str, T]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name came more than once")
    return result


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
