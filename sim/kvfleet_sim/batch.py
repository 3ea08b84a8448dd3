"""The requests of an engine by what happens to them next: the waiting queue and the decoding batch. Pure.

All decoding requests advance one token in every step, so what happens to one, and in which step, is known when it joins:
`DecodeBatch` files it under the step numbers (modulo the block size) at which it needs a new block, and under the step that
finishes it. A step then looks at those requests only, and runs of steps can be taken at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator

from kvfleet_sim.request import Request, State


class WaitingQueue:
    """First come first served, or by priority (lower first) and then by arrival. A preempted request keeps its place."""

    __slots__ = ("_by_priority", "_heap")

    def __init__(self, *, by_priority: bool) -> None:
        self._by_priority = by_priority
        self._heap: list[tuple[int, int, Request]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return (entry[2] for entry in self._heap)

    @property
    def first(self) -> Request:
        return self._heap[0][2]

    def push(self, request: Request) -> None:
        request.state = State.WAITING
        heapq.heappush(self._heap, (request.priority if self._by_priority else 0, request.order, request))

    def pop(self) -> Request:
        return heapq.heappop(self._heap)[2]

    def remove(self, request: Request) -> None:
        self._heap = [entry for entry in self._heap if entry[2] is not request]
        heapq.heapify(self._heap)


class DecodeBatch:
    """The decoding requests and the number of steps done."""

    __slots__ = ("_block_starts", "_block_tokens", "_ends", "_ends_order", "context_tokens", "count", "steps")

    def __init__(self, block_tokens: int) -> None:
        self.steps = 0
        self.count = 0
        self.context_tokens = 0  # prompt and output tokens of all of them
        self._block_tokens = block_tokens
        self._block_starts: list[dict[Request, None]] = [{} for _ in range(block_tokens)]
        self._ends: dict[int, dict[Request, None]] = {}  # number of steps done -> requests finished by then
        self._ends_order: list[int] = []  # heap of the keys of _ends, some of them stale

    def join(self, request: Request) -> None:
        """A request whose last token came out of step number `steps` - 1."""
        request.state = State.DECODE
        request.joined_step = self.steps
        self.count += 1
        self.context_tokens += request.prompt_tokens + request.generated
        self._block_starts[self._residue(request)][request] = None
        end = request.joined_step + request.output_tokens - request.generated
        if end not in self._ends:
            self._ends[end] = {}
            heapq.heappush(self._ends_order, end)
        self._ends[end][request] = None

    def leave(self, request: Request) -> None:
        """Take a request out; its `generated` is brought up to date."""
        del self._block_starts[self._residue(request)][request]
        ends = self._ends.get(request.joined_step + request.output_tokens - request.generated)
        if ends is not None:
            ends.pop(request, None)
        request.generated = self.generated(request)
        self.count -= 1
        self.context_tokens -= request.prompt_tokens + request.generated

    def generated(self, request: Request) -> int:
        return request.generated + self.steps - request.joined_step

    def tick(self, steps: int) -> None:
        """So many steps were done."""
        self.steps += steps
        self.context_tokens += steps * self.count

    def starting_block(self, step: int) -> Collection[Request]:
        """The requests whose token of step number `step` is the first of a block."""
        return self._block_starts[step % self._block_tokens]

    def filling_block(self, step: int) -> Collection[Request]:
        """The requests whose token of step number `step` is the last of a block."""
        return self._block_starts[(step + 1) % self._block_tokens]

    def steps_to_finish(self) -> int:
        """Steps until the first of them is finished. There must be one."""
        while not self._ends.get(self._ends_order[0]):
            self._ends.pop(heapq.heappop(self._ends_order), None)
        return self._ends_order[0] - self.steps

    def take_finished(self) -> list[Request]:
        """The requests that the last step finished, in the order they joined; they still have to leave."""
        while self._ends_order and self._ends_order[0] <= self.steps:
            heapq.heappop(self._ends_order)
        return list(self._ends.pop(self.steps, ()))

    def _residue(self, request: Request) -> int:
        """Its next token has index tokens - 1 in the KV cache, and a block starts where the block size divides that."""
        index = request.prompt_tokens + request.generated - 1
        return (request.joined_step - index) % self._block_tokens
