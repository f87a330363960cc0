"""Python client of the token custody sidecar: act with a person's consent and never hold its tokens.

    import custody

    with custody.Client("unix:/run/custody/custody.sock", owner="user:42") as client:
        client.wait_ready()
        pending = client.consents.create(...)

`custody.aio.Client` is the same for asyncio; `custody.testing.FakeCustody` is a sidecar in memory for your tests. The stubs
are in `custody.v1`; importing them loads nothing of the client.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from custody._calls import Page
    from custody._settings import Tls
    from custody.client import Client, Pages
    from custody.errors import (
        AuthorisationError,
        ConsentUnusableError,
        CustodyError,
        DataLossError,
        DeadlineExceededError,
        FieldViolation,
        InternalError,
        InvalidRequestError,
        LimitExceededError,
        NotFoundError,
        PermissionDeniedError,
        PreconditionError,
        ProviderRefusedError,
        RateLimitedError,
        RedirectRefusedError,
        RequestIdReusedError,
        UnauthenticatedError,
        UnavailableError,
        WaitTimeoutError,
    )
    from custody.money import Money
    from custody.reasons import ErrorReason
    from custody.values import (
        Account,
        AccountReference,
        AuditEntry,
        Balance,
        BalanceKind,
        BookingFilter,
        BookingStatus,
        Checkpoint,
        Consent,
        ConsentState,
        Finding,
        HsmToken,
        Key,
        LogStatus,
        PayloadKind,
        Payment,
        PaymentProduct,
        PaymentResolution,
        PaymentState,
        PendingConsent,
        PeriodAlignment,
        PeriodicLimit,
        PeriodType,
        Process,
        Provider,
        PsuContext,
        Purpose,
        Signature,
        Status,
        Transaction,
        VerificationKey,
    )

_HOMES = {
    "custody._calls": ("Page",),
    "custody._settings": ("Tls",),
    "custody.client": ("Client", "Pages"),
    "custody.errors": (
        "AuthorisationError",
        "ConsentUnusableError",
        "CustodyError",
        "DataLossError",
        "DeadlineExceededError",
        "FieldViolation",
        "InternalError",
        "InvalidRequestError",
        "LimitExceededError",
        "NotFoundError",
        "PermissionDeniedError",
        "PreconditionError",
        "ProviderRefusedError",
        "RateLimitedError",
        "RedirectRefusedError",
        "RequestIdReusedError",
        "UnauthenticatedError",
        "UnavailableError",
        "WaitTimeoutError",
    ),
    "custody.money": ("Money",),
    "custody.reasons": ("ErrorReason",),
    "custody.values": (
        "Account",
        "AccountReference",
        "AuditEntry",
        "Balance",
        "BalanceKind",
        "BookingFilter",
        "BookingStatus",
        "Checkpoint",
        "Consent",
        "ConsentState",
        "Finding",
        "HsmToken",
        "Key",
        "LogStatus",
        "PayloadKind",
        "Payment",
        "PaymentProduct",
        "PaymentResolution",
        "PaymentState",
        "PendingConsent",
        "PeriodAlignment",
        "PeriodType",
        "PeriodicLimit",
        "Process",
        "Provider",
        "PsuContext",
        "Purpose",
        "Signature",
        "Status",
        "Transaction",
        "VerificationKey",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("aio", "testing")

__all__ = [
    "Account",
    "AccountReference",
    "AuditEntry",
    "AuthorisationError",
    "Balance",
    "BalanceKind",
    "BookingFilter",
    "BookingStatus",
    "Checkpoint",
    "Client",
    "Consent",
    "ConsentState",
    "ConsentUnusableError",
    "CustodyError",
    "DataLossError",
    "DeadlineExceededError",
    "ErrorReason",
    "FieldViolation",
    "Finding",
    "HsmToken",
    "InternalError",
    "InvalidRequestError",
    "Key",
    "LimitExceededError",
    "LogStatus",
    "Money",
    "NotFoundError",
    "Page",
    "Pages",
    "PayloadKind",
    "Payment",
    "PaymentProduct",
    "PaymentResolution",
    "PaymentState",
    "PendingConsent",
    "PeriodAlignment",
    "PeriodType",
    "PeriodicLimit",
    "PermissionDeniedError",
    "PreconditionError",
    "Process",
    "Provider",
    "ProviderRefusedError",
    "PsuContext",
    "Purpose",
    "RateLimitedError",
    "RedirectRefusedError",
    "RequestIdReusedError",
    "Signature",
    "Status",
    "Tls",
    "Transaction",
    "UnauthenticatedError",
    "UnavailableError",
    "VerificationKey",
    "WaitTimeoutError",
]


def __getattr__(name: str) -> object:
    """Load a name when it is first asked for: whoever needs only the stubs does not load the client."""
    if name in _MODULES:
        return import_module(f"custody.{name}")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'custody' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF, *_MODULES])
