"""Which worker holds which beginning of a prompt: block hash -> bit mask of workers.

    match     walks a prompt's chained hashes once, for all workers at a time: a worker's bit survives as long as it holds
              every block so far. O(blocks), whatever the number of workers.
    pin       a prompt was sent: its blocks count as cached from now on (bursts that share a prefix go together), are
              the youngest of the worker's LRU, and cannot be evicted until `unpin`.
    store, remove, clear   what the engine itself says about its cache. All are idempotent.

Each worker has its own LRU with the capacity of its KV cache, so the index evicts about what the engine evicts, and from
the tail of prompts first, as engines do. Memory is bounded by the sum of the capacities, at most MAX_TOTAL_BLOCKS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

Match = list[tuple[int, int]]
"""(mask of workers, leading blocks they hold), every worker in at most one mask, fewest blocks first."""

MAX_TOTAL_BLOCKS = 4_000_000
"""Blocks indexed over all workers (a block on two workers counts twice): some 600 MB; few fleets come near."""
MIN_CAPACITY_BLOCKS = 64
EVICTION_PART = 64
"""One eviction frees this part of the capacity."""


class WorkerCache:
    """One worker's part of the index: its LRU, and which blocks its in-flight prompts pin."""

    __slots__ = ("_capacity", "_holders", "_pins", "_used_at", "bit", "epoch", "slot", "tail_used_at")

    def __init__(self, holders: dict[int, int], slot: int, capacity_blocks: int) -> None:
        self.slot = slot
        self.bit = 1 << slot
        self.epoch = 0
        """Changes when the cache is cleared: pins from before count no more."""
        self.tail_used_at = 0.0
        """When the block next in line for eviction was last used, as of the last eviction."""
        self._capacity = capacity_blocks
        self._holders = holders
        self._used_at: dict[int, float] = {}  # in LRU order, oldest first
        self._pins: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._used_at)

    def __contains__(self, block: int) -> bool:
        return block in self._used_at

    @property
    def pinned_blocks(self) -> int:
        """Distinct blocks of prompts in flight."""
        return len(self._pins)

    @property
    def capacity_blocks(self) -> int:
        return self._capacity

    @property
    def free_blocks(self) -> int:
        """Room for new blocks before old ones go. What one eviction frees at once is slack of the index, not of the engine."""
        return max(self._capacity - self._capacity // EVICTION_PART - len(self._used_at), 0)

    def resize(self, blocks: int) -> None:
        self._capacity = max(blocks, MIN_CAPACITY_BLOCKS)
        self._evict(len(self._used_at) - self._capacity)

    def pin(self, blocks: list[int], now: float) -> list[int]:
        """Count the blocks of a prompt just sent as cached. Returns those pinned: fewer when in-flight prompts fill the cache."""
        room = self._capacity - len(self._pins)
        if len(blocks) > room:
            blocks = blocks[: max(room, 0)]
        self._pins.update(blocks)
        self.store(blocks, now)
        return blocks

    def unpin(self, blocks: list[int], epoch: int, *, forget_from: int | None = None) -> None:
        """The prompt is done. `forget_from`: it was never computed; from this block on nothing else put the blocks here."""
        if epoch != self.epoch:
            return
        pins = self._pins
        take = pins.pop
        for block in blocks:
            count = take(block)
            if count > 1:
                pins[block] = count - 1
        if forget_from is not None:
            self.remove(blocks[forget_from:])

    def store(self, blocks: Sequence[int], now: float) -> None:
        """The worker holds these blocks (first to last of a prompt), used now."""
        used_at, holders, bit = self._used_at, self._holders, self.bit
        take, holders_with = used_at.pop, holders.setdefault
        for block in reversed(blocks):  # the last of a prompt is the first to be evicted
            if take(block, None) is None:
                mask = holders_with(block, bit)
                if mask is not bit:
                    holders[block] = mask | bit
            used_at[block] = now
        excess = len(used_at) - self._capacity
        if excess > 0:
            self._evict(
                excess + self._capacity // EVICTION_PART
            )  # some more at once: the walk to the oldest is worth it

    def remove(self, blocks: Iterable[int]) -> None:
        """The worker holds these blocks no more. What in-flight prompts pin stays: the engine cannot have dropped it."""
        pins = self._pins
        self._drop([block for block in dict.fromkeys(blocks) if block in self._used_at and block not in pins])

    def clear(self) -> None:
        """The worker holds nothing any more: restarted, or proven wrong."""
        self._drop(list(self._used_at))
        self._pins.clear()
        self.epoch += 1

    def _evict(self, wanted: int) -> None:
        """Drop the oldest blocks that are not pinned. Pinned ones met on the way become young: in use is as good as used now."""
        used_at, pins = self._used_at, self._pins
        while (count := min(wanted, len(used_at) - len(pins))) > 0:
            oldest = list(islice(used_at, count))
            victims = [block for block in oldest if block not in pins] if pins else oldest
            if len(victims) < count:
                for block in oldest:
                    if block in pins:
                        used_at[block] = used_at.pop(block)
            if victims:
                self.tail_used_at = used_at[victims[-1]]
                self._drop(victims)
            wanted -= len(victims)

    def _drop(self, blocks: list[int]) -> None:
        """Forget blocks this worker holds (each once)."""
        used_at, bit = self._used_at, self.bit
        holders = self._holders
        take = holders.pop
        for block in blocks:
            del used_at[block]
            mask = take(block)
            if mask is not bit and mask != bit:
                holders[block] = mask ^ bit


class PrefixIndex:
    """All workers' caches, over one table of blocks."""

    def __init__(self, max_total_blocks: int = MAX_TOTAL_BLOCKS) -> None:
        self._max_total_blocks = max_total_blocks
        self._holders: dict[int, int] = {}
        self._wanted: dict[WorkerCache, int] = {}
        self._share = 1.0
        self._free_slots: list[int] = []

    def __len__(self) -> int:
        return len(self._holders)

    def add_worker(self, capacity_blocks: int) -> WorkerCache:
        """A worker with an empty cache, in the lowest slot that is free."""
        self._free_slots.sort(reverse=True)
        slot = self._free_slots.pop() if self._free_slots else len(self._wanted)
        cache = WorkerCache(self._holders, slot, MIN_CAPACITY_BLOCKS)
        self.set_capacity(cache, capacity_blocks)
        return cache

    def set_capacity(self, cache: WorkerCache, blocks: int) -> None:
        """What the worker's KV cache holds. All get less where the sum would be too much."""
        self._wanted[cache] = blocks
        cache.resize(int(blocks * self._share))
        self._fit()

    def remove_worker(self, cache: WorkerCache) -> None:
        """Forget the worker; its slot may go to another. Late `unpin`s of its tickets do nothing."""
        cache.clear()
        del self._wanted[cache]
        self._free_slots.append(cache.slot)
        self._fit()

    def _fit(self) -> None:
        share = min(self._max_total_blocks / max(sum(self._wanted.values()), 1), 1.0)
        if share != self._share:
            self._share = share
            for cache, blocks in self._wanted.items():
                cache.resize(int(blocks * share))

    def match(self, blocks: Iterable[int]) -> Match:
        """For every worker that holds the first block: how many leading blocks it holds."""
        found: Match = []
        live = depth = 0
        for mask in map(self._holders.get, blocks):
            if mask != live:
                if mask is None:
                    break
                kept = live & mask if depth else mask
                if kept != live:
                    if live:
                        found.append((live ^ kept, depth))
                    live = kept
                    if not kept:
                        break
            depth += 1
        if live:
            found.append((live, depth))
        return found
