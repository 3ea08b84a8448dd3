"""What the operator made stays as it made it; what it did not make stays as it is; what is missing may come later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.kube import Kube, Object
from harness.sentences import Given, Story, Then, When
from support.installation import RESYNC_S, Installation, condition
from support.manifests import PROFILE, policy, pool, profile, router

HEALED_S = RESYNC_S + 10
"""Objects without kvfleet's labels are not watched: the next resync sees that they are gone."""


@pytest.fixture
def fleet(kvfleet: Installation, given: Given, then: Then, story: Story) -> Kube:
    """A pool, a policy and a router, all Ready."""
    given.applied(pool(), policy(), router())
    for kind, name in (("ModelPool", "llama"), ("FleetRouter", "router"), ("RoutingPolicy", "all")):
        then.ready(kind, name, within_s=90)
    return story.kube


EDITS: dict[str, tuple[str, str, Object]] = {
    "image": ("Deployment", "llama-workers", {"spec": {"template": {"spec": {"containers": [{"name": "engine", "image": "busybox:1"}]}}}}),
    "replicas": ("Deployment", "llama-workers", {"spec": {"replicas": 0}}),
    "labels": ("Deployment", "llama-workers", {"metadata": {"labels": {"kvfleet.io/pool": "other"}}}),
    "our label, by which it is watched": ("Deployment", "router", {"metadata": {"labels": {"app.kubernetes.io/managed-by": None}}}),
    "owner": ("Service", "llama-workers", {"metadata": {"ownerReferences": []}}),
    "headless port": ("Service", "llama-workers", {"spec": {"ports": [{"name": "http", "port": 1, "targetPort": 1}]}}),
    "port": ("Service", "router", {"spec": {"ports": [{"name": "http", "port": 81, "targetPort": "http"}]}}),
    "selector": ("Service", "router", {"spec": {"selector": {"app": "other"}}}),
    "configuration": ("ConfigMap", "router", {"data": {"fleet.json": "{}"}}),
    "budget": ("PodDisruptionBudget", "router", {"spec": {"maxUnavailable": 5}}),
    "rules": ("Role", "router", {"rules": []}),
    "subjects": ("RoleBinding", "router", {"subjects": []}),
}  # fmt: skip


def stated(found: Object) -> Object:
    """What a user states of an object: no bookkeeping, no status."""
    metadata = {key: found["metadata"].get(key) for key in ("labels", "annotations", "ownerReferences")}
    metadata["annotations"] = {
        key: value for key, value in (metadata["annotations"] or {}).items() if not key.startswith("deployment.")
    }
    rest = {key: value for key, value in found.items() if key not in ("metadata", "status")}
    return {**rest, "metadata": metadata}


def test_manual_edits_are_repaired(fleet: Kube, when: When, then: Then) -> None:
    before = {(kind, name): stated(fleet.get(kind, name)) for kind, name, _ in EDITS.values()}
    for what, (kind, name, patch) in EDITS.items():
        edited = fleet.patch(kind, name, patch)
        assert stated(edited) != before[kind, name], f"{what}: the edit changes nothing"

        def is_back(now: Object, wanted: Object = before[kind, name]) -> bool:
            return stated(now) == wanted

        then.is_so(kind, name, f"has its {what} back", is_back)
    then.ready("ModelPool", "llama", within_s=90).ready("FleetRouter", "router", within_s=90)


def test_what_others_add_is_left_alone(fleet: Kube, when: When, then: Then) -> None:
    added = {"metadata": {"labels": {"team": "search"}, "annotations": {"note": "mine"}}}
    when.patched("Deployment", "llama-workers", added)
    when.patched("ConfigMap", "router", {"data": {"extra": "mine", "fleet.json": "{}"}})
    then.is_so("ConfigMap", "router", "is repaired", lambda found: found["data"]["fleet.json"] != "{}")
    assert fleet.get("ConfigMap", "router")["data"]["extra"] == "mine"
    when.patched("ModelPool", "llama", {"spec": {"engine": {"env": [{"name": "NEW", "value": "1"}]}}})

    def has_new_environment(found: Object) -> bool:
        return "NEW" in str(found["spec"]["template"]["spec"]["containers"][0]["env"])

    then.is_so("Deployment", "llama-workers", "has the new environment", has_new_environment)
    metadata = fleet.get("Deployment", "llama-workers")["metadata"]
    assert metadata["labels"]["team"] == "search"
    assert metadata["annotations"]["note"] == "mine"


