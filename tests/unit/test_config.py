"""The configuration: every mistake at once, each at its key; nothing unknown, nothing secret repeated (3b, F)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.config import (
    ConfigurationError,
    load_configuration,
    load_policy,
    scalar_names,
    shown,
)
from tools.generate_configuration_docs import PAGE, page

Change = Callable[[dict[str, Any]], object]


def document() -> dict[str, Any]:
    """A configuration that is right, as plain values."""
    return {
        "cluster": "test",
        "listeners": [
            {"address": "unix:/run/custody/app.sock", "surface": "api", "workload": "shop"},
            {
                "address": "0.0.0.0:8443",
                "surface": "admin",
                "tls": {
                    "certificate_file": "/tls/cert.pem",
                    "key_file": "/tls/key.pem",
                    "client_ca_file": "/tls/ca.pem",
                    "trust_domain": "example.org",
                },
            },
        ],
        "operations_address": "127.0.0.1:9090",
        "policy_file": "/etc/custody/policy.yaml",
        "store": {"path": "/var/lib/custody/custody.db"},
        "hsm": {
            "module_path": "/usr/lib/softhsm/libsofthsm2.so",
            "token_label": "custody",
            "token_serial": "0123456789abcdef",
            "pin_file": "/run/secrets/pin",
            "keys_file": "/etc/custody/keys.json",
        },
        "providers": [{"id": "bank", "descriptor": "sandbox-bank", "ca_file": "/tls/bank-ca.pem"}],
    }


def write(directory: Path, value: object) -> Path:
    path = directory / "custody.yaml"
    path.write_text(value if isinstance(value, str) else yaml.dump(value, Dumper=_Plain))
    return path


class _Plain(yaml.SafeDumper):
    """Writes what stands twice twice: the configuration knows no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def mistakes(directory: Path, value: object, **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as refused:
        load_configuration(write(directory, value), **arguments)
    return refused.value.mistakes


def changed(change: Change) -> dict[str, Any]:
    made = document()
    change(made)
    return made


def at(*path: str | int) -> Callable[[object], Change]:
    """A change that sets one value: `at("store", "path")(7)`."""

    def to(value: object) -> Change:
        def change(made: Any) -> None:
            for part in path[:-1]:
                made = made[part]
            made[path[-1]] = value

        return change

    return to


def without(*path: str | int) -> Change:
    def change(made: Any) -> None:
        for part in path[:-1]:
            made = made[part]
        del made[path[-1]]

    return change


def test_a_right_configuration_is_read_with_its_defaults(tmp_path: Path) -> None:
    """What is not given has the schema's safe value."""
    configuration = load_configuration(write(tmp_path, document()))

    assert configuration.store.synchronous == "FULL"
    assert configuration.listeners[0].mode == "0600"
    assert configuration.log.level == "info"
    assert configuration.providers[0].allow_client_key_file is False
    assert shown(configuration)["cluster"] == "test"


def test_a_shared_database_is_read_with_its_defaults(tmp_path: Path) -> None:
    """A URL alone is enough: the instance is the host's name then, and commits are durable."""
    made = document()
    made["store"] = {"url": "postgresql://sidecar@one,two/custody?sslrootcert=/etc/ca.pem&passfile=/run/pass"}

    store = load_configuration(write(tmp_path, made)).store

    assert (store.path, store.instance, store.synchronous_commit) == (None, None, "on")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (at("surprise")(1), "(top): unknown key: surprise"),
        (at("store", "journal")("x"), "store: unknown key: journal"),
        (at("listeners", 0, "tsl")({}), "listeners[0]: unknown key: tsl"),
        (at("listeners", 1, "tls", "ciphers")("x"), "listeners[1].tls: unknown key: ciphers"),
        (without("hsm"), "(top): missing key: hsm"),
        (without("listeners", 1, "tls", "key_file"), "listeners[1].tls: missing key: key_file"),
        (without("providers", 0, "ca_file"), "providers[0]: missing key: ca_file"),
        (at("shutdown_seconds")("5"), "shutdown_seconds: must be of type number"),
        (at("cluster")(7), "cluster: must be of type string"),
        (at("listeners")({}), "listeners: must be of type array"),
        (at("store")([]), "store: must be of type object"),
        (at("limits")({"concurrent_calls": 1.5}), "limits.concurrent_calls: must be of type integer"),
        (at("limits")({"concurrent_calls": True}), "limits.concurrent_calls: must be of type integer"),
        (at("shutdown_seconds")(0), "shutdown_seconds: must satisfy exclusiveMinimum 0"),
        (at("shutdown_seconds")(-1), "shutdown_seconds: must satisfy exclusiveMinimum 0"),
        (at("shutdown_seconds")(10**9), "shutdown_seconds: must satisfy maximum 86400"),
        (at("shutdown_seconds")(float("nan")), "shutdown_seconds: must be a finite number"),
        (at("limits")({"concurrent_calls": 0}), "limits.concurrent_calls: must satisfy minimum 1"),
        (at("limits")({"message_bytes": 10**9}), "limits.message_bytes: must satisfy maximum 4194304"),
        (at("listeners")([]), "listeners: must satisfy minItems 1"),
        (at("providers")([]), "providers: must satisfy minItems 1"),
        (at("store", "synchronous")("OFF"), "store.synchronous: must be one of EXTRA, FULL"),
        (at("store", "path")("relative.db"), "store.path: must match"),
        (at("store", "path")(":memory:"), "store.path: must match"),
        (at("store")({}), "store: must have exactly one of path and url"),
        (at("store", "url")("postgresql://u@/db?host=/run"), "store: must have exactly one of path and url"),
        (at("store", "instance")("pod-1"), "store.instance: does not go with path"),
        (at("store", "read_connections")(8), "store.read_connections: does not go with path"),
        (at("store")({"url": "postgresql://u@/db", "synchronous": "FULL"}), "store.synchronous: does not go with url"),
        (at("store")({"url": "mysql://u@/db"}), "store.url: must match"),
        (at("store")({"url": "postgresql://u@/d b"}), "store.url: must match"),
        (at("store")({"url": "postgresql://u:pw@h/db"}), "store.url: must not hold a password"),
        (at("store")({"url": "postgresql://u@h/db?password=pw"}), "store.url: must not hold a password"),
        (at("store")({"url": "postgresql://u@h/db?a=b&sslpassword=pw"}), "store.url: must not hold a password"),
        (at("store")({"url": "postgresql://u@/db", "instance": "Pod 1"}), "store.instance: must match"),
        (
            at("store")({"url": "postgresql://u@/db", "synchronous_commit": "off"}),
            "store.synchronous_commit: must be one",
        ),
        (
            at("store")({"url": "postgresql://u@/db", "synchronous_commit": "local"}),
            "store.synchronous_commit: must be",
        ),
        (
            at("store")({"url": "postgresql://u@/db", "read_connections": 0}),
            "store.read_connections: must satisfy minimum",
        ),
        (at("log")({"level": "trace"}), "log.level: must be one of debug, error, info, warning"),
        (at("cluster")("Test"), "cluster: must match"),
        (at("cluster")("test\n"), "cluster: must match"),
        (at("listeners", 0, "mode")("0666"), "listeners[0].mode: must be one of"),
        (at("listeners", 0, "mode")(384), "listeners[0].mode: must be one of"),
        (at("operations_address")("192.0.2.1:1"), "operations_address: must match"),
        (at("operations_address")("127.0.0.1:65536"), "operations_address: must have a port"),
        (at("listeners", 1, "address")("0.0.0.0:70000"), "listeners[1].address: must have a port"),
        (at("listeners", 0, "address")("unix:relative"), "listeners[0].address: must match"),
        (at("listeners", 0, "address")("unix:/" + "x" * 107), "listeners[0].address: must be a path of at most 107"),
        (at("listeners", 0, "address")("unix:/" + "ä" * 54), "listeners[0].address: must be a path of at most 107"),
        (without("listeners", 0, "workload"), "listeners[0]: must have exactly one of tls and workload"),
        (at("listeners", 0, "tls")(document()["listeners"][1]["tls"]), "listeners[0]: must have exactly one of"),
        (at("providers", 0, "client_certificate_file")("/c"), "providers[0].client_key_file: needs client_certificate"),
        (at("providers", 0, "descriptor")("../x"), "providers[0].descriptor: must match"),
        (at("providers", 0, "variables")({"api_uri": 7}), "providers[0].variables.api_uri: must be of type string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_mistake_is_named_at_its_key(tmp_path: Path, change: Change, where: str) -> None:
    """F1 to F5, F10, F13, F16: unknown, missing, wrong type, out of range; once, and nothing else is said to be wrong."""
    (said,) = mistakes(tmp_path, changed(change))

    assert said.startswith(where)


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    """File, environment, flags, and rules between fields: one start, one list."""
    made = document()
    made["surprise"] = 1
    made["store"]["synchronous"] = "OFF"
    del made["hsm"]["pin_file"]
    made["listeners"][1]["tls"]["ciphers"] = "x"
    made["listeners"].append(dict(made["listeners"][0]))
    made["providers"].append(dict(made["providers"][0]))
    del made["operations_address"]

    said = mistakes(
        tmp_path,
        made,
        environment={"CUSTODY_STORE_PAHT": "x", "CUSTODY_SHUTDOWN_SECONDS": "soon", "PATH": "/bin"},
        flags={"store.pfad": "x"},
    )

    assert sorted(said) == [
        "(top): missing key: operations_address",
        "(top): unknown key: surprise",
        "environment: CUSTODY_STORE_PAHT is no name of the configuration",
        "hsm: missing key: pin_file",
        "listeners: unix:/run/custody/app.sock stands more than once",
        "listeners[1].tls: unknown key: ciphers",
        "providers: bank stands more than once",
        "shutdown_seconds: must be of type number",
        "store.pfad: is no scalar of the configuration",
        "store.synchronous: must be one of EXTRA, FULL",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("cluster: a\ncluster: b\n", "a key stands more than once"),
        ("store: {path: /a, path: /b}\n", "a key stands more than once"),
        ("a: &x 1\nb: *x\n", "aliases are not supported"),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1"),
        ("a: 1\n---\nb: 2\n", "line"),
        ("- a\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("a: 2026-13-45\n", "cannot be read"),
        ("a: [\n", "line"),
        ("a: 'x\n", "line"),
        ("\ta: 1\n", "line"),
        ("on: 1\n", "a key is no text"),
        ("1: 1\n", "a key is no text"),
        ("a: " + "[" * 3000 + "]" * 3000, "cannot be read"),
        ("x: " + "y" * 1_000_001, "larger than 1 MB"),
    ],
)
def test_bi_f4_what_is_no_plain_yaml_mapping_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    """F4, E11: duplicates, aliases, tags, several documents, dates that are none, endless nesting, size."""
    (said,) = mistakes(tmp_path, text)

    assert problem in said


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "not utf-8", "not readable"])
def test_a_file_that_cannot_be_read_is_one_clear_mistake(tmp_path: Path, kind: str) -> None:
    """Not a traceback, and no waiting for a pipe."""
    path = tmp_path / "custody.yaml"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "not utf-8":
        path.write_bytes(b"a: \xff")
    elif kind == "not readable":
        path = tmp_path / ("x" * 300)

    with pytest.raises(ConfigurationError) as refused:
        load_configuration(path)

    assert len(refused.value.mistakes) == 1


