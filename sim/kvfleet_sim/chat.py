"""A chat as prompt text, in the ChatML layout with tools that Qwen's models use. Pure and deterministic.

    <|im_start|>system\n…<|im_end|>\n<|im_start|>user\n…<|im_end|>\n…<|im_start|>assistant\n

As vLLM does before a template sees them: text parts of a message are joined by line breaks, `null` content is empty, the
arguments of a tool call are parsed, tools are reduced to type, name, description and parameters in this order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

DEFAULT_SYSTEM = "You are a helpful assistant."

_TOOLS_HEAD = "\n\n# Tools\n\nThe functions below may be called.\n\n<tools>"
_TOOLS_TAIL = (
    "\n</tools>\n\nCall one by writing a JSON object with its name and arguments:\n"
    '<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'
)

CHAT_TEMPLATE = (
    (
        """\
{%- set first = messages[0].role == 'system' %}
{%- if tools or not first %}
    {{- '<|im_start|>system\\n' + (messages[0].content if first else '"""
        + DEFAULT_SYSTEM
        + """') }}
    {%- if tools %}
        {{- head }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{{ tail }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages[1 if first and tools else 0:] %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'tool' %}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- else %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>\\n' }}
            {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
    )
    .replace("{{- head }}", "{{- " + json.dumps(_TOOLS_HEAD) + " }}")
    .replace("{{ tail }}", "{{ " + json.dumps(_TOOLS_TAIL) + " }}")
)
"""The same as a chat template in Jinja, as models are published with: for whoever has to know prompts beforehand."""


class ChatError(ValueError):
    """A chat that cannot be rendered."""


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    if not messages:
        raise ChatError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    turns = [(str(message.get("role", "")), _content(message)) for message in messages]
    if tools or turns[0][0] != "system":
        system = turns.pop(0)[1] if turns[0][0] == "system" else DEFAULT_SYSTEM
        turns.insert(0, ("system", system + _tools(tools)))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    if continue_final_message:
        return text.removesuffix("<|im_end|>\n")
    return text + "<|im_start|>assistant\n" if add_generation_prompt else text


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    text = "\n".join(_part(part) for part in content) if isinstance(content, list) else content or ""
    if not isinstance(text, str):
        raise ChatError(f"content must be a string, a list of parts or null, not {type(content).__name__}")
    if message.get("role") == "tool":
        return f"<tool_response>\n{text}\n</tool_response>"
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ChatError("tool_calls must be a list")
    return "\n".join([text] * bool(text) + [_call(call) for call in calls]) if calls else text


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ChatError("a content part must be a string or an object with `type`")
    kind = part.get("type", "text")
    text = part.get("text", part.get("refusal"))
    if kind in ("text", "input_text", "output_text", "refusal") and isinstance(text, str):
        return text
    if kind in ("text", "input_text", "output_text", "refusal"):
        raise ChatError(f"a content part of type {kind!r} must have a string `text`")
    raise ChatError(f"content parts of type {kind!r} are not supported: this model takes text only")


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ChatError("a tool call must have function.name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise ChatError(f"arguments of the tool call {function['name']!r} are not JSON") from None
    return f"<tool_call>\n{_json({'name': function['name'], 'arguments': arguments})}\n</tool_call>"


def _tools(tools: Sequence[Mapping[str, Any]]) -> str:
    if not tools:
        return ""
    lines = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatError("a tool must have function.name")
        named = {key: function.get(key) for key in ("name", "description", "parameters")}
        lines.append("\n" + _json({"type": tool.get("type", "function"), "function": named}))
    return _TOOLS_HEAD + "".join(lines) + _TOOLS_TAIL


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
