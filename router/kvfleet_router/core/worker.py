"""One worker as the router knows it. (skeleton: public attributes are final)"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerEndpoint:
    """Where a worker is, and whether it may get requests."""

    name: str
    url: str
    """`http://host:port`, no path."""
    ready: bool = True
    terminating: bool = False


class Worker:
    name: str
    url: str
    host: str
    port: int
    pool: str
    ready: bool
    terminating: bool
    in_flight: int
    """Requests sent and not finished."""

    @property
    def state(self) -> str:
        """ready | not_ready | terminating | ejected (circuit open)."""
        raise NotImplementedError
