"""The kubelet's own HTTPS server: container logs, as the API server asks for them, and levers for tests.

    GET  /containerLogs/NAMESPACE/POD/CONTAINER   `kubectl logs`, with --follow, --previous, --tail
    POST /e2e/signal/NAMESPACE/POD/CONTAINER?number=9
    POST /e2e/cut/NAMESPACE/POD
    POST /e2e/nodes/NODE/fail, /e2e/nodes/NODE/recover

It listens inside the cluster's network namespace, where only the cluster and its tests are, and asks nobody who they are.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from aiohttp import web

from harness import network
from harness.kubelet.config import KubeletConfig
from harness.kubelet.container import Container
from harness.kubelet.manager import Manager

FOLLOW_EVERY_S = 0.1


class Server:
    def __init__(self, config: KubeletConfig, manager: Manager) -> None:
        self._config = config
        self._manager = manager

    async def run(self) -> None:
        application = web.Application()
        application.add_routes(
            [
                web.get("/containerLogs/{namespace}/{pod}/{container}", self._logs),
                web.post("/e2e/signal/{namespace}/{pod}/{container}", self._signal),
                web.post("/e2e/cut/{namespace}/{pod}", self._cut),
                web.post("/e2e/nodes/{node}/{action:fail|recover}", self._node),
            ]
        )
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._config.certificate_file, self._config.key_file)
        try:
            await web.TCPSite(runner, self._config.node_ip, self._config.port, ssl_context=context).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    def _container(self, request: web.Request) -> Container:
        found = request.match_info
        container = self._manager.container(found["namespace"], found["pod"], found["container"])
        if container is None:
            raise web.HTTPNotFound(text=f"no such container: {request.path}")
        return container

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        container = self._container(request)
        start = container.restart_count - (request.query.get("previous") == "true")
        path = container.log_file_of(start)
        if start < 0 or not path.exists():
            raise web.HTTPBadRequest(text=f"container {container.name} has no log of start {start}")
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        with path.open("rb") as file:
            await response.write(_tail(file.read(), request.query.get("tailLines")))
            while request.query.get("follow") == "true" and _goes_on(container, path):
                await asyncio.sleep(FOLLOW_EVERY_S)
                await response.write(file.read())
        return response

    async def _signal(self, request: web.Request) -> web.Response:
        if not self._container(request).signal(int(request.query["number"])):
            raise web.HTTPConflict(text="the container does not run")
        return web.Response()

    async def _cut(self, request: web.Request) -> web.Response:
        worker = self._manager.find(request.match_info["namespace"], request.match_info["pod"])
        if worker is None:
            raise web.HTTPNotFound(text=f"no such pod: {request.path}")
        try:
            await worker.cut_connections()
        except network.NetworkError as error:
            raise web.HTTPConflict(text=str(error)) from None
        return web.Response()

    async def _node(self, request: web.Request) -> web.Response:
        node = request.match_info["node"]
        if not self._manager.has_node(node):
            raise web.HTTPNotFound(text=f"no such node: {node}")
        if request.match_info["action"] == "fail":
            await self._manager.fail_node(node)
        else:
            await self._manager.recover_node(node)
        return web.Response()


def _tail(content: bytes, lines: str | None) -> bytes:
    if lines is None:
        return content
    kept = content.splitlines(keepends=True)
    return b"".join(kept[max(len(kept) - int(lines), 0) :])


def _goes_on(container: Container, path: Path) -> bool:
    return "running" in container.state and container.log_file == path
