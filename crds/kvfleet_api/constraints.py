"""Constraints said once and checked twice: by pydantic here, and by the API server through the CRD.

- `@rule` on a method that returns bool: a cross-field rule with its CEL twin. The message is a template over the fields,
  so the API server says the same as the command line. `Schema` puts the twins into the JSON schema.
- `UniqueBy` on a list: no two entries with the same key; in the CRD `x-kubernetes-list-type: map` (or `set`), which also
  lets server-side apply merge the list entry by entry.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

_FIELD_IN_TEMPLATE = re.compile(r"\{(\w+)\}")
_VALUE_IN_BRACKETS = re.compile(r" \([^()]*\{\w+\}[^()]*\)")


class RuleError(ValueError):
    """A cross-field rule is broken. `field` is the camelCase field to look at first; empty: the object as a whole."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule over the fields of one object."""

    cel: str
    """True when it holds; `self` is the object."""
    message: str
    """What is wrong and what to do; `{someField}` stands for that field's value."""
    field: str = ""

    def kubernetes_validation(self) -> dict[str, str]:
        """The entry of `x-kubernetes-validations`; its plain message goes without the values."""
        entry = {"rule": self.cel, "message": _FIELD_IN_TEMPLATE.sub(r"\1", _VALUE_IN_BRACKETS.sub("", self.message))}
        if _FIELD_IN_TEMPLATE.search(self.message):
            entry["messageExpression"] = self._message_expression()
        if self.field:
            entry["fieldPath"] = f".{self.field}"
        return entry

    def _message_expression(self) -> str:
        """The template as CEL: `'…%d…'.format([self.field])`. (Joining strings with + has no bounded cost.)"""
        template = _FIELD_IN_TEMPLATE.sub("%d", self.message)
        values = ", ".join(f"self.{name}" for name in _FIELD_IN_TEMPLATE.findall(self.message))
        return f"'{template}'.format([{values}])"

    def error(self, values: dict[str, Any]) -> RuleError:
        return RuleError(_FIELD_IN_TEMPLATE.sub(lambda match: str(values[match[1]]), self.message), self.field)


def rule(cel: str, message: str, field: str = "") -> Callable[[Callable[[Any], bool]], Any]:
    """Make a method `self -> bool` a validation rule of its model, with `cel` as its twin for the API server."""
    declared = Rule(cel, message, field)

    def decorate(holds: Callable[[Any], bool]) -> Any:
        @functools.wraps(holds)
        def check(self: Any) -> Any:
            if not holds(self):
                raise declared.error(
                    {info.alias or name: getattr(self, name) for name, info in type(self).model_fields.items()}
                )
            return self

        check.__dict__["rule"] = declared
        check.__dict__["holds"] = holds
        return model_validator(mode="after")(check)

    return decorate


def rules_of(model: type[Any]) -> list[Rule]:
    """The rules of a model, in the order of their declaration. Every model validator must be one."""
    validators = model.__pydantic_decorators__.model_validators.values()
    without = [decorator.cls_var_name for decorator in validators if not hasattr(decorator.func, "rule")]
    if without:
        raise TypeError(f"{model.__name__}.{without[0]}: a model validator without a CEL twin; declare it with @rule")
    return [decorator.func.rule for decorator in validators]


@dataclass(frozen=True, slots=True)
class UniqueBy:
    """For `Annotated[list[X], UniqueBy("name")]`: entries differ in these fields. Without fields: entries differ."""

    keys: tuple[str, ...]

    def __init__(self, *keys: str) -> None:
        object.__setattr__(self, "keys", keys)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler(schema)
        json_schema["x-kubernetes-list-type"] = "map" if self.keys else "set"
        if self.keys:
            json_schema["x-kubernetes-list-map-keys"] = [to_camel(key) for key in self.keys]
        return json_schema

    def _check(self, entries: list[Any]) -> list[Any]:
        seen = set()
        for entry in entries:
            identity = tuple(getattr(entry, key) for key in self.keys) if self.keys else (entry,)
            if identity in seen:
                shown = " ".join(map(str, identity))
                raise RuleError(f"{shown!r} is listed more than once: keep one entry")
            seen.add(identity)
        return entries
