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
from kvfleet_router.core.kvevents.blocks import Blocks, EngineCache, Found, Trust
from kvfleet_router.core.kvevents.codec import Codec
from kvfleet_router.core.kvevents.prompt import NotRendered, Prompts
from kvfleet_router.core.kvevents.stream import Counts, Stream
from kvfleet_router.core.kvevents.wire import Malformed, Removed, Stored, decode

MAX_RANKS = 64
ANY = "*"
"""The model of workers given by URL alone: whatever clients ask for is taken to be the model itself."""
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
    """(mask of workers, tokens), every worker in at most one mask."""
    certain: Match
    deepest_tokens: int
    deepest_bytes: int


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
        self.malformed = 0
        """Batches and events that could not be understood."""
        self.not_rendered: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self.planes))

    def prompt(self, kind: str, model: str, salt: str | None, body: bytes) -> Prompt | None:
        """The request's bytes; none where they cannot be known (counted)."""
        try:
            data = self.prompts.render(kind, body)
        except NotRendered as error:
            self.not_rendered[error.reason] += 1
            return None
        return Prompt(data, None if model in ("", self.model) or self.model == ANY else model, salt)

    def expected(self, prompt: Prompt, block_tokens: int, ranks: int) -> Expected:
        """What workers with blocks of this size have of the prompt."""
        root = self.root(prompt.lora, prompt.salt, block_tokens)
        share = self.trust.share
        found = [plane.walk(prompt.data, root, block_tokens) for plane in self.planes[:ranks]]
        first = found[0]
        if ranks > 1:
            return _mean(found, ranks, share)
        tokens = [
            (mask, sure + share * (count - sure))
            for (mask, count), (_, sure) in zip(first.tokens, first.certain, strict=True)
        ]
        return Expected(tokens, first.certain, first.deepest_tokens, first.deepest_bytes)

    @staticmethod
    def root(lora: str | None, salt: str | None, block_tokens: int) -> int:
        """Where a chain begins. Lengths are part of it, so that no two different triples read alike."""
        name = "" if lora is None else f"lora:{len(lora)}:{lora}"
        return int(xxh3_64_intdigest(f"{block_tokens}:{name}:{'' if salt is None else f'salt:{salt}'}".encode()))


def _mean(found: Sequence[Found], ranks: int, share: float) -> Expected:
    """Over the ranks of each worker."""
    tokens: Counter[int] = Counter()
    certain: Counter[int] = Counter()
    for plane in found:
        for (mask, count), (_, sure) in zip(plane.tokens, plane.certain, strict=True):
            while mask:
                bit = mask & -mask
                mask ^= bit
                tokens[bit] += sure + share * (count - sure)  # type: ignore[assignment]
                certain[bit] += sure
    deepest = max(found, key=lambda plane: plane.deepest_tokens)
    return Expected(
        [(bit, total / ranks) for bit, total in tokens.items()],
        [(bit, total // ranks) for bit, total in certain.items()],
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
        return all(engine.stream.begun for engine in self.engines)

    @property
    def complete(self) -> bool:
        """Nothing can be cached that is not known."""
        return all(engine.stream.complete for engine in self.engines)

    def forget(self) -> None:
        """The worker is gone, or another view takes over."""
        for engine in self.engines:
            engine.reset()
