"""Metrics: vLLM's families with vLLM's labels and buckets, DCGM's power and energy, and figures that add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sim_client import OpenStream, call, complete, parse_answer, request_bytes, send_raw, serving, until

from kvfleet_sim.server import Server

RECORDED = (Path(__file__).parent / "recordings" / "metrics.txt").read_text()
NOT_MODELLED = {
    "vllm:admission_rejections",
    "vllm:estimated_flops_per_gpu",
    "vllm:estimated_read_bytes_per_gpu",
    "vllm:estimated_write_bytes_per_gpu",
    "vllm:mm_cache_hits",
    "vllm:mm_cache_queries",
    "vllm:tool_call_parser_invocations",
}
ARGS = ("llama-8b", "--served-model-name", "tiny", "alias", "--max-model-len", "1024", "--max-num-seqs", "4")


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


async def scrape(server: Server, path: str = "/metrics") -> dict[str, Any]:
    answer = await call(server, "GET", path)
    assert answer.status == 200
    return families(answer.body.decode())


def value(found: dict[str, Any], name: str, **labels: str) -> float:
    """The one sample of this name that has these labels."""
    values = [
        float(sample.value)
        for family in found.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(values) == 1, f"{name}{labels}: {values}"
    return values[0]


def buckets(family: Any) -> list[str]:
    return [sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")]


async def test_families_types_labels_and_buckets_are_the_recorded_ones() -> None:
    recorded = families(RECORDED)
    async with serving(*ARGS) as server:
        await complete(server, "abc", 5, model="alias")
        mine = await scrape(server)
    assert set(recorded) - set(mine) == NOT_MODELLED
    for name in set(recorded) & set(mine):
        assert mine[name].type == recorded[name].type, name
        theirs = {tuple(sorted(sample.labels)) for sample in recorded[name].samples}
        ours = {tuple(sorted(sample.labels)) for sample in mine[name].samples}
        if name == "vllm:cache_config_info":
            assert set(*ours) <= set(*theirs)
            continue
        assert ours == theirs, name
        assert buckets(mine[name]) == buckets(recorded[name]), name
    labels = {sample.labels["model_name"] for sample in mine["vllm:num_requests_running"].samples}
    assert labels == {"tiny"}, "the first served name, whatever name was asked for"


async def test_load_and_histograms_tell_what_happened() -> None:
    async with serving(*ARGS, "--enable-server-load-tracking", speed=20.0) as server:
        streams = [await OpenStream.start(server, {"prompt": [number] * 32, "max_tokens": 300}) for number in range(6)]
        await until(lambda: server.worker.engine.num_decoding == 4)
        busy = await scrape(server)
        load = (await call(server, "GET", "/load")).json
        for stream in streams:
            await stream.read_all()
        after = await scrape(server)
        again = await complete(server, [0] * 33, 1)
        hit = await scrape(server)
        cost = server.config.cost
    assert again.status == 200
    assert value(busy, "vllm:num_requests_running") == 4
    assert value(busy, "vllm:num_requests_waiting") == 2
    assert value(busy, "vllm:num_requests_waiting_by_reason", reason="capacity") == 2
    assert 0 < value(busy, "vllm:kv_cache_usage_perc") < 0.01
    assert load == {"server_load": 6}
    assert value(after, "vllm:num_requests_running") == 0
    assert value(after, "vllm:request_success_total", finished_reason="length") == 6
    assert value(after, "vllm:generation_tokens_total") == 1800
    assert value(after, "vllm:prompt_tokens_total") == 192
    assert value(after, "vllm:time_to_first_token_seconds_count") == 6
    assert value(after, "vllm:inter_token_latency_seconds_count") == 1794
    mean_s = value(after, "vllm:inter_token_latency_seconds_sum") / 1794
    assert cost.decode_step_s(1, 32) <= mean_s <= 1.3 * cost.decode_step_s(4, 4 * 332)
    e2e, queue, inference, prefill, decode = (
        value(after, f"vllm:{name}_seconds_sum")
        for name in (
            "e2e_request_latency",
            "request_queue_time",
            "request_inference_time",
            "request_prefill_time",
            "request_decode_time",
        )
    )
    assert e2e == pytest.approx(queue + inference)
    assert inference == pytest.approx(prefill + decode)
    assert queue > 300 * cost.step_s, "two of them waited for the others"
    assert value(hit, "vllm:prefix_cache_queries_total") == 192 + 33
    assert value(hit, "vllm:prefix_cache_hits_total") == 32
    assert value(hit, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 32
    assert value(hit, "vllm:cache_config_info", block_size="16") == 1


async def test_adapters_running_and_waiting_are_told_by_the_newest_value() -> None:
    args = (*ARGS, "--enable-lora", "--lora-modules", "a=x", "b=y", "--max-loras", "1")
    async with serving(*args, speed=20.0) as server:
        idle = await scrape(server)
        first = await OpenStream.start(server, {"model": "a", "prompt": "p", "max_tokens": 300})
        second = await OpenStream.start(server, {"model": "b", "prompt": "p", "max_tokens": 10})
        await first.read_until(b"data:")
        await until(lambda: server.worker.engine.num_deferred == 1)
        await first.read_until(b"data: ")
        steps = server.worker.engine.meter.decode_steps
        await until(lambda: server.worker.engine.meter.decode_steps > steps + 2)
        busy = await scrape(server)
        await first.read_all()
        await second.read_all()
    assert newest_loras(idle) == ("1", "", "")
    assert newest_loras(busy) == ("1", "a", "b")
    assert value(busy, "vllm:num_requests_waiting_by_reason", reason="deferred") == 1


def newest_loras(found: dict[str, Any]) -> tuple[str, str, str]:
    newest = max(found["vllm:lora_requests_info"].samples, key=lambda sample: float(sample.value))
    return tuple(newest.labels.values())


async def test_energy_adds_up_to_the_work_done_and_the_time_idled() -> None:
    async with serving(*ARGS, "-tp", "2", "--pod", "llama-0", "--namespace", "inference", speed=20.0) as server:
        before = await scrape(server, "/dcgm/metrics")
        await complete(server, "a" * 400, 200)
        now_s = server.worker.now_s
        raw = (await call(server, "GET", "/dcgm/metrics")).body.decode()
        after = families(raw)
        engine = server.worker.engine
        joules = engine.joules_at(now_s)
    name = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"
    assert f"# TYPE {name} counter\n{name}{{gpu=" in raw
    counter = f"{name}_total"  # so the parser calls it; on the wire there is no suffix
    per_gpu = [value(after, counter, gpu=gpu) / 1000 for gpu in ("0", "1")]
    assert per_gpu[0] == per_gpu[1]
    idle_watts = engine.cost.idle_watts
    assert sum(per_gpu) == pytest.approx(joules, abs=idle_watts * 20.0 * 0.2), "the counter is read a little later"
    assert sum(per_gpu) > value(before, counter, gpu="0") / 500
    work = engine.meter.busy_joules()
    assert work == pytest.approx(
        100 * engine.cost.prefill_token_joules
        + max(0.0, engine.cost.step_joules - 100 * engine.cost.prefill_token_joules)
        + 199 * engine.cost.decode_step_joules(1, 101 + 198 / 2)
    )
    (sample,) = (sample for sample in after[name].samples if sample.labels["gpu"] == "1")
    assert sample.labels["pod"] == "llama-0"
    assert sample.labels["namespace"] == "inference"
    assert sample.labels["modelName"] == "NVIDIA-H100-80GB-HBM3"
    assert len({sample.labels["UUID"] for sample in after[name].samples}) == 2


async def test_power_is_the_mean_of_the_last_second() -> None:
    async with serving(*ARGS, speed=5.0) as server:
        idle = await scrape(server, "/dcgm/metrics")
        stream = await OpenStream.start(server, {"prompt": "a", "max_tokens": 1000})
        engine = server.worker.engine
        await until(lambda: engine.meter.decode_steps * engine.cost.step_s > 1.5)
        busy = await scrape(server, "/dcgm/metrics")
        await stream.read_all()
        end_s = engine.clock_s
        await until(lambda: server.worker.now_s > end_s + 1.2)
        idle_again = await scrape(server, "/dcgm/metrics")
        cost = engine.cost
    watts = cost.decode_step_joules(1, 200) / cost.decode_step_s(1, 200)
    assert value(idle, "DCGM_FI_DEV_POWER_USAGE") == pytest.approx(cost.idle_watts)
    assert value(idle, "DCGM_FI_DEV_GPU_UTIL") == 0
    assert value(busy, "DCGM_FI_DEV_POWER_USAGE") == pytest.approx(watts, rel=0.02)
    assert value(busy, "DCGM_FI_DEV_GPU_UTIL") == 100
    assert value(idle_again, "DCGM_FI_DEV_POWER_USAGE") == pytest.approx(cost.idle_watts)


async def test_the_dcgm_port_serves_the_same_metrics_alone() -> None:
    async with serving(*ARGS, "--dcgm-port", "0") as server:
        assert server.dcgm_port is not None
        answer = parse_answer(await send_raw(server.dcgm_port, request_bytes("GET", "/metrics")))
        assert "DCGM_FI_DEV_POWER_USAGE" in families(answer.body.decode())
        other = parse_answer(await send_raw(server.dcgm_port, request_bytes("GET", "/v1/models")))
        assert other.status == 404


async def test_label_values_are_escaped() -> None:
    async with serving(*ARGS, "--pod", 'a"b\\c\nd') as server:
        found = await scrape(server, "/dcgm/metrics")
    (sample,) = found["DCGM_FI_DEV_POWER_USAGE"].samples
    assert sample.labels["pod"] == 'a"b\\c\nd'
