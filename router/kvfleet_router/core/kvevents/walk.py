"""How far a prompt's bytes lead through the blocks that workers hold.

As many bytes are cut off as the blocks that follow here have, hashed, and the key is looked up. Blocks have a fixed number of
tokens, hence any number of bytes: where several lengths follow, each is tried, and of several ways through a prompt each
worker's longest counts. A block on a slower medium counts SLOW_WEIGHT of one on the accelerator; blocks filled while decoding
are told apart, for the caller to weigh.

The long middle of most ways was walked before: the same conversation, or another with the same beginning. STRETCH_BLOCKS blocks
passed one after another are remembered with the hash of all their bytes; where that comes again and each of the blocks is still
what it was for this walk, they are passed at once. The answer is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from kvfleet_router.core.index import Match
from kvfleet_router.core.kvevents.blocks import PART_SHIFT, Block, Blocks, Stretch

SLOW_WEIGHT = 0.7
"""Of a cached token on a slower medium: fetching takes a part of the time that computing would."""
MAX_VISITS = 16_384
"""Ways tried in one walk, where there are several."""


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


def walk(blocks: Blocks, prompt: bytes, root: int, block_tokens: int) -> Found:
    """Who holds how much of the prompt. A block that ends where the prompt ends does not count: its last token, at least,
    is computed in any case, and engines then compute the whole block."""
    begin = blocks.roots.get(root)
    if begin is None:
        return NOTHING
    ways = [_Way(begin, 0, 0, 0, 0, -1, [])]
    ends: list[_End] = []
    deepest = deepest_at = 0
    visits = MAX_VISITS
    parts, digest, size = blocks.parts, xxh3_64_intdigest, len(prompt)
    stretch_blocks, stretches = blocks.stretch_blocks, blocks.stretches
    passed: list[Block] = []  # since `origin`, none left out, if there are as many as a stretch has
    pass_by = passed.append
    while ways:
        block, at, end, live, depth, certain, slow = ways.pop()
        passed.clear()
        origin, origin_at = block.key, at
        until = depth - depth % stretch_blocks + stretch_blocks  # where the next stretch begins
        while True:
            if not end:
                if depth == until and not slow:
                    stretch = stretches.get(block.key)
                    while stretch is not None and _leads(stretch, prompt, at, block, live, certain):
                        block = stretch.last
                        depth += stretch_blocks
                        at += stretch.length
                        stretch = stretches.get(block.key)
                    origin, origin_at, until = block.key, at, depth + stretch_blocks
                    passed.clear()
                length = block.following
                if length > 0:
                    end = at + length
                elif length and visits > 0:
                    branches = _branches(blocks, prompt, at, block.key, -length)
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
                pass_by(block)
                if depth == until:
                    if len(passed) == stretch_blocks:
                        blocks.remember(origin, digest(prompt[origin_at:at], origin), at - origin_at, passed)
                    end = 0
                    break
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


def _leads(stretch: Stretch, prompt: bytes, at: int, origin: Block, live: int, certain: int) -> bool:
    """Whether the prompt goes on by the stretch behind `origin`, no other way branches off, and all blocks have the same holders."""
    end = at + stretch.length
    if origin.following <= 0 or end >= len(prompt):
        return False
    if xxh3_64_intdigest(prompt[at:end], origin.key) != stretch.digest:
        return False
    for block in stretch.inner:
        if block.holders != live or block.following <= 0 or (block.generated and certain < 0):
            return False
    return stretch.last.holders == live and not (stretch.last.generated and certain < 0)


def _branches(blocks: Blocks, prompt: bytes, at: int, key: int, lengths: int) -> list[int]:
    """Where blocks end that follow here and are held by somebody; `lengths`: a bit mask of what to try."""
    ends = []
    while lengths:
        length = (lengths & -lengths).bit_length() - 1
        lengths &= lengths - 1
        if at + length < len(prompt):
            found = xxh3_64_intdigest(prompt[at : at + length], key)
            if blocks.get(found) is not None:
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
