"""A fleet of simulated workers as processes, and a load on it over HTTP: what live_peers.py and validate_simulator.py share."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvfleet import simulate
from kvfleet.fleet import compile_manifests
from kvfleet.inputs import render_objects
from kvfleet.local import LocalFleet
from kvfleet.replay import Outcome, replay
from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_api.manifests import Manifests, load, with_bundled
from kvfleet_sim.outcomes import Slo, unloaded_ttft_s
from kvfleet_sim.saturation import saturation_rps
from kvfleet_sim.traces import TraceRow
from kvfleet_sim.workload import Load, LoadRequest, open_load

FLEET = Path(__file__).parents[1] / "examples" / "bench8"
ROUTER = FLEET.parent / "quickstart" / "router.yaml"
STREAM_INTERVAL = 8
"""Tokens in a chunk: the machine, not the fleet, is what is short here."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The fleet, and the requests that every contestant gets at the same times."""

    manifests: Manifests
    config: FleetConfig
    """With simulated workers."""
    model: str
    load: Load
    requests: list[LoadRequest]
    rate_rps: float
    saturation_rps: float

    @property
    def rows(self) -> list[TraceRow]:
        """The requests as a client sends them."""
        block = self.load.block_tokens
        return [
            TraceRow(
                request.start_s or 0.0, request.prompt_tokens, request.output_tokens, tuple(request.block_keys), block
            )
            for request in self.requests
        ]


def setting(trace: str, count: int, share: float, workers: int, seed: int = 0) -> Setting:
    """`share`: load, of the saturation rate. Prompts longer than a worker's context are left out."""
    manifests = load([FLEET, ROUTER])
    pool = manifests.pools[0]
    spec = pool.spec.model_copy(
        update={
            "replicas": workers,
            "engine": pool.spec.engine.model_copy(
                update={"args": [*pool.spec.engine.args, f"--stream-interval={STREAM_INTERVAL}"]}
            ),
        }
    )
    manifests = replace(manifests, pools=[pool.model_copy(update={"spec": spec})])
    config, model = simulate.fleet_of(compile_manifests(manifests), manifests, None, workers)
    source = open_load(trace, count)
    saturation = saturation_rps(config, source, model)
    longest = min(pool.max_context_tokens or 10**9 for pool in config.pools) - 64
    requests = [
        request
        for request in source.requests(share * saturation, seed)
        if request.prompt_tokens + request.output_tokens < longest
    ]
    if any(request.start_s is None for request in requests):
        raise ValueError("a trace of sessions cannot be replayed over HTTP here: give one without")
    return Setting(manifests, config, model, source, requests, share * saturation, saturation)


@contextlib.asynccontextmanager
async def running(setting: Setting, directory: Path, *, strategy: str, speed: float) -> AsyncIterator[LocalFleet]:
    """The workers as processes with cold caches, and a kvfleet router in front."""
    objects = render_objects(setting.manifests)
    profiles = with_bundled(setting.manifests.profiles)
    async with LocalFleet(objects, profiles, directory, speed=speed, strategy=strategy) as fleet:
        yield fleet


async def send(setting: Setting, url: str, *, speed: float, timeout_s: float) -> list[Outcome]:
    return await replay(setting.rows, url=url, model=setting.model, speed=speed, timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class Measured:
    """What clients saw. Seconds of virtual time."""

    completed: int
    failed: int
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    itl_mean_s: float
    slo_attainment: float
    goodput_rps: float
    hit_ratio: float


def measured(setting: Setting, outcomes: Sequence[Outcome]) -> Measured:
    good = [outcome for outcome in outcomes if outcome.ok]
    ttft = np.array([outcome.ttft_s for outcome in good])
    itl = np.array([outcome.itl_s for outcome in good])
    prompt = np.array([float(outcome.row.prompt_tokens) for outcome in good])
    slo = Slo.of(setting.config, setting.model)
    limit = np.maximum(slo.ttft_s, 3 * unloaded_ttft_s(setting.config, prompt))
    inside = int(((ttft <= limit) & (itl <= slo.itl_s)).sum())
    p50, p90, p99 = (float(value) for value in np.percentile(ttft, (50, 90, 99)))
    return Measured(
        completed=len(good),
        failed=len(outcomes) - len(good),
        ttft_mean_s=float(ttft.mean()),
        ttft_p50_s=p50,
        ttft_p90_s=p90,
        ttft_p99_s=p99,
        itl_mean_s=float(itl.mean()),
        slo_attainment=inside / len(outcomes),
        goodput_rps=inside / len(outcomes) * setting.rate_rps,
        hit_ratio=sum(o.cached_tokens for o in good) / max(sum(o.prompt_tokens for o in good), 1),
    )
