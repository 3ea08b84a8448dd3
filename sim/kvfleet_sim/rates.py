"""Published request rates: ServeGen's clients, each with its own rate and burstiness in every window of time.

A client's file has no header; a row is one window: start (s), rate (requests/s), coefficient of variation of the gaps, the
distribution fitted to them (`Gamma`, `Weibull` or empty) and its two arguments, of which the first is the shape. An archive
(.tar.gz) holds one file a client. The sums over clients (`category,t_s,total_rate_rps,…`) count each category as one client.

`arrivals` draws requests: every client's are a renewal process with that shape, from the trace's start and in its own time.
One factor on all rates brings the mean over the time that is sent to the wanted rate, so bursts keep their shape.
"""

from __future__ import annotations

import csv
import io
import math
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvfleet_sim.traces import MAX_LINE_BYTES, TraceError, open_text

MAX_CLIENTS = 10_000
MAX_WINDOWS = 20_000_000
AGGREGATE_HEADER = "category,t_s,total_rate_rps"
POISSON = ("", 1.0)
FAMILIES = ("", "Gamma", "Weibull")
MIN_SHAPE, MAX_SHAPE = 0.02, 50.0
"""Fits of windows with two or three requests go wild: beyond these, gaps are all or nothing."""


@dataclass(frozen=True, slots=True)
class Client:
    """One sender, by windows of time."""

    starts_s: Sequence[float]
    rates_rps: Sequence[float]
    shapes: Sequence[tuple[str, float]]
    """(family, shape) of the gaps: the mean is the rate's."""

    @property
    def end_s(self) -> float:
        """The last window is as long as the one before it."""
        width_s = self.starts_s[-1] - self.starts_s[-2] if len(self.starts_s) > 1 else math.inf
        return self.starts_s[-1] + width_s

    def expected(self, until_s: float) -> float:
        """Requests expected from the trace's start up to `until_s`."""
        ends = [*self.starts_s[1:], self.end_s]
        spans = zip(self.starts_s, ends, self.rates_rps, strict=True)
        return sum(max(min(end, until_s) - start, 0.0) * rate for start, end, rate in spans)


def arrivals(clients: Sequence[Client], rate_rps: float, count: int, draw: random.Random) -> list[tuple[float, int]]:
    """(time from the trace's start, number of the client) of about `count` requests at the mean rate `rate_rps`, by time.

    Fewer where the trace is over before. Raises TraceError where nobody sends in that time.
    """
    until_s = min(count / rate_rps, max(client.end_s for client in clients))
    expected = sum(client.expected(until_s) for client in clients)
    if not expected:
        raise TraceError(
            f"no client sends anything in the first {until_s:.0f} s of the trace: send more requests (--limit)"
        )
    factor = rate_rps * until_s / expected
    return sorted(
        (at_s, number) for number, client in enumerate(clients) for at_s in _arrivals(client, factor, until_s, draw)
    )


def _arrivals(client: Client, factor: float, until_s: float, draw: random.Random) -> Iterator[float]:
    """A renewal process whose clock runs at the rate: a gap that spans windows goes through each at its own speed."""
    window, now_s = 0, 0.0
    ends = [*client.starts_s[1:], client.end_s]
    first = True
    while window < len(ends):
        gap = _unit_gap(draw, *client.shapes[window])
        left = gap * draw.random() if first else gap  # in mean gaps; the first began before the trace did
        first = False
        while window < len(ends):
            rate = client.rates_rps[window] * factor
            start_s = max(now_s, client.starts_s[window])
            if rate > 0 and start_s + left / rate <= ends[window]:
                now_s = start_s + left / rate
                if now_s >= until_s:
                    return
                yield now_s
                break
            left -= max(ends[window] - start_s, 0.0) * rate
            now_s = ends[window]
            window += 1
            if now_s >= until_s:
                return


def _unit_gap(draw: random.Random, family: str, shape: float) -> float:
    """A gap of mean 1."""
    if family == "Gamma":
        return draw.gammavariate(shape, 1.0 / shape)
    if family == "Weibull":
        return draw.weibullvariate(1.0 / math.gamma(1.0 + 1.0 / shape), shape)
    return draw.expovariate(1.0)


# Files


