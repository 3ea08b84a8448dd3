"""Validation errors in people's words: which field, what is wrong, what to do.

`explain(model, error)` turns pydantic's errors into `FieldProblem`s with the camelCase path a manifest uses.
A table maps pydantic's error types to sentences; unknown fields and values get "did you mean …".
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from kvfleet_api.common import Resource

Loc = tuple[str | int, ...]
Condition = Literal["Accepted", "ResolvedRefs", "Conflicted"]
Severity = Literal["Error", "Warning"]


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One thing wrong with one field."""

    path: Loc
    message: str

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.message}" if self.path else self.message


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one object, in the words of a condition."""

    kind: str
    namespace: str | None
    name: str
    condition: Condition
    """The condition it belongs to; an error makes it False (`Conflicted`: True), a warning goes into its message."""
    reason: str
    field: str
    message: str
    severity: Severity = "Error"
    """Error: part of what was asked for is not served. Warning: it is, but perhaps not as meant."""

    def __str__(self) -> str:
        key = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return ": ".join(part for part in (f"{self.kind} {key}", self.field, self.message) if part)


def problem_of(
    resource: Resource, field: str, condition: Condition, reason: str, message: str, severity: Severity = "Error"
) -> Problem:
    metadata = resource.metadata
    return Problem(resource.kind, metadata.namespace, metadata.name, condition, reason, field, message, severity)


def dotted(path: Iterable[str | int]) -> str:
    """`("spec", "signals", 0, "queue")` → `spec.signals[0].queue`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` where something known resembles `word` (case aside), else nothing."""
    by_folded = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return f" (did you mean {by_folded[close[0]]}?)" if close else ""


def explain(model: type[BaseModel], error: ValidationError) -> list[FieldProblem]:
    """What `error`, raised on reading a `model`, says: one entry per problem, in the order of the fields."""
    return [_explain(model, detail) for detail in error.errors(include_url=False)]


def _explain(model: type[BaseModel], detail: Any) -> FieldProblem:
    loc: Loc = tuple(part for part in detail["loc"])
    kind, context, value = detail["type"], detail.get("ctx", {}), detail.get("input")
    if kind == "extra_forbidden":
        known = field_names(model, loc[:-1])
        hint = did_you_mean(str(loc[-1]), known)
        return FieldProblem(loc, f"unknown field{hint}: rename or remove it; known here: {', '.join(known) or 'none'}")
    if kind == "missing":
        return FieldProblem(loc, "missing: add it")
    if kind == "value_error":
        cause = context.get("error")
        field = getattr(cause, "field", "")
        return FieldProblem((*loc, *field.split(".")) if field else loc, str(cause) if cause else detail["msg"])
    if kind == "literal_error":
        return FieldProblem(loc, _literal(str(context["expected"]), value))
    sentence = _SENTENCES.get(kind)
    message = sentence(context, value) if sentence else f"{detail['msg']}: correct it (found {_shown(value)})"
    return FieldProblem(loc, message)


def _literal(expected: str, value: Any) -> str:
    choices = [choice.strip("'") for choice in expected.replace(" or ", ", ").split(", ")]
    if isinstance(value, bool):
        quoted = next((c for c in choices if c.casefold() in ("on", "off", "yes", "no")), None)
        if quoted:
            return f'YAML reads a bare {quoted} as a boolean: write "{quoted}" in quotes (one of {", ".join(choices)})'
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"must be one of {', '.join(choices)}; found {_shown(value)}{hint}"


def _type(wanted: str, remedy: str = "") -> Callable[[Any, Any], str]:
    def sentence(context: Any, value: Any) -> str:
        return f"must be {wanted}; found {_shown(value)}{remedy}"

    return sentence


def _bound(words: str, key: str) -> Callable[[Any, Any], str]:
    return lambda context, value: f"must be {words} {context[key]}; found {_shown(value)}"


_SENTENCES: dict[str, Callable[[Any, Any], str]] = {
    "int_type": _type("a whole number", ": write it without quotes or decimals"),
    "int_parsing": _type("a whole number", ": write it without quotes or decimals"),
    "int_from_float": _type("a whole number", ": a smaller unit is in the field's name where one is needed"),
    "bool_type": _type("true or false"),
    "string_type": _type("a string", ": put it in quotes"),
    "list_type": _type("a list", ": start each entry with `- `"),
    "dict_type": _type("a mapping of keys to values"),
    "model_type": _type("a mapping of fields"),
    "model_attributes_type": _type("a mapping of fields"),
    "greater_than_equal": _bound("at least", "ge"),
    "less_than_equal": _bound("at most", "le"),
    "string_pattern_mismatch": lambda context, value: f"{_shown(value)} does not match {context['pattern']}: change it",
    "string_too_short": lambda context, value: f"must have at least {context['min_length']} character(s)",
    "string_too_long": lambda context, value: f"must have at most {context['max_length']} characters; shorten it",
    "too_short": lambda context, value: (
        f"needs at least {context['min_length']} entry; found {context['actual_length']}: add one"
    ),
    "too_long": lambda context, value: (
        f"may have at most {context['max_length']} entries; found {context['actual_length']}"
    ),
}


def _shown(value: Any) -> str:
    """The value as its writer would know it, cut to a line."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def field_names(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The camelCase names of the fields at `path` below `model`; empty where the path leads to no model."""
    current: type[BaseModel] | None = model
    for part in path:
        if current is None:
            return []
        if isinstance(part, int):
            continue
        field = next((f for name, f in current.model_fields.items() if part in (f.alias, name)), None)
        current = model_in(field.annotation) if field else None
    return [field.alias or name for name, field in current.model_fields.items()] if current else []


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation: `X`, `X | None`, `list[X]`."""
    pending = [annotation]
    while pending:
        candidate = pending.pop()
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
        pending.extend(get_args(candidate))
    return None
