"""`resilience.hedgeAfterMilliseconds`, first-byte timeouts, the retry budget and the ejection of outliers, at the sockets."""

import asyncio
import itertools

import pytest
from scripted import (
    STREAM_END,
    STREAM_HEAD,
    Behaviour,
    Bench,
    ScriptedWorker,
    Seen,
    answer_ok,
    chat_body,
    completion,
    event,
    eventually,
    json_answer,
    post,
)

from kvfleet_router.app import RouterApp

SOON_MS = 30


async def never(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    raise ConnectionResetError


async def streams(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + event("a") + STREAM_END)


async def dies(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def leaves(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(json_answer({}, b"503 Service Unavailable"))


def after(go: asyncio.Event, behave: Behaviour) -> Behaviour:
    async def waits(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        await behave(seen, reader, writer)

    return waits


def assert_settled(router: RouterApp) -> None:
    assert all(worker.own.in_flight == 0 for worker in router.dispatcher.workers())
    assert router.server.body_bytes == 0


def name(worker: ScriptedWorker) -> str:
    return worker.url.removeprefix("http://")


async def pair(
    bench: Bench, first: Behaviour, second: Behaviour, **changes: object
) -> tuple[RouterApp, list[ScriptedWorker]]:
    """A router before two workers, of which the first tried is the first."""
    workers = [await bench.worker(), await bench.worker()]
    router = await bench.router(*workers, **changes)
    one, other = router.dispatcher.workers()
    while one.sent_requests >= other.sent_requests:  # round robin: the next one is the first
        await bench.ask(router, post(chat_body()))
    for worker in workers:
        worker.requests.clear()
    workers[0].behave, workers[1].behave = first, second
    return router, workers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_late_first_byte_is_outrun_by_another_worker(bench: Bench, stream: bool) -> None:
    router, (slow, fast) = await pair(bench, never, streams if stream else answer_ok, hedge_after_milliseconds=SOON_MS)
    answer = await bench.ask(router, post(chat_body(stream=stream)))
    assert answer.header("x-kvfleet-worker") == name(fast)
    assert answer.raw == event("a") + STREAM_END if stream else answer.json() == completion()
    await eventually(lambda: slow.lost == 1)
    assert_settled(router)
    decision = router.dispatcher.decisions.recent(1)[0]
    assert [made["worker"] for made in decision["tries"]] == [name(slow), name(fast)]
    assert decision["tries"][0]["given_up"] == "outrun by the hedge"
    assert decision["outcome"]["result"] == "ok"
    assert sum(v for k, v in (await bench.metrics(router)).items() if 'retries_total{cause="hedged"' in k) == 1


async def test_the_first_try_wins_where_it_is_faster_after_all(bench: Bench) -> None:
    go = asyncio.Event()
    router, (first, hedge) = await pair(bench, after(go, streams), never, hedge_after_milliseconds=SOON_MS)
    asking = asyncio.create_task(bench.ask(router, post(chat_body(stream=True))))
    await eventually(lambda: hedge.requests)
    go.set()
    assert (await asking).header("x-kvfleet-worker") == name(first)
    await eventually(lambda: hedge.lost == 1)
    assert_settled(router)
    decision = router.dispatcher.decisions.recent(1)[0]
    assert [made["worker"] for made in decision["tries"]] == [name(hedge), name(first)]
    assert decision["outcome"]["result"] == "ok"


async def test_who_answers_in_time_is_not_hedged(bench: Bench) -> None:
    router, (first, second) = await pair(bench, streams, never, hedge_after_milliseconds=60_000)
    answer = await bench.ask(router, post(chat_body(stream=True)))
    assert answer.header("x-kvfleet-worker") == name(first)
    assert not second.requests
    assert_settled(router)


@pytest.mark.parametrize("failing", [dies, leaves], ids=["dies", "503"])
async def test_a_hedge_that_fails_leaves_the_first_try_alone(bench: Bench, failing: Behaviour) -> None:
    go = asyncio.Event()
    router, (first, hedge) = await pair(bench, after(go, streams), failing, hedge_after_milliseconds=SOON_MS)
    asking = asyncio.create_task(bench.ask(router, post(chat_body(stream=True))))
    await eventually(lambda: hedge.requests and not router.dispatcher.workers()[1].own.in_flight)
    go.set()
    assert (await asking).header("x-kvfleet-worker") == name(first)
    assert_settled(router)


@pytest.mark.parametrize("failing", [dies, leaves], ids=["dies", "503"])
async def test_where_the_first_try_fails_the_hedge_goes_on_alone(bench: Bench, failing: Behaviour) -> None:
    fail, answer_now = asyncio.Event(), asyncio.Event()
    router, (first, hedge) = await pair(
        bench, after(fail, failing), after(answer_now, streams), hedge_after_milliseconds=SOON_MS, retries=0
    )
    asking = asyncio.create_task(bench.ask(router, post(chat_body(stream=True))))
    await eventually(lambda: hedge.requests)
    fail.set()
    await eventually(lambda: router.dispatcher.workers()[0].own.in_flight == 0)
    answer_now.set()
    answer = await asking
    assert (answer.status, answer.header("x-kvfleet-worker")) == (200, name(hedge))
    assert len(hedge.requests) == 1
    assert len(first.requests) <= 2  # a kept-alive connection that ends is replaced once
    assert_settled(router)


async def test_a_client_that_leaves_cancels_both(bench: Bench) -> None:
    router, workers = await pair(bench, never, never, hedge_after_milliseconds=SOON_MS)
    client = await bench.client(router)
    await client.send(post(chat_body(stream=True)))
    await eventually(lambda: all(worker.requests for worker in workers))
    client.close()
    await eventually(lambda: all(worker.lost for worker in workers))
    assert_settled(router)
    assert router.dispatcher.decisions.recent(1)[0]["outcome"]["result"] == "abandoned"


async def test_both_tries_fail_and_a_third_worker_answers(bench: Bench) -> None:
    fail = asyncio.Event()
    router, workers = await pair(bench, after(fail, dies), after(fail, dies), hedge_after_milliseconds=SOON_MS)
    asking = asyncio.create_task(bench.ask(router, post(chat_body())))
    await eventually(lambda: all(worker.requests for worker in workers))
    for worker in workers:
        worker.behave = answer_ok
    fail.set()
    assert (await asking).status == 200
    assert_settled(router)


async def test_however_the_two_race_the_books_are_even(bench: Bench) -> None:
    """Answers, failures and silence on either side, at about the moment of the hedge."""

    async def after_a_while(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.003 * (len(seen.body) % 5))
        turn = next(turns)
        await (dies if turn == 0 else leaves if turn == 1 else streams)(seen, reader, writer)

    turns = itertools.cycle((2, 3, 2, 0, 3, 2, 1, 2, 3))
    workers = [await bench.worker(after_a_while) for _ in range(3)]
    router = await bench.router(*workers, hedge_after_milliseconds=5, retries=8, eject_at_failure_percent=100)

    async def ask(number: int) -> int:
        client = await bench.client(router)
        statuses = []
        for turn in range(10):
            await client.send(post(chat_body(stream=True, user="x" * (number + turn))))
            statuses.append((await client.answer()).status)
        return sum(status == 200 for status in statuses)

    assert await asyncio.gather(*(ask(number) for number in range(20))) == [10] * 20
    await eventually(lambda: all(worker.own.in_flight == 0 for worker in router.dispatcher.workers()))
    assert_settled(router)
    metrics = await bench.metrics(router)
    assert sum(v for k, v in metrics.items() if "requests_total" in k and '"ok"' in k) == 200
    assert sum(v for k, v in metrics.items() if 'retries_total{cause="hedged"' in k) > 0


# Time, budget and outliers


async def test_a_stream_that_does_not_begin_in_time_is_tried_elsewhere(bench: Bench) -> None:
    router, (slow, fast) = await pair(bench, never, streams, first_byte_timeout_seconds=1)
    answer = await bench.ask(router, post(chat_body(stream=True)))
    assert answer.header("x-kvfleet-worker") == name(fast)
    await eventually(lambda: slow.lost == 1)
    assert router.dispatcher.decisions.recent(1)[0]["tries"][0]["given_up"] == "first_byte_timeout"
    assert_settled(router)


async def test_a_spent_budget_ends_retries(bench: Bench) -> None:
    bad = [await bench.worker(leaves) for _ in range(3)]
    router = await bench.router(*bad, retry_budget_percent=0, retries=1)
    for _ in range(150):
        assert (await bench.ask(router, post(chat_body()))).status == 503
    assert sum(len(worker.requests) for worker in bad) == 150 + 100
    assert router.metrics.errors["retry_budget"] == 50


async def test_an_outlier_is_left_alone_for_a_while(bench: Bench) -> None:
    """Every second of its requests fails: never three in a row."""
    flaky = itertools.cycle((leaves, answer_ok))

    async def now_and_then(seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await next(flaky)(seen, reader, writer)

    outlier, *good = [await bench.worker(now_and_then), await bench.worker(), await bench.worker()]
    router = await bench.router(outlier, *good, eject_at_failure_percent=40)
    for _ in range(90):
        assert (await bench.ask(router, post(chat_body()))).status == 200
    states = {worker.name: worker.state for worker in router.dispatcher.workers()}
    assert states[name(outlier)] == "ejected" or len(outlier.requests) < 25
    assert [states[name(worker)] for worker in good] == ["ready", "ready"]
