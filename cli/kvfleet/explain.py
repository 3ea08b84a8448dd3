"""A decision record in words: where a request went, what each candidate would have cost, what was predicted, what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Group, RenderableType
from rich.text import Text

NEGLIGIBLE_SHARE = 0.005
"""A part that is less than this share of the dearest candidate's cost is left out of the table."""


def dry_run(url: str, body: Path, path: str, headers: Sequence[str]) -> dict[str, Any]:
    """Ask the router at `url` (its admin port) what it would do with this body. Raises ValueError saying what to do."""
    fields = {}
    for line in headers:
        name, separator, value = line.partition(":")
        if not separator or not name.strip():
            raise ValueError(f"--header {line!r}: write it as `name: value`")
        fields[name.strip()] = value.strip()
    try:
        content = body.read_bytes()
    except OSError as error:
        raise ValueError(f"--body {body}: {error.strerror}: give a file with the JSON body of a request") from error
    headers_sent = {"content-type": "application/json", **fields}
    try:
        answer = httpx.post(
            url.rstrip("/") + "/explain", params={"path": path}, content=content, headers=headers_sent, timeout=10.0
        )
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"--url {url}: {error}: give the router's admin address (default port 9090)") from error
    if answer.status_code != 200:
        try:
            reason = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = f"{url}/explain answered {answer.status_code}: is this a router's admin port?"
        raise ValueError(f"{body}: {reason}")
    found: dict[str, Any] = answer.json()
    return found


def explain_decision(decision: Mapping[str, Any]) -> RenderableType:
    """`decision` as the admin port gives it (`/decisions/ID`)."""
    lines: list[RenderableType] = [_headline(decision)]
    for number, made in enumerate(decision["tries"]):
        if number:
            lines.append(_next_try(decision["tries"][number - 1]))
        lines.append(_candidates(made))
    if decision["tries"]:
        lines.append(_cache(decision))
    lines.append(_outcome(decision))
    return Group(*lines, "")


def _headline(decision: Mapping[str, Any]) -> Text:
    text = Text()
    text.append(f"{decision['id']}", style="bold")
    text.append(f"  {decision['model']}, {decision['prompt_tokens']:,} prompt tokens")
    if tries := decision["tries"]:
        text.append(" → ")
        text.append(tries[-1]["worker"], style="bold green")
    text.append(f"  (policy {decision['policy']}, strategy {decision['strategy']})", style="dim")
    if (decision.get("deferred_s") or 0) > 0.001:
        text.append(
            f"  kept {decision['deferred_s']:,.0f} s for a cheaper time ({decision['deferred_until']})", style="yellow"
        )
    if (decision["held_s"] or 0) > 0.001:
        text.append(f"  held {_ms(decision['held_s'])} at the router", style="yellow")
    return text


def _next_try(before: Mapping[str, Any]) -> Text:
    if before["given_up"]:
        return Text(f"  tried again: {before['given_up']}", style="yellow")
    return Text(f"  prompt computed on {before['worker']}, handed on to:")


def _candidates(made: Mapping[str, Any]) -> Text:
    """One line a candidate, cheapest first: its cost as the sum of the parts that mattered."""
    candidates = made["candidates"]
    dearest = max((abs(candidate["cost"]) for candidate in candidates), default=0.0)
    text = Text()
    for candidate in candidates:
        chosen = candidate["worker"] == made["worker"]
        parts = [
            f"{name.replace('_', ' ')} {_number(value)}"
            for name, value in candidate["parts"].items()
            if abs(value) > NEGLIGIBLE_SHARE * dearest
        ]
        line = f"  {'→' if chosen else ' '} {candidate['worker']}: cost {_number(candidate['cost'])}"
        line += f" = {' + '.join(parts)}" if parts else ""
        line += f"; {candidate['cached_tokens']:,} tokens cached" if candidate["cached_tokens"] else ""
        text.append(line + "\n", style="bold" if chosen else "dim")
    if made["candidate_count"] > len(candidates):
        text.append(f"    … {made['candidate_count'] - len(candidates)} more\n", style="dim")
    text.rstrip()
    return text


def _outcome(decision: Mapping[str, Any]) -> Text:
    text = Text("  ")
    if tries := decision["tries"]:
        text.append(f"predicted: TTFT {_ms(tries[-1]['predicted_ttft_s'])}, {tries[-1]['predicted_joules']:.0f} J")
    if decision.get("dry_run"):
        words = WOULD[decision["would"]]
        return text.append(
            f"{'; ' if decision['tries'] else ''}{words}" + (f": {decision['why']}" if decision["why"] else "")
        )
    outcome = decision["outcome"]
    if outcome is None:
        return text.append("; still running")
    text.append(f"; came: {outcome['result']}")
    if outcome.get("ttft_s") is not None:
        text.append(f", TTFT {_ms(outcome['ttft_s'])}")
    if outcome.get("cached_tokens") is not None:
        text.append(f", {outcome['cached_tokens']:,} of {outcome['prompt_tokens']:,} prompt tokens from the cache")
    if outcome.get("output_tokens") is not None:
        text.append(f", {outcome['output_tokens']:,} tokens")
    if outcome.get("detail"):
        text.append(f" ({outcome['detail']})")
    return text


WOULD = {
    "send": "would be sent",
    "hold": "would wait",
    "keep": "would be kept for later",
    "refuse": "would be refused",
}
WHY_GUESSED = {
    "NoTokenizer": "no tokenizer is named",
    "PrefixesNotUsed": "the strategy does not look at prefixes, or the policy switched them off",
    "PolicyGuesses": "the policy's prefix.source is Approximate",
    "EventsNotHeard": "the worker has told nothing yet",
    "Loading": "the tokenizer was still being read",
    "PredictionsMiss": "what was expected by KV events was not what engines reported",
}
"""In words, where the reason itself needs some."""


def _cache(decision: Mapping[str, Any]) -> Text:
    """What was expected of the worker's cache, by which index and why that one, and what the engine reported."""
    made, outcome = decision["tries"][-1], decision["outcome"] or {}
    chosen = (candidate["cached_tokens"] for candidate in made["candidates"] if candidate["worker"] == made["worker"])
    expected = f"{next(chosen, 0):,} tokens expected"
    if made["cache_view"] == "precise":
        text = f"exact, by KV events: {expected} ({made['guessed_cached_tokens']:,} by guess)"
    else:
        reason = made.get("cache_view_reason", "")
        text = f"approximate, by what was sent where ({WHY_GUESSED.get(reason, reason)}): {expected}"
    reported = outcome.get("cached_tokens")
    return Text(f"  cache: {text}" + (f", {reported:,} reported" if reported is not None else ""), style="dim")


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"
