"""The official Berlin Group description as a judge of requests and answers.

It reads the description's own operation schemas, a little stricter than written: patterns must match whole values (the
file forgot the anchors), and an object with listed members may have no others.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml
from openapi_schema_validator import OAS30Validator, oas30_format_checker
from referencing import Registry
from referencing.jsonschema import DRAFT4

from sandbox.direct import Reply

DESCRIPTION = Path("../shared/specs/berlin-group/psd2-api_v1.3.11-2021-10-01v1.yaml")
_ROOT = Path(__file__).resolve().parents[2]
_URI = "urn:official"


@lru_cache(maxsize=1)
def official_description() -> "Description":
    path = _ROOT / DESCRIPTION
    if not path.exists():
        pytest.fail(
            f"the official description is missing: expected it at {DESCRIPTION} relative to the repository root"
        )
    return Description(yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader))


class Description:
    def __init__(self, document: dict[str, Any]) -> None:
        _tighten(document)
        self._document = document
        self._registry = Registry().with_resource(_URI, DRAFT4.create_resource(document))
        self._templates = [
            (re.compile(re.sub(r"\{[^/]+\}", "([^/]+)", template)), template) for template in document["paths"]
        ]
        self._templates.sort(key=lambda pair: pair[1].count("{"))  # concrete addresses before patterns

    def check_answer(self, method: str, target: str, reply: Reply) -> None:
        """Assert that an answer is one that the operation may give."""
        operation, _ = self._operation(method, target)
        if operation is None:  # nothing is offered there: the bank must say so
            assert reply.status in (404, 405), f"{method} {target} is not in the description, and got {reply.status}"
            return
        where = f"{method} {target} -> {reply.status}"
        assert str(reply.status) in operation["responses"], f"{where}: no such answer in the description"
        response = self._resolve(operation["responses"][str(reply.status)])
        self._check_headers(response.get("headers", {}), reply.headers, where)
        self._check_body(response.get("content", {}), reply.headers.get("content-type"), reply.body, where)

    def check_request(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        """Assert that a request is one that the operation takes."""
        operation, path_values = self._operation(method, target)
        assert operation is not None, f"{method} {target} is not in the description"
        where = f"{method} {target} (request)"
        lower = {name.lower(): value for name, value in headers.items()}
        query = dict(parse_qsl(urlsplit(target).query))
        parameters = [self._resolve(parameter) for parameter in operation.get("parameters", [])]
        for parameter in parameters:
            name = parameter["name"]
            value = {"header": lower.get(name.lower()), "query": query.get(name), "path": path_values.get(name)}[
                parameter["in"]
            ]
            assert value is not None or not parameter.get("required"), f"{where}: {name} is required"
            if value is not None:
                self._check(parameter["schema"], _typed(value, self._resolve(parameter["schema"])), f"{where}: {name}")
        known = {parameter["name"] for parameter in parameters if parameter["in"] == "query"}
        assert set(query) <= known, f"{where}: unknown query parameters {set(query) - known}"
        if "requestBody" in operation:
            content = self._resolve(operation["requestBody"]).get("content", {})
            self._check_body(content, lower.get("content-type"), body, where)
        else:
            assert body == b"", f"{where}: has a body"

    def _operation(self, method: str, target: str) -> tuple[dict[str, Any] | None, dict[str, str]]:
        path = urlsplit(target).path
        for pattern, template in self._templates:
            match = pattern.fullmatch(path)
            if match is not None:
                names = re.findall(r"\{([^/]+)\}", template)
                operation = self._document["paths"][template].get(method.lower())
                return operation, dict(zip(names, match.groups(), strict=True))
        return None, {}

    def _check_headers(self, described: Mapping[str, Any], headers: Mapping[str, str], where: str) -> None:
        for name, reference in described.items():
            header = self._resolve(reference)
            value = headers.get(name.lower())
            assert value is not None or not header.get("required"), f"{where}: header {name} is required"
            if value is not None:
                self._check(header["schema"], _typed(value, self._resolve(header["schema"])), f"{where}: {name}")

    def _check_body(self, content: Mapping[str, Any], content_type: str | None, body: bytes, where: str) -> None:
        if not content:
            assert body == b"", f"{where}: the description gives no body"
            return
        media_type = (content_type or "").partition(";")[0]
        assert media_type in content, f"{where}: {media_type!r} is not offered"
        self._check(content[media_type]["schema"], json.loads(body), where)

    def _check(self, schema: Mapping[str, Any], value: object, where: str) -> None:
        validator = OAS30Validator(dict(schema), registry=self._registry, format_checker=oas30_format_checker)
        errors = [
            f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(value)
        ]
        assert not errors, f"{where}: {errors}"

    def _resolve(self, node: Any) -> Any:
        while "$ref" in node:
            target: Any = self._document
            for part in node["$ref"].removeprefix(_URI).removeprefix("#/").split("/"):
                target = target[part]
            node = target
        return node


def _tighten(node: Any) -> None:
    """Anchor patterns and close objects, in place; references become absolute so that fragments can be validated."""
    if isinstance(node, list):
        for item in node:
            _tighten(item)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("pattern"), str):
        node["pattern"] = f"^(?:{node['pattern']})$"
    if isinstance(node.get("$ref"), str) and node["$ref"].startswith("#/"):
        node["$ref"] = _URI + node["$ref"]
    if node.get("type") == "object" and "properties" in node and "allOf" not in node:
        node.setdefault("additionalProperties", False)
    for name, value in node.items():
        if name not in ("example", "examples", "description"):
            _tighten(value)


def _typed(value: str, schema: Mapping[str, Any]) -> object:
    """Read a parameter's text as the type that its schema says."""
    if schema.get("type") == "boolean":
        return {"true": True, "false": False}.get(value, value)
    if schema.get("type") == "integer" and value.isdigit():
        return int(value)
    return value
