"""What workers hold of an arrival by their own word, laid over what the router guesses.

For a worker whose KV events are followed, cached tokens are those its engine told of, or those of prompts in flight there if
these lead further: they are about to be computed, and nobody has told of them yet. While a history is incomplete (the
router began after the engine, and the engine forgot its first batches) the guess counts where it is higher: a prompt found
whole makes no events, so what is there from before may never be told.

All other workers, and requests whose bytes cannot be known, go by the guess alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvfleet_router.core.kvevents.view import Expected, ModelView, Prompt

if TYPE_CHECKING:
    from kvfleet_router.core.parse import ParsedRequest
    from kvfleet_router.core.routes import Lane
    from kvfleet_router.core.ticket import Arrival, Ticket
    from kvfleet_router.core.worker import Worker


class Asked(NamedTuple):
    """An arrival's prompt as one view knows it."""

    view: ModelView
    ranks: int
    prompt: Prompt


def ask(lane: Lane, parsed: ParsedRequest) -> tuple[Asked, ...]:
    """The request for every view of the lane's pools; empty: only guesses can be made."""
    asked: list[Asked] = []
    for pool in lane.pools:
        view = pool.view
        if view is None or view.agreement.lost or any(view is other.view for other in asked):
            continue
        prompt = view.prompt(parsed.kind, parsed.model, parsed.cache_salt, parsed.body)
        if prompt is not None:
            asked.append(Asked(view, pool.config.data_parallel, prompt))
    return tuple(asked)


def reason_to_guess(lane: Lane) -> str:
    """Why nothing came of `ask`, or it was not asked; in CamelCase, as pools have it."""
    policy, prefix = lane.policy, lane.config.prefix
    if not policy.uses_prefix or not prefix.enabled:
        return "PrefixesNotUsed"
    if prefix.source == "Approximate":
        return "PolicyGuesses"
    for pool in lane.pools:
        if pool.view is not None and not pool.view.agreement.lost:
            return f"PromptNotRendered: {pool.view.last_not_rendered}"
    return lane.pools[0].why_guessed


def look_up(arrival: Arrival, now: float) -> None:
    """Let the arrival's `expected` be of this moment."""
    if arrival.expected_at != now:
        arrival.expected_at = now
        arrival.expected = [view.expected(prompt, ranks) for view, ranks, prompt in arrival.asked]


def counted_tokens(arrival: Arrival) -> float:
    """The prompt's tokens: counted as far as any worker holds it, the rest estimated."""
    tokens = arrival.prompt_tokens
    for asked, expected in zip(arrival.asked, arrival.expected, strict=True):
        rest = 1.0 - expected.deepest_bytes / max(len(asked.prompt.data), 1)
        tokens = max(expected.deepest_tokens + rest * arrival.prompt_tokens, 1.0)
    return tokens


def overlay(arrival: Arrival, workers: Sequence[Worker], cached: list[float]) -> None:
    """Correct guessed cached tokens, in place, where workers' own word is known."""
    blocks, block_tokens, most = arrival.blocks, arrival.block_tokens, arrival.prompt_tokens - 1.0
    for place, worker in enumerate(workers):
        expected = _of(arrival, worker)
        if expected is None:
            continue
        bit, tokens, guess = worker.cache.bit, 0.0, cached[place]
        for mask, count in expected.tokens:
            if mask & bit:
                tokens = count
                break
        if guess > tokens:
            assert worker.held is not None
            if worker.held.complete:
                guess = min(worker.cache.pinned_depth(blocks) * block_tokens, guess)
            tokens = max(tokens, guess)
        cached[place] = min(tokens, most)


def _of(arrival: Arrival, worker: Worker) -> Expected | None:
    """What the worker's view expects of the arrival; none: nothing is known of it."""
    held = worker.held
    if held is not None and held.known:
        for asked, expected in zip(arrival.asked, arrival.expected, strict=True):
            if asked.view is held.view:
                return expected
    return None


def is_known(arrival: Arrival, worker: Worker) -> bool:
    """Cached tokens of the arrival on this worker are by its own word."""
    return bool(arrival.asked) and _of(arrival, worker) is not None


def note(ticket: Ticket, arrival: Arrival) -> None:
    """Keep with the ticket what its outcome will be compared with."""
    expected = _of(arrival, ticket.worker)
    if expected is None:
        return
    ticket.precise = True
    bit = ticket.worker.cache.bit
    for (mask, longest), (_, certain) in zip(expected.longest, expected.certain, strict=True):
        if mask & bit:
            ticket.generated_tokens = float(longest - certain)
            ticket.certain_tokens = float(certain)


def learn_exact(ticket: Ticket, cached_tokens: int) -> None:
    """The engine reported how many tokens it found."""
    held = ticket.worker.held
    if held is None:
        return
    held.view.agreement.observe(ticket.cached_tokens, cached_tokens)
    if ticket.generated_tokens:
        held.view.trust.observe(ticket.generated_tokens, cached_tokens - ticket.certain_tokens)
