"""Descriptors: what would fail later, or could be misread, is refused when it is loaded (3b, F7)."""

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from sidecar.config import load_yaml
from sidecar.connectors.descriptor import DescriptorError, origin_of, parse_descriptor
from sidecar.domain.rotation import RotationKind
from tests.fakes.bank import variables

CATALOG = sorted(
    entry.name for entry in resources.files("sidecar.connectors.catalog").iterdir() if entry.name.endswith(".yaml")
)


def document(name: str = "sandbox-bank-idempotent.yaml") -> dict[str, Any]:
    with resources.as_file(resources.files("sidecar.connectors.catalog").joinpath(name)) as path:
        return load_yaml(Path(path))


def changed(path: str, value: object) -> dict[str, Any]:
    """The document with one value set, or taken away where `value` is ...."""
    made = copy.deepcopy(document())
    *sections, last = path.split(".")
    node = made
    for section in sections:
        node = node[section]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return made


@pytest.mark.parametrize("name", CATALOG)
def test_the_catalog_is_whole(name: str) -> None:
    """Each file of the catalog parses; its id is its file's name."""
    described = parse_descriptor(document(name), variables())

    assert f"{described.id}.yaml" == name
    assert described.origins == {"https://api.bank.example:443", "https://tokens.bank.example:443"}
    assert described.owner_origins == {"https://issuer.bank.example:443"}


@pytest.mark.parametrize(
    ("rotation", "kind", "seconds"),
    [
        ({"kind": "strict"}, RotationKind.STRICT, None),
        ({"kind": "grace", "seconds": 1800}, RotationKind.GRACE, 1800),
        ({"kind": "grace", "seconds": 15.5}, RotationKind.GRACE, 15.5),
        ({"kind": "when-first-used"}, RotationKind.WHEN_FIRST_USED, None),
        ({"kind": "none"}, RotationKind.NONE, None),
        (..., RotationKind.STRICT, None),
    ],
)
def test_each_kind_of_rotation_can_be_said(rotation: object, kind: RotationKind, seconds: float | None) -> None:
    """A provider of which nothing is said gets nothing twice."""
    parsed = parse_descriptor(changed("oauth.rotation", rotation), variables()).oauth.rotation

    assert (parsed.kind, parsed.seconds) == (kind, seconds)


WRONG_URLS = [
    "http://api.bank.example/v1",
    "https://user@api.bank.example/v1",
    "https://user:pw@api.bank.example/v1",
    "https://api.bank.example/v1#x",
    "https://api.bank.example/v1?x=1",
    "https://api.bank.example:0/v1",
    "https://api.bank.example:99999/v1",
    "https://api.bank.example:/v1",
    "https://api.bank.example./v1",
    "https://API.bank.example/v1",
    "https://api.bänk.example/v1",
    "https://api..bank.example/v1",
    "https://-api.bank.example/v1",
    "https://api.bank.example/a/../b",
    "https://api.bank.example/./b",
    "https://api.bank.example/v1\n",
    "https:///v1",
    "https://",
    "//api.bank.example/v1",
    "",
]


@pytest.mark.parametrize("url", WRONG_URLS)
@pytest.mark.parametrize("field", ["api", "oauth.token_endpoint", "oauth.issuer"])
def test_bi_f7_a_url_of_another_form_is_refused(field: str, url: str) -> None:
    """F7: plain http, userinfo, fragments, queries, ports, dots, capitals, other alphabets."""
    document_ = changed(field, url)

    with pytest.raises(DescriptorError):
        parse_descriptor(document_, _used(document_))


def _used(made: dict[str, Any]) -> dict[str, str]:
    text = str(made)
    return {name: value for name, value in variables().items() if f"${{{name}}}" in text}


