"""Reading signals from a Prometheus server: what it is asked, and what its answers, good and bad, amount to."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from kvfleet_api.modelpool import AutoscalingSpec
from kvfleet_operator.autoscale.readers.fetch import FetchError
from kvfleet_operator.autoscale.readers.prometheus import PrometheusReader, PrometheusSettings
from kvfleet_operator.autoscale.readers.source import PoolQuestion
from kvfleet_operator.autoscale.readings import Quality, Reading
from kvfleet_operator.autoscale.signals import PoolScope, QueueShare, Signal, query_of, signals_of

SCOPE = PoolScope("prod", "a", ("llama",), (QueueShare("chat", 1.0),), 1.0)
ROUTERS = ["http://10.0.0.1:9090", "http://10.0.0.2:9090"]


def signals(*specs: dict[str, Any]) -> list[Signal]:
    return signals_of(AutoscalingSpec.model_validate({"maxReplicas": 4, "signals": list(specs)}), SCOPE)


def vector(*samples: tuple[dict[str, str], str]) -> str:
    result = [{"metric": metric, "value": [1700000000.123, value]} for metric, value in samples]
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}})


def parts(**values: str) -> str:
    return vector(*(({"part": part}, value) for part, value in values.items()))


Reads = Callable[..., Awaitable[Reading]]


@pytest.fixture
async def read(serve: Any) -> AsyncIterator[Reads]:
    """Read one signal from a Prometheus that answers `content`."""
    readers: list[PrometheusReader] = []

    async def one(content: bytes | None, signal: Signal | None = None, **settings: Any) -> Reading:
        server = await serve(lambda request: content)
        reader = PrometheusReader(PrometheusSettings(server.url, **settings))
        readers.append(reader)
        asked = signal or signals({"concurrency": {}})[0]
        ((reading,),) = await reader.read([PoolQuestion([asked], ROUTERS)])
        return reading

    yield one
    for reader in readers:
        await reader.aclose()


QUERY = {"prometheus": {"query": "sum(x)", "targetMilli": 2000}}


async def test_a_signal_is_one_query(serve: Any, answer: Any) -> None:
    server = await serve(lambda request: answer(parts(value="34", target="48", sources="2", age="7.5")))
    reader = PrometheusReader(PrometheusSettings(f"{server.url}/prom/"))
    asked = signals()
    (readings,) = await reader.read([PoolQuestion(asked, ROUTERS)])
    await reader.aclose()
    assert {request.path for request in server.requests} == {"/prom/api/v1/query"}
    forms = [parse_qs(request.body) for request in server.requests]
    assert sorted(form["query"][0] for form in forms) == sorted(query_of(signal) for signal in asked)
    assert all(form["timeout"] == ["10s"] for form in forms)
    concurrency, ttft = readings
    assert concurrency == Reading("concurrency", "AverageValue", Quality.FRESH, 34.0, 48.0, 7.5)
    assert (ttft.value, ttft.target) == (34.0, pytest.approx(0.7))


@pytest.mark.parametrize(
    ("given", "quality", "words"),
    [
        ({"value": "34", "target": "48", "sources": "1", "age": "7"}, Quality.PARTIAL, "only 1 of 2 routers"),
        ({"value": "34", "target": "48", "sources": "2", "age": "400"}, Quality.STALE, "400 s old"),
        ({"value": "NaN", "target": "48", "sources": "2", "age": "7"}, Quality.INVALID, "its value is nan"),
        ({"value": "+Inf", "target": "48", "sources": "2", "age": "7"}, Quality.INVALID, "its value is inf"),
        ({"value": "34", "sources": "2", "age": "7"}, Quality.ABSENT, "its target"),
        ({"target": "48", "sources": "2", "age": "7"}, Quality.SILENT, "no router has a figure yet"),
        ({"value": "0"}, Quality.ABSENT, "no router reports it"),
        ({}, Quality.ABSENT, "no router reports it"),
    ],
)
async def test_what_the_parts_amount_to(
    read: Reads, answer: Any, given: dict[str, str], quality: Quality, words: str
) -> None:
    reading = await read(answer(parts(**given)))
    assert reading.quality is quality
    assert words in reading.message


@pytest.mark.parametrize(
    ("content", "quality", "value", "words"),
    [
        (vector(({}, "5")), Quality.FRESH, 5.0, ""),
        (vector(({"job": "x"}, "5")), Quality.FRESH, 5.0, ""),
        (
            json.dumps({"status": "success", "data": {"resultType": "scalar", "result": [1.0, "7"]}}),
            Quality.FRESH,
            7.0,
            "",
        ),
        (vector(), Quality.ABSENT, None, "no series"),
        (vector(({}, "NaN")), Quality.INVALID, None, "its value is nan"),
        (vector(({"a": "1"}, "5"), ({"a": "2"}, "6")), Quality.FAILED, None, "2 series: aggregate them"),
        (
            json.dumps({"status": "success", "data": {"resultType": "matrix", "result": []}}),
            Quality.FAILED,
            None,
            "a matrix",
        ),
        (vector(({}, "many")), Quality.FAILED, None, "'many' where a number belongs"),
    ],
)
async def test_a_query_of_the_user_must_yield_one_number(
    read: Reads, answer: Any, content: str, quality: Quality, value: float | None, words: str
) -> None:
    reading = await read(answer(content), signals(QUERY)[0])
    assert (reading.quality, words in reading.message) == (quality, True)
    if value is not None:
        assert (reading.value, reading.target) == (value, 2.0)


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (
            '{"status":"error","errorType":"bad_data","error":"parse error: unexpected )"}',
            "400 Bad Request",
            "unexpected )",
        ),
        ("", "401 Unauthorized", "check the token file"),
        ("forbidden", "403 Forbidden", "check the token file"),
        ("404 page not found", "404 Not Found", "below which /api/v1/query is"),
        ("upstream gone", "503 Service Unavailable", "answered 503"),
        ("<html>login</html>", "200 OK", "no answer of Prometheus"),
        ('{"status":"error","error":"too many samples"}', "200 OK", "Prometheus says: too many samples"),
        ('{"status":"success"}', "200 OK", "no data"),
        (
            '{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":"x"}]}}',
            "200 OK",
            "no answer",
        ),
        ("[" * 100_000, "200 OK", "no answer of Prometheus"),
    ],
)
async def test_every_wrong_answer_says_what_to_do(
    read: Reads, answer: Any, content: str, status: str, words: str
) -> None:
    reading = await read(answer(content, status))
    assert reading.quality is Quality.FAILED
    assert words in reading.message


async def test_an_answer_is_bounded_in_size_and_time(read: Reads, answer: Any) -> None:
    large = await read(answer(vector(({"x": "y" * 5000}, "1"))), max_answer_bytes=4096)
    assert "answered more than 4096 bytes" in large.message
    slow = await read(None, timeout_s=0.05)
    assert (slow.quality, "did not answer within 0.05 s" in slow.message) == (Quality.FAILED, True)


async def test_the_token_is_read_anew_for_every_round(serve: Any, answer: Any, tmp_path: Path) -> None:
    server = await serve(lambda request: answer(parts(value="1", target="1", sources="2", age="1")))
    token = tmp_path / "token"
    reader = PrometheusReader(PrometheusSettings(server.url, token_file=token))
    question = PoolQuestion(signals({"concurrency": {}}), ROUTERS)
    for text in ("first\n", "second"):
        token.write_text(text)
        await reader.read([question])
    await reader.aclose()
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer first", "Bearer second"]


@pytest.mark.parametrize("content", [None, b"", b"two tokens", b"evil\r\nheader: x", b"\xff\xfe", b"x" * 70_000])
async def test_a_bad_token_file_fails_every_reading_and_asks_nothing(
    serve: Any, answer: Any, tmp_path: Path, content: bytes | None
) -> None:
    server = await serve(lambda request: answer(parts()))
    token = tmp_path / "token"
    if content is not None:
        token.write_bytes(content)
    reader = PrometheusReader(PrometheusSettings(server.url, token_file=token))
    (readings,) = await reader.read([PoolQuestion(signals(), ROUTERS)])
    await reader.aclose()
    assert server.requests == []
    assert {reading.quality for reading in readings} == {Quality.FAILED}
    assert all(str(token) in reading.message for reading in readings)


async def test_history_is_a_range_query(serve: Any, answer: Any) -> None:
    points = [[1000, "1"], [1300, "NaN"], [1600, "2.5"]]
    result = [{"metric": {}, "values": points}]
    content = json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}})
    server = await serve(lambda request: answer(content))
    reader = PrometheusReader(PrometheusSettings(server.url))
    history = await reader.history("sum(x)", 1000.0, 1600.0, 300.0)
    assert history == [(1000.0, 1.0), (1600.0, 2.5)]
    form = {name: values[0] for name, values in parse_qs(server.requests[0].body).items()}
    assert form == {"query": "sum(x)", "start": "1000.000", "end": "1600.000", "step": "300"}
    with pytest.raises(FetchError, match="more than 11000 points"):
        await reader.history("sum(x)", 0.0, 1e6, 1.0)
    await reader.aclose()


async def test_history_of_several_series_is_refused(serve: Any, answer: Any) -> None:
    result = [{"metric": {"a": name}, "values": []} for name in "xy"]
    content = json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}})
    server = await serve(lambda request: answer(content))
    reader = PrometheusReader(PrometheusSettings(server.url))
    with pytest.raises(FetchError, match="2 series: aggregate them"):
        await reader.history("x", 0.0, 10.0, 1.0)
    await reader.aclose()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("prometheus:9090", "write it as https://host:port"),
        ("ftp://prometheus", "write it as https://host:port"),
        ("https://", "write it as https://host:port"),
        ("https://prometheus?x=1", "write it as https://host:port"),
        ("https://user:pass@prometheus", "must not hold a user or password"),
    ],
)
def test_a_wrong_url_is_refused_at_the_start(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PrometheusSettings(url)


def test_a_missing_ca_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prometheus CA file"):
        PrometheusReader(PrometheusSettings("https://prometheus", ca_file=tmp_path / "ca.pem"))
