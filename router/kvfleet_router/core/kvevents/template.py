"""A model's chat template, rendered as the engine renders it (transformers' rules for Jinja, vLLM's for messages).

The environment is sandboxed; blocks are trimmed; `tojson` escapes neither HTML nor what is not ASCII; `raise_exception` and
`strftime_now` exist; `{% generation %}` blocks are transparent. Compiled once.

vLLM shapes messages before: in most templates a message's content is text, and parts of it are joined by line ends; a
template that loops over the content gets parts, and text becomes one. Which it is, is read off the template.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvfleet_router.core.kvevents.codec import Unusable

MAX_TEMPLATE_CHARS = 1_048_576
_DICT_ATTRIBUTES = frozenset(dir(dict))


class ChatTemplate:
    def __init__(self, source: str, variables: dict[str, Any], *, now: Callable[[], datetime]) -> None:
        """`variables`: the tokenizer's special tokens by name (`bos_token`, …). Raises Unusable."""
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            if len(source) > MAX_TEMPLATE_CHARS:
                raise ValueError(f"it has {len(source)} characters, {MAX_TEMPLATE_CHARS} may be")
            self.wants_parts = _loops_over_content(environment.parse(source))
            """Content is a list of parts to this template, not text."""
            self._template = environment.from_string(source, globals=variables)
        except (jinja2.TemplateError, ValueError, RecursionError) as error:
            raise Unusable("TemplateInvalid", f"the chat template cannot be used: {error}") from None

    def render(self, **variables: Any) -> str:
        """Raises anything a template can raise: the engine refuses such a request, or does something not known here."""
        return self._template.render(variables)


class _Environment(ImmutableSandboxedEnvironment):
    """Looks dictionaries' items up first where no attribute of dictionaries can be meant: with the same result, sooner."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and type(argument) is str and argument in obj:
            return obj[argument]
        return super().getitem(obj, argument)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks what the model says, for training; it prints what is in it."""

    tags = {"generation"}  # noqa: RUF012 - the base class's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _loops_over_content(template: nodes.Template) -> bool:
    """Whether it says `for … in message.content`, perhaps by another name for it."""
    names = {
        assigned.target.name
        for assigned in template.find_all(nodes.Assign)
        if isinstance(assigned.target, nodes.Name) and _is_content(assigned.node)
    }
    return any(
        _is_content(loop.iter) or (isinstance(loop.iter, nodes.Name) and loop.iter.name in names)
        for loop in template.find_all(nodes.For)
    )


def _is_content(node: nodes.Node) -> bool:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"
