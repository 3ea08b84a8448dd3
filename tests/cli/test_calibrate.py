"""`kvfleet calibrate`: from a simulated engine it gets back the coefficients that engine was given."""

from dataclasses import fields, replace

import pytest
from typer.testing import CliRunner

from kvfleet.calibrate import BATCHES, LONG_CONTEXT, PROMPTS, SHORT_CONTEXT, base_row, calibrate, profile, write
from kvfleet.calibrate_fit import Decode, Prefill, fit
from kvfleet.inputs import UsageError
from kvfleet.main import app
from kvfleet_api.cost import CostModel
from kvfleet_api.manifests import load
from kvfleet_sim.config import parse
from kvfleet_sim.engine import Engine
from kvfleet_sim.request import Request
from kvfleet_sim.server import Server

COST = CostModel(
    prefill_s_per_token=20.2e-6,
    prefill_s_per_token_pair=0.9e-9,
    step_s=6.4e-3,
    step_s_per_sequence=65e-6,
    step_s_per_context_token=43.7e-9,
    idle_watts=115.0,
    step_joules=3.13,
    token_joules=0.0497,
    context_token_joules=33.3e-6,
    prefill_token_joules=0.0145,
    kv_tokens=1_000_000,
)
ENERGIES = ("step_joules", "token_joules", "context_token_joules", "prefill_token_joules")
TIMES = ("step_s", "step_s_per_sequence", "step_s_per_context_token", "prefill_s_per_token", "prefill_s_per_token_pair")


def prefilled(cost: CostModel, tokens: int) -> Prefill:
    engine = Engine(cost, start_s=0.0)
    engine.submit(Request(0, tokens, 1, []), 0.0)
    engine.advance(float("inf"))
    return Prefill(tokens, engine.clock_s, engine.joules_at(engine.clock_s))


def decoded(cost: CostModel, sequences: int, context: int, steps: int = 300) -> Decode:
    """Steps while all sequences decode, as a client would count them."""
    engine = Engine(cost)
    requests = [Request(n, context, 4000, []) for n in range(sequences)]
    for request in requests:
        engine.submit(request, 0.0)
    while engine.num_decoding < sequences:
        engine.advance(engine.next_event_s() if engine.clock_s == 0 else engine.clock_s + 1e-3)
    start_s, tokens = engine.clock_s, engine.stats.generation_tokens
    held, before = engine.context_tokens, engine.joules_at(engine.clock_s)
    engine.advance(start_s + steps * cost.decode_step_s(sequences, held))
    done = (engine.stats.generation_tokens - tokens) / sequences
    return Decode(
        sequences,
        held + sequences * done / 2,
        done,
        engine.clock_s - start_s,
        engine.joules_at(engine.clock_s) - before,
    )


def fitted(cost: CostModel):
    return fit(
        [prefilled(cost, tokens) for tokens in PROMPTS],
        [decoded(cost, batch, context) for context in (SHORT_CONTEXT, LONG_CONTEXT) for batch in BATCHES],
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_simulated_engines_coefficients_come_back(factor):
    cost = replace(COST, **{name: getattr(COST, name) * factor for name in ("step_s", *ENERGIES)})
    found = fitted(cost)
    for name in (*TIMES, *ENERGIES):
        coefficient = getattr(found, name)
        assert coefficient.value == pytest.approx(getattr(cost, name), rel=0.05), name
        assert coefficient.standard_error < 0.05 * coefficient.value, name
    assert found.step_error < 0.01


def test_without_a_counter_times_are_fitted_and_energy_is_not():
    found = fit([Prefill(256, 0.01), Prefill(1024, 0.03)], [Decode(1, 64, 100, 0.7), Decode(8, 512, 100, 0.8)])
    assert found.step_s.value > 0
    assert found.step_joules is None
    assert found.energy_error is None


def test_one_batch_size_is_not_enough():
    with pytest.raises(ValueError, match="two batch sizes"):
        fit([Prefill(256, 0.01), Prefill(1024, 0.03)], [Decode(1, 64, 100, 0.7)])


def test_no_coefficient_is_below_zero():
    found = fit(
        [Prefill(tokens, 0.01 + tokens * 1e-5) for tokens in PROMPTS],
        [Decode(batch, 64.0 * batch, 100, 0.7 - batch * 1e-4) for batch in BATCHES],
    )
    assert all(getattr(found, field.name).value >= 0 for field in fields(found) if field.name in TIMES)


async def test_over_http_joules_a_step_come_back_and_the_profile_loads(tmp_path):
    """In real time: joules a step do not depend on how busy this machine is, seconds do."""
    server = Server(parse(["llama-8b", "--host", "127.0.0.1", "--port", "0", "--speed", "4"]))
    await server.start()
    url = f"http://127.0.0.1:{server.port}"
    said: list[str] = []
    try:
        runs, found, _ = await calibrate(
            url, seconds=4, max_sequences=4, dcgm_url=f"{url}/dcgm/metrics", pod=None, nvml=[], say=said.append
        )
    finally:
        await server.close()
    base, model = load_h100(), "*Llama-3*-8B*"
    document = profile(
        runs, found, base, name="mine", model=model, tensor=1, kv_tokens=None, conditions="a simulated engine"
    )
    write(document, tmp_path / "mine.yaml")
    (written,) = load([tmp_path / "mine.yaml"]).profiles
    row, truth = written.spec.models[0], base_row(base, model, 1)
    assert row.energy.step_millijoules == pytest.approx(truth["energy"]["stepMillijoules"], rel=0.25)
    assert row.kv_tokens == truth["kvTokens"]
    assert "±" in row.source
    assert len(said) == 1 + len(runs.prefills) + len(runs.decodes)


def load_h100():
    from kvfleet_api.manifests import bundled_profiles

    return next(profile for profile in bundled_profiles() if profile.metadata.name == "nvidia-h100-80gb")


def test_what_is_no_engine_is_said(tmp_path):
    arguments = [
        "calibrate",
        "--url=http://127.0.0.1:9",
        "--profile=nvidia-h100-80gb",
        f"--output={tmp_path / 'x.yaml'}",
    ]
    with pytest.raises(UsageError, match="no model is served there"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    with pytest.raises(UsageError, match="not bundled"):
        CliRunner().invoke(app, [*arguments, "--profile=abacus"], catch_exceptions=False)
