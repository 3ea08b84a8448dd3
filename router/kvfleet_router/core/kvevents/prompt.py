"""A request's body -> the bytes of the tokens the engine will make of it.

Chat: messages and tools shaped as vLLM shapes them, then the model's template. Completions: the text, with BOS where the
tokenizer adds it and the request does not forbid it; or the token ids themselves. Whatever does more than that (images, a
template of its own, truncation, several prompts) is NotRendered, with a reason to count; so is what a template refuses, for
the engine will refuse it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson

from kvfleet_router.core.kvevents.codec import Codec
from kvfleet_router.core.kvevents.template import ChatTemplate

_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Types of content parts that are text, and where they hold it."""
_UNKNOWN_EFFECT = ("chat_template", "truncate_prompt_tokens", "mm_processor_kwargs", "prompt_embeds")


MAX_BODY_BYTES = 4 * 1_048_576
"""About a million tokens. Longer ones would keep other requests waiting while they are rendered."""


class NotRendered(Exception):
    """The prompt's bytes cannot be known. `reason`: one of few words, for a metric."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Prompts:
    def __init__(self, codec: Codec, template: ChatTemplate | None, template_kwargs: Mapping[str, Any]) -> None:
        """`template` None: chats are not rendered. `template_kwargs`: what the engine was told to render with by default."""
        self._codec = codec
        self._template = template
        self._defaults = dict(template_kwargs)

    def render(self, kind: str, body: bytes) -> bytes:
        """`kind`: chat or completions. Raises NotRendered and nothing else."""
        if len(body) > MAX_BODY_BYTES:
            raise NotRendered("large")
        try:
            request = orjson.loads(body)
            if any(request.get(name) is not None for name in _UNKNOWN_EFFECT):
                raise NotRendered("option")
            return self._chat(request) if kind == "chat" else self._completion(request)
        except NotRendered:
            raise
        except UnicodeEncodeError:
            raise NotRendered("text") from None
        except Exception:  # templates are programs: they may raise anything
            raise NotRendered("template" if kind == "chat" else "text") from None

    def _completion(self, request: dict[str, Any]) -> bytes:
        prompt = request["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            special = request.get("add_special_tokens")
            return self._codec.prompt_bytes(prompt, add_special_tokens=special is None or bool(special))
        if all(type(token) is int and token >= 0 for token in prompt):
            return self._codec.token_bytes(prompt)
        raise NotRendered("several")

    def _chat(self, request: dict[str, Any]) -> bytes:
        template = self._template
        if template is None:
            raise NotRendered("no_template")
        messages = [_message(message, template.wants_parts) for message in request["messages"]]
        tools = request.get("tools")
        variables = self._defaults | (request.get("chat_template_kwargs") or {})
        goes_on = bool(request.get("continue_final_message"))
        generation = request.get("add_generation_prompt")
        variables.setdefault("add_generation_prompt", True if generation is None else bool(generation))
        if request.get("reasoning_effort") is not None:
            variables["reasoning_effort"] = request["reasoning_effort"]
        text = template.render(
            **variables,
            messages=messages,
            tools=[_tool(tool) for tool in tools] if tools else None,
            documents=request.get("documents"),
        )
        if goes_on:
            text = _up_to_final(text, messages[-1]["content"])
        return self._codec.prompt_bytes(text, add_special_tokens=bool(request.get("add_special_tokens")))


def _message(message: dict[str, Any], wants_parts: bool) -> dict[str, Any]:
    role, content = message["role"], message.get("content")
    if type(content) is str and len(message) == 2 and not wants_parts and role != "developer":
        return {"role": role, "content": content}
    shaped: dict[str, Any] = {"role": role}
    if type(content) is str:
        shaped["content"] = [{"type": "text", "text": content}] if wants_parts and role != "tool" else content
    else:
        texts = [text for text in map(_text, content or []) if text is not None]
        parts = wants_parts and role != "tool"
        shaped["content"] = [{"type": "text", "text": text} for text in texts] if parts else "\n".join(texts)
    if role == "assistant":
        calls = message.get("tool_calls")
        if calls:
            shaped["tool_calls"] = [_call(call) for call in calls]
        reasoning = message.get("reasoning")
        if reasoning is not None:
            shaped["reasoning"] = shaped["reasoning_content"] = reasoning
    elif role == "tool":
        if "tool_call_id" in message:
            shaped["tool_call_id"] = message["tool_call_id"]
    elif role == "developer":
        shaped["tools"] = message.get("tools")
    if type(message.get("name")) is str:
        shaped["name"] = message["name"]
    return shaped


def _text(part: Any) -> str | None:
    """A content part's text; none: skipped, as the engine does."""
    if type(part) is str:
        return part
    field = _TEXT_PARTS.get(part.get("type"))
    if field is None:
        raise NotRendered("media")
    text = part.get(field)
    if text is not None and type(text) is not str:
        raise NotRendered("text")
    return text


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Its arguments parsed; what is no JSON is an empty object."""
    function = dict(call["function"])
    arguments = function.get("arguments")
    if type(arguments) is str:
        try:
            function["arguments"] = json.loads(arguments)
        except ValueError:
            function["arguments"] = {}
    elif not isinstance(arguments, (dict, list)):
        function["arguments"] = {}
    return {**call, "function": function}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """As it comes out of vLLM's model of it: these keys in this order, null where missing, nothing else."""
    function = tool["function"]
    return {
        "type": tool.get("type", "function"),
        "function": {
            "name": function["name"],
            "description": function.get("description"),
            "parameters": function.get("parameters"),
        },
    }


def _up_to_final(text: str, content: str | list[dict[str, str]]) -> str:
    """`continue_final_message`: the text up to the end of the last message."""
    final = content if isinstance(content, str) else next(part["text"] for part in reversed(content) if "text" in part)
    at = text.rindex(final.strip())
    whole = final.lstrip()
    return text[: at + len(whole)] if text.startswith(whole, at) else text[: at + len(final.strip())]
