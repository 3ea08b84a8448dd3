"""A model's chat template, rendered as the engine renders it (transformers' rules for Jinja, vLLM's for messages).

The environment is sandboxed; blocks are trimmed; `tojson` escapes neither HTML nor what is not ASCII; `raise_exception` and
`strftime_now` exist; `{% generation %}` blocks are transparent. Compiled once.

vLLM shapes messages before: in most templates a message's content is text, and parts of it are joined by line ends; a
template that loops over the content gets parts, and text becomes one. Which it is, is read off the template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
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


class _InPlace(CodeGenerator):
    """Writes look-ups of items by constant names where they are used, in place of calls: `message.role` becomes
    `message['role']` wherever message is a dictionary that has it. Most of what a template does is that."""

    def visit_Getattr(self, node: nodes.Getattr, frame: Frame) -> None:
        if node.attr in _DICT_ATTRIBUTES:
            super().visit_Getattr(node, frame)
        else:
            self._look_up(node.node, node.attr, "getattr", frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Const) and type(node.arg.value) is str:
            self._look_up(node.node, node.arg.value, "getitem", frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Or(self, node: nodes.BinExpr, frame: Frame) -> None:
        """`message.tool_calls or []`: what is not there need not be made an Undefined to be false."""
        owner, name = _owner_and_name(node.left)
        if owner is None:
            super().visit_Or(node, frame)
            return
        held = self.temporary_identifier()
        kind = "getattr" if isinstance(node.left, nodes.Getattr) else "getitem"
        self.write(f"(({held}.get({name!r}) if type({held} := ")
        self.visit(owner, frame)
        self.write(f") is dict else environment.{kind}({held}, {name!r})) or ")
        self.visit(node.right, frame)
        self.write(")")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """Plain loops: without a `loop` where only loops inside use theirs, and without making one to go over nothing."""
        if node.recursive or node.test or node.else_ or any(node.find_all((nodes.Block, nodes.Macro, nodes.CallBlock))):
            super().visit_For(node, frame)
            return
        if any(name.ctx == "store" and name.name == "loop" for name in node.find_all(nodes.Name)):
            super().visit_For(node, frame)  # refuses it
            return
        inner = frame.inner()
        inner.loop_frame = True
        loop = inner.symbols.declare_parameter("loop") if _use_loop(node.body) else None
        inner.symbols.analyze_node(node, for_branch="body")
        if loop:
            self.writeline(f"{loop} = missing")
        self.writeline("for ", node)
        self.visit(node.target, inner)
        if loop:
            held = self.temporary_identifier()
            self.write(f", {loop} in (() if type({held} := ")
            self.visit(node.iter, frame)
            self.write(f") is list and not {held} else LoopContext({held}, undefined)):")
        else:
            self.write(" in ")
            self.visit(node.iter, frame)
            self.write(":")
        self.indent()
        self.enter_frame(inner)
        self.writeline("_loop_vars = {}")
        self.blockvisit(node.body, inner)
        self.outdent()
        self.leave_frame(inner)
        if self._assign_stack:
            self._assign_stack[-1].difference_update(inner.symbols.stores)

    def _look_up(self, owner: nodes.Node, name: str, otherwise: str, frame: Frame) -> None:
        held = self.temporary_identifier()
        self.write(f"({held}[{name!r}] if type({held} := ")
        self.visit(owner, frame)
        self.write(f") is dict and {name!r} in {held} else environment.{otherwise}({held}, {name!r}))")


def _use_loop(body: Iterable[nodes.Node]) -> bool:
    """Whether `loop` is meant in a loop's body: in that of a loop inside, it is the inner one's."""
    for node in body:
        if isinstance(node, nodes.Name) and node.name == "loop":
            return True
        inside = node.iter_child_nodes(exclude=("body",) if isinstance(node, nodes.For) else None)
        if _use_loop(inside):
            return True
    return False


def _owner_and_name(node: nodes.Node) -> tuple[nodes.Node | None, str]:
    """Of a look-up that, in a dictionary, can only mean an item; none: it is something else."""
    if isinstance(node, nodes.Getattr):
        owner, name = node.node, node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and type(node.arg.value) is str:
        owner, name = node.node, node.arg.value
    else:
        return None, ""
    return (None, "") if name in _DICT_ATTRIBUTES else (owner, name)


class _Environment(ImmutableSandboxedEnvironment):
    """Looks dictionaries' items up where no attribute of dictionaries can be meant: with the same result, sooner."""

    code_generator_class = _InPlace

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and type(argument) is str:
            if argument in obj:
                return obj[argument]
            if argument not in _DICT_ATTRIBUTES:
                return self.undefined(obj=obj, name=argument)
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
