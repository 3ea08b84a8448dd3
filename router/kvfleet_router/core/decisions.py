"""The bounded log of decisions: why each request went where it went, what was predicted, what came.

On the hot path a decision is one object and another per try; dicts are made when someone asks. The log is a ring: a
decision's id carries its sequence number, so looking one up needs no index, and a new one overwrites the oldest. The oldest
is in no cache of the processor any more, so what it consists of is few pieces: freeing each is a wait for memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack, unpack
from typing import Any, Final

MAX_CANDIDATES: Final = 8
"""Candidates kept per try: the best ones."""


Scored = tuple[str, float, tuple[float, ...]]
"""(worker, cached tokens, parts of its cost)"""


class Scores:
    """Candidates and their figures, in two pieces: names, and per candidate cached tokens and the parts of its cost."""

    __slots__ = ("_figures", "names")

    def __init__(self, names: tuple[str, ...], figures: bytes) -> None:
        """`figures`: native doubles, candidate by candidate."""
        self.names = names
        self._figures = figures

    @staticmethod
    def of(rows: Sequence[Scored]) -> Scores:
        figures = [figure for _, cached, parts in rows for figure in (cached, *parts)]
        return Scores(tuple([name for name, _, _ in rows]), pack(f"{len(figures)}d", *figures))

    def rows(self) -> list[Scored]:
        figures = unpack(f"{len(self._figures) // 8}d", self._figures)
        width = len(figures) // max(len(self.names), 1)
        starts = [place * width for place in range(len(self.names))]
        return [
            (name, figures[start], figures[start + 1 : start + width])
            for name, start in zip(self.names, starts, strict=True)
        ]


class Try:
    """One choice of a worker."""

    __slots__ = (
        "at",
        "candidate_count",
        "candidates",
        "guessed_tokens",
        "phase",
        "precise",
        "predicted_joules",
        "predicted_ttft_s",
        "saved_joules",
        "worker",
    )

    def __init__(
        self,
        at: float,
        worker: str,
        candidates: Scores,
        candidate_count: int,
        predicted_ttft_s: float,
        predicted_joules: float,
        phase: str = "",
        precise: bool = False,
        guessed_tokens: float = 0.0,
        saved_joules: float | None = None,
    ) -> None:
        self.at = at
        self.worker = worker
        self.candidates = candidates
        """The best ones, in no order."""
        self.candidate_count = candidate_count
        self.predicted_ttft_s = predicted_ttft_s
        self.predicted_joules = predicted_joules
        self.phase = phase
        """`prefill` or `decode`, where the two are done apart."""
        self.precise = precise
        """The worker told by KV events what it has cached."""
        self.guessed_tokens = guessed_tokens
        """Cached tokens on this worker as the router's own routing lets expect."""
        self.saved_joules = saved_joules
        """Against where least_request would have sent it; None: not known, or not the first try."""


class Outcome:
    """How it ended."""

    __slots__ = ("at", "cached_tokens", "detail", "first_token_at", "output_tokens", "prompt_tokens", "result")

    def __init__(
        self,
        at: float,
        result: str,
        detail: str,
        first_token_at: float | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        output_tokens: int | None = None,
    ) -> None:
        self.at = at
        self.result = result
        """ok | failed | abandoned | refused"""
        self.detail = detail
        self.first_token_at = first_token_at
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = cached_tokens
        self.output_tokens = output_tokens


class Decision:
    """One request's way through the router."""

    __slots__ = (
        "at",
        "causes",
        "deferred_s",
        "deferred_why",
        "expected_output_tokens",
        "id",
        "joules",
        "model",
        "outcome",
        "parts",
        "policy",
        "prompt_tokens",
        "request_id",
        "sequence",
        "strategy",
        "tenant",
        "tries",
        "why_guessed",
    )

    def __init__(self, id: str, sequence: int, request_id: str, at: float) -> None:  # noqa: A002 - the field's name
        self.id = id
        self.sequence = sequence
        self.request_id = request_id
        self.at = at
        self.model = self.policy = self.strategy = self.tenant = ""
        self.parts: tuple[str, ...] = ()
        self.prompt_tokens = self.expected_output_tokens = 0.0
        self.tries: tuple[Try, ...] = ()
        self.causes: tuple[str, ...] = ()
        """Why each try but the last was given up; empty: it handed on what it computed."""
        self.outcome: Outcome | None = None
        self.why_guessed = ""
        """Why cached tokens are guesses, in CamelCase; empty: only where the worker has told nothing."""
        self.deferred_s = 0.0
        """How long it was kept for a cheaper time, and why no longer (deferral.py)."""
        self.deferred_why = ""
        self.joules = 0.0
        """What it took, all tries together, where books are kept."""