def is_rates(path: Path) -> bool:
    """Whether the file is one of these, by its name or its first line."""
    if _is_archive(path):
        return True
    try:
        with open_text(path) as lines:
            first = lines.readline(MAX_LINE_BYTES)
    except (OSError, EOFError, UnicodeDecodeError):
        return False
    fields = first.strip().split(",")
    return first.startswith(AGGREGATE_HEADER) or (
        len(fields) == 6 and fields[3] in FAMILIES and fields[0].replace(".", "", 1).isdigit()
    )


def _is_archive(path: Path) -> bool:
    return path.name.endswith((".tar.gz", ".tgz", ".tar"))


def read_rates(path: Path) -> list[Client]:
    """The clients of a file. Raises TraceError naming file, line, field and remedy."""
    try:
        clients = list(_archive(path)) if _is_archive(path) else _plain(path)
    except (OSError, EOFError, tarfile.TarError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: damaged or not what its name says ({error}): fetch the file again") from error
    if not any(rate for client in clients for rate in client.rates_rps):
        raise TraceError(f"{path}: no client sends anything: give rates above 0")
    first_s = min(client.starts_s[0] for client in clients)
    return [replace(client, starts_s=[start - first_s for start in client.starts_s]) for client in clients]


def _plain(path: Path) -> list[Client]:
    with open_text(path) as lines:
        first = lines.readline()
        lines.seek(0)
        if first.startswith(AGGREGATE_HEADER):
            return _aggregates(str(path), lines)
        return [_client(str(path), lines)]


def _archive(path: Path) -> Iterator[Client]:
    found = windows = 0
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isfile() or not member.name.endswith("trace.csv"):
                continue
            opened = archive.extractfile(member)
            assert opened is not None  # it is a file
            client = _client(f"{path}: {member.name}", io.TextIOWrapper(opened, encoding="utf-8", newline=""))
            found, windows = found + 1, windows + len(client.starts_s)
            if found > MAX_CLIENTS or windows > MAX_WINDOWS:
                raise TraceError(f"{path}: more than {MAX_CLIENTS} clients or {MAX_WINDOWS} windows: split the archive")
            yield client
    if not found:
        raise TraceError(
            f"{path}: holds no client (files named …trace.csv): give an archive of ServeGen's client rates"
        )


def _client(name: str, lines: Iterable[str]) -> Client:
    starts: list[float] = []
    rates: list[float] = []
    shapes: list[tuple[str, float]] = []
    for number, row in enumerate(csv.reader(lines), 1):
        if not row:
            continue
        where = f"{name}: line {number}"
        if len(row) != 6:
            raise TraceError(
                f"{where}: {len(row)} columns: each row has six (start, rate, CV, distribution, two arguments)"
            )
        start = _number(where, "window start", row[0])
        if starts and start <= starts[-1]:
            raise TraceError(f"{where}: window start: {start:g} is not after {starts[-1]:g}: sort the windows by time")
        if row[3] not in FAMILIES:
            raise TraceError(f"{where}: distribution: {row[3]!r} is not known: use Gamma, Weibull or leave it empty")
        starts.append(start)
        rates.append(_number(where, "rate", row[1]))
        shapes.append(_shape(row[3], _number(where, "CV", row[2]), _number(where, "shape", row[4])))
    if not starts:
        raise TraceError(f"{name}: holds no windows: give a file with at least one row")
    return Client(starts, rates, shapes)


def _shape(family: str, cv: float, shape: float) -> tuple[str, float]:
    if not family and cv > 0:  # not fitted: the variation says as much
        family, shape = "Gamma", 1.0 / cv**2
    if not family or shape <= 0:
        return POISSON
    return family, min(max(shape, MIN_SHAPE), MAX_SHAPE)


def _aggregates(name: str, lines: Iterable[str]) -> list[Client]:
    """Each category as one client with Poisson arrivals."""
    by_category: dict[str, dict[float, float]] = {}
    for number, row in enumerate(csv.DictReader(lines), 2):
        where = f"{name}: line {number}"
        windows = by_category.setdefault(row["category"] or "", {})
        windows[_number(where, "t_s", row["t_s"])] = _number(where, "total_rate_rps", row["total_rate_rps"])
    clients = []
    for windows in by_category.values():
        starts = sorted(windows)
        clients.append(Client(starts, [windows[start] for start in starts], [POISSON] * len(starts)))
    if not clients:
        raise TraceError(f"{name}: holds no windows: give a file with at least one row")
    return clients


def _number(where: str, field: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        raise TraceError(f"{where}: {field}: {text!r} is not a number") from None
    if not 0 <= value < math.inf:
        raise TraceError(f"{where}: {field}: {text} is out of range: use 0 or more")
    return value
