"""The configuration: one YAML file, checked whole, every mistake reported at once.

Rules: unknown keys are refused; duplicates and aliases are refused; secrets appear only as names of files; a value that the
command line (`--store.path=…`) or the environment (`CUSTODY_STORE_PATH=…`) gives under the same name overrides the file's.
The structures below are the schema (docs/configuration.md); their names are the keys.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import yaml
from jsonschema import Draft202012Validator, ValidationError
from msgspec import inspect

__all__ = [
    "AddressKind",
    "Configuration",
    "ConfigurationError",
    "HsmConfiguration",
    "Listener",
    "PolicyFile",
    "PolicyLimit",
    "PolicyPeriodicLimit",
    "ProviderConfiguration",
    "load_configuration",
    "load_policy",
    "load_yaml",
    "scalar_names",
    "shown",
]

T = TypeVar("T")

_NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"
Name = Annotated[str, msgspec.Meta(pattern=_NAME, description="1 to 63 of a-z, 0-9 and inner '-'")]
InstanceName = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[a-z0-9]([a-z0-9.-]{0,126}[a-z0-9])?\Z", description="1 to 128 of a-z, 0-9 and inner '-' and '.'"
    ),
]
FilePath = Annotated[str, msgspec.Meta(pattern=r"^/[^\x00]*\Z", max_length=4096, description="an absolute path")]
SpiffeId = Annotated[
    str, msgspec.Meta(pattern=r"^spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)+\Z", max_length=2048)
]  # SPIFFE ID standard, section 2
HostPort = Annotated[str, msgspec.Meta(pattern=r"^(127\.0\.0\.1|\[::1\]|0\.0\.0\.0|\[::\]|localhost):[0-9]{1,5}\Z")]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]

_MAX_FILE_BYTES = 1_000_000
_LONGEST_SOCKET_PATH_BYTES = 107  # sun_path of Linux has 108, the last for NUL (unix(7))

AddressKind = Literal["api", "admin"]


class ConfigurationError(Exception):
    """Every mistake that was found, one per line, each with the key it is at."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Tls(_Section, frozen=True, kw_only=True):
    """mTLS: callers are known by the SPIFFE ID (URI SAN) of a certificate that `client_ca_file` issued."""

    certificate_file: FilePath
    key_file: FilePath
    client_ca_file: FilePath
    trust_domain: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9._-]{1,255}\Z")]


class Listener(_Section, frozen=True, kw_only=True):
    """A socket. Exactly one of `tls` and `workload`: `workload` binds a Unix socket, which exactly one container mounts, to
    one caller. `address` is `unix:/path` or HOST:PORT; HOST:PORT needs `tls`."""

    address: Annotated[
        str, msgspec.Meta(pattern=r"^(unix:/[^\x00]{1,107}|[^:/]+:[0-9]{1,5}|\[[0-9a-f:]+\]:[0-9]{1,5})\Z")
    ]
    surface: AddressKind
    tls: Tls | None = None
    workload: Name | None = None
    mode: Literal["0600", "0660"] = "0600"


class StoreConfiguration(_Section, frozen=True, kw_only=True):
    """Exactly one of `path` (SQLite, a file of this sidecar's own) and `url` (PostgreSQL, a database that sidecars share).
    `instance` names this sidecar's log in the shared database: the next process of that name continues it. Without it, it is the
    name of the host."""

    path: FilePath | None = None
    synchronous: Literal["FULL", "EXTRA"] = "FULL"
    url: Annotated[str, msgspec.Meta(pattern=r"^postgres(ql)?://[^\s\x00]*\Z", max_length=4096)] | None = None
    instance: InstanceName | None = None
    synchronous_commit: Literal["on", "remote_apply"] = "on"
    read_connections: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4


class HsmConfiguration(_Section, frozen=True, kw_only=True):
    """`keys_file` is what `python -m sidecar.hsm.provisioning` wrote: labels and ids, no secrets."""

    module_path: FilePath
    token_label: Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
    token_serial: Annotated[str, msgspec.Meta(min_length=1, max_length=16)]
    pin_file: FilePath
    keys_file: FilePath


