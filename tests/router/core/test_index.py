"""The prefix index: against a naive model, its bounds, and its idempotence."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvfleet_router.core.index import MIN_CAPACITY_BLOCKS, PrefixIndex

BLOCKS = st.lists(st.integers(0, 40), max_size=12, unique=True)


def leading(held, blocks):
    """How many leading blocks are in the set."""
    count = 0
    for block in blocks:
        if block not in held:
            break
        count += 1
    return count


def by_slot(match):
    """{slot: blocks} of a match; every slot at most once."""
    found = {}
    for mask, blocks in match:
        for slot in range(mask.bit_length()):
            if mask >> slot & 1:
                assert slot not in found
                found[slot] = blocks
    return found


class Pinning(RuleBasedStateMachine):
    """Prompts that were pinned are let go in any order; `sets`: what each worker holds."""

    workers = 3
    capacity_blocks = 1000

    def __init__(self):
        super().__init__()
        self.index = PrefixIndex()
        self.caches = [self.index.add_worker(self.capacity_blocks) for _ in range(self.workers)]
        self.sets = [set() for _ in range(self.workers)]
        self.pins = []

    @rule(data=st.data(), computed=st.booleans())
    def unpin(self, data, computed):
        if self.pins:
            worker, epoch, blocks = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
            start = data.draw(st.integers(0, len(blocks)))
            self.caches[worker].unpin(blocks, epoch, forget_from=None if computed else start)
            if not computed and epoch == self.caches[worker].epoch:
                self.sets[worker] -= set(blocks[start:]) - self.pinned(worker)

    def pinned(self, worker):
        epoch = self.caches[worker].epoch
        return {block for w, e, blocks in self.pins if w == worker and e == epoch for block in blocks}


class IndexAgainstSets(Pinning):
    """Four workers, each a plain set of blocks; small enough never to evict."""

    workers = 4
    capacity_blocks = MIN_CAPACITY_BLOCKS

    @rule(worker=st.integers(0, 3), blocks=BLOCKS)
    def store(self, worker, blocks):
        self.caches[worker].store(blocks, 0.0)
        self.sets[worker].update(blocks)

    @rule(worker=st.integers(0, 3), blocks=BLOCKS)
    def remove(self, worker, blocks):
        self.caches[worker].remove(blocks + blocks)
        self.sets[worker] -= set(blocks) - self.pinned(worker)

    @rule(worker=st.integers(0, 3), blocks=BLOCKS)
    def pin(self, worker, blocks):
        pinned = self.caches[worker].pin(blocks, 0.0)
        assert pinned == blocks
        self.pins.append((worker, self.caches[worker].epoch, pinned))
        self.sets[worker].update(blocks)

    @rule(worker=st.integers(0, 3))
    def clear(self, worker):
        self.caches[worker].clear()
        self.sets[worker].clear()

    @rule(worker=st.integers(0, 3))
    def replace(self, worker):
        self.index.remove_worker(self.caches[worker])
        old = self.caches[worker].slot
        self.caches[worker] = self.index.add_worker(MIN_CAPACITY_BLOCKS)
        assert self.caches[worker].slot == old
        self.pins = [pin for pin in self.pins if pin[0] != worker]
        self.sets[worker] = set()

    @invariant()
    def holds_what_the_sets_hold(self):
        for cache, held in zip(self.caches, self.sets, strict=True):
            assert len(cache) == len(held)
            assert all(block in cache for block in held)
        for worker in range(4):
            assert self.caches[worker].pinned_blocks == len(self.pinned(worker))
        assert len(self.index) == len(set().union(*self.sets))

    @rule(blocks=BLOCKS)
    def match(self, blocks):
        expected = {cache.slot: leading(held, blocks) for cache, held in zip(self.caches, self.sets, strict=True)}
        assert by_slot(self.index.match(blocks)) == {slot: count for slot, count in expected.items() if count}


IndexAgainstSets.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestIndexAgainstSets = IndexAgainstSets.TestCase


PROMPTS = st.lists(st.integers(0, 2), max_size=8).map(
    lambda path: [sum((step + 1) * 4**place for place, step in enumerate(path[: n + 1])) for n in range(len(path))]
)
"""Chained, as prompts' blocks are: a block's name tells all before it. Many share beginnings."""


class PromptsAgainstSets(Pinning):
    """What routing alone asks of the index: prompts from their beginnings. Then it keeps no table of all blocks."""

    @rule(worker=st.integers(0, 2), prompt=PROMPTS)
    def pin(self, worker, prompt):
        assert self.caches[worker].pin(prompt, 0.0) == prompt
        self.pins.append((worker, self.caches[worker].epoch, prompt))
        self.sets[worker].update(prompt)

    @rule(worker=st.integers(0, 2))
    def clear(self, worker):
        self.caches[worker].clear()
        self.sets[worker].clear()

    @rule(prompt=PROMPTS)
    def match(self, prompt):
        expected = {cache.slot: leading(held, prompt) for cache, held in zip(self.caches, self.sets, strict=True)}
        assert by_slot(self.index.match(prompt)) == {slot: count for slot, count in expected.items() if count}
        for worker, cache in enumerate(self.caches):
            assert cache.pinned_depth(prompt) == leading(self.pinned(worker), prompt)

    @invariant()
    def holds_what_the_sets_hold(self):
        for worker, (cache, held) in enumerate(zip(self.caches, self.sets, strict=True)):
            assert len(cache) == len(held)
            assert cache.pinned_blocks == len(self.pinned(worker))
        assert len(self.index) == len(set().union(*self.sets))

    def teardown(self):
        runs = self.index._runs
        assert len(runs.of_block) == len(runs.blocks)


PromptsAgainstSets.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPromptsAgainstSets = PromptsAgainstSets.TestCase


def test_a_block_in_the_middle_of_a_run_is_found_once_somebody_asks():
    index = PrefixIndex()
    one, two = index.add_worker(100), index.add_worker(100)
    one.pin(list(range(30)), 0.0)
    two.store(list(range(10, 20)), 0.0)  # another router told of a prompt's end
    two.pin(list(range(10)), 0.0)
    assert by_slot(index.match(list(range(30)))) == {one.slot: 30, two.slot: 20}
    assert len(index) == 30


@pytest.mark.parametrize("all_listed", [False, True])
def test_a_prompt_whose_hashes_collide_leaves_nothing_behind(all_listed):
    index = PrefixIndex()
    cache, other = index.add_worker(MIN_CAPACITY_BLOCKS), index.add_worker(MIN_CAPACITY_BLOCKS)
    assert not all_listed or 9 not in cache  # who asks gets the table of all blocks
    prompt = [1, 2, 3, 2, 1, 4]
    pinned = cache.pin(prompt, 0.0)
    other.pin([1, 2, 5], 0.0)
    assert by_slot(index.match(prompt)) == {0: 6, 1: 2}
    cache.unpin(pinned, cache.epoch, forget_from=3)
    assert by_slot(index.match(prompt))[1] == 2
    cache.clear()
    other.clear()
    assert index.match(prompt) == []
    assert len(index) == len(cache) == 0
    assert not index._runs.of_block


def test_prompts_in_flight_pin_their_common_beginning():
    index = PrefixIndex()
    cache = index.add_worker(100)
    first = cache.pin([1, 2, 3, 4], 0.0)
    cache.pin([1, 2, 30, 40], 0.0)
    assert cache.pinned_depth([1, 2, 3, 5]) == 3
    cache.unpin(first, cache.epoch)
    assert cache.pinned_depth([1, 2, 3, 4]) == 2
    assert cache.pinned_depth([9, 1]) == 0


@given(st.integers(0, 2**32), st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_match_over_many_workers_equals_counting_one_by_one(seed, workers):
    rng = random.Random(seed)
    index = PrefixIndex()
    prompt = list(range(1000, 1030))
    caches, counts = [], {}
    for _ in range(workers):
        cache = index.add_worker(MIN_CAPACITY_BLOCKS)
        count = rng.randrange(31)
        cache.store(prompt[:count], 0.0)
        caches.append(cache)
        if count:
            counts[cache.slot] = count
    assert by_slot(index.match(prompt)) == counts


def test_a_gap_ends_the_match():
    index = PrefixIndex()
    cache = index.add_worker(MIN_CAPACITY_BLOCKS)
    cache.store([1, 2, 3, 4], 0.0)
    cache.remove([2])
    assert by_slot(index.match([1, 2, 3, 4])) == {0: 1}


def test_memory_is_bounded_by_capacity_and_the_oldest_tail_goes_first():
    index = PrefixIndex()
    cache = index.add_worker(100)
    cache.store(list(range(10)), 1.0)
    for start in range(1000, 100_000, 10):
        cache.store(list(range(start, start + 10)), float(start))
        cache.store(list(range(5)), float(start))  # the head stays in use
        assert len(cache) <= 100
        assert len(index) <= 100
    assert by_slot(index.match(list(range(10)))) == {0: 5}
    assert 0 < 99_990.0 - cache.tail_used_at < 200


def test_pinned_blocks_outlive_any_number_of_newer_ones():
    index = PrefixIndex()
    cache = index.add_worker(100)
    pinned = cache.pin(list(range(40)), 0.0)
    for start in range(1000, 20_000, 7):
        cache.store(list(range(start, start + 7)), float(start))
    assert by_slot(index.match(pinned)) == {0: 40}
    cache.unpin(pinned, cache.epoch)
    for start in range(30_000, 32_000, 7):
        cache.store(list(range(start, start + 7)), float(start))
    assert index.match(pinned) == []


def test_in_flight_prompts_pin_no_more_than_the_cache_holds():
    index = PrefixIndex()
    cache = index.add_worker(100)
    first = cache.pin(list(range(80)), 0.0)
    second = cache.pin(list(range(1000, 1080)), 0.0)
    assert (len(first), len(second)) == (80, 20)
    assert len(cache) <= 100
    cache.unpin(second, cache.epoch)
    cache.unpin(first, cache.epoch)
    assert cache.pinned_blocks == 0


def test_a_shared_block_stays_with_the_other_worker():
    index = PrefixIndex()
    one, two = index.add_worker(100), index.add_worker(100)
    one.store([1, 2], 0.0)
    two.store([1, 2], 0.0)
    index.remove_worker(one)
    assert by_slot(index.match([1, 2])) == {two.slot: 2}
    assert len(index) == 2


def test_a_late_unpin_of_a_cleared_cache_changes_nothing():
    index = PrefixIndex()
    cache = index.add_worker(100)
    blocks, epoch = cache.pin([1, 2], 0.0), cache.epoch
    cache.clear()
    cache.pin([1, 2], 1.0)
    cache.unpin(blocks, epoch, forget_from=0)
    assert cache.pinned_blocks == 2
    assert by_slot(index.match([1, 2])) == {0: 2}


@pytest.mark.parametrize("capacity", [100, 1000])
def test_a_smaller_capacity_evicts_at_once(capacity):
    index = PrefixIndex()
    cache = index.add_worker(2000)
    cache.store(list(range(2000)), 0.0)
    cache.resize(capacity)
    assert len(cache) == capacity
    assert by_slot(index.match(list(range(2000)))) == {0: capacity}


def test_the_sum_of_all_capacities_is_bounded():
    index = PrefixIndex(max_total_blocks=1000)
    caches = [index.add_worker(400) for _ in range(2)]
    assert [cache.capacity_blocks for cache in caches] == [400, 400]
    caches += [index.add_worker(400) for _ in range(3)]
    assert [cache.capacity_blocks for cache in caches] == [200] * 5
    for cache in caches:
        cache.store(list(range(300)), 0.0)
    assert all(len(cache) <= 200 for cache in caches)
    for cache in caches[:3]:
        index.remove_worker(cache)
    assert [cache.capacity_blocks for cache in caches[3:]] == [400, 400]


def test_a_full_cache_has_no_free_blocks_even_right_after_an_eviction():
    index = PrefixIndex()
    cache = index.add_worker(6400)
    for start in range(0, 12_000, 10):
        cache.store(list(range(start, start + 10)), 0.0)
    assert len(cache) < 6400
    assert cache.free_blocks < 20
