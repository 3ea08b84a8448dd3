"""The one object the router's io and the simulator talk to. (skeleton: signatures are final)"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from kvfleet_api.fleetconfig import FleetConfig
from kvfleet_router.core.decisions import DecisionLog
from kvfleet_router.core.parse import ParsedRequest
from kvfleet_router.core.policy import Policy
from kvfleet_router.core.ticket import Held, Refusal, Ticket
from kvfleet_router.core.worker import Worker, WorkerEndpoint

__all__ = ["ConfigError", "Dispatcher", "Held", "Refusal", "Ticket", "Worker", "WorkerEndpoint"]

OnAssigned = Callable[[Ticket | Refusal], None]


class ConfigError(ValueError):
    """The configuration cannot be served (raised before anything changed): names the field and the remedy."""


class Dispatcher:
    config: FleetConfig
    decisions: DecisionLog

    def __init__(
        self,
        config: FleetConfig,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        policies: Mapping[str, type[Policy]],
        epoch_s: float = 0.0,
        max_decisions: int = 4096,
    ) -> None:
        """`epoch_s`: what to add to `clock()` for Unix time in decision records."""

    def configure(self, config: FleetConfig) -> None:
        """Take a new configuration. Raises ConfigError with nothing changed."""

    def set_endpoints(self, pool: str, endpoints: Sequence[WorkerEndpoint]) -> None:
        """The pool's workers from now on. Pools with static `endpoints` get them from the configuration itself."""

    def models(self) -> list[str]:
        """Served model and adapter names, pools at zero included; without `*`."""
        raise NotImplementedError

    def submit(self, parsed: ParsedRequest, *, request_id: str, on_assigned: OnAssigned) -> Ticket | Refusal | Held:
        """Route a request. Held: `on_assigned` is called later, exactly once (unless cancelled). It never is for the others."""
        raise NotImplementedError

    def cancel(self, held: Held) -> None:
        """The client went away while queued. `on_assigned` will not be called."""

    def first_token(self, ticket: Ticket) -> None:
        """The first body byte of the answer came."""

    def finish(
        self,
        ticket: Ticket,
        *,
        output_tokens: int | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        ok: bool = True,
    ) -> None:
        """The answer ended. Idempotent. ok=False: the worker failed (counts for its circuit breaker)."""

    def abandon(self, ticket: Ticket, cause: str) -> None:
        """The client went away. Idempotent; not the worker's fault."""

    def retry(self, ticket: Ticket, cause: str, on_assigned: OnAssigned) -> Ticket | Refusal | Held:
        """The worker failed before the first byte: release the ticket, count the failure, choose another worker."""
        raise NotImplementedError

    def tick(self) -> float | None:
        """Queue timeouts, circuit breakers, held requests again. Returns seconds until it wants to be called again, or None."""
        raise NotImplementedError

    def workers(self, pool: str | None = None) -> list[Worker]:
        """The workers now known."""
        raise NotImplementedError

    def queue_depths(self) -> dict[str, int]:
        """Held requests per policy name."""
        raise NotImplementedError

    def pack_target(self, pool: str) -> int:
        """Sequences a worker of the pool should be filled to before another one is used (b*)."""
        raise NotImplementedError
