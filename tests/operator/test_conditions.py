"""Conditions: transition times move with the status alone, other components' conditions survive, Events are news only."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_api.common import Condition
from kvfleet_operator.reconcile import conditions
from kvfleet_operator.reconcile.conditions import Finding

STATUSES = st.sampled_from(["True", "False", "Unknown"])
TYPES = ["Accepted", "ResolvedRefs", "Conflicted", "Progressing", "Ready"]


@st.composite
def findings(draw):
    types = draw(st.lists(st.sampled_from(TYPES), unique=True))
    reasons = st.sampled_from(["A", "B", "SomethingElse"])
    return [Finding(type_, draw(STATUSES), draw(reasons), draw(st.text("ab", max_size=5))) for type_ in types]


def settle(before, found, now, generation=1):
    return conditions.settle(before, found, generation=generation, now=now)


@settings(max_examples=100, deadline=None)
@given(findings(), st.integers(1, 5))
def test_settling_the_same_findings_again_changes_nothing(found, generation):
    first = settle([], found, "2026-01-01T00:00:00Z", generation)
    assert settle(first, found, "2026-02-02T00:00:00Z", generation) == first


@settings(max_examples=100, deadline=None)
@given(findings(), findings())
def test_transition_times_move_exactly_where_the_status_moved(old, new):
    first = settle([], old, "t0")
    second = settle(first, new, "t1")
    before = {condition.type: condition for condition in first}
    for condition in second:
        known = before.get(condition.type)
        stayed = known is not None and known.status == condition.status
        assert condition.last_transition_time == (known.last_transition_time if stayed else "t1")


@settings(max_examples=100, deadline=None)
@given(findings(), findings())
def test_conditions_of_other_types_are_kept_as_they_were(old, new):
    first = settle([], old, "t0")
    second = settle(first, new, "t1")
    stated = {finding.type for finding in new}
    assert [c for c in second if c.type not in stated] == [c for c in first if c.type not in stated]
    assert len({condition.type for condition in second}) == len(second)


def test_a_new_generation_and_message_are_reported_without_a_transition():
    first = settle([], [Finding("Ready", "True", "Ready", "one")], "t0", generation=1)
    second = settle(first, [Finding("Ready", "True", "Other", "two")], "t1", generation=2)
    assert second[0].observed_generation == 2
    assert (second[0].reason, second[0].message) == ("Other", "two")
    assert second[0].last_transition_time == "t0"


def test_a_message_without_end_is_cut():
    settled = settle([], [Finding("Ready", "False", "X", "x" * 100_000)], "t0")
    assert len(settled[0].message) == conditions.MAX_MESSAGE
    assert settled[0].message.endswith("…")


def test_a_conjunction_says_what_its_first_failing_part_says():
    parts = [Finding("A", "True", "Fine"), Finding("B", "False", "Broken", "b"), Finding("C", "Unknown", "Later")]
    assert conditions.conjunction("Ready", parts, "Ready", "all") == Finding("Ready", "False", "Broken", "b")
    assert conditions.conjunction("Ready", parts[:1], "Ready", "all") == Finding("Ready", "True", "Ready", "all")


def news(before, after):
    def listed(pairs):
        return [Condition(type=type_, status=status, reason="R") for type_, status in pairs]

    return [(t.condition.type, t.warning) for t in conditions.transitions(listed(before), listed(after))]


def test_events_tell_moved_statuses_and_first_bad_news():
    assert news([("Ready", "False")], [("Ready", "True")]) == [("Ready", False)]
    assert news([("Ready", "True")], [("Ready", "False")]) == [("Ready", True)]
    assert news([], [("ResolvedRefs", "False")]) == [("ResolvedRefs", True)]
    assert news([("Conflicted", "False")], [("Conflicted", "True")]) == [("Conflicted", True)]


def test_no_event_for_what_is_no_news():
    assert news([("Ready", "True")], [("Ready", "True")]) == []
    assert news([], [("Accepted", "True"), ("Ready", "False"), ("Available", "False"), ("Conflicted", "False")]) == []
    assert news([("Progressing", "False")], [("Progressing", "True")]) == []
    assert news([("Ready", "True")], [("Ready", "Unknown")]) == []
