"""What the workers of a model hold, for one tokenizer: events in, answers about prompts out.

A worker is one engine or several (data-parallel ranks, each with a cache and a publisher of its own): then nobody knows
which of them gets a request, and what counts is the mean over them.

A view that contradicts what engines report (the wrong tokenizer, a template the engine does not use) is worse than none: it
is set aside, and says so (`Agreement`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from kvfleet_router.core.index import Match
from kvfleet_router.core.kvevents.blocks import Blocks
from kvfleet_router.core.kvevents.codec import Codec
from kvfleet_router.core.kvevents.enginecache import EngineCache
from kvfleet_router.core.kvevents.prompt import NotRendered, Prompts
from kvfleet_router.core.kvevents.stream import Counts, Stream
from kvfleet_router.core.kvevents.walk import Found, walk
from kvfleet_router.core.kvevents.wire import Malformed, Removed, Stored, decode

MAX_RANKS = 64
ANY = "*"
"""The model of workers given by URL alone: whatever clients ask for is taken to be the model itself."""
MAX_BLOCK_SIZES = 4
"""Each costs a walk per request; pools of one model have one or two."""
TRUST_FADE = 0.98
AGREEMENT_FADE = 0.98
AGREEMENT_MIN_REPORTS = 32
AGREEMENT_MIN_TOKENS = 128
"""Reports below say too little."""
LARGEST_RATIO = 2.0
"""Between what is expected and what engines report, over all recent requests: beyond, the view is wrong."""


class Prompt(NamedTuple):
    """A request as a view knows it."""

    data: bytes
    lora: str | None
    salt: str | None


class Expected(NamedTuple):
    """Tokens that workers are expected to find cached, generated ones weighed."""

    tokens: list[tuple[int, float]]
    """(mask of workers, tokens), every worker in at most one mask; the other two in the same order."""
    longest: Match
    """Generated tokens counted in full."""
    certain: Match
    """Without generated tokens and all behind them."""
    deepest_tokens: int
    deepest_bytes: int


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


class Agreement:
    """Expected against reported tokens, fading."""

    def __init__(self) -> None:
        self.reports = 0
        self._expected = self._reported = 0.0

    def observe(self, expected: float, reported: float) -> None:
        if max(expected, reported) >= AGREEMENT_MIN_TOKENS:
            self.reports += 1
            self._expected = AGREEMENT_FADE * self._expected + expected
            self._reported = AGREEMENT_FADE * self._reported + reported

    @property
    def lost(self) -> bool:
        if self.reports < AGREEMENT_MIN_REPORTS:
            return False
        low, high = sorted((self._expected, self._reported))
        return high > LARGEST_RATIO * low


class ModelView:
    def __init__(self, model: str, codec: Codec, prompts: Prompts) -> None:
        self.model = model
        self.codec = codec
        self.prompts = prompts
        self.trust = Trust()
        self.agreement = Agreement()
        self.planes: list[Blocks] = [Blocks()]
        """One for each data-parallel rank."""
        self.block_sizes: list[int] = []
        """Tokens in a block, as engines say: one size, unless pools differ."""
        self.malformed = 0
        """Batches and events that could not be understood."""
        self.not_rendered: Counter[str] = Counter()
        self.last_not_rendered = ""
        """Why, of the last such prompt."""

    def __len__(self) -> int:
        return sum(map(len, self.planes))

    def prompt(self, kind: str, model: str, salt: str | None, body: bytes) -> Prompt | None:
        """The request's bytes; none where they cannot be known (counted)."""
        try:
            data = self.prompts.render(kind, body)
        except NotRendered as error:
            self.not_rendered[error.reason] += 1
            self.last_not_rendered = error.reason
            return None
        return Prompt(data, None if model in ("", self.model) or self.model == ANY else model, salt)

    def expected(self, prompt: Prompt, ranks: int = 1) -> Expected:
        """What workers, of so many ranks each, have of the prompt."""
        data, share = prompt.data, self.trust.share
        found = []
        for size in self.block_sizes:
            root = self.root(prompt.lora, prompt.salt, size)
            found += [walk(plane, data, root, size) for plane in self.planes[:ranks]]
        if len(found) != 1:
            return _mean(found, ranks, share)
        first = found[0]
        tokens = [
            (mask, sure + share * (count - sure))
            for (mask, count), (_, sure) in zip(first.tokens, first.certain, strict=True)
        ]
        return Expected(tokens, first.tokens, first.certain, first.deepest_tokens, first.deepest_bytes)

    @staticmethod
    def root(lora: str | None, salt: str | None, block_tokens: int) -> int:
        """Where a chain begins. Lengths are part of it, so that no two different triples read alike."""
        name = "" if lora is None else f"lora:{len(lora)}:{lora}"
        return int(xxh3_64_intdigest(f"{block_tokens}:{name}:{'' if salt is None else f'salt:{salt}'}".encode()))