def test_no_value_is_repeated(tmp_path: Path) -> None:
    """A secret in the wrong place stays where it is: in no message, whatever is wrong with it."""
    secret = "hunter2-HUNTER2"
    made = document()
    made["cluster"] = secret
    made["hsm"]["token_label"] = secret * 10
    made["store"]["synchronous"] = secret
    made["log"] = secret
    made["listeners"][1]["tls"]["trust_domain"] = f"{secret} {secret}"
    made["providers"][0]["client_key_file"] = secret

    said = mistakes(
        tmp_path, made, environment={"CUSTODY_NO_SUCH": secret}, flags={"shutdown_seconds": secret, "x": secret}
    )

    assert len(said) >= 7
    assert not any("hunter2" in text.lower() for text in said)


# --- overriding


def test_flags_override_the_environment_and_that_the_file(tmp_path: Path) -> None:
    """One name each; numbers become numbers where the schema wants them, and texts of digits stay texts."""
    configuration = load_configuration(
        write(tmp_path, document()),
        environment={
            "CUSTODY_STORE_PATH": "/env.db",
            "CUSTODY_SHUTDOWN_SECONDS": "7",
            "CUSTODY_HSM_TOKEN_SERIAL": "0123456789",
            "CUSTODY_LOG_LEVEL": "debug",
            "CUSTODY_ADDRESS": "unix:/x",  # the client's
        },
        flags={"store.path": "/flag.db", "limits.calls_per_second": "2.5", "limits.message_bytes": "2048"},
    )

    assert configuration.store.path == "/flag.db"
    assert configuration.shutdown_seconds == 7
    assert configuration.hsm.token_serial == "0123456789"
    assert configuration.log.level == "debug"
    assert (configuration.limits.calls_per_second, configuration.limits.message_bytes) == (2.5, 2048)


