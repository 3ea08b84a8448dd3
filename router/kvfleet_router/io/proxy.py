"""What the client port serves: which paths there are, and what every request under way shares.

    POST  the engines' inference endpoints     routed by `model` (PROXIED_PATHS; engines' control endpoints are not reachable)
    GET   /v1/models, /v1/models/{id}          models and adapters of every pool, those at zero workers included
    GET   /health                              200 while this router takes requests

Everything else is 404 or 405, with OpenAI's error body.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from kvfleet_router.core.dispatcher import Dispatcher
from kvfleet_router.io import wire
from kvfleet_router.io.connection import ClientConnection
from kvfleet_router.io.exchange import Exchange
from kvfleet_router.io.metrics import RouterMetrics
from kvfleet_router.io.models import ModelList
from kvfleet_router.io.request import Request
from kvfleet_router.io.upstream import Upstreams

log = logging.getLogger("kvfleet.router")

PROXIED_PATHS = frozenset(
    (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/v2/rerank",
        "/v1/audio/speech",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/moderations",
        "/v1/videos",
        "/rerank",
        "/score",
        "/classify",
        "/pooling",
        "/tokenize",
        "/detokenize",
    )
)
"""vLLM's inference endpoints, and those of OpenAI's API that name a model."""

_GET = (b"GET", b"HEAD")
_MODELS = "/v1/models"
MAX_TICK_S = 0.25
_MIN_TICK_S = 0.001


class Proxy:
    """The client port's Handler, and what its exchanges share."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        upstreams: Upstreams,
        metrics: RouterMetrics,
        models: ModelList,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        speed: float = 1.0,
    ) -> None:
        self.dispatcher = dispatcher
        self.dispatcher_tick: Callable[[], float | None] = (
            dispatcher.tick
        )  # kept apart: a compiled method cannot be replaced
        self.upstreams = upstreams
        self.metrics = metrics
        self.models = models
        self.clock = clock
        self.draining = False
        self._random_bits = rng.getrandbits
        self._speed = speed
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._tick_timer: asyncio.Handle | None = None
        self._tick_at = 0.0

    def handle(self, request: Request, connection: ClientConnection) -> None:
        if request.path in PROXIED_PATHS and request.method == b"POST":
            exchange = Exchange(self, request, connection)
            connection.answer = exchange
            exchange.begin()
        else:
            self._answer_here(request, connection)

    def new_request_id(self) -> bytes:
        return b"%032x" % self._random_bits(128)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine; `close` ends what is left."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task failed", exc_info=task.exception())

    # The dispatcher's clockwork

    def start(self) -> None:
        self._tick()

    def request_tick(self) -> None:
        """A request was held: let the dispatcher say when it wants to look at it again."""
        self._schedule(_MIN_TICK_S)

    def _tick(self) -> None:
        self._tick_timer = None
        wanted_s = None
        try:
            wanted_s = self.dispatcher_tick()
        except Exception:
            log.exception("a tick failed; the next one comes all the same")
        self._schedule(MAX_TICK_S if wanted_s is None else wanted_s / self._speed)

    def _schedule(self, delay_s: float) -> None:
        """Tick then, unless a tick comes earlier."""
        at = self._loop.time() + min(max(delay_s, _MIN_TICK_S), MAX_TICK_S)
        if self._tick_timer is not None:
            if self._tick_at <= at:
                return
            self._tick_timer.cancel()
        self._tick_at = at
        self._tick_timer = self._loop.call_at(at, self._tick)

    async def close(self) -> None:
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.upstreams.close()

    # What the router answers itself

    def _answer_here(self, request: Request, connection: ClientConnection) -> None:
        path, method = request.path, request.method
        if path in PROXIED_PATHS:
            _not_allowed(connection, method, "POST")
        elif path != "/health" and path != _MODELS and not path.startswith(_MODELS + "/"):
            message = f"Unknown path {path}: see /v1/models, and POST /v1/chat/completions."
            connection.reply(404, wire.error_object(404, message, code="unknown_path"))
        elif method not in _GET:
            _not_allowed(connection, method, "GET, HEAD")
        elif path != "/health":
            self.models.answer(path.removeprefix(_MODELS).removeprefix("/"), connection, self.spawn)
        elif self.draining:
            connection.reply(503, wire.error_object(503, "The router is leaving.", code="draining"))
        else:
            connection.reply(200, b"{}")


def _not_allowed(connection: ClientConnection, method: bytes, allowed: str) -> None:
    message = f"{method.decode()} is not served here: use {allowed}."
    body = wire.error_object(405, message, code="method_not_allowed")
    connection.reply(405, body, headers=[wire.header(b"allow", allowed)])
