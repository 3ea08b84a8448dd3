"""The books of joules for Prometheus: who they were for, what was learned of the workers, and whether joules steer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvfleet_router.core.carbon import grams_per_kwh
from kvfleet_router.core.dispatcher import Dispatcher

PREFIX = "kvfleet_"
JOULES_PER_KWH = 3.6e6
SOURCES = ("Profile", "Learning", "Measured", "LowConfidence", "Stale", "Frozen", "Absurd")


class EnergyMetrics:
    """Asked at each scrape. Grams are counted as joules are seen: at the intensity of that hour."""

    def __init__(self, dispatcher: Dispatcher, now: Callable[[], float] = time.time) -> None:
        self._dispatcher = dispatcher
        self._now = now
        self._seen: dict[tuple[str, str], float] = {}
        self._grams: dict[tuple[str, str], float] = {}

    def __call__(self) -> Iterable[Metric]:
        ledger = self._dispatcher.energy.ledger
        if ledger is None:
            return [*self._savings(), *self._budgets()]
        joules = CounterMetricFamily(
            PREFIX + "energy_joules",
            "Joules by what they were for; their sum is what the workers' counters showed.",
            labels=("pool", "tenant", "model", "kind"),
        )
        for pool, tenant, model, kind, value in ledger.rows():
            joules.add_metric((pool, tenant, model, kind), value)
        return [joules, *self._carbon(), *self._states(), *self._savings(), *self._budgets()]

    def tick(self) -> None:
        """Turn the joules booked since the last call into grams; call at least every minute or so."""
        ledger, spec = self._dispatcher.energy.ledger, self._dispatcher.config.telemetry
        if ledger is None or spec is None:
            return
        intensity = grams_per_kwh(spec, time.gmtime(self._now()).tm_hour)
        if intensity is None:
            return
        sums: dict[tuple[str, str], float] = {}
        for pool, tenant, _, _, value in ledger.rows():
            sums[pool, tenant] = sums.get((pool, tenant), 0.0) + value
        for key, value in sums.items():
            new = value - self._seen.get(key, 0.0)
            self._seen[key] = value
            self._grams[key] = self._grams.get(key, 0.0) + new / JOULES_PER_KWH * intensity

    def _carbon(self) -> list[Metric]:
        self.tick()
        if not self._grams:
            return []
        grams = CounterMetricFamily(
            PREFIX + "energy_co2_grams", "Grams of CO2 equivalent of the joules.", labels=("pool", "tenant")
        )
        for key, value in self._grams.items():
            grams.add_metric(key, value)
        return [grams]

    def _savings(self) -> list[Metric]:
        told = self._dispatcher.savings()
        if not told:
            return []
        saved = CounterMetricFamily(
            PREFIX + "energy_saved_joules",
            "Joules that decisions took less than least_request's would have, by the model; less energy_lost_joules_total.",
            labels=("pool",),
        )
        lost = CounterMetricFamily(
            PREFIX + "energy_lost_joules",
            "Joules that decisions took more than least_request's would.",
            labels=("pool",),
        )
        error = GaugeMetricFamily(
            PREFIX + "energy_saved_joules_stderr",
            "Standard error of saved less lost joules, from that of the coefficients.",
            labels=("pool",),
        )
        for pool in told:
            saved.add_metric((pool.pool,), pool.saved_joules)
            lost.add_metric((pool.pool,), pool.lost_joules)
            error.add_metric((pool.pool,), pool.standard_error)
        return [saved, lost, error]

    def _budgets(self) -> list[Metric]:
        budgets = self._dispatcher.power_budgets
        if not budgets:
            return []
        most = GaugeMetricFamily(PREFIX + "power_budget_watts", "maxWatts, by whose it is.", labels=("budget",))
        drawn = GaugeMetricFamily(
            PREFIX + "power_drawn_watts", "What the budget's pools draw, by the cost model.", labels=("budget",)
        )
        for budget in budgets:
            most.add_metric((budget.whose,), budget.max_watts)
            drawn.add_metric((budget.whose,), budget.drawn_watts())
        return [most, drawn]

    def _states(self) -> list[Metric]:
        state = GaugeMetricFamily(
            PREFIX + "energy_source",
            "Where a pool's joules come from: 1 for the state it is in.",
            labels=("pool", "source"),
        )
        steers = GaugeMetricFamily(
            PREFIX + "energy_trusted", "Whether joules may steer the pool's requests.", labels=("pool",)
        )
        error = GaugeMetricFamily(
            PREFIX + "energy_model_error_ratio",
            "Mean relative difference of measured joules from the model's.",
            labels=("pool",),
        )
        coefficient = GaugeMetricFamily(
            PREFIX + "energy_coefficient",
            "Learned energy coefficients: joules per step, token and prefill token; watts when idle.",
            labels=("pool", "coefficient"),
        )
        deviation = GaugeMetricFamily(
            PREFIX + "energy_coefficient_stderr", "Their standard errors.", labels=("pool", "coefficient")
        )
        for told in self._dispatcher.energy_states():
            for source in SOURCES:
                state.add_metric((told.pool, source), source == told.source)
            steers.add_metric((told.pool,), told.trusted)
            error.add_metric((told.pool,), told.error)
            for estimate in told.estimates:
                coefficient.add_metric((told.pool, estimate.name), estimate.value)
                deviation.add_metric((told.pool, estimate.name), estimate.standard_error)
        return [state, steers, error, coefficient, deviation]
