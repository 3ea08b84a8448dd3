"""An API server of two collections, over TLS and real sockets, which fails exactly as a test says.

It keeps a history, so that a watch goes on from any version that is not forgotten, and honours the selectors the router
uses. `once` puts an answer of the test's own in the place of the next one of its kind.
"""

from __future__ import annotations

import asyncio
import copy
import re
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import orjson
import trustme

from kvfleet_api.fleetconfig import FLEET_CONFIG_KEY, FleetConfig
from kvfleet_router.io.kubernetes_access import Access, in_cluster
from kvfleet_router.io.kubernetes_slices import SERVICE_LABEL
from kvfleet_router.io.kubernetes_watch import Timings

Manifest = dict[str, Any]
CONFIG_MAPS = "/api/v1/namespaces/inference/configmaps"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/inference/endpointslices"
QUICK = Timings(connect_s=2.0, list_s=2.0, stalled_s=20.0, brief_s=0.0, backoff_s=(0.002, 0.02))
"""Failures are got over quickly."""


@dataclass
class Call:
    """A request as the server got it."""

    path: str
    query: dict[str, str]
    token: str
    method: str = "GET"
    length: int = 0
    body: bytes = b""
    at: float = field(default_factory=time.monotonic)

    @property
    def watch(self) -> bool:
        return "watch" in self.query


class Watch:
    """A running watch."""

    def __init__(self, call: Call, writer: asyncio.StreamWriter) -> None:
        self.call = call
        self.writer = writer
        self.over = asyncio.Event()

    def send(self, kind: str, item: Manifest) -> None:
        self.send_raw(orjson.dumps({"type": kind, "object": item}) + b"\n")

    def send_raw(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        """In good order, as at the end of `timeoutSeconds`."""
        self.writer.write(b"0\r\n\r\n")
        self.over.set()

    def cut(self) -> None:
        """As when the server or the network dies."""
        self.writer.transport.abort()
        self.over.set()


Behaviour = Callable[[Call, asyncio.StreamWriter], Awaitable[None]]


def answering(status: int, body: object = None, *headers: bytes) -> Behaviour:
    """A behaviour: this answer."""

    async def behave(call: Call, writer: asyncio.StreamWriter) -> None:
        _reply(writer, status, body or {"kind": "Status", "code": status, "message": f"says {status}"}, *headers)

    return behave


def saying(data: bytes) -> Behaviour:
    """A behaviour: a watch in which these bytes come, and then nothing until the client goes."""

    async def behave(call: Call, writer: asyncio.StreamWriter) -> None:
        writer.write(WATCH_HEAD)
        if data:
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.wait_closed()

    return behave


WATCH_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


def _reply(writer: asyncio.StreamWriter, status: int, body: object, *headers: bytes) -> None:
    data = orjson.dumps(body)
    lines = b"".join(line + b"\r\n" for line in headers)
    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n%b\r\n%b" % (status, len(data), lines, data))


@dataclass
class FakeApi:
    calls: list[Call] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)
    """Those running."""
    tokens: set[str] = field(default_factory=lambda: {"token-1"})
    connections: int = 0
    ca: trustme.CA = field(default_factory=trustme.CA)
    port: int = 0
    _objects: dict[str, dict[str, Manifest]] = field(default_factory=lambda: {CONFIG_MAPS: {}, SLICES: {}})
    _history: list[tuple[int, str, str, Manifest]] = field(default_factory=list)
    _version: int = 100
    _forgotten: int = 0
    scales: dict[str, Manifest] = field(default_factory=dict)
    """By the path of the subresource."""
    scripts: list[tuple[str, bool, Behaviour]] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    # Life

    async def start(self, ca: trustme.CA | None = None) -> None:
        """Again after `stop`: on the same port. `ca`: whose certificate to show."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (ca or self.ca).issue_cert("127.0.0.1").configure_cert(tls)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=tls, limit=1 << 24)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Vanish: refuse connections, reset those that are open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        while self._writers:  # noqa: ASYNC110 - the handlers see it in their own time
            await asyncio.sleep(0)

    def mount(self, folder: Path, token: str = "token-1") -> Access:
        """A pod's service account folder, and the access it gives."""
        folder.mkdir(exist_ok=True)
        self.ca.cert_pem.write_to_path(str(folder / "ca.crt"))
        (folder / "token").write_text(token + "\n")
        (folder / "namespace").write_text("inference")
        environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}
        return in_cluster(environment, folder)

    # Objects

    def put(self, path: str, item: Manifest) -> Manifest:
        """Create or replace an object; running watches are told."""
        name = item["metadata"]["name"]
        kind = "MODIFIED" if name in self._objects[path] else "ADDED"
        return self._changed(path, kind, copy.deepcopy(item))

    def delete(self, path: str, name: str) -> None:
        self._changed(path, "DELETED", self._objects[path][name])

    def _changed(self, path: str, kind: str, item: Manifest) -> Manifest:
        self._version += 1
        item = {**item, "metadata": {**item["metadata"], "resourceVersion": str(self._version)}}
        name = item["metadata"]["name"]
        if kind == "DELETED":
            del self._objects[path][name]
        else:
            self._objects[path][name] = item
        self._history.append((self._version, path, kind, item))
        for watch in self.watching(path):
            if _selected(watch.call, item):
                watch.send(kind, item)
        return item

    def bookmark(self, path: str) -> str:
        """Tell running watches how far they are; returns the version."""
        self._version += 1
        for watch in self.watching(path):
            watch.send("BOOKMARK", {"metadata": {"resourceVersion": str(self._version)}})
        return str(self._version)

    def forget(self) -> None:
        """What happened until now cannot be watched any more."""
        self._history.clear()
        self._version += 1
        self._forgotten = self._version

    def watching(self, path: str) -> list[Watch]:
        return [watch for watch in self.watches if watch.call.path == path]

    def calls_of(self, path: str, *, watch: bool) -> list[Call]:
        return [call for call in self.calls if call.path == path and call.watch == watch]

    def once(self, path: str, behaviour: Behaviour, *, watch: bool, times: int = 1) -> None:
        """The next list or watch of `path` is answered so."""
        self.scripts += [(path, watch, behaviour)] * times

    # Serving

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                call = _call(head)
                call.body = await reader.readexactly(call.length)
                await self._answer(call, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.calls.append(call)
        for script in self.scripts:
            if script[:2] == (call.path, call.watch):
                self.scripts.remove(script)
                await script[2](call, writer)
                return
        if call.token not in self.tokens:
            _reply(writer, 401, {"kind": "Status", "code": 401, "message": "Unauthorized"})
        elif call.path.endswith("/scale"):
            self._answer_scale(call, writer)
        elif not call.watch:
            self.answer_list(call, writer)
        elif int(call.query["resourceVersion"]) < self._forgotten:
            _reply(writer, 410, {"kind": "Status", "code": 410, "message": "too old resource version"})
        else:
            await self._watch(call, reader, writer)

    def answer_list(self, call: Call, writer: asyncio.StreamWriter) -> None:
        items = [item for item in self._objects[call.path].values() if _selected(call, item)]
        start, limit = int(call.query.get("continue", "0")), int(call.query["limit"])
        metadata = {"resourceVersion": str(self._version)}
        if start + limit < len(items):
            metadata["continue"] = str(start + limit)
        _reply(writer, 200, {"metadata": metadata, "items": items[start : start + limit]})

    def _answer_scale(self, call: Call, writer: asyncio.StreamWriter) -> None:
        """As autoscaling/v1 has it: no replicas are not mentioned."""
        scale = self.scales.get(call.path)
        if scale is None:
            _reply(writer, 404, {"kind": "Status", "code": 404, "message": "not found"})
            return
        if call.method == "PATCH":
            patch = orjson.loads(call.body)
            if patch["metadata"]["resourceVersion"] != scale["metadata"]["resourceVersion"]:
                _reply(writer, 409, {"kind": "Status", "code": 409, "message": "the object has been modified"})
                return
            scale = self.put_scale(call.path, patch["spec"]["replicas"])
        _reply(writer, 200, scale)

    def put_scale(self, path: str, replicas: int) -> Manifest:
        self._version += 1
        metadata = {"name": path.split("/")[-2], "resourceVersion": str(self._version)}
        self.scales[path] = {"metadata": metadata, "spec": {"replicas": replicas} if replicas else {}}
        return self.scales[path]

    def replicas(self, path: str) -> int:
        return int(self.scales[path]["spec"].get("replicas", 0))

    async def _watch(self, call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        watch = Watch(call, writer)
        writer.write(WATCH_HEAD)
        for version, path, kind, item in self._history:
            if version > int(call.query["resourceVersion"]) and path == call.path and _selected(call, item):
                watch.send(kind, item)
        self.watches.append(watch)
        gone = asyncio.ensure_future(reader.read(1))
        over = asyncio.ensure_future(watch.over.wait())
        try:
            await asyncio.wait((gone, over), return_when=asyncio.FIRST_COMPLETED)
            if not watch.over.is_set():
                writer.close()
        finally:
            self.watches.remove(watch)
            for task in (gone, over):
                task.cancel()
            await asyncio.gather(gone, over, return_exceptions=True)


def _call(head: str) -> Call:
    line, *lines = head.split("\r\n")
    target = urlsplit(line.split(" ")[1])
    headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines if text)}
    token = headers.get("authorization", "").removeprefix("Bearer ")
    length = int(headers.get("content-length", "0"))
    return Call(target.path, dict(parse_qsl(target.query)), token, line.split(" ")[0], length)


