"""Who is asking: the client behind the certificate, and what the token it sends stands for.

Rules this module keeps:
- A token counts only with the client certificate for which it was issued (RFC 8705).
- Roles are those of the certificate; scope and consent are those of the token.
"""

from collections.abc import Mapping

from sandbox.berlin_group.fields import Refusal
from sandbox.directory import Client
from sandbox.oauth import AuthorizationServer, Grant, TokenRefused
from sandbox.web import Call, Clock


class Callers:
    """Tells who is asking."""

    def __init__(self, *, clock: Clock, clients: Mapping[str, Client], oauth: AuthorizationServer) -> None:
        self._clock = clock
        self._by_organisation = {client.organisation_identifier: client for client in clients.values()}
        self._oauth = oauth

    def client(self, call: Call) -> Client:
        """Return the registered client whose TLS certificate this is."""
        certificate = call.certificate
        if certificate is None:
            raise Refusal(401, "CERTIFICATE_MISSING", "a TLS client certificate is required")
        if not certificate.in_force(self._clock()):
            raise Refusal(401, "CERTIFICATE_EXPIRED", "the TLS client certificate is not in force")
        client = self._by_organisation.get(certificate.organisation_identifier or "")
        if client is None:
            raise Refusal(401, "CERTIFICATE_INVALID", "the TLS client certificate names no registered client")
        return client

    def grant(self, call: Call, client: Client) -> Grant:
        """Return what the request's access token stands for."""
        scheme, _, token = (call.header("authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "TOKEN_UNKNOWN", "a Bearer token is required", challenge=True)
        try:
            grant = self._oauth.open(token, call.thumbprint)
        except TokenRefused as error:
            text = "the token is not valid, or not with this client certificate"
            raise Refusal(401, error.code, text, challenge=True) from error
        if grant.client_id != client.client_id:
            raise Refusal(401, "TOKEN_INVALID", "the token belongs to another client", challenge=True)
        return grant

    def payment_grant(self, call: Call, client: Client) -> Grant:
        """Return the grant of a token that may start payments."""
        grant = self.grant(call, client)
        if not grant.payments:
            raise Refusal(401, "TOKEN_INVALID", "the token has not the scope PIS", challenge=True)
        if grant.consent is not None and grant.consent.status(self._clock()) != "valid":
            raise Refusal(401, "CONSENT_INVALID", "the consent is no longer valid")
        if call.headers.get("consent-id") and (
            grant.consent is None or call.header("consent-id") != grant.consent.consent_id
        ):
            raise Refusal(401, "CONSENT_INVALID", "the token was not given under this consent")
        return grant


def must_have_role(call: Call, role: str) -> None:
    """Refuse a client whose certificate does not give it the role."""
    if call.certificate is None or role not in call.certificate.roles:
        raise Refusal(401, "ROLE_INVALID", f"the TLS client certificate has not the role {role}")
