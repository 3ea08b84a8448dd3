"""`kvfleet tokenizer`: a model's tokenizer as a ConfigMap that routers can mount."""

from __future__ import annotations

import base64
import gzip
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfleet.inputs import UsageError

MAX_CONFIG_MAP_BYTES = 1_048_576 - 16_384
"""What the API server takes, less room for names."""


def tokenizer(
    directory: Annotated[Path, typer.Argument(help="Directory with the model's tokenizer.json, as it is published.")],
    name: Annotated[str, typer.Option(help="Name of the ConfigMap.")],
    namespace: Annotated[
        str, typer.Option("-n", "--namespace", help="Its namespace: that of the ModelPool.")
    ] = "default",
) -> None:
    """Print a ConfigMap with what a router needs of a model's tokenizer, for ModelPool `spec.model.tokenizer.configMapRef`.

    The vocabulary is packed, and merges are left out: the router does not tokenise. It is first checked that the tokenizer can be
    followed by bytes at all.

    Examples: `kvfleet tokenizer /models/llama-8b --name llama-8b-tokenizer | kubectl apply -f -`
    """
    from kvfleet_router.core.kvevents.codec import Unusable
    from kvfleet_router.io.kvevents.tokenizers import CONFIG, PACKED, TEMPLATE, TOKENIZER, read_view

    try:
        read_view(name, directory, {})
    except Unusable as error:
        raise UsageError(f"{directory}: {error} ({error.reason})") from error
    document = _document(directory / TOKENIZER)
    if document is None:
        raise UsageError(f"{directory / TOKENIZER}: no such file: give the directory the model was published in")
    document["model"].pop("merges", None)
    packed = gzip.compress(json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(), 9, mtime=0)
    data: dict[str, str] = {}
    config = _document(directory / CONFIG)
    if config is not None:
        config.pop("added_tokens_decoder", None)
        data[CONFIG] = json.dumps(config, ensure_ascii=False)
    if (directory / TEMPLATE).is_file():
        data[TEMPLATE] = (directory / TEMPLATE).read_text()
    size = len(packed) + sum(len(key) + len(value.encode()) for key, value in data.items())
    if size > MAX_CONFIG_MAP_BYTES:
        raise UsageError(
            f"{directory}: packed it has {size} bytes, a ConfigMap takes {MAX_CONFIG_MAP_BYTES}: "
            "put it on a volume of the router and set spec.model.tokenizer.path"
        )
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace},
        "binaryData": {PACKED: base64.b64encode(packed).decode()},
    } | ({"data": data} if data else {})
    json.dump(manifest, sys.stdout, ensure_ascii=False, indent=1)
    sys.stdout.write("\n")


def _document(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    document = json.loads(path.read_text())
    return document if isinstance(document, dict) else None
