"""values.yaml of the Helm chart → its values.schema.json and the table of values in its README.

values.yaml is the only source: the comment lines right above a key are its documentation, a line `# @schema {…}` among
them adds JSON-schema keywords where the default alone does not tell the type, and `{$spec: KIND}` stands for the spec
schema of that kind's CRD. A mapping whose keys are documented is a section (only the documented keys are allowed);
any other mapping is one value.

The schema is JSON Schema draft 7 without references, which every Helm 3 and 4 reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

SCHEMA_MARK = "@schema"
TYPES: tuple[tuple[type, str], ...] = (
    (bool, "boolean"),  # before int: True is an int
    (int, "integer"),
    (str, "string"),
    (list, "array"),
    (dict, "object"),
)
KEPT = (
    *("type", "description", "enum", "pattern", "required"),
    *("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties"),
)
"""Keywords that mean the same in a CRD's schema and in draft 7."""
SpecSchema = Callable[[str], dict[str, Any]]


class ValuesError(Exception):
    """values.yaml breaks a convention; the message names the line and the remedy."""


@dataclass(frozen=True)
class Value:
    """A key of values.yaml with what its comment says."""

    path: tuple[str, ...]
    default: Any
    description: str
    keywords: Mapping[str, Any] = field(default_factory=dict)
    children: tuple[Value, ...] = ()


def read_values(text: str) -> tuple[Value, ...]:
    """The documented keys of values.yaml, nested as they stand there."""
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise ValuesError("values.yaml must be a mapping")
    return _section(root, (), text.splitlines())


def _section(node: yaml.MappingNode, path: tuple[str, ...], lines: list[str]) -> tuple[Value, ...]:
    return tuple(_value(key, node_value, path, lines) for key, node_value in node.value)


def _value(key: yaml.ScalarNode, node: yaml.Node, parent: tuple[str, ...], lines: list[str]) -> Value:
    path = (*parent, str(key.value))
    line = key.start_mark.line
    description, keywords = _comment(lines, line)
    if not description:
        raise ValuesError(f"values.yaml:{line + 1}: {'.'.join(path)} has no comment above it: say what it is for")
    section = isinstance(node, yaml.MappingNode) and any(_comment(lines, k.start_mark.line)[0] for k, _ in node.value)
    return Value(
        path=path,
        default=_plain(node),
        description=description,
        keywords=keywords,
        children=_section(node, path, lines) if section and isinstance(node, yaml.MappingNode) else (),
    )


def _comment(lines: list[str], key_line: int) -> tuple[str, dict[str, Any]]:
    """Prose and schema keywords of the comment block that ends right above `key_line`."""
    first = key_line
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    prose: list[str] = []
    keywords: dict[str, Any] = {}
    for number, line in enumerate(lines[first:key_line], start=first + 1):
        text = line.strip().removeprefix("#").strip()
        if not text.startswith(SCHEMA_MARK):
            prose.append(text)
            continue
        loaded = yaml.safe_load(text.removeprefix(SCHEMA_MARK))
        if not isinstance(loaded, dict):
            raise ValuesError(f"values.yaml:{number}: `{SCHEMA_MARK}` needs a mapping, for example {{minimum: 1}}")
        keywords |= loaded
    return " ".join(prose).strip(), keywords


def _plain(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def values_schema(values: tuple[Value, ...], spec_schema: SpecSchema) -> dict[str, Any]:
    """The JSON schema of values.yaml."""
    schema = _object_schema(values, spec_schema)
    # Helm adds `global` to the values of a subchart.
    schema["properties"]["global"] = {"type": "object", "description": "Set by a parent chart; not read here."}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the kvfleet chart"} | schema


def _object_schema(values: tuple[Value, ...], spec_schema: SpecSchema) -> dict[str, Any]:
    properties = {value.path[-1]: _value_schema(value, spec_schema) for value in values}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _value_schema(value: Value, spec_schema: SpecSchema) -> dict[str, Any]:
    head = {"description": value.description}
    if value.children:
        return head | _object_schema(value.children, spec_schema)
    keywords = dict(value.keywords)
    kind = keywords.pop("$spec", None)
    if kind is not None:
        return head | closed_schema(spec_schema(kind)) | keywords
    if "type" not in keywords and "enum" not in keywords:
        keywords = {"type": _type_of(value)} | keywords
    return head | keywords


def _type_of(value: Value) -> str:
    for python_type, name in TYPES:
        if isinstance(value.default, python_type):
            return name
    raise ValuesError(
        f"values.yaml: {'.'.join(value.path)}: the default {value.default!r} does not tell the type: "
        f"add `# {SCHEMA_MARK} {{type: …}}`"
    )


def closed_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A CRD's structural schema as JSON schema that refuses fields the CRD does not have."""
    kept = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if "items" in schema:
        kept["items"] = closed_schema(schema["items"])
    if isinstance(schema.get("additionalProperties"), Mapping):
        kept["additionalProperties"] = closed_schema(schema["additionalProperties"])
    if "properties" in schema:
        kept["properties"] = {name: closed_schema(sub) for name, sub in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    return kept


def leaves(values: tuple[Value, ...]) -> Iterator[Value]:
    """Values a user sets: sections are entered."""
    for value in values:
        if value.children:
            yield from leaves(value.children)
        else:
            yield value


def values_table(values: tuple[Value, ...]) -> str:
    """The README's table, one row a value."""
    rows = ["| Value | Default | What it is for |", "| --- | --- | --- |"]
    for value in leaves(values):
        default = json.dumps(value.default).replace("|", "\\|")
        rows.append(f"| `{'.'.join(value.path)}` | `{default}` | {value.description.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)
