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

A block is one object, known by its key to the fleet and by its hashes to the engines that hold it, so that an event touches
the table of keys once. The table has many parts, none of them large: a dictionary that grows is copied as a whole, and one
of a whole fleet's blocks would keep requests waiting meanwhile. Nothing here is the garbage collector's to
visit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from msgspec import Struct
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


PART_SHIFT = 56
"""The table's part is named by a key's highest bits: dictionaries themselves go by the lowest."""
PARTS = 1 << 64 - PART_SHIFT


class Block(Struct, gc=False, eq=False):
    """A block that somebody holds. It refers to no other blocks than its root, so there are no cycles to collect."""

    key: int
    holders: int = 0
    """Workers that have it on their fast medium."""
    slow_holders: int = 0
    following: int = 0
    """The length of the blocks that follow; several: minus a bit mask of the lengths; 0: none is known."""
    generated: bool = False
    """It holds sampled tokens. What was also computed as part of a prompt is spelled as prompts are."""
    root: Root | None = None
    """Of the first block of a chain."""


class Root(Block, gc=False, eq=False):
    """Where chains begin; held by nobody."""

    uses: int = 0
    """First blocks that begin here."""


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
        self.parts: list[dict[int, Block]] = [{} for _ in range(PARTS)]
        self.roots: dict[int, Root] = {}

    def __len__(self) -> int:
        """Blocks that somebody holds."""
        return sum(map(len, self.parts))

    def get(self, key: int) -> Block | None:
        return self.parts[key >> PART_SHIFT].get(key)

    # -- what engines say -------------------------------------------------------------------------------------------------

    def root(self, key: int) -> Root:
        """Where this chain begins. To be forgotten by the caller if no first block came to use it."""
        root = self.roots.get(key)
        if root is None:
            root = self.roots[key] = Root(key)
        return root

    @staticmethod
    def link(parent: Block, length: int) -> None:
        """A block of so many bytes follows."""
        following = parent.following
        if following != length and length:
            if following:
                known = 1 << following if following > 0 else -following
                length = -(known | 1 << length)
            parent.following = length

    def forget(self, block: Block) -> None:
        """Nobody holds it any more."""
        key = block.key
        self.parts[key >> PART_SHIFT].pop(key, None)
        root = block.root
        if root is not None:
            block.root = None
            root.uses -= 1
            if not root.uses:
                self.roots.pop(root.key, None)

    # -- what requests ask ------------------------------------------------------------------------------------------------

    def walk(self, prompt: bytes, root: int, block_tokens: int) -> Found:
        """Who holds how much of the prompt. A block that ends where the prompt ends does not count: its last token, at least,
        is computed in any case, and engines then compute the whole block."""
        begin = self.roots.get(root)
        if begin is None:
            return NOTHING
        ways = [_Way(begin, 0, 0, 0, 0, -1, [])]
        ends: list[_End] = []
        deepest = deepest_at = 0
        visits = MAX_VISITS
        parts, digest, size = self.parts, xxh3_64_intdigest, len(prompt)
        while ways:
            block, at, end, live, depth, certain, slow = ways.pop()
            while True:
                if not end:
                    length = block.following
                    if length > 0:
                        end = at + length
                    elif length and visits > 0:
                        branches = self._branches(prompt, at, block.key, -length)
                        visits -= length.bit_length()
                        if not branches:
                            break
                        end = branches.pop()
                        ways += [_Way(block, at, other, live, depth, certain, slow[:]) for other in branches]
                    else:
                        break
                if end >= size:
                    break
                key = digest(prompt[at:end], block.key)
                found = parts[key >> PART_SHIFT].get(key)
                # The long middle of a way, where the same workers hold block after block: nothing but this is done there.
                while found is not None and found.holders == live and depth:
                    if found.slow_holders or slow or (found.generated and certain < 0):
                        break
                    block, length = found, found.following
                    depth += 1
                    at = end
                    if length <= 0 or (end := at + length) >= size:
                        end = 0
                        break
                    key = digest(prompt[at:end], key)
                    found = parts[key >> PART_SHIFT].get(key)
                if not end:
                    continue
                if found is None:
                    break
                block = found
                mask = block.holders
                if slow or block.slow_holders:
                    fetched = block.slow_holders & ~mask
                    mask |= fetched
                    slow += [0] * (depth - len(slow))
                    slow.append(fetched)
                if mask != live:
                    kept = live & mask if depth else mask
                    if kept != live:
                        if live:
                            ends.append(_End(live ^ kept, depth, certain, slow))
                        live = kept
                        if not kept:
                            break
                if certain < 0 and block.generated:
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
                if self.get(found) is not None:
                    ends.append(at + length)
        return ends


