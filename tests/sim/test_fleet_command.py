"""`kvfleet simulate`: figures for people and programs, and for wrong input a sentence that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvfleet.main import UsageError, app

ROOT = Path(__file__).parents[2]
BENCH8 = str(ROOT / "examples" / "bench8")
TRACE = str(next((ROOT / "examples" / "traces").glob("mooncake_synthetic_*.jsonl")))
RESULT_KEYS = {
    "policy", "load", "seed", "completed", "failed", "ttft_mean_ms", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms",
    "itl_p99_ms", "goodput_rps", "slo_attainment", "prefix_hit_ratio", "joules_per_token",
}  # fmt: skip


def simulate(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_json_has_a_row_for_each_policy_load_and_seed(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    output = simulate(
        "-f", BENCH8, "--trace", TRACE, "--limit", "40", "--policy", "lmetric", "--policy", "kvfleet:energy",
        "--load", "0.5", "--load", "0.8", "--seeds", "2", "--capacity", "--json", str(out),
    )  # fmt: skip
    document = json.loads(out.read_text())
    assert [(row["load"], row["policy"], row["seed"]) for row in document["results"]] == [
        (load, policy, seed) for load in (0.5, 0.8) for policy in ("lmetric", "kvfleet:energy") for seed in (0, 1)
    ]
    for row in document["results"]:
        assert row.keys() >= RESULT_KEYS
        assert (row["completed"], row["failed"]) == (40, 0)
        assert row["ttft_p50_ms"] <= row["ttft_p90_ms"] <= row["ttft_p99_ms"]
        assert 0 <= row["prefix_hit_ratio"] < 1
        assert row["rate_rps"] == pytest.approx(row["load"] * document["saturation_rps"])
    assert {(row["policy"], row["seed"]) for row in document["capacity"]} == {
        (policy, seed) for policy in ("lmetric", "kvfleet:energy") for seed in (0, 1)
    }
    assert all(row["rps"] > 0 for row in document["capacity"])
    assert document["workers"] == 8
    for word in ("kvfleet:energy", "J/tok", "SLO capacity"):
        assert word in output


def test_processes_change_nothing(tmp_path: Path) -> None:
    documents = []
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.json"
        simulate(
            "-f", BENCH8, "--trace", "shared-prefix", "--limit", "200", "--policy", "kvfleet", "--load", "0.7",
            "--seeds", "2", "--workers", "2", "--jobs", jobs, "--json", str(out),
        )  # fmt: skip
        documents.append(json.loads(out.read_text()))
    assert documents[0] == documents[1]
    assert documents[0]["workers"] == 2


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plot_is_drawn(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"plot{suffix}"
    simulate(
        "-f", BENCH8, "--trace", TRACE, "--limit", "30", "--policy", "lmetric", "--policy", "random", "--plot", str(out)
    )
    assert out.read_bytes()[:4] == (b"\x89PNG" if suffix == ".png" else b"<?xm")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace", "/nonexistent"], "give the path of a trace, or one of shared-prefix"),
        (["--trace", BENCH8 + "/fleet.yaml"], "unknown format"),
        (["--trace", TRACE, "--policy", "roundrobin"], "use one of .*round_robin"),
        (["--trace", TRACE, "--load", "0"], "--load 0: give a share of the saturation rate, above 0 and at most 4"),
        (["--trace", TRACE, "--load", "80"], "--load 80"),
        (["--trace", TRACE, "--model", "qwen"], "--model qwen: no ModelPool serves it: use one of llama-8b"),
        (["--trace", TRACE, "--json", "/nonexistent/out.json"], "--json .* is not a directory"),
        (["--trace", TRACE, "--plot", "out.bmp"], "--plot out.bmp: give a name that ends in .png"),
        (["--trace", TRACE, "--plot", "/nonexistent/out.png"], "--plot .* is not a directory"),
    ],
)
def test_wrong_input_says_what_to_do(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        CliRunner().invoke(app, ["simulate", "-f", BENCH8, *arguments], catch_exceptions=False)


def test_a_fleet_of_several_models_needs_one_named(tmp_path: Path) -> None:
    pools = [
        f"apiVersion: kvfleet.io/v1alpha1\nkind: ModelPool\nmetadata: {{name: {name}}}\n"
        f"spec: {{model: {{name: {name}, uri: meta-llama/Llama-3.1-8B-Instruct}}, accelerator: {{profileRef: nvidia-h100-80gb}}}}\n"
        for name in ("a", "b")
    ]
    path = tmp_path / "fleet.yaml"
    path.write_text("---\n".join(pools))
    with pytest.raises(UsageError, match="--model: the fleet serves a, b, a trace names none: choose one"):
        CliRunner().invoke(app, ["simulate", "-f", str(path), "--trace", TRACE], catch_exceptions=False)
    out = tmp_path / "out.json"
    simulate("-f", str(path), "--trace", TRACE, "--model", "b", "--limit", "20", "--load", "0.5", "--json", str(out))
    assert json.loads(out.read_text())["workers"] == 1
