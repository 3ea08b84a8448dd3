"""A structural-schema validator that also evaluates CEL.

It stands in for the API server: defaults are applied, unknown fields are refused, bounds, patterns, keyed lists and
`x-kubernetes-validations` are checked. The corpus in corpus/ is meant for a real API server too.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cel
import jsonschema
import pytest

from kvfleet_api import schema

sys.path.insert(0, str(Path(__file__).parent))

Json = dict[str, Any]


def spec_schema(kind: str) -> Json:
    return schema.crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def _closed(part: Any) -> Any:
    """The schema with unknown fields refused, as the API server does under strict field validation."""
    if isinstance(part, list):
        return [_closed(entry) for entry in part]
    if not isinstance(part, dict):
        return part
    closed = {key: _closed(value) for key, value in part.items() if key != "default"}
    if "properties" in part and isinstance(part["properties"], dict) and part.get("type") == "object":
        closed["additionalProperties"] = False
    return closed


def _defaulted(part: Json, value: Any) -> Any:
    if isinstance(value, dict):
        for name, inner in part.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
            if name in value:
                value[name] = _defaulted(inner, value[name])
    elif isinstance(value, list) and "items" in part:
        return [_defaulted(part["items"], entry) for entry in value]
    return value


def _keyed_list(validator: Any, keys: list[str], value: Any, part: Json) -> Iterator[jsonschema.ValidationError]:
    entries = value if isinstance(value, list) else []
    identities = [repr([entry.get(key) for key in keys]) for entry in entries if isinstance(entry, dict)]
    if len(set(identities)) != len(identities):
        yield jsonschema.ValidationError("duplicate value")


def _list_type(validator: Any, kind: str, value: Any, part: Json) -> Iterator[jsonschema.ValidationError]:
    if kind == "set" and isinstance(value, list) and len({repr(entry) for entry in value}) != len(value):
        yield jsonschema.ValidationError("duplicate value")


def _pattern(validator: Any, pattern: str, value: Any, part: Json) -> Iterator[jsonschema.ValidationError]:
    # Go's $ is the end of the text; Python's also matches before a last newline.
    python = pattern.removesuffix("$") + r"\Z" if pattern.endswith("$") else pattern
    if isinstance(value, str) and not re.search(python, value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern}")


_program = functools.cache(cel.compile)


def _cel_rules(validator: Any, rules: list[Json], value: Any, part: Json) -> Iterator[jsonschema.ValidationError]:
    for rule in rules:
        if "oldSelf" not in rule["rule"] and not _program(rule["rule"]).execute({"self": value}):
            yield jsonschema.ValidationError(rule["message"])


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"x-kubernetes-list-map-keys": _keyed_list, "x-kubernetes-list-type": _list_type, "pattern": _pattern},
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)
_WithRules = jsonschema.validators.extend(_Validator, {"x-kubernetes-validations": _cel_rules})


@pytest.fixture(scope="session")
def refusals() -> Callable[[str, Json], list[str]]:
    """(kind, object) → why an API server would refuse it; rules run only where the structure is sound, as there."""
    schemas = {}
    for kind in schema.KINDS:
        plain = spec_schema(kind)
        schemas[kind] = plain, _Validator(_closed(plain)), _WithRules(_closed(plain))

    def check(kind: str, body: Json) -> list[str]:
        plain, structure, with_rules = schemas[kind]
        value = {key: copy.deepcopy(body[key]) for key in body if key != "metadata"}
        value["metadata"] = {"name": body["metadata"]["name"]}
        value = _defaulted(plain, value)
        structural = [error.message for error in structure.iter_errors(value)]
        return structural or [error.message for error in with_rules.iter_errors(value)]

    return check
