"""Which worker holds which block, and how far a prompt's bytes lead through them.

A block is named by a key: a 64-bit hash of its bytes, chained from the key of the block before it; the chain begins at a
root that stands for everything else that names a block (adapter, cache salt, block size). Beside each key is noted how many
bytes the blocks that follow it have: so a prompt is walked by cutting off as many bytes, hashing them, and looking the key
up. Blocks have a fixed number of tokens, hence any number of bytes: where several lengths follow, each is tried, and of
several ways through a prompt each worker's longest counts.

Two blocks of equal bytes and different tokens have one key. That loses nothing: engines drop a chain from its end, so
whoever holds the later block holds those before it, and the longest way over either is the longest over both.

Engines store a block again when they had to compute it again, under the same hash: stores are counted against removals. A
block on a slower medium (CPU memory, disk) has to be fetched: it counts SLOW_WEIGHT of one on the accelerator. Blocks that
came one at a time were filled while decoding: they hold the tokens the model sampled, and the next turn of the conversation
may spell the same text in others. How much of them was found again is learned (`Trust`), and weighs them.

All tables map integers to integers: there is nothing in them for the garbage collector to visit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from kvfleet_router.core.index import Match
from kvfleet_router.core.kvevents.wire import Hash, Removed, Stored

SLOW_WEIGHT = 0.7
"""Of a cached token on a slower medium: fetching takes a part of the time that computing would."""
FAST_MEDIUM = "GPU"
"""What vLLM calls the medium its kernels read from, on any accelerator; none named: the same."""
MAX_VISITS = 16_384
"""Ways tried in one walk, where there are several."""
PREFIX_KINDS = frozenset([None, "full_attention", "mla_attention"])
"""Kinds of cache in which a block is found by the whole prompt before it."""
TRUST_FADE = 0.98


class Found(NamedTuple):
    """How much of a prompt workers hold."""

    tokens: Match
    """(mask of workers, leading tokens they hold), every worker in at most one mask, fewest first."""
    certain: Match
    """The same, up to the first block that was filled while decoding."""
    deepest_tokens: int
    deepest_bytes: int
    """Of the longest way, on any worker."""


NOTHING = Found([], [], 0, 0)


class Blocks:
    """All workers' blocks of one model. `mask`s are of workers, by the bit the caller gives them."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.slow_holders: dict[int, int] = {}
        self._following: dict[int, int] = {}
        """Key -> the length of the blocks that follow; several: minus a bit mask of the lengths."""
        self.generated: set[int] = set()
        """Keys of blocks that hold sampled tokens. What was also computed as part of a prompt is spelled as prompts are."""
        self._root_of: dict[int, int] = {}
        self._root_uses: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.holders)

    # -- what engines say -------------------------------------------------------------------------------------------------

    def hold(self, parent: int, key: int, length: int, bit: int, *, is_root: bool) -> None:
        """A worker has this block on its fast medium from now on."""
        mask = self.holders.get(key, 0)
        self.holders[key] = mask | bit
        following = self._following.get(parent)
        if following is None:
            self._following[parent] = length
        elif following != length:
            known = 1 << following if following > 0 else -following
            self._following[parent] = -(known | 1 << length)
        if is_root and key not in self._root_of:
            self._root_of[key] = parent
            self._root_uses[parent] = self._root_uses.get(parent, 0) + 1

    def drop(self, key: int, bit: int) -> None:
        """A worker has the block on its fast medium no more."""
        mask = self.holders.get(key, 0) & ~bit
        if mask:
            self.holders[key] = mask
        else:
            self.holders.pop(key, None)
            self._forget_if_unheld(key)

    def hold_slow(self, key: int, bit: int) -> None:
        self.slow_holders[key] = self.slow_holders.get(key, 0) | bit

    def drop_slow(self, key: int, bit: int) -> None:
        mask = self.slow_holders.get(key, 0) & ~bit
        if mask:
            self.slow_holders[key] = mask
        else:
            self.slow_holders.pop(key, None)
            self._forget_if_unheld(key)

    def _forget_if_unheld(self, key: int) -> None:
        if key in self.holders or key in self.slow_holders:
            return
        self._following.pop(key, None)
        self.generated.discard(key)
        root = self._root_of.pop(key, None)
        if root is not None:
            self._root_uses[root] -= 1
            if not self._root_uses[root]:
                del self._root_uses[root]
                self._following.pop(root, None)

    # -- what requests ask ------------------------------------------------------------------------------------------------

    def walk(self, prompt: bytes, root: int, block_tokens: int) -> Found:
        """Who holds how much of the prompt. A block that ends where the prompt ends does not count: its last token, at least,
        is computed in any case, and engines then compute the whole block."""
        ways = [_Way(root, 0, 0, 0, 0, -1, [])]
        ends: list[_End] = []
        deepest = deepest_at = 0
        visits = MAX_VISITS
        following_of, holders_of, slow_of, generated = self._following.get, self.holders.get, None, self.generated
        if self.slow_holders:
            slow_of = self.slow_holders.get
        digest, size = xxh3_64_intdigest, len(prompt)
        while ways:
            key, at, end, live, depth, certain, slow = ways.pop()
            while True:
                if not end:
                    length = following_of(key, 0)
                    if length > 0:
                        end = at + length
                    elif length and visits > 0:
                        branches = self._branches(prompt, at, key, -length)
                        visits -= length.bit_length()
                        if not branches:
                            break
                        end = branches.pop()
                        ways += [_Way(key, at, other, live, depth, certain, slow[:]) for other in branches]
                    else:
                        break
                if end >= size:
                    break
                key = digest(prompt[at:end], key)
                mask = holders_of(key, 0)
                if slow_of is not None:
                    fetched = slow_of(key, 0) & ~mask
                    mask |= fetched
                    slow.append(fetched)
                if mask != live:
                    kept = live & mask if depth else mask
                    if kept != live:
                        if live:
                            ends.append(_End(live ^ kept, depth, certain, slow))
                        live = kept
                        if not kept:
                            break
                if certain < 0 and key in generated:
                    certain = depth
                depth += 1
                at, end = end, 0
            if live:
                ends.append(_End(live, depth, certain, slow))
            if depth > deepest:
                deepest, deepest_at = depth, at
        return _found(ends, block_tokens, deepest, deepest_at) if ends else NOTHING

    def _branches(self, prompt: bytes, at: int, key: int, lengths: int) -> list[int]:
        """Where blocks end that follow here and are held by somebody; `lengths`: a bit mask of what to try."""
        ends = []
        while lengths:
            length = (lengths & -lengths).bit_length() - 1
            lengths &= lengths - 1
            if at + length < len(prompt):
                found = xxh3_64_intdigest(prompt[at : at + length], key)
                if found in self.holders or found in self.slow_holders:
                    ends.append(at + length)
        return ends


