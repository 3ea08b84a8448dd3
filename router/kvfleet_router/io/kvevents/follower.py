"""Keeps a feed for every publisher of the fleet, and says what each pool goes by.

A pool goes by its engines' own word where the configuration names a tokenizer that can be used and its workers publish KV
events; else by the router's guess, and says why. `update` is called whenever pools or workers changed; tokenizers are read in
a thread, and again when their files change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import zmq

from kvfleet_router.core.dispatcher import Dispatcher, Worker
from kvfleet_router.core.index import MAX_TOTAL_BLOCKS
from kvfleet_router.core.kvevents.codec import Unusable
from kvfleet_router.core.kvevents.stream import Counts
from kvfleet_router.core.kvevents.view import MAX_RANKS, Engine, ModelView, WorkerView
from kvfleet_router.core.pool import Pool
from kvfleet_router.io.files import WatchedFiles
from kvfleet_router.io.kvevents.feed import Feed, Turns
from kvfleet_router.io.kvevents.tokenizers import FILES, read_view

log = logging.getLogger("kvfleet.router")

POLL_S = 1.0
CAPACITY_SLACK = 4
"""An engine's cache may be larger than its profile says; more blocks than this many times are not taken in."""
MIN_LIMIT_BLOCKS = 16_384
MAX_MESSAGE_CHARS = 300

PRECISE, APPROXIMATE = "Precise", "Approximate"


@dataclass(frozen=True, slots=True)
class CacheView:
    """What a pool goes by. `reason` in CamelCase, for conditions."""

    mode: str
    reason: str
    message: str


@dataclass(slots=True)
class _Model:
    """A tokenizer in use, or one that cannot be used."""

    files: WatchedFiles
    view: ModelView | None = None
    problem: Unusable | None = None
    loading: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Followed:
    worker: Worker
    view: ModelView
    urls: tuple[str, str | None]
    held: WorkerView
    feeds: list[Feed] = field(default_factory=list)


