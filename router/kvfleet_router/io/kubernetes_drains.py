"""Workers that the autoscaler is about to take away, as an annotation of the ConfigMap says. Pure.

    kvfleet.io/draining: {"llama": {"until": 1767225720, "workers": ["llama-5d9f-abcde"]}}

It is a wish with an end: whoever wrote it renews it while it holds, and takes it back when it does not. What cannot be
understood, or is over, says nothing.
"""

from __future__ import annotations

from typing import Final

import msgspec

MAX_AHEAD_S: Final = 900.0
"""No wish lasts longer, whatever clock it was written by."""
MAX_CHARS: Final = 262_144


class _Wish(msgspec.Struct):
    until: float
    workers: list[str]


class Drains:
    def __init__(self) -> None:
        self._text: str | None = None
        self._wishes: dict[str, _Wish] = {}

    def take(self, text: str | None, now_s: float) -> bool:
        """The annotation as it is now, None where there is none. True: it says something else than before.

        Raises ValueError where it cannot be understood; it then says nothing.
        """
        if text == self._text:
            return False
        self._text = text
        before, self._wishes = self._wishes, {}
        if text is not None:
            if len(text) > MAX_CHARS:
                raise ValueError(f"longer than {MAX_CHARS} characters")
            told = msgspec.json.decode(text, type=dict[str, _Wish])
            self._wishes = {
                pool: _Wish(min(wish.until, now_s + MAX_AHEAD_S), wish.workers) for pool, wish in told.items()
            }
        return before != self._wishes

    def end(self, now_s: float) -> bool:
        """Forget the wishes that are over at Unix time `now_s`. True: there were some, so workers may be used again."""
        left = {pool: wish for pool, wish in self._wishes.items() if now_s < wish.until}
        ended = len(left) < len(self._wishes)
        self._wishes = left
        return ended

    def of(self, pool: str, now_s: float) -> frozenset[str]:
        """Names of the pool's workers that should get nothing new, at Unix time `now_s`."""
        wish = self._wishes.get(pool)
        return frozenset(wish.workers) if wish is not None and now_s < wish.until else frozenset()

    def ends_in_s(self, now_s: float) -> float | None:
        """Until the next wish is over; None: there is none."""
        return min((wish.until - now_s for wish in self._wishes.values() if now_s < wish.until), default=None)
