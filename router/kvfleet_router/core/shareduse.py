"""What API keys have used at other replicas counts against their limits here: sans-io, a part of core/sharing.py.

Told are totals since the sender began, never differences, of keys with limits whose use has changed: what a lost message said, the
next one says too. A hearer charges what a total has grown by. Of a replica that was there before the hearer the first total
of a key says nothing of the last minute, and is only where counting begins. So a limit holds for all replicas together but for what
is admitted within USED_S and the way of a message, and for what a newcomer has missed.
"""

from __future__ import annotations

from typing import Protocol

from kvfleet_router.core.sharewire import MAX_USED

USED_S = 0.02
MAX_KNOWN_KEYS = 65_536
"""That one peer may speak of."""

Used = tuple[float, float]
"""Requests and tokens."""


class Usage(Protocol):
    """The keys of this replica."""

    def changed_use(self) -> dict[str, Used]:
        """By name of the key: totals of those with limits that were used since it was last asked."""

    def used_elsewhere(self, name: str, requests: float, tokens: float) -> None:
        """So much more was used at another replica; negative: less, for an estimate was too high."""


class SharedUse:
    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._waiting: dict[str, Used] = {}
        self._due = 0.0
        self._peers: dict[int, dict[str, Used]] = {}
        """By peer and key: the totals last heard."""

    def to_tell(self, now: float) -> list[dict[str, Used]]:
        """Portions of a message each; empty where nothing is due."""
        if now < self._due:
            return []
        self._due = now + USED_S
        self._waiting.update(self._usage.changed_use())
        names, waiting = list(self._waiting), self._waiting
        self._waiting = {}
        return [{name: waiting[name] for name in names[at : at + MAX_USED]} for at in range(0, len(names), MAX_USED)]

    def hear(self, sender: int, used: dict[str, Used], *, from_its_start: bool) -> None:
        """`from_its_start`: the sender has been heard since it began, so what it never spoke of was nothing."""
        known = self._peers.setdefault(sender, {})
        for name, (requests, tokens) in used.items():
            before = known.get(name, (0.0, 0.0) if from_its_start else (requests, tokens))
            if name not in known and len(known) >= MAX_KNOWN_KEYS:
                continue
            known[name] = (requests, tokens)
            self._usage.used_elsewhere(name, requests - before[0], tokens - before[1])

    def forget(self, sender: int) -> None:
        self._peers.pop(sender, None)