class ProviderConfiguration(_Section, frozen=True, kw_only=True):
    """`descriptor` is a name of the built-in catalog or an absolute path. `client_key_file` is a TLS key in a file: only what
    `allow_client_key_file: true` says by name is accepted, because keys belong into the HSM."""

    id: Name
    descriptor: Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9-]{1,63}|/[^\x00]+\.yaml)\Z")]
    ca_file: FilePath
    client_certificate_file: FilePath | None = None
    client_key_file: FilePath | None = None
    allow_client_key_file: bool = False
    signing_certificate_file: FilePath | None = None
    client_assertion_key_id: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    variables: dict[str, str] = {}


class LogConfiguration(_Section, frozen=True, kw_only=True):
    level: Literal["debug", "info", "warning", "error"] = "info"


class Limits(_Section, frozen=True, kw_only=True):
    """Per caller. `calls_per_second` with a burst of the same number of seconds' worth; `concurrent_calls` over all callers."""

    calls_per_second: Annotated[float, msgspec.Meta(gt=0, le=100_000)] = 2000.0
    concurrent_calls: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    message_bytes: Annotated[int, msgspec.Meta(ge=1024, le=4_194_304)] = 262_144


class Configuration(_Section, frozen=True, kw_only=True):
    cluster: Name
    listeners: Annotated[tuple[Listener, ...], msgspec.Meta(min_length=1, max_length=32)]
    operations_address: HostPort
    policy_file: FilePath
    store: StoreConfiguration
    hsm: HsmConfiguration
    providers: Annotated[tuple[ProviderConfiguration, ...], msgspec.Meta(min_length=1, max_length=1000)]
    log: LogConfiguration = LogConfiguration()
    limits: Limits = Limits()
    shutdown_seconds: Seconds = 25.0  # longer than a payment's send may take; Kubernetes gives 30


class PolicyLimit(_Section, frozen=True, kw_only=True):
    """The largest single payment in a currency, as decimal text."""

    currency_code: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{3}\Z")]
    amount: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,12}(\.[0-9]{1,3})?\Z")]


class PolicyPeriodicLimit(_Section, frozen=True, kw_only=True):
    """The most that all payments of a workload may move together in one period of the calendar, in UTC: a week begins on Monday, a
    fortnight is two weeks counted from 1 January 2001, a half-year begins on 1 January or 1 July. Payments of unknown outcome
    count; only a definite rejection gives an amount back."""

    currency_code: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{3}\Z")]
    amount: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,12}(\.[0-9]{1,3})?\Z")]
    period_type: Literal["day", "week", "fortnight", "month", "half-year", "year"]


class PolicyWorkload(_Section, frozen=True, kw_only=True):
    """`workload` is a SPIFFE ID or `workload:NAME` of a bound socket. `owners: any` or a list; there are no patterns."""

    workload: Annotated[
        str, msgspec.Meta(pattern=r"^(spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)+|workload:[a-z0-9-]{1,63})\Z")
    ]
    roles: Annotated[tuple[Literal["application", "administrator", "auditor"], ...], msgspec.Meta(min_length=1)]
    purposes: tuple[Literal["accounts", "balances", "transactions", "payments", "signing"], ...] = ()
    providers: tuple[Name, ...] = ()
    imports: bool = False  # whether it may bring in tokens that it holds elsewhere
    owners: Literal["any"] | tuple[Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._:@-]{1,64}\Z")], ...] = ()
    payment_limits: tuple[PolicyLimit, ...] = ()
    periodic_limits: tuple[PolicyPeriodicLimit, ...] = ()


class PolicyFile(_Section, frozen=True, kw_only=True):
    workloads: tuple[PolicyWorkload, ...]


