"""Traces are read as published; what is wrong with one is said with file, line and field."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet_sim.traces import TraceError, TraceRow, prompt_text, read_trace

SLICE = Path(__file__).parents[2] / "examples" / "traces" / "mooncake_synthetic_300.jsonl"


def write(tmp_path: Path, *lines: str, name: str = "trace.jsonl") -> Path:
    path = tmp_path / name
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def mooncake(**fields: object) -> str:
    return json.dumps({"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2], **fields})


def test_the_shipped_slice_is_complete_and_in_order() -> None:
    rows = read_trace(SLICE)
    assert len(rows) == 300
    assert [row.arrival_s for row in rows] == sorted(row.arrival_s for row in rows)
    assert all(len(row.block_ids) * row.block_tokens >= row.prompt_tokens for row in rows)


def test_gzip_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path, *[mooncake(timestamp=i) for i in range(5)], name="t.jsonl.gz")
    assert [row.arrival_s for row in read_trace(path, limit=2)] == [0.0, 0.001]


def test_lmcache_sessions_start_one_after_the_other(tmp_path: Path) -> None:
    line = {"session_id": "a", "session_time_ms": 0, "input_length": 20, "output_length": 3, "hash_ids": [0]}
    path = write(
        tmp_path,
        *[json.dumps(line | {"session_id": s, "session_time_ms": t}) for s, t in [("a", 0), ("b", 0), ("a", 500)]],
    )
    assert [(row.session, row.arrival_s) for row in read_trace(path)] == [("a", 0.0), ("a", 0.5), ("b", 10.0)]


def test_azure_csv(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
        name="azure.csv",
    )
    rows = read_trace(path)
    assert rows[1].arrival_s == pytest.approx(4.314579)
    assert (rows[1].prompt_tokens, rows[1].output_tokens) == (396, 109)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (mooncake(input_length="many"), ["line 2", "input_length", "not a whole number"]),
        (mooncake(output_length=-1), ["line 2", "output_length", "out of range"]),
        (mooncake(hash_ids="abc"), ["line 2", "hash_ids", "list of integers"]),
        ('{"timestamp": 1}', ["line 2", "input_length", "missing"]),
        ("{broken", ["line 2", "not JSON"]),
        ("[1]", ["line 2", "not a JSON object"]),
        ("[" * 100_000, ["line 2", "not JSON"]),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, words: list[str]) -> None:
    path = write(tmp_path, mooncake(), line)
    with pytest.raises(TraceError) as error:
        read_trace(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("content", ["", "a,b,c\n1,2,3", '{"x": 1}'])
def test_an_unknown_format_says_what_is_expected(tmp_path: Path, content: str) -> None:
    with pytest.raises(TraceError, match="expected Mooncake"):
        read_trace(write(tmp_path, content))


def test_an_absent_file_is_an_error_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")


@given(
    ids=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    other=st.lists(st.integers(0, 5), min_size=1, max_size=6),
)
def test_equal_ids_are_equal_bytes_and_different_ids_are_not(ids: list[int], other: list[int]) -> None:
    rows = [TraceRow(0.0, len(x) * 16, 1, tuple(x), block_tokens=16) for x in (ids, other)]
    a, b = (prompt_text(row) for row in rows)
    shared = 0
    for x, y in zip(ids, other, strict=False):
        if x != y:
            break
        shared += 1
    assert a[: shared * 64] == b[: shared * 64]
    if shared < min(len(ids), len(other)):
        assert a[shared * 64 : (shared + 1) * 64] != b[shared * 64 : (shared + 1) * 64]
    assert len(a) == len(ids) * 64
