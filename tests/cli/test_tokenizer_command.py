"""A tokenizer goes into a ConfigMap and comes out of its mount as the same bytes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvfleet_router.io.kvevents.tokenizers import read_view

sys.path.insert(0, str(Path(__file__).parents[1] / "router" / "core"))
from small_tokenizers import byte_level, document


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvfleet", "tokenizer", *args], capture_output=True, text=True, timeout=60
    )


def test_what_a_mount_of_the_printed_config_map_holds_is_the_same_tokenizer(tmp_path: Path) -> None:
    model, mount = tmp_path / "model", tmp_path / "mount"
    model.mkdir()
    mount.mkdir()
    (model / "tokenizer.json").write_text(json.dumps(document(byte_level())))
    (model / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "added_tokens_decoder": {"0": {}}}))
    (model / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    printed = run(str(model), "--name", "t", "-n", "prod")
    assert printed.returncode == 0, printed.stderr
    manifest = json.loads(printed.stdout)
    assert (manifest["kind"], manifest["metadata"]) == ("ConfigMap", {"name": "t", "namespace": "prod"})
    for key, text in manifest["data"].items():
        (mount / key).write_text(text)
    for key, packed in manifest["binaryData"].items():
        (mount / key).write_bytes(base64.b64decode(packed))
    ours, theirs = (read_view("m", directory, {}) for directory in (model, mount))
    assert ours.codec.table == theirs.codec.table
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    assert ours.prompts.render("chat", body) == theirs.prompts.render("chat", body) == b"<s>hi"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), ('{"model": {"type": "Unigram"}}', "TokenizerNotBPE"), ("{", "no JSON")],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    printed = run(str(tmp_path), "--name", "t")
    assert printed.returncode == 2
    assert said in printed.stderr
