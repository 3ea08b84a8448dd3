"""GET /v1/models: the models and adapters of every pool, whether it has workers or is at zero.

A pool that takes any model (`*`: workers given as bare URLs) does not know its models' names; its workers are asked, and
what they say is kept for a few seconds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import unquote

import httpx
import orjson

from kvfleet_router.core.dispatcher import Dispatcher
from kvfleet_router.io import wire
from kvfleet_router.io.connection import ClientConnection, Waiting
from kvfleet_router.io.tls import CertificateRejected, WorkerTrusts

log = logging.getLogger("kvfleet.router")

ANY_MODEL = "*"
ASK_TIMEOUT_S = 2.0
KEEP_S = 10.0
MAX_ASKED_BYTES = 1_048_576

Spawn = Callable[[Coroutine[Any, Any, None]], None]
Entry = dict[str, Any]


class ModelList:
    """Answers for one router."""

    def __init__(self, dispatcher: Dispatcher, trusts: WorkerTrusts) -> None:
        self._dispatcher = dispatcher
        self._trusts = trusts
        self._created = int(time.time())
        self._asked: list[Entry] = []
        self._asked_at = float("-inf")

    def answer(self, model: str, connection: ClientConnection, spawn: Spawn) -> None:
        """Reply with the list (`model` empty) or with one model (percent-encoded, as in the path)."""
        if self._any_model_pools() and time.monotonic() - self._asked_at > KEEP_S:
            waiting = Waiting()
            connection.answer = waiting
            spawn(self._ask_and_reply(model, connection, waiting))
        else:
            self._reply(model, connection)

    def entries(self) -> list[Entry]:
        """OpenAI's model objects, in the pools' order; a name appears once."""
        found: dict[str, Entry] = {}
        for pool in self._dispatcher.config.pools:
            if pool.model == ANY_MODEL:
                continue
            found.setdefault(pool.model, self._entry(pool.model, None, pool.max_context_tokens))
            for adapter in pool.adapters:
                found.setdefault(adapter, self._entry(adapter, pool.model, pool.max_context_tokens))
        if self._any_model_pools():
            for entry in self._asked:
                found.setdefault(entry["id"], entry)
        return list(found.values())

    def _entry(self, name: str, parent: str | None, max_model_len: int | None) -> Entry:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "kvfleet",
            "root": parent or name,
            "parent": parent,
            "max_model_len": max_model_len,
        }

    def _reply(self, model: str, connection: ClientConnection) -> None:
        entries = self.entries()
        if not model:
            connection.reply(200, orjson.dumps({"object": "list", "data": entries}))
            return
        name = unquote(model)
        for entry in entries:
            if entry["id"] == name:
                connection.reply(200, orjson.dumps(entry))
                return
        message = f"The model `{name}` does not exist: GET /v1/models lists those that do."
        connection.reply(404, wire.error_object(404, message, param="model", code="model_not_found"))

    def _any_model_pools(self) -> list[str]:
        return [pool.name for pool in self._dispatcher.config.pools if pool.model == ANY_MODEL]

    async def _ask_and_reply(self, model: str, connection: ClientConnection, waiting: Waiting) -> None:
        pools = await asyncio.gather(*map(self._ask_pool, self._any_model_pools()))
        self._asked = [entry for entries in pools for entry in entries]
        self._asked_at = time.monotonic()
        if not waiting.gone:
            self._reply(model, connection)

    async def _ask_pool(self, pool: str) -> list[Entry]:
        workers, trust = self._dispatcher.workers(pool), self._trusts.of(pool)
        try:
            client = httpx.AsyncClient(timeout=ASK_TIMEOUT_S, verify=trust.context)
        except CertificateRejected as error:
            log.info("pool %s was not asked for its models: %s", pool, error)
            return []
        async with client:
            answers = await asyncio.gather(*(_ask(client, worker.url, trust.server_name) for worker in workers))
        return [entry for entries in answers for entry in entries]


async def _ask(client: httpx.AsyncClient, url: str, server_name: str | None) -> list[Entry]:
    """One worker's models; none where it does not answer as an engine does."""
    try:
        extensions = {} if server_name is None else {"sni_hostname": server_name}
        answer = await client.get(f"{url}/v1/models", extensions=extensions)
        if answer.status_code != 200 or len(answer.content) > MAX_ASKED_BYTES:
            return []
        data = orjson.loads(answer.content)["data"]
        return [entry for entry in data if isinstance(entry["id"], str)]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        log.info("worker %s was asked for its models: %r", url, error)
        return []
