"""Specs drawn from the CRDs' own schemas, right ones and spoilt ones: for tests that ask several judges about one object."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

from hypothesis import strategies as st

from kvfleet_api import schema

Json = dict[str, Any]


@functools.cache
def schema_of(kind: str) -> Json:
    return schema.crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def values(part: Json) -> st.SearchStrategy[Any]:
    """Values that `part` allows; numbers gather at the bounds and a few small ones, so that rules are met and broken."""
    if "enum" in part:
        return st.sampled_from(part["enum"])
    kind = part["type"]
    if kind == "boolean":
        return st.booleans()
    if kind == "integer":
        low, high = part.get("minimum", -(2**53)), part.get("maximum", 2**53)
        return st.sampled_from(
            sorted({value for value in (low, low + 1, 2, 3, 5557, 5558, high - 1, high) if low <= value <= high})
        )
    if kind == "string":
        return strings(part)
    if kind == "array":
        low, high = part.get("minItems", 0), min(part["maxItems"], part.get("minItems", 0) + 2)
        return st.lists(values(part["items"]), min_size=low, max_size=high)
    if "properties" not in part:
        return st.just({})
    required = {name: values(inner) for name, inner in part["properties"].items() if name in part.get("required", ())}
    optional = {name: values(inner) for name, inner in part["properties"].items() if name not in required}
    return st.fixed_dictionaries(required, optional=optional)


def strings(part: Json) -> st.SearchStrategy[str]:
    pattern = part.get("pattern")
    if pattern is None:
        return st.text(alphabet="ab-/ ", min_size=part.get("minLength", 0), max_size=min(part["maxLength"], 12))
    examples = ("a", "b", "llama-8b", "x-tenant", "kvfleet", "A_B", "redis://r", "keys.json", "http://h", "/health")
    return st.sampled_from([text for text in examples if re.search(pattern, text)])


WRONG = (None, True, -1, 0, 2**60, 0.5, "", "UPPER case\n", "x" * 5000, [], [1, 1], {}, {"unknown": 1})


@st.composite
def specs(draw: st.DrawFn, kind: str) -> Json:
    """A spec of `kind`; mostly with one thing spoilt at a random place."""
    spec = draw(values(schema_of(kind)["properties"]["spec"]))
    if draw(st.integers(0, 2)) == 0:
        return spec
    spec = copy.deepcopy(spec)
    places = list(containers(spec))
    container = places[draw(st.integers(0, len(places) - 1))]
    if isinstance(container, list) and container:
        container.append(copy.deepcopy(container[0]) if draw(st.booleans()) else draw(st.sampled_from(WRONG)))
    elif isinstance(container, dict):
        key = draw(st.sampled_from([*container, "unknown"]))
        if draw(st.booleans()):
            container.pop(key, None)
        else:
            container[key] = draw(st.sampled_from(WRONG))
    return spec


def containers(value: Any) -> Any:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def has_null(value: Any) -> bool:
    return value is None or any(
        has_null(inner)
        for inner in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    )
