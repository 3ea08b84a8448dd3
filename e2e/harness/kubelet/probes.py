"""Startup, readiness and liveness probes, with Kubernetes' thresholds.

`attempt` makes one check; `Prober` repeats it with the probe's period and tells when the verdict turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from harness.kubelet.api import Object

Execute = Callable[[list[str], float], Awaitable[tuple[int, str]]]
"""Runs a command in the container: (command, timeout in seconds) → exit code, output."""


class ProbeFailure(Exception):
    """Why a check did not succeed."""


def port_number(port: int | str, container: Object) -> int:
    """Handlers may name one of the container's ports."""
    if isinstance(port, int):
        return port
    named = {entry.get("name"): entry["containerPort"] for entry in container.get("ports") or []}
    if port not in named:
        raise ProbeFailure(f'container "{container["name"]}" has no port named "{port}"')
    return int(named[port])


async def attempt(handler: Object, container: Object, pod_ip: str, execute: Execute, timeout_s: float) -> None:
    """One check by a probe or lifecycle handler. Raises ProbeFailure."""
    if "exec" in handler:
        code, output = await execute(handler["exec"]["command"], timeout_s)
        if code != 0:
            raise ProbeFailure(f"command exited with {code}: {output.strip()}")
    elif "httpGet" in handler:
        await _http_get(handler["httpGet"], container, pod_ip, timeout_s)
    elif "tcpSocket" in handler:
        await _connect(handler["tcpSocket"], container, pod_ip, timeout_s)
    elif "sleep" in handler:
        await asyncio.sleep(handler["sleep"]["seconds"])
    else:
        raise ProbeFailure("the handler is none of exec, httpGet, tcpSocket, sleep")


async def _http_get(action: Object, container: Object, pod_ip: str, timeout_s: float) -> None:
    port = port_number(action["port"], container)
    path = action.get("path", "/")
    url = f"{action.get('scheme', 'HTTP').lower()}://{action.get('host') or pod_ip}:{port}{path}"
    headers = {header["name"]: header["value"] for header in action.get("httpHeaders") or []}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(ssl=False, force_close=True)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            session.get(url, headers={"User-Agent": "kube-probe/e2e", **headers}) as answer,
        ):
            if not 200 <= answer.status < 400:
                raise ProbeFailure(f"GET {url} answered {answer.status}")
    except (aiohttp.ClientError, OSError) as error:
        raise ProbeFailure(f"GET {url}: {error}") from None
    except TimeoutError:
        raise ProbeFailure(f"GET {url}: no answer within {timeout_s} s") from None


async def _connect(action: Object, container: Object, pod_ip: str, timeout_s: float) -> None:
    host, port = action.get("host") or pod_ip, port_number(action["port"], container)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_s)
        writer.close()
    except (OSError, TimeoutError) as error:
        raise ProbeFailure(f"connecting to {host}:{port}: {error or 'timed out'}") from None


class Prober:
    """One probe of one container, from one start to its end."""

    def __init__(self, probe: Object, check: Callable[[float], Awaitable[None]], verdict: bool | None) -> None:
        self._probe = probe
        self._check = check
        self.verdict = verdict
        """What holds until a threshold is passed: readiness begins False, liveness True, startup undecided."""
        self._in_a_row = 0
        self._last: bool | None = None

    async def until_turned(self) -> tuple[bool, str]:
        """Waits until the verdict turns; returns it with the last check's message."""
        while True:
            message = await self._once()
            threshold = self._number("successThreshold", 1) if self._last else self._number("failureThreshold", 3)
            turned = self._last != self.verdict and self._in_a_row >= threshold
            if turned:
                self.verdict = bool(self._last)
                return self.verdict, message
            await asyncio.sleep(self._number("periodSeconds", 10))

    async def initial_delay(self) -> None:
        await asyncio.sleep(self._number("initialDelaySeconds", 0))

    async def _once(self) -> str:
        try:
            await self._check(self._number("timeoutSeconds", 1))
            success, message = True, ""
        except ProbeFailure as failure:
            success, message = False, str(failure)
        self._in_a_row = self._in_a_row + 1 if success == self._last else 1
        self._last = success
        return message

    def _number(self, name: str, default: int) -> Any:
        return self._probe.get(name, default)
