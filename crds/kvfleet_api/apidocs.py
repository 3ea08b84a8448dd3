"""docs/api.md, generated: every field of the four kinds with type, default, bounds and meaning.

Written from the lowered schemas, so the page says exactly what the API server enforces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import yaml

from kvfleet_api import API_VERSION
from kvfleet_api.manifests import KINDS
from kvfleet_api.printing import NAMES, SCALED
from kvfleet_api.schema import crd

Json = dict[str, Any]

INTRODUCTION: Final = f"""\
<!-- Generated from the models in crds/kvfleet_api by `make generate`. Do not edit. -->

# API reference: {API_VERSION}

Fields are written as paths; `[]` stands for each entry of a list, `{{}}` for each value of a map. A field without default and
without *required* is optional. Unknown fields are refused, numbers are whole numbers in the unit their name tells.
What breaks a rule is refused by the API server and by `kvfleet` with the same words.

Write `mode: "Off"` with quotes: YAML reads a bare `Off` as a boolean.
"""


def markdown() -> str:
    """The whole page."""
    contents = "\n".join(f"- [{kind}](#{kind.lower()})" for kind in KINDS)
    return "\n".join([INTRODUCTION, contents, "", *(_kind(kind) for kind in KINDS)])


def _kind(kind: str) -> str:
    names, schema = NAMES[kind], crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    facts = [f"`kubectl get {names.plural}` (short: `{names.short}`)", names.scope.lower() + " scope"]
    if kind in SCALED:
        facts.append("scale subresource")
    properties = schema["properties"]
    rules = [f"- `{path}`: {rule['message']}" for path, rule in _rules(properties["spec"], "spec")]
    parts = [
        f"## {kind}",
        schema["description"],
        "; ".join(facts) + ".",
        "### Spec",
        _table(properties["spec"], "spec"),
        *(["### Rules", "\n".join(rules)] if rules else []),
        "### Status",
        _table(properties["status"], "status"),
    ]
    return "\n\n".join(parts) + "\n"


def _table(schema: Json, path: str) -> str:
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, part, required in _fields(schema, path):
        default = "*required*" if required else _default(part)
        cells = [f"`{name}`", _type(part), default, part.get("description", "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def _fields(schema: Json, path: str) -> Iterator[tuple[str, Json, bool]]:
    """Every field below `schema`: path, schema, whether it is required; parents before children."""
    for name, part in schema.get("properties", {}).items():
        yield f"{path}.{name}", part, name in schema.get("required", ())
        inner, suffix = part, ""
        while "items" in inner or "additionalProperties" in inner:
            inner, suffix = (
                (inner["items"], suffix + "[]") if "items" in inner else (inner["additionalProperties"], suffix + "{}")
            )
        yield from _fields(inner, f"{path}.{name}{suffix}")


def _rules(schema: Json, path: str) -> Iterator[tuple[str, Json]]:
    yield from ((path, rule) for rule in schema.get("x-kubernetes-validations", ()))
    for name, part in schema.get("properties", {}).items():
        yield from _rules(part, f"{path}.{name}")
    if "items" in schema:
        yield from _rules(schema["items"], f"{path}[]")


def _type(schema: Json) -> str:
    """The type with its bounds, as words."""
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        keys = ", ".join(schema.get("x-kubernetes-list-map-keys", ()))
        unique = f", unique by {keys}" if keys else ", unique" if schema["x-kubernetes-list-type"] == "set" else ""
        return f"list ({_bounds(schema, 'Items')}{unique}) of {_type(schema['items'])}"
    if kind == "object":
        if "additionalProperties" in schema:
            return f"map to {_type(schema['additionalProperties'])}"
        return "object, free form" if "x-kubernetes-preserve-unknown-fields" in schema else "object"
    if kind == "integer":
        bounds = _bounds(schema, "imum")
        return f"integer ({bounds})" if bounds else "integer"
    if kind == "string":
        form = f", `{schema['pattern']}`" if "pattern" in schema else ", RFC 3339" if "format" in schema else ""
        return f"string ({_bounds(schema, 'Length')} characters{form})"
    return str(kind)


def _bounds(schema: Json, suffix: str) -> str:
    low, high = schema.get(f"min{suffix}"), schema.get(f"max{suffix}")
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}" if high is not None else ""


def _default(schema: Json) -> str:
    """The default of a value; objects show theirs in the fields below them."""
    if "default" not in schema or schema["type"] == "object":
        return ""
    return f"`{yaml.safe_dump(schema['default'], default_flow_style=True).splitlines()[0]}`"
