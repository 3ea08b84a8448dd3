"""Request traces: rows of (arrival, prompt length, output length, prefix blocks), read from the formats that are published.

Every reader yields `TraceRow`s in order of arrival and raises `TraceError` naming file, line, field and remedy.
Prompts themselves are never in a trace. A row names its prefix by ids: an equal id means an equal prompt up to and
including that block. `prompt_text` turns ids into text, so that equal ids become equal bytes.

Formats: Mooncake (FAST'25 release: JSON lines, `hash_ids` of 512 tokens), LMCache agent traces (JSON lines by session),
Azure LLM inference (CSV without prefixes). Rates without requests (ServeGen) are rates.py.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

BYTES_PER_TOKEN = 4
"""Text is written with this many bytes a token, about what real tokenizers make of English."""
MOONCAKE_BLOCK_TOKENS = 512
LMCACHE_BLOCK_TOKENS = 16
MAX_LINE_BYTES = 4 * 1024 * 1024


class TraceError(ValueError):
    """A trace that cannot be read; the message names file, line, field and remedy."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    arrival_s: float
    """Seconds from the start of the trace."""
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    """Prefix identity, one id per block of `block_tokens`; empty: shares nothing with any other row."""
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    session: str = ""


def prompt_text(row: TraceRow, *, salt: str = "") -> str:
    """A prompt of `row.prompt_tokens` x 4 ASCII bytes; rows with equal leading ids begin with equal text.

    `salt` names what makes a row without ids, and the part of a prompt its ids do not cover, distinct.
    """
    length = row.prompt_tokens * BYTES_PER_TOKEN
    block_bytes = row.block_tokens * BYTES_PER_TOKEN
    parts = [_block_text(str(block_id), block_bytes) for block_id in row.block_ids]
    covered = len(parts) * block_bytes
    if covered < length:
        parts.append(_block_text(f"tail:{salt}:{row.arrival_s}", length - covered))
    return "".join(parts)[:length]


