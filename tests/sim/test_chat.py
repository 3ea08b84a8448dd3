"""Chats become prompts in the ChatML layout, always the same way."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet_sim.chat import ChatError, render_chat

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "function": {"parameters": {"type": "object"}, "name": "get_time", "strict": True},
    "type": "function",
}


def test_a_chat_without_system_message_gets_the_usual_one() -> None:
    assert render_chat([USER]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_messages_come_in_order() -> None:
    turns = [SYSTEM, USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    assert render_chat(turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_next_turn_begins_with_the_whole_prompt_of_the_last() -> None:
    prompt = render_chat([SYSTEM, USER])
    longer = render_chat([SYSTEM, USER, {"role": "assistant", "content": " said"}, USER])
    assert longer.startswith(prompt + " said<|im_end|>\n")


def test_text_parts_are_joined_by_line_breaks_and_null_is_empty() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}
    assert "<|im_start|>user\na\nb<|im_end|>" in render_chat([parts])
    assert "<|im_start|>user\n<|im_end|>" in render_chat([{"role": "user", "content": None}])


def test_tools_are_reduced_to_their_known_fields_in_a_fixed_order() -> None:
    text = render_chat([SYSTEM, USER], [TOOL])
    line = (
        '{"type": "function", "function": {"name": "get_time", "description": null, "parameters": {"type": "object"}}}'
    )
    assert f"\n<tools>\n{line}\n</tools>" in text
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert text.count("<|im_start|>system") == 1


def test_tool_calls_and_results() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone":"ü"}'}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "12:00"}]
    assert render_chat(turns).endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_time", "arguments": {"zone": "ü"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\n12:00\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_generation_prompt_may_be_left_out_and_a_message_continued() -> None:
    assert render_chat([USER], add_generation_prompt=False).endswith("user\nHi<|im_end|>\n")
    begun = [USER, {"role": "assistant", "content": "Once"}]
    assert render_chat(begun, continue_final_message=True).endswith("<|im_start|>assistant\nOnce")


@pytest.mark.parametrize(
    ("messages", "tools", "words"),
    [
        ([], [], "empty conversation"),
        ([{"role": "user", "content": 5}], [], "content must be"),
        ([{"role": "user", "content": [5]}], [], "content part"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], [], "string `text`"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], [], "text only"),
        ([{"role": "assistant", "tool_calls": "x"}], [], "must be a list"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], [], r"function\.name"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], [], "not JSON"),
        ([USER], [{"function": "f"}], "a tool must have"),
    ],
)
def test_what_cannot_be_rendered_is_refused(messages: list[Any], tools: list[Any], words: str) -> None:
    with pytest.raises(ChatError, match=words):
        render_chat(messages, tools)
