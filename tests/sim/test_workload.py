"""Loads come at the wanted rate, keep what the trace says about prefixes and sessions, and differ by seed only."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_sim.traces import TraceError, TraceRow
from kvfleet_sim.workload import Load, LoadRequest, SessionLoad, SharedPrefixLoad, TraceLoad, open_load

TRACES = Path(__file__).parents[2] / "examples" / "traces"


def quantised(ticks: int, per_tick: int, tick_s: float = 3.0) -> list[TraceRow]:
    return [TraceRow(tick * tick_s, 600, 10 + tick, (tick,), 512) for tick in range(ticks) for _ in range(per_tick)]


def sessions() -> list[TraceRow]:
    """Two sessions of three turns; block 0 (a system prompt) is in both, the rest is private."""
    return [
        TraceRow(
            5.0 * turn, 32 * (turn + 1), 100, (0, *range(10 * number, 10 * number + 2 * turn + 1)), 16, f"s{number}"
        )
        for number in (1, 2)
        for turn in range(3)
    ]


def starts(requests: list[LoadRequest]) -> list[float]:
    return [request.start_s for request in requests if request.start_s is not None]


def test_arrivals_spread_inside_the_ticks_of_a_coarse_clock() -> None:
    requests = TraceLoad(quantised(20, 5)).requests(100 / 60, seed=1)  # the trace's own rate: 5 every 3 s
    times = starts(requests)
    assert times == sorted(times)
    assert len(set(times)) == len(times)
    for request, time_s in zip(requests, times, strict=True):
        tick = request.output_tokens - 10
        assert 3.0 * tick <= time_s < 3.0 * (tick + 1)


def test_a_pause_of_the_trace_stays_a_pause() -> None:
    rows = [*quantised(10, 2), TraceRow(1000.0, 600, 99, (), 512)]
    load = TraceLoad(rows)
    times = starts(load.requests(len(rows) / 1003.0, seed=0))
    assert times[-2] < 30.0 < 999.0 < times[-1]


@given(rate=st.floats(0.1, 1000.0), seed=st.integers(0, 2**32))
def test_a_trace_takes_its_length_over_the_rate(rate: float, seed: int) -> None:
    times = starts(TraceLoad(quantised(20, 5)).requests(rate, seed))
    assert 0.8 * 100 / rate < times[-1] <= 100 / rate * (1 + 1e-9)


@pytest.mark.parametrize(
    "load",
    [TraceLoad(quantised(20, 5)), SessionLoad(sessions(), 300), SharedPrefixLoad(300)],
    ids=["trace", "sessions", "shared-prefix"],
)
def test_equal_seeds_give_equal_loads_and_others_do_not(load: Load) -> None:
    assert load.requests(5.0, 1) == load.requests(5.0, 1)
    assert starts(load.requests(5.0, 1)) != starts(load.requests(5.0, 2))


@pytest.mark.parametrize("load", [SessionLoad(sessions(), 3000), SharedPrefixLoad(3000)], ids=["sessions", "prefix"])
@pytest.mark.parametrize("rate", [2.0, 50.0])
def test_generated_loads_come_at_the_rate(load: Load, rate: float) -> None:
    requests = load.requests(rate, 7)
    assert len(requests) == pytest.approx(3000, rel=0.1)
    assert max(starts(requests)) == pytest.approx(3000 / rate, rel=0.1)


def test_turns_of_a_session_follow_each_other() -> None:
    requests = SessionLoad(sessions(), 300).requests(5.0, 3)
    followers = {request.next_turn for request in requests if request.next_turn is not None}
    assert followers == {number for number, request in enumerate(requests) if request.start_s is None}
    for number, request in enumerate(requests):
        if request.next_turn is not None:
            following = requests[request.next_turn]
            assert request.next_turn == number + 1
            assert following.prompt_tokens > request.prompt_tokens
            # Recorded 5 s apart; an answer of 100 tokens took 1 s of them.
            assert following.think_s == pytest.approx(4.0)


def test_impatient_clients_send_every_turn_when_it_is_due() -> None:
    load = SessionLoad(sessions(), 300)
    patient, impatient = load.requests(5.0, 3), load.requests(5.0, 3, patient=False)
    assert [request.block_keys for request in impatient] == [request.block_keys for request in patient]
    assert all(request.start_s is not None and request.next_turn is None for request in impatient)
    assert {request.start_s for request in patient} - {None} <= {request.start_s for request in impatient}


def test_a_repeated_session_shares_only_what_sessions_share() -> None:
    requests = SessionLoad(sessions(), 60).requests(5.0, 3)
    chains: list[list[LoadRequest]] = []
    for request in requests:
        if request.start_s is not None:
            chains.append([])
        chains[-1].append(request)
    owners: dict[int, set[int]] = {}
    for number, chain in enumerate(chains):
        for request in chain:
            for key in request.block_keys:
                owners.setdefault(key, set()).add(number)
        for earlier, later in pairwise(chain):
            assert list(later.block_keys[: len(earlier.block_keys)]) == list(earlier.block_keys)
    assert owners.pop(0) == set(range(len(chains)))
    assert all(len(chains_with) == 1 for chains_with in owners.values())


def test_a_session_in_progress_when_the_window_opens_goes_on() -> None:
    requests = SessionLoad(sessions(), 300).requests(50.0, 0)  # the window is 6 s, a session 10 s
    firsts = [request.prompt_tokens for request in requests if request.start_s is not None]
    assert {32, 64, 96} == set(firsts)
    assert all(0 <= time_s < 6 for time_s in starts(requests))


def test_shared_prefixes_are_shared_and_the_rest_is_not() -> None:
    requests = SharedPrefixLoad(2000, prefixes=10, prefix_tokens=640).requests(10.0, 0)
    prefixes = {tuple(request.block_keys[:10]) for request in requests}
    assert len(prefixes) == 10
    private = [key for request in requests for key in request.block_keys[10:]]
    assert len(private) == len(set(private))
    assert not {key for prefix in prefixes for key in prefix} & set(private)
    assert all(len(request.block_keys) == request.prompt_tokens // 64 for request in requests)


def test_an_unfinished_block_has_no_key(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]}
    path.write_text(json.dumps(row) + "\n")
    (request,) = open_load(str(path)).requests(1.0, 0)
    assert list(request.block_keys) == [1, 2]


def test_the_limit_takes_the_first_requests_of_a_trace() -> None:
    path = str(next(TRACES.glob("mooncake_synthetic_*.jsonl")))
    first = [request.prompt_tokens for request in open_load(path, 30).requests(1.0, 0)]
    assert first == [request.prompt_tokens for request in open_load(path).requests(1.0, 0)][:30]


def test_no_such_trace_says_what_there_is() -> None:
    with pytest.raises(TraceError, match=r"prefixes: no such file: give the path of a trace, or one of shared-prefix"):
        open_load("prefixes")
