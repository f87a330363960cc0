"""Money is exact: an ISO 4217 code and a whole number of minor units. No float exists here."""

from dataclasses import dataclass
from decimal import Decimal

from sidecar.errors import FieldViolation, InvalidField

__all__ = ["EXPONENTS", "Money", "money_from_units", "parse_amount"]

# ISO 4217 minor-unit exponents of the currencies that European accounts are held in and pay out; others are refused
# because an unknown exponent would be a guess about money.
EXPONENTS = {
    "AUD": 2, "BGN": 2, "CAD": 2, "CHF": 2, "CZK": 2, "DKK": 2, "EUR": 2, "GBP": 2, "HKD": 2, "HUF": 2, "ISK": 0, "JPY": 0,
    "KWD": 3, "NOK": 2, "NZD": 2, "PLN": 2, "RON": 2, "SEK": 2, "SGD": 2, "TND": 3, "TRY": 2, "UAH": 2, "USD": 2,
}  # fmt: skip

_NANOS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Money:
    """`minor_units` of `currency_code` (EUR 12.50 has 1250)."""

    currency_code: str
    minor_units: int

    @property
    def amount(self) -> str:
        """The amount as decimal text with exactly the currency's decimals, '.' as separator (ISO 20022)."""
        exponent = EXPONENTS[self.currency_code]
        return f"{Decimal(self.minor_units).scaleb(-exponent):.{exponent}f}"


def money_from_units(currency_code: str, units: int, nanos: int, *, field: str) -> Money:
    """Money from the units and nanos of google.type.Money.

    Raises InvalidField for an unknown currency, opposite signs, nanos out of range and more decimals than the currency has.
    """
    if currency_code not in EXPONENTS:
        raise _violation(
            f"{field}.currency_code", "currency", "must be an ISO 4217 code that is supported, in capitals"
        )
    if not -_NANOS < nanos < _NANOS or (units > 0 > nanos) or (units < 0 < nanos):
        raise _violation(f"{field}.nanos", "range", "must be between -999999999 and 999999999 with the sign of units")
    total = units * _NANOS + nanos
    minor, rest = divmod(total, _NANOS // 10 ** EXPONENTS[currency_code])
    if rest:
        raise _violation(f"{field}.nanos", "decimals", "must not have more decimals than the currency has")
    return Money(currency_code=currency_code, minor_units=minor)


def parse_amount(currency_code: str, text: str) -> Money | None:
    """Money from a provider's decimal text, or None where it is not an exact amount in a known currency."""
    if currency_code not in EXPONENTS or len(text) > 20:
        return None
    digits = text.removeprefix("-")
    whole, point, fraction = digits.partition(".")
    if not (whole.isascii() and whole.isdigit()) or (point and not (fraction.isascii() and fraction.isdigit())):
        return None
    exponent = EXPONENTS[currency_code]
    if fraction[exponent:].strip("0"):
        return None
    minor = int(whole + fraction[:exponent].ljust(exponent, "0"))
    return Money(currency_code=currency_code, minor_units=-minor if text.startswith("-") else minor)


def _violation(field: str, rule: str, description: str) -> InvalidField:
    return InvalidField(FieldViolation(field=field, rule=rule, description=description))
