"""The CRDs, lowered from the pydantic models.

    model.model_json_schema() → lower() → structural OpenAPI v3 schema → CustomResourceDefinition → YAML

Kubernetes accepts a strict subset of JSON Schema ("structural"). `lower` knows each keyword it may meet and fails on any
other, so a new construct in a model is decided upon, not lost. What it changes:

- `$ref` is inlined (recursion is refused); `anyOf [X, null]` becomes an optional X without a default
- `title`, `examples` and `additionalProperties: false` are dropped (the API server prunes or refuses unknown fields
  itself); the first example goes into the description
- a nested object that its model fills (`default_factory`) gets the defaults below it as its default; `{}` would do
  for the fields, but the API server tries rules on the bare default and refuses the CRD
- empty defaults are dropped: absent means empty. `const` becomes an `enum` of one
- free-form objects get `x-kubernetes-preserve-unknown-fields`, lists a list type, integers a format

Cross-field rules (`constraints.rule`) arrive as `x-kubernetes-validations`.

`python -m kvfleet_api.schema --write DIR` writes the files, `--check DIR` fails when they differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel

from kvfleet_api import GROUP, VERSION
from kvfleet_api.common import DNS_LABEL
from kvfleet_api.manifests import KINDS
from kvfleet_api.printing import NAMES, SCALED, columns
from kvfleet_api.problems import model_in

Json = dict[str, Any]

HEADER: Final = "# Generated from the models in crds/kvfleet_api by `make generate`. Do not edit.\n"


class LoweringError(ValueError):
    """A model uses something a structural schema cannot say; `path` tells where."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path or '(root)'}: {message}")


# Lowering


def lower(schema: Json) -> Json:
    """A pydantic JSON schema (validation mode, by alias) as a structural schema."""
    definitions = schema.get("$defs", {})
    return _Lowering(definitions).lower({key: value for key, value in schema.items() if key != "$defs"}, "", ())


class _Lowering:
    def __init__(self, definitions: Mapping[str, Json]) -> None:
        self.definitions = definitions

    def lower(self, schema: Json, path: str, inside: tuple[str, ...]) -> Json:
        """Lower `schema`; `inside` are the definitions being inlined around it."""
        schema, inside = self._inlined(schema, path, inside)
        out: Json = {}
        example = None
        for keyword, value in schema.items():
            if keyword in _COPIED:
                out[keyword] = value
            elif keyword in _REWRITTEN:
                _REWRITTEN[keyword](out, value)
            elif keyword == "properties":
                out["properties"] = self._properties(schema, path, inside)
            elif keyword == "items":
                out["items"] = self.lower(value, f"{path}[]", inside)
            elif keyword == "additionalProperties":
                self._additional(out, value, path, inside)
            elif keyword == "examples":
                example = value[0]
            elif keyword not in _DROPPED:
                raise LoweringError(
                    path, f"keyword {keyword!r} is not known to the lowering: teach it, or change the model"
                )
        if example is not None:
            out["description"] = f"{out.get('description', '')} Example: `{_flow(example)}`".lstrip()
        return _completed(out, path)

    def _inlined(self, schema: Json, path: str, inside: tuple[str, ...]) -> tuple[Json, tuple[str, ...]]:
        """`schema` without `$ref` and `anyOf`; what stands beside them wins, but descriptions and rules are joined."""
        while "$ref" in schema or "anyOf" in schema:
            beside = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf")}
            if "$ref" in schema:
                name = schema["$ref"].removeprefix("#/$defs/")
                if name in inside:
                    raise LoweringError(path, f"{name} contains itself: a structural schema cannot be recursive")
                inside = (*inside, name)
                target = self.definitions[name]
            else:
                variants = [variant for variant in schema["anyOf"] if variant != {"type": "null"}]
                if len(variants) != 1 or len(schema["anyOf"]) != 2:
                    raise LoweringError(path, "a union: give each variant a field of its own and a rule 'exactly one'")
                target = variants[0]
                if beside.get("default", 0) is None:
                    del beside["default"]
                beside[_OPTIONAL] = True
            schema = {**target, **beside}
            if both := [part["description"] for part in (beside, target) if "description" in part]:
                schema["description"] = " ".join(both)
            if rules := [*target.get(_RULES, []), *beside.get(_RULES, [])]:
                schema[_RULES] = rules
        return schema, inside

    def _properties(self, schema: Json, path: str, inside: tuple[str, ...]) -> Json:
        properties: Json = {}
        for name, value in schema["properties"].items():
            lowered = self.lower(value, f"{path}.{name}".lstrip("."), inside)
            optional = lowered.pop(_OPTIONAL, False)
            is_model = lowered["type"] == "object" and "properties" in lowered
            if is_model and not optional and name not in schema.get("required", ()):
                lowered = _with_default(lowered)
            properties[name] = lowered
        return properties

    def _additional(self, out: Json, value: bool | Json, path: str, inside: tuple[str, ...]) -> None:
        if value is True:
            out["x-kubernetes-preserve-unknown-fields"] = True
        elif value is not False:
            out["additionalProperties"] = self.lower(value, f"{path}{{}}", inside)


