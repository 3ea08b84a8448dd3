"""The kubelet's client of the API server: JSON objects over aiohttp, and watches that survive everything.

`Reflector` keeps a copy of a list of objects: list, then watch from that version on; when the watch ends or the server
no longer has the version, list again and report the difference. Its consumer sees every object's latest state at least
once, and every deletion.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import aiohttp

Object = dict[str, Any]
Key = tuple[str, str]
"""Namespace and name."""
Change = Literal["ADDED", "MODIFIED", "DELETED"]

log = logging.getLogger(__name__)


class ApiError(Exception):
    """The API server's refusal."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status


def key_of(item: Object) -> Key:
    metadata = item["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


class Api:
    """Requests with the kubelet's own credentials. An async context manager."""

    def __init__(self, server: str, ca_file: str, token: str) -> None:
        self._server = server
        self._ca_file = ca_file
        self._headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}

    async def __aenter__(self) -> Api:
        context = ssl.create_default_context(cafile=self._ca_file)
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(ssl=context, limit=0),
            timeout=aiohttp.ClientTimeout(total=15),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, path: str, **parameters: str) -> Object:
        return await self._request("GET", path, None, "", parameters)

    async def create(self, path: str, body: Object) -> Object:
        return await self._request("POST", path, body, "application/json", {})

    async def replace(self, path: str, body: Object) -> Object:
        return await self._request("PUT", path, body, "application/json", {})

    async def patch(self, path: str, body: Object) -> Object:
        return await self._request("PATCH", path, body, "application/strategic-merge-patch+json", {})

    async def delete(self, path: str, body: Object) -> Object:
        return await self._request("DELETE", path, body, "application/json", {})

    async def _request(
        self, method: str, path: str, body: Object | None, content_type: str, parameters: dict[str, str]
    ) -> Object:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": content_type} if body is not None else {}
        async with self._session.request(
            method, self._server + path, data=data, headers=headers, params=parameters
        ) as answer:
            return _checked(answer.status, await answer.read())

    async def watch(self, path: str, **parameters: str) -> AsyncIterator[tuple[str, Object]]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=400)
        parameters |= {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": "300"}
        async with self._session.get(self._server + path, params=parameters, timeout=timeout) as answer:
            if answer.status != 200:
                _checked(answer.status, await answer.read())
            buffer = b""
            async for chunk in answer.content.iter_any():
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    yield event["type"], event["object"]


def _checked(status: int, body: bytes) -> Object:
    content: Object = json.loads(body or b"{}")
    if status >= 400:
        raise ApiError(status, content.get("reason", ""), content.get("message", ""))
    return content


class Reflector:
    """A local copy of the objects under one path."""

    def __init__(
        self, api: Api, path: str, on_change: Callable[[Change, Object], None] | None = None, **parameters: str
    ) -> None:
        self.items: dict[Key, Object] = {}
        self.synced = asyncio.Event()
        self._api = api
        self._path = path
        self._parameters = parameters
        self._on_change = on_change

    async def run(self) -> None:
        """Until cancelled. Failures are retried: the API server may be restarting."""
        while True:
            try:
                version = await self._list()
                self.synced.set()
                await self._follow(version)
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError, json.JSONDecodeError) as error:
                log.warning("watch of %s: %s; listing again", self._path, error)
                await asyncio.sleep(0.5)

    async def _list(self) -> str:
        answer = await self._api.get(self._path, **self._parameters)
        listed = {key_of(item): item for item in answer["items"]}
        for key in [key for key in self.items if key not in listed]:
            self._apply("DELETED", self.items[key])
        for item in listed.values():
            self._apply("ADDED", item)
        return str(answer["metadata"]["resourceVersion"])

    async def _follow(self, version: str) -> None:
        async for kind, item in self._api.watch(self._path, resourceVersion=version, **self._parameters):
            if kind == "ERROR":  # 410 Gone: the version is too old.
                return
            if kind in ("ADDED", "MODIFIED", "DELETED"):
                self._apply(kind, item)  # type: ignore[arg-type]

    def _apply(self, change: Change, item: Object) -> None:
        if change == "DELETED":
            self.items.pop(key_of(item), None)
        else:
            known = self.items.get(key_of(item))
            if known is not None and known["metadata"]["uid"] != item["metadata"]["uid"] and self._on_change:
                self._on_change("DELETED", known)  # Deleted and made anew between two lists.
            self.items[key_of(item)] = item
        if self._on_change:
            self._on_change(change, item)
