"""values.yaml → schema and table: what a comment means, and what is refused."""

from __future__ import annotations

import pytest
from chart_values import Value, ValuesError, closed_schema, leaves, read_values, values_schema, values_table

SAMPLE = """
# Not a comment of any value.

# How many.
# @schema {minimum: 1}
replicas: 2

# A section.
part:
  # Is it on?
  enabled: false
  # Labels, any.
  # @schema {additionalProperties: {type: string}}
  labels:
    a: "1"
"""


def no_spec(kind: str) -> dict[str, object]:
    raise AssertionError(f"nobody asked for {kind}")


def test_a_comment_block_right_above_a_key_is_its_documentation() -> None:
    replicas, part = read_values(SAMPLE)
    assert replicas == Value(("replicas",), 2, "How many.", {"minimum": 1})
    assert part.description == "A section."
    assert [child.path for child in part.children] == [("part", "enabled"), ("part", "labels")]


def test_a_mapping_with_undocumented_keys_is_one_value() -> None:
    assert [(value.path, value.default) for value in leaves(read_values(SAMPLE))] == [
        (("replicas",), 2),
        (("part", "enabled"), False),
        (("part", "labels"), {"a": "1"}),
    ]


def test_the_schema_takes_types_from_defaults_and_keywords_from_marks() -> None:
    schema = values_schema(read_values(SAMPLE), no_spec)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["replicas"] == {"description": "How many.", "type": "integer", "minimum": 1}
    part = schema["properties"]["part"]
    assert part["additionalProperties"] is False
    assert part["properties"]["enabled"]["type"] == "boolean"
    assert part["properties"]["labels"] == {
        "description": "Labels, any.",
        "type": "object",
        "additionalProperties": {"type": "string"},
    }


def test_a_parent_chart_may_pass_globals() -> None:
    assert "global" in values_schema(read_values(SAMPLE), no_spec)["properties"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "values.yaml:1: a has no comment above it"),
        ("# A.\na:\n  # B.\n  b: 1\n  c: 2\n", "values.yaml:5: a.c has no comment above it"),
        ("# A.\n\na: 1\n", "values.yaml:3: a has no comment above it"),
        ("# A.\n# @schema minimum\na: 1\n", "values.yaml:2: `@schema` needs a mapping"),
        ("- 1\n", "values.yaml must be a mapping"),
    ],
)
def test_a_broken_convention_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ValuesError, match=message):
        read_values(text)


def test_a_default_that_tells_no_type_needs_a_mark() -> None:
    with pytest.raises(ValuesError, match="a: the default None does not tell the type"):
        values_schema(read_values("# A.\na: null\n"), no_spec)


def test_a_spec_mark_brings_in_the_schema_of_that_kind() -> None:
    values = read_values("# A.\n# @schema {$spec: Thing}\na: {}\n")
    schema = values_schema(values, lambda kind: {"type": "object", "properties": {kind: {"type": "string"}}})
    assert schema["properties"]["a"] == {
        "description": "A.",
        "type": "object",
        "additionalProperties": False,
        "properties": {"Thing": {"type": "string"}},
    }


def test_a_structural_schema_is_closed_except_where_it_says_otherwise() -> None:
    structural = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "format": "int32", "default": 1, "minimum": 0},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "port": {"x-kubernetes-int-or-string": True},
            "list": {"type": "array", "items": {"type": "object", "properties": {"k": {"type": "string"}}}},
            "map": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 3}},
        },
        "x-kubernetes-validations": [{"rule": "true"}],
    }
    assert closed_schema(structural) == {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "n": {"type": "integer", "minimum": 0},
            "free": {"type": "object"},
            "port": {"type": ["integer", "string"]},
            "list": {
                "type": "array",
                "items": {"type": "object", "properties": {"k": {"type": "string"}}, "additionalProperties": False},
            },
            "map": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 3}},
        },
    }


def test_the_table_has_a_row_for_every_value_and_keeps_bars_out_of_its_cells() -> None:
    table = values_table(read_values('# One | two.\na: "x|y"\n'))
    assert table.splitlines()[2] == r'| `a` | `"x\|y"` | One \| two. |'
