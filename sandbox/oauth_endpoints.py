"""OAuth 2 over HTTP: metadata, pushed requests, tokens, revocation, introspection.

Rules this module keeps:
- Parameters come once and as a form; errors are RFC 6749 section 5.2's JSON; nothing here may be cached.
- Every endpoint but the metadata wants the TLS client certificate of the organisation that the client is, and
  `private_key_jwt`.
"""

from collections.abc import Callable, Mapping

from sandbox.assertions import AssertionRefused, ClientAuthenticator
from sandbox.directory import Client
from sandbox.oauth import REQUEST_URI_SECONDS, AuthorizationServer, IssuedTokens, OAuthError
from sandbox.web import Addresses, Answer, Call, Clock, json_answer, parse_parameters

METADATA_PATH = "/.well-known/oauth-authorization-server"
_NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}


class OAuthEndpoints:
    """The authorization server's side for clients."""

    def __init__(
        self, *, clock: Clock, server: AuthorizationServer, authenticator: ClientAuthenticator, addresses: Addresses
    ) -> None:
        self._clock = clock
        self._server = server
        self._authenticator = authenticator
        self._metadata = json_answer(200, metadata(addresses))
        self._endpoints: Mapping[str, Callable[[Client, Mapping[str, str], str], Answer]] = {
            "/oauth/par": self._push,
            "/oauth/token": self._token,
            "/oauth/revoke": self._revoke,
            "/oauth/introspect": self._introspect,
        }

    def answer(self, call: Call) -> Answer:
        """Answer one request of a client."""
        if call.path == METADATA_PATH:
            return (
                self._metadata if call.method == "GET" else _error(OAuthError("invalid_request", "use GET", status=405))
            )
        endpoint = self._endpoints.get(call.path)
        if endpoint is None:
            return _error(OAuthError("invalid_request", "there is nothing at this address", status=404))
        try:
            parameters = _form(call)
            client = self._client(call, parameters)
            return endpoint(client, parameters, call.thumbprint or "")
        except OAuthError as error:
            return _error(error)

    def _push(self, client: Client, parameters: Mapping[str, str], _thumbprint: str) -> Answer:
        request_uri = self._server.push(client, parameters)
        return json_answer(201, {"request_uri": request_uri, "expires_in": REQUEST_URI_SECONDS}, _NO_STORE)

    def _token(self, client: Client, parameters: Mapping[str, str], thumbprint: str) -> Answer:
        match parameters.get("grant_type"):
            case "authorization_code":
                return _token_answer(self._server.exchange(client, parameters, thumbprint))
            case "refresh_token":
                return _token_answer(self._server.refresh(client, parameters, thumbprint))
            case None:
                raise OAuthError("invalid_request", "grant_type is required")
            case _:
                raise OAuthError("unsupported_grant_type", "this grant_type is not offered")

    def _revoke(self, client: Client, parameters: Mapping[str, str], _thumbprint: str) -> Answer:
        if "token" not in parameters:
            raise OAuthError("invalid_request", "token is required")
        self._server.revoke_token(client, parameters["token"])
        return Answer(status=200, headers=_NO_STORE)

    def _introspect(self, client: Client, parameters: Mapping[str, str], _thumbprint: str) -> Answer:
        if "token" not in parameters:
            raise OAuthError("invalid_request", "token is required")
        return json_answer(200, self._server.introspect(client, parameters["token"]), _NO_STORE)

    def _client(self, call: Call, parameters: Mapping[str, str]) -> Client:
        try:
            client = self._authenticator.authenticate(parameters)
        except AssertionRefused as error:
            raise OAuthError("invalid_client", str(error), status=401) from error
        certificate = call.certificate
        if certificate is None or not certificate.in_force(self._clock()):
            raise OAuthError("invalid_client", "a TLS client certificate in force is required", status=401)
        if certificate.organisation_identifier != client.organisation_identifier:
            raise OAuthError("invalid_client", "the TLS client certificate is not this client's", status=401)
        return client


def metadata(addresses: Addresses) -> dict[str, object]:
    """Return the metadata document (RFC 8414, RFC 8705 section 5, RFC 9126 section 5, RFC 9207 section 3)."""
    with_certificate = {
        "token_endpoint": f"{addresses.api}/oauth/token",
        "pushed_authorization_request_endpoint": f"{addresses.api}/oauth/par",
        "revocation_endpoint": f"{addresses.api}/oauth/revoke",
        "introspection_endpoint": f"{addresses.api}/oauth/introspect",
    }
    return {
        "issuer": addresses.issuer,
        "authorization_endpoint": f"{addresses.issuer}/oauth/authorize",
        **with_certificate,
        "mtls_endpoint_aliases": with_certificate,
        "response_types_supported": ["code"],
        "response_modes_supported": ["query"],
        "grant_types_supported": ["authorization_code", "refresh_token"],
        "scopes_supported": ["AIS", "PIS"],
        "code_challenge_methods_supported": ["S256"],
        "token_endpoint_auth_methods_supported": ["private_key_jwt"],
        "token_endpoint_auth_signing_alg_values_supported": ["ES256"],
        "revocation_endpoint_auth_methods_supported": ["private_key_jwt"],
        "revocation_endpoint_auth_signing_alg_values_supported": ["ES256"],
        "introspection_endpoint_auth_methods_supported": ["private_key_jwt"],
        "introspection_endpoint_auth_signing_alg_values_supported": ["ES256"],
        "require_pushed_authorization_requests": True,
        "tls_client_certificate_bound_access_tokens": True,
        "authorization_response_iss_parameter_supported": True,
    }


def _form(call: Call) -> dict[str, str]:
    if call.method != "POST":
        raise OAuthError("invalid_request", "use POST", status=405)
    try:
        media_type = (call.header("content-type") or "").partition(";")[0].strip().lower()
        if media_type != "application/x-www-form-urlencoded":
            raise OAuthError("invalid_request", "Content-Type must be application/x-www-form-urlencoded")
        return parse_parameters(call.body.decode("utf-8"))
    except ValueError as error:
        raise OAuthError("invalid_request", "the form is not well formed, or has a name twice") from error


def _token_answer(tokens: IssuedTokens) -> Answer:
    document: dict[str, object] = {
        "access_token": tokens.access_token,
        "token_type": "Bearer",
        "expires_in": tokens.expires_in_seconds,
        "scope": tokens.scope,
    }
    if tokens.refresh_token is not None:
        document["refresh_token"] = tokens.refresh_token
    return json_answer(200, document, _NO_STORE)


def _error(error: OAuthError) -> Answer:
    document = {"error": error.error, "error_description": error.description}
    return json_answer(error.status, document, _NO_STORE)