@pytest.mark.parametrize(
    "uri",
    [
        "http://app.example/callback",
        "https://app.example/callback#x",
        "https://user@app.example/callback",
        "javascript:alert(1)",
        "https://app.example/a b",
        "myapp:/callback",
        "http://127.0.0.1@evil.example/",
    ],
)
def test_bi_f8_a_redirect_uri_of_another_form_is_refused(uri: str) -> None:
    """F8: https, or http to the device itself (RFC 8252); no userinfo, no fragment."""
    made = changed("oauth.redirect_uris", [uri])

    with pytest.raises(DescriptorError):
        parse_descriptor(made, _used(made))


@pytest.mark.parametrize(
    "uri", ["https://app.example/callback?a=b", "http://127.0.0.1:8080/cb", "http://[::1]:1/", "http://localhost/x"]
)
def test_redirect_uris_that_are_right(uri: str) -> None:
    """Among them loopback ones."""
    made = changed("oauth.redirect_uris", [uri])

    assert parse_descriptor(made, _used(made)).oauth.redirect_uris == (uri,)


WRONG = {
    "unknown field": ("retries", 3),
    "unknown inner field": ("oauth.discover", True),
    "missing id": ("id", ...),
    "missing products": ("payments.products", ...),
    "unknown product": ("payments.products", {"cheque": "cheques"}),
    "product with a slash": ("payments.products", {"sepa-credit-transfer": "a/b"}),
    "unknown standard": ("standard", {"family": "stet", "version": "1"}),
    "other schema": ("schema", 2),
    "id with capitals": ("id", "Bank"),
    "no purposes": ("purposes", []),
    "unknown purpose": ("purposes", ["everything"]),
    "no redirect URIs": ("oauth.redirect_uris", []),
    "assertion too long": ("oauth.assertion_seconds", 61),
    "rotation of no known kind": ("oauth.rotation", {"kind": "sometimes"}),
    "rotation without a kind": ("oauth.rotation", {}),
    "rotation in other letters": ("oauth.rotation", {"kind": "STRICT"}),
    "rotation with a field of another": ("oauth.rotation", {"kind": "strict", "window": 1}),
    "strict with seconds": ("oauth.rotation", {"kind": "strict", "seconds": 60}),
    "grace without seconds": ("oauth.rotation", {"kind": "grace"}),
    "grace of no time": ("oauth.rotation", {"kind": "grace", "seconds": 0}),
    "grace below zero": ("oauth.rotation", {"kind": "grace", "seconds": -1}),
    "grace as text": ("oauth.rotation", {"kind": "grace", "seconds": "60"}),
    "grace that no repeat fits into": ("oauth.rotation", {"kind": "grace", "seconds": 15}),
    "number as text": ("accounts.history_days", "90"),
    "call too long": ("call_seconds", 61),
    "call without time": ("call_seconds", 0),
    "no address": ("tpp_ip_address", "localhost"),
    "class A without header": ("payments.idempotency", {"class": "A", "window_seconds": 86400}),
    "class A without window": ("payments.idempotency", {"class": "A", "header": "Idempotency-Key"}),
    "class C with header": (
        "payments.idempotency",
        {"class": "C", "header": "Idempotency-Key", "window_seconds": 86400},
    ),
    "unknown class": ("payments.idempotency", {"class": "D"}),
    "class B without parameter": ("payments.idempotency", {"class": "B", "quiet_seconds": 5}),
    "class B without quiet period": ("payments.idempotency", {"class": "B", "lookup_parameter": "reference"}),
    "class B with a header": (
        "payments.idempotency",
        {"class": "B", "lookup_parameter": "r", "quiet_seconds": 5, "header": "X-Key", "window_seconds": 86400},
    ),
    "class B with half a key": (
        "payments.idempotency",
        {"class": "B", "lookup_parameter": "reference", "quiet_seconds": 5, "header": "X-Key"},
    ),
    "class B without time": ("payments.idempotency", {"class": "B", "lookup_parameter": "r", "quiet_seconds": 0}),
    "class B with a query": ("payments.idempotency", {"class": "B", "lookup_parameter": "a=b&c", "quiet_seconds": 5}),
    "class C with a look-up": (
        "payments.idempotency",
        {"class": "C", "lookup_parameter": "reference", "quiet_seconds": 5},
    ),
    "class C with half a look-up": ("payments.idempotency", {"class": "C", "quiet_seconds": 5}),
    "class A with a look-up": (
        "payments.idempotency",
        {"class": "A", "header": "X-Key", "window_seconds": 86400, "lookup_parameter": "r", "quiet_seconds": 5},
    ),
    "class C whose not found is a no": ("payments.idempotency", {"class": "C", "not_found": "never-executed"}),
    "unknown meaning of not found": (
        "payments.idempotency",
        {"class": "B", "lookup_parameter": "r", "quiet_seconds": 5, "not_found": "rejected"},
    ),
    "margin as long as the window": (
        "payments.idempotency",
        {"class": "A", "header": "Idempotency-Key", "window_seconds": 3600, "margin_seconds": 3600},
    ),
    "margin shorter than a send": (
        "payments.idempotency",
        {"class": "A", "header": "Idempotency-Key", "window_seconds": 3600, "margin_seconds": 5},
    ),
    "header used otherwise": (
        "payments.idempotency",
        {"class": "A", "header": "authorization", "window_seconds": 86400},
    ),
    "header with a line end": (
        "payments.idempotency",
        {"class": "A", "header": "X-Key\n", "window_seconds": 86400},
    ),
    "send longer than 10 s": ("payments.send_seconds", 11),
    "refusal 409": ("payments.refusals", [{"status": 409, "codes": ["X_Y"]}]),
    "refusal 408": ("payments.refusals", [{"status": 408, "codes": ["X_Y"]}]),
    "refusal 429": ("payments.refusals", [{"status": 429, "codes": ["X_Y"]}]),
    "refusal 500": ("payments.refusals", [{"status": 500, "codes": ["X_Y"]}]),
    "refusal without codes": ("payments.refusals", [{"status": 400, "codes": []}]),
    "unsigned digest": ("signing", {"scheme": "cavage", "signed_headers": ["x-request-id"]}),
    "signed header never sent": ("signing", {"scheme": "cavage", "signed_headers": ["digest", "x-request-id", "date"]}),
    "signed in capitals": ("signing", {"scheme": "cavage", "signed_if_sent": ["PSU-ID"]}),
    "token signed": ("signing", {"scheme": "cavage", "signed_if_sent": ["authorization"]}),
    "signed twice": ("signing", {"scheme": "cavage", "signed_if_sent": ["digest"]}),
    "unknown scheme": ("signing", {"scheme": "jws"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_fail_later_is_refused_at_once(case: str) -> None:
    """Classes, headers, windows, refusals, signatures: only what fits together."""
    made = changed(*WRONG[case])

    with pytest.raises(DescriptorError):
        parse_descriptor(made, _used(made))


def test_variables_are_all_given_and_all_used() -> None:
    """A missing one is named; so is one that nothing asks for, which would be a mistake in writing."""
    with pytest.raises(DescriptorError, match="client_id"):
        parse_descriptor(document(), {name: value for name, value in variables().items() if name != "client_id"})
    with pytest.raises(DescriptorError, match="cleint_id"):
        parse_descriptor(document(), {**variables(), "cleint_id": "x"})
    with pytest.raises(DescriptorError, match="CLIENT"):
        parse_descriptor(changed("oauth.client_id", "${CLIENT}"), _used(changed("oauth.client_id", "${CLIENT}")))


def test_an_error_repeats_no_value() -> None:
    """A secret in the wrong place stays where it is."""
    made = changed("oauth.revocation_endpoint", "https://x/hunter2?")

    with pytest.raises(DescriptorError) as refused:
        parse_descriptor(made, _used(made))

    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "origin"),
    [
        ("https://a.example", "https://a.example:443"),
        ("https://a.example/x", "https://a.example:443"),
        ("https://A.example:8443/x", "https://a.example:8443"),
        ("http://a.example", "http://a.example:80"),
    ],
)
def test_an_origin_always_has_its_port(uri: str, origin: str) -> None:
    """Scheme, host in lower case, port: one spelling for one place."""
    assert origin_of(uri) == origin
