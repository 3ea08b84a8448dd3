"""`kvfleet simulate --autoscale` and `--park-seconds`: the operator's own decisions in virtual time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from kvfleet.inputs import UsageError
from kvfleet.main import app
from kvfleet.simulate_autoscale import Scaler, simulated
from kvfleet_api.modelpool import AutoscalingSpec
from kvfleet_sim.elastic import PoolView
from kvfleet_sim.workload import open_load

ROOT = Path(__file__).parents[2]


def view(**changes: object) -> PoolView:
    values = {
        "name": "a", "ready": 4, "starting": 0, "total": 8, "in_flight": 0, "packed": changes.get("in_flight", 0), "held": 0, "served": 10,
        "pack_target": 20, "predicted_ttft_s": 0.1, "load": 0.1, "idle_s": (), **changes,
    }  # fmt: skip
    return PoolView(**values)  # type: ignore[arg-type]


def test_the_pack_target_sizes_the_fleet():
    scaler = Scaler(8, ttft_slo_s=1.0, target=None, startup_s=60.0)
    assert scaler.wanted([view(in_flight=90, packed=110)], 0.0) == {"a": 7}, "80 % of 20 sequences a worker"


def test_a_slow_first_token_adds_workers_that_concurrency_would_not():
    scaler = Scaler(8, ttft_slo_s=1.0, target=None, startup_s=60.0)
    assert scaler.wanted([view(in_flight=20, predicted_ttft_s=1.2)], 0.0) == {"a": 7}
    hpa = Scaler(8, ttft_slo_s=1.0, target=20.0, startup_s=60.0)
    assert hpa.wanted([view(in_flight=80, packed=110, predicted_ttft_s=1.2)], 0.0) == {"a": 4}


def spec(**fields: object) -> AutoscalingSpec:
    return AutoscalingSpec.model_validate({"maxReplicas": 8, **fields})


@pytest.mark.parametrize(
    ("signal", "wanted"),
    [
        ({"concurrency": {"targetPercentOfPackTarget": 65}}, 8),
        ({"concurrency": {"targetPerReplica": 18}}, 5),
        ({"timeToFirstToken": {"targetPercentOfSlo": 100}}, 6),
        ({"queueDepth": {"targetPerReplica": 2}}, 7),
    ],
)
def test_a_pools_own_signals_size_it(signal, wanted):
    now = view(in_flight=76, packed=100, held=14, predicted_ttft_s=1.5)
    scaler = Scaler(8, ttft_slo_s=1.0, target=None, startup_s=60.0, specs={"a": spec(signals=[signal])})
    assert scaler.wanted([now], 0.0) == {"a": wanted}
    assert scaler.wanted([replace(now, name="b")], 0.0) == {"b": 8}, "another pool has its own"


def test_what_cannot_be_simulated_is_refused_or_left_out():
    given = spec(minReplicas=0, maxReplicas=20, scaleToZero={}, schedule=[
        {"start": "0 8 * * *", "durationMinutes": 60, "minReplicas": 3}
    ])  # fmt: skip
    followed = simulated({"a": given}, 6)["a"]
    assert (followed.min_replicas, followed.max_replicas) == (1, 6)
    assert (followed.scale_to_zero, followed.schedule) == (None, [])
    with pytest.raises(ValueError, match=r"ModelPool a: spec.autoscaling.signals\[1\]: kvUsage and prometheus are not"):
        simulated({"a": spec(signals=[{"concurrency": {}}, {"kvUsage": {}}])}, 6)


def test_the_command_follows_the_manifests(tmp_path):
    manifest = (ROOT / "examples" / "bench8" / "fleet.yaml").read_text()
    (tmp_path / "fleet.yaml").write_text(manifest.replace("  replicas: 8\n", "  autoscaling: {maxReplicas: 3}\n"))
    arguments = ["simulate", "-f", str(tmp_path / "fleet.yaml"), "--trace", str(rates(tmp_path / "r-trace.csv"))]
    arguments += ["--autoscale", "--hours=0.1", "--load=0.02", "--hpa-target=16"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "3 workers at most" in result.output


def test_a_fleet_shrinks_after_its_window_only_and_never_to_nothing():
    scaler = Scaler(8, ttft_slo_s=1.0, target=None, startup_s=60.0)
    wanted = [scaler.wanted([view(in_flight=0)], now_s)["a"] for now_s in range(0, 330, 15)]
    assert wanted[:20] == [4] * 20
    assert wanted[-1] == 1


def rates(path: Path) -> Path:
    """One client, every ten minutes another rate: busy, then quiet."""
    path.write_text("".join(f"{600 * n},{10.0 if n < 1 else 1.0},1.0,,0,0\n" for n in range(3)))
    return path


def test_the_command_compares_fleets_over_the_same_requests(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["simulate", "-f", str(ROOT / "examples" / "bench8"), "--trace", str(rates(tmp_path / "r-trace.csv"))]
    result = CliRunner().invoke(
        app,
        [*arguments, "--workers=2", "--autoscale", "--hours=0.5", "--load=0.02", "--hpa-target=16", f"--json={out}"],
    )
    assert result.exit_code == 0, result.output
    rows = {row["fleet"]: row for row in orjson.loads(out.read_bytes())["results"]}
    assert list(rows) == ["fixed", "hpa-16", "kvfleet", "kvfleet:energy"]
    assert rows["fixed"]["starts"] == 0
    assert rows["kvfleet"]["worker_hours"] < 0.9 * rows["fixed"]["worker_hours"]
    assert all(row["failed"] == 0 for row in rows.values())
    assert re.search(r"kvfleet:energy .* -\d+% ", result.output)


def test_longer_answers_are_fewer_requests_for_the_same_load(tmp_path):
    arguments = ["simulate", "-f", str(ROOT / "examples" / "bench8"), "--trace", str(rates(tmp_path / "r-trace.csv"))]
    arguments += ["--workers=1", "--autoscale", "--hours=0.1", "--load=0.05", "--hpa-target=16"]
    told = [
        CliRunner().invoke(app, [*arguments, f"--answer-tokens={tokens}"], catch_exceptions=False).output
        for tokens in (250, 2000)
    ]
    few, many = (int(re.search(r"at most, (\d+) requests", text)[1]) for text in reversed(told))
    assert 20 < few < many / 2


def test_the_requests_of_a_day_are_drawn_once_for_all_fleets(tmp_path):
    load = open_load(str(rates(tmp_path / "r-trace.csv")), 100)
    assert load.requests(1.0, 0) is load.requests(1.0, 0)
    assert load.requests(2.0, 0) != load.requests(1.0, 0) != load.requests(1.0, 1)


def test_a_trace_without_rates_is_refused():
    with pytest.raises(UsageError, match="needs a trace of rates"):
        CliRunner().invoke(
            app,
            [
                "simulate",
                "-f",
                str(ROOT / "examples" / "bench8"),
                "--trace",
                "shared-prefix",
                "--limit=50",
                "--autoscale",
            ],
            catch_exceptions=False,
        )
