"""`kvfleet simulate --autoscale` and `--park-seconds`: the operator's own decisions in virtual time."""

from __future__ import annotations

import re
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from kvfleet.inputs import UsageError
from kvfleet.main import app
from kvfleet.simulate_autoscale import Scaler
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
