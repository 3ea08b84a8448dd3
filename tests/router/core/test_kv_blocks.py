"""The byte index against a plain model of it, and what it does with tiers, generated blocks, images, and engines that lie."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_router.core.kvevents.blocks import MAX_STRETCHES, STRETCH_BLOCKS, Block, Blocks
from kvfleet_router.core.kvevents.enginecache import EngineCache
from kvfleet_router.core.kvevents.view import ModelView, Trust
from kvfleet_router.core.kvevents.walk import SLOW_WEIGHT, walk
from kvfleet_router.core.kvevents.wire import Removed, Stored

TABLE = [b"a", b"b", b"ab", b"ba", b"", b"c"]
"""Many ways to spell a text."""
SIZE = 2
root = ModelView.root


def stored(hashes: list[Any], tokens: list[int], parent: Any = None, **fields: Any) -> Stored:
    return Stored(hashes, parent, tokens, SIZE, **fields)


def tokens_of(blocks: Blocks, prompt: bytes, bit: int = 1, **key: Any) -> int:
    found = walk(blocks, prompt, root(key.get("lora"), key.get("salt"), SIZE), SIZE)
    return sum(tokens for mask, tokens in found.tokens if mask & bit)


CHAINS = st.lists(st.lists(st.integers(0, 5), min_size=SIZE, max_size=5 * SIZE), min_size=1, max_size=6)


@given(CHAINS, st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2**16)), max_size=25), st.text("abc", max_size=14))
def test_the_longest_chain_of_equal_bytes_is_found(
    chains: list[list[int]], actions: list[tuple[int, int]], text: str
) -> None:
    """Two engines store chains and drop blocks, each the last of a chain first, as engines do."""
    blocks = Blocks(stretch_blocks=2)
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
        assert tokens_of(blocks, prompt, 1 << which) == expected, "the same by the stretches it remembers"
    for engine in engines:
        engine.clear()
    assert len(blocks) == 0
    assert not blocks.roots


LETTERS = [b"a", b"b", b"c"]
ACTIONS = ["store", "store", "store", "decode", "decode", "drop", "drop", "offload", "fetch", "clear", "walk", "walk"]


def spelled(text: bytes, rng: random.Random) -> list[int]:
    """Some tokens of these bytes."""
    tokens: list[int] = []
    while text:
        tokens.append(rng.choice([token for token, data in enumerate(TABLE) if data and text.startswith(data)]))
        text = text.removeprefix(TABLE[tokens[-1]])
    return tokens


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_stretches_change_no_answer(seed: int) -> None:
    """Three engines with prompts that begin alike: walked before or not, the same is found at any time."""
    rng = random.Random(seed)
    blocks = Blocks(stretch_blocks=rng.randint(1, 3))
    engines = [EngineCache(blocks, 1 << number, 1000) for number in range(3)]
    held: list[Counter[tuple[int, ...]]] = [Counter() for _ in engines]  # chain of tokens -> copies
    key = root(None, None, SIZE)
    base = [rng.choice([0, 1, 2, 3, *[5] * 8]) for _ in range(24)]  # `c` can be spelled in one way alone
    text = b"".join(TABLE[token] for token in base)
    for _ in range(40):
        which, tokens = rng.randrange(3), base[: rng.choice([len(base), rng.randrange(len(base))])]
        if rng.random() < 0.1:
            at = rng.randrange(len(tokens) + 1)
            tokens = tokens[:at] + spelled(b"".join(TABLE[token] for token in tokens[at:]), rng)
        chains = [tuple(tokens[:end]) for end in range(SIZE, len(tokens) + 1, SIZE)]
        engine, has = engines[which], held[which]
        kind = rng.choice(ACTIONS)
        if kind == "store" and chains:
            engine.stored(stored([hash(chain) for chain in chains], tokens[: len(chains) * SIZE]), root, TABLE)
            has.update(chains)
        elif kind == "decode" and len(chains) > 1:
            parent, chain = rng.choice(list(pairwise(chains)))
            engine.stored(stored([hash(chain)], list(chain[-SIZE:]), parent=hash(parent)), root, TABLE)
            if parent in has:
                has[chain] += 1
        elif kind == "drop" and has:
            chain = rng.choice(list(has))
            gone = [other for other in has if other[: len(chain)] == chain]
            for other in sorted(gone, key=len, reverse=True):
                engine.removed(Removed([hash(other)] * has.pop(other)))
        elif kind == "offload" and chains:
            engine.stored(stored([hash(chain) for chain in chains], [], medium="CPU"), root, TABLE)
        elif kind == "fetch":
            engine.removed(Removed([hash(chain) for chain in chains], medium="CPU"))
        elif kind == "clear" and rng.random() < 0.2:
            engine.clear()
            has.clear()
        at = rng.choice([len(text), rng.randrange(len(text))])
        prompt = rng.choice([text, text[:at], text[:at] + b"c" + text[at + 1 :]]) + rng.choice([b"", b"c"])
        told = walk(blocks, prompt, key, SIZE)
        known, blocks.stretches = blocks.stretches, {}
        assert walk(blocks, prompt, key, SIZE) == told
        blocks.stretches = known


def test_a_long_prompt_is_passed_in_stretches_and_a_bounded_number_is_remembered() -> None:
    blocks = Blocks()
    engine = EngineCache(blocks, 1, 10**6)
    length = 8 * STRETCH_BLOCKS * SIZE
    for number in range(3):
        tokens = [random.Random(number).randrange(3) for _ in range(length)]
        names = [number << 32 | place for place in range(length // SIZE)]
        engine.stored(stored(names, tokens, extra_keys=[[f"salt {number}"]]), root, LETTERS)
        prompt = b"".join(LETTERS[token] for token in tokens) + b"?"
        for _ in range(2):
            assert tokens_of(blocks, prompt, salt=f"salt {number}") == length
        assert len(blocks.stretches) == 7 * (number + 1), "the first blocks are looked at one by one"
    for origin in range(MAX_STRETCHES + 10):
        blocks.remember(origin, 0, 1, [Block(1)])
    assert len(blocks.stretches) == MAX_STRETCHES


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
    found = walk(blocks, b"ababc", root(None, None, SIZE), SIZE)
    assert (found.tokens, found.certain) == ([(1, 4)], [(1, 2)])
    engine.stored(stored([8, 9], [0, 1, 0, 1]), root, TABLE)  # the next turn, computed from its text
    found = walk(blocks, b"ababc", root(None, None, SIZE), SIZE)
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
    found = walk(blocks, b" " * 3000, root(None, None, SIZE), SIZE)
    assert found.deepest_tokens >= SIZE