def _block_text(key: str, length_bytes: int) -> str:
    seed = hashlib.sha256(key.encode()).hexdigest()
    return (seed * (length_bytes // len(seed) + 1))[:length_bytes]


def read_trace(path: Path | str, *, limit: int | None = None) -> list[TraceRow]:
    """Rows of the trace file `path` (plain or .gz), its format told by its first line.

    Raises TraceError where the file is absent, its format unknown, or a row is bad.
    """
    path = Path(path)
    try:
        with open_text(path) as lines:
            first = lines.readline(MAX_LINE_BYTES)
            lines.seek(0)
            rows = _reader(path, first)(path, lines)
            result: list[TraceRow] = []
            for row in rows:
                if limit is not None and len(result) >= limit:
                    break
                result.append(row)
    except OSError as error:
        raise TraceError(
            f"{path}: cannot be read ({error.strerror or error}): give the path of a trace file"
        ) from error
    except (EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: damaged or not text ({error}): fetch the file again") from error
    if not result:
        raise TraceError(f"{path}: holds no requests: give a trace with at least one row")
    return sorted(result, key=lambda row: row.arrival_s)


def at_rate(rows: Sequence[TraceRow], factor: float) -> list[TraceRow]:
    """The same requests, arriving `factor` times as fast, from 0."""
    start_s = rows[0].arrival_s if rows else 0.0
    return [replace(row, arrival_s=(row.arrival_s - start_s) / factor) for row in rows]


def open_text(path: Path) -> io.TextIOWrapper:
    """The file as text, plain or .gz. Raises OSError."""
    raw = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 - the wrapper closes it
    return io.TextIOWrapper(raw, encoding="utf-8", newline="")


def _reader(path: Path, first: str) -> Any:
    if first.startswith("TIMESTAMP,ContextTokens"):
        return _read_azure
    if first.startswith("{"):
        keys = _json_row(path, 1, first).keys()
        if "session_time_ms" in keys:
            return _read_lmcache
        if "timestamp" in keys:
            return _read_mooncake
    raise TraceError(
        f"{path}: line 1: unknown format: expected Mooncake JSON lines (timestamp, input_length, output_length, hash_ids), "
        "LMCache agent JSON lines (session_id, session_time_ms, …), Azure CSV (TIMESTAMP,ContextTokens,GeneratedTokens) "
        "or ServeGen client rates (CSV without header, or .tar.gz of them)"
    )


def _read_mooncake(path: Path, lines: io.TextIOWrapper) -> Iterator[TraceRow]:
    for number, line in _lines(path, lines):
        row = _json_row(path, number, line)
        yield TraceRow(
            arrival_s=_integer(path, number, row, "timestamp") / 1000,
            prompt_tokens=max(1, _integer(path, number, row, "input_length")),
            output_tokens=max(1, _integer(path, number, row, "output_length")),
            block_ids=_ids(path, number, row),
        )


SESSION_STAGGER_S = 10.0
"""LMCache sessions all start at 0; they are started one after the other, this far apart."""


def _read_lmcache(path: Path, lines: io.TextIOWrapper) -> Iterator[TraceRow]:
    starts: dict[str, float] = {}
    for number, line in _lines(path, lines):
        row = _json_row(path, number, line)
        session = str(row.get("session_id", ""))
        start_s = starts.setdefault(session, len(starts) * SESSION_STAGGER_S)
        yield TraceRow(
            arrival_s=start_s + _integer(path, number, row, "session_time_ms") / 1000,
            prompt_tokens=max(1, _integer(path, number, row, "input_length")),
            output_tokens=max(1, _integer(path, number, row, "output_length")),
            block_ids=_ids(path, number, row),
            block_tokens=LMCACHE_BLOCK_TOKENS,
            session=session,
        )


def _read_azure(path: Path, lines: io.TextIOWrapper) -> Iterator[TraceRow]:
    start: datetime | None = None
    for number, record in enumerate(csv.DictReader(lines), 2):
        try:
            # Seven fractional digits (2023), or six and a zone (2024); datetime takes six.
            arrival = datetime.fromisoformat(record["TIMESTAMP"][:26]).replace(tzinfo=None)
        except (KeyError, ValueError, TypeError) as error:
            raise TraceError(
                f"{path}: line {number}: TIMESTAMP: not a time ({error}): use 2023-11-16 18:15:46.6805900"
            ) from error
        start = start or arrival
        yield TraceRow(
            arrival_s=(arrival - start).total_seconds(),
            prompt_tokens=max(1, _integer(path, number, record, "ContextTokens")),
            output_tokens=max(1, _integer(path, number, record, "GeneratedTokens")),
        )


def _lines(path: Path, lines: io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    number = 0
    while line := lines.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) >= MAX_LINE_BYTES:
            raise TraceError(
                f"{path}: line {number}: longer than {MAX_LINE_BYTES} bytes: split the file into one row a line"
            )
        if line.strip():
            yield number, line


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: line {number}: not JSON ({error}): each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise TraceError(f"{path}: line {number}: not a JSON object: each line must be one")
    return row


def _integer(path: Path, number: int, row: dict[str, Any], field: str) -> int:
    try:
        value = int(row[field])
    except KeyError:
        raise TraceError(f"{path}: line {number}: {field}: missing: add it") from None
    except (TypeError, ValueError, OverflowError):
        raise TraceError(f"{path}: line {number}: {field}: {row[field]!r} is not a whole number") from None
    if not 0 <= value <= 2**53:
        raise TraceError(f"{path}: line {number}: {field}: {value} is out of range: use 0 or more")
    return value


def _ids(path: Path, number: int, row: dict[str, Any]) -> tuple[int, ...]:
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(isinstance(value, int) for value in ids):
        raise TraceError(f"{path}: line {number}: hash_ids: must be a list of integers")
    return tuple(ids)
