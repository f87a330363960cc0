"""Which caller may use which method, on which socket. A method without a row is refused, whoever calls."""

from types import MappingProxyType
from typing import Final

from sidecar.domain.caller import Role

__all__ = ["EVERY_ROLE", "METHODS", "SURFACE_ROLES"]

_APPLICATION: Final = frozenset({Role.APPLICATION})
_ADMINISTRATOR: Final = frozenset({Role.ADMINISTRATOR})
_OVERSIGHT: Final = frozenset({Role.ADMINISTRATOR, Role.AUDITOR})
EVERY_ROLE: Final = frozenset(Role)

# An administrator's roles count only on the administration socket, an application's only on the API socket: application
# containers do not mount the former, so nothing that runs there can administer, whatever its certificate says.
SURFACE_ROLES: Final = MappingProxyType({"api": _APPLICATION, "admin": _OVERSIGHT})

METHODS: Final = MappingProxyType(
    {
        "/custody.v1.ConsentService/CreateConsent": _APPLICATION,
        "/custody.v1.ConsentService/CompleteConsent": _APPLICATION,
        "/custody.v1.ConsentService/GetImportKey": _APPLICATION,
        "/custody.v1.ConsentService/ImportConsent": _APPLICATION,
        "/custody.v1.ConsentService/GetConsent": _APPLICATION | _ADMINISTRATOR,
        "/custody.v1.ConsentService/ListConsents": _APPLICATION | _ADMINISTRATOR,
        "/custody.v1.ConsentService/RevokeConsent": _APPLICATION | _ADMINISTRATOR,
        "/custody.v1.PaymentService/InitiatePayment": _APPLICATION,
        "/custody.v1.PaymentService/GetPayment": _APPLICATION | _ADMINISTRATOR,
        "/custody.v1.PaymentService/ListPayments": _APPLICATION | _ADMINISTRATOR,
        "/custody.v1.PaymentService/ResolvePayment": _ADMINISTRATOR,
        "/custody.v1.AccountService/ListAccounts": _APPLICATION,
        "/custody.v1.AccountService/ListBalances": _APPLICATION,
        "/custody.v1.AccountService/ListTransactions": _APPLICATION,
        "/custody.v1.SigningService/Sign": _APPLICATION,
        "/custody.v1.SigningService/ListVerificationKeys": EVERY_ROLE,
        "/custody.v1.ProviderService/ListProviders": _APPLICATION | _ADMINISTRATOR,
        "/custody.v1.ProviderService/GetProvider": _APPLICATION | _ADMINISTRATOR,
        "/custody.v1.KeyService/GetStatus": _ADMINISTRATOR,
        "/custody.v1.KeyService/ListKeys": _ADMINISTRATOR,
        "/custody.v1.AuditService/ListEntries": _OVERSIGHT,
        "/custody.v1.AuditService/GetCheckpoint": _OVERSIGHT,
        "/custody.v1.AuditService/ExportLog": _OVERSIGHT,
        "/grpc.health.v1.Health/Check": EVERY_ROLE,
        "/grpc.health.v1.Health/Watch": EVERY_ROLE,
        "/grpc.health.v1.Health/List": EVERY_ROLE,
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": EVERY_ROLE,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": EVERY_ROLE,
    }
)
