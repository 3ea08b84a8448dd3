"""How far a workload is: one reading of Deployment and LeaderWorkerSet status, and the findings both kinds share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvfleet_operator.reconcile.conditions import Finding


@dataclass(frozen=True, slots=True)
class Rollout:
    wanted: int
    existing: int
    ready: int
    updated: int
    observed: bool
    """Its controller has seen the latest spec."""
    settled: bool
    """Its controller does not say that it is still replacing something: a LeaderWorkerSet's counts are of surged groups too,
    its `Available` is not, and excludes `UpdateInProgress` and `Progressing`."""
    stuck: str
    """Why it makes no progress, in its controller's words; empty: it does, or is done."""

    @property
    def complete(self) -> bool:
        return (
            self.observed
            and self.settled
            and self.existing == self.wanted
            and self.updated >= self.wanted
            and self.ready >= self.wanted
        )  # fmt: skip


def read(workload: Mapping[str, Any] | None) -> Rollout | None:
    """None where there is no workload."""
    if workload is None:
        return None
    status = workload.get("status") or {}
    conditions = {entry.get("type"): entry for entry in status.get("conditions") or []}
    progressing = conditions.get("Progressing") or {}
    failure = conditions.get("ReplicaFailure") or {}
    stuck = ""
    if progressing.get("reason") == "ProgressDeadlineExceeded":
        stuck = progressing.get("message") or "the rollout exceeded its deadline"
    if failure.get("status") == "True":
        stuck = failure.get("message") or "pods cannot be created"
    generation = workload["metadata"].get("generation")
    # A LeaderWorkerSet reports no observedGeneration: its counts have to do.
    seen = status.get("observedGeneration", generation if workload["kind"] == "LeaderWorkerSet" else 0)
    return Rollout(
        wanted=int(workload["spec"].get("replicas", 1)),
        existing=int(status.get("replicas", 0)),
        ready=int(status.get("readyReplicas", 0)),
        updated=int(status.get("updatedReplicas", 0)),
        observed=generation is None or seen >= generation,
        settled=workload["kind"] != "LeaderWorkerSet" or (conditions.get("Available") or {}).get("status") == "True",
        stuck=stuck,
    )


def available(rollout: Rollout | None, noun: str) -> Finding:
    """Can it serve at all?"""
    if rollout is None:
        return Finding("Available", "False", "NotCreated", f"There are no {noun}s yet.")
    if rollout.wanted == 0:
        return Finding("Available", "False", "ScaledToZero", f"No {noun} is wanted at the moment.")
    if rollout.ready:
        return Finding("Available", "True", "MinimumReady", _counts(rollout, noun))
    return Finding("Available", "False", "NoneReady", rollout.stuck or f"{_counts(rollout, noun)}.")


def progressing(rollout: Rollout | None, noun: str) -> Finding:
    """Is something still moving?"""
    if rollout is None:
        return Finding("Progressing", "False", "NotCreated", f"There are no {noun}s yet.")
    if rollout.stuck:
        return Finding("Progressing", "False", "Stuck", rollout.stuck)
    if rollout.complete:
        return Finding("Progressing", "False", "Complete", f"{_counts(rollout, noun)}, all up to date")
    return Finding("Progressing", "True", "RollingOut", f"{_counts(rollout, noun)}; {rollout.updated} up to date")


def rolled_out(rollout: Rollout | None, noun: str) -> Finding:
    """Is everything as wanted? The last part of `Ready`."""
    if rollout is None:
        return Finding("Ready", "False", "NotCreated", f"There are no {noun}s yet.")
    if rollout.complete:
        return Finding("Ready", "True", "Ready", _counts(rollout, noun))
    if rollout.stuck:
        return Finding("Ready", "False", "Stuck", rollout.stuck)
    return Finding("Ready", "False", "RollingOut", f"{_counts(rollout, noun)}; {rollout.updated} up to date")


def _counts(rollout: Rollout, noun: str) -> str:
    return f"{rollout.ready} of {rollout.wanted} {noun}s ready"
