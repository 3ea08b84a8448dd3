"""A model's tokenizer and chat template, read from a directory as models are published:

    tokenizer.json           or tokenizer.json.gz; its merges are not needed
    tokenizer_config.json    special tokens, and the template where no file of its own has it
    chat_template.jinja      the template; without any, only completions are known

Reading a large one takes a second: do it in a thread. Raises Unusable, and nothing else.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from kvfleet_router.core.kvevents.codec import Codec, Unusable
from kvfleet_router.core.kvevents.prompt import Prompts
from kvfleet_router.core.kvevents.template import ChatTemplate
from kvfleet_router.core.kvevents.view import ModelView
from kvfleet_router.io.files import read_bounded

MAX_TOKENIZER_BYTES = 256 * 1_048_576
MAX_CONFIG_BYTES = 16 * 1_048_576
TOKENIZER, PACKED, CONFIG, TEMPLATE = (
    "tokenizer.json",
    "tokenizer.json.gz",
    "tokenizer_config.json",
    "chat_template.jinja",
)
FILES = (TOKENIZER, PACKED, CONFIG, TEMPLATE)


def read_view(model: str, directory: Path, template_kwargs: Mapping[str, Any]) -> ModelView:
    """The view of a model whose files lie in `directory` (a tokenizer.json itself will do)."""
    if directory.is_file():
        directory = directory.parent
    codec = Codec(_tokenizer(directory))
    config = _document(directory / CONFIG) or {}
    if not isinstance(config, dict):
        raise Unusable("TokenizerInvalid", f"{directory / CONFIG} is no object")
    source = _template(directory, config)
    template = None
    if source is not None:
        template = ChatTemplate(source, _special_tokens(config), now=datetime.now)
    return ModelView(model, codec, Prompts(codec, template, template_kwargs))


def _tokenizer(directory: Path) -> Any:
    path = directory / TOKENIZER
    document = _document(path, MAX_TOKENIZER_BYTES)
    if document is not None:
        return document
    packed = directory / PACKED
    data = _content(packed, MAX_TOKENIZER_BYTES)
    if data is None:
        raise Unusable("TokenizerNotFound", f"{path}: no such file: put the model's tokenizer files there")
    try:
        with gzip.open(packed) as stream:
            data = stream.read(MAX_TOKENIZER_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Unusable("TokenizerInvalid", f"{packed} is no gzip file: {error}") from None
    if len(data) > MAX_TOKENIZER_BYTES:
        raise Unusable("TokenizerInvalid", f"{packed} unpacks to more than {MAX_TOKENIZER_BYTES} bytes")
    return _parsed(packed, data)


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    data = _content(directory / TEMPLATE, MAX_CONFIG_BYTES)
    if data is not None:
        return data.decode("utf-8", "replace")
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name: the engine takes this one
        source = next(
            (one.get("template") for one in source if isinstance(one, dict) and one.get("name") == "default"), None
        )
    return source if isinstance(source, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """`bos_token` and its like, as text."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _document(path: Path, limit: int = MAX_CONFIG_BYTES) -> Any:
    data = _content(path, limit)
    return None if data is None else _parsed(path, data)


def _parsed(path: Path, data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Unusable("TokenizerInvalid", f"{path} is no JSON: {error}") from None


def _content(path: Path, limit: int) -> bytes | None:
    try:
        return read_bounded(path, limit)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except OSError as error:
        raise Unusable("TokenizerNotFound", f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Unusable("TokenizerInvalid", str(error)) from None
