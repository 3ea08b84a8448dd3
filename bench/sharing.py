"""What telling other router replicas costs, in CPU microseconds: a flush with nothing to tell, one with so many workers changed,
and hearing such a message. None of it is on a request's way; the second column of a request is what sharing adds to it.

    python bench/sharing.py
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median

from kvfleet_api.compile import static_fleet
from kvfleet_router.core.dispatcher import Dispatcher, Ticket
from kvfleet_router.core.parse import ParsedRequest
from kvfleet_router.core.sharing import Sharing
from kvfleet_router.policies import REGISTRY

REPEATS = 60
BLOCKS = 128
"""Of a prompt of 32 KiB; half of them are new to its worker."""


def microseconds(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Median CPU time of one call; `before` each, not counted."""
    times = []
    for _ in range(REPEATS):
        before()
        began = time.process_time_ns()
        work()
        times.append(time.process_time_ns() - began)
    return median(times) / 1000


class Router:
    def __init__(self, workers: int, identity: int, *, shares: bool = True) -> None:
        self.now = 0.0
        urls = [f"http://10.0.{number // 250}.{number % 250 + 1}:8000" for number in range(workers)]
        config = static_fleet(urls, "round_robin", "m")
        self.dispatcher = Dispatcher(config, clock=lambda: self.now, rng=random.Random(1), policies=REGISTRY)
        self.sharing = Sharing(self.dispatcher, clock=lambda: self.now, identity=identity) if shares else None
        self.count = 0
        self.tickets: list[Ticket] = []

    def send(self) -> None:
        """One request to the next worker."""
        self.count += 1
        shared = [self.count % 64 * 1000 + number for number in range(BLOCKS // 2)]
        own = [(self.count << 32) + number for number in range(BLOCKS // 2)]
        parsed = ParsedRequest("chat", "m", stream=True, prompt_bytes=32_768, prompt_tokens=8192)
        parsed.block_hashes = shared + own
        ticket = self.dispatcher.submit(parsed, request_id="", on_assigned=lambda result: None)
        assert isinstance(ticket, Ticket)
        self.tickets.append(ticket)

    def request(self) -> None:
        """One request's whole life."""
        self.send()
        ticket = self.tickets.pop()
        self.dispatcher.first_token(ticket)
        self.dispatcher.finish(ticket, output_tokens=100)


def main() -> None:
    print(
        "| workers | flush, nothing to tell | flush, all changed | hear and apply that | request, alone | request, sharing |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for workers in (8, 64, 512):
        one, other = Router(workers, 1), Router(workers, 2)
        assert one.sharing is not None and other.sharing is not None
        for message in one.sharing.flush():
            other.sharing.hear(message)
        told: list[list[bytes]] = []

        def change() -> None:
            for _ in range(workers):  # noqa: B023
                one.send()  # noqa: B023 - called in this turn only
            for ticket in one.tickets:  # noqa: B023
                one.dispatcher.finish(ticket, output_tokens=1)  # noqa: B023
            one.tickets.clear()  # noqa: B023

        idle = microseconds(one.sharing.flush)
        flush = microseconds(lambda: told.append(one.sharing.flush()), change)  # noqa: B023
        hearing = iter(told)

        def hear() -> None:
            for message in next(hearing):  # noqa: B023
                other.sharing.hear(message)  # noqa: B023
            other.sharing.apply()  # noqa: B023

        heard = microseconds(hear)
        alone = Router(workers, 3, shares=False)
        sharing = Router(workers, 4)
        figures = [idle, flush, heard, microseconds(alone.request), microseconds(sharing.request)]
        print(f"| {workers} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
