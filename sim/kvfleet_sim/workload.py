"""What a fleet is loaded with: requests at a wanted rate, from a trace or generated. Pure; every seed gives another draw.

    TraceLoad         the trace's requests in their order. Time is scaled to the rate. A stamp says only in which tick of the
                      recorder's clock a request came, so each is moved to a random place before the next stamp.
    SessionLoad       a trace with sessions: an endless stream of its sessions, of which the requests due in one window are
                      sent. The rate scales how often sessions start. A turn is sent when the answer to the one before is
                      complete and the think time is over, so slow answers slow their session down.
    RateLoad          clients' rates over time (ServeGen), with generated lengths.
    SharedPrefixLoad  generated: Poisson arrivals, each prompt one of many equally popular prefixes and a text of its own.

Block keys are the trace's: an equal key means an equal prompt up to the end of that block. A last part of a block has none.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Protocol

from kvfleet_sim.rates import Client, arrivals, is_rates, read_rates
from kvfleet_sim.traces import TraceError, TraceRow, read_trace

SHARED_PREFIX = "shared-prefix"
KINDS = (SHARED_PREFIX,)
"""Loads that are generated, by name."""
GENERATED_REQUESTS = 6000
"""Length of a generated load, unless limited."""
SESSION_REQUESTS = 20_000
"""Length of a load of sessions, unless limited: several times as long as a session on a fleet of a few workers."""
MAX_REQUESTS = 1_000_000
OUTPUT_TOKENS = 250.0
"""Median answer of a RateLoad."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request to be sent."""

    prompt_tokens: int
    output_tokens: int
    block_keys: Sequence[int]
    start_s: float | None
    """When it is sent; none: it follows another (`next_turn`)."""
    think_s: float = 0.0
    """How long after the answer to the turn before it is sent."""
    next_turn: int | None = None
    """Number of the request that follows this one's answer."""
    defer_s: float = 0.0
    """How long it may be kept for a cheaper time."""


class Load(Protocol):
    """A source of requests at any rate."""

    @property
    def block_tokens(self) -> int:
        """Tokens a block key stands for."""

    def requests(self, rate_rps: float, seed: int, *, patient: bool = True) -> list[LoadRequest]:
        """The requests at this rate, the same for the same seed. Not `patient`: nobody waits for answers, turns come when due."""


class TraceLoad:
    """Requests of a trace without sessions."""

    def __init__(self, rows: Sequence[TraceRow]) -> None:
        self._rows = rows
        self.block_tokens = _common_block_tokens(rows)
        self._slots = _slots([row.arrival_s for row in rows])
        self._span_s = sum(self._slots[-1]) - rows[0].arrival_s
        self._keys = [_whole_blocks(row) for row in rows]

    def requests(self, rate_rps: float, seed: int, *, patient: bool = True) -> list[LoadRequest]:
        draw = random.Random(seed)
        scale = len(self._rows) / self._span_s / rate_rps
        first_s = self._rows[0].arrival_s
        starts = sorted(scale * (stamp_s - first_s + draw.random() * width_s) for stamp_s, width_s in self._slots)
        return [
            LoadRequest(row.prompt_tokens, row.output_tokens, keys, start_s)
            for row, keys, start_s in zip(self._rows, self._keys, starts, strict=True)
        ]


RECORDED_SECONDS_PER_TOKEN = 0.01
"""What an answer is assumed to have taken while a session was recorded: a gap less that is think time."""


class SessionLoad:
    """Sessions of a trace, each many times: blocks that only one session has are new in every repetition of it."""

    def __init__(self, rows: Sequence[TraceRow], count: int) -> None:
        self.block_tokens = _common_block_tokens(rows)
        self._count = count
        sessions: dict[str, list[TraceRow]] = {}
        for row in rows:
            sessions.setdefault(row.session, []).append(row)
        self._sessions = [_from_zero(turns) for turns in sessions.values()]
        owners = Counter(key for turns in self._sessions for key in {key for turn in turns for key in turn.block_ids})
        self._shared = frozenset(key for key, sessions_with in owners.items() if sessions_with > 1)
        self._key_span = 1 + max(owners, default=0)
        self._longest_s = max(turns[-1].arrival_s for turns in self._sessions)
        self._turns_per_session = len(rows) / len(self._sessions)

    def requests(self, rate_rps: float, seed: int, *, patient: bool = True) -> list[LoadRequest]:
        draw = random.Random(seed)
        window_s = self._count / rate_rps
        found: list[LoadRequest] = []
        now_s = -self._longest_s  # sessions that began before the window are in full swing when it opens
        copy = 0
        deck: list[list[TraceRow]] = []
        while (now_s := now_s + draw.expovariate(rate_rps / self._turns_per_session)) < window_s:
            if not deck:
                deck = draw.sample(self._sessions, len(self._sessions))
            copy += 1
            due = [turn for turn in deck.pop() if 0 <= now_s + turn.arrival_s < window_s]
            self._add(found, due, now_s, copy, patient)
        return found

    def _add(self, found: list[LoadRequest], turns: list[TraceRow], start_s: float, copy: int, patient: bool) -> None:
        """Turns of a session that began at `start_s`."""
        before: TraceRow | None = None
        for turn in turns:
            keys = [key if key in self._shared else key + copy * self._key_span for key in _whole_blocks(turn)]
            if before is None or not patient:
                found.append(LoadRequest(turn.prompt_tokens, turn.output_tokens, keys, start_s + turn.arrival_s))
            else:
                gap_s = turn.arrival_s - before.arrival_s
                think_s = max(0.0, gap_s - before.output_tokens * RECORDED_SECONDS_PER_TOKEN)
                found[-1] = replace(found[-1], next_turn=len(found))
                found.append(LoadRequest(turn.prompt_tokens, turn.output_tokens, keys, None, think_s))
            before = turn


