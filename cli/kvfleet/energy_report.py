"""`kvfleet energy report`: whose joules they were, from a Prometheus over a time range or from routers since they started."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import orjson
from prometheus_client.parser import text_string_to_metric_families
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

JOULES = "kvfleet_energy_joules_total"
GRAMS = "kvfleet_energy_co2_grams_total"
SAVED, LOST = "kvfleet_energy_saved_joules_total", "kvfleet_energy_lost_joules_total"
SAVED_ERROR = "kvfleet_energy_saved_joules_stderr"
KINDS = ("prefill", "decode", "step", "idle")
LABELS = ("pool", "tenant", "model")
JOULES_PER_WH = 3600.0
TIMEOUT_S = 30.0
MAX_BYTES = 32 * 2**20
DURATION = re.compile(r"[1-9][0-9]{0,6}[smhdw]")


class ReportError(Exception):
    """What cannot be asked or read; says what to do."""


@dataclass(slots=True)
class Line:
    """One group's joules by kind, and its grams where they are known."""

    joules: dict[str, float]
    grams: float | None = None

    @property
    def total(self) -> float:
        return sum(self.joules.values())


@dataclass(frozen=True, slots=True)
class Savings:
    """Joules saved against least_request, all pools together."""

    joules: float
    """Less those that decisions took more."""
    standard_error: float | None
    """None: not known over a range of time."""


Key = tuple[str, ...]
Sample = tuple[dict[str, str], float]


def from_routers(urls: Sequence[str], metric: str) -> list[Sample]:
    """Samples of the routers' own metrics, since each of them started."""
    samples = []
    for url in urls:
        text = _get(f"{url.rstrip('/')}/metrics", {}).decode("utf-8", "replace")
        for family in text_string_to_metric_families(text):
            samples += [(dict(sample.labels), sample.value) for sample in family.samples if sample.name == metric]
    return samples


def from_prometheus(url: str, metric: str, since: str, until: str | None) -> list[Sample]:
    """What the metric grew by within the time range. `until`: Unix or RFC 3339 time; none: now."""
    if not DURATION.fullmatch(since):
        raise ReportError(f"--since {since}: give a number and a unit, as in 30m, 24h, 7d")
    parameters = {"query": f"sum by (pool, tenant, model, kind) (increase({metric}[{since}]))"}
    if until is not None:
        parameters["time"] = until
    body = _get(f"{url.rstrip('/')}/api/v1/query", parameters)
    try:
        rows: Any = orjson.loads(body)["data"]["result"]
        return [(row["metric"], float(row["value"][1])) for row in rows]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ReportError(f"--prometheus {url}: no result of a query: {error!r}") from error


def _get(url: str, parameters: dict[str, str]) -> bytes:
    try:
        with httpx.stream("GET", url, params=parameters, timeout=TIMEOUT_S, trust_env=False) as answer:
            body = b""
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise ReportError(f"{url} answered more than {MAX_BYTES} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ReportError(f"{url}: {error or type(error).__name__}: is the address right?") from error
    if answer.status_code != 200:
        raise ReportError(f"{url} answered {answer.status_code}: {body[:200].decode('utf-8', 'replace')}")
    return body


def grouped(joules: Iterable[Sample], grams: Iterable[Sample], by: Sequence[str]) -> dict[Key, Line]:
    """Lines by the wanted labels, the most joules first. Grams are known by pool and tenant only."""
    lines: dict[Key, Line] = {}
    for labels, value in joules:
        key = tuple(labels.get(label, "") for label in by)
        line = lines.setdefault(key, Line(dict.fromkeys(KINDS, 0.0)))
        kind = labels.get("kind", "")
        if kind in line.joules:
            line.joules[kind] += value
    if "model" not in by:
        for labels, value in grams:
            known = lines.get(tuple(labels.get(label, "") for label in by))
            if known is not None:
                known.grams = (known.grams or 0.0) + value
    return dict(sorted(lines.items(), key=lambda item: -item[1].total))


def savings(saved: Sequence[Sample], lost: Sequence[Sample], errors: Sequence[Sample] | None) -> Savings | None:
    """None where routers tell none. Routers price with about the same coefficients, so their errors add up."""
    if not saved:
        return None
    joules = sum(value for _, value in saved) - sum(value for _, value in lost)
    return Savings(joules, None if errors is None else sum(value for _, value in errors))


def in_words(found: Savings) -> str:
    """A line under the table."""
    band = "" if found.standard_error is None else f" ± {found.standard_error / JOULES_PER_WH:.2f}"
    return f"Saved against least_request, by the model: {found.joules / JOULES_PER_WH:.2f}{band} Wh"


def check_by(text: str) -> list[str]:
    """The labels to group by. Raises ReportError."""
    by = [label.strip() for label in text.split(",") if label.strip()]
    wrong = [label for label in by if label not in LABELS]
    if wrong or not by:
        raise ReportError(f"--by {text}: use some of {', '.join(LABELS)}")
    return by


def print_table(lines: dict[Key, Line], by: Sequence[str], console: Console) -> None:
    table = Table(box=SIMPLE)
    for label in by:
        table.add_column(label)
    for title in (*(f"{kind} Wh" for kind in KINDS), "total Wh", "share", "g CO2"):
        table.add_column(title, justify="right")
    everything = sum(line.total for line in lines.values()) or 1.0
    for key, line in lines.items():
        cells = [value or ("-" if line.joules["idle"] != line.total else "(idle)") for value in key]
        watt_hours = [f"{line.joules[kind] / JOULES_PER_WH:.2f}" for kind in KINDS]
        grams = "" if line.grams is None else f"{line.grams:.1f}"
        table.add_row(*cells, *watt_hours, f"{line.total / JOULES_PER_WH:.2f}", f"{line.total / everything:.1%}", grams)
    console.print(table)


def as_csv(lines: dict[Key, Line], by: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*by, *(f"{kind}_joules" for kind in KINDS), "total_joules", "co2_grams"])
    for key, line in lines.items():
        grams = "" if line.grams is None else f"{line.grams:.3f}"
        writer.writerow(
            [*map(_plain, key), *(f"{line.joules[kind]:.3f}" for kind in KINDS), f"{line.total:.3f}", grams]
        )
    return out.getvalue()


def _plain(text: str) -> str:
    """A tenant is what a client says: no formula for whoever opens this in a spreadsheet."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t") else text
