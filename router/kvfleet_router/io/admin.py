"""The admin port: metrics, health, decisions, workers and configuration, for operators and tools. JSON but for /metrics.

Nothing here changes anything: all is GET but for the dry run, whose request is its body.

/metrics                the routers' own figures, Prometheus text
/healthz                200 while the process runs
/readyz                 200 once a configuration is served; 503 while leaving
/decisions?limit=N      the latest decisions, newest first
/decisions/{id}         one decision, by its id or its request id
/explain?path=/v1/…     POST a request's body (and headers): what would be done with it now; nothing is sent. Default path:
                        /v1/chat/completions
/workers                every worker and its state
/config                 revision and content of the configuration being served
/loaded                 its revision, every policy's, why a newer one is refused, and what each pool's cached prefixes are known
                        by: what the operator asks for
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote

import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from kvfleet_router.core.dispatcher import Dispatcher, Worker
from kvfleet_router.core.parse import RequestError, read_request
from kvfleet_router.io import wire
from kvfleet_router.io.connection import ClientConnection
from kvfleet_router.io.loaded import Loaded
from kvfleet_router.io.proxy import PROXIED_PATHS
from kvfleet_router.io.request import Request

DEFAULT_LIMIT = 100
MAX_LIMIT = 10_000
EXPLAIN = "/explain"
DEFAULT_EXPLAINED = "/v1/chat/completions"


class Admin:
    """The admin port's Handler."""

    def __init__(
        self, dispatcher: Dispatcher, loaded: Loaded, registry: CollectorRegistry, unready: Callable[[], str]
    ) -> None:
        """`unready` says why the router should get no requests; empty: it should."""
        self._dispatcher = dispatcher
        self._loaded = loaded
        self._registry = registry
        self._unready = unready
        self._routes: dict[str, Callable[[Request, ClientConnection], None]] = {
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/decisions": self._decisions,
            "/workers": self._workers,
            "/config": self._config,
            "/loaded": self._tell_loaded,
        }

    def handle(self, request: Request, connection: ClientConnection) -> None:
        route = self._routes.get(request.path)
        if request.path == EXPLAIN:
            self._explain(request, connection)
        elif request.method not in (b"GET", b"HEAD"):
            body = wire.error_object(405, "The admin port is read only: use GET.", code="method_not_allowed")
            connection.reply(405, body, headers=[wire.header(b"allow", "GET, HEAD")])
        elif route is not None:
            route(request, connection)
        elif request.path.startswith("/decisions/"):
            self._decision(unquote(request.path.removeprefix("/decisions/")), connection)
        else:
            message = f"Unknown path {request.path}: use one of {', '.join((*self._routes, EXPLAIN))}."
            connection.reply(404, wire.error_object(404, message, code="unknown_path"))

    def _metrics(self, request: Request, connection: ClientConnection) -> None:
        text = generate_latest(self._registry)
        connection.reply(200, text, content_type=CONTENT_TYPE_PLAIN_0_0_4.encode())

    def _healthz(self, request: Request, connection: ClientConnection) -> None:
        connection.reply(200, b'{"status":"ok"}')

    def _readyz(self, request: Request, connection: ClientConnection) -> None:
        reason = self._unready()
        body = {"status": reason or "ready", "revision": self._loaded.revision}
        connection.reply(503 if reason else 200, orjson.dumps(body))

    def _decisions(self, request: Request, connection: ClientConnection) -> None:
        query = parse_qs(request.target.partition(b"?")[2].decode("ascii"))
        text = query.get("limit", [str(DEFAULT_LIMIT)])[-1]
        if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= MAX_LIMIT):
            message = f"limit: {text!r} is not a number from 1 to {MAX_LIMIT}"
            connection.reply(400, wire.error_object(400, message, param="limit", code="invalid_value"))
            return
        connection.reply(200, _json({"decisions": self._dispatcher.decisions.recent(int(text))}))

    def _decision(self, decision_id: str, connection: ClientConnection) -> None:
        decision = self._dispatcher.decisions.get(decision_id)
        if decision is None:
            message = f"No decision {decision_id!r}: only the latest are kept; GET /decisions lists them."
            connection.reply(404, wire.error_object(404, message, code="unknown_decision"))
        else:
            connection.reply(200, _json(decision))

    def _explain(self, request: Request, connection: ClientConnection) -> None:
        if request.method != b"POST":
            body = wire.error_object(405, "POST the body of the request to explain.", code="method_not_allowed")
            connection.reply(405, body, headers=[wire.header(b"allow", "POST")])
            return
        query = parse_qs(request.target.partition(b"?")[2].decode("ascii"))
        path = query.get("path", [DEFAULT_EXPLAINED])[-1]
        if path not in PROXIED_PATHS:
            message = f"path: {path!r} is not served: use one of {', '.join(sorted(PROXIED_PATHS))}"
            connection.reply(400, wire.error_object(400, message, param="path", code="invalid_value"))
            return
        limit = self._dispatcher.config.limits.max_body_bytes
        try:
            parsed = read_request(path, request.body, request.headers, max_body_bytes=limit)
        except RequestError as error:
            body = wire.error_object(error.status, error.message, kind=error.type, param=error.param, code=error.code)
            connection.reply(error.status, body)
            return
        connection.reply(200, _json(self._dispatcher.dry_run(parsed)))

    def _workers(self, request: Request, connection: ClientConnection) -> None:
        workers = [
            {
                "name": worker.name,
                "pool": worker.pool,
                "url": worker.url,
                "state": worker.state,
                "last_probe": worker.breaker.probe_told,
                "in_flight": worker.in_flight,
                "kv_events": _told(worker),
            }
            for worker in self._dispatcher.workers()
        ]
        connection.reply(200, _json({"workers": workers}))

    def _config(self, request: Request, connection: ClientConnection) -> None:
        content = self._dispatcher.config.model_dump(mode="json", by_alias=True)
        connection.reply(200, _json({"revision": self._loaded.revision, "config": content}))

    def _tell_loaded(self, request: Request, connection: ClientConnection) -> None:
        connection.reply(200, self._loaded.to_json())


def _told(worker: Worker) -> dict[str, Any] | None:
    """What the worker told of its cache; none: its KV events are not followed."""
    held = worker.held
    if held is None:
        return None
    return {
        "states": [engine.stream.state for engine in held.engines],
        "next_sequences": [engine.stream.next for engine in held.engines],
        "blocks": sum(len(engine.cache) for engine in held.engines),
        "complete": held.complete,
    }


def _json(value: Any) -> bytes:
    return orjson.dumps(value)
