"""What is learned from finished requests: it converges to the truth, and one odd sample moves little."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_router.core.calibration import (
    DEFAULT_BYTES_PER_TOKEN,
    DEFAULT_OUTPUT_TOKENS,
    MAX_TENANTS,
    OUTPUT_EDGES,
    PREFILL_FACTOR_BOUNDS,
    Calibration,
    Deviation,
    OutputLengths,
    TokenRatio,
)


@pytest.mark.parametrize("truth", [0.3, 1.0, 3.0])
def test_the_prefill_factor_finds_the_true_rate(truth):
    calibration = Calibration(7e-3, 9e-5)
    rng = random.Random(1)
    for _ in range(300):
        predicted = rng.uniform(0.01, 1.0)
        calibration.observe_prefill(predicted, predicted * truth * rng.uniform(0.8, 1.2))
    assert calibration.prefill_factor == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize(("w", "h"), [(7e-3, 9e-5), (14e-3, 9e-5), (7e-3, 3e-4), (4e-3, 4e-5)])
def test_decode_coefficients_are_found_from_a_spread_of_batch_sizes(w, h):
    calibration = Calibration(7e-3, 9e-5)
    rng = random.Random(1)
    for _ in range(600):
        n = rng.uniform(1, 128)
        calibration.observe_steps(n, (w + h * n) * rng.uniform(0.95, 1.05))
    for n in (1, 32, 128):
        assert calibration.step_s + calibration.step_s_per_sequence * n == pytest.approx(w + h * n, rel=0.12)
    assert calibration.decode_error < 0.1


@pytest.mark.parametrize("sequences", [1.0, 16.0])
def test_one_batch_size_teaches_the_level_and_leaves_the_slope_alone(sequences):
    calibration = Calibration(7e-3, 9e-5)
    for _ in range(300):
        calibration.observe_steps(sequences, 14e-3)
    level = calibration.step_s + calibration.step_s_per_sequence * sequences
    assert level == pytest.approx(14e-3, rel=0.05)
    assert calibration.step_s_per_sequence == pytest.approx(9e-5)


def test_an_outlier_moves_little():
    calibration = Calibration(7e-3, 9e-5)
    for _ in range(100):
        calibration.observe_steps(10.0, 7.9e-3)
    before = calibration.step_s
    calibration.observe_steps(10.0, 5.0)
    assert calibration.step_s == pytest.approx(before, rel=0.05)


def test_a_worker_is_like_its_pool_until_it_clearly_is_not():
    rng = random.Random(3)
    alike, throttled = Deviation(1.0), Deviation(1.0)
    for _ in range(100):
        alike.observe(0.1, 0.1 * rng.uniform(0.6, 1.4))
        throttled.observe(0.1, 0.2 * rng.uniform(0.6, 1.4))
        assert alike.factor == 1.0
    assert throttled.factor == pytest.approx(2.0, rel=0.1)
    for _ in range(500):
        throttled.observe(0.1, 0.1)
    assert throttled.factor == 1.0


def test_one_odd_request_does_not_make_a_worker_different():
    deviation = Deviation(1.0)
    deviation.observe(0.1, 0.3)
    assert deviation.factor == 1.0


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e5)), max_size=50))
def test_no_sample_drives_an_estimate_out_of_bounds(samples):
    calibration = Calibration(7e-3, 9e-5)
    for predicted, observed, sequences in samples:
        calibration.observe_prefill(predicted, observed)
        calibration.observe_steps(sequences, abs(observed) + 1e-9)
        low, high = PREFILL_FACTOR_BOUNDS
        assert low <= calibration.prefill_factor <= high
        assert 0 < calibration.step_s <= 7.001e-2
        assert 0 < calibration.step_s_per_sequence <= 9.001e-4


def test_bytes_per_token_follows_the_reports():
    ratio = TokenRatio()
    assert ratio.bytes_per_token == DEFAULT_BYTES_PER_TOKEN
    for _ in range(200):
        ratio.observe(2000, 1000)
    assert ratio.bytes_per_token == pytest.approx(2.0, rel=0.05)


def test_output_lengths_are_known_per_tenant_and_capped_by_the_request():
    outputs = OutputLengths()
    assert outputs.expect("", None) == DEFAULT_OUTPUT_TOKENS
    for _ in range(200):
        outputs.observe("chat", 400)
        outputs.observe("labels", 4)
    assert outputs.expect("chat", None) == pytest.approx(400, rel=0.1)
    assert outputs.expect("labels", None) < 40
    assert outputs.expect("someone new", None) == pytest.approx(outputs.mean)
    assert outputs.expect("chat", 16) == 16
    assert outputs.expect("chat", 0) == 1


def test_the_share_of_short_outputs_is_a_distribution_function():
    outputs = OutputLengths()
    rng = random.Random(2)
    for _ in range(3000):
        outputs.observe("", rng.choice([3, 300]))
    assert outputs.share_up_to(2) < 0.05
    assert outputs.share_up_to(4) == pytest.approx(0.5, abs=0.15)
    assert outputs.share_up_to(128) == pytest.approx(0.5, abs=0.15)
    assert outputs.share_up_to(512) > 0.95
    assert outputs.share_up_to(1e9) <= 1.0
    shares = [outputs.share_up_to(tokens / 7) for tokens in range(0, 5000 * 7, 3)]
    assert shares == sorted(shares)
    assert [outputs.share_up_to(edge) for edge in OUTPUT_EDGES] == pytest.approx(outputs.shares)


def test_tenants_are_forgotten_beyond_the_limit():
    outputs = OutputLengths()
    for tenant in range(MAX_TENANTS + 50):
        outputs.observe(str(tenant), 4)
    assert len(outputs._tenants) == MAX_TENANTS