def test_deleted_children_come_back(fleet: Kube, when: When, then: Then) -> None:
    children = [(kind, name) for kind, name, _ in EDITS.values()]
    children += [("PodDisruptionBudget", "llama-workers"), ("Deployment", "router")]

    def delete_and_see(kind: str, name: str) -> None:
        uid = fleet.get(kind, name)["metadata"]["uid"]
        when.deleted(kind, name)
        then.is_so(kind, name, "is there again", lambda found: found["metadata"]["uid"] != uid)

    for kind, name in dict.fromkeys(children):
        delete_and_see(kind, name)
    then.ready("ModelPool", "llama", within_s=90).ready("FleetRouter", "router", within_s=90)
    # Last: the tokens of running routers belong to the account that was deleted.
    delete_and_see("ServiceAccount", "router")


def test_children_go_with_their_owner(fleet: Kube, when: When, then: Then) -> None:
    when.deleted("ModelPool", "llama").deleted("FleetRouter", "router")
    for kind in ("Deployment", "Service", "PodDisruptionBudget", "ServiceAccount", "Role", "RoleBinding", "ConfigMap"):
        then.counts(kind, 0, selector="app.kubernetes.io/managed-by=kvfleet-operator")
    then.is_so("RoutingPolicy", "all", "misses its pool", says("ResolvedRefs", "False", "llama"))


def says(kind: str, status: str, *words: str) -> Callable[[Object], bool]:
    """Whether an object's condition has this status, for its latest generation, and its message these words."""

    def holds(found: Object) -> bool:
        entry = condition(found, kind)
        current = entry.get("observedGeneration") == found["metadata"]["generation"]
        return current and entry["status"] == status and all(word in entry["message"] for word in words)

    return holds


FOREIGN: list[Object] = [
    {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "llama-workers"}, "spec": {"ports": [{"port": 1}]}},
    {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "router"}, "data": {"mine": "1"}},
    {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "router"}},
]


def test_foreign_objects_are_left_alone_and_reported(
    kvfleet: Installation, given: Given, when: When, then: Then, kube: Kube
) -> None:
    given.applied(*FOREIGN)
    before = [kube.get(each["kind"], each["metadata"]["name"]) for each in FOREIGN]
    given.applied(pool(), router(), policy())
    then.is_so("ModelPool", "llama", "names the Service", says("Accepted", "False", "Service llama-workers"))
    then.is_so(
        "FleetRouter", "router", "names both", says("Accepted", "False", "ConfigMap router", "ServiceAccount router")
    )
    assert condition(kube.get("ModelPool", "llama"), "Accepted")["reason"] == "NameConflict"
    assert condition(kube.get("ModelPool", "llama"), "Ready")["status"] == "False"
    then.ready("Deployment", "llama-workers", within_s=60)
    assert kube.find("Deployment", "router") is None, "a router would run under a foreign account"
    when.patched("ModelPool", "llama", {"spec": {"replicas": 0}})
    then.is_so("ModelPool", "llama", "is still in conflict", says("Accepted", "False", "Service llama-workers"))
    after = [kube.get(each["kind"], each["metadata"]["name"]) for each in FOREIGN]
    assert [each["metadata"]["resourceVersion"] for each in after] == [
        each["metadata"]["resourceVersion"] for each in before
    ]
    for each in FOREIGN:
        when.deleted(each["kind"], each["metadata"]["name"])
    then.ready("ModelPool", "llama", within_s=HEALED_S).ready("FleetRouter", "router", within_s=HEALED_S + 30)


