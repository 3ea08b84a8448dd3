"""What would happen to a request if it came now: the decision without its consequences.

The same lane, candidates and scores as for a request that is sent, from the same state; but nothing is sent, counted, learned
or kept among the recent decisions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvfleet_router.core.decisions import Decision, Try
from kvfleet_router.core.energy import marginal_joules
from kvfleet_router.core.exact import is_known
from kvfleet_router.core.placement import Waits
from kvfleet_router.core.powerbudget import named
from kvfleet_router.core.predict import ttft_parts
from kvfleet_router.core.ticket import Arrival, Refusal

if TYPE_CHECKING:
    from kvfleet_router.core.placement import Placement

DRY_RUN = "dry-run"
"""In the place of the decision's id."""

Verdict = tuple[str, str]
"""(`send`, `hold`, `keep` or `refuse`; why)"""


def unrecorded(now: float) -> Decision:
    """A decision that no log keeps."""
    return Decision(DRY_RUN, -1, DRY_RUN, now)


def try_dry(placement: Placement, arrival: Arrival, now: float) -> Verdict:
    """Decide, and write what was considered into the arrival's decision."""
    picked = placement.pick(arrival, now)
    if isinstance(picked, Refusal):
        return "refuse", picked.message
    if isinstance(picked, Waits):
        if picked.short:
            return "hold", f"the power budget of {named(picked.short)} is used up: it would wait at the router"
        return "hold", "no worker may have it now: it would wait at the router until one has room"
    scored, choice, hands_on = picked
    backlog, own, step, kv_wait = ttft_parts(scored, choice.worker, choice.cached_tokens, now)
    joules = marginal_joules(arrival, choice.worker, arrival.prompt_tokens - choice.cached_tokens)
    ttft = backlog + own + step + kv_wait
    phase = "prefill" if hands_on else ""
    precise = is_known(arrival, choice.worker)
    guessed = min(choice.cached_blocks * arrival.block_tokens, arrival.prompt_tokens)
    made = Try(now, choice.worker.name, choice.scored, choice.candidate_count, ttft, joules, phase, precise, guessed)
    arrival.decision.tries += (made,)
    waiting = placement.queue.waiting(arrival.lane)
    if waiting:
        return "hold", f"{waiting} others wait at the router already: it would join them"
    if placement.would_hold(arrival, backlog):
        return (
            "hold",
            f"the best worker has a backlog of {backlog:.2f} s: it would wait at the router, where it can go elsewhere",
        )
    return "send", ""


def keeps(wish_s: float) -> Verdict:
    """It may begin so much later."""
    return "keep", f"it may begin up to {wish_s:.0f} s from now: it would be kept for a cheaper time"


def told(record: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """The answer: the decision in the form of its record, and what would be done."""
    would, why = verdict
    return record | {"dry_run": True, "would": would, "why": why}
