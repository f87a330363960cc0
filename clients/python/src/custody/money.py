"""Exact money. An amount is a Decimal with the decimals that ISO 4217 gives its currency; a float is refused, always.

Nothing is rounded: an amount with more decimals than its currency has is an error of the caller.
"""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Self

__all__ = ["Money", "exponent_of"]

_BY_EXPONENT = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    2: """AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF CHW CNY
          COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR
          IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MXV MYR MZN NAD
          NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP
          SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD USN UYU UZS VED VES WST XCD XCG YER ZAR ZMW ZWG""",
    3: "BHD IQD JOD KWD LYD OMR TND",
}
_EXPONENTS = {code: exponent for exponent, codes in _BY_EXPONENT.items() for code in codes.split()}
_NANOS_PER_UNIT = 1_000_000_000


@dataclass(frozen=True, slots=True, init=False)
class Money:
    """An amount in one currency: `Money("12.34", "EUR")`.

    `amount` has exactly the decimals of its currency; `currency_code` is an ISO 4217 code.
    """

    amount: Decimal
    currency_code: str

    def __init__(self, amount: Decimal | int | str, currency_code: str) -> None:
        """Take an exact amount. Raises TypeError for a float, ValueError for anything that the currency cannot express."""
        exponent = exponent_of(currency_code)
        exact = _exact(amount)
        quantized = exact.quantize(Decimal(1).scaleb(-exponent))
        if quantized != exact:
            raise ValueError(f"{currency_code} has {exponent} decimals")
        _set(self, quantized, currency_code)

    def __str__(self) -> str:
        return f"{self.amount} {self.currency_code}"

    @classmethod
    def received(cls, *, units: int, nanos: int, currency_code: str) -> Self:
        """Take an amount as a provider gave it: exactly, whatever its currency, since refusing would hide it."""
        amount = Decimal(units) + Decimal(nanos).scaleb(-9)
        exponent = _EXPONENTS.get(currency_code, 2)
        padded = amount.quantize(Decimal(1).scaleb(-exponent))
        money = object.__new__(cls)
        _set(money, padded if padded == amount else amount.normalize(), currency_code)
        return money

    def units_and_nanos(self) -> tuple[int, int]:
        """Split into whole units and 10^-9 parts of one, both of the amount's sign (google.type.Money)."""
        units = int(self.amount)
        return units, int((self.amount - units) * _NANOS_PER_UNIT)


def exponent_of(currency_code: str) -> int:
    """Answer with the number of decimals of a currency. Raises ValueError for a code that ISO 4217 does not have."""
    try:
        return _EXPONENTS[currency_code]
    except KeyError:
        raise ValueError("the currency must be an ISO 4217 code in capitals") from None


def _exact(amount: Decimal | int | str) -> Decimal:
    if isinstance(amount, bool) or not isinstance(amount, Decimal | int | str):
        raise TypeError("an amount is a Decimal, an int or a str: a float is not exact")
    try:
        exact = Decimal(amount)
    except InvalidOperation:
        raise ValueError("the amount is not a decimal number") from None
    if not exact.is_finite() or abs(exact) >= 10**14:
        raise ValueError("the amount must be below 10^14")
    return exact


def _set(money: Money, amount: Decimal, currency_code: str) -> None:
    object.__setattr__(money, "amount", amount)
    object.__setattr__(money, "currency_code", currency_code)