class SharedPrefixLoad:
    """Prompts that begin with one of `prefixes` long prefixes (system prompts, documents), each as likely as the others."""

    block_tokens = 64

    def __init__(
        self,
        count: int,
        *,
        prefixes: int = 150,
        prefix_tokens: int = 6144,
        suffix_tokens: float = 400.0,
        output_tokens: float = 250.0,
    ) -> None:
        """`suffix_tokens` and `output_tokens` are medians of log-normal lengths."""
        self._count = count
        self._prefixes = prefixes
        self._prefix_blocks = prefix_tokens // self.block_tokens
        self._suffix_tokens, self._output_tokens = suffix_tokens, output_tokens

    def requests(self, rate_rps: float, seed: int, *, patient: bool = True) -> list[LoadRequest]:
        draw = random.Random(seed)
        blocks, now_s = self._prefix_blocks, 0.0
        next_key = self._prefixes * blocks
        found = []
        for _ in range(self._count):
            now_s += draw.expovariate(rate_rps)
            first = draw.randrange(self._prefixes) * blocks
            own_tokens = _lognormal_tokens(draw, self._suffix_tokens, 8192)
            own_blocks = own_tokens // self.block_tokens
            keys = [*range(first, first + blocks), *range(next_key, next_key + own_blocks)]
            next_key += own_blocks
            output = _lognormal_tokens(draw, self._output_tokens, 4096)
            found.append(LoadRequest(blocks * self.block_tokens + own_tokens, output, keys, now_s))
        return found


class RateLoad:
    """Requests at the rates of clients (rates.py), which tell nothing else: lengths are made up, log-normal around these
    medians, and each client has a system prompt of its own."""

    block_tokens = 64
    system_prompt_tokens = 1024
    prompt_tokens = 600.0
    """Without the system prompt."""

    def __init__(self, clients: Sequence[Client], count: int, *, output_tokens: float = OUTPUT_TOKENS) -> None:
        """`output_tokens`: the median of an answer."""
        self._clients = clients
        self._count = count
        self._output_tokens = output_tokens
        self._drawn: tuple[tuple[float, int], list[LoadRequest]] | None = None

    def of(self, count: int, output_tokens: float | None = None) -> RateLoad:
        """The same clients with another number of requests, and another length of answers."""
        return RateLoad(self._clients, count, output_tokens=output_tokens or self._output_tokens)

    def requests(self, rate_rps: float, seed: int, *, patient: bool = True) -> list[LoadRequest]:
        """What was drawn last is kept: a day's requests are the same for every fleet that is compared."""
        if self._drawn is None or self._drawn[0] != (rate_rps, seed):
            self._drawn = (rate_rps, seed), self._draw(rate_rps, random.Random(seed))
        return self._drawn[1]

    def _draw(self, rate_rps: float, draw: random.Random) -> list[LoadRequest]:
        blocks = self.system_prompt_tokens // self.block_tokens
        next_key = len(self._clients) * blocks
        found = []
        for at_s, client in arrivals(self._clients, rate_rps, self._count, draw):
            own_tokens = _lognormal_tokens(draw, self.prompt_tokens, 8192)
            own_blocks = own_tokens // self.block_tokens
            first = client * blocks
            keys = [*range(first, first + blocks), *range(next_key, next_key + own_blocks)]
            next_key += own_blocks
            output = _lognormal_tokens(draw, self._output_tokens, 8192)
            found.append(LoadRequest(self.system_prompt_tokens + own_tokens, output, keys, at_s))
        return found


def open_load(trace: str, limit: int | None = None) -> Load:
    """The load of a trace file, or of a kind (`KINDS`). Raises TraceError where there is none.

    `limit`: the first so many requests of a trace; so many in all of sessions and of generated requests.
    """
    if trace == SHARED_PREFIX:
        return SharedPrefixLoad(limit or GENERATED_REQUESTS)
    if not Path(trace).exists():
        raise TraceError(f"{trace}: no such file: give the path of a trace, or one of {', '.join(KINDS)}")
    if is_rates(Path(trace)):
        return RateLoad(read_rates(Path(trace)), limit or GENERATED_REQUESTS)
    rows = read_trace(trace)
    if any(row.session for row in rows):
        return SessionLoad(rows, limit or SESSION_REQUESTS)
    return TraceLoad(rows[:limit])


def _lognormal_tokens(draw: random.Random, median_tokens: float, longest: int) -> int:
    """A made-up length: skewed as lengths are."""
    return min(max(1, round(draw.lognormvariate(math.log(median_tokens), 0.6))), longest)


def _slots(stamps: Sequence[float]) -> list[tuple[float, float]]:
    """(stamp, seconds to the next one), the latter at most the median of such gaps: long pauses stay pauses."""
    distinct = sorted(set(stamps))
    gaps = [later - earlier for earlier, later in pairwise(distinct)]
    usual_s = median(gaps) if gaps else 1.0
    width = dict(zip(distinct, [*(min(gap, usual_s) for gap in gaps), usual_s], strict=True))
    return [(stamp, width[stamp]) for stamp in stamps]


def _common_block_tokens(rows: Iterable[TraceRow]) -> int:
    return next(iter(rows)).block_tokens  # every reader gives all rows of a file the same


def _whole_blocks(row: TraceRow) -> Sequence[int]:
    return row.block_ids[: row.prompt_tokens // row.block_tokens]


def _from_zero(turns: list[TraceRow]) -> list[TraceRow]:
    return [replace(turn, arrival_s=turn.arrival_s - turns[0].arrival_s) for turn in turns]