def _selected(call: Call, item: Manifest) -> bool:
    metadata = item["metadata"]
    if field_selector := call.query.get("fieldSelector"):
        return bool(field_selector == f"metadata.name={metadata['name']}")
    match = re.fullmatch(rf"{SERVICE_LABEL} in \(([-a-z0-9,]+)\)", call.query["labelSelector"])
    assert match, call.query
    return metadata["labels"][SERVICE_LABEL] in match[1].split(",")


# Objects


def config_map(config: FleetConfig | str) -> Manifest:
    text = config if isinstance(config, str) else config.to_json()
    return {"metadata": {"name": "router", "namespace": "inference"}, "data": {FLEET_CONFIG_KEY: text}}


def endpoint_slice(pod: str, port: int, *, service: str = "pool-workers", **conditions: bool | None) -> Manifest:
    """One pod on the loopback; as the API server writes it, null where nothing is said."""
    return {
        "metadata": {"name": f"{service}-{pod}", "labels": {SERVICE_LABEL: service}, "generation": 1},
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": ["127.0.0.1"],
                "conditions": {"ready": True, "serving": True, "terminating": False, **conditions},
                "nodeName": "node-0",
                "targetRef": {"kind": "Pod", "name": pod, "namespace": "inference", "uid": "1"},
            }
        ],
        "ports": [
            {"name": "kv-events", "port": 5557, "protocol": "TCP"},
            {"name": "http", "port": port, "protocol": "TCP"},
        ],
    }