def load_configuration(
    path: Path, *, flags: Mapping[str, str] | None = None, environment: Mapping[str, str] | None = None
) -> Configuration:
    """The configuration in `path`, overridden by the environment and then by flags.

    Raises ConfigurationError with every mistake.
    """
    document = load_yaml(path)
    given, mistakes = _from_environment(environment or {})
    for dotted, text in {**given, **(flags or {})}.items():
        mistakes += _override(document, dotted, text)
    mistakes += _schema_mistakes(document, Configuration)
    mistakes += _store_mistakes(document.get("store"))
    mistakes += _listener_mistakes(_valid(document.get("listeners"), Listener))
    mistakes += _provider_mistakes(_valid(document.get("providers"), ProviderConfiguration))
    mistakes += _port_mistakes("operations_address", document.get("operations_address"))
    if mistakes:
        raise ConfigurationError(mistakes)
    return _converted(document, Configuration)


def load_policy(path: Path) -> PolicyFile:
    """The policy file. Raises ConfigurationError with every mistake."""
    document = load_yaml(path)
    mistakes = _schema_mistakes(document, PolicyFile)
    entries = _valid(document.get("workloads"), PolicyWorkload)
    names = [entry.workload for _, entry in entries]
    mistakes += [f"workloads: {name} stands more than once" for name in sorted(_doubled(names))]
    for index, entry in entries:
        codes = sorted(_doubled(limit.currency_code for limit in entry.payment_limits))
        mistakes += [f"workloads[{index}].payment_limits: {code} stands more than once" for code in codes]
        mistakes += [f"workloads[{index}].periodic_limits{mistake}" for mistake in _periodic_mistakes(entry)]
    if mistakes:
        raise ConfigurationError(mistakes)
    return _converted(document, PolicyFile)


def _periodic_mistakes(entry: PolicyWorkload) -> Iterator[str]:
    kinds = [f"{limit.currency_code} a {limit.period_type}" for limit in entry.periodic_limits]
    yield from (f": {kind} stands more than once" for kind in sorted(_doubled(kinds)))
    allowed = {limit.currency_code for limit in entry.payment_limits}
    for index, limit in enumerate(entry.periodic_limits):
        if limit.currency_code not in allowed:
            yield f"[{index}].currency_code: {limit.currency_code} has no limit in payment_limits, so no payment is allowed in it"


