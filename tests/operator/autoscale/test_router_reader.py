"""Reading signals from the routers' own /metrics, without Prometheus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_api.modelpool import AutoscalingSpec
from kvfleet_operator.autoscale.readers.fetch import FetchError
from kvfleet_operator.autoscale.readers.routers import MAX_SERIES, RouterReader, parse
from kvfleet_operator.autoscale.readers.source import PoolQuestion
from kvfleet_operator.autoscale.readings import Quality
from kvfleet_operator.autoscale.signals import PoolScope, QueueShare, Signal, activity_signals, signals_of

SCOPE = PoolScope("prod", "a", ("llama",), (QueueShare("chat", 1.0),), 1.0)
PAGE = """\
# HELP kvfleet_router_in_flight Requests sent to a worker and not answered.
# TYPE kvfleet_router_in_flight gauge
kvfleet_router_in_flight{pool="a"} 30
kvfleet_router_in_flight{pool="b"} 500
kvfleet_router_packed_sequences{pool="a"} 40
kvfleet_router_packed_sequences{pool="b"} 700
kvfleet_router_queue_depth{policy="chat"} 4
kvfleet_router_predicted_ttft_seconds{pool="a"} 0.25
kvfleet_router_pack_target_sequences{pool="a"} 48
# TYPE kvfleet_router_requests_total counter
kvfleet_router_requests_total{model="llama",pool="a",policy="chat",outcome="ok"} 100
kvfleet_router_requests_total{model="llama",pool="a",policy="chat",outcome="error"} 2
kvfleet_router_itl_seconds_bucket{le="0.1",pool="a"} 1e9
"""
WORKER = """\
vllm:kv_cache_usage_perc{engine="0",model_name="llama"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="llama"} 0.7
"""


def signals(*specs: dict[str, Any]) -> list[Signal]:
    return signals_of(AutoscalingSpec.model_validate({"maxReplicas": 4, "signals": list(specs)}), SCOPE)


@pytest.fixture
async def reader() -> AsyncIterator[RouterReader]:
    reader = RouterReader(timeout_s=5.0)
    yield reader
    await reader.aclose()


async def test_routers_are_summed(reader: RouterReader, serve: Any, answer: Callable[..., bytes]) -> None:
    routers = [await serve(lambda request: answer(PAGE)) for _ in range(2)]
    question = PoolQuestion([*signals(), *activity_signals(SCOPE)], [router.url for router in routers])
    ((concurrency, ttft, busy, served),) = await reader.read([question])
    assert (concurrency.quality, concurrency.value, concurrency.target) == (Quality.FRESH, 2 * 44.0, 0.8 * 48.0)
    assert (ttft.quality, ttft.value, ttft.target) == (Quality.FRESH, pytest.approx(0.25), pytest.approx(0.7))
    assert (busy.quality, busy.value) == (Quality.FRESH, 68.0)
    assert (served.quality, served.value) == (Quality.FRESH, 204.0)


async def test_before_the_first_prediction_there_is_none_to_hold_the_pool(
    reader: RouterReader, serve: Any, answer: Callable[..., bytes]
) -> None:
    page = "".join(line for line in PAGE.splitlines(keepends=True) if "predicted_ttft" not in line)
    router = await serve(lambda request: answer(page))
    ((ttft,),) = await reader.read([PoolQuestion(signals({"timeToFirstToken": {}}), [router.url])])
    assert (ttft.quality, ttft.complete, ttft.usable) == (Quality.SILENT, True, None)


async def test_a_process_is_scraped_once_for_all_pools(
    reader: RouterReader, serve: Any, answer: Callable[..., bytes]
) -> None:
    router = await serve(lambda request: answer(PAGE))
    questions = [PoolQuestion(signals(), [router.url]) for _ in range(3)]
    readings = await reader.read(questions)
    assert [(request.method, request.path) for request in router.requests] == [("GET", "/metrics")]
    assert readings[0] == readings[1] == readings[2]


async def test_a_router_that_does_not_answer_makes_the_sum_partial(
    reader: RouterReader, serve: Any, answer: Callable[..., bytes]
) -> None:
    up = await serve(lambda request: answer(PAGE))
    down = await serve(lambda request: answer("busy", "503 Service Unavailable"))
    ((concurrency,),) = await reader.read([PoolQuestion(signals({"concurrency": {}}), [up.url, down.url])])
    assert (concurrency.quality, concurrency.value) == (Quality.PARTIAL, 44.0)
    assert concurrency.message == "only 1 of 2 routers report it"


async def test_a_router_that_does_not_know_the_pool_yet_makes_the_sum_partial(
    reader: RouterReader, serve: Any, answer: Callable[..., bytes]
) -> None:
    knows = await serve(lambda request: answer(PAGE))
    new = await serve(lambda request: answer('kvfleet_router_queue_depth{policy="chat"} 7\n'))
    ((concurrency,),) = await reader.read([PoolQuestion(signals({"concurrency": {}}), [knows.url, new.url])])
    assert concurrency.quality is Quality.PARTIAL


async def test_without_any_answer_the_reading_says_why(reader: RouterReader, serve: Any) -> None:
    server = await serve(lambda request: None)
    quick = RouterReader(timeout_s=0.05)
    ((concurrency,),) = await quick.read([PoolQuestion(signals({"concurrency": {}}), [server.url])])
    await quick.aclose()
    assert concurrency.quality is Quality.FAILED
    assert concurrency.message == f"no router could be scraped: {server.url}/metrics did not answer within 0.05 s"


async def test_no_ready_router_is_no_data(reader: RouterReader) -> None:
    ((concurrency,),) = await reader.read([PoolQuestion(signals({"concurrency": {}}), [])])
    assert (concurrency.quality, concurrency.fresh) == (Quality.ABSENT, False)


async def test_kv_usage_comes_from_the_workers(reader: RouterReader, serve: Any, answer: Callable[..., bytes]) -> None:
    worker = await serve(lambda request: answer(WORKER))
    ((usage,),) = await reader.read([PoolQuestion(signals({"kvUsage": {}}), [], [worker.url])])
    assert (usage.quality, usage.value, usage.target) == (Quality.FRESH, pytest.approx(0.6), 0.8)


async def test_a_query_needs_a_prometheus(reader: RouterReader) -> None:
    ((query,),) = await reader.read([PoolQuestion(signals({"prometheus": {"query": "x", "targetMilli": 1}}), [])])
    assert query.quality is Quality.FAILED
    assert "give the operator its URL" in query.message


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n" + b"#" * (9 * 2**20),
            "answered more than 8388608 bytes",
        ),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\nxxx", "compressed although it was asked not to"),
        (
            b"HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n",
            "redirects to 'http://elsewhere/'",
        ),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "illegal"),
        (b"HTTP/1.1 200 OK\r\n\r\nkvfleet_router_packed_sequences{pool= 3\n", "not in Prometheus's text format"),
        (b'HTTP/1.1 200 OK\r\n\r\nkvfleet_router_packed_sequences{pool="\xff"} 3\n', "not in Prometheus's text format"),
    ],
)
async def test_what_a_process_may_answer_is_bounded_and_checked(
    reader: RouterReader, serve: Any, raw: bytes, words: str
) -> None:
    server = await serve(lambda request: raw)
    ((concurrency,),) = await reader.read([PoolQuestion(signals({"concurrency": {}}), [server.url])])
    assert concurrency.quality is Quality.FAILED
    assert words in concurrency.message


async def test_nothing_listening_is_a_failed_reading(reader: RouterReader) -> None:
    ((concurrency,),) = await reader.read([PoolQuestion(signals({"concurrency": {}}), ["http://127.0.0.1:1"])])
    assert concurrency.quality is Quality.FAILED
    assert "127.0.0.1:1" in concurrency.message


def test_only_wanted_lines_are_parsed() -> None:
    samples = parse(b'not a metric line at all {{{\nup{job="x"} 1\nwanted{a="b"} 2.5e1 1700000000000\n', {"wanted"})
    assert samples == {"wanted": [({"a": "b"}, 25.0)]}


def test_more_series_than_a_router_has_are_refused() -> None:
    page = "".join(f'm{{i="{i}"}} 1\n' for i in range(MAX_SERIES + 1)).encode()
    with pytest.raises(FetchError, match="more than 20000"):
        parse(page, {"m"})


@given(st.binary(max_size=60), st.text('{}",= \\\n1aN', max_size=30))
def test_any_page_is_either_parsed_or_refused(rest: bytes, line: str) -> None:
    try:
        parse(b"m" + line.encode() + rest, {"m"})
    except FetchError as error:
        assert "text format" in str(error)
