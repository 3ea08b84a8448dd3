"""What following KV events shows to Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvfleet_router.core.dispatcher import Dispatcher
from kvfleet_router.io.kvevents.follower import Follower

PREFIX = "kvfleet_router_"


def event_metrics(dispatcher: Dispatcher, follower: Follower) -> Callable[[], Iterable[Metric]]:
    def families() -> Iterable[Metric]:
        yield from _views(dispatcher, follower)
        yield from _streams(dispatcher, follower)
        yield from _models(follower)

    return families


def _views(dispatcher: Dispatcher, follower: Follower) -> Iterable[Metric]:
    views = GaugeMetricFamily(
        PREFIX + "cache_view",
        "What a pool's cached prefixes are known by: engines' own word (Precise) or guesses (Approximate), and why.",
        labels=("pool", "mode", "reason"),
    )
    for pool in dispatcher.pools():
        view = follower.cache_view(pool)
        views.add_metric((pool.name, view.mode, view.reason), 1)
    yield views


def _streams(dispatcher: Dispatcher, follower: Follower) -> Iterable[Metric]:
    counts = follower.counts
    malformed = follower.malformed_frames + sum(view.malformed for view in follower.views())
    for name, text, value in (
        ("kv_event_batches", "Batches of KV events taken in.", counts.batches),
        ("kv_event_repeated", "Batches that came a second time.", counts.repeated),
        ("kv_event_malformed", "Frames, batches and events that could not be understood.", malformed + counts.impossible),
        ("kv_event_gaps", "Times that batches of a worker were missing.", counts.gaps),
        ("kv_event_replays", "Times that a worker was asked for batches again.", counts.replays),
        ("kv_event_replays_failed", "Replays that were not answered.", counts.replays_failed),
        ("kv_event_restarts", "Engines found to have begun anew.", counts.restarts),
        ("kv_event_resets", "Times that a worker's cache was forgotten because a gap could not be filled.", counts.resets),
    ):  # fmt: skip
        counter = CounterMetricFamily(PREFIX + name, text)
        counter.add_metric((), value)
        yield counter
    blocks = GaugeMetricFamily(PREFIX + "kv_event_blocks", "Blocks a worker told it holds.", labels=("pool", "worker"))
    orphans = CounterMetricFamily(
        PREFIX + "kv_event_orphan_blocks", "Blocks left out: what they follow is not known.", labels=("pool",)
    )
    complete = GaugeMetricFamily(
        PREFIX + "kv_event_workers",
        "Workers by what is known of their caches: all of it, what was told since some time, or nothing yet.",
        labels=("pool", "known"),
    )
    for pool in dispatcher.pools():
        if pool.view is None:
            continue
        known = dict.fromkeys(("complete", "partial", "nothing"), 0)
        lost = 0
        for worker in pool.workers.values():
            held = worker.held
            if held is None:
                known["nothing"] += 1
                continue
            known["nothing" if not held.known else "complete" if held.complete else "partial"] += 1
            lost += sum(engine.cache.orphans for engine in held.engines)
            blocks.add_metric((pool.name, worker.name), sum(len(engine.cache) for engine in held.engines))
        orphans.add_metric((pool.name,), lost)
        for state, count in known.items():
            complete.add_metric((pool.name, state), count)
    yield from (blocks, orphans, complete)


def _models(follower: Follower) -> Iterable[Metric]:
    left_out = CounterMetricFamily(
        PREFIX + "prompts_not_rendered",
        "Prompts whose bytes could not be known: their cached prefixes were guessed.",
        labels=("model", "reason"),
    )
    trust = GaugeMetricFamily(
        PREFIX + "generated_blocks_found",
        "Share of expected generated tokens that engines found in their caches, lately.",
        labels=("model",),
    )
    for view in follower.views():
        for reason, count in view.not_rendered.items():
            left_out.add_metric((view.model, reason), count)
        trust.add_metric((view.model,), view.trust.share)
    yield from (left_out, trust)
