"""The CRDs: structural, complete, in the repository as generated, and in agreement with the models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from generated_specs import has_null, schema_of, specs
from hypothesis import given, settings
from pydantic import Field, ValidationError, model_validator

from kvfleet_api import apidocs, schema
from kvfleet_api.common import Schema
from kvfleet_api.constraints import UniqueBy, rule, rules_of
from kvfleet_api.manifests import KINDS, ManifestError, parse
from kvfleet_api.schema import LoweringError, lower

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
Json = dict[str, Any]


def corpus(name: str) -> list[Json]:
    return [document for document in yaml.safe_load_all((CORPUS / name).read_text()) if document]


def parts_of(part: Json) -> list[Json]:
    """Every schema inside a schema."""
    inner = [
        *part.get("properties", {}).values(),
        *(part[key] for key in ("items", "additionalProperties") if key in part),
    ]
    return [part, *(found for entry in inner for found in parts_of(entry))]


def models_below(model: type[Any]) -> set[type[Schema]]:
    found, pending = set(), [model]
    while pending:
        current = pending.pop()
        for field in current.model_fields.values():
            inner = schema.model_in(field.annotation)
            if inner is not None and inner not in found:
                found.add(inner)
                pending.append(inner)
    return found


# The files


def test_committed_crds_are_what_the_models_say() -> None:
    assert schema.verify(ROOT / "crds") == []


def test_verify_names_what_is_stale_missing_or_left_over(tmp_path: Path) -> None:
    schema.write(tmp_path)
    assert schema.verify(tmp_path) == []
    (tmp_path / "kvfleet.io_modelpools.yaml").write_text("old")
    (tmp_path / "kvfleet.io_fleetrouters.yaml").unlink()
    (tmp_path / "kvfleet.io_gone.yaml").write_text("")
    problems = "\n".join(schema.verify(tmp_path))
    assert re.findall(r"kvfleet\.io_\w+", problems) == [
        "kvfleet.io_modelpools",
        "kvfleet.io_fleetrouters",
        "kvfleet.io_gone",
    ]
    assert schema.main(["--check", str(tmp_path)]) == 1
    (tmp_path / "kvfleet.io_gone.yaml").unlink()
    assert schema.main(["--write", str(tmp_path)]) == 0
    assert schema.main(["--check", str(tmp_path)]) == 0


def test_committed_reference_is_what_the_models_say() -> None:
    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == apidocs.markdown()


@pytest.mark.parametrize("kind", KINDS)
def test_crd_follows_the_conventions(kind: str) -> None:
    definition = yaml.safe_load(schema.crd_yaml(kind))
    spec, version = definition["spec"], definition["spec"]["versions"][0]
    assert definition["metadata"]["name"] == f"{spec['names']['plural']}.kvfleet.io"
    assert spec["names"]["categories"] == ["kvfleet"]
    assert "status" in version["subresources"]
    assert version["additionalPrinterColumns"][0]["name"] == "Ready"
    status = schema_of(kind)["properties"]["status"]
    assert "required" not in status
    conditions = status["properties"]["conditions"]
    assert (conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"]) == ("map", ["type"])


@pytest.mark.parametrize("kind", ["ModelPool", "FleetRouter"])
def test_scale_subresource_paths_lead_to_fields(kind: str) -> None:
    version = schema.crd(kind)["spec"]["versions"][0]
    for path in version["subresources"]["scale"].values():
        part = schema_of(kind)
        for name in path.strip(".").split("."):
            part = part["properties"][name]
    assert (
        "default" in schema_of(kind)["properties"]["spec"]["properties"]["replicas"]
    )  # or /scale fails where it is left out


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_bounded_and_described(kind: str) -> None:
    spec = schema_of(kind)["properties"]["spec"]
    for part in parts_of(spec):
        assert part["type"] in ("object", "array", "string", "integer", "boolean")
        assert not {"$ref", "anyOf", "title", "examples", "const", "nullable"} & part.keys()
        if part["type"] == "array":
            assert "maxItems" in part
        if part["type"] == "string":
            assert "maxLength" in part or "enum" in part
        undescribed = [name for name, inner in part.get("properties", {}).items() if not inner.get("description")]
        assert undescribed == []


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_are_re2(kind: str) -> None:
    patterns = [part["pattern"] for part in parts_of(schema_of(kind)) if "pattern" in part]
    assert [pattern for pattern in patterns if re.search(r"\(\?[=!<]|\\[1-9]", pattern)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_object_defaults_hold_the_defaults_below_them(kind: str) -> None:
    for part in parts_of(schema_of(kind)):
        if part["type"] == "object" and "default" in part:
            below = {name: inner["default"] for name, inner in part["properties"].items() if "default" in inner}
            assert part["default"] == below


# Lowering


def test_unknown_keyword_fails() -> None:
    with pytest.raises(LoweringError, match=r"spec\.a\.b: keyword 'multipleOf' is not known"):
        inner = {"type": "object", "properties": {"b": {"type": "integer", "multipleOf": 2}}}
        lower({"type": "object", "properties": {"spec": {"type": "object", "properties": {"a": inner}}}})


class Tree(Schema):
    children: Annotated[list[Tree], Field(max_length=2)]


class Union(Schema):
    either: int | Annotated[str, Field(max_length=3)]


class Unbounded(Schema):
    names: list[Annotated[str, Field(max_length=3)]]


class UnboundedText(Schema):
    name: str


class Fraction(Schema):
    share: float


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Tree, "contains itself"),
        (Union, "a union"),
        (Unbounded, "a list without maxItems"),
        (UnboundedText, "a string without maxLength"),
        (Fraction, "type 'number' has no place in the API"),
    ],
)
def test_what_a_structural_schema_cannot_say_is_refused(model: type[Schema], message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        lower(model.model_json_schema())


class Inner(Schema):
    """Said by the class."""

    size: Annotated[int, Field(ge=1, le=9)] = 3


class Outer(Schema):
    inner: Annotated[Inner, Field(default_factory=Inner)]
    """Said by the field."""
    maybe: Inner | None = None
    names: Annotated[list[Annotated[str, Field(max_length=5, examples=["a"])]], UniqueBy(), Field(max_length=2)]


def test_lowering_of_optional_defaulted_and_set_fields() -> None:
    size = {"type": "integer", "format": "int32", "default": 3, "minimum": 1, "maximum": 9}
    assert lower(Outer.model_json_schema(mode="validation")) == {
        "type": "object",
        "properties": {
            "inner": {
                "description": "Said by the field. Said by the class.",
                "type": "object",
                "default": {"size": 3},
                "properties": {"size": size},
            },
            "maybe": {"description": "Said by the class.", "type": "object", "properties": {"size": size}},
            "names": {
                "type": "array",
                "items": {"description": "Example: `a`", "type": "string", "maxLength": 5},
                "maxItems": 2,
                "x-kubernetes-list-type": "set",
            },
        },
        "required": ["names"],
    }


# Rules and their twins


def test_a_validator_without_twin_is_refused() -> None:
    class Careless(Schema):
        size: int = 1

        @model_validator(mode="after")
        def _check(self) -> Careless:
            return self

    with pytest.raises(TypeError, match=r"Careless\._check: a model validator without a CEL twin"):
        Careless.model_json_schema()


def test_every_rule_of_every_model_is_in_the_crds_and_broken_by_the_corpus() -> None:
    broken = [document["metadata"]["annotations"].get("kvfleet.io/rule", "") for document in corpus("invalid.yaml")]
    for kind, model in KINDS.items():
        spec = schema.model_in(model.model_fields["spec"].annotation)
        assert spec is not None
        declared = {declared.cel: declared for below in {spec, *models_below(spec)} for declared in rules_of(below)}
        lowered = [entry for part in parts_of(schema_of(kind)) for entry in part.get("x-kubernetes-validations", ())]
        assert {entry["rule"] for entry in lowered} - {"self == oldSelf"} == declared.keys()
        for one in declared.values():
            start = " ".join(one.message.split()[:4])
            shape = re.escape(re.sub(r"\{\w+\}", "\0", start)).replace("\0", r"\d+")
            assert any(re.match(shape, text) for text in broken), f"no object in corpus/invalid.yaml breaks {one.cel}"


def test_rule_messages_carry_the_values_in_both_worlds() -> None:
    class Range(Schema):
        low_end: int
        high: int

        @rule(cel="self.lowEnd <= self.high", message="lowEnd ({lowEnd}) exceeds high ({high}): swap", field="lowEnd")
        def _ordered(self) -> bool:
            return self.low_end <= self.high

    with pytest.raises(ValidationError, match=r"lowEnd \(3\) exceeds high \(2\): swap"):
        Range(low_end=3, high=2)
    assert rules_of(Range)[0].kubernetes_validation() == {
        "rule": "self.lowEnd <= self.high",
        "message": "lowEnd exceeds high: swap",
        "messageExpression": "'lowEnd (%d) exceeds high (%d): swap'.format([self.lowEnd, self.high])",
        "fieldPath": ".lowEnd",
    }


# Agreement between models and schemas


@pytest.mark.parametrize("document", corpus("valid.yaml"), ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_both_accept(document: Json, refusals: Any) -> None:
    parse(yaml.safe_dump(document))
    without_nulls = yaml.safe_load(re.sub(r"^.*: null\n", "", yaml.safe_dump(document), flags=re.MULTILINE))
    assert refusals(document["kind"], without_nulls) == []


@pytest.mark.parametrize("document", corpus("invalid.yaml"), ids=lambda d: d["metadata"]["name"])
def test_both_refuse_and_name_the_field(document: Json, refusals: Any) -> None:
    annotations = document["metadata"]["annotations"]
    with pytest.raises(ManifestError) as caught:
        parse(yaml.safe_dump(document))
    (problem,) = caught.value.problems
    assert problem.field == annotations["kvfleet.io/field"]
    assert annotations.get("kvfleet.io/rule", "") in problem.message
    if "rule" in str(annotations):
        (refusal,) = refusals(document["kind"], document)
        assert refusal.split()[0] == annotations["kvfleet.io/rule"].split()[0]
    else:
        assert refusals(document["kind"], document)


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_schemas_agree_on_any_object(kind: str, refusals: Any) -> None:
    verdicts = set()

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(specs(kind))
    def agree(spec: Json) -> None:
        if has_null(spec):  # the API server drops null where it means absent: test_both_accept
            return
        body = {"apiVersion": "kvfleet.io/v1alpha1", "kind": kind, "metadata": {"name": "a"}, "spec": spec}
        try:
            KINDS[kind].model_validate_json(json.dumps(body), strict=True)
            accepted, why = True, ""
        except ValidationError as error:
            accepted, why = False, str(error)
        refused = refusals(kind, body)
        assert accepted == (not refused), (why, refused)
        verdicts.add(accepted)

    agree()
    assert verdicts == {True, False}