@pytest.mark.parametrize("text", ["soon", "1e3", "-1", "0x10", "", "1,5", "٣", "nan"])
def test_a_number_by_flag_is_a_number_or_a_mistake(tmp_path: Path, text: str) -> None:
    """No other spellings."""
    (said,) = mistakes(tmp_path, document(), flags={"shutdown_seconds": text})

    assert said.startswith("shutdown_seconds: ")


def test_scalars_are_those_that_have_one_place() -> None:
    """Lists have no flags; every name is unique also as a variable of the environment."""
    names = scalar_names()

    assert {"cluster", "store.path", "hsm.pin_file", "log.level", "limits.message_bytes", "shutdown_seconds"} <= set(
        names
    )
    assert not any(name.startswith(("listeners", "providers")) for name in names)
    assert len({name.replace(".", "_").upper() for name in names}) == len(names)


def test_an_override_into_something_that_is_no_section_is_one_mistake(tmp_path: Path) -> None:
    """The schema says it."""
    made = document()
    made["store"] = "x"

    assert mistakes(tmp_path, made, flags={"store.path": "/x"}) == ("store: must be of type object",)


# --- listeners, providers


def test_bi_f6_providers_and_addresses_stand_once(tmp_path: Path) -> None:
    """F6; two listeners on port 0 are two ports."""
    made = document()
    made["providers"].append({**made["providers"][0], "ca_file": "/other"})
    assert mistakes(tmp_path, made) == ("providers: bank stands more than once",)

    made = document()
    tls = made["listeners"][1]
    made["listeners"] = [{**tls, "address": "127.0.0.1:0"}, {**tls, "address": "127.0.0.1:0", "surface": "api"}]
    assert len(load_configuration(write(tmp_path, made)).listeners) == 2


