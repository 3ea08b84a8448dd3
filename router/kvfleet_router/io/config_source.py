"""Where the configuration and the workers' addresses come from, and how they change while the router runs.

A source is started with a Sink and calls it with every change; the sink says whether it could be taken. Sources never end
the router: what cannot be read is reported, and the last good configuration stays.

    StaticSource   the configuration the router was started with, and nothing more
    FileSource     a compiled FleetConfig in a file, read again when it changes (by replacement or in place; a mounted
                   ConfigMap changes by a symlink). Polled: it works on every file system
    KubernetesSource (kubernetes.py)  a ConfigMap and EndpointSlices, watched at the API server
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from prometheus_client.core import Metric
from pydantic import ValidationError

from kvfleet_api.fleetconfig import FleetConfig, PoolConfig
from kvfleet_router.core.dispatcher import WorkerEndpoint
from kvfleet_router.io.files import POLL_S, WatchedFiles, read_bounded

log = logging.getLogger("kvfleet.router")

MAX_CONFIG_BYTES = 16 * 1_048_576


class ConfigRejected(Exception):
    """A configuration cannot be served; says the field and the remedy. The old one stays."""


class Sink(Protocol):
    """Takes what a source finds."""

    def take_config(self, config: FleetConfig) -> None:
        """Serve this configuration from now on; the one already served is no change. Raises ConfigRejected."""

    def take_endpoints(self, pool: str, endpoints: Sequence[WorkerEndpoint]) -> None:
        """These are the pool's workers from now on."""

    def reject_config(self, reason: str) -> None:
        """A configuration came that cannot be read."""

    def pools_to_wake(self) -> Sequence[PoolConfig]:
        """Pools at zero that requests wait for."""


class ConfigSource(Protocol):
    async def run(self, sink: Sink) -> None:
        """Feed `sink` until cancelled."""

    @property
    def unready(self) -> str:
        """Why the router should get no requests yet; empty: it should."""
        return ""

    def metrics(self) -> Iterable[Metric]:
        """What to show about the source itself."""
        return ()


class StaticSource(ConfigSource):
    async def run(self, sink: Sink) -> None:
        """Nothing changes."""


class FileSource(ConfigSource):
    """See the module's text."""

    def __init__(
        self, path: Path, *, adapt: Callable[[FleetConfig], FleetConfig] | None = None, poll_s: float = POLL_S
    ) -> None:
        """`adapt` is applied to whatever is read: what a command line says beside the file."""
        self._path = path
        self._adapt = adapt
        self._poll_s = poll_s

    async def run(self, sink: Sink) -> None:
        # The first look comes at once: the file may have changed since the router was given its content.
        await WatchedFiles(self._path).follow(lambda: self._read(sink), poll_s=self._poll_s)

    def _read(self, sink: Sink) -> None:
        try:
            config = read_config(self._path)
            sink.take_config(self._adapt(config) if self._adapt else config)
        except ConfigRejected as error:
            sink.reject_config(f"{self._path}: {error}")


def read_config(path: Path) -> FleetConfig:
    """A compiled FleetConfig. Raises ConfigRejected."""
    try:
        text = read_bounded(path, MAX_CONFIG_BYTES)
    except OSError as error:
        raise ConfigRejected(f"cannot be read ({error.strerror}): the last configuration stays in use") from error
    except ValueError as error:
        raise ConfigRejected(str(error)) from error
    return parse_config(text)


def parse_config(text: bytes | str) -> FleetConfig:
    """A compiled FleetConfig. Raises ConfigRejected."""
    try:
        return FleetConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "(document)"
        raise ConfigRejected(f"{field}: {first['msg']}: write it with the operator's version") from error
