"""A decision in words: what was expected of the worker's cache, by which index and why, and what came."""

from io import StringIO

import pytest
from rich.console import Console

from kvfleet.explain import WHY_GUESSED, explain_decision
from kvfleet_router.core.decisions import DecisionLog, Outcome, Scores, Try


def words(made, why_guessed="", outcome=None):
    log = DecisionLog(4, prefix="abc")
    decision = log.open("r", 0.0)
    decision.model, decision.parts, decision.why_guessed = "m", ("prefill",), why_guessed
    decision.tries += (made,)
    decision.outcome = outcome
    console = Console(width=200, file=StringIO())
    console.print(explain_decision(log.render(decision)))
    return console.file.getvalue()


def tried(**told):
    return Try(0.0, "w1", Scores.of([("w1", 1024.0, (1.0,)), ("w2", 0.0, (2.0,))]), 2, 0.25, 12.0, **told)


CAME = Outcome(2.0, "ok", "", 1.0, 1500, 1008, 20)


def test_exact_and_what_the_guess_would_have_been():
    told = words(tried(precise=True, guessed_tokens=1180.0), outcome=CAME)
    assert "cache: exact, by KV events: 1,024 tokens expected (1,180 by guess), 1,008 reported" in told
    assert "1,008 of 1,500 prompt tokens from the cache" in told


@pytest.mark.parametrize("reason", [*WHY_GUESSED, "TokenizerNormalizes", "PromptNotRendered: media"])
def test_approximate_and_why(reason):
    told = words(tried(), reason, CAME)
    why = WHY_GUESSED.get(reason, reason)
    assert f"cache: approximate, by what was sent where ({why}): 1,024 tokens expected, 1,008 reported" in told


def test_a_worker_that_told_nothing_is_the_reason_where_there_is_no_other():
    assert f"({WHY_GUESSED['EventsNotHeard']}): 1,024 tokens expected\n" in words(tried())