def test_a_workload_is_bound_to_a_socket_not_to_a_port(tmp_path: Path) -> None:
    """Whoever reaches a port could use it."""
    made = document()
    made["listeners"][0]["address"] = "127.0.0.1:8080"

    (said,) = mistakes(tmp_path, made)

    assert "workload needs a Unix socket" in said


def test_a_tls_key_in_a_file_is_accepted_only_by_name(tmp_path: Path) -> None:
    """Keys belong into the HSM."""
    made = document()
    made["providers"][0] |= {"client_key_file": "/k", "client_certificate_file": "/c"}
    (said,) = mistakes(tmp_path, made)
    made["providers"][0]["allow_client_key_file"] = True

    assert "allow_client_key_file" in said
    assert load_configuration(write(tmp_path, made)).providers[0].client_key_file == "/k"


# --- policy


def policy() -> dict[str, Any]:
    return {
        "workloads": [
            {
                "workload": "spiffe://example.org/ns/shop",
                "roles": ["application"],
                "purposes": ["payments"],
                "providers": ["bank"],
                "owners": ["owner-1"],
                "payment_limits": [{"currency_code": "EUR", "amount": "100.00"}],
                "periodic_limits": [{"currency_code": "EUR", "amount": "500", "period_type": "half-year"}],
            }
        ]
    }


PERIODIC = {"currency_code": "EUR", "amount": "1", "period_type": "day"}


def periodic(**changes: object) -> Change:
    """One periodic limit with a mistake; None leaves the key out."""
    limit = {name: value for name, value in {**PERIODIC, **changes}.items() if value is not None}
    return at("workloads", 0, "periodic_limits")([limit])


def policy_mistakes(directory: Path, change: Change) -> tuple[str, ...]:
    made = policy()
    change(made)
    with pytest.raises(ConfigurationError) as refused:
        load_policy(write(directory, made))
    return refused.value.mistakes