class DecisionLog:
    """The last `capacity` decisions."""

    def __init__(self, capacity: int, *, prefix: str, epoch_s: float = 0.0) -> None:
        """`prefix` tells this router's ids from others'; `epoch_s` is added to times for Unix time."""
        self._ring: list[Decision | None] = [None] * max(capacity, 1)
        self._prefix = prefix
        self._epoch_s = epoch_s
        self._next = 0

    def open(self, request_id: str, at: float) -> Decision:
        """A new decision, in place of the oldest."""
        sequence = self._next
        self._next = sequence + 1
        decision = Decision(f"{self._prefix}-{sequence:x}", sequence, request_id, at)
        self._ring[sequence % len(self._ring)] = decision
        return decision

    def get(self, id: str) -> dict[str, Any] | None:  # noqa: A002 - the field's name
        """The decision with this id (or of this request id), as a JSON-able dict; none once it fell out of the ring."""
        prefix, _, sequence = id.rpartition("-")
        if prefix == self._prefix:
            try:
                decision = self._ring[int(sequence, 16) % len(self._ring)]
            except ValueError:
                decision = None
            if decision is not None and decision.id == id:
                return self.render(decision)
        matching = [d for d in self._ring if d is not None and d.request_id == id]
        return self.render(max(matching, key=lambda d: d.sequence)) if matching else None

    def recent(self, n: int = 100) -> list[dict[str, Any]]:
        """The latest decisions, newest first."""
        size = len(self._ring)
        latest = (self._ring[(self._next - 1 - back) % size] for back in range(min(max(n, 0), size, self._next)))
        return [self.render(decision) for decision in latest if decision is not None]

    def render(self, decision: Decision) -> dict[str, Any]:
        """The decision as a JSON-able dict."""
        first = decision.tries[0].at if decision.tries else None
        return {
            "id": decision.id,
            "request_id": decision.request_id,
            "time": decision.at + self._epoch_s,
            "model": decision.model,
            "policy": decision.policy,
            "strategy": decision.strategy,
            "tenant": decision.tenant,
            "prompt_tokens": round(decision.prompt_tokens),
            "expected_output_tokens": round(decision.expected_output_tokens),
            "deferred_s": decision.deferred_s or None,
            "deferred_until": decision.deferred_why or None,
            "held_s": None if first is None else first - decision.at - decision.deferred_s,
            "retries": sum(map(bool, decision.causes)),
            "tries": [self._render_try(decision, number) for number in range(len(decision.tries))],
            "outcome": None if decision.outcome is None else self._render_outcome(decision, decision.outcome),
        }

    def _render_try(self, decision: Decision, number: int) -> dict[str, Any]:
        made = decision.tries[number]
        return {
            "time": made.at + self._epoch_s,
            "worker": made.worker,
            "phase": made.phase or None,
            "predicted_ttft_s": made.predicted_ttft_s,
            "predicted_joules": made.predicted_joules,
            "saved_joules": made.saved_joules,
            "candidate_count": made.candidate_count,
            "cache_view": "precise" if made.precise else "approximate",
            "cache_view_reason": "EventsFollowed" if made.precise else decision.why_guessed or "EventsNotHeard",
            "guessed_cached_tokens": round(made.guessed_tokens),
            "candidates": [
                {
                    "worker": worker,
                    "cached_tokens": round(cached),
                    "cost": sum(parts),
                    "parts": dict(zip(decision.parts, parts, strict=True)),
                }
                for worker, cached, parts in sorted(made.candidates.rows(), key=lambda scored: sum(scored[2]))
            ],
            "given_up": (decision.causes[number] or None) if number < len(decision.causes) else None,
        }

    @staticmethod
    def _render_outcome(decision: Decision, outcome: Outcome) -> dict[str, Any]:
        began = decision.at + decision.deferred_s
        sent = decision.tries[-1].at if decision.tries else began
        return {
            "result": outcome.result,
            "detail": outcome.detail,
            "ttft_s": None if outcome.first_token_at is None else outcome.first_token_at - sent,
            "ttft_with_queue_s": None if outcome.first_token_at is None else outcome.first_token_at - began,
            "duration_s": outcome.at - began,
            "prompt_tokens": outcome.prompt_tokens,
            "cached_tokens": outcome.cached_tokens,
            "output_tokens": outcome.output_tokens,
            "joules": decision.joules or None,
        }
