"""`kvfleet worker`: a simulated vLLM server as a process.

    parse arguments → load (virtual time passes) → KV-event sockets → HTTP → until SIGTERM, then vLLM's way out

SIGTERM with --shutdown-timeout 0: every request ends at once with reason `abort`; half a second later the port closes. With
N seconds: running requests go on, new ones get 500, and after N seconds (real ones, and never earlier) the engine stops
and the port closes; streams still open get nothing more, and the process ends when their clients give up. A second SIGTERM
ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Sequence
from typing import Final

import uvloop

from kvfleet_sim.app import VLLM_VERSION, App
from kvfleet_sim.config import ConfigError, WorkerConfig, build_parser, parse
from kvfleet_sim.engine import Engine
from kvfleet_sim.http import Application, HttpConnection
from kvfleet_sim.kv_publisher import KvPublisher
from kvfleet_sim.metrics import PowerMetrics, WorkerMetrics
from kvfleet_sim.models import Models
from kvfleet_sim.responses import Responses
from kvfleet_sim.tokens import ByteTokenizer, FileTokenizer, Tokenizer, TokenizerError
from kvfleet_sim.worker import Worker

__all__ = ["Server", "build_parser", "main"]

log = logging.getLogger("kvfleet.worker")

LINGER_S: Final = 0.45
"""How long the port stays open after an abort."""
BACKLOG: Final = 2048


class Server:
    """One simulated vLLM server in this process: `start`, then `shut_down` (vLLM's way out) or `close` (at once)."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.port = 0
        self.dcgm_port: int | None = None
        self.publisher: KvPublisher | None = None
        self._connections: set[HttpConnection] = set()
        self._listeners: list[asyncio.Server] = []

    async def start(self) -> None:
        """Load and listen. Raises OSError where an address cannot be used, TokenizerError where --tokenizer cannot."""
        config = self.config
        tokenizer: Tokenizer = FileTokenizer(config.tokenizer) if config.tokenizer else ByteTokenizer()
        await asyncio.sleep(config.startup_s / config.speed)
        try:
            await self._serve(tokenizer)
        except BaseException:
            await self.close()
            raise

    async def _serve(self, tokenizer: Tokenizer) -> None:
        config = self.config
        models = Models(config)
        tls = config.tls.context() if config.tls is not None else None
        if config.kv_events is not None:  # before HTTP, as in vLLM
            self.publisher = KvPublisher(config.kv_events, config.block_tokens, models.lora_ids)
        listening = socket.create_server((config.host, config.port), backlog=BACKLOG)
        self.port = listening.getsockname()[1]
        engine = build_engine(config)
        metrics = WorkerMetrics(config, engine)
        power = PowerMetrics(config, engine, socket.gethostname(), self.port)
        fingerprint = f"vllm-{VLLM_VERSION}-{hashlib.sha256(repr(config).encode()).hexdigest()[:8]}"
        self.worker = Worker(
            engine,
            Responses(tokenizer, fingerprint, prompt_tokens_details=config.prompt_tokens_details),
            metrics,
            power,
            speed=config.speed,
            stream_interval=config.stream_interval,
            publish=self.publisher.publish if self.publisher is not None else None,
            transfer_s_per_token=config.kv_transfer_s_per_token,
        )
        self.app = App(config, tokenizer, models, self.worker, metrics, power)
        if config.dcgm_port is not None:
            dcgm = socket.create_server((config.host, config.dcgm_port), backlog=BACKLOG)
            self.dcgm_port = dcgm.getsockname()[1]
            await self._listen(dcgm, self.app.dcgm_exporter)
        await self._listen(listening, self.app, tls)

    async def _listen(
        self, listening: socket.socket, application: Application, tls: ssl.SSLContext | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        factory = functools.partial(HttpConnection, application, self._connections)
        self._listeners.append(await loop.create_server(factory, sock=listening, ssl=tls))

    async def shut_down(self) -> None:
        """What vLLM does on SIGTERM; returns when the process may end."""
        self.app.shutting_down = True
        timeout_s = self.config.shutdown_timeout_s
        if timeout_s > 0:
            log.info("draining %d requests for %g s", self.worker.jobs, timeout_s)
            await asyncio.sleep(timeout_s)
        else:
            log.info("aborting %d requests", self.worker.jobs)
            self.worker.abort_all()
            await asyncio.sleep(LINGER_S)
        self.worker.stop()
        self._close_listeners()
        while self._connections:
            for connection in list(self._connections):
                if not connection.busy:
                    connection.close()
            await asyncio.sleep(0.05)
        await self.close()

    async def close(self) -> None:
        """Drop everything."""
        if hasattr(self, "worker"):
            self.worker.stop()
        self._close_listeners()
        for connection in list(self._connections):
            connection.abort()
        if self.publisher is not None:
            publisher, self.publisher = self.publisher, None
            await publisher.close()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()


def build_engine(config: WorkerConfig) -> Engine:
    return Engine(
        config.cost,
        block_tokens=config.block_tokens,
        blocks=config.kv_blocks,
        prefix_caching=config.prefix_caching,
        priority_scheduling=config.by_priority,
        max_loras=config.max_loras if config.lora else None,
        record_events=config.kv_events is not None,
    )


async def serve(config: WorkerConfig) -> int:
    """Run a worker until SIGTERM or SIGINT. The exit code."""
    loop = asyncio.get_running_loop()
    asked, again = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: again.set() if asked.is_set() else asked.set())
    server = Server(config)
    starting = loop.create_task(server.start())
    stop = loop.create_task(asked.wait())
    await asyncio.wait({starting, stop}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return 0
    try:
        await starting
    except (OSError, TokenizerError) as error:
        stop.cancel()
        log.error("%s", error)
        return 1
    log.info("serving %s at http://%s:%d", ", ".join(config.served_names), config.host, server.port)
    await stop
    leaving = loop.create_task(server.shut_down())
    enough = loop.create_task(again.wait())
    await asyncio.wait({leaving, enough}, return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    enough.cancel()
    await server.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s", stream=sys.stderr)
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except SystemExit as stop:  # argparse: --help, or a syntax error it has reported
        return stop.code if isinstance(stop.code, int) else 2
    if config.ignored:
        log.warning("ignored, without effect on a simulated worker: %s", " ".join(config.ignored))
    return uvloop.run(serve(config))


if __name__ == "__main__":
    sys.exit(main())
