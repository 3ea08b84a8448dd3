"""The bundled profiles against what was measured, and the fit that made them."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.cost import CostModel
from kvfleet_api.manifests import bundled_profiles
from kvfleet_api.modelpool import ModelSpec
from kvfleet_api.resolve import matching_row, resolve_cost

ROOT = Path(__file__).parents[2]
PROFILES = {profile.metadata.name: profile for profile in bundled_profiles()}

MEASURED = [
    ("nvidia-h100-80gb", "meta-llama/Llama-3.1-8B-Instruct", 1, 389, 8.0, 7.32, 0.455),
    ("nvidia-h100-80gb", "meta-llama/Llama-3.1-8B-Instruct", 1, 396, 63.9, 11.50, 0.119),
    ("nvidia-h100-80gb", "meta-llama/Llama-3.1-8B-Instruct", 1, 404, 255.2, 26.13, 0.077),
    ("nvidia-h100-80gb", "Qwen/Qwen3-14B", 1, 620, 8.0, 12.54, 0.706),
    ("nvidia-h100-80gb", "Qwen/Qwen3-14B", 1, 614, 127.7, 26.16, 0.128),
    ("nvidia-h100-80gb", "Qwen/Qwen3-32B", 2, 631, 8.0, 15.06, 1.627),
    ("nvidia-h100-80gb", "Qwen/Qwen3-32B", 2, 624, 127.8, 29.66, 0.275),
    ("nvidia-b200", "Qwen/Qwen3-32B", 1, 646, 8.0, 14.13, 1.545),
    ("nvidia-b200", "Qwen/Qwen3-32B", 1, 634, 127.8, 24.72, 0.209),
]
"""(profile, model, tensor, output tokens, batch, median inter-token latency ms, J per output token): ML.ENERGY v3, chat
task (ml-energy/leaderboard @0cd52dab, Apache-2.0)."""
PROMPT_TOKENS = 150


@pytest.mark.parametrize(("name", "model", "tensor", "output", "batch", "itl_ms", "joules"), MEASURED)
def test_profiles_reproduce_what_was_measured(
    name: str, model: str, tensor: int, output: float, batch: float, itl_ms: float, joules: float
) -> None:
    cost = resolve_cost(PROFILES[name].spec, ModelSpec(name=model), tensor)
    context = batch * (PROMPT_TOKENS + output / 2)
    assert cost.decode_step_s(batch, context) * 1e3 == pytest.approx(itl_ms, rel=0.08)
    per_token = cost.decode_step_joules(batch, context) / batch + cost.prefill_token_joules * PROMPT_TOKENS / output
    assert per_token == pytest.approx(joules, rel=0.08)


def costs() -> list[tuple[str, AcceleratorProfile, int, CostModel]]:
    return [
        (f"{name} {row.model} x{row.tensor_parallel}", profile, row.tensor_parallel, cost)
        for name, profile in PROFILES.items()
        for row in profile.spec.models
        for model in [ModelSpec(name=row.model.strip("*").replace("*", ".1"))]
        if matching_row(profile.spec, model, row.tensor_parallel) is row
        for cost in [resolve_cost(profile.spec, model, row.tensor_parallel)]
    ]


def test_every_row_can_be_reached() -> None:
    assert len(costs()) == sum(len(profile.spec.models) for profile in PROFILES.values())


@pytest.mark.parametrize(("profile", "tensor", "cost"), [pytest.param(*rest, id=label) for label, *rest in costs()])
def test_no_row_draws_more_than_its_devices_can(profile: AcceleratorProfile, tensor: int, cost: CostModel) -> None:
    limit = profile.spec.power.max_watts * tensor
    for batch in (1, 8, 64, 256):
        for context in (200, 2000):
            watts = cost.decode_step_joules(batch, batch * context) / cost.decode_step_s(batch, batch * context)
            assert cost.idle_watts * 1.5 < watts < 1.15 * limit
    assert cost.prefill_token_joules / cost.prefill_s_per_token < 1.15 * limit


@pytest.mark.parametrize("name", PROFILES)
def test_the_prior_is_close_to_the_rows_it_stands_for(name: str) -> None:
    spec = PROFILES[name].spec
    without = spec.model_copy(update={"models": []})
    for row in spec.models:
        if row.tensor_parallel == 1 and "FP8" not in row.model:
            model = ModelSpec(name=row.model.strip("*").replace("*", ".1"))
            own, prior = resolve_cost(spec, model), resolve_cost(without, model)
            assert prior.step_s == pytest.approx(own.step_s, rel=0.6)
            assert prior.step_joules == pytest.approx(own.step_joules, rel=0.6)
            assert prior.kv_tokens == pytest.approx(own.kv_tokens, rel=0.8)


@pytest.mark.parametrize("name", PROFILES)
def test_every_figure_says_where_it_comes_from(name: str) -> None:
    profile = PROFILES[name]
    assert profile.metadata.annotations["kvfleet.io/idle-watts-source"]
    for row in profile.spec.models:
        assert "fitted" in row.source or "kernels" in row.source
    measured = name in ("nvidia-h100-80gb", "nvidia-b200")
    assert measured or all(
        "power not measured" in row.source or "docs/gpu-energy.md" in row.source for row in profile.spec.models
    )
    assert profile.spec.prior.source


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("profile_fits", ROOT / "bench/profile_fits.py")
    assert spec is not None and spec.loader is not None
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_fit_recovers_coefficients_in_spite_of_outliers(fits: ModuleType) -> None:
    batch = np.array([8.0, 16, 32, 64, 96, 128, 192, 256])
    values = 6.5 + 0.08 * batch
    values[3] *= 3
    coefficients, errors = fits.fit([np.ones_like(batch), batch], values)
    assert coefficients == pytest.approx([6.5, 0.08], rel=1e-3)
    assert errors[3] == pytest.approx(2 / 3, abs=1e-2)


def test_the_fit_gives_no_negative_cost(fits: ModuleType) -> None:
    batch = np.array([1.0, 2, 4, 8])
    coefficients, _ = fits.fit([np.ones_like(batch), batch, batch**2], 5 + 2 * batch - 0.01 * batch**2)
    assert min(coefficients) >= 0
    assert coefficients[0] == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize("key", ["H100", "H200"])
def test_a_measured_device_idles_as_measured(fits: ModuleType, key: str) -> None:
    device = fits.DEVICES[key]
    measured = [one.watts("resident") for one in fits.read_measured(fits.MEASURED / f"{device.name}.json")]
    assert device.idle_watts == round(statistics.median(measured))


def test_a_measured_h100_costs_near_what_its_profile_says(fits: ModuleType) -> None:
    """Steps of one sequence, where E0 is nearly everything and an engine's host nearly nothing."""
    from gpu_energy_fit import bundled

    for one in fits.read_measured(fits.MEASURED / "nvidia-h100-80gb.json"):
        known = bundled(one)
        assert known is not None
        step = next(p for p in one.of("decode") if p["sequences"] == 1 and p["context"] == 1024)
        assert known[0].decode_step_joules(1, 1024) == pytest.approx(step["joules"] / step["steps"], rel=0.15), (
            one.model
        )
        assert known[0].decode_step_s(1, 1024) == pytest.approx(step["seconds"] / step["steps"], rel=0.25), one.model