_RULES: Final = "x-kubernetes-validations"
_OPTIONAL: Final = "x-optional"
"""Marks, between two steps of the lowering, what was `X | None`: its absence means none, so it gets no default."""
_COPIED: Final = frozenset(
    {
        "type", "description", "enum", "format", "pattern", "required", "minimum", "maximum", "minLength", "maxLength",
        "minItems", "maxItems", "minProperties", "maxProperties", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
        _RULES, _OPTIONAL,
    }
)  # fmt: skip
_DROPPED: Final = frozenset({"title"})


def _default(out: Json, value: Any) -> None:
    if value not in ("", [], {}, None):
        out["default"] = value


def _flow(value: Any) -> str:
    """A value as one line of YAML."""
    return value if isinstance(value, str) else str(yaml.safe_dump(value, default_flow_style=True)).split("\n")[0]


_REWRITTEN: Final[dict[str, Callable[[Json, Any], None]]] = {
    "default": _default,
    "const": lambda out, value: out.__setitem__("enum", [value]),
}


def _completed(out: Json, path: str) -> Json:
    """Add what Kubernetes wants stated; refuse what would make CEL's cost unbounded."""
    kind = out.get("type")
    if kind not in ("object", "array", "string", "integer", "boolean"):
        raise LoweringError(path, f"type {kind!r} has no place in the API: use an integer in a named unit, or a string")
    if kind == "array":
        out.setdefault("x-kubernetes-list-type", "atomic")
        if "maxItems" not in out:
            raise LoweringError(path, "a list without maxItems: bound it with Field(max_length=…)")
    if kind == "string" and "enum" not in out and "maxLength" not in out:
        raise LoweringError(path, "a string without maxLength: bound it with Field(max_length=…)")
    if kind == "integer":
        out["format"] = "int32" if abs(out.get("maximum", 2**63)) < 2**31 else "int64"
    if _RULES in out:
        out[_RULES] = [_ordered(entry) for entry in out[_RULES]]
    return _ordered(out)


def _with_default(schema: Json) -> Json:
    """An object's schema with the defaults of its properties as its own default."""
    default = {name: part["default"] for name, part in schema["properties"].items() if "default" in part}
    return _ordered({**schema, "default": default})


def _ordered(entry: Json) -> Json:
    """The same, with what a reader looks for first in front."""
    first = ("description", "type", "format", "default", "rule", "message")
    return {key: entry[key] for key in (*first, *(key for key in entry if key not in first)) if key in entry}


# The CustomResourceDefinitions


def crd(kind: str) -> Json:
    """The CustomResourceDefinition of a kind."""
    names, model = NAMES[kind], KINDS[kind]
    subresources: Json = {"status": {}}
    if kind in SCALED:
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": columns(kind),
        "subresources": subresources,
        "schema": {"openAPIV3Schema": _object_schema(model)},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.plural}.{GROUP}", "labels": {"app.kubernetes.io/part-of": "kvfleet"}},
        "spec": {
            "group": GROUP,
            "scope": names.scope,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": names.plural,
                "singular": kind.lower(),
                "shortNames": [names.short],
                "categories": ["kvfleet"],
            },
            "versions": [version],
        },
    }


def _object_schema(model: type[BaseModel]) -> Json:
    spec_field = model.model_fields["spec"]
    spec_model, status_model = model_in(spec_field.annotation), model_in(model.model_fields["status"].annotation)
    assert spec_model is not None and status_model is not None
    spec, status = (lower(part.model_json_schema(mode="validation")) for part in (spec_model, status_model))
    status.pop("required", None)
    if not spec_field.is_required():
        spec = _with_default(spec)
    module_doc = sys.modules[model.__module__].__doc__ or ""
    return {
        "description": " ".join(module_doc.split("\n\n")[0].split()),
        "type": "object",
        **({"required": ["spec"]} if spec_field.is_required() else {}),
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 63, "pattern": DNS_LABEL}},
            },
            "spec": spec,
            "status": status,
        },
    }


class _Dumper(yaml.SafeDumper):
    """Without aliases, which `kubectl` reads but people do not like."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def crd_yaml(kind: str) -> str:
    """The CustomResourceDefinition of a kind as YAML text."""
    return HEADER + yaml.dump(crd(kind), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def all_crds() -> dict[str, str]:
    """File name → YAML text of every CustomResourceDefinition."""
    return {f"{GROUP}_{NAMES[kind].plural}.yaml": crd_yaml(kind) for kind in KINDS}


def write(directory: str | Path) -> None:
    """Write all CRDs into `directory`."""
    for name, text in all_crds().items():
        (Path(directory) / name).write_text(text, encoding="utf-8")


def verify(directory: str | Path) -> list[str]:
    """What is wrong with the CRD files in `directory`; empty when they are what the models say."""
    found = {path.name: path.read_text(encoding="utf-8") for path in Path(directory).glob(f"{GROUP}_*.yaml")}
    wanted = all_crds()
    differing = [
        f"{directory}/{name} is missing or differs: run make generate"
        for name in wanted
        if found.get(name) != wanted[name]
    ]
    return differing + [
        f"{directory}/{name} belongs to no kind: remove it" for name in sorted(found.keys() - wanted.keys())
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvfleet_api.schema", description="The CRDs of kvfleet.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", metavar="DIR", help="write the CRD files")
    action.add_argument("--check", metavar="DIR", help="fail if the CRD files are not what the models say")
    options = parser.parse_args(arguments)
    if options.write:
        write(options.write)
        return 0
    problems = verify(options.check)
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