class _Way(NamedTuple):
    """One way through a prompt, so far."""

    key: int
    at: int
    end: int
    """Of the block to enter next; 0: not chosen yet."""
    live: int
    """Workers that hold everything so far."""
    depth: int
    certain: int
    """Blocks before the first generated one; -1: there was none."""
    slow: list[int]
    """Of each block, the workers that hold it on a slower medium only. Empty where there are none at all."""


class _End(NamedTuple):
    """Where workers' part of a way ends."""

    mask: int
    depth: int
    certain: int
    slow: list[int]


def _found(ends: list[_End], block_tokens: int, deepest: int, deepest_bytes: int) -> Found:
    """Each worker's longest way."""
    tokens: dict[int, int] = {}
    certain: dict[int, int] = {}
    seen = 0
    for mask, depth, sure, slow in sorted(ends, key=lambda end: -end.depth):
        mask &= ~seen
        if not mask:
            continue
        seen |= mask
        sure = depth if sure < 0 or sure > depth else sure
        for part, of_depth, of_sure in _weighed(mask, depth, sure, slow):
            tokens[part] = int(of_depth * block_tokens)
            certain[part] = int(of_sure * block_tokens)
    ascending = sorted(tokens, key=lambda part: tokens[part])
    return Found(
        [(part, tokens[part]) for part in ascending],
        [(part, certain[part]) for part in ascending],
        deepest * block_tokens,
        deepest_bytes,
    )