class Follower:
    """Use within a running event loop; `close` ends it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.counts = Counts()
        self.malformed_frames = 0
        self._dispatcher = dispatcher
        self._models: dict[tuple[str, str], _Model] = {}
        self._followed: dict[Worker, _Followed] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._turns: Turns
        self._closed = False

    async def run(self) -> None:
        """Look for changed files, and for views that proved wrong, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            for key, model in self._models.items():
                if model.loading is None and model.files.changed():
                    self._load(key, model)
            if any(model.view is not None and model.view.agreement.lost for model in self._models.values()):
                self.update()

    def update(self) -> None:
        """Pools or workers may have changed."""
        if self._closed:
            return
        pools = [pool for pool in self._dispatcher.pools() if pool.config.tokenizer_path]
        if not pools and not self._models:
            return
        wanted = {(pool.config.model, pool.config.tokenizer_path or "") for pool in pools}
        for key in [key for key in self._models if key not in wanted]:
            loading = self._models.pop(key).loading
            if loading is not None:
                loading.cancel()
        for key in wanted - self._models.keys():
            directory = Path(key[1])
            model = self._models[key] = _Model(WatchedFiles(*(directory / name for name in FILES)))
            model.files.changed()
            self._load(key, model)
        for pool in self._dispatcher.pools():
            view = self._view(pool)
            self._dispatcher.use_view(pool.name, view, "" if view else self.cache_view(pool).reason)
        self._follow(pools)

    def close(self) -> None:
        self._closed = True
        for model in self._models.values():
            if model.loading is not None:
                model.loading.cancel()
        for followed in self._followed.values():
            for feed in followed.feeds:
                feed.close()
        self._followed.clear()
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    def cache_view(self, pool: Pool) -> CacheView:
        """What the pool goes by, and why."""
        config = pool.config
        if not config.tokenizer_path:
            return CacheView(APPROXIMATE, "NoTokenizer", "No tokenizer is named: cached prefixes are guessed.")
        model = self._models.get((config.model, config.tokenizer_path))
        if model is None or (model.view is None and model.problem is None):
            return CacheView(APPROXIMATE, "Loading", "The tokenizer is being read.")
        if model.problem is not None:
            return CacheView(APPROXIMATE, model.problem.reason, str(model.problem)[:MAX_MESSAGE_CHARS])
        if model.view is not None and model.view.agreement.lost:
            message = (
                "What was expected by KV events is not what engines report: is it the engines' tokenizer and template?"
            )
            return CacheView(APPROXIMATE, "PredictionsMiss", message)
        workers = list(pool.workers.values())
        told = sum(worker.held is not None and worker.held.known for worker in workers)
        message = f"{told} of {len(workers)} workers tell what they hold."
        if workers and not told:
            publish = any(worker.endpoint.kv_events_url for worker in workers)
            reason = "EventsNotHeard" if publish else "NoEvents"
            return CacheView(APPROXIMATE, reason, message)
        return CacheView(PRECISE, "EventsFollowed", message)

    def views(self) -> Iterable[ModelView]:
        return [model.view for model in self._models.values() if model.view is not None]

    # -- tokenizers -------------------------------------------------------------------------------------------------------

    def _view(self, pool: Pool) -> ModelView | None:
        model = self._models.get((pool.config.model, pool.config.tokenizer_path or ""))
        if model is None or model.view is None or model.view.agreement.lost:
            return None
        return model.view

    def _load(self, key: tuple[str, str], model: _Model) -> None:
        model.loading = asyncio.get_running_loop().create_task(self._read(key, model))

    async def _read(self, key: tuple[str, str], model: _Model) -> None:
        name, path = key
        view: ModelView | None = None
        problem: Unusable | None = None
        try:
            view = await asyncio.to_thread(read_view, name, Path(path), {})
            log.info("model %s: cached prefixes are known by KV events (tokenizer %s)", name, path)
        except Unusable as error:
            problem = error
        except Exception as error:  # a file like no tokenizer ever seen must not end the following of all others
            problem = Unusable("TokenizerInvalid", f"{path}: {type(error).__name__}: {error}")
        if problem is not None:
            log.warning("model %s: cached prefixes are guessed: %s", name, problem)
        model.view, model.problem, model.loading = view, problem, None
        self.update()

    # -- publishers -------------------------------------------------------------------------------------------------------

    def _follow(self, pools: list[Pool]) -> None:
        wanted = {
            worker: (pool, pool.view)
            for pool in pools
            if pool.view is not None
            for worker in pool.workers.values()
            if worker.endpoint.kv_events_url and not worker.endpoint.terminating
        }
        for worker, followed in list(self._followed.items()):
            kept = wanted.get(worker)
            if kept is None or kept[1] is not followed.view or _urls(worker) != followed.urls or worker.removed:
                self._leave(worker)
        for worker, (pool, view) in wanted.items():
            if worker not in self._followed:
                self._begin(worker, pool, view)
        share = MAX_TOTAL_BLOCKS // max(sum(len(followed.held.engines) for followed in self._followed.values()), 1)
        for followed in self._followed.values():
            config = followed.worker.pool_state.config
            own = CAPACITY_SLACK * int(followed.worker.kv_tokens) // max(config.block_tokens, 1)
            for engine in followed.held.engines:
                engine.cache.limit = min(max(own, MIN_LIMIT_BLOCKS), max(share, 1))

    def _begin(self, worker: Worker, pool: Pool, view: ModelView) -> None:
        events_url, replay_url = _urls(worker)
        ranks = min(max(pool.config.data_parallel, 1), MAX_RANKS)
        engines = [
            Engine(view, rank, worker.cache.bit, MIN_LIMIT_BLOCKS, self.counts, can_replay=replay_url is not None)
            for rank in range(ranks)
        ]
        held = WorkerView(view, engines)
        followed = _Followed(worker, view, (events_url, replay_url), held)
        if self._context is None:
            self._context, self._turns = zmq.Context(), Turns()
        try:
            for engine in engines:
                feed = Feed(
                    self._context,
                    self._turns,
                    engine.stream,
                    _of_rank(events_url, engine.rank),
                    None if replay_url is None else _of_rank(replay_url, engine.rank),
                    self._on_malformed,
                )
                followed.feeds.append(feed)
        except (ValueError, zmq.ZMQError) as error:
            log.warning("worker %s: its KV events cannot be followed: %s", worker.name, error)
            for feed in followed.feeds:
                feed.close()
            followed.feeds.clear()
        else:
            worker.hold(held)
        self._followed[worker] = followed

    def _leave(self, worker: Worker) -> None:
        followed = self._followed.pop(worker)
        for feed in followed.feeds:
            feed.close()
        if worker.held is followed.held:
            worker.hold(None)

    def _on_malformed(self) -> None:
        self.malformed_frames += 1


def _urls(worker: Worker) -> tuple[str, str | None]:
    return worker.endpoint.kv_events_url or "", worker.endpoint.kv_replay_url


def _of_rank(url: str, rank: int) -> str:
    """The publisher of a data-parallel rank: ports follow one another. Raises ValueError."""
    if not rank:
        return url
    port = urlsplit(url).port
    if port is None:
        raise ValueError(f"{url}: data-parallel ranks need a port to count from")
    return f"{url.rpartition(':')[0]}:{port + rank}"
