"""The reader that asks a Prometheus server (or what speaks its HTTP API: Thanos, Mimir, VictoriaMetrics).

One request reads one signal: value, target, sources and age at one instant (`signals.query_of`). The bearer token is
read from its file for every round, as it is rotated there. Answers are bounded and validated.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from kvfleet_operator.autoscale.readers.fetch import FetchError, fetch
from kvfleet_operator.autoscale.readers.source import PoolQuestion, to_reading
from kvfleet_operator.autoscale.readings import DEFAULT_MAX_AGE_S, Raw, Reading, failed
from kvfleet_operator.autoscale.signals import Signal, query_of

T = TypeVar("T")
MAX_TOKEN_BYTES: Final = 64 * 1024
MAX_POINTS: Final = 11_000
"""Prometheus refuses a range query for more points of a series."""


@dataclass(frozen=True, slots=True)
class PrometheusSettings:
    """Where Prometheus is, and how to talk to it. Raises ValueError where it cannot be."""

    url: str
    """`https://host:port`, with a path where the API is below one."""
    token_file: Path | None = None
    """Bearer token."""
    ca_file: Path | None = None
    """Certificates to trust instead of the system's."""
    timeout_s: float = 10.0
    max_answer_bytes: int = 4 * 2**20
    max_age_s: float = DEFAULT_MAX_AGE_S
    """Older samples are stale: at least twice the scrape interval."""
    concurrency: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"prometheus url {self.url!r}: write it as https://host:port")
        if parts.username is not None:
            raise ValueError("prometheus url: it must not hold a user or password: use tokenFile")


class _Sample(msgspec.Struct):
    metric: dict[str, str]
    value: tuple[float, str]


class _Series(msgspec.Struct):
    metric: dict[str, str]
    values: list[tuple[float, str]]


class _Data(msgspec.Struct):
    result: msgspec.Raw
    result_type: str = msgspec.field(name="resultType", default="")


class _Answer(msgspec.Struct):
    status: str = ""
    data: _Data | None = None
    error: str = ""


class PrometheusReader:
    """Asks Prometheus. Call `aclose` at the end."""

    def __init__(self, settings: PrometheusSettings, client: httpx.AsyncClient | None = None) -> None:
        self._settings = settings
        self._base = settings.url.rstrip("/")
        self._client = client or httpx.AsyncClient(verify=_trust(settings), trust_env=False, timeout=None)
        self._slots = asyncio.Semaphore(settings.concurrency)

    async def read(self, pools: Sequence[PoolQuestion]) -> list[list[Reading]]:
        try:
            headers = await self._authorisation()
        except FetchError as error:
            return [[failed(signal.name, signal.kind, str(error)) for signal in pool.signals] for pool in pools]
        reads = [self._read_one(signal, pool, headers) for pool in pools for signal in pool.signals]
        readings = iter(await asyncio.gather(*reads))
        return [[next(readings) for _ in pool.signals] for pool in pools]

    async def history(self, query: str, start_s: float, end_s: float, step_s: float) -> list[tuple[float, float]]:
        """A query's past, as (Unix time, value): what a forecast learns from. Raises FetchError."""
        if step_s <= 0 or (end_s - start_s) / step_s > MAX_POINTS:
            raise FetchError(
                f"a range of {end_s - start_s:.0f} s in steps of {step_s:g} s has more than {MAX_POINTS} points"
            )
        form = {"query": query, "start": f"{start_s:.3f}", "end": f"{end_s:.3f}", "step": f"{step_s:g}"}
        data = await self._ask("query_range", form, await self._authorisation())
        series = _decode(data.result, list[_Series])
        if len(series) > 1:
            raise FetchError(f"the query gives {len(series)} series: aggregate them, for example with sum(...)")
        points = [(at_s, _number(text)) for at_s, text in series[0].values] if series else []
        return [(at_s, value) for at_s, value in points if isfinite(value)]

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _read_one(self, signal: Signal, pool: PoolQuestion, headers: dict[str, str]) -> Reading:
        form = {"query": query_of(signal), "timeout": f"{self._settings.timeout_s:g}s"}
        try:
            async with self._slots:
                data = await self._ask("query", form, headers)
            raw = _one_value(data) if signal.source == "query" else _parts(data)
        except FetchError as error:
            return failed(signal.name, signal.kind, str(error))
        return to_reading(signal, raw, pool, self._settings.max_age_s)

    async def _ask(self, endpoint: str, form: dict[str, str], headers: dict[str, str]) -> _Data:
        settings = self._settings
        try:
            body = await fetch(
                self._client,
                "POST",
                f"{self._base}/api/v1/{endpoint}",
                timeout_s=settings.timeout_s,
                max_bytes=settings.max_answer_bytes,
                headers=headers,
                form=form,
            )
        except FetchError as error:
            raise FetchError(_why(error), error.status, error.body) from error
        answer = _decode(body, _Answer)
        if answer.status != "success" or answer.data is None:
            raise FetchError(f"Prometheus says: {answer.error[:500] or 'no data'}")
        return answer.data

    async def _authorisation(self) -> dict[str, str]:
        path = self._settings.token_file
        if path is None:
            return {}
        try:
            token = await asyncio.to_thread(_read_token, path)
        except (OSError, ValueError) as error:
            raise FetchError(f"token file {path}: {error}") from error
        return {"authorization": f"Bearer {token}"}


def _trust(settings: PrometheusSettings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        raise ValueError(f"prometheus CA file {settings.ca_file}: {error}") from error


def _read_token(path: Path) -> str:
    with path.open("rb") as file:
        token = file.read(MAX_TOKEN_BYTES + 1).decode("ascii").strip()
    if not token or len(token) > MAX_TOKEN_BYTES or not token.isprintable() or " " in token:
        raise ValueError("it must hold one token and nothing else")
    return token


def _why(error: FetchError) -> str:
    """The error in words that lead to its remedy; Prometheus puts its own into the body."""
    if error.status in (401, 403):
        return f"{error}: check the token file and what it may query"
    if error.status == 404:
        return f"{error}: the URL must be the one below which /api/v1/query is"
    if error.body:
        try:
            return f"{error}: {_decode(error.body, _Answer).error[:500]}"
        except FetchError:
            return str(error)
    return str(error)


def _decode(body: bytes | msgspec.Raw, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise FetchError(f"this is no answer of Prometheus ({str(error)[:200]}): check the URL") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise FetchError(f"Prometheus answered {text[:50]!r} where a number belongs") from error


def _one_value(data: _Data) -> Raw:
    """A user's query must yield one number."""
    if data.result_type == "scalar":
        return Raw(_number(_decode(data.result, tuple[float, str])[1]))
    if data.result_type != "vector":
        raise FetchError(f"the query gives a {data.result_type[:20]}: it must give one number")
    samples = _decode(data.result, list[_Sample])
    if len(samples) > 1:
        raise FetchError(f"the query gives {len(samples)} series: aggregate them, for example with sum(...)")
    return Raw(_number(samples[0].value[1]) if samples else None)


def _parts(data: _Data) -> Raw:
    """The parts of a built-in signal, told apart by their label `part`."""
    found = {sample.metric.get("part"): _number(sample.value[1]) for sample in _decode(data.result, list[_Sample])}
    sources = found.get("sources")
    return Raw(
        found.get("value") if sources else None,
        found.get("target"),
        int(sources) if sources is not None and isfinite(sources) else None,
        found.get("age"),
    )
