"""The routes of a simulated vLLM server: each handler turns an `Exchange` into an answer, or into a job for the worker."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final
from urllib.parse import parse_qs
from uuid import uuid4

from kvfleet_sim.config import WorkerConfig
from kvfleet_sim.generation import Job, Writer
from kvfleet_sim.http import Exchange
from kvfleet_sim.metrics import PowerMetrics, WorkerMetrics
from kvfleet_sim.models import Models
from kvfleet_sim.openai import ApiError, Fields, Generate, RequestReader, parse_body
from kvfleet_sim.tokens import Tokenizer, TokenizerError, token_array
from kvfleet_sim.worker import Worker

log = logging.getLogger(__name__)

VLLM_VERSION: Final = "0.32.0"
"""The version whose behaviour is simulated."""
GUARDED: Final = ("/v1", "/v2", "/inference", "/cohere")
"""Where --api-key is asked for, and nowhere else."""
MAX_ID_LENGTH: Final = 256
"""Of a client's X-Request-Id, which every chunk of its stream repeats."""
METRICS_TYPE: Final = b"text/plain; version=1.0.0; charset=utf-8"

Handler = Callable[[Exchange], None]


class App:
    def __init__(
        self,
        config: WorkerConfig,
        tokenizer: Tokenizer,
        models: Models,
        worker: Worker,
        metrics: WorkerMetrics,
        power: PowerMetrics,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._models = models
        self._worker = worker
        self._metrics = metrics
        self._power = power
        self._reader = RequestReader(
            tokenizer,
            config.max_model_len,
            auto_tool_choice=config.auto_tool_choice,
            kv_transfer=config.kv_transfer,
        )
        self._writer = Writer(tokenizer, config.block_tokens, config.seed)
        self.shutting_down = False
        self._routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._empty},
            "/ping": {"GET": self._empty, "POST": self._empty},
            "/version": {"GET": lambda exchange: exchange.respond_json(200, {"version": VLLM_VERSION})},
            "/load": {"GET": self._load},
            "/metrics": {"GET": lambda exchange: exchange.respond(200, metrics.exposition(), METRICS_TYPE)},
            "/dcgm/metrics": {"GET": self.dcgm},
            "/v1/models": {"GET": lambda exchange: exchange.respond_json(200, models.list())},
            "/v1/chat/completions": {"POST": self._generate(self._reader.chat, "chatcmpl")},
            "/v1/completions": {"POST": self._generate(self._reader.completion, "cmpl")},
            "/v1/embeddings": {"POST": self._generate(self._reader.embedding, "embd")},
            "/v1/chat/completions/render": {"POST": self._scale_out},
            "/v1/completions/render": {"POST": self._scale_out},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/reset_prefix_cache": {"POST": self._reset_prefix_cache},
        }
        if config.kv_events is not None:
            self._routes["/kv_event_sources"] = {"GET": self._kv_event_sources}
        if config.lora:
            self._routes["/v1/load_lora_adapter"] = {"POST": self._lora(models.load)}
            self._routes["/v1/unload_lora_adapter"] = {"POST": self._lora(models.unload)}

    def __call__(self, exchange: Exchange) -> None:
        """Answer one request; whatever goes wrong is an answer too."""
        guarded = exchange.path.startswith(GUARDED)
        if guarded and self._config.api_keys and not self._authorized(exchange):
            exchange.respond(401, b'{"error":"Unauthorized"}')
            return
        exchange.extra_headers.append((b"vary", b"Origin"))
        if self._config.request_id_headers:
            request_id = exchange.headers.get(b"x-request-id") or uuid4().hex.encode()
            exchange.extra_headers.append((b"x-request-id", request_id))
        handlers = self._routes.get(exchange.path)
        if handlers is None:
            exchange.respond(404, b'{"detail":"Not Found"}')
            return
        handler = handlers.get(exchange.method)
        if handler is None:
            allowed = ", ".join(handlers).encode()
            exchange.respond(405, b'{"detail":"Method Not Allowed"}', headers=[(b"allow", allowed)])
            return
        try:
            handler(exchange)
        except ApiError as error:
            if error.status == 500:  # raised outside of the middleware that adds these
                exchange.extra_headers.clear()
            exchange.respond_json(error.status, error.body)
        except Exception:
            log.exception("%s %s failed", exchange.method, exchange.path)
            if exchange.finished:
                return
            exchange.respond_json(500, ApiError(500, "Internal server error", "InternalServerError").body)

    def dcgm_exporter(self, exchange: Exchange) -> None:
        """The application of --dcgm-port."""
        if exchange.path == "/metrics":
            self.dcgm(exchange)
        else:
            exchange.respond_text(404, "see /metrics")

    def dcgm(self, exchange: Exchange) -> None:
        exchange.respond(200, self._power.exposition(self._worker.now_s), METRICS_TYPE)

    def _authorized(self, exchange: Exchange) -> bool:
        scheme, _, key = exchange.headers.get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(key, known.encode()) for known in self._config.api_keys]
        return scheme.lower() == b"bearer" and any(matches)

    def _empty(self, exchange: Exchange) -> None:
        exchange.respond(200, b"", None)

    def _load(self, exchange: Exchange) -> None:
        load = self._worker.jobs if self._config.server_load_tracking else 0
        exchange.respond_json(200, {"server_load": load})

    def _scale_out(self, exchange: Exchange) -> None:
        message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
        raise ApiError(403, message, "PermissionDeniedError")

    def _body(self, exchange: Exchange) -> dict[str, Any]:
        return parse_body(exchange.body, exchange.headers.get(b"content-type", b""))

    def _generate(self, read: Callable[[dict[str, Any], str], Generate], prefix: str) -> Handler:
        def handle(exchange: Exchange) -> None:
            values = self._body(exchange)
            if self.shutting_down:
                raise ApiError(500, "cannot schedule new futures after shutdown", "InternalServerError")
            rank = exchange.headers.get(b"x-data-parallel-rank", b"0")
            if rank != b"0":
                raise ApiError(400, f"data_parallel_rank {rank.decode('latin-1')} is out of range [0, 1).")
            name, lora = self._models.resolve(Fields(values).string("model"))
            asked_id = exchange.headers.get(b"x-request-id", b"").decode("latin-1")[:MAX_ID_LENGTH]
            job = Job(f"{prefix}-{asked_id or uuid4().hex[:16]}", read(values, name), exchange)
            self._writer.add_choices(job, lora)
            try:
                self._worker.submit(job)
            except ValueError as error:
                raise ApiError(400, str(error)) from None

        return handle

    def _tokenize(self, exchange: Exchange) -> None:
        values = self._body(exchange)
        fields = Fields(values)
        self._models.resolve(fields.string("model"))
        if "messages" in values:
            tokens = self._reader.chat_prompt(fields)
        else:
            fields.required_string("prompt")
            tokens = self._reader.prompt(values["prompt"])
        strings = self._tokenizer.strings(tokens) if fields.boolean("return_token_strs") else None
        length = self._config.max_model_len
        answer = {"count": len(tokens), "max_model_len": length, "tokens": tokens.tolist(), "token_strs": strings}
        exchange.respond_json(200, answer)

    def _detokenize(self, exchange: Exchange) -> None:
        fields = Fields(self._body(exchange))
        self._models.resolve(fields.string("model"))
        try:
            tokens = token_array(fields.array("tokens"))
        except TokenizerError as error:
            raise ApiError(400, f"{error} (parameter=tokens)", param="tokens") from None
        exchange.respond_json(200, {"prompt": self._tokenizer.decode(tokens)})

    def _reset_prefix_cache(self, exchange: Exchange) -> None:
        wanted = parse_qs(exchange.query).get("reset_running_requests", ["false"])[0].lower()
        done = self._worker.engine.clear_prefix_cache(preempt=wanted in ("true", "1"))
        exchange.respond_json(200, {"success": done})

    def _lora(self, change: Callable[[dict[str, Any]], str]) -> Handler:
        def handle(exchange: Exchange) -> None:
            exchange.respond_text(200, change(self._body(exchange)), None)

        return handle

    def _kv_event_sources(self, exchange: Exchange) -> None:
        assert self._config.kv_events is not None
        fields = asdict(self._config.kv_events)
        order = ("endpoint", "replay_endpoint", "buffer_steps", "hwm", "max_queue_size", "topic")
        head = {"enable_kv_cache_events": True, "publisher": "zmq"}
        exchange.respond_json(200, {"0": head | {name: fields[name] for name in order}})
