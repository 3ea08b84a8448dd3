"""The KV cache of one engine: blocks with reference counts, a prefix cache over them, LRU eviction. Pure.

A block is an integer, the number of a physical block. It is in one of three states:

    in use    held by one or more running requests (`references` > 0)
    cached    held by none, but findable by its key; waits in the LRU queue and may be taken away
    empty     held by none, without a key; taken before any cached one

A key names the content of a block *and of everything before it* (chained hash), so a prompt's longest cached prefix is
found by walking its keys until one is missing. Two physical blocks may hold the same key: a prompt whose blocks are all
cached recomputes its last block, and that copy is stored again. The key lives until its last copy is evicted.

As in vLLM, a request gives its blocks back tail first, so that the tail of a chain is evicted before its head; and block 0
is reserved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """More blocks were asked for than are free."""


class KvCache:
    """`blocks` physical blocks of `block_tokens` tokens each. `removed` collects evicted keys when `record` is set."""

    __slots__ = (
        "_copies",
        "_empty",
        "_fresh",
        "_idle",
        "_key",
        "_primary",
        "_references",
        "block_tokens",
        "blocks",
        "prefix_caching",
        "record",
        "removed",
    )

    def __init__(self, blocks: int, block_tokens: int, *, prefix_caching: bool = True, record: bool = False) -> None:
        if blocks < 2:
            raise ValueError(f"blocks must be at least 2 (one is reserved), got {blocks}: raise the KV tokens")
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, got {block_tokens}")
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.prefix_caching = prefix_caching
        self.record = record
        self.removed: list[int] = []
        self._references = [0] * blocks
        self._key: list[int | None] = [None] * blocks
        self._fresh = 1  # blocks from here on were never used; block 0 is reserved
        self._empty: list[int] = []  # used before, now without content
        self._idle: OrderedDict[int, None] = OrderedDict()  # the LRU queue of cached blocks
        self._primary: dict[int, int] = {}  # key -> the block a hit uses
        self._copies: dict[int, list[int]] = {}  # key -> further blocks with the same content

    @property
    def capacity(self) -> int:
        """Blocks that requests can hold."""
        return self.blocks - 1

    @property
    def free(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return self.blocks - self._fresh + len(self._empty) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the blocks in use by requests, 0 to 1."""
        return 1.0 - self.free / self.capacity

    @property
    def cached_keys(self) -> int:
        """Number of different keys that can be hit."""
        return len(self._primary)

    def __contains__(self, key: int) -> bool:
        return key in self._primary

    def references(self, block: int) -> int:
        return self._references[block]

    def lookup(self, keys: Sequence[int], limit: int) -> list[int]:
        """The blocks of the longest cached prefix of `keys`, at most `limit` of them. Changes nothing."""
        hits: list[int] = []
        if not self.prefix_caching:
            return hits
        find = self._primary.get
        for key in keys[:limit]:
            block = find(key)
            if block is None:
                break
            hits.append(block)
        return hits

    def idle_among(self, hits: Iterable[int]) -> int:
        """How many of these blocks count as free: holding them lowers `free` by so many."""
        references = self._references
        return sum(1 for block in hits if not references[block])

    def hold(self, hits: Iterable[int]) -> None:
        """Take cached blocks into use."""
        references, idle = self._references, self._idle
        for block in hits:
            if not references[block]:
                del idle[block]
            references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for new content, evicting the least recently used ones. All or nothing."""
        if count > self.free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.free} free")
        taken: list[int] = []
        if self._empty:
            taken = self._empty[-count:] if count else []
            del self._empty[len(self._empty) - len(taken) :]
        fresh = min(count - len(taken), self.blocks - self._fresh)
        if fresh:
            taken += range(self._fresh, self._fresh + fresh)
            self._fresh += fresh
        for _ in range(count - len(taken)):
            block, _none = self._idle.popitem(last=False)
            self._forget(block)
            taken.append(block)
        references = self._references
        for block in taken:
            references[block] = 1
        return taken

    def store(self, blocks: Iterable[int], keys: Iterable[int]) -> None:
        """Make these blocks, now full, findable by these keys."""
        primary, key_of = self._primary, self._key
        for block, key in zip(blocks, keys, strict=True):
            key_of[block] = key
            if primary.setdefault(key, block) != block:
                self._copies.setdefault(key, []).append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Give a request's blocks back, in the order of its tokens."""
        references, idle, keys = self._references, self._idle, self._key
        for block in reversed(blocks):
            left = references[block] - 1
            references[block] = left
            if left:
                continue
            if keys[block] is None:
                self._empty.append(block)
            else:
                idle[block] = None

    def clear(self) -> bool:
        """Forget everything cached; refused (False) while a request holds blocks."""
        if self.free != self.capacity:
            return False
        self._key = [None] * self.blocks
        self._empty += self._idle
        self._idle.clear()
        self._primary.clear()
        self._copies.clear()
        return True

    def _forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        key = self._key[block]
        assert key is not None
        self._key[block] = None
        copies = self._copies.get(key)
        if copies is None:
            del self._primary[key]
        else:
            if self._primary[key] == block:
                self._primary[key] = copies.pop(0)
            else:
                copies.remove(block)
            if not copies:
                del self._copies[key]
        if self.record:
            self.removed.append(key)
