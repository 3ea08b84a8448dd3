"""Resolving a profile and a model to the cost of one worker."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_api.acceleratorprofile import AcceleratorProfileSpec
from kvfleet_api.modelpool import ModelSpec
from kvfleet_api.resolve import (
    CostError,
    ModelSize,
    argument,
    bytes_per_parameter,
    glob_matches,
    integer_argument,
    model_size,
    resolve_cost,
)


def row(model: str, step_us: int, tensor: int = 1) -> dict[str, Any]:
    return {
        "model": model,
        "tensorParallel": tensor,
        "step": {"fixedMicroseconds": step_us, "perSequenceNanoseconds": 80_000, "perContextTokenPicoseconds": 50_000},
        "prefill": {"perTokenNanoseconds": 20_000, "perTokenPairFemtoseconds": 900_000},
        "energy": {
            "stepMillijoules": 3000,
            "tokenMicrojoules": 60_000,
            "contextTokenNanojoules": 30_000,
            "prefillTokenMicrojoules": 15_000,
        },
        "kvTokens": 400_000,
    }


def profile(*rows: dict[str, Any], product: str = "NVIDIA-H100-80GB-HBM3", memory: int = 80) -> AcceleratorProfileSpec:
    prior = {
        "stepMicrosecondsPerWeightGB": 400,
        "stepNanosecondsPerSequence": 70_000,
        "prefillNanosecondsPerBillionParameters": 2500,
        "stepMillijoulesPerWeightGB": 200,
        "tokenMicrojoulesPerBillionParameters": 5000,
        "prefillTokenMicrojoulesPerBillionParameters": 2000,
        "kvBytesPerTokenPerBillionParameters": 10_000,
    }
    return AcceleratorProfileSpec.model_validate(
        {
            "accelerator": {"product": product, "memoryGiB": memory},
            "power": {"idleWatts": 100, "maxWatts": 700},
            "models": list(rows),
            "prior": prior,
        }
    )


def model(name: str, **fields: Any) -> ModelSpec:
    return ModelSpec.model_validate({"name": name, **fields})


def test_a_row_in_si_units() -> None:
    cost = resolve_cost(profile(row("*llama-3.1-8b*", 6500)), model("chat", uri="meta-llama/Llama-3.1-8B-Instruct"))
    assert cost.decode_step_s(10, 1000) == pytest.approx(6.5e-3 + 10 * 80e-6 + 1000 * 50e-9)
    assert cost.prefill_s(1000, 1000) == pytest.approx(1000 * 20e-6 + 1000 * 500 * 0.9e-9)
    assert cost.decode_step_joules(10, 1000) == pytest.approx(3 + 0.6 + 0.03)
    assert (cost.prefill_token_joules, cost.kv_tokens, cost.idle_watts) == (pytest.approx(0.015), 400_000, 100)


def test_the_first_matching_row_of_the_same_tensor_parallelism_wins() -> None:
    rows = profile(
        row("*-8B*", 1000, tensor=2), row("org/special-8B", 2000), row("*-8B*", 3000), row("chat", 4000, tensor=4)
    )
    assert resolve_cost(rows, model("org/special-8b")).step_s == pytest.approx(2e-3)
    assert resolve_cost(rows, model("other-8b")).step_s == pytest.approx(3e-3)
    assert resolve_cost(rows, model("other-8b"), tensor=2).step_s == pytest.approx(1e-3)
    assert resolve_cost(rows, model("chat", uri="org/some-8b"), tensor=4).step_s == pytest.approx(4e-3)  # by name


def test_a_wildcard_does_not_take_a_quantised_model_for_the_full_one() -> None:
    rows = profile(row("*-8B*", 1000), row("*-8B*FP8*", 2000), row("tuned-8b-awq", 3000))
    assert resolve_cost(rows, model("x-8b")).step_s == pytest.approx(1e-3)
    assert resolve_cost(rows, model("x-8b-fp8")).step_s == pytest.approx(2e-3)
    assert resolve_cost(rows, model("tuned-8b-awq")).step_s == pytest.approx(3e-3)
    assert resolve_cost(rows, model("x-8b"), args=["--quantization", "awq"]).step_s == pytest.approx(400e-6 * 8 * 0.5)


def test_the_prior_scales_with_size_precision_and_devices() -> None:
    bf16 = resolve_cost(profile(), model("x-8b"))
    assert bf16.step_s == pytest.approx(400e-6 * 16)
    assert bf16.step_joules == pytest.approx(0.2 * 16)
    assert (bf16.token_joules, bf16.prefill_token_joules) == (pytest.approx(0.04), pytest.approx(0.016))
    assert bf16.prefill_s_per_token == pytest.approx(20e-6)
    assert resolve_cost(profile(), model("x-8b-fp8")).step_s == pytest.approx(bf16.step_s / 2)
    split = resolve_cost(profile(), model("x-8b"), tensor=2)
    assert (split.step_s, split.prefill_s_per_token) == (
        pytest.approx(bf16.step_s / 2),
        pytest.approx(bf16.prefill_s_per_token / 2),
    )
    assert (split.step_joules, split.idle_watts) == (pytest.approx(bf16.step_joules), 200)


def test_a_mixture_reads_all_experts_but_computes_with_the_active() -> None:
    cost = resolve_cost(profile(), model("x-30b-a3b"))
    assert cost.step_s == pytest.approx(400e-6 * 60)
    assert cost.prefill_s_per_token == pytest.approx(2500e-9 * 3)
    assert cost.token_joules == pytest.approx(5e-3 * 3)


def test_pipeline_stages_share_sequences_and_repeat_the_weights() -> None:
    alone, piped = (resolve_cost(profile(row("m", 1000)), model("m"), 1, stages) for stages in (1, 2))
    assert piped.step_s == alone.step_s
    assert piped.step_s_per_sequence == pytest.approx(alone.step_s_per_sequence / 2)
    assert piped.prefill_s_per_token == pytest.approx(alone.prefill_s_per_token / 2)
    assert piped.step_joules == pytest.approx(alone.step_joules * 2)
    assert (piped.kv_tokens, piped.idle_watts) == (alone.kv_tokens * 2, 200)


def test_engine_arguments_and_the_engines_own_defaults() -> None:
    args = ["--max-num-seqs", "64", "--max-num-batched-tokens=4k"]
    cost = resolve_cost(profile(), model("x-8b"), args=args)
    assert (cost.max_sequences, cost.max_step_tokens) == (64, 4000)
    large, a100, small = profile(), profile(product="NVIDIA-A100-SXM4-80GB"), profile(memory=45)
    limits = [resolve_cost(p, model("x-8b")) for p in (large, a100, small)]
    assert [(c.max_sequences, c.max_step_tokens) for c in limits] == [(1024, 8192), (256, 2048), (256, 2048)]


def test_without_row_and_size_the_field_that_settles_it_is_named() -> None:
    with pytest.raises(CostError, match="its name tells no size: set parametersMillions") as caught:
        resolve_cost(profile(), model("mystery"))
    assert caught.value.field == "model.parametersMillions"
    assert resolve_cost(profile(), model("mystery", parametersMillions=8000)).step_s == pytest.approx(400e-6 * 16)


def test_a_model_that_does_not_fit_names_the_parallelism() -> None:
    with pytest.raises(
        CostError, match=r"the weights take about 140 GB, but 1 device\(s\) of 80 GiB leave 74 GB"
    ) as caught:
        resolve_cost(profile(), model("x-70b"))
    assert caught.value.field == "parallelism.tensor"
    assert resolve_cost(profile(), model("x-70b"), tensor=2).kv_tokens > 0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", ModelSize(8, 8)),
        ("Qwen3-0.6B", ModelSize(0.6, 0.6)),
        ("SmolLM2-135M", ModelSize(0.135, 0.135)),
        ("mistralai/Mixtral-8x7B-v0.1", ModelSize(56, 14)),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", ModelSize(30, 3)),
        ("gpt-oss-120b", ModelSize(120, 120)),
        ("model-4bit", None),
        ("Llama-3.1-8B-4bit", ModelSize(8, 8)),
        ("phi-4", None),
        ("x-0b", None),
        ("0x7b", None),
    ],
)
def test_size_is_read_from_the_name(name: str, size: ModelSize | None) -> None:
    assert model_size(model(name)) == size


def test_stated_size_wins_but_the_active_share_is_kept() -> None:
    assert model_size(model("x-30b-a3b", parametersMillions=30_500)) == ModelSize(30.5, 3)
    assert model_size(model("x-8b", parametersMillions=8030)) == ModelSize(8.03, 8.03)
    assert model_size(model("x-30b-a3b", parametersMillions=2000)) == ModelSize(2, 2)


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("x-8b", (), 2.0),
        ("x-8B-FP8", (), 1.0),
        ("x-AWQ", (), 0.5),
        ("x", ("-q", "fp8"), 1.0),
        ("x", ("--quantization=awq",), 0.5),
    ],
)
def test_precision(name: str, args: tuple[str, ...], size: float) -> None:
    assert bytes_per_parameter(name, args) == size


def test_arguments_as_the_engine_reads_them() -> None:
    args = ["serve", "--max-num-seqs", "8", "--max_num_seqs=16", "--flag", "--port"]
    assert argument(args, "max-num-seqs") == "16"
    assert argument(args, "port") is None
    assert argument(args, "serve") is None
    texts = {
        "7": 7,
        "1.5k": 1500,
        "2K": 2048,
        "1m": 10**6,
        "auto": None,
        "-1": None,
        "0": None,
        "": None,
        "9" * 30: None,
    }
    assert {text: integer_argument([f"--n={text}"], "n") for text in texts} == texts


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("*8b*", "Llama-8B-Instruct", True),
        ("llama", "LLAMA", True),
        ("llama", "llama-8b", False),
        ("a*a", "a", False),
        ("a*a", "aa", True),
        ("*", "", True),
        ("*x*y*", "axbyc", True),
        ("*y*x*", "axbyc", False),
        ("models/llama", "models/llama/", True),
        ("[a]", "a", False),
        ("a?c", "abc", False),
    ],
)
def test_glob(pattern: str, text: str, matches: bool) -> None:
    assert glob_matches(pattern, text) is matches


@settings(derandomize=True, database=None, deadline=None)
@given(st.lists(st.text("ab", max_size=3), min_size=1, max_size=6), st.data())
def test_glob_matches_whatever_fills_its_stars(parts: list[str], data: st.DataObject) -> None:
    text = parts[0] + "".join(data.draw(st.text("ab", max_size=3)) + part for part in parts[1:])
    assert glob_matches("*".join(parts), text)


def test_glob_with_many_stars_takes_no_time() -> None:
    assert not glob_matches("a*" * 100 + "b", "a" * 1000)
