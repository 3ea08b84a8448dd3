"""The Jinja template of the simulated model says what its renderer says."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from kvfleet_router.core.kvevents.codec import Codec
from kvfleet_router.core.kvevents.prompt import Prompts
from kvfleet_router.core.kvevents.template import ChatTemplate
from kvfleet_sim.chat import CHAT_TEMPLATE, render_chat

TOOL = {"type": "function", "function": {"name": "look", "description": "d <&> é", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"city": "東京"}'}}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": "Where is it?"}


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER],
        [SYSTEM, USER, {"role": "assistant", "content": "There."}, USER],
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "far"},
            USER,
        ],
        [USER, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}, {"role": "tool", "content": "far"}],
        [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
    ],
)
@pytest.mark.parametrize("tools", [[], [TOOL, TOOL]])
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}])
def test_template_and_renderer_agree(messages: list[Any], tools: list[Any], options: dict[str, bool]) -> None:
    vocabulary = {"Ġ": 0}
    codec = Codec({"model": {"type": "BPE", "vocab": vocabulary}, "pre_tokenizer": {"type": "ByteLevel"}})
    prompts = Prompts(codec, ChatTemplate(CHAT_TEMPLATE, {}, now=datetime.now), {})
    body = {"messages": messages, **options} | ({"tools": tools} if tools else {})
    rendered = prompts.render("chat", json.dumps(body).encode()).decode()
    assert rendered == render_chat(messages, tools, **options)
