"""The operator works with exactly the rights of its role; where one is missing it says which."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness.cluster import ClusterError
from harness.kube import Kube, Object, wait_until
from harness.sentences import Given, Story, Then, When
from support.installation import CLUSTER_ROLE, OPERATOR, Installation, condition
from support.manifests import policy, pool, router

REQUESTS = "kvfleet_operator_api_requests_total"


def may(kvfleet: Installation, verb: str, resource: str, namespace: str) -> bool:
    account = f"--as=system:serviceaccount:{kvfleet.namespace}:{OPERATOR}"
    try:
        answer = kvfleet.cluster.run("kubectl", "auth", "can-i", verb, resource, account, f"--namespace={namespace}")
    except ClusterError:  # kubectl's exit code says no as well
        return False
    return answer.strip() == "yes"


def test_the_operator_needs_no_more_than_its_role(
    kvfleet: Installation, given: Given, when: When, then: Then, story: Story
) -> None:
    """Everything it does, from creating to deleting, without one refusal."""
    # Not from zero: earlier tests have kinds removed and quotas refuse objects, which is 403 too.
    refused = kvfleet.metrics().total(REQUESTS, code="401|403")
    given.applied(pool(adapters=[]), policy(), router())
    then.ready("ModelPool", "llama", within_s=90).ready("FleetRouter", "router", within_s=90)
    when.patched("ModelPool", "llama", {"spec": {"engine": {"env": [{"name": "NEW", "value": "1"}]}}})
    when.deleted("Service", "llama-workers")
    then.is_so("Service", "llama-workers", "is there again", lambda found: found)
    then.ready("ModelPool", "llama", within_s=90).ready("RoutingPolicy", "all", within_s=60)
    when.deleted("FleetRouter", "router")
    then.is_so(
        "RoutingPolicy", "all", "has no router", lambda found: condition(found, "Programmed")["reason"] == "NoRouter"
    )
    assert kvfleet.metrics().total(REQUESTS, code="401|403") == refused
    for verb, resource in (
        ("get", "secrets"),
        ("create", "pods"),
        ("delete", "nodes"),
        ("escalate", "roles"),
        ("bind", "clusterroles"),
        ("update", "modelpools.kvfleet.io"),
        ("impersonate", "users"),
    ):
        assert not may(kvfleet, verb, resource, story.kube.namespace), f"{verb} {resource}"


class Role:
    """The operator's ClusterRole, from which a test takes something."""

    def __init__(self, kvfleet: Installation) -> None:
        self._kvfleet = kvfleet
        self._kube = kvfleet.kube
        self._rules: list[Object] = self._kube.get("ClusterRole", CLUSTER_ROLE)["rules"]

    def lacks(self, resource: str, verbs: tuple[str, ...] = ()) -> None:
        """Without these verbs (all, if none is given) on a resource."""
        rules = []
        for rule in self._rules:
            if resource not in rule["resources"]:
                rules.append(rule)
                continue
            others = [name for name in rule["resources"] if name != resource]
            rest = [verb for verb in rule["verbs"] if verb not in (verbs or rule["verbs"])]
            rules += [{**rule, "resources": others}] * bool(others)
            rules += [{**rule, "resources": [resource], "verbs": rest}] * bool(rest)
        assert rules != self._rules
        self._write(rules)

    def restore(self) -> None:
        self._write(self._rules)

    def _write(self, rules: list[Object]) -> None:
        self._kube.patch("ClusterRole", CLUSTER_ROLE, {"rules": rules})


@pytest.fixture
def role(kvfleet: Installation) -> Iterator[Role]:
    role = Role(kvfleet)
    yield role
    role.restore()


@pytest.mark.parametrize(
    ("verb", "resource", "kind"),
    [
        ("patch", "deployments", "ModelPool"),
        ("create", "services", "ModelPool"),
        ("get", "poddisruptionbudgets", "ModelPool"),
        ("patch", "configmaps", "FleetRouter"),
        ("create", "rolebindings", "FleetRouter"),
        # Not for itself: Kubernetes lets nobody grant to routers what he may not do himself.
        ("watch", "endpointslices", "FleetRouter"),
    ],
)
def test_a_missing_right_is_named_in_status_and_log_and_healed_when_granted(
    kvfleet: Installation,
    role: Role,
    given: Given,
    then: Then,
    kube: Kube,
    story: Story,
    verb: str,
    resource: str,
    kind: str,
) -> None:
    with story.tells(f"given an operator that may not {verb} {resource}"):
        role.lacks(resource, (verb,))
        gone = f"the right to {verb} {resource} is gone"
        wait_until(lambda: not may(kvfleet, verb, resource, kube.namespace), gone, 10)
    given.applied(pool("llama", 0), router())
    name = {"ModelPool": "llama", "FleetRouter": "router"}[kind]

    def says_so(found: Object) -> bool:
        accepted = condition(found, "Accepted")
        return (
            accepted.get("reason") == "Rejected"
            and resource in accepted["message"]
            and "forbidden" in accepted["message"]
        )

    then.is_so(kind, name, "names the right in its status", says_so)
    assert condition(kube.get(kind, name), "Ready")["status"] == "False"
    then.eventually(
        "the log names it",
        lambda: [
            line
            for line in kvfleet.log().splitlines()
            if resource in line and "forbidden" in line and kube.namespace in line
        ],
    )
    with story.tells("when it is granted"):
        role.restore()
    then.ready(kind, name, within_s=60)


def test_a_status_that_may_not_be_written_is_named_in_the_log(
    kvfleet: Installation, role: Role, given: Given, then: Then, kube: Kube, story: Story
) -> None:
    role.lacks("modelpools/status")
    given.applied(pool("llama", 0))
    then.eventually("the log names it", lambda: 'modelpools.kvfleet.io "llama" is forbidden' in kvfleet.log())
    role.restore()
    then.ready("ModelPool", "llama", within_s=60)


def test_a_watch_that_is_forbidden_ends_the_operator_with_the_reason(
    kvfleet: Installation, role: Role, given: Given, then: Then, story: Story
) -> None:
    """And makes room for one that may: it does not pretend to work."""
    with story.tells("given an operator that may not list pods"):
        role.lacks("pods", ("list", "watch"))
    with story.tells("when the leader is deleted"):
        kvfleet.kube.delete("Pod", kvfleet.leader())
    then.eventually("a log names it", lambda: "pods is forbidden" in kvfleet.log(), 60)
    role.restore()
    given.applied(pool("llama", 0))
    then.ready("ModelPool", "llama", within_s=90)
    with story.tells("then there are two operators again"):
        wait_until(lambda: len(kvfleet.ready_pods()) == 2, "both are ready", 90)
