"""Which workers go first, and what is written to make Kubernetes take them."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvfleet_operator.autoscale.victims import Candidate, choose_victims, deletion_costs, highest_indices


def pod(name: str, **fields: Any) -> Candidate:
    return Candidate(
        **{"pod": name, "ready": True, "in_flight": 0, "cache_value_s": 0.0, "created_at_s": 0.0, **fields}
    )


def test_least_in_flight_goes_first_then_least_cache_then_the_youngest() -> None:
    pods = [
        pod("busy", in_flight=9),
        pod("cached", cache_value_s=12.0),
        pod("old", created_at_s=1.0),
        pod("young", created_at_s=2.0),
        pod("unready", ready=False, in_flight=99),
    ]
    assert choose_victims(pods, 5) == ["unready", "young", "old", "cached", "busy"]
    assert choose_victims(pods, 2) == ["unready", "young"]
    assert choose_victims(pods, -1) == []


def test_who_gets_nothing_new_already_goes_first() -> None:
    pods = [pod("idle"), pod("ending", in_flight=3, spared=True), pod("unready", ready=False)]
    assert choose_victims(pods, 2) == ["unready", "ending"]


def test_a_leaderworkerset_removes_its_highest_index() -> None:
    assert highest_indices(["w-2", "w-10", "w-1", "odd", "w-x"], 2) == ["w-10", "w-2"]
    assert highest_indices(["w-0"], -1) == []


def test_only_victims_are_marked_and_the_first_has_the_lowest_cost() -> None:
    pods = [pod("a", in_flight=2), pod("b", in_flight=1), pod("c")]
    assert deletion_costs(pods, 2) == {"c": "-1002", "b": "-1001"}


def test_what_is_written_already_is_not_written_again() -> None:
    pods = [pod("a", in_flight=2), pod("b", deletion_cost="-1001")]
    assert deletion_costs(pods, 1) == {}


def test_a_former_victim_is_unmarked_and_others_values_are_left_alone() -> None:
    pods = [pod("a", deletion_cost="-1001", in_flight=3), pod("b", deletion_cost="500"), pod("c", deletion_cost="x")]
    assert deletion_costs(pods, 0) == {"a": None}


@given(
    st.lists(
        st.builds(
            Candidate,
            pod=st.text("abc", min_size=1, max_size=3),
            ready=st.booleans(),
            in_flight=st.integers(0, 5),
            cache_value_s=st.sampled_from([0.0, 1.5]),
            created_at_s=st.sampled_from([0.0, 9.0]),
            deletion_cost=st.sampled_from([None, "-1001", "7"]),
        ),
        unique_by=lambda candidate: candidate.pod,
        max_size=8,
    ),
    st.integers(0, 9),
)
def test_after_writing_kubernetes_takes_the_chosen_ones(candidates: list[Candidate], count: int) -> None:
    """The ReplicaSet's order: not ready first, then the lower cost."""
    changes = deletion_costs(candidates, count)
    costs = {c.pod: changes.get(c.pod, c.deletion_cost) for c in candidates}
    order = sorted(candidates, key=lambda c: (c.ready, int(costs[c.pod] or 0)))
    taken = {c.pod for c in order[:count]}
    chosen = choose_victims(candidates, count)
    assert {c.pod for c in candidates if c.ready and c.pod in taken} == {
        c.pod for c in candidates if c.ready and c.pod in chosen
    }
    assert all(-(2**31) <= int(cost or 0) < 2**31 for cost in costs.values())
