"""Arguments of `vllm serve` become the simulated worker's configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kvfleet_api.manifests import bundled_profiles
from kvfleet_api.modelpool import ModelSpec
from kvfleet_api.resolve import resolve_cost
from kvfleet_sim.config import ConfigError, KvEventsConfig, parse

H100 = next(profile for profile in bundled_profiles() if profile.metadata.name == "nvidia-h100-80gb")


def test_the_arguments_a_pool_renders_are_understood() -> None:
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:5557"}
    config = parse(
        [
            "meta-llama/Llama-3.1-8B-Instruct",
            *("--served-model-name", "llama-8b", "alias", "--port", "8000", "--max-model-len=32k"),
            *("--tensor-parallel-size", "1", "--kv-events-config", json.dumps(events), "--enable-lora"),
            *("--lora-modules", "sql=/adapters/sql", '{"name": "chat", "path": "org/chat"}', "--max-loras", "4"),
            *("--shutdown-timeout", "120", "--api-key", "a", "b", "--no-enable-prefix-caching"),
        ]
    )
    assert config.served_names == ("llama-8b", "alias")
    assert config.max_model_len == 32_000
    assert config.kv_events == KvEventsConfig(endpoint="tcp://*:5557")
    assert [(adapter.name, adapter.path) for adapter in config.adapters] == [
        ("sql", "/adapters/sql"),
        ("chat", "org/chat"),
    ]
    assert (config.max_loras, config.shutdown_timeout_s, config.api_keys) == (4, 120, ("a", "b"))
    assert not config.prefix_caching


def test_the_cost_is_the_profiles_for_this_model() -> None:
    config = parse(["meta-llama/Llama-3.1-8B-Instruct", "--served-model-name", "llama-8b"])
    assert config.cost == resolve_cost(H100.spec, ModelSpec(name="m", uri="meta-llama/Llama-3.1-8B-Instruct"))
    named_only = parse(["/models/x", "--served-model-name", "qwen3-14b-8b"])
    assert named_only.cost == resolve_cost(H100.spec, ModelSpec(name="qwen3-14b-8b")), "the size is in the served name"
    unknown = parse(["/models/x"])
    assert unknown.cost == config.cost, "a model that tells no size costs what the default model costs"


def test_parallelism_and_limits_change_the_cost() -> None:
    config = parse(["Qwen/Qwen3-32B", "-tp", "2", "-pp", "2", "--max_num_seqs", "64", "--max-num-batched-tokens=4k"])
    expected = resolve_cost(H100.spec, ModelSpec(name="m", uri="Qwen/Qwen3-32B"), tensor=2, pipeline=2)
    assert config.gpus == 4
    assert config.cost.step_s == expected.step_s
    assert config.cost.idle_watts == expected.idle_watts == 4 * H100.spec.power.idle_watts
    assert (config.cost.max_sequences, config.cost.max_step_tokens) == (64, 4000)


def test_the_kv_cache_size_may_be_set() -> None:
    assert parse(["llama-8b", "--kv-tokens", "50000"]).kv_blocks == 3125
    by_blocks = parse(["llama-8b", "--num-gpu-blocks-override", "129", "--block-size", "32"])
    assert by_blocks.kv_blocks == 129
    assert by_blocks.max_model_len == 128 * 32, "the default fits what the cache holds"


def test_a_profile_may_be_a_file(tmp_path: Path) -> None:
    spec = H100.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    spec["power"]["idleWatts"] = 77
    head = {"apiVersion": "kvfleet.io/v1alpha1", "kind": "AcceleratorProfile", "metadata": {"name": "mine"}}
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({**head, "spec": spec}))
    assert parse(["llama-8b", "--profile", str(path)]).cost.idle_watts == 77
    path.write_text("kind: [")
    with pytest.raises(ConfigError, match="profile"):
        parse(["llama-8b", "--profile", str(path)])


def test_a_model_too_large_for_the_accelerator_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise tensor or pipeline"):
        parse(["some/model-400B"])


def test_events_are_off_unless_enabled() -> None:
    assert parse(["llama-8b"]).kv_events is None
    assert parse(["llama-8b", "--kv-events-config", '{"publisher": "zmq"}']).kv_events is None
    null = '{"enable_kv_cache_events": true, "publisher": "null"}'
    assert parse(["llama-8b", "--kv-events-config", null]).kv_events is None


def test_tools_need_both_of_their_arguments() -> None:
    assert not parse(["llama-8b", "--enable-auto-tool-choice"]).auto_tool_choice
    assert parse(["llama-8b", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]).auto_tool_choice


def test_arguments_without_effect_are_named() -> None:
    config = parse(["llama-8b", "--enforce-eager", "--dtype", "bfloat16", "--disable-log-requests"])
    assert config.ignored == ("--enforce-eager", "--dtype", "bfloat16", "--disable-log-requests")


def test_the_api_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert parse(["llama-8b"]).api_keys == ("secret",)
    assert parse(["llama-8b", "--api-key", "other"]).api_keys == ("other",)
