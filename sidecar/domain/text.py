"""Checks of text that goes to a bank: IBAN, the SEPA character set, owner ids."""

import re

from schwifty import IBAN
from schwifty.exceptions import SchwiftyException

from sidecar.errors import FieldViolation, InvalidField

__all__ = ["check_iban", "check_sepa_text"]

# EPC 217-08: the characters every SEPA bank must take. '/' must not begin or end a text, nor stand twice in a row.
_SEPA = re.compile(r"[A-Za-z0-9/\-?:().,'+ ]*\Z")


def check_iban(iban: str, *, field: str) -> str:
    """The IBAN in its electronic form (ISO 13616: no blanks, capitals), checked for country, length and check digits.

    Raises InvalidField; the text of the request is not repeated.
    """
    try:
        parsed = IBAN(iban)
    except (SchwiftyException, ValueError) as error:
        raise _violation(field, "iban", "must be a valid IBAN (country, length, check digits)") from error
    if str(parsed) != iban:
        raise _violation(field, "iban", "must be in electronic form: capitals, no blanks")
    return iban


def check_sepa_text(text: str, *, field: str, max_length: int, min_length: int = 0) -> str:
    """`text`, of `min_length` to `max_length` characters of the SEPA character set (EPC 217-08).

    Raises InvalidField.
    """
    if not min_length <= len(text) <= max_length:
        raise _violation(field, "length", f"must have {min_length} to {max_length} characters")
    if not _SEPA.match(text):
        raise _violation(field, "sepa_characters", "must contain only A-Z a-z 0-9 / - ? : ( ) . , ' + and blank")
    if text != text.strip() or text.startswith("/") or text.endswith("/") or "//" in text:
        raise _violation(field, "sepa_form", "must not begin or end with a blank or '/', nor contain '//'")
    return text


def _violation(field: str, rule: str, description: str) -> InvalidField:
    return InvalidField(FieldViolation(field=field, rule=rule, description=description))