def load_yaml(path: Path) -> dict[str, Any]:
    """One YAML document: a mapping, without duplicate keys, aliases or tags. Raises ConfigurationError."""
    try:
        if not path.is_file():  # a pipe or a device could be read for ever
            raise ConfigurationError([f"{path}: is no file"])
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigurationError([f"{path}: cannot be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError([f"{path}: is not UTF-8 text"]) from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigurationError([f"{path}: is larger than 1 MB"])
    try:
        document = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader with more rules
    except yaml.YAMLError as error:
        raise ConfigurationError([f"{path}: {_yaml_problem(error)}"]) from error
    except (ValueError, RecursionError) as error:  # a date that is none, a nesting without end
        raise ConfigurationError([f"{path}: holds a value that cannot be read"]) from error
    if not isinstance(document, dict):
        raise ConfigurationError([f"{path}: must be a mapping"])
    return document


def shown(configuration: Configuration) -> dict[str, Any]:
    """The effective configuration as plain values. It holds names of files, never secrets."""
    plain: dict[str, Any] = msgspec.to_builtins(configuration)
    return plain


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases (they can grow without bound) and without duplicate keys (the last would win silently)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases are not supported")  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        mapping = super().construct_mapping(node, deep=deep)
        if not all(isinstance(key, str) for key in mapping):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a key is no text")
        if len(mapping) != len(node.value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a key stands more than once in one mapping")
        return mapping


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _schema_mistakes(document: object, kind: type[msgspec.Struct]) -> list[str]:
    """JSON Schema finds every mistake, not only the first."""
    errors = Draft202012Validator(msgspec.json.schema(kind)).iter_errors(document)
    found = {f"{_path(error.absolute_path)}: {_rule(error)}" for outer in errors for error in _precise(outer)}
    return sorted(found | {f"{_path(where)}: must be a finite number" for where in _not_finite(document, ())})


def _converted(document: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError([str(error)]) from error


def _valid(items: object, kind: type[T]) -> list[tuple[int, T]]:
    """Those of the list's items that are right in themselves, with their places: rules between fields are checked for them."""
    found = []
    for index, item in enumerate(items if isinstance(items, list) else ()):
        try:
            found.append((index, msgspec.convert(item, kind)))
        except msgspec.ValidationError:
            continue  # the schema says what is wrong with it
    return found


def _precise(error: ValidationError) -> Iterator[ValidationError]:
    """What is wrong inside the one alternative that was meant, where that can be told; else the error itself."""
    branches: dict[Any, list[ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(inner.schema_path[0], []).append(inner)
    meant = [errors for errors in branches.values() if not any(map(_is_of_another_kind, errors))]
    if error.validator != "anyOf" or not meant:
        yield error
        return
    for inner in meant[0]:
        yield from _precise(inner)


def _is_of_another_kind(error: ValidationError) -> bool:
    return error.validator in ("type", "enum") and not error.relative_path


def _not_finite(value: object, where: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Where `.nan` and `.inf` stand: comparisons with bounds let NaN through."""
    if isinstance(value, float) and not math.isfinite(value):
        yield where
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield from _not_finite(member, (*where, key))


def _path(parts: Iterable[str | int]) -> str:
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "(top)"


def _rule(error: ValidationError) -> str:
    """What is wrong in our words: the value itself is not repeated, it may be a secret in the wrong place."""
    wanted: Any = error.validator_value
    schema: Any = error.schema
    found: Any = error.instance
    match error.validator:
        case "additionalProperties":
            return f"unknown key: {', '.join(sorted(map(str, set(found) - set(schema.get('properties', {})))))}"
        case "required":
            return f"missing key: {', '.join(name for name in wanted if name not in found)}"
        case "type":
            return f"must be of type {wanted}"
        case "enum":
            return f"must be one of {', '.join(map(str, wanted))}"
        case "pattern":
            return f"must match {wanted}"
        case "anyOf":
            return "must have one of the forms that docs/configuration.md lists"
        case _:
            return f"must satisfy {error.validator} {wanted}"


def _from_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """CUSTODY_STORE_PATH overrides store.path. Names that are no scalar of the schema are mistakes, as unknown keys are."""
    scalars = {f"CUSTODY_{dotted.replace('.', '_').upper()}": dotted for dotted in scalar_names()}
    given = {name: value for name, value in environment.items() if name.startswith("CUSTODY_") and name not in _OTHERS}
    unknown = sorted(set(given) - set(scalars))
    known = {scalars[name]: value for name, value in given.items() if name in scalars}
    return known, [f"environment: {name} is no name of the configuration" for name in unknown]


# Variables of the command line client and the Python client, which may stand in the same environment.
_OTHERS = frozenset({"CUSTODY_ADDRESS", "CUSTODY_FORMAT", "CUSTODY_TIMEOUT", "CUSTODY_MAX_RETRIES", "CUSTODY_CONFIG"})


def scalar_names() -> tuple[str, ...]:
    """The dotted names of all scalars that flags and the environment may override."""
    return tuple(_scalars())


def _scalars() -> dict[str, inspect.Type]:
    """The type of each scalar, by its dotted name."""
    root = inspect.type_info(Configuration)
    assert isinstance(root, inspect.StructType)
    return dict(_scalars_of(root, ""))


def _scalars_of(kind: inspect.StructType, prefix: str) -> Iterator[tuple[str, inspect.Type]]:
    for field in kind.fields:
        inner = field.type.type if isinstance(field.type, inspect.Metadata) else field.type
        if isinstance(inner, inspect.StructType):
            yield from _scalars_of(inner, f"{prefix}{field.encode_name}.")
        elif not isinstance(inner, inspect.CollectionType | inspect.DictType):
            yield prefix + field.encode_name, inner


def _override(document: dict[str, Any], dotted: str, text: str) -> list[str]:
    """Puts `text` in its place, as a number where the schema wants one; gives the mistakes."""
    scalars = _scalars()
    if dotted not in scalars:
        return [f"{dotted}: is no scalar of the configuration"]
    *sections, name = dotted.split(".")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            return []  # the schema says that this section must be a mapping
    wants_number = isinstance(scalars[dotted], inspect.IntType | inspect.FloatType)
    document[name] = _number(text) if wants_number else text
    return []


def _number(text: str) -> str | int | float:
    if re.fullmatch(r"[0-9]{1,15}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[0-9]{1,15}\.[0-9]{1,6}", text) else text


def _store_mistakes(store: object) -> list[str]:
    if not isinstance(store, dict):
        return []  # the schema says that this section must be a mapping
    if ("path" in store) == ("url" in store):
        return ["store: must have exactly one of path and url"]
    other = _OF_URL if "path" in store else _OF_PATH
    mistakes = [
        f"store.{name}: does not go with {'path' if 'path' in store else 'url'}" for name in other if name in store
    ]
    if re.search(r"://[^/?#]*:[^/?#@]*@|[?&](ssl)?password=", str(store.get("url", ""))):
        mistakes.append("store.url: must not hold a password; it names a file, passfile=/ABSOLUTE/PATH")
    return mistakes


_OF_PATH = ("synchronous",)
_OF_URL = ("instance", "synchronous_commit", "read_connections")


def _listener_mistakes(listeners: Sequence[tuple[int, Listener]]) -> list[str]:
    mistakes = []
    for index, listener in listeners:
        where = f"listeners[{index}]"
        if (listener.tls is None) == (listener.workload is None):
            mistakes.append(f"{where}: must have exactly one of tls and workload")
        if listener.workload is not None and not listener.address.startswith("unix:"):
            mistakes.append(f"{where}: workload needs a Unix socket: whoever reaches a port could use it")
        mistakes += _address_mistakes(f"{where}.address", listener.address)
    addresses = [listener.address for _, listener in listeners if not listener.address.endswith(":0")]
    mistakes += [f"listeners: {address} stands more than once" for address in sorted(_doubled(addresses))]
    return mistakes


def _address_mistakes(where: str, address: str) -> list[str]:
    if not address.startswith("unix:"):
        return _port_mistakes(where, address)
    if len(os.fsencode(address.removeprefix("unix:"))) > _LONGEST_SOCKET_PATH_BYTES:
        return [f"{where}: must be a path of at most {_LONGEST_SOCKET_PATH_BYTES} bytes"]
    return []


def _port_mistakes(where: str, address: object) -> list[str]:
    port = address.rpartition(":")[2] if isinstance(address, str) else ""
    return [f"{where}: must have a port of at most 65535"] if port.isdecimal() and int(port) > 65_535 else []


def _provider_mistakes(providers: Sequence[tuple[int, ProviderConfiguration]]) -> list[str]:
    names = sorted(_doubled(provider.id for _, provider in providers))
    mistakes = [f"providers: {name} stands more than once" for name in names]
    for index, provider in providers:
        mistakes += [f"providers[{index}].{mistake}" for mistake in _key_mistakes(provider)]
    return mistakes


def _key_mistakes(provider: ProviderConfiguration) -> Iterator[str]:
    if (provider.client_key_file is None) != (provider.client_certificate_file is None):
        yield "client_key_file: needs client_certificate_file, and the other way round"
    if provider.client_key_file is not None and not provider.allow_client_key_file:
        yield "client_key_file: a TLS key in a file is accepted only with allow_client_key_file: true"


def _doubled(values: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {value for value in values if value in seen or seen.add(value)}  # type: ignore[func-returns-value]
