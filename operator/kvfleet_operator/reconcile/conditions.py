"""Conditions as `metav1.Condition` wants them: `lastTransitionTime` moves only when `status` does.

A reconciler states `Finding`s; `settle` merges them into the conditions an object already has. Conditions of other
types (another component's) are kept. The clock is an argument, so equal input gives equal output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from kvfleet_api.common import Condition
from kvfleet_api.problems import Problem

Status = Literal["True", "False", "Unknown"]

MAX_MESSAGE: Final = 4096
"""Longer messages help nobody and every status write carries them."""
QUIET: Final = frozenset({"Progressing"})
"""Types whose change in either direction is ordinary."""
NEWS_AT_ONCE: Final = frozenset({"Accepted", "ResolvedRefs", "Conflicted"})
"""Types whose first status is news when it is bad. That a new object is not ready yet is none."""
BAD_WHEN_TRUE: Final = frozenset({"Conflicted"})
"""Types that state a problem when True."""

APPLIED: Final = "The spec is valid and its objects are applied."

SCALING_ACTIVE: Final = "ScalingActive"
"""The autoscaler's own: it writes this condition beside those of the reconciler."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a reconciler has to say about one aspect of an object."""

    type: str
    status: Status
    reason: str
    message: str = ""


def accepted(problems: Iterable[Problem], message: str, *more: str) -> Finding:
    """`problems`: all there are of the object. An error says that not all of it is served; warnings and `more` are said beside
    True. `message`: where there is nothing to say."""
    wrong = [problem for problem in problems if problem.condition == "Accepted"]
    errors = [problem for problem in wrong if problem.severity == "Error"]
    if errors:
        return Finding("Accepted", "False", errors[0].reason, sentences(wrong))
    warnings = [*map(_sentence, wrong), *more]
    if warnings:
        return Finding("Accepted", "True", "AcceptedWithWarnings", "; ".join(warnings))
    return Finding("Accepted", "True", "Accepted", message)


def sentences(problems: Iterable[Problem]) -> str:
    return "; ".join(map(_sentence, problems))


def _sentence(problem: Problem) -> str:
    return f"{problem.field}: {problem.message}"


def settle(
    previous: Sequence[Condition], findings: Iterable[Finding], *, generation: int | None, now: str
) -> list[Condition]:
    """The conditions after `findings`: theirs first, in their order, then those of other types as they were."""
    before = {condition.type: condition for condition in previous}
    settled = [_settle_one(before.pop(finding.type, None), finding, generation, now) for finding in findings]
    return settled + list(before.values())


def _settle_one(before: Condition | None, finding: Finding, generation: int | None, now: str) -> Condition:
    moved = before is None or before.status != finding.status or before.last_transition_time is None
    message = finding.message
    return Condition(
        type=finding.type,
        status=finding.status,
        reason=finding.reason,
        message=message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE - 1]}…",
        observed_generation=generation,
        last_transition_time=now if moved or before is None else before.last_transition_time,
    )


def dump(conditions: Iterable[Condition]) -> list[dict[str, Any]]:
    """As they go into a status."""
    return [condition.model_dump(by_alias=True, exclude_none=True) for condition in conditions]


def conjunction(type_: str, parts: Sequence[Finding], reason: str, message: str) -> Finding:
    """True where every part is True; else it says what the first part that is not says."""
    for part in parts:
        if part.status != "True":
            return Finding(type_, part.status, part.reason, part.message)
    return Finding(type_, "True", reason, message)


@dataclass(frozen=True, slots=True)
class Transition:
    """A condition that changed its status: what an Event tells."""

    condition: Condition
    warning: bool


def transitions(previous: Sequence[Condition], current: Sequence[Condition]) -> list[Transition]:
    """The changes worth an Event: a status that moved, or a first status that is bad news."""
    before = {condition.type: condition.status for condition in previous}
    found = []
    for condition in current:
        old = before.get(condition.type)
        bad = condition.status == ("True" if condition.type in BAD_WHEN_TRUE else "False")
        if condition.type in QUIET or old == condition.status:
            continue
        if old is None and not (bad and condition.type in NEWS_AT_ONCE):
            continue
        if condition.status != "Unknown":
            found.append(Transition(condition, warning=bad))
    return found
