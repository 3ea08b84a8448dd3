"""Which worker holds which beginning of a prompt: runs of blocks -> bit mask of workers.

    match     walks a prompt's chained hashes once, for all workers at a time: a worker's bit survives as long as it holds
              every block so far. Whatever the number of workers, it costs a look-up per run.
    pin       a prompt was sent: its blocks count as cached from now on (bursts that share a prefix go together), are
              the youngest of the worker's LRU, and cannot be evicted until `unpin`.
    store, remove, clear   what the engine itself says about its cache. All are idempotent.

Blocks that always came together are kept together: a run is a stretch of a prompt that nobody has told apart yet, held whole
by each of its workers. What is known of workers (who holds it, since when, pinned how often) is known of runs, so a prompt of
thousands of blocks costs a few steps. Where a prompt leaves a run half-way, or a worker drops a part of one, it is cut in two:
the front becomes a new run, the rest keeps its number.

A run is found by its first block. Blocks are chained, so a prompt walked from its beginning enters every run there: a block
inside of a run comes after the one before it, which is in the same run. Only who asks for blocks out of the middle (`store` of
a prompt's end, `remove`, `in`) needs a table of all blocks: it is made when that first happens, and kept from then on.

Each worker has its own LRU with the capacity of its KV cache, so the index evicts about what the engine evicts, and from
the tail of prompts first, as engines do. Memory is bounded by the sum of the capacities, at most MAX_TOTAL_BLOCKS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

Match = list[tuple[int, int]]
"""(mask of workers, leading blocks they hold), every worker in at most one mask, fewest blocks first."""

MAX_TOTAL_BLOCKS: Final = 4_000_000
"""Blocks indexed over all workers (a block on two workers counts twice): some 600 MB; few fleets come near."""
MIN_CAPACITY_BLOCKS: Final = 64
EVICTION_PART: Final = 64
"""One eviction frees this part of the capacity."""
MAX_RUN_BLOCKS: Final = 256
"""Bounds what one cut, or one eviction of a run that others hold as well, can cost."""


class Runs:
    """All runs, by number: their blocks, and who holds them. A run nobody holds is forgotten."""

    __slots__ = ("_next", "_table", "blocks", "caches", "count", "holders", "of_block")

    def __init__(self) -> None:
        self.of_block: dict[int, int] = {}
        """First block -> run; in the table of all blocks: block -> run."""
        self._table = False
        """`of_block` knows all blocks."""
        self.count = 0
        """Blocks of all runs."""
        self.blocks: dict[int, tuple[int, ...]] = {}
        self.holders: dict[int, int] = {}
        self.caches: dict[int, WorkerCache] = {}
        """By slot."""
        self._next = 0

    def add(self, blocks: tuple[int, ...], holders: int) -> int:
        run = self._next
        self._next = run + 1
        self.blocks[run] = blocks
        self.holders[run] = holders
        self.count += len(blocks)
        of_block = self.of_block
        for block in blocks if self._table else blocks[:1]:
            of_block[block] = run
        return run

    def find(self, block: int) -> int:
        """The run that holds the block, be it in its middle; -1: none."""
        if not self._table:
            self._table = True
            for run, blocks in self.blocks.items():
                self.of_block.update(dict.fromkeys(blocks, run))
        return self.of_block.get(block, -1)

    def forget(self, run: int) -> None:
        self._forget_blocks(run, self.blocks.pop(run))
        del self.holders[run]

    def trim(self, run: int, size: int) -> None:
        """Forget all but the first `size` blocks of a run (not none)."""
        blocks = self.blocks[run]
        self.blocks[run] = blocks[:size]
        self._forget_blocks(run, blocks[size:])

    def _forget_blocks(self, run: int, blocks: tuple[int, ...]) -> None:
        self.count -= len(blocks)
        of_block = self.of_block
        for block in blocks if self._table else blocks[:1]:
            if of_block.get(block) == run:  # else it is no first one; or two hashes are equal by chance
                del of_block[block]

    def cut(self, run: int, size: int) -> int:
        """Make the first `size` blocks of a run (not all) a run of their own; returns it. Its holders hold both."""
        blocks, holders = self.blocks[run], self.holders[run]
        front = self.add(blocks[:size], holders)
        self.blocks[run] = blocks[size:]
        self.count -= size
        self.of_block[blocks[size]] = run
        while holders:
            slot = holders.bit_length() - 1
            holders ^= 1 << slot
            self.caches[slot].cut(run, front)
        return front

    def cover(self, blocks: tuple[int, ...]) -> list[int]:
        """The runs that hold exactly these blocks, in their order: cut and added as needed, those added without holders."""
        found: list[int] = []
        of_block, end, at = self.of_block, len(blocks), 0
        while at < end:
            run = of_block.get(blocks[at])
            if run is None:
                at = self._add_unknown(blocks, at, found)
                continue
            held = self.blocks[run]
            if held[0] != blocks[at]:
                self.cut(run, held.index(blocks[at]))
                held = self.blocks[run]
            size = common(blocks, at, held, 0)
            found.append(self.cut(run, size) if size < len(held) else run)
            at += size
        return found

    def _add_unknown(self, blocks: tuple[int, ...], at: int, found: list[int]) -> int:
        """Add the blocks from `at` to the next known one as a run; returns where it ends. (That a prompt's hashes are equal by
        chance is allowed for where blocks are forgotten.)"""
        rest = blocks[at : at + MAX_RUN_BLOCKS]
        if not self.of_block.keys().isdisjoint(rest):
            size = 0
            while rest[size] not in self.of_block:
                size += 1
            rest = rest[:size]
        found.append(self.add(rest, 0))
        return at + len(rest)


def common(one: tuple[int, ...], one_at: int, other: tuple[int, ...], other_at: int) -> int:
    """How many blocks two stretches have in common from there on."""
    size = min(len(one) - one_at, len(other) - other_at)
    if one[one_at : one_at + size] == other[other_at : other_at + size]:
        return size
    low = 0
    while size - low > 1:  # the first `low` are equal, the first `size` are not
        middle = (low + size) // 2
        if one[one_at + low : one_at + middle] == other[other_at + low : other_at + middle]:
            low = middle
        else:
            size = middle
    return low


class WorkerCache:
    """One worker's part of the index: its LRU, and which runs its in-flight prompts pin."""

    __slots__ = (
        "_capacity",
        "_pins",
        "_runs",
        "_size",
        "_used_at",
        "bit",
        "epoch",
        "pinned_blocks",
        "slot",
        "tail_used_at",
    )

    def __init__(self, runs: Runs, slot: int, capacity_blocks: int) -> None:
        self.slot = slot
        self.bit = 1 << slot
        self.epoch = 0
        """Changes when the cache is cleared: pins from before count no more."""
        self.tail_used_at = 0.0
        """When the block next in line for eviction was last used, as of the last eviction."""
        self.pinned_blocks = 0
        """Distinct blocks of prompts in flight."""
        self._capacity = capacity_blocks
        self._runs = runs
        self._size = 0  # blocks held
        self._used_at: dict[int, float] = {}  # run -> time, in LRU order, oldest first
        self._pins: dict[int, int] = {}  # run -> prompts in flight

    def __len__(self) -> int:
        return self._size

    def __contains__(self, block: int) -> bool:
        return self._runs.find(block) in self._used_at

    def youngest(self, count: int) -> list[tuple[int, ...]]:
        """Some of its blocks, in the runs they came in: those used last, as far as they are `count` at most; oldest first."""
        found: list[tuple[int, ...]] = []
        for run in reversed(self._used_at):
            blocks = self._runs.blocks[run]
            count -= len(blocks)
            if count < 0:
                break
            found.append(blocks)
        return found[::-1]

    @property
    def capacity_blocks(self) -> int:
        return self._capacity

    @property
    def free_blocks(self) -> int:
        """Room for new blocks before old ones go. What one eviction frees at once is slack of the index, not of the engine."""
        return max(self._capacity - self._capacity // EVICTION_PART - self._size, 0)

    def pinned_depth(self, blocks: Sequence[int]) -> int:
        """How many leading blocks of a prompt prompts in flight pin."""
        runs, pins, wanted = self._runs, self._pins, tuple(blocks)
        at, end = 0, len(wanted)
        while at < end:
            run = runs.of_block.get(wanted[at], -1)
            if run not in pins:
                break
            held = runs.blocks[run]
            size = common(wanted, at, held, 0)
            at += size
            if size < len(held):
                break
        return at

    def resize(self, blocks: int) -> None:
        self._capacity = max(blocks, MIN_CAPACITY_BLOCKS)
        self._evict(self._size - self._capacity)

    def pin(self, blocks: list[int], now: float) -> list[int]:
        """Count the blocks of a prompt just sent as cached. Returns those pinned: fewer when in-flight prompts fill the cache."""
        room = self._capacity - self.pinned_blocks
        if len(blocks) > room:
            blocks = blocks[: max(room, 0)]
        runs = self._runs.cover(tuple(blocks))
        pins = self._pins
        for run in runs:
            count = pins.get(run, 0)
            pins[run] = count + 1
            if not count:
                self.pinned_blocks += len(self._runs.blocks[run])
        self._hold(runs, now)
        return blocks

    def unpin(self, blocks: list[int], epoch: int, *, forget_from: int | None = None) -> None:
        """The prompt is done. `forget_from`: it was never computed; from this block on nothing else put the blocks here."""
        if epoch != self.epoch:
            return
        runs, pins = self._runs, self._pins
        at, end = 0, len(blocks)
        while at < end:  # what is pinned is only ever cut, so whole runs cover it still
            run = runs.of_block[blocks[at]]
            size = len(runs.blocks[run])
            count = pins.pop(run)
            if count > 1:
                pins[run] = count - 1
            else:
                self.pinned_blocks -= size
                if forget_from is not None and at + size > forget_from:
                    self._drop_from(run, max(forget_from - at, 0))
            at += size

    def store(self, blocks: Sequence[int], now: float) -> None:
        """The worker holds these blocks (first to last of a prompt, or of its end), used now."""
        runs, stored = self._runs, tuple(blocks)
        if stored and stored[0] not in runs.of_block:
            runs.find(stored[0])
        self._hold(runs.cover(stored), now)

    def remove(self, blocks: Iterable[int]) -> None:
        """The worker holds these blocks no more. What in-flight prompts pin stays: the engine cannot have dropped it."""
        runs = self._runs
        listed = tuple(blocks)
        at, end = 0, len(listed)
        while at < end:
            run = runs.find(listed[at])
            if run not in self._used_at or run in self._pins:
                at += 1
                continue
            held = runs.blocks[run]
            start = held.index(listed[at])
            size = common(listed, at, held, start)
            at += size
            if start + size < len(held):
                run = runs.cut(run, start + size)
            self._drop_from(run, start)

    def clear(self) -> None:
        """The worker holds nothing any more: restarted, or proven wrong."""
        for run in list(self._used_at):
            self._drop(run)
        self._pins.clear()
        self.pinned_blocks = 0
        self.epoch += 1

    def cut(self, run: int, front: int) -> None:
        """A run it holds was cut: its front is younger than the rest, which is to be evicted first."""
        used_at, pins = self._used_at, self._pins
        used_at[front] = used_at[run]
        if run in pins:
            pins[front] = pins[run]

    def _hold(self, held: list[int], now: float) -> None:
        runs, used_at, bit = self._runs, self._used_at, self.bit
        holders, take = runs.holders, used_at.pop
        for run in reversed(held):  # the last of a prompt is the first to be evicted
            if take(run, -1.0) < 0.0 and not holders[run] & bit:
                holders[run] |= bit
                self._size += len(runs.blocks[run])
            used_at[run] = now
        excess = self._size - self._capacity
        if excess > 0:  # some more at once: the walk to the oldest is worth it
            self._evict(excess + self._capacity // EVICTION_PART)

    def _evict(self, wanted: int) -> None:
        """Drop the oldest blocks that are not pinned. Pinned ones met on the way become young: in use is as good as used now."""
        used_at, pins, runs = self._used_at, self._pins, self._runs
        wanted = min(wanted, self._size - self.pinned_blocks)
        while wanted > 0:
            victims: list[int] = []
            pinned: list[int] = []
            count = 0
            for run in used_at:
                if run in pins:
                    pinned.append(run)
                    continue
                victims.append(run)
                count += len(runs.blocks[run])
                if count >= wanted:
                    break
            for run in pinned:
                used_at[run] = used_at.pop(run)
            self.tail_used_at = used_at[victims[-1]]
            for run in victims:
                size = len(runs.blocks[run])
                if size > wanted and runs.holders[run] == self.bit:
                    self._trim(run, size - wanted)
                else:
                    self._drop(run)
                wanted -= size

    def _trim(self, run: int, size: int) -> None:
        """Drop all but the first `size` blocks of a run that no other worker holds: it keeps its place in the LRU."""
        self._size -= len(self._runs.blocks[run]) - size
        self._runs.trim(run, size)

    def _drop_from(self, run: int, size: int) -> None:
        """Drop all but the first `size` blocks of a run this worker holds."""
        if not size:
            self._drop(run)
        elif self._runs.holders[run] == self.bit:
            self._trim(run, size)
        else:
            self._runs.cut(run, size)
            self._drop(run)

    def _drop(self, run: int) -> None:
        """Forget a run this worker holds."""
        runs = self._runs
        del self._used_at[run]
        self._size -= len(runs.blocks[run])
        left = runs.holders[run] ^ self.bit
        if left:
            runs.holders[run] = left
        else:
            runs.forget(run)


class PrefixIndex:
    """All workers' caches, over one table of blocks."""

    def __init__(self, max_total_blocks: int = MAX_TOTAL_BLOCKS) -> None:
        self._max_total_blocks = max_total_blocks
        self._runs = Runs()
        self._wanted: dict[WorkerCache, int] = {}
        self._share = 1.0
        self._free_slots: list[int] = []

    def __len__(self) -> int:
        return self._runs.count

    def list_all_blocks(self) -> None:
        """Somebody will ask for blocks out of the middle of prompts: better now than when there are millions to list."""
        self._runs.find(-1)

    def add_worker(self, capacity_blocks: int) -> WorkerCache:
        """A worker with an empty cache, in the lowest slot that is free."""
        self._free_slots.sort(reverse=True)
        slot = self._free_slots.pop() if self._free_slots else len(self._wanted)
        cache = self._runs.caches[slot] = WorkerCache(self._runs, slot, MIN_CAPACITY_BLOCKS)
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
        del self._runs.caches[cache.slot]
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
        runs = self._runs
        wanted = tuple(blocks)
        at, end = 0, len(wanted)
        live = 0
        while at < end:
            run = runs.of_block.get(wanted[at])
            if run is None:
                break
            held, mask = runs.blocks[run], runs.holders[run]
            kept = live & mask if at else mask
            if kept != live:
                if live:
                    found.append((live ^ kept, at))
                live = kept
                if not kept:
                    break
            start = 0 if held[0] == wanted[at] else held.index(wanted[at])
            at += common(wanted, at, held, start)
        if live:
            found.append((live, at))
        return found
