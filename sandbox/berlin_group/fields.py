"""Reading what a request carries: headers and members, each with the form that the standard gives it.

Rules this module keeps:
- A reader returns a checked value or raises `Refusal`; the text names the field and the rule, never the value.
"""

import datetime
import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from sandbox.books import parse_cents
from sandbox.directory import Client
from sandbox.payments import UNKNOWN_CREDITOR
from sandbox.web import Call, parse_json_object

_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
_IBAN = re.compile(r"[A-Z]{2}[0-9]{2}[a-zA-Z0-9]{1,30}")
_TEXT = re.compile(r"[A-Za-z0-9/\-?:().,'+ ]*")  # the SEPA character set


class Refusal(Exception):
    """A request that the bank does not fulfil: HTTP status, Berlin Group's code, and a text without secrets."""

    def __init__(self, status: int, code: str, text: str, *, challenge: bool = False) -> None:
        super().__init__(f"{status} {code}: {text}")
        self.status = status
        self.code = code
        self.text = text
        self.challenge = challenge  # whether the answer carries WWW-Authenticate (RFC 6750 section 3)


def request_id(call: Call) -> str:
    """Return X-Request-ID, which must be a UUID."""
    value = call.header("x-request-id")
    if value is None or not _UUID.fullmatch(value):
        raise Refusal(400, "FORMAT_ERROR", "X-Request-ID is required and must be a UUID")
    return value


def psu_ip(call: Call, *, required: bool) -> bool:
    """Check PSU-IP-Address; say whether it was sent."""
    value = call.header("psu-ip-address")
    if value is None:
        if required:
            raise Refusal(400, "FORMAT_ERROR", "PSU-IP-Address is required")
        return False
    try:
        ipaddress.ip_address(value)
    except ValueError as error:
        raise Refusal(400, "FORMAT_ERROR", "PSU-IP-Address must be an IP address") from error
    return True


def json_body(call: Call) -> dict[str, object]:
    """Return the body, which must be one JSON object and be called so."""
    media_type = (call.header("content-type") or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(415, "FORMAT_ERROR", "Content-Type must be application/json")
    return parse_json_object(call.body)


def boolean(body: Mapping[str, object], name: str) -> bool:
    """Return a member that must be true or false."""
    value = body.get(name)
    if not isinstance(value, bool):
        raise Refusal(400, "FORMAT_ERROR", f"{name} must be true or false")
    return value


def text(body: Mapping[str, object], name: str, max_length: int) -> str | None:
    """Return a text of 1 to `max_length` characters of the SEPA set, None if the member is absent."""
    value = body.get(name)
    if value is None and name not in body:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= max_length or not _TEXT.fullmatch(value):
        raise Refusal(400, "FORMAT_ERROR", f"{name} must be 1 to {max_length} characters of the SEPA set")
    return value


def iban(body: Mapping[str, object], name: str) -> str:
    """Return the IBAN of an account reference; its check digits must fit, save for the unknown creditor of the sandbox."""
    reference = body.get(name)
    value = reference.get("iban") if isinstance(reference, dict) else None
    if not isinstance(value, str) or not _IBAN.fullmatch(value):
        raise Refusal(400, "FORMAT_ERROR", f"{name} must be an account reference with an IBAN")
    if not value.startswith(UNKNOWN_CREDITOR) and not _check_digits_fit(value):
        raise Refusal(400, "FORMAT_ERROR", f"the check digits of the IBAN in {name} do not fit")
    return value


def amount(value: object) -> int:
    """Return an amount in cents."""
    if not isinstance(value, dict) or set(value) != {"currency", "amount"} or value["currency"] != "EUR":
        raise Refusal(400, "FORMAT_ERROR", "instructedAmount must be {currency: EUR, amount}")
    if not isinstance(value["amount"], str):
        raise Refusal(400, "FORMAT_ERROR", "the amount must be a string")
    return parse_cents(value["amount"])


def redirect_uri(call: Call, header: str, client: Client) -> str | None:
    """Return a redirect address: a registered one, to which the provider may have added a query of its own."""
    value = call.header(header)
    if value is None:
        return None
    if urlsplit(value)._replace(query="").geturl() not in client.redirect_uris:
        raise Refusal(400, "FORMAT_ERROR", f"{header} is not registered")
    return value


def date(value: object, name: str) -> datetime.date:
    """Return a date written as YYYY-MM-DD."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        raise Refusal(400, "FORMAT_ERROR", f"{name} must be a date (YYYY-MM-DD)")
    return datetime.date.fromisoformat(value)


def whole(value: str, name: str, low: int, high: int) -> int:
    """Return a whole number from `low` to `high`."""
    if not re.fullmatch(r"[0-9]{1,7}", value) or not low <= int(value) <= high:
        raise Refusal(400, "FORMAT_ERROR", f"{name} must be a whole number from {low} to {high}")
    return int(value)


def _check_digits_fit(value: str) -> bool:
    """ISO 13616: moved four characters to the right and read as digits (A = 10), an IBAN is 1 modulo 97."""
    return int("".join(str(int(character, 36)) for character in value[4:] + value[:4])) % 97 == 1