def test_a_policy_that_names_nothing_permits_nothing(tmp_path: Path) -> None:
    """Roles must be said; everything else is empty unless it is said."""
    made = {"workloads": [{"workload": "workload:shop", "roles": ["application"]}]}
    (entry,) = load_policy(write(tmp_path, made)).workloads

    assert (entry.purposes, entry.providers, entry.owners, entry.payment_limits, entry.imports) == (
        (),
        (),
        (),
        (),
        False,
    )
    assert load_policy(write(tmp_path, {"workloads": []})).workloads == ()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (at("workloads")(None), "workloads: must be of type array"),
        (at("workloads", 0, "owners")("*"), "workloads[0].owners: must have one of the forms"),
        (at("workloads", 0, "owners")("owner-1"), "workloads[0].owners: must have one of the forms"),
        (at("workloads", 0, "owners")(["owner.*|"]), "workloads[0].owners[0]: must match"),
        (at("workloads", 0, "owners")(None), "workloads[0].owners: must have one of the forms"),
        (at("workloads", 0, "providers")("bank"), "workloads[0].providers: must be of type array"),
        (at("workloads", 0, "providers")(["*"]), "workloads[0].providers[0]: must match"),
        (at("workloads", 0, "purposes")(["everything"]), "workloads[0].purposes[0]: must be one of"),
        (at("workloads", 0, "roles")([]), "workloads[0].roles: must satisfy minItems 1"),
        (at("workloads", 0, "roles")(["root"]), "workloads[0].roles[0]: must be one of"),
        (at("workloads", 0, "workload")("*"), "workloads[0].workload: must match"),
        (at("workloads", 0, "workload")("spiffe://example.org"), "workloads[0].workload: must match"),
        (at("workloads", 0, "workload")("spiffe://Example.org/x"), "workloads[0].workload: must match"),
        (at("workloads", 0, "imports")("yes"), "workloads[0].imports: must be of type boolean"),
        (
            at("workloads", 0, "payment_limits")([{"currency_code": "EUR", "amount": 100}]),
            "workloads[0].payment_limits[0].amount",
        ),
        (
            at("workloads", 0, "payment_limits")([{"currency_code": "eur", "amount": "1"}]),
            "workloads[0].payment_limits[0].currency_code",
        ),
        (
            at("workloads", 0, "payment_limits")([{"currency_code": "EUR", "amount": "-1"}]),
            "workloads[0].payment_limits[0].amount",
        ),
        (
            at("workloads", 0, "payment_limits")([{"currency_code": "EUR", "amount": "1"}] * 2),
            "workloads[0].payment_limits: EUR stands more than once",
        ),
        (periodic(period_type="decade"), "workloads[0].periodic_limits[0].period_type"),
        (periodic(period_type="MONTH"), "workloads[0].periodic_limits[0].period_type"),
        (periodic(period_type=None), "workloads[0].periodic_limits[0]: missing key: period_type"),
        (periodic(alignment="consent"), "workloads[0].periodic_limits[0]: unknown key: alignment"),
        (periodic(amount="1,00"), "workloads[0].periodic_limits[0].amount"),
        (periodic(amount=1), "workloads[0].periodic_limits[0].amount"),
        (periodic(currency_code="eur"), "workloads[0].periodic_limits[0].currency_code"),
        (
            periodic(currency_code="GBP"),
            "workloads[0].periodic_limits[0].currency_code: GBP has no limit in payment_limits",
        ),
        (
            at("workloads", 0, "periodic_limits")([PERIODIC, {**PERIODIC, "amount": "9"}]),
            "workloads[0].periodic_limits: EUR a day stands more than once",
        ),
        (
            at("workloads")([policy()["workloads"][0]] * 2),
            "workloads: spiffe://example.org/ns/shop stands more than once",
        ),
        (at("default")("allow"), "(top): unknown key: default"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bi_f9_f10_a_policy_is_lists_and_no_patterns(tmp_path: Path, change: Change, where: str) -> None:
    """F9, F10: no regular expressions; a malformed list stops the start and never means "allow" or "deny"."""
    (said,) = policy_mistakes(tmp_path, change)

    assert said.startswith(where)


# --- the page


def test_the_page_is_what_the_schema_gives() -> None:
    """docs/configuration.md is generated; run tools/generate_configuration_docs.py when this fails."""
    assert PAGE.read_text() == page()


def test_the_page_names_every_key_and_every_override() -> None:
    """A key that the schema has and the page has not would be a secret switch."""
    text = page()

    assert all(f"`{name}`" in text and f"`CUSTODY_{name.replace('.', '_').upper()}`" in text for name in scalar_names())
    for key in ("client_ca_file", "trust_domain", "allow_client_key_file", "variables", "payment_limits", "imports"):
        assert f"`{key}`" in text