def _mean(found: Sequence[Found], ranks: int, share: float) -> Expected:
    """Over the ranks of each worker. (A worker has blocks of one size: walks of others find nothing of it.)"""
    if not found:
        return Expected([], [], [], 0, 0)
    tokens: dict[int, float] = {}
    certain: Counter[int] = Counter()
    longest: Counter[int] = Counter()
    for plane in found:
        for (mask, count), (_, sure) in zip(plane.tokens, plane.certain, strict=True):
            while mask:
                bit = mask & -mask
                mask ^= bit
                tokens[bit] = tokens.get(bit, 0.0) + (sure + share * (count - sure)) / ranks
                certain[bit] += sure
                longest[bit] += count
    deepest = max(found, key=lambda plane: plane.deepest_tokens)
    return Expected(
        list(tokens.items()),
        [(bit, longest[bit] // ranks) for bit in tokens],
        [(bit, certain[bit] // ranks) for bit in tokens],
        deepest.deepest_tokens,
        deepest.deepest_bytes,
    )


class Engine:
    """One publisher's cache and the stream that changes it. The Stream's Sink."""

    def __init__(self, view: ModelView, rank: int, bit: int, limit: int, counts: Counts, *, can_replay: bool) -> None:
        while len(view.planes) <= rank:
            view.planes.append(Blocks())
        self.cache = EngineCache(view.planes[rank], bit, limit)
        self.rank = rank
        self.stream = Stream(self, counts, can_replay=can_replay)
        self._view = view

    def apply(self, payload: bytes) -> bool:
        view, cache = self._view, self.cache
        try:
            events, malformed = decode(payload)
        except Malformed:
            view.malformed += 1
            return False
        view.malformed += malformed
        cleared = False
        for event in events:
            if type(event) is Stored:
                if event.block_size not in view.block_sizes:
                    if len(view.block_sizes) >= MAX_BLOCK_SIZES:
                        view.malformed += 1
                        continue
                    view.block_sizes.append(event.block_size)
                try:
                    cache.stored(event, view.root, view.codec.table)
                except IndexError:
                    view.malformed += 1  # a token that the tokenizer does not have
            elif type(event) is Removed:
                cache.removed(event)
            else:
                cache.clear()
                cleared = True
        return cleared

    def reset(self) -> None:
        self.cache.clear()


class WorkerView:
    """All engines behind one worker."""

    __slots__ = ("engines", "view")

    def __init__(self, view: ModelView, engines: list[Engine]) -> None:
        self.view = view
        self.engines = engines

    @property
    def known(self) -> bool:
        """Something is known: the streams have begun."""
        for engine in self.engines:  # noqa: SIM110 - on the way of every request, `all` takes three times as long
            if not engine.stream.begun:
                return False
        return True

    @property
    def complete(self) -> bool:
        """Nothing can be cached that is not known."""
        return all(engine.stream.complete for engine in self.engines)

    def forget(self) -> None:
        """The worker is gone, or another view takes over."""
        for engine in self.engines:
            engine.reset()
