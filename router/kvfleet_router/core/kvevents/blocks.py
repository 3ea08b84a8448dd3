"""The table of blocks: which worker holds which, by keys that lead through a prompt's bytes.

A block is named by a key: a 64-bit hash of its bytes, chained from the key of the block before it; the chain begins at a
root that stands for everything else that names a block (adapter, cache salt, block size). Beside each key is noted how many
bytes the blocks that follow it have, so that a prompt can be walked (walk.py).

Two blocks of equal bytes and different tokens have one key. That loses nothing: engines drop a chain from its end, so
whoever holds the later block holds those before it, and the longest way over either is the longest over both.

A block is one object, known by its key to the fleet and by its hashes to the engines that hold it (enginecache.py), so that an
event touches the table of keys once. The table has many parts, none of them large: a dictionary that grows is copied as a whole,
and one of a whole fleet's blocks would keep requests waiting meanwhile. Nothing here is the garbage collector's to visit.
"""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

PART_SHIFT = 56
"""The table's part is named by a key's highest bits: dictionaries themselves go by the lowest."""
PARTS = 1 << 64 - PART_SHIFT
STRETCH_BLOCKS = 48
MAX_STRETCHES = 4096
"""Of 16 tokens a block: 3 million tokens of prompts. 2 MB, and 16 MB of blocks that nobody holds any more at the very most."""


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


class Stretch(NamedTuple):
    """Blocks that an earlier walk passed one after another, to be passed in one step."""

    digest: int
    """Of the bytes of all, chained from the key of the block before them."""
    length: int
    """Of these bytes."""
    inner: tuple[Block, ...]
    """All but the last."""
    last: Block


class Blocks:
    """All workers' blocks of one model. `mask`s are of workers, by the bit the caller gives them."""

    def __init__(self, stretch_blocks: int = STRETCH_BLOCKS) -> None:
        self.parts: list[dict[int, Block]] = [{} for _ in range(PARTS)]
        self.roots: dict[int, Root] = {}
        self.stretch_blocks = stretch_blocks
        self.stretches: dict[int, Stretch] = {}
        """By the key of the block before them."""

    def __len__(self) -> int:
        """Blocks that somebody holds."""
        return sum(map(len, self.parts))

    def get(self, key: int) -> Block | None:
        return self.parts[key >> PART_SHIFT].get(key)

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

    def remember(self, origin: int, digest: int, length: int, passed: list[Block]) -> None:
        """A walk passed these blocks, of so many bytes together, behind the one of key `origin`."""
        stretches = self.stretches
        if len(stretches) >= MAX_STRETCHES and origin not in stretches:
            del stretches[next(iter(stretches))]
        stretches[origin] = Stretch(digest, length, tuple(passed[:-1]), passed[-1])
