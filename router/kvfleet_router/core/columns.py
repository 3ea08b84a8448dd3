"""Workers' figures as numpy columns, for fleets where scoring worker by worker in Python would take longer.

The workers' own attributes are the truth; a row is copied again when its worker had an event since. One Table serves the
fleet; `Table.columns(slots)` gathers the candidates of a decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvfleet_router.core.worker import Worker

YOUNG = 12
"""Requests of a worker that began to decode last, and are looked at one by one."""

Array = npt.NDArray[np.float64]
Slots = npt.NDArray[np.intp] | slice
"""Candidates' slots; a slice where they follow one another: then columns are looked at where they are, and not gathered."""


@dataclass(slots=True)
class Columns:
    """The attributes of Worker with these names, over the candidates in their order."""

    backlog_s: Array
    head_since: Array
    head_prefill_s: Array
    inflation: Array
    step_now_s: Array
    step_s_per_sequence: Array
    step_s_per_context_token: Array
    context_tokens: Array
    prefill_s_per_token: Array
    prefill_s_per_token_pair: Array
    prefill_seconds: Array
    prefill_share: Array
    prefill_share_at: Array
    pending: Array
    decoding: Array
    max_sequences: Array
    kv_tokens: Array
    kv_used_tokens: Array
    kv_free_tokens: Array
    tail_used_at: Array
    prefill_token_joules: Array
    token_joules: Array
    context_token_joules: Array
    fixed_step_joules: Array
    youngest: Array
    """2 x YOUNG rows: `Worker.youngest`."""


FIELDS = tuple(field.name for field in fields(Columns))[:-1]
_row = attrgetter(*FIELDS)


class Table:
    """Rows of all workers by slot, refreshed when read."""

    def __init__(self) -> None:
        self.stale: set[Worker] = set()
        """Workers whose figures changed since their row was written."""
        self.untold: set[Worker] = set()
        """Workers where this router's own load changed since it told other replicas."""
        self._rows: Array = np.zeros((len(FIELDS) + 2 * YOUNG, 64))

    def columns(self, slots: Slots) -> Columns:
        """To be read before the next event: they may be the table itself."""
        for worker in self.stale:
            if worker.removed:
                continue  # its slot may be another's by now
            slot = worker.cache.slot
            if slot >= self._rows.shape[1]:
                self._rows = np.pad(self._rows, ((0, 0), (0, max(slot + 1 - self._rows.shape[1], self._rows.shape[1]))))
            self._rows[:, slot] = (*_row(worker), *worker.youngest())
        self.stale.clear()
        rows = self._rows[:, slots]
        return Columns(*(*rows[: len(FIELDS)], rows[len(FIELDS) :]))


def slots_of(slots: Sequence[int]) -> Slots:
    if slots and list(slots) == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return np.array(slots, dtype=np.intp)


def spread(masks: Sequence[tuple[int, float]], slots: Slots, size: int) -> Array:
    """The value of the mask a worker is in, by candidate; 0 for those in none. `size`: more than the highest slot."""
    by_slot: Array = np.zeros(size)
    width = (size + 7) // 8
    for mask, value in masks:
        bits: Any = np.frombuffer((mask & ((1 << size) - 1)).to_bytes(width, "little"), dtype=np.uint8)
        by_slot[np.unpackbits(bits, count=size, bitorder="little").view(bool)] = value
    return by_slot[slots]
