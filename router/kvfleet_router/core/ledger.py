"""Who the joules were for: every joule that a worker's counter shows is booked once. Pure.

While a worker is metered it counts its steps T and, for the fixed energy of a step that its n sequences share, Σ 1/n (`S`).
A sequence that decoded from (T0, S0) to (T, S) has had T − T0 tokens and S − S0 shares of a step. An interval between two
counter readings is booked in four kinds, by the pool's coefficients:

    prefill   ep·uncached tokens, when the first token came                 decode   E1·tokens + Ec·(context held)·tokens
    step      E0·shares of steps                                            idle     P_idle·seconds without a request

and all of it times (what the counter shows)/(their sum). So the books are equal to the counters, whatever the coefficients:
those only say how it is divided. An interval of which nothing is known (no work seen, not idle: other routers' requests, or a
worker that warms up) is booked as idle of the pool.

A request's own joules are told when it ends, before the counter is read: by the coefficients, times the ratio of the worker's
last interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvfleet_router.core.energyfit import Figures, Work

if TYPE_CHECKING:
    from kvfleet_router.core.ticket import Ticket
    from kvfleet_router.core.worker import Worker

KINDS = ("prefill", "decode", "step", "idle")
MAX_ACCOUNTS = 1024
OTHER_TENANTS = "(other)"
"""The tenant of what would be one account too many."""
RATIO_BOUNDS = (0.25, 4.0)

Account = tuple[str, str, str]
"""(pool, tenant, model); idle: ("pool", "", "")."""


@dataclass(slots=True)
class Entry:
    """A request on a worker, as far as it is booked."""

    account: Account
    sequences: int
    context_tokens: float
    """Held by each of its sequences when it was last booked."""
    steps: float
    shares: float
    tokens: float = 0.0
    """Booked; an answer of which the engine reports more has had more."""
    joules: float = 0.0
    """Expected of it so far, by the coefficients."""


@dataclass(slots=True)
class Page:
    """A worker's open interval."""

    figures: Figures
    entries: dict[int, Entry] = field(default_factory=dict)
    expected: dict[tuple[Account, str], float] = field(default_factory=dict)
    prefill_tokens: float = 0.0
    tokens: float = 0.0
    context_tokens: float = 0.0
    steps: float = 0.0
    idle_s: float = 0.0
    ratio: float = 1.0


