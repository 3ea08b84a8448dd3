"""Files that change while the router runs: configuration, API keys, certificates.

Polled, not subscribed to: it works on every file system, and for what kubelets do (a directory swapped by a symlink).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.5

Stamp = tuple[int, int, int] | None


class WatchedFiles:
    """Tells whether any of some files changed since it was last asked. At first all have."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._seen: list[Stamp] = []

    def changed(self) -> bool:
        stamps = [_stamp(path) for path in self._paths]
        changed = stamps != self._seen
        self._seen = stamps
        return changed

    async def follow(self, on_change: Callable[[], None], *, poll_s: float = POLL_S) -> None:
        """Call `on_change` for each change, until cancelled."""
        while True:
            if self.changed():
                on_change()
            await asyncio.sleep(poll_s)


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def read_bounded(path: Path, limit: int) -> bytes:
    """The file's content. Raises OSError, and ValueError where it is larger than `limit` bytes."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"is larger than {limit} bytes: is this the right file?")
    return content