class _Way(NamedTuple):
    """One way through a prompt, so far."""

    block: Block
    """Entered last."""
    at: int
    end: int
    """Of the block to enter next; 0: not chosen yet."""
    live: int
    """Workers that hold everything so far."""
    depth: int
    certain: int
    """Blocks before the first generated one; -1: there was none."""
    slow: list[int]
    """Of each block, the workers that hold it on a slower medium only; empty up to the first such block."""


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

    __slots__ = (
        "_aliases",
        "_copies",
        "_fast",
        "_group",
        "_others",
        "_slow",
        "bit",
        "blocks",
        "limit",
        "orphans",
        "overflows",
    )

    def __init__(self, blocks: Blocks, bit: int, limit: int) -> None:
        """`limit`: most blocks taken in per medium; beyond, the oldest are forgotten."""
        self.blocks = blocks
        self.bit = bit
        self.limit = limit
        self.orphans = 0
        """Blocks that could not be placed: what they follow is not known."""
        self.overflows = 0
        self._others = ~bit
        self._fast: dict[Hash, Block] = {}
        self._copies: dict[Hash, int] = {}  # stores beyond the first
        self._aliases: dict[int, int] = {}  # key -> hashes beyond the first: equal bytes, different tokens
        self._slow: dict[Hash, Block] = {}
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
        pieces = [table[token] for token in tokens]
        salt = root = None
        before: Block | None
        if parent is None:
            salt = _salt(extras, event.lora_name)
            unnamed = event.lora_id is not None and event.lora_name is None
            before = root = self.blocks.root(roots(f"\0{event.lora_id}" if unnamed else event.lora_name, salt, size))
        else:
            before = self._fast.get(parent) or self._slow.get(parent)
            if before is None:
                self.orphans += len(event.block_hashes)
                return
        generated = len(event.block_hashes) == 1 and parent is not None
        fast, parts, bit, digest, link = self._fast, self.blocks.parts, self.bit, xxh3_64_intdigest, self.blocks.link
        end = 0
        for number, name in enumerate(event.block_hashes):
            start, end = end, end + size
            data = b"".join(pieces[start:end])
            chained = before.key
            if extras is not None and number < len(extras) and extras[number] is not None:
                chained = _with_extras(chained, extras[number], event.lora_name, salt if number == 0 else None)
            block = fast.get(name)
            if block is not None:
                self._copies[name] = self._copies.get(name, 0) + 1
            else:
                key = digest(data, chained)
                part = parts[key >> PART_SHIFT]
                block = part.get(key)
                if block is None:
                    block = part[key] = Block(key, bit, 0, 0, generated)
                elif block.holders & bit:
                    self._aliases[key] = self._aliases.get(key, 0) + 1
                else:
                    block.holders |= bit
                fast[name] = block
            if not generated:
                block.generated = False
            if chained == before.key:  # no text leads to others
                length = len(data)
                if before.following != length:
                    link(before, length)
            if before is root and block.root is None:
                block.root = root
                root.uses += 1
            before = block
        if root is not None and not root.uses:
            self.blocks.roots.pop(root.key, None)
        if len(fast) > self.limit:
            self._overflow()

    def removed(self, event: Removed) -> None:
        if self._group is not None and (event.group_idx or 0) != self._group:
            return
        if event.medium is not None and event.medium != FAST_MEDIUM:
            for name in event.block_hashes:
                self._drop_slow(name)
            return
        copied = self._copies
        for name in event.block_hashes:
            copies = copied.get(name) if copied else None
            if copies is None:
                self._drop(name)
            elif copies > 1:
                copied[name] = copies - 1
            else:
                del copied[name]

    def clear(self) -> None:
        """It holds nothing."""
        others, forget = self._others, self.blocks.forget
        for block in self._fast.values():
            block.holders &= others
            if not block.holders and not block.slow_holders:
                forget(block)
        for block in self._slow.values():
            block.slow_holders &= others
            if not block.holders and not block.slow_holders:
                forget(block)
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
            block = self._fast.get(name)
            if block is None:
                self.orphans += name not in self._slow
            elif name not in self._slow:
                self._slow[name] = block
                block.slow_holders |= self.bit
        while len(self._slow) > self.limit:
            self.overflows += 1
            self._drop_slow(next(iter(self._slow)))

    def _drop_slow(self, name: Hash) -> None:
        block = self._slow.pop(name, None)
        if block is not None:
            block.slow_holders &= self._others
            if not block.holders and not block.slow_holders:
                self.blocks.forget(block)

    def _drop(self, name: Hash) -> None:
        block = self._fast.pop(name, None)
        if block is None:
            return
        if self._aliases:
            others = self._aliases.get(block.key)
            if others is not None:
                if others > 1:
                    self._aliases[block.key] = others - 1
                else:
                    del self._aliases[block.key]
                return
        block.holders &= self._others
        if not block.holders and not block.slow_holders:
            self.blocks.forget(block)

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
