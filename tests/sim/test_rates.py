"""ServeGen's client rates: read as published, drawn as said, and what is wrong with a file named by line and field."""

from __future__ import annotations

import io
import random
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_sim.rates import Client, arrivals, is_rates, read_rates
from kvfleet_sim.traces import TraceError
from kvfleet_sim.workload import RateLoad, open_load

ROWS = "0,19.05,5.3,Weibull,0.4052,0.02819\n600,10,1.0,Gamma,0.97,0.0735\n1200,0,0,,0,0\n1800,4,2.0,,0,0\n"


def write(tmp_path: Path, text: str, name: str = "chunk-0-trace.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def archive(tmp_path: Path, files: dict[str, str]) -> Path:
    path = tmp_path / "clients.tar.gz"
    with tarfile.open(path, "w:gz") as out:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"data/{name}")
            entry.size = len(text.encode())
            out.addfile(entry, io.BytesIO(text.encode()))
    return path


def steady(rate_rps: float, family: str = "", shape: float = 1.0, windows: int = 3) -> Client:
    return Client([600.0 * n for n in range(windows)], [rate_rps] * windows, [(family, shape)] * windows)


def test_a_client_is_read_as_published(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    assert is_rates(path)
    (client,) = read_rates(path)
    assert client.starts_s == [0, 600, 1200, 1800]
    assert client.rates_rps == [19.05, 10, 0, 4]
    assert client.shapes == [("Weibull", 0.4052), ("Gamma", 0.97), ("", 1.0), ("Gamma", 0.25)]
    assert client.end_s == 2400
    assert client.expected(900) == pytest.approx(600 * 19.05 + 300 * 10)


def test_an_archive_holds_a_file_a_client(tmp_path: Path) -> None:
    path = archive(tmp_path, {"chunk-0-trace.csv": ROWS, "chunk-1-trace.csv": "600,1,1,,0,0\n", "README": "x"})
    assert [len(client.starts_s) for client in read_rates(path)] == [4, 1]
    assert isinstance(open_load(str(path), 50), RateLoad)


def test_sums_over_clients_are_a_client_a_category(tmp_path: Path) -> None:
    header = "category,t_s,total_rate_rps,active_clients,max_client_rate_rps\n"
    path = write(tmp_path, header + "a,0,5,1,5\na,600,6,1,6\nb,0,7,1,7\n", "sums.csv")
    assert [client.rates_rps for client in read_rates(path)] == [[5, 6], [7]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,1,1,,0\n", "line 1: 5 columns: each row has six"),
        ("0,1,1,,0,0\n600,fast,1,,0,0\n", "line 2: rate: 'fast' is not a number"),
        ("0,1,1,,0,0\n600,-1,1,,0,0\n", "line 2: rate: -1 is out of range"),
        ("0,1,1,,0,0\n600,nan,1,,0,0\n", "line 2: rate: nan is out of range"),
        ("600,1,1,,0,0\n600,1,1,,0,0\n", "line 2: window start: 600 is not after 600"),
        ("0,1,1,,0,0\n600,1,1,Pareto,1,1\n", "line 2: distribution: 'Pareto' is not known"),
        ("0,0,0,,0,0\n", "no client sends anything"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        read_rates(write(tmp_path, text))


def test_a_damaged_or_empty_archive_is_an_error_not_a_crash(tmp_path: Path) -> None:
    damaged = tmp_path / "x.tar.gz"
    damaged.write_bytes(archive(tmp_path, {"a-trace.csv": ROWS * 50}).read_bytes()[:80])
    for path, words in ((damaged, "damaged"), (archive(tmp_path, {"README": "x"}), "holds no client")):
        with pytest.raises(TraceError, match=words):
            open_load(str(path))


@settings(deadline=None, max_examples=20)
@given(rate=st.floats(0.5, 50.0), seed=st.integers(0, 2**32), family=st.sampled_from(["", "Gamma", "Weibull"]))
def test_arrivals_come_at_the_wanted_rate_and_in_order(rate: float, seed: int, family: str) -> None:
    clients = [steady(3.0, family, 1.5), steady(9.0, family, 1.5)]
    found = arrivals(clients, rate, 800, random.Random(seed))
    assert [at for at, _ in found] == sorted(at for at, _ in found)
    expected = min(800, rate * 1800)
    assert abs(len(found) - expected) < 6 * expected**0.5
    assert Counter(number for _, number in found)[1] > len(found) / 2


def test_a_client_bursts_as_fitted() -> None:
    for family, shape, cv in (("Gamma", 0.25, 2.0), ("Weibull", 0.5, 5**0.5), ("", 1.0, 1.0)):
        times = [at for at, _ in arrivals([steady(5.0, family, shape, 200)], 5.0, 20_000, random.Random(1))]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.15)


def test_rates_change_from_window_to_window() -> None:
    client = Client([0.0, 100.0, 200.0, 300.0], [10.0, 0.0, 30.0, 10.0], [("", 1.0)] * 4)
    times = [at for at, _ in arrivals([client], 10.0, 10_000, random.Random(2))]
    counts = Counter(int(at // 100) for at in times)
    assert counts[1] == 0
    assert counts[2] > 2 * counts[0]


def test_silence_where_the_requests_would_come_from_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, "0,0,0,,0,0\n600,1,1,,0,0\n")
    with pytest.raises(TraceError, match="no client sends anything in the first 10 s"):
        open_load(str(path), 100).requests(10.0, 0)


def test_each_client_has_a_system_prompt_of_its_own(tmp_path: Path) -> None:
    path = archive(tmp_path, {"chunk-0-trace.csv": ROWS, "chunk-1-trace.csv": ROWS})
    requests = open_load(str(path), 300).requests(10.0, 0)
    firsts = Counter(tuple(request.block_keys[:16]) for request in requests)
    assert len(firsts) == 2
    assert len({key for request in requests for key in request.block_keys[16:]}) == sum(
        len(request.block_keys) - 16 for request in requests
    )
    assert requests == open_load(str(path), 300).requests(10.0, 0)
