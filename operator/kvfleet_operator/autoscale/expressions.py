"""The few expressions the built-in signals are made of, each with two meanings that must agree.

`promql()` is the query for a Prometheus server; `evaluate(scrapes)` is the same arithmetic over metrics scraped from
the processes themselves. A `Selector` keeps apart the labels a process exports (`pool`) and those Prometheus adds when
it scrapes (`namespace`): a direct scrape has only the former, and its targets were chosen by namespace already.

What users put into a label (names of pools, policies, models) is escaped; nothing of it can leave its quotes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]
"""One process's metrics: name → its series as (labels, value)."""
Scrapes = Sequence[Samples]
"""The metrics of several processes."""
Matcher = tuple[str, tuple[str, ...]]
"""A label and the values it may have; "" stands for the label being absent."""

_RE2_SPECIAL = re.compile(r"([\\.+*?()|\[\]{}^$])")
INSTANCE = "instance"
"""The label by which Prometheus tells scraped processes apart."""


def quote(text: str) -> str:
    """`text` as a PromQL string literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


@dataclass(frozen=True, slots=True)
class Selector:
    """Series of one metric."""

    metric: str
    labels: tuple[Matcher, ...] = ()
    """Labels the process exports."""
    target_labels: tuple[Matcher, ...] = ()
    """Labels Prometheus adds."""

    def promql(self) -> str:
        matchers = [_matcher(name, values) for name, values in (*self.target_labels, *self.labels)]
        return f"{self.metric}{{{','.join(matchers)}}}" if matchers else self.metric

    def values(self, samples: Samples) -> list[float]:
        """The matching values of one process."""
        return [
            value
            for labels, value in samples.get(self.metric, ())
            if all(labels.get(name, "") in allowed for name, allowed in self.labels)
        ]

    def all_values(self, scrapes: Scrapes) -> list[float]:
        return [value for samples in scrapes for value in self.values(samples)]


def _matcher(name: str, values: tuple[str, ...]) -> str:
    if len(values) == 1:
        return f"{name}={quote(values[0])}"
    pattern = "|".join(_RE2_SPECIAL.sub(r"\\\1", value) for value in values)
    return f"{name}=~{quote(pattern)}"


class Expression(Protocol):
    """Something that yields one number, or nothing where its series are absent."""

    def promql(self) -> str: ...

    def evaluate(self, scrapes: Scrapes) -> float | None: ...

    def selectors(self) -> Iterator[Selector]: ...


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum over all matching series."""

    of: Selector

    def promql(self) -> str:
        return f"sum({self.of.promql()})"

    def evaluate(self, scrapes: Scrapes) -> float | None:
        values = self.of.all_values(scrapes)
        return sum(values) if values else None

    def selectors(self) -> Iterator[Selector]:
        yield self.of


@dataclass(frozen=True, slots=True)
class Least:
    """The smallest of all matching series, times `share`."""

    of: Selector
    share: float = 1.0

    def promql(self) -> str:
        return f"{_factor(self.share)}min({self.of.promql()})"

    def evaluate(self, scrapes: Scrapes) -> float | None:
        values = self.of.all_values(scrapes)
        return self.share * min(values) if values else None

    def selectors(self) -> Iterator[Selector]:
        yield self.of


@dataclass(frozen=True, slots=True)
class SumOfMeans:
    """The mean within each process, summed over the processes: a worker of several engines counts once."""

    of: Selector

    def promql(self) -> str:
        return f"sum(avg by ({INSTANCE}) ({self.of.promql()}))"

    def evaluate(self, scrapes: Scrapes) -> float | None:
        means = [sum(values) / len(values) for samples in scrapes if (values := self.of.values(samples))]
        return sum(means) if means else None

    def selectors(self) -> Iterator[Selector]:
        yield self.of


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """A sum of sums, each with a weight; one whose series are absent counts as 0. Always yields a number."""

    terms: tuple[tuple[float, Selector], ...]

    def promql(self) -> str:
        parts = [f"{_factor(weight)}(sum({of.promql()}) or vector(0))" for weight, of in self.terms]
        return " + ".join(parts) if parts else "vector(0)"

    def evaluate(self, scrapes: Scrapes) -> float | None:
        return float(sum(weight * sum(of.all_values(scrapes)) for weight, of in self.terms))

    def selectors(self) -> Iterator[Selector]:
        for _, of in self.terms:
            yield of


def _factor(weight: float) -> str:
    return "" if weight == 1 else f"{weight!r} * "


@dataclass(frozen=True, slots=True)
class WeightedMean:
    """The mean of `of`, weighted by `weight`; 0 where the weights sum to 0.

    Weights that are requests in flight keep a router without traffic, whose last figure may be old, from being heard.
    """

    of: Selector
    weight: Selector

    def promql(self) -> str:
        of, weight = self.of.promql(), self.weight.promql()
        return f"(sum({weight}) == 0) or sum({of} * {weight}) / sum({weight})"

    def evaluate(self, scrapes: Scrapes) -> float | None:
        weights = self.weight.all_values(scrapes)
        if not weights:
            return None
        if sum(weights) == 0:
            return 0.0
        products = [
            value * weight
            for samples in scrapes
            for value, weight in zip(self.of.values(samples), self.weight.values(samples), strict=False)
        ]
        return sum(products) / sum(weights) if products else None

    def selectors(self) -> Iterator[Selector]:
        yield self.of
        yield self.weight
