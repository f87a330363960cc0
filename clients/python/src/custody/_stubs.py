"""The raw stubs, by name, for what the client does not offer."""

import grpc
import grpc.aio

from custody.v1 import (
    account_pb2_grpc,
    audit_pb2_grpc,
    consent_pb2_grpc,
    key_pb2_grpc,
    payment_pb2_grpc,
    provider_pb2_grpc,
    signing_pb2_grpc,
)

__all__ = ["Stubs"]


class Stubs:
    """The generated stubs of all services on one channel."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        self.consents = consent_pb2_grpc.ConsentServiceStub(channel)
        self.payments = payment_pb2_grpc.PaymentServiceStub(channel)
        self.accounts = account_pb2_grpc.AccountServiceStub(channel)
        self.signing = signing_pb2_grpc.SigningServiceStub(channel)
        self.providers = provider_pb2_grpc.ProviderServiceStub(channel)
        self.keys = key_pb2_grpc.KeyServiceStub(channel)
        self.audit = audit_pb2_grpc.AuditServiceStub(channel)
