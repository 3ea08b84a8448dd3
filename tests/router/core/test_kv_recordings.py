"""The recordings of a real vLLM, replayed: what the byte index expects against what the engine reported."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from recorded_events import BLOCK_TOKENS, engine_of, lines, payloads, recorded_view, view_of_ids

from kvfleet_router.core.kvevents.view import Engine, ModelView, Prompt
from kvfleet_router.core.kvevents.wire import Cleared, Removed, Stored, decode

FIRST = list(range(2000, 2100))


def cached(view: ModelView, prompt: Prompt, ranks: int = 1) -> float:
    found = view.expected(prompt, ranks).tokens
    return sum(tokens for mask, tokens in found if mask & 1)


def ids(view: ModelView, tokens: list[int], lora: str | None = None, salt: str | None = None) -> Prompt:
    return Prompt(view.codec.token_bytes(tokens), lora, salt)


def feed(engine: Engine, batches: list[tuple[int, bytes]]) -> None:
    for sequence, payload in batches:
        engine.stream.heard(sequence, payload)


def ask(view: ModelView, line: dict[str, Any]) -> Prompt:
    prompt = view.prompt(line["kind"], "tiny", None, json.dumps(line["body"]).encode())
    assert prompt is not None, view.not_rendered
    return prompt


def test_all_nineteen_requests_are_rendered_byte_for_byte() -> None:
    view = recorded_view()
    for line in lines("bytes_check_bbpe.jsonl"):
        assert ask(view, line).data.decode() == line["rendered"], line["case"]


@pytest.mark.parametrize(("name", "nfc", "requests"), [("bbpe", False, 19), ("nfc", True, 16)])
def test_what_is_expected_before_each_request_is_what_the_engine_reported(name: str, nfc: bool, requests: int) -> None:
    view = recorded_view(nfc=nfc)
    engine = engine_of(view)
    recorded = lines(f"bytes_check_{name}.jsonl")
    assert len(recorded) == requests
    for line in recorded:
        prompt = ask(view, line)
        assert cached(view, prompt) == line["cached_tokens"], line["case"]
        feed(engine, [(number, base64.b64decode(payload)) for number, payload in line["batches"]])
        afterwards = cached(view, Prompt(prompt.data + b" and more", None, None))
        assert afterwards == line["full_blocks"] * BLOCK_TOKENS, line["case"]
    assert view.malformed == 0
    assert engine.cache.orphans == 0
    assert engine.stream.complete  # its first batch says that everything was cleared


def test_without_the_normalizers_transform_decomposed_text_is_not_found() -> None:
    line = next(line for line in lines("bytes_check_nfc.jsonl") if line["case"] == "decomposed (NFD) text")
    for transformed, blocks in ((True, line["full_blocks"]), (False, 0)):
        view = recorded_view(nfc=True)
        feed(engine_of(view), [(number, base64.b64decode(payload)) for number, payload in line["batches"]])
        view.codec.nfc = transformed
        assert cached(view, ask(view, line)) == blocks * BLOCK_TOKENS


def test_the_steps_of_the_long_recording() -> None:
    """Stores, a recomputed last block, blocks filled while decoding, salts, evictions, a clear told late."""
    view = view_of_ids()
    engine = engine_of(view)
    seen: dict[str, float] = {}
    step = ""
    asked = {
        "same prompt again": ids(view, FIRST),
        "100 + 64": ids(view, FIRST[:96] + list(range(3000, 3068))),
        "prompt of exactly 96": ids(view, FIRST[:96]),
        "cache_salt=tenant-a:": ids(view, FIRST, salt="tenant-a"),
        "cache_salt=tenant-a again": ids(view, FIRST, salt="tenant-a"),
        "first prompt again after": ids(view, FIRST),
    }
    for line in lines("kv_events_all.jsonl"):
        if "step" in line:
            step = line["step"]
            for name, prompt in asked.items():
                if step.startswith(name):
                    seen[name] = cached(view, prompt)
        else:
            engine.stream.heard(line["seq"], base64.b64decode(line["payload"]))
    assert seen == {
        "same prompt again": 96,
        "100 + 64": 96,
        "prompt of exactly 96": 64,
        "cache_salt=tenant-a:": 0,
        "cache_salt=tenant-a again": 96,
        "first prompt again after": 0,
    }
    assert view.malformed == engine.cache.orphans == 0
    assert len(engine.cache) <= 129


def test_one_removal_does_not_end_a_block_stored_twice() -> None:
    view = view_of_ids()
    engine = engine_of(view)
    batches = payloads("kv_events_duplicate.jsonl")
    doubled = next(event for event in decode(batches[1][1]).events if isinstance(event, Stored)).block_hashes[0]
    feed(engine, batches)
    removed = [event for _, payload in batches for event in decode(payload).events if isinstance(event, Removed)]
    assert [event.block_hashes for event in removed] == [[doubled]]
    first = next(event for event in decode(batches[0][1]).events if isinstance(event, Stored)).token_ids
    assert cached(view, ids(view, [*first, 1, 2])) == 96
    engine.cache.removed(removed[0])
    assert cached(view, ids(view, [*first, 1, 2])) == 64


def test_adapters_and_salts_have_trees_of_their_own() -> None:
    view = view_of_ids()
    feed(engine_of(view), payloads("kv_events_lora.jsonl"))
    for lora, salt, expected in (
        (None, None, 96),
        ("ad-a", None, 96),
        ("pre", None, 96),
        ("ad-a", "s1", 96),
        ("pre", "s1", 0),
        (None, "s1", 0),
        ("other", None, 0),
    ):
        assert cached(view, ids(view, FIRST, lora, salt)) == expected, (lora, salt)


def test_a_request_meets_either_of_two_ranks() -> None:
    """Each has its own publisher and numbers; a prompt that one of two holds counts half."""
    view = view_of_ids()
    engines = [engine_of(view, rank=rank) for rank in range(2)]
    tokens: dict[int, list[int]] = {}
    for line in lines("kv_events_dp2.jsonl"):
        payload = base64.b64decode(line["payload"])
        engines[line["rank"]].stream.heard(line["seq"], payload)
        (event,) = decode(payload).events
        assert isinstance(event, Stored)
        tokens[line["rank"]] = event.token_ids
    assert all(engine.stream.complete and engine.stream.next == 3 for engine in engines)
    for rank in range(2):
        assert cached(view, ids(view, [*tokens[rank], 0, 0]), ranks=2) == 32.0


def test_a_clear_is_told_with_the_next_batch_before_what_it_stores() -> None:
    number, payload = payloads("kv_events_all.jsonl")[0]
    assert number == 22
    assert [type(event) for event in decode(payload).events] == [Cleared, Stored]


def test_the_sentencepiece_batches_are_read() -> None:
    events = [event for _, payload in payloads("kv_events_spm.jsonl") for event in decode(payload).events]
    assert [len(event.block_hashes) for event in events if isinstance(event, Stored)] == [3, 2, 3, 3]
