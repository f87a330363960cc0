"""Everything that the processes say to each other.

Each socket has its own short list of operations (the `…Operation` unions); anything else ends the connection:
gateway to hsm may sign and manage master keys but never gets a data key; egress to hsm makes and opens data keys but never
signs; gateway to egress sends rendered requests and sealed secrets and gets answers and sealed secrets back.
"""

from enum import IntEnum
from typing import Annotated, Any

import msgspec

from sidecar.domain.provider import (
    Answer,
    KeyPurpose,
    NotSent,
    ProviderRequest,
    SendOutcome,
    TokenGrant,
    TokenOutcome,
    TokensRefused,
    Unknown,
)
from sidecar.domain.secrets import SealedSecret, SecretContext
from sidecar.errors import (
    Corrupt,
    CustodyError,
    FieldViolation,
    Internal,
    InvalidField,
    PreconditionFailed,
    Refused,
    Unavailable,
)


class Message(msgspec.Struct, tag=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all messages: tagged by its class name; unknown fields are refused."""


Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
KeyId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]

# --- every socket ------------------------------------------------------------------------------------------------------


class Ping(Message, frozen=True):
    pass


class Pong(Message, frozen=True):
    pass


class Failure(Message, frozen=True):
    """An error of `sidecar.errors`, by class and reason. `description` is one of our constants, never foreign text."""

    kind: str
    reason: str
    description: str


# --- gateway to hsm ----------------------------------------------------------------------------------------------------


class Sign(Message, frozen=True):
    purpose: KeyPurpose
    digest: Digest


class Signature(Message, frozen=True):
    """r || s, 64 bytes (P-256)."""

    value: bytes


class WrappedMasterKey(Message, frozen=True):
    key_id: KeyId
    version: int
    wrapped: bytes
    current: bool


class LoadMasterKeys(Message, frozen=True):
    """All versions there are, exactly one of them current. Replaces what the process had."""

    keys: tuple[WrappedMasterKey, ...]


class MasterKeysLoaded(Message, frozen=True):
    count: int


class CreateMasterKey(Message, frozen=True):
    """A new master key from the HSM's random numbers, wrapped by the root key. Not loaded: the gateway stores it first."""

    version: int


class MasterKeyCreated(Message, frozen=True):
    key: WrappedMasterKey
    root_key_id: str


class GetHsmStatus(Message, frozen=True):
    pass


class KeyDescription(Message, frozen=True):
    """`attributes` are those that were read back from the token; `spki_der` is empty for secret keys."""

    purpose: KeyPurpose
    label: str
    id_hex: str
    key_type: str
    size_bits: int
    attributes: dict[str, bool]
    spki_der: bytes
    key_id: str


class HsmStatus(Message, frozen=True):
    """What an administrator may see. PIN flags as the token reports them."""

    module: str
    library_description: str
    library_version: str
    token_label: str
    token_serial: str
    token_model: str
    logged_in: bool
    user_pin_count_low: bool
    user_pin_final_try: bool
    user_pin_locked: bool
    master_key_versions: tuple[int, ...]
    current_master_key_version: int
    keys: tuple[KeyDescription, ...]


GatewayToHsm = Ping | Sign | LoadMasterKeys | CreateMasterKey | GetHsmStatus
HsmToGateway = Pong | Signature | MasterKeysLoaded | MasterKeyCreated | HsmStatus | Failure

# --- egress to hsm -----------------------------------------------------------------------------------------------------


class CreateDataKey(Message, frozen=True):
    context: SecretContext


class DataKeyCreated(Message, frozen=True):
    """`key` lies in the receive buffer: use it there and wipe the buffer."""

    wrapped: bytes
    key_id: KeyId
    key: memoryview


class OpenDataKey(Message, frozen=True):
    wrapped: bytes
    context: SecretContext


class DataKeyOpened(Message, frozen=True):
    key_id: KeyId
    key: memoryview


EgressToHsm = Ping | CreateDataKey | OpenDataKey
HsmToEgress = Pong | DataKeyCreated | DataKeyOpened | Failure

# --- gateway to egress -------------------------------------------------------------------------------------------------


class OpenSecretMessage(Message, frozen=True):
    secret: SealedSecret
    context: SecretContext


class NewSecrets(Message, frozen=True):
    context: SecretContext


class NewSecretsMade(Message, frozen=True):
    wrapped_data_key: bytes
    pkce_verifier: bytes
    code_challenge: str


class Call(Message, frozen=True):
    """`own_connection`: opened for this request and closed after it."""

    request: ProviderRequest
    wrapped_data_key: bytes
    secrets: tuple[OpenSecretMessage, ...]
    own_connection: bool


class RequestTokens(Message, frozen=True):
    request: ProviderRequest
    wrapped_data_key: bytes
    secrets: tuple[OpenSecretMessage, ...]
    seal_access_as: SecretContext
    seal_refresh_as: SecretContext


class Prepare(Message, frozen=True):
    request: ProviderRequest
    wrapped_data_key: bytes
    secrets: tuple[OpenSecretMessage, ...]


class PreparedHandle(Message, frozen=True):
    handle: int


class Send(Message, frozen=True):
    """Sends what was prepared under `handle`, once, if `send_before_boot_time_ns` has not passed."""

    handle: int
    send_before_boot_time_ns: int


class Discard(Message, frozen=True):
    handle: int


class Done(Message, frozen=True):
    pass


class Answered(Message, frozen=True):
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class NothingSent(Message, frozen=True):
    code: str


class OutcomeUnknown(Message, frozen=True):
    code: str


class Granted(Message, frozen=True):
    access_token: bytes
    refresh_token: bytes | None
    expires_in_seconds: int | None
    scope: str | None


class GrantRefused(Message, frozen=True):
    status: int
    error: str


class GetImportKey(Message, frozen=True):
    pass


class ImportKeyIs(Message, frozen=True):
    key_id: str
    public_key: bytes


class ImportTokens(Message, frozen=True):
    key_id: str
    sealed_tokens: bytes
    info: bytes
    seal_access_as: SecretContext
    seal_refresh_as: SecretContext


class TokensImported(Message, frozen=True):
    wrapped_data_key: bytes
    access_token: bytes
    refresh_token: bytes | None


class Forget(Message, frozen=True):
    wrapped_data_key: bytes


class GetEgressStatus(Message, frozen=True):
    pass


class EgressStatus(Message, frozen=True):
    """Counters for the posture report: how many data keys are cached, how many prepared requests wait."""

    cached_data_keys: int
    prepared: int
    hsm_connected: bool


GatewayToEgress = (
    Ping
    | NewSecrets
    | Call
    | RequestTokens
    | Prepare
    | Send
    | Discard
    | GetImportKey
    | ImportTokens
    | Forget
    | GetEgressStatus
)
EgressToGateway = (
    Pong
    | NewSecretsMade
    | Answered
    | NothingSent
    | OutcomeUnknown
    | Granted
    | GrantRefused
    | PreparedHandle
    | Done
    | ImportKeyIs
    | TokensImported
    | EgressStatus
    | Failure
)

# --- envelopes: one type per direction and socket, so that a decoder refuses everything else ------------------------------


class Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`id` pairs an answer with its request; `deadline_boot_time_ns` is when the asker stops waiting (0 in answers)."""

    id: int
    deadline_boot_time_ns: int = 0


class GatewayToHsmFrame(Envelope, frozen=True, kw_only=True):
    body: GatewayToHsm


class HsmToGatewayFrame(Envelope, frozen=True, kw_only=True):
    body: HsmToGateway


class EgressToHsmFrame(Envelope, frozen=True, kw_only=True):
    body: EgressToHsm


class HsmToEgressFrame(Envelope, frozen=True, kw_only=True):
    body: HsmToEgress


class GatewayToEgressFrame(Envelope, frozen=True, kw_only=True):
    body: GatewayToEgress


class EgressToGatewayFrame(Envelope, frozen=True, kw_only=True):
    body: EgressToGateway


def decoder_for(frame_type: type[Envelope]) -> "msgspec.msgpack.Decoder[Any]":
    """A strict decoder of one direction of one socket."""
    return msgspec.msgpack.Decoder(frame_type)


# --- how a child process ends ------------------------------------------------------------------------------------------


class ChildExit(IntEnum):
    """Exit codes of hsm and egress; the supervisor decides by them. Any other code is a crash: start it again."""

    STOPPED = 0  # its gateway closed the socket
    SICK = 40  # it cannot go on, and a new process may: session or device lost, a defect
    UNREACHABLE = 41  # the token (or what else it needs from outside) is not there now
    BAD_PEER = 42  # the gateway's socket carried something that is not our protocol
    SETTINGS_REFUSED = 50
    PIN_REFUSED = 51  # wrong, locked, or one try before locked: each further start would cost another try
    PIN_FILE_REFUSED = 52
    KEY_REFUSED = 53  # missing, twice there, weaker than it must be, or it does not compute what it must

    @property
    def may_restart(self) -> bool:
        return self < ChildExit.SETTINGS_REFUSED


# --- settings of the child processes: one JSON document, read once from an inherited descriptor at start --------------------


class KeyReference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a key is found in the token: by label and id together (PKCS#11 CKA_LABEL, CKA_ID), exactly one match."""

    purpose: KeyPurpose
    label: str
    id_hex: str


class KeyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """keys.json, as provisioning writes it. `keys` is what `HsmSettings.keys` takes; `descriptions` is what was read back from
    the token, public keys included. No secrets."""

    token_label: str
    token_serial: str
    keys: tuple[KeyReference, ...]
    descriptions: tuple[KeyDescription, ...]


class HsmSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cluster: str
    module_path: str
    token_label: str
    token_serial: str
    pin_file: str
    keys: tuple[KeyReference, ...]


class ProviderTransport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One origin that egress may talk to, and how. Any other origin is refused."""

    provider: str
    origin: str
    ca_file: str
    client_certificate_file: str = ""
    client_key_file: str = ""


class EgressSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cluster: str
    transports: tuple[ProviderTransport, ...]
    data_key_cache_seconds: float = 60.0
    data_key_cache_size: int = 1000
    connect_timeout_seconds: float = 5.0
    max_answer_bytes: int = 4 * 1024 * 1024
    connections_per_origin: int = 64


# --- conversions ---------------------------------------------------------------------------------------------------------

_ERRORS: dict[str, type[CustodyError]] = {
    "Unavailable": Unavailable,
    "Corrupt": Corrupt,
    "PreconditionFailed": PreconditionFailed,
    "Refused": Refused,
}


def failure_of(error: CustodyError) -> Failure:
    return Failure(kind=type(error).__name__, reason=error.reason, description=error.message)


def error_of(failure: Failure) -> CustodyError:
    """The error that the peer named; kinds that are not expected over a socket become Unavailable."""
    if failure.kind == "InvalidField":
        field, _, description = failure.description.partition(": ")
        return InvalidField(FieldViolation(field=field, rule="sealed_tokens", description=description))
    if failure.kind == "Internal":
        return Internal(failure.description)
    kind = _ERRORS.get(failure.kind, Unavailable)
    return kind(failure.reason, failure.description)


def outcome_message(outcome: SendOutcome) -> Answered | NothingSent | OutcomeUnknown:
    match outcome:
        case Answer():
            return Answered(status=outcome.status, headers=outcome.headers, body=outcome.body)
        case NotSent():
            return NothingSent(code=outcome.code)
        case Unknown():
            return OutcomeUnknown(code=outcome.code)


def send_outcome(message: Message) -> SendOutcome | None:
    """The outcome that a message carries, or None when it is another kind of message."""
    match message:
        case Answered():
            return Answer(status=message.status, headers=message.headers, body=message.body)
        case NothingSent():
            return NotSent(code=message.code)
        case OutcomeUnknown():
            return Unknown(code=message.code)
        case _:
            return None


def token_outcome(message: Message) -> TokenOutcome | None:
    match message:
        case Granted():
            return TokenGrant(
                access_token=message.access_token,
                refresh_token=message.refresh_token,
                expires_in_seconds=message.expires_in_seconds,
                scope=message.scope,
            )
        case GrantRefused():
            return TokensRefused(status=message.status, error=message.error)
        case NothingSent():
            return NotSent(code=message.code)
        case OutcomeUnknown():
            return Unknown(code=message.code)
        case _:
            return None
