"""Chained block hashes: equal exactly where the prefixes are."""

from hypothesis import given
from hypothesis import strategies as st

from kvfleet_router.core.hashing import MAX_BLOCKS, block_hashes, seed_of


@given(st.binary(max_size=600), st.binary(max_size=600), st.sampled_from([64, 100, 256]))
def test_hashes_agree_exactly_as_far_as_whole_blocks_do(one, other, block_bytes):
    first = block_hashes(one, seed=1, block_bytes=block_bytes)
    second = block_hashes(other, seed=1, block_bytes=block_bytes)
    assert len(first) == len(one) // block_bytes
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        end = (place + 1) * block_bytes
        assert (a == b) == (one[:end] == other[:end])


def test_the_seed_separates_models_salts_and_block_sizes():
    seeds = [
        seed_of("m", None, 256),
        seed_of("n", None, 256),
        seed_of("m", "", 256),
        seed_of("m", "a", 256),
        seed_of("m:a", None, 256),
        seed_of("m", None, 512),
    ]
    assert len(set(seeds)) == len(seeds)
    chains = {tuple(block_hashes(b"x" * 512, seed=seed, block_bytes=256)) for seed in seeds}
    assert len(chains) == len(seeds)


def test_equal_blocks_at_different_places_differ():
    hashes = block_hashes(b"x" * 2560, seed=7, block_bytes=256)
    assert len(set(hashes)) == 10


def test_one_prompt_cannot_cause_unbounded_work():
    assert len(block_hashes(b"x" * 64 * (MAX_BLOCKS + 100), seed=0, block_bytes=64)) == MAX_BLOCKS
