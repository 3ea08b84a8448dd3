"""Reads tests/router/recordings, and makes a tokenizer.json of the recorded token bytes."""

from __future__ import annotations

import base64
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from kvfleet_router.core.kvevents.codec import Codec
from kvfleet_router.core.kvevents.prompt import Prompts
from kvfleet_router.core.kvevents.stream import Counts
from kvfleet_router.core.kvevents.template import ChatTemplate
from kvfleet_router.core.kvevents.view import Engine, ModelView

RECORDINGS = Path(__file__).parent.parent / "recordings"
BLOCK_TOKENS = 32
BOS = {"id": "<s>", "type_id": 0}
ALPHABET = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in ALPHABET]
CHARACTER = {byte: chr(byte) for byte in ALPHABET} | {byte: chr(0x100 + place) for place, byte in enumerate(OTHERS)}


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECORDINGS / name).read_text().split("\n") if line]


def payloads(name: str) -> list[tuple[int, bytes]]:
    """(number, payload) of each batch."""
    return [(line["seq"], base64.b64decode(line["payload"])) for line in lines(name) if "seq" in line]


def tokenizer_of_recording(*, nfc: bool = False) -> dict[str, Any]:
    """A byte-level tokenizer.json that gives the recorded tokens their recorded bytes."""
    table = {
        int(number): base64.b64decode(data)
        for number, data in json.loads((RECORDINGS / "token_bytes.json").read_text()).items()
    }
    special = {
        number: data.decode() for number, data in table.items() if data in (b"<s>", b"<|im_start|>", b"<|im_end|>")
    }
    vocabulary = {
        "".join(CHARACTER[byte] for byte in data): number for number, data in table.items() if number not in special
    }
    bos = next(number for number, text in special.items() if text == "<s>")
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        "added_tokens": [{"id": number, "content": text, "special": True} for number, text in special.items()],
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": BOS}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
        },
    }


def recorded_view(*, nfc: bool = False) -> ModelView:
    codec = Codec(tokenizer_of_recording(nfc=nfc))
    template = ChatTemplate((RECORDINGS / "chatml_tools.jinja").read_text(), {}, now=lambda: datetime(2026, 11, 22))
    return ModelView("tiny", codec, Prompts(codec, template, {}))


def engine_of(view: ModelView, *, bit: int = 1, rank: int = 0, can_replay: bool = False) -> Engine:
    return Engine(view, rank, bit, 100_000, Counts(), can_replay=can_replay)


def view_of_ids() -> ModelView:
    """Tokens as ids: each is four bytes, as their number says."""
    codec = Codec(tokenizer_of_recording())
    codec.table = [number.to_bytes(4, "little") for number in range(200_000)]
    return ModelView("tiny", codec, Prompts(codec, None, {}))
