"""The bounded log of decisions. (skeleton: signatures are final)"""

from __future__ import annotations

from typing import Any


class Decision: ...


class DecisionLog:
    def get(self, id: str) -> dict[str, Any] | None:  # noqa: A002
        """The decision with this id (or of this request id), as a JSON-able dict; none once it fell out of the ring."""
        raise NotImplementedError

    def recent(self, n: int = 100) -> list[dict[str, Any]]:
        """The latest decisions, newest first."""
        raise NotImplementedError
