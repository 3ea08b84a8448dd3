"""The worker's metrics: vLLM's names, labels and types, and the power metrics of NVIDIA's DCGM exporter.

Latencies are in virtual seconds. Histograms are kept here, because a step gives hundreds of equal observations at once;
prometheus_client writes the exposition. DCGM's is written by hand: its counter has no `_total`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import NAMESPACE_DNS, uuid5

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from kvfleet_sim.config import WorkerConfig
from kvfleet_sim.engine import Engine
from kvfleet_sim.generation import Choice
from kvfleet_sim.request import Request, StepResult

_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKEN_LATENCY = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
_MAX_LORA_LABELS = 256
POWER_WINDOW_S: Final = 1.0
"""DCGM_FI_DEV_POWER_USAGE is the mean over about this time (virtual)."""
_MARK_EVERY_S: Final = POWER_WINDOW_S / 10


def _one_two_five(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, … up to the model's longest request, as vLLM's token histograms have them."""
    return tuple(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power <= most)


@dataclass(frozen=True, slots=True)
class _HistogramSpec:
    name: str
    help: str
    bounds: tuple[float, ...] = ()
    """Empty: one, two, five, … tokens."""


_HISTOGRAMS: Final = (
    _HistogramSpec("request_prompt_tokens", "Number of prefill tokens processed."),
    _HistogramSpec("request_generation_tokens", "Number of generation tokens processed."),
    _HistogramSpec(
        "iteration_tokens_total",
        "Histogram of number of tokens per engine_step.",
        (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    ),
    _HistogramSpec("request_max_num_generation_tokens", "Histogram of maximum number of requested generation tokens."),
    _HistogramSpec("request_params_n", "Histogram of the n request parameter.", (1, 2, 5, 10, 20)),
    _HistogramSpec("request_params_max_tokens", "Histogram of the max_tokens request parameter."),
    _HistogramSpec("time_to_first_token_seconds", "Histogram of time to first token in seconds.", _TTFT),
    _HistogramSpec("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", _TOKEN_LATENCY),
    _HistogramSpec(
        "request_time_per_output_token_seconds",
        "Histogram of time_per_output_token_seconds per request.",
        _TOKEN_LATENCY,
    ),
    _HistogramSpec("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", _LATENCY),
    _HistogramSpec("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", _LATENCY),
    _HistogramSpec("request_inference_time_seconds", "Histogram of time spent in RUNNING phase for request.", _LATENCY),
    _HistogramSpec("request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.", _LATENCY),
    _HistogramSpec("request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", _LATENCY),
    _HistogramSpec(
        "request_num_preemptions", "Histogram of the number of times a request was preempted.", (1, 2, 3, 4, 5, 10, 20)
    ),
    _HistogramSpec(
        "request_prefill_kv_computed_tokens",
        "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
    ),
)


class Histogram:
    """Counts per bucket and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def buckets(self) -> list[tuple[str, float]]:
        total, rows = 0, []
        for bound, count in zip([*map(float, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            rows.append((str(bound), float(total)))
        return rows


class WorkerMetrics:
    """Observes the engine's steps; a collector for prometheus_client."""

    def __init__(self, config: WorkerConfig, engine: Engine) -> None:
        self._config = config
        self._engine = engine
        self._labels = ("0", config.served_names[0])
        tokens = _one_two_five(config.max_model_len)
        self.histograms = {spec.name: Histogram(spec.bounds or tokens) for spec in _HISTOGRAMS}
        self.finished = dict.fromkeys(_FINISHED_REASONS, 0)
        self.lag_s = 0.0
        self._lora_infos: dict[tuple[str, str], float] = {}
        self._note_loras()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def observe_step(self, result: StepResult) -> None:
        """A step has ended."""
        histograms = self.histograms
        histograms["iteration_tokens_total"].observe(result.tokens, result.steps)
        for request in result.preempted:
            _choice(request).last_token_s = result.start_s  # its last token came at the end of the step before
        if result.decode_tokens:
            histograms["inter_token_latency_seconds"].observe(result.duration_s, result.decode_tokens)
        for request in result.prefilled:
            if request.preemptions and request.first_token_s != result.end_s:
                pause_s = result.end_s - _choice(request).last_token_s
                histograms["inter_token_latency_seconds"].observe(pause_s)
            else:
                histograms["time_to_first_token_seconds"].observe(result.end_s - request.arrival_s)
        if self._config.lora:
            self._note_loras()

    def observe_finished(self, request: Request, reason: str) -> None:
        """A request got its last token, and its client is still there."""
        assert request.scheduled_s is not None
        assert request.first_token_s is not None
        assert request.finish_s is not None
        self.finished[reason] += 1
        decode_s = request.finish_s - request.first_token_s
        observations = {
            "request_prompt_tokens": request.prompt_tokens,
            "request_generation_tokens": request.generated,
            "request_max_num_generation_tokens": request.generated,
            "request_params_n": _choice(request).job.params.n,
            "request_params_max_tokens": _choice(request).job.params.max_tokens,
            "request_time_per_output_token_seconds": decode_s / max(1, request.generated - 1),
            "e2e_request_latency_seconds": request.finish_s - request.arrival_s,
            "request_queue_time_seconds": request.scheduled_s - request.arrival_s,
            "request_inference_time_seconds": request.finish_s - request.scheduled_s,
            "request_prefill_time_seconds": request.first_token_s - request.scheduled_s,
            "request_decode_time_seconds": decode_s,
            "request_num_preemptions": request.preemptions,
            "request_prefill_kv_computed_tokens": request.prompt_tokens
            - request.cached_tokens
            - request.received_tokens,
        }
        for name, value in observations.items():
            self.histograms[name].observe(value)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def _note_loras(self) -> None:
        infos = self._lora_infos
        infos[(",".join(self._engine.running_loras), ",".join(self._engine.waiting_loras))] = time.time()
        if len(infos) > _MAX_LORA_LABELS:
            del infos[min(infos, key=lambda key: infos[key])]

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        for spec in _HISTOGRAMS:
            histogram = self.histograms[spec.name]
            family = HistogramMetricFamily(f"vllm:{spec.name}", spec.help, labels=("engine", "model_name"))
            family.add_metric(self._labels, histogram.buckets(), histogram.sum)
            yield family
        yield self._cache_config()
        if self._config.lora:
            yield self._lora_info()

    def _gauges(self) -> Iterator[Metric]:
        engine = self._engine
        waiting, deferred = engine.num_waiting, engine.num_deferred if self._config.lora else 0
        yield self._gauge("num_requests_running", "Number of requests in model execution batches.", engine.num_running)
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", waiting)
        reasons = {"capacity": waiting - deferred, "deferred": deferred}
        yield self._gauge("num_requests_waiting_by_reason", "Number of waiting requests by reason.", reasons, "reason")
        states = {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
        yield self._gauge(
            "engine_sleep_state", "Engine sleep state; awake = 1 means engine is awake.", states, "sleep_state"
        )
        usage = engine.cache.usage
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", usage)
        help_text = "How far the simulation is behind real time (real seconds)."
        yield GaugeMetricFamily("kvfleet_sim_lag_seconds", help_text, value=self.lag_s)
        yield GaugeMetricFamily(
            "kvfleet_sim_speed", "Virtual seconds that pass in a real one.", value=self._config.speed
        )
        yield CounterMetricFamily("kvfleet_sim_virtual_seconds", "End of the last step.", value=engine.clock_s)

    def _counters(self) -> Iterator[Metric]:
        stats = self._engine.stats
        received = stats.prompt_tokens_received
        computed = stats.prompt_tokens - stats.prompt_tokens_cached - received
        yield self._counter("prefix_cache_queries", "Prefix cache queries, in tokens.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prefix cache hits, in tokens.", stats.prefix_hits)
        yield self._counter("num_preemptions", "Cumulative number of preemption from the engine.", stats.preemptions)
        yield self._counter("prompt_tokens", "Number of prefill tokens processed.", stats.prompt_tokens)
        sources = {
            "local_compute": computed,
            "local_cache_hit": stats.prompt_tokens_cached,
            "external_kv_transfer": received,
        }
        yield self._counter("prompt_tokens_by_source", "Number of prompt tokens by source.", sources, "source")
        cached = stats.prompt_tokens_cached + received
        yield self._counter("prompt_tokens_cached", "Number of cached prompt tokens (local + external).", cached)
        device = stats.prompt_tokens_cached
        tiers = {"device": device, "host": 0, "p2p": received, "disk": 0, "external_unspecified": 0}
        help_text = "Prefix-cache hit tokens by the cache tier that supplied them."
        yield self._counter("prompt_tokens_cached_by_source", help_text, tiers, "source")
        help_text = "External prefix cache {} from KV connector cross-instance cache sharing, in tokens."
        yield self._counter("external_prefix_cache_queries", help_text.format("queries"), stats.external_queries)
        yield self._counter("external_prefix_cache_hits", help_text.format("hits"), stats.external_hits)
        generated = stats.generation_tokens
        yield self._counter("generation_tokens", "Number of generation tokens processed.", generated)
        help_text = "Count of successfully processed requests."
        yield self._counter("request_success", help_text, dict(self.finished), "finished_reason")

    def _gauge(self, name: str, help_text: str, value: float | dict[str, int], label: str = "") -> Metric:
        return self._family(GaugeMetricFamily, name, help_text, value, label)

    def _counter(self, name: str, help_text: str, value: float | dict[str, int], label: str = "") -> Metric:
        return self._family(CounterMetricFamily, name, help_text, value, label)

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        help_text: str,
        value: float | dict[str, int],
        label: str,
    ) -> Metric:
        """A family with labels engine and model_name, and `label` where `value` has one number for each of its values."""
        family = kind(f"vllm:{name}", help_text, labels=("engine", "model_name", *([label] if label else [])))
        if isinstance(value, dict):
            for key, number in value.items():
                family.add_metric((*self._labels, key), number)
        else:
            family.add_metric(self._labels, value)
        return family

    def _cache_config(self) -> Metric:
        config = self._config
        blocks = self._engine.cache.blocks
        values = {
            "block_size": config.block_tokens,
            "cache_dtype": "auto",
            "enable_prefix_caching": config.prefix_caching,
            "engine": "0",
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "kv_cache_max_concurrency": blocks * config.block_tokens / config.max_model_len,
            "kv_cache_size_tokens": blocks * config.block_tokens,
            "num_gpu_blocks": blocks,
            "prefix_caching_hash_algo": "xxhash",
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", labels=[*values]
        )
        family.add_metric([str(value) for value in values.values()], 1)
        return family

    def _lora_info(self) -> Metric:
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily("vllm:lora_requests_info", "Running stats on lora requests.", labels=labels)
        for (running, waiting), seen_s in self._lora_infos.items():
            family.add_metric((str(self._config.max_loras), running, waiting), seen_s)
        return family


class PowerMetrics:
    """The worker's accelerators as NVIDIA's DCGM exporter shows them. Energy and power are of virtual time."""

    def __init__(self, config: WorkerConfig, engine: Engine, hostname: str, port: int) -> None:
        self._engine = engine
        self._gpus = config.gpus
        product = config.profile.spec.accelerator.product
        place = {"namespace": config.namespace, "pod": config.pod, "container": config.container}
        self._labels = [
            _labels(
                {
                    "gpu": str(index),
                    "UUID": f"GPU-{uuid5(NAMESPACE_DNS, f'{hostname}/{config.pod}/{port}/{index}')}",
                    "device": f"nvidia{index}",
                    "modelName": product,
                    "Hostname": hostname,
                }
                | {name: value for name, value in place.items() if config.pod}
            )
            for index in range(config.gpus)
        ]
        self._marks: deque[tuple[float, float, float]] = deque(maxlen=64)  # (time, joules, idle seconds)

    def mark(self, now_s: float) -> None:
        """Remember the energy used by now; at the ends of steps, and when work begins or ends."""
        if not self._marks or now_s - self._marks[-1][0] >= _MARK_EVERY_S or not self._engine.has_work:
            self._marks.append((now_s, self._engine.joules_at(now_s), self._engine.idle_s_at(now_s)))

    def exposition(self, now_s: float) -> bytes:
        joules, idle_s = self._engine.joules_at(now_s), self._engine.idle_s_at(now_s)
        since = next((mark for mark in self._marks if mark[0] >= now_s - POWER_WINDOW_S), None)
        since = since or (self._marks[-1] if self._marks else None)
        watts, busy = self._engine.cost.idle_watts, 0.0
        if since is not None and now_s > since[0]:
            watts = (joules - since[1]) / (now_s - since[0])
            busy = 1.0 - (idle_s - since[2]) / (now_s - since[0])
        rows = (
            ("DCGM_FI_DEV_POWER_USAGE", "gauge", "Power draw (in W).", f"{watts / self._gpus:.3f}"),
            (
                "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
                "counter",
                "Total energy consumption since boot (in mJ).",
                f"{joules * 1000 / self._gpus:.0f}",
            ),
            ("DCGM_FI_DEV_GPU_UTIL", "gauge", "GPU utilization (in %).", f"{100 * busy:.0f}"),
        )
        lines = []
        for name, kind, help_text, value in rows:
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{{{labels}}} {value}" for labels in self._labels]
        return ("\n".join(lines) + "\n").encode()


def _labels(values: dict[str, str]) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

    return ",".join(f'{name}="{escaped(value)}"' for name, value in values.items())


def _choice(request: Request) -> Choice:
    assert isinstance(request.payload, Choice)
    return request.payload