def test_missing_references_are_tolerated_and_healed(
    kvfleet: Installation, given: Given, when: When, then: Then, kube: Kube
) -> None:
    name = f"{kube.namespace}-x1"
    # The simulated worker knows the bundled profiles only.
    simulated = {"env": [{"name": "E2E_PROFILE", "value": PROFILE}]}
    lacking = pool("late", 1, accelerator={"profileRef": name}, engine=simulated)
    given.applied(policy("all", "llama", "late"), pool("llama", 0), router())
    then.is_so("RoutingPolicy", "all", "misses a pool", says("ResolvedRefs", "False", "late"))
    then.is_so("RoutingPolicy", "all", "is served by the other", says("Accepted", "True"))
    given.applied(lacking)
    then.is_so("ModelPool", "late", "misses its profile", says("ResolvedRefs", "False", name))
    then.is_so("RoutingPolicy", "all", "misses nothing", says("ResolvedRefs", "True"))
    assert kube.find("Deployment", "late-workers") is None
    try:
        when.applied(profile(name))
        then.ready("ModelPool", "late", within_s=60).ready("RoutingPolicy", "all", within_s=60)
        then.is_so(
            "AcceleratorProfile", name, "names it", lambda now: now["status"]["pools"] == [f"{kube.namespace}/late"]
        )
        running = kube.get("Deployment", "late-workers")
    finally:
        when.deleted("AcceleratorProfile", name)
    then.is_so("ModelPool", "late", "misses its profile again", says("ResolvedRefs", "False", name))
    assert kube.get("Deployment", "late-workers")["metadata"]["generation"] == running["metadata"]["generation"]


def test_of_two_policies_the_status_says_which_wins_and_why(
    kvfleet: Installation, given: Given, when: When, then: Then
) -> None:
    given.applied(pool("llama", 0), router(), policy("older", match={"models": ["llama-8b"]}))
    then.ready("RoutingPolicy", "older", within_s=60)
    when.applied(policy("younger", match={"models": ["llama-8b"]}))
    then.is_so("RoutingPolicy", "younger", "says who wins", says("Conflicted", "True", "older"))
    then.is_so("RoutingPolicy", "younger", "is not Ready", says("Ready", "False", "older"))
    then.is_so("RoutingPolicy", "older", "stays Ready", says("Ready", "True"))
    when.patched("RoutingPolicy", "younger", {"spec": {"priority": 1}})
    then.is_so("RoutingPolicy", "younger", "has precedence now", says("Conflicted", "False"))
    then.ready("RoutingPolicy", "younger")


def test_conditions_say_which_generation_they_speak_of(fleet: Kube, when: When, then: Then) -> None:
    """And move their transition time with their status alone."""

    def times() -> dict[str, Any]:
        found = fleet.get("ModelPool", "llama")["status"]["conditions"]
        return {entry["type"]: (entry["status"], entry["lastTransitionTime"]) for entry in found}

    before = times()
    when.patched("ModelPool", "llama", {"spec": {"engine": {"image": "no/such:1"}}})
    then.is_so("ModelPool", "llama", "is not Ready any more", says("Ready", "False", "1 of 1 workers ready"))
    then.is_so("ModelPool", "llama", "rolls out", says("Progressing", "True"))
    when.patched("ModelPool", "llama", {"spec": {"engine": {"image": None}}})
    then.ready("ModelPool", "llama", within_s=90)
    found = fleet.get("ModelPool", "llama")
    generations = {entry["observedGeneration"] for entry in found["status"]["conditions"]}
    assert generations == {found["metadata"]["generation"]} == {found["status"]["observedGeneration"]} == {3}
    unmoved = ("Accepted", "ResolvedRefs", "Available")
    assert {kind: times()[kind] for kind in unmoved} == {kind: before[kind] for kind in unmoved}
    told = [event for event in fleet.list("events.k8s.io/v1/Event") if told_of(event, "llama")]
    notes = [event["note"] for event in sorted(told, key=lambda event: str(event["eventTime"]))]
    assert [note.partition(":")[0] for note in notes if note.startswith("Ready=")] == [
        "Ready=True",
        "Ready=False",
        "Ready=True",
    ]


def told_of(event: Object, name: str) -> bool:
    return event.get("reportingController") == "kvfleet.io/kvfleet-operator" and event["regarding"]["name"] == name
