"""What one engine holds, by its own names of blocks; its events change the table of all (blocks.py).

Engines store a block again when they had to compute it again, under the same hash: stores are counted against removals. A
block on a slower medium (CPU memory, disk) has to be fetched. Blocks that came one at a time were filled while decoding: they
hold the tokens the model sampled, and the next turn of the conversation may spell the same text in others.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from xxhash import xxh3_64_intdigest

from kvfleet_router.core.kvevents.blocks import PART_SHIFT, Block, Blocks
from kvfleet_router.core.kvevents.wire import Hash, Removed, Stored

FAST_MEDIUM = "GPU"
"""What vLLM calls the medium its kernels read from, on any accelerator; none named: the same."""
PREFIX_KINDS = frozenset([None, "full_attention", "mla_attention"])
"""Kinds of cache in which a block is found by the whole prompt before it."""


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
        extended = extras is not None and any(extras)
        fast, parts, bit, digest, link = self._fast, self.blocks.parts, self.bit, xxh3_64_intdigest, self.blocks.link
        end = 0
        for number, name in enumerate(event.block_hashes):
            start, end = end, end + size
            data = b"".join(pieces[start:end])
            chained = before.key
            if extended and extras is not None and number < len(extras) and extras[number] is not None:
                chained = _with_extras(chained, extras[number], event.lora_name, salt if number == 0 else None)
            block = fast.get(name)
            if block is None:
                key = digest(data, chained)
                part = parts[key >> PART_SHIFT]
                block = part.get(key)
                if block is None:
                    block = part[key] = Block(key, bit, 0, 0, generated)
                else:
                    block.generated = block.generated and generated
                    if block.holders & bit:
                        self._aliases[key] = self._aliases.get(key, 0) + 1
                    else:
                        block.holders |= bit
                fast[name] = block
            else:
                block.generated = block.generated and generated
                self._copies[name] = self._copies.get(name, 0) + 1
            length = len(data)
            if before.following != length and chained == before.key:  # else no text leads there
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
        fast, copied, aliases, others = self._fast, self._copies, self._aliases, self._others
        for name in event.block_hashes:
            if copied and name in copied:
                copied[name] -= 1
                if not copied[name]:
                    del copied[name]
                continue
            block = fast.pop(name, None)
            if block is None:
                continue
            if aliases and block.key in aliases:
                self._drop_alias(block.key)
                continue
            block.holders = left = block.holders & others
            if not left and not block.slow_holders:
                self.blocks.forget(block)

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

    def _drop_alias(self, key: int) -> None:
        """One of several names of the block is gone."""
        self._aliases[key] -= 1
        if not self._aliases[key]:
            del self._aliases[key]

    def _overflow(self) -> None:
        """An engine that never removes anything does not take the router's memory."""
        for name in list(islice(self._fast, len(self._fast) - self.limit)):
            self.overflows += 1
            self._copies.pop(name, None)
            self.removed(Removed([name], group_idx=self._group))


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