class Ledger:
    """The books of a router. Workers that have it as their `ledger` report to it."""

    def __init__(self) -> None:
        self._pages: dict[Worker, Page] = {}
        self._accounts: set[Account] = set()
        self.joules: dict[tuple[Account, str], float] = {}
        """Booked, by account and kind."""
        self.total = 0.0
        """All that was booked: what the counters showed."""

    def open(self, worker: Worker, figures: Figures) -> None:
        """Begin to book for a worker, or go on with other coefficients."""
        page = self._pages.get(worker)
        if page is None:
            self._pages[worker] = Page(figures, steps=worker.work_steps, idle_s=worker.idle_seconds)
            worker.ledger = self
        else:
            page.figures = figures

    def forget(self, worker: Worker) -> None:
        """It is gone; what was not measured is nobody's."""
        self._pages.pop(worker, None)
        worker.ledger = None

    def first_token(self, ticket: Ticket) -> None:
        """Its prefill is over."""
        worker = ticket.worker
        page = self._pages.get(worker)
        if page is None:
            return
        uncached = max(ticket.prompt_tokens - ticket.cached_tokens, 0.0)
        entry = Entry(
            self._account(worker.pool, ticket.parsed.tenant, ticket.parsed.model),
            ticket.parsed.sequences,
            ticket.prompt_tokens,
            worker.work_steps,
            worker.work_shares,
        )
        page.entries[id(ticket)] = entry
        page.prefill_tokens += uncached
        self._expect(page, entry, "prefill", page.figures.prefill_token_joules * uncached)

    def ended(self, ticket: Ticket) -> float:
        """It left its worker, whole or not; returns its joules."""
        page = self._pages.get(ticket.worker)
        entry = page.entries.pop(id(ticket), None) if page is not None else None
        if page is None or entry is None:
            return 0.0
        self._bring_up(page, entry, ticket.worker)
        return entry.joules * page.ratio

    def so_far(self, ticket: Ticket, output_tokens: int | None = None) -> float | None:
        """Its joules until now; None where its worker is not metered. `output_tokens`: all it has, where the engine said."""
        page = self._pages.get(ticket.worker)
        entry = page.entries.get(id(ticket)) if page is not None else None
        if page is None or entry is None:
            return None
        self._bring_up(page, entry, ticket.worker)
        if output_tokens is not None and output_tokens > entry.tokens:
            missing = output_tokens - entry.tokens
            shares = missing / entry.sequences / max(ticket.worker.decoding, 1)
            self._decoded(page, entry, missing, missing / entry.sequences, shares)
        return entry.joules * page.ratio

    def close(self, worker: Worker, joules: float | None) -> tuple[Work, float]:
        """Book the worker's interval: `joules` by its counter, or what the coefficients say where there is none.

        The worker must be up to date. Returns its work and what was booked."""
        page = self._pages[worker]
        for entry in page.entries.values():
            self._bring_up(page, entry, worker)
        work = Work(
            worker.work_steps - page.steps,
            page.tokens,
            page.context_tokens,
            page.prefill_tokens,
            worker.idle_seconds - page.idle_s,
        )
        idle = ((worker.pool, "", ""), "idle")
        page.expected[idle] = page.expected.get(idle, 0.0) + page.figures.idle_watts * work.idle_s
        expected = sum(page.expected.values())
        booked = expected if joules is None else joules
        if expected > 0.0:
            ratio = booked / expected
            page.ratio = min(max(ratio, RATIO_BOUNDS[0]), RATIO_BOUNDS[1])
            for key, value in page.expected.items():
                self.joules[key] = self.joules.get(key, 0.0) + value * ratio
        else:
            self.joules[idle] = self.joules.get(idle, 0.0) + booked
        self.total += booked
        self._turn(page, worker)
        return work, booked

    def skip(self, worker: Worker) -> None:
        """What the worker drew since its last interval cannot be known: it is nobody's. The worker must be up to date."""
        page = self._pages[worker]
        for entry in page.entries.values():
            self._bring_up(page, entry, worker)
        self._turn(page, worker)

    @staticmethod
    def _turn(page: Page, worker: Worker) -> None:
        page.expected = {}
        page.prefill_tokens = page.tokens = page.context_tokens = 0.0
        page.steps, page.idle_s = worker.work_steps, worker.idle_seconds

    def workers(self) -> list[Worker]:
        """Those there are books of."""
        return list(self._pages)

    def rows(self) -> Iterator[tuple[str, str, str, str, float]]:
        """(pool, tenant, model, kind, joules)"""
        for ((pool, tenant, model), kind), joules in self.joules.items():
            yield pool, tenant, model, kind, joules

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _bring_up(self, page: Page, entry: Entry, worker: Worker) -> None:
        """Expect of it what it decoded since it was last booked."""
        steps, shares = worker.work_steps - entry.steps, worker.work_shares - entry.shares
        if steps <= 0.0:
            return
        entry.steps, entry.shares = worker.work_steps, worker.work_shares
        self._decoded(page, entry, entry.sequences * steps, steps, shares)

    def _decoded(self, page: Page, entry: Entry, tokens: float, steps: float, shares: float) -> None:
        held = tokens * (entry.context_tokens + steps / 2)
        entry.context_tokens += steps
        entry.tokens += tokens
        page.tokens += tokens
        page.context_tokens += held
        figures = page.figures
        self._expect(page, entry, "decode", figures.token_joules * tokens + figures.context_token_joules * held)
        self._expect(page, entry, "step", figures.step_joules * entry.sequences * shares)

    @staticmethod
    def _expect(page: Page, entry: Entry, kind: str, joules: float) -> None:
        key = (entry.account, kind)
        page.expected[key] = page.expected.get(key, 0.0) + joules
        entry.joules += joules

    def _account(self, pool: str, tenant: str, model: str) -> Account:
        account = (pool, tenant, model)
        if account not in self._accounts:
            if len(self._accounts) >= MAX_ACCOUNTS:
                return (pool, OTHER_TENANTS, "")
            self._accounts.add(account)
        return account
