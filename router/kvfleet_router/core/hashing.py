"""Names a prompt's blocks by chained hashes: equal hash, equal prefix up to and including that block.

The chain starts from a seed of everything else that keys an engine's prefix cache (model or adapter, cache salt), so
equal text under another model or another tenant's salt never matches. xxh3 is no cryptographic hash: a collision (2^-64
by chance, less rarely by intent) misleads the choice of a worker and can leak nothing, for engines key their own caches.
"""

from __future__ import annotations

from functools import lru_cache
from struct import iter_unpack
from typing import Any, Final, cast

from xxhash import xxh3_64_intdigest

MAX_BLOCKS: Final = 8192
"""Blocks indexed of one prompt: 2 MiB of text at 256 bytes a block. Bounds the work and memory one request can cause."""


@lru_cache(maxsize=1024)
def seed_of(model: str, cache_salt: str | None, block_bytes: int) -> int:
    """Where a chain starts. Lengths are part of it, so that no two different triples read alike."""
    salt = "" if cache_salt is None else f"salt:{cache_salt}"
    return int(xxh3_64_intdigest(f"{block_bytes}:{len(model)}:{model}:{salt}".encode()))


def block_hashes(prompt: bytes, *, seed: int, block_bytes: int) -> list[int]:
    """Chained hashes of the prompt's whole blocks; a last part of a block has no hash."""
    blocks = min(len(prompt) // block_bytes, MAX_BLOCKS)
    digest, chain = xxh3_64_intdigest, cast(Any, seed)  # Any: compiled code keeps the objects that the loop hands on
    whole = memoryview(prompt)[: blocks * block_bytes]
    return [chain := digest(block, chain) for (block,) in iter_unpack(f"{block_bytes}s", whole)]