def _weighed(mask: int, depth: int, certain: int, slow: list[int]) -> Iterator[tuple[int, float, float]]:
    """(workers, blocks, certain blocks), what has to be fetched counted less: those that fetch nothing together."""
    fetching = 0
    for fetched in slow[:depth]:
        fetching |= fetched
    fetching &= mask
    if mask != fetching:
        yield mask & ~fetching, depth, certain
    while fetching:
        bit = fetching & -fetching
        fetching ^= bit
        lost = [1.0 - SLOW_WEIGHT if fetched & bit else 0.0 for fetched in slow[:depth]]
        yield bit, depth - sum(lost), certain - sum(lost[:certain])


class Trust:
    """The share of expected generated tokens that engines found again: what a sampled spelling is worth."""

    def __init__(self) -> None:
        self._expected = self._found = 256.0

    @property
    def share(self) -> float:
        return self._found / self._expected

    def observe(self, expected_tokens: float, found_tokens: float) -> None:
        """Of so many tokens behind a generated block, so many came from the cache."""
        if expected_tokens > 0:
            self._expected = TRUST_FADE * self._expected + expected_tokens
            self._found = TRUST_FADE * self._found + min(max(found_tokens, 0.0), expected_tokens)


class EngineCache:
    """One engine's (or data-parallel rank's) part: its own names of blocks, and how often each is stored."""

    __slots__ = ("_aliases", "_copies", "_fast", "_group", "_slow", "bit", "blocks", "limit", "orphans", "overflows")

    def __init__(self, blocks: Blocks, bit: int, limit: int) -> None:
        """`limit`: most blocks taken in per medium; beyond, the oldest are forgotten."""
        self.blocks = blocks
        self.bit = bit
        self.limit = limit
        self.orphans = 0
        """Blocks that could not be placed: what they follow is not known."""
        self.overflows = 0
        self._fast: dict[Hash, int] = {}
        self._copies: dict[Hash, int] = {}  # stores beyond the first
        self._aliases: dict[int, int] = {}  # key -> hashes beyond the first: equal bytes, different tokens
        self._slow: dict[Hash, int] = {}
        self._group: int | None = None  # the group of layers whose blocks count, once known

    def __len__(self) -> int:
        return len(self._fast)

    def stored(self, event: Stored, roots: Callable[[str | None, str | None, int], int], table: list[bytes]) -> None:
        """`roots` gives where the chain of (adapter, cache salt, block size) begins; `table` the bytes of each token.
        Raises IndexError where a token is unknown; nothing has changed then."""
        if not self._counts(event):
            return
        if event.medium is not None and event.medium != FAST_MEDIUM:
            self._stored_slow(event.block_hashes)
            return
        size, tokens = event.block_size, event.token_ids
        if not tokens:
            return
        parent, extras = event.parent_block_hash, event.extra_keys
        is_root = parent is None
        if is_root:
            salt = _salt(extras, event.lora_name)
            unnamed = event.lora_id is not None and event.lora_name is None
            key = roots(f"\0{event.lora_id}" if unnamed else event.lora_name, salt, size)
        else:
            known = self._fast.get(parent) or self._slow.get(parent)  # type: ignore[arg-type]
            if known is None:
                self.orphans += len(event.block_hashes)
                return
            key, salt = known, None
        pieces = [table[token] for token in tokens]
        generated = len(event.block_hashes) == 1 and not is_root
        fast, blocks, bit, digest = self._fast, self.blocks, self.bit, xxh3_64_intdigest
        for number, name in enumerate(event.block_hashes):
            data = b"".join(pieces[number * size : (number + 1) * size])
            before = key
            if extras is not None and number < len(extras) and extras[number] is not None:
                before = _with_extras(key, extras[number], event.lora_name, salt if number == 0 else None)
            key = digest(data, before)
            held = fast.get(name)
            if held is not None:
                self._copies[name] = self._copies.get(name, 0) + 1
            else:
                fast[name] = key
                if blocks.holders.get(key, 0) & bit:
                    self._aliases[key] = self._aliases.get(key, 0) + 1
            if not generated:
                blocks.generated.discard(key)
            elif key not in blocks.holders:
                blocks.generated.add(key)
            blocks.hold(before, key, len(data), bit, is_root=is_root and number == 0)
        if len(fast) > self.limit:
            self._overflow()

    def removed(self, event: Removed) -> None:
        if self._group is not None and (event.group_idx or 0) != self._group:
            return
        if event.medium is not None and event.medium != FAST_MEDIUM:
            for name in event.block_hashes:
                key = self._slow.pop(name, None)
                if key is not None:
                    self.blocks.drop_slow(key, self.bit)
            return
        for name in event.block_hashes:
            copies = self._copies.get(name)
            if copies is None:
                self._drop(name)
            elif copies > 1:
                self._copies[name] = copies - 1
            else:
                del self._copies[name]

    def clear(self) -> None:
        """It holds nothing."""
        for key in self._fast.values():
            self.blocks.drop(key, self.bit)
        for key in self._slow.values():
            self.blocks.drop_slow(key, self.bit)
        self._fast.clear()
        self._copies.clear()
        self._aliases.clear()
        self._slow.clear()
        self._group = None

    def _counts(self, event: Stored) -> bool:
        """Whether the event is about the layers that look back at the whole prompt: models may have others beside them."""
        if event.kv_cache_spec_kind not in PREFIX_KINDS:
            return False
        if self._group is None:
            self._group = event.group_idx or 0
        return self._group == (event.group_idx or 0)

    def _stored_slow(self, names: list[Hash]) -> None:
        """Offloading names blocks the engine has computed before."""
        for name in names:
            key = self._fast.get(name)
            if key is None:
                self.orphans += name not in self._slow
            elif name not in self._slow:
                self._slow[name] = key
                self.blocks.hold_slow(key, self.bit)
        while len(self._slow) > self.limit:
            self.overflows += 1
            oldest = next(iter(self._slow))
            self.blocks.drop_slow(self._slow.pop(oldest), self.bit)

    def _drop(self, name: Hash) -> None:
        key = self._fast.pop(name, None)
        if key is None:
            return
        others = self._aliases.get(key)
        if others is None:
            self.blocks.drop(key, self.bit)
        elif others > 1:
            self._aliases[key] = others - 1
        else:
            del self._aliases[key]

    def _overflow(self) -> None:
        """An engine that never removes anything does not take the router's memory."""
        for name in list(islice(self._fast, len(self._fast) - self.limit)):
            self.overflows += 1
            self._copies.pop(name, None)
            self._drop(name)


def _salt(extras: list[Any] | None, lora: str | None) -> str | None:
    """The first block's extra key that is left beside the adapter's name. (An image's digest reads alike: no request has it
    for a salt, so that chain matches nothing.)"""
    first = extras[0] if extras else None
    left = [extra for extra in first if extra != lora] if isinstance(first, list) else []
    return left[0] if len(left) == 1 and isinstance(left[0], str) else None


def _with_extras(key: int, extras: Any, lora: str | None, salt: str | None) -> int:
    """The key to chain on where a block is named by more than its root says (an image's digest): no text leads there."""
    left = [extra for extra in extras if extra != lora and extra != salt] if isinstance(extras, list) else [extras]
    return xxh3_64_intdigest(repr(left).encode(), key) if left else key
