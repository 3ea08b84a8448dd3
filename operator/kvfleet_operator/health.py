"""Probes and metrics on one port: /healthz, /readyz, /metrics.

The server runs in a thread of its own, so that a blocked event loop cannot silence it: it is the one that must be told.

- /healthz fails when the event loop has not turned for `LOOP_S`, or when a watch has not been proven to work for
  `watch_limit_s` (`resync`): a restart is the remedy for both.
- /readyz fails until the API server has answered once; a standby is ready too.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

LOOP_S: Final = 30.0
BEAT_S: Final = 1.0
STOP_S: Final = 0.1
"""How long the server may take to notice that it is to stop."""


class Health:
    """What the probes look at. Written by the event loop, read by the server's thread."""

    def __init__(
        self,
        ages: Callable[[], Mapping[str, float]],
        *,
        ready: Callable[[], bool],
        watch_limit_s: float,
        loop_limit_s: float = LOOP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.leading = False
        self._ages = ages
        self._ready = ready
        self._watch_limit_s = watch_limit_s
        self._loop_limit_s = loop_limit_s
        self._clock = clock
        self._turned = clock()

    @property
    def ready(self) -> bool:
        return self._ready()

    def beat(self) -> None:
        self._turned = self._clock()

    async def keep_beating(self) -> None:
        while True:
            self.beat()
            await asyncio.sleep(BEAT_S)

    def complaints(self) -> list[str]:
        """Why the process should be restarted; empty: it is well."""
        found = []
        stuck_s = self._clock() - self._turned
        if stuck_s > self._loop_limit_s:
            found.append(f"the event loop has been stuck for {stuck_s:.0f} s")
        if self.leading:
            stale = {kind: age for kind, age in self._ages().items() if age > self._watch_limit_s}
            found += [f"the watch of {kind} has been stale for {age:.0f} s" for kind, age in sorted(stale.items())]
        return found


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    timeout = 10
    """Seconds a client may take over its request."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class names it so)
        """Probes come every few seconds: no line for each."""


class HealthServer:
    def __init__(self, health: Health, registry: CollectorRegistry, *, host: str, port: int) -> None:
        """Port 0: any free one. Raises OSError where the port is taken."""
        self._health = health
        self._registry = registry
        self._server = make_server(host, port, self._serve, server_class=_Server, handler_class=_QuietHandler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(STOP_S,), name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status, kind, body = self._answer(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]

    def _answer(self, method: str, path: str) -> tuple[str, str, bytes]:
        text = "text/plain; charset=utf-8"
        if method != "GET":
            return "405 Method Not Allowed", text, b"only GET\n"
        if path == "/metrics":
            return "200 OK", CONTENT_TYPE_LATEST, generate_latest(self._registry)
        if path == "/healthz":
            complaints = self._health.complaints()
            status = "503 Service Unavailable" if complaints else "200 OK"
            return status, text, ("\n".join(complaints or ["ok"]) + "\n").encode()
        if path == "/readyz":
            ready = self._health.ready
            return ("200 OK", text, b"ok\n") if ready else ("503 Service Unavailable", text, b"no answer yet\n")
        return "404 Not Found", text, b"try /healthz, /readyz or /metrics\n"
