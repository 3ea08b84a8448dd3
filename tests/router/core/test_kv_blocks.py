"""The byte index against a plain model of it, and what it does with tiers, generated blocks, images, and engines that lie."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvfleet_router.core.kvevents.blocks import SLOW_WEIGHT, Blocks, EngineCache, Trust
from kvfleet_router.core.kvevents.view import ModelView
from kvfleet_router.core.kvevents.wire import Removed, Stored

TABLE = [b"a", b"b", b"ab", b"ba", b"", b"c"]
"""Many ways to spell a text."""
SIZE = 2
root = ModelView.root


def stored(hashes: list[Any], tokens: list[int], parent: Any = None, **fields: Any) -> Stored:
    return Stored(hashes, parent, tokens, SIZE, **fields)


def tokens_of(blocks: Blocks, prompt: bytes, bit: int = 1, **key: Any) -> int:
    found = blocks.walk(prompt, root(key.get("lora"), key.get("salt"), SIZE), SIZE)
    return sum(tokens for mask, tokens in found.tokens if mask & bit)


CHAINS = st.lists(st.lists(st.integers(0, 5), min_size=SIZE, max_size=5 * SIZE), min_size=1, max_size=6)


@given(CHAINS, st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2**16)), max_size=25), st.text("abc", max_size=14))
def test_the_longest_chain_of_equal_bytes_is_found(
    chains: list[list[int]], actions: list[tuple[int, int]], text: str
) -> None:
    """Two engines store chains and drop blocks, each the last of a chain first, as engines do."""
    blocks = Blocks()
    engines = [EngineCache(blocks, 1 << number, 1000) for number in range(2)]
    held: list[dict[tuple[int, ...], int]] = [{}, {}]  # chain of tokens -> copies
    for which, draw in actions:
        rng = random.Random(draw)
        if held[which] and rng.random() < 0.4:
            leaves = [chain for chain in held[which] if not any(o[: len(chain)] == chain != o for o in held[which])]
            leaf = leaves[rng.randrange(len(leaves))]
            engines[which].removed(Removed([hash(leaf)]))
            held[which][leaf] -= 1
            if not held[which][leaf]:
                del held[which][leaf]
            continue
        chain = chains[rng.randrange(len(chains))]
        ends = range(SIZE, len(chain) - len(chain) % SIZE + 1, SIZE)
        names = [tuple(chain[:end]) for end in ends]
        engines[which].stored(stored([hash(name) for name in names], chain[: ends[-1]]), root, TABLE)
        for name in names:
            held[which][name] = held[which].get(name, 0) + 1
    prompt = text.encode()
    for which in range(2):
        expected = max(
            (
                len(chain)
                for chain in held[which]
                if prompt.startswith(data := b"".join(TABLE[token] for token in chain)) and len(data) < len(prompt)
                if all(
                    len(b"".join(TABLE[token] for token in chain[at : at + SIZE])) for at in range(0, len(chain), SIZE)
                )
            ),
            default=0,
        )
        assert tokens_of(blocks, prompt, 1 << which) == expected
    for engine in engines:
        engine.clear()
    assert len(blocks) == 0
    assert not blocks.roots


def test_a_block_that_ends_the_prompt_is_computed_again() -> None:
    blocks = Blocks()
    EngineCache(blocks, 1, 100).stored(stored([1, 2], [0, 1, 0, 1]), root, TABLE)
    assert tokens_of(blocks, b"abab") == 2
    assert tokens_of(blocks, b"ababc") == 4


def test_equal_bytes_in_other_tokens_are_one_way_and_both_have_to_go() -> None:
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100)
    engine.stored(stored([1], [0, 3]), root, TABLE)  # a ba
    engine.stored(stored([2], [2, 0]), root, TABLE)  # ab a
    engine.removed(Removed([1]))
    assert tokens_of(blocks, b"abac") == 2
    engine.removed(Removed([2]))
    assert tokens_of(blocks, b"abac") == 0


def test_a_chain_whose_beginning_is_unknown_is_left_out_and_counted() -> None:
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100)
    engine.stored(stored([2], [0, 1], parent=1), root, TABLE)
    assert engine.orphans == 1
    engine.removed(Removed([2, 99]))
    assert len(blocks) == 0


def test_a_slower_medium_counts_less_and_outlives_the_fast_one() -> None:
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100)
    other = EngineCache(blocks, 2, 100)
    for one in (engine, other):
        one.stored(stored([1, 2], [0, 1, 0, 1], medium="GPU"), root, TABLE)
    engine.stored(Stored([1, 2], None, [], SIZE, medium="CPU"), root, TABLE)
    assert tokens_of(blocks, b"ababc") == 4
    engine.removed(Removed([2], medium="GPU"))
    engine.removed(Removed([1], medium="GPU"))
    assert tokens_of(blocks, b"ababc") == int(4 * SLOW_WEIGHT)
    assert tokens_of(blocks, b"ababc", 2) == 4
    engine.removed(Removed([1, 2], medium="CPU"))
    assert tokens_of(blocks, b"ababc") == 0
    assert len(blocks) == 2
    other.clear()
    assert len(blocks) == 0


def test_blocks_of_other_kinds_of_layers_are_not_prefixes() -> None:
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100)
    engine.stored(stored([1], [0, 1], group_idx=1, kv_cache_spec_kind="sliding_window"), root, TABLE)
    engine.stored(stored([1], [0, 1], group_idx=0, kv_cache_spec_kind="full_attention"), root, TABLE)
    engine.removed(Removed([1], group_idx=1))
    assert tokens_of(blocks, b"abc") == 2
    engine.removed(Removed([1], group_idx=0))
    assert tokens_of(blocks, b"abc") == 0


def test_what_an_image_names_is_found_by_no_text() -> None:
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100)
    engine.stored(stored([1, 2], [0, 1, 0, 1], extra_keys=[None, ["image-digest"]]), root, TABLE)
    assert tokens_of(blocks, b"ababc") == 2


def test_chains_that_begin_with_an_image_leave_nothing_behind() -> None:
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100)
    for number in range(50):
        keys = [[f"image-{number}", "salt"], None]
        engine.stored(stored([number, 1000 + number], [0, 1, 0, 1], extra_keys=keys), root, TABLE)
    assert tokens_of(blocks, b"ababc") == 0
    engine.clear()
    assert len(blocks) == 0
    assert not blocks.roots


def test_a_hash_that_names_other_tokens_is_the_block_it_was() -> None:
    """No engine does that; whoever does leaves nothing behind."""
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100)
    engine.stored(stored([1], [0, 1]), root, TABLE)
    engine.stored(stored([1, 2], [5, 5, 0, 1]), root, TABLE)
    engine.removed(Removed([1]))
    engine.removed(Removed([1]))
    engine.removed(Removed([2]))
    assert len(blocks) == len(engine) == 0
    assert not blocks.roots


def test_one_hash_under_many_salts_leaves_nothing_behind() -> None:
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100)
    for number in range(50):
        engine.stored(stored([1], [0, 1], extra_keys=[[f"salt-{number}"]]), root, TABLE)
    assert len(blocks.roots) == 1
    engine.clear()
    assert len(blocks) == 0
    assert not blocks.roots


def test_no_part_of_the_table_holds_much_of_it() -> None:
    """A dictionary that grows is copied as a whole: a part has to stay small."""
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100_000)
    rng = random.Random(1)
    for number in range(1000):
        tokens = [rng.randrange(6) for _ in range(40)]
        engine.stored(stored([number * 100 + place for place in range(20)], tokens), root, TABLE)
    assert max(map(len, blocks.parts)) < 3 * len(blocks) / len(blocks.parts) + 20


def test_an_adapter_known_by_number_alone_is_matched_by_nothing() -> None:
    blocks = Blocks()
    EngineCache(blocks, 1, 100).stored(stored([1], [0, 1], lora_id=3), root, TABLE)
    assert tokens_of(blocks, b"abc") == tokens_of(blocks, b"abc", lora="3") == 0


def test_an_engine_that_never_removes_takes_no_more_than_its_limit() -> None:
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100)
    for number in range(5000):
        salt = [[f"salt-{number}"]]
        engine.stored(stored([number], [0, 1], extra_keys=salt), root, TABLE)
    assert len(blocks) == len(engine) == 100
    assert engine.overflows == 4900
    assert len(blocks.roots) == 100


def test_generated_blocks_are_certain_once_they_were_part_of_a_prompt() -> None:
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100)
    engine.stored(stored([1], [0, 1]), root, TABLE)
    engine.stored(stored([2], [0, 1], parent=1), root, TABLE)  # one at a time: decoding
    found = blocks.walk(b"ababc", root(None, None, SIZE), SIZE)
    assert (found.tokens, found.certain) == ([(1, 4)], [(1, 2)])
    engine.stored(stored([8, 9], [0, 1, 0, 1]), root, TABLE)  # the next turn, computed from its text
    found = blocks.walk(b"ababc", root(None, None, SIZE), SIZE)
    assert (found.tokens, found.certain) == ([(1, 4)], [(1, 4)])


def test_trust_in_generated_blocks_follows_what_engines_find() -> None:
    trust = Trust()
    assert trust.share == 1.0
    for _ in range(200):
        trust.observe(160, 40)
    assert 0.2 < trust.share < 0.3
    for _ in range(400):
        trust.observe(160, 160)
    assert trust.share > 0.99


def test_a_walk_through_endless_ways_ends() -> None:
    """Blanks of every length, all alike: the number of ways grows with every block."""
    table = [b" " * length for length in range(1, 60)]
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 100_000)
    rng = random.Random(1)
    for number in range(300):
        tokens = [rng.randrange(59) for _ in range(40)]
        engine.stored(stored([(number * 100 + place) for place in range(20)], tokens), root, table)
    found = blocks.walk(b" " * 3000, root(None, None, SIZE), SIZE)
    assert found.deepest_tokens >= SIZE
