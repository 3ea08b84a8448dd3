"""What the router counts, and how it is shown to Prometheus.

While requests run only plain integers and floats in slots are touched; names, labels and text exist at the scrape alone
(`RouterMetrics.collect`). Times are those of the clock the dispatcher uses. The series of one (model, pool, policy) are kept
together and found by one look-up per request; a client cannot create more than MAX_SERIES of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from kvfleet_router.core.dispatcher import Dispatcher
from kvfleet_router.core.learning import STREAM_OVERHEAD_CHUNKS
from kvfleet_router.io.loaded import Loaded
from kvfleet_router.io.usage import Usage

if TYPE_CHECKING:
    from kvfleet_router.core.ticket import Ticket
    from kvfleet_router.io.exchange import Exchange
    from kvfleet_router.io.tracing import Tracer

PREFIX = "kvfleet_router_"
MAX_SERIES = 1024
OTHER_MODELS = "(other)"
"""The model label once MAX_SERIES is reached."""

WORKER_STATES = ("ready", "not_ready", "terminating", "ejected")

TTFT_BUCKETS_S = (
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.25,
    0.5,
    0.75,
    1,
    1.5,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
ITL_BUCKETS_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
E2E_BUCKETS_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
DECISION_BUCKETS_S = (5e-6, 1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4, 6.4e-4, 1.28e-3, 5e-3, 2e-2, 1e-1)
CACHED_BUCKETS_TOKENS = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)
ERROR_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


Labels = tuple[str, str, str]
"""(model, pool, policy)"""


class Histogram:
    """Counts per bucket and the sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, count so far), as the exposition wants them."""
        pairs, running = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            pairs.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(running)))
        return pairs


class Series:
    """All that is counted for one (model, pool, policy)."""

    __slots__ = (
        "cached_predicted",
        "cached_reported",
        "e2e",
        "error",
        "itl",
        "outcomes",
        "output_tokens",
        "prompt_tokens",
        "ttft",
    )

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.ttft = Histogram(TTFT_BUCKETS_S)
        self.itl = Histogram(ITL_BUCKETS_S)
        self.e2e = Histogram(E2E_BUCKETS_S)
        self.error = Histogram(ERROR_BUCKETS_S)
        self.prompt_tokens = 0.0
        self.cached_predicted = 0.0
        self.cached_reported = 0
        self.output_tokens = 0


class RouterMetrics:
    """Counted by the exchanges, read by the scrape. A prometheus Collector in all but name: mypyc compiles no subclasses."""

    def __init__(self, dispatcher: Dispatcher, loaded: Loaded) -> None:
        self._dispatcher = dispatcher
        self._loaded = loaded
        self._series: dict[Labels, Series] = {}
        self.decision = Histogram(DECISION_BUCKETS_S)
        self.retries: dict[tuple[str, str], int] = {}
        """By (pool, cause)."""
        self.prefills: dict[tuple[str, str], int] = {}
        """By (pool, result)."""
        self.errors: dict[str, int] = {}
        """By cause."""
        self.cached_difference: dict[tuple[str, str, str], Histogram] = {}
        """By (pool, what the prediction came from, whether it was above or below what the engine reported)."""
        self.tracer: Tracer | None = None
        """Told of every request's end, where traces are wanted."""
        self.extra: list[Callable[[], Iterable[Metric]]] = []
        """Further families, asked at each scrape."""

    # The exchanges call

    def answered(self, exchange: Exchange, ticket: Ticket, outcome: str, usage: Usage, now: float) -> None:
        """An answer went out whole."""
        series = self._of(ticket)
        series.outcomes[outcome] = series.outcomes.get(outcome, 0) + 1
        series.e2e.observe(now - exchange.started_at)
        prompt_tokens = usage.prompt
        series.prompt_tokens += ticket.prompt_tokens if prompt_tokens is None else prompt_tokens
        if not ticket.arrival.received_tokens:  # else the tokens came along
            series.cached_predicted += ticket.cached_tokens
        if usage.cached is not None:
            series.cached_reported += usage.cached
            if not ticket.arrival.received_tokens:
                self._compare_cached(ticket, usage.cached)
        tokens = usage.output
        if tokens is None:
            tokens = max(ticket.chunks - STREAM_OVERHEAD_CHUNKS, 0)
        series.output_tokens += tokens
        charge = exchange.request.charge
        if charge is not None:
            charge.settle(ticket.prompt_tokens if prompt_tokens is None else prompt_tokens, tokens)
        if self.tracer is not None:
            self.tracer.ended(exchange, outcome, usage=usage)
        if ticket.parsed.stream and outcome == "ok":
            first_byte_at = exchange.first_byte_at
            series.ttft.observe(first_byte_at - exchange.started_at)
            series.error.observe(abs(first_byte_at - ticket.sent_at - ticket.predicted_ttft_s))
            steps = tokens // ticket.parsed.sequences - 1
            if steps > 0:
                series.itl.observe((now - first_byte_at) / steps)

    def _compare_cached(self, ticket: Ticket, reported: int) -> None:
        difference = ticket.cached_tokens - reported
        key = (
            ticket.worker.pool,
            "precise" if ticket.precise else "approximate",
            "above" if difference > 0 else "below",
        )
        histogram = self.cached_difference.get(key)
        if histogram is None:
            histogram = self.cached_difference[key] = Histogram(CACHED_BUCKETS_TOKENS)
        histogram.observe(abs(difference))

    def ended(self, exchange: Exchange, outcome: str, cause: str) -> None:
        """A request got no whole answer from a worker: refused, failed, or its client went away."""
        series = self._of(exchange.ticket)
        series.outcomes[outcome] = series.outcomes.get(outcome, 0) + 1
        if outcome == "refused":
            self.error(cause)
        if self.tracer is not None:
            self.tracer.ended(exchange, outcome, cause)
        charge, ticket = exchange.request.charge, exchange.ticket
        if charge is not None:
            began = ticket is not None and ticket.first_token_at is not None
            charge.settle(ticket.prompt_tokens if ticket and began else 0.0, ticket.chunks if ticket and began else 0.0)

    def retried(self, ticket: Ticket, cause: str) -> None:
        key = (ticket.worker.pool, cause)
        self.retries[key] = self.retries.get(key, 0) + 1

    def handed_on(self, ticket: Ticket, handed: bool) -> None:
        """A Prefill worker answered."""
        key = (ticket.worker.pool, "handed_on" if handed else "nothing_handed")
        self.prefills[key] = self.prefills.get(key, 0) + 1

    def error(self, cause: str) -> None:
        self.errors[cause] = self.errors.get(cause, 0) + 1

    def _of(self, ticket: Ticket | None) -> Series:
        labels = ("", "", "") if ticket is None else (ticket.parsed.model, ticket.worker.pool, ticket.policy.name)
        series = self._series.get(labels)
        if series is None:
            if len(self._series) >= MAX_SERIES:
                labels = (OTHER_MODELS, *labels[1:])
            series = self._series.setdefault(labels, Series())
        return series

    # The scrape calls

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._histograms()
        yield from self._tokens()
        yield from self._failures()
        yield from self._fleet()
        for families in self.extra:
            yield from families()

    def describe(self) -> list[Metric]:
        """Names are known without collecting; none need to be checked at registration."""
        return []

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            PREFIX + "requests", "Requests, by how they ended.", labels=("model", "pool", "policy", "outcome")
        )
        for labels, series in self._series.items():
            for outcome, count in series.outcomes.items():
                requests.add_metric((*labels, outcome), count)
        yield requests

    def _histograms(self) -> Iterator[Metric]:
        families = (
            ("ttft_seconds", "Time to first token of streamed answers, queueing included.", "ttft"),
            ("itl_seconds", "Mean time between the tokens of a streamed answer.", "itl"),
            ("e2e_seconds", "Time from a request's arrival to its answer's end.", "e2e"),
            (
                "ttft_prediction_error_seconds",
                "Difference between observed and predicted time to first token, either way.",
                "error",
            ),
        )
        for name, text, attribute in families:
            merged: dict[tuple[str, str], list[Histogram]] = {}
            for (model, pool, _), series in self._series.items():
                if pool:
                    key = ("", pool) if attribute == "error" else (model, pool)
                    merged.setdefault(key, []).append(getattr(series, attribute))
            labels = ("pool",) if attribute == "error" else ("model", "pool")
            family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
            for key, parts in merged.items():
                total = _sum(parts)
                family.add_metric(key[-len(labels) :], total.cumulative(), total.total)
            yield family
        difference = HistogramMetricFamily(
            PREFIX + "cached_tokens_difference",
            "Distance of predicted from reported cached tokens, where engines report them.",
            labels=("pool", "view", "prediction"),
        )
        for by, histogram in self.cached_difference.items():
            difference.add_metric(by, histogram.cumulative(), histogram.total)
        yield difference
        decision = HistogramMetricFamily(
            PREFIX + "decision_seconds", "CPU time to parse a request and choose its worker."
        )
        decision.add_metric((), self.decision.cumulative(), self.decision.total)
        yield decision

    def _tokens(self) -> Iterator[Metric]:
        by_pool = ("model", "pool")
        prompt = CounterMetricFamily(
            PREFIX + "prompt_tokens", "Prompt tokens, as reported or else estimated.", labels=by_pool
        )
        cached = CounterMetricFamily(
            PREFIX + "cached_tokens",
            "Prompt tokens found in a worker's prefix cache: as predicted, and as engines reported.",
            labels=(*by_pool, "source"),
        )
        output = CounterMetricFamily(
            PREFIX + "output_tokens", "Output tokens, as reported or else chunks.", labels=by_pool
        )
        sums: dict[tuple[str, str], list[float]] = {}
        for (model, pool, _), series in self._series.items():
            if pool:
                total = sums.setdefault((model, pool), [0.0] * 4)
                counts = (series.prompt_tokens, series.cached_predicted, series.cached_reported, series.output_tokens)
                total[:] = [a + b for a, b in zip(total, counts, strict=True)]
        for key, (prompt_tokens, predicted, reported, output_tokens) in sums.items():
            prompt.add_metric(key, prompt_tokens)
            cached.add_metric((*key, "predicted"), predicted)
            cached.add_metric((*key, "reported"), reported)
            output.add_metric(key, output_tokens)
        yield from (prompt, cached, output)

    def _failures(self) -> Iterator[Metric]:
        retries = CounterMetricFamily(
            PREFIX + "retries", "Tries on another worker before the first byte.", labels=("pool", "cause")
        )
        for key, count in self.retries.items():
            retries.add_metric(key, count)
        errors = CounterMetricFamily(PREFIX + "errors", "What went wrong, by cause.", labels=("cause",))
        for cause, count in self.errors.items():
            errors.add_metric((cause,), count)
        prefills = CounterMetricFamily(
            PREFIX + "prefills", "Prompts computed by Prefill workers for others.", labels=("pool", "result")
        )
        for key, count in self.prefills.items():
            prefills.add_metric(key, count)
        yield from (retries, errors, prefills)

    def _fleet(self) -> Iterator[Metric]:
        dispatcher = self._dispatcher
        in_flight = GaugeMetricFamily(PREFIX + "in_flight", "Requests at workers.", labels=("pool",))
        workers = GaugeMetricFamily(PREFIX + "workers", "Workers, by state.", labels=("pool", "state"))
        predicted = GaugeMetricFamily(
            PREFIX + "predicted_ttft_seconds",
            "Predicted time to first token of a mean prompt that came now; of a pool without a worker: on an idle one.",
            labels=("pool",),
        )
        by_worker = ("pool", "worker")
        at_worker = GaugeMetricFamily(
            PREFIX + "worker_in_flight", "Requests this router has at a worker.", labels=by_worker
        )
        cached = GaugeMetricFamily(
            PREFIX + "worker_cached_tokens", "Tokens a worker is believed to have cached.", labels=by_worker
        )
        pack = GaugeMetricFamily(
            PREFIX + "pack_target_sequences",
            "Sequences a worker is filled to before another is used.",
            labels=("pool",),
        )
        packed = GaugeMetricFamily(
            PREFIX + "packed_sequences",
            "What this router has at workers, in sequences of workers filled to the pack target: the same for any number of them.",
            labels=("pool",),
        )
        cached_shares = self._cached_shares()
        for pool in dispatcher.pools():
            name = pool.name
            states = dict.fromkeys(WORKER_STATES, 0)
            running = 0
            for worker in pool.workers.values():
                states[worker.state] += 1
                running += worker.own.in_flight
                at_worker.add_metric((name, worker.name), worker.own.in_flight)
                cached.add_metric((name, worker.name), len(worker.cache) * pool.block_tokens)
            in_flight.add_metric((name,), running)
            for state, count in states.items():
                workers.add_metric((name, state), count)
            pack.add_metric((name,), pool.pack_target())
            packed.add_metric((name,), dispatcher.packed_sequences(name))
            predicted.add_metric((name,), dispatcher.predicted_ttft_s(name, cached_shares.get(name, 0.0)))
        queue = GaugeMetricFamily(
            PREFIX + "queue_depth", "Requests held in the router's queue.", labels=("policy", "model")
        )
        for policy_and_model, depth in dispatcher.queue_depths().items():
            queue.add_metric(policy_and_model, depth)
        kept = GaugeMetricFamily(PREFIX + "deferred_requests", "Requests kept for a cheaper time.", labels=("policy",))
        ended = CounterMetricFamily(
            PREFIX + "deferred_ended",
            "Requests that may wait and are kept no longer, by why.",
            labels=("policy", "why"),
        )
        for policy, count in dispatcher.deferral.kept.items():
            kept.add_metric((policy,), count)
        for policy_and_why, count in dispatcher.deferral.ended.items():
            ended.add_metric(policy_and_why, count)
        revision = GaugeMetricFamily(PREFIX + "config_info", "The configuration being served.", labels=("revision",))
        revision.add_metric((self._loaded.revision,), 1)
        rejected = CounterMetricFamily(PREFIX + "config_errors", "Configurations that could not be taken.")
        rejected.add_metric((), self._loaded.errors)
        refused = GaugeMetricFamily(
            PREFIX + "config_refused", "Whether a newer configuration is there that cannot be served."
        )
        refused.add_metric((), bool(self._loaded.refused))
        yield from (
            in_flight,
            workers,
            at_worker,
            cached,
            predicted,
            pack,
            packed,
            queue,
            kept,
            ended,
            revision,
            rejected,
            refused,
        )

    def _cached_shares(self) -> dict[str, float]:
        """Pool → the share of its prompts' tokens that was expected in a cache."""
        prompts: dict[str, float] = {}
        cached: dict[str, float] = {}
        for (_, pool, _), series in self._series.items():
            prompts[pool] = prompts.get(pool, 0.0) + series.prompt_tokens
            cached[pool] = cached.get(pool, 0.0) + series.cached_predicted
        return {pool: min(cached[pool] / tokens, 1.0) for pool, tokens in prompts.items() if tokens}


def _sum(parts: Sequence[Histogram]) -> Histogram:
    total = Histogram(parts[0].bounds)
    for part in parts:
        total.counts = [a + b for a, b in zip(total.counts, part.counts, strict=True)]
        total.total += part.total
    return total
