"""A router may wake exactly the pools that may be at zero, and its operator may grant that."""

from kvfleet_api.compile import compile_fleet
from kvfleet_operator.rbac import allows, namespaced_rules
from kvfleet_operator.reconcile import fleetrouter
from kvfleet_operator.reconcile.modelpool import workload_key

SLEEPY = {"minReplicas": 0, "maxReplicas": 4}


def rules_of(make, *pools):
    router = make.parse(make.router())
    parsed = [make.parse(pool) for pool in pools]
    fleet = compile_fleet(router, parsed, [make.parse(make.policy())], [make.parse(make.profile())])
    children = fleetrouter.children(fleetrouter.RouterInput(router, fleet, {})).objects
    return next(child for child in children if child["kind"] == "Role")["rules"]


def test_only_pools_that_may_be_at_zero_can_be_woken_and_by_their_workloads_names(make):
    nodes = {"parallelism": {"tensor": 8, "nodes": 2}}
    pools = [
        make.pool("asleep", autoscaling=SLEEPY),
        make.pool("awake", autoscaling={"minReplicas": 1, "maxReplicas": 4}),
        make.pool("fixed", replicas=0),
        make.pool("wide", autoscaling=SLEEPY, **nodes),
        make.pool("x" * 63, autoscaling=SLEEPY),
        make.pool("y" * 63, autoscaling=SLEEPY, **nodes),
    ]
    named = {
        resource: rule["resourceNames"]
        for rule in rules_of(make, *pools)
        for resource in rule["resources"]
        if resource.endswith("/scale")
    }
    workloads = {pool["metadata"]["name"]: workload_key(make.parse(pool))[1] for pool in pools}
    assert named == {
        "deployments/scale": sorted([workloads["asleep"], workloads["x" * 63]]),
        "leaderworkersets/scale": sorted([workloads["wide"], workloads["y" * 63]]),
    }


def test_without_such_pools_a_router_may_change_nothing(make):
    verbs = {verb for rule in rules_of(make, make.pool()) for verb in rule["verbs"]}
    assert verbs <= {"get", "list", "watch"}


def test_the_operator_has_what_it_grants(make):
    rules = rules_of(make, make.pool(autoscaling=SLEEPY))
    granted = [(verb, group, resource) for rule in rules for verb in rule["verbs"]
               for group in rule["apiGroups"] for resource in rule["resources"]]  # fmt: skip
    assert [right for right in granted if not allows(namespaced_rules(), *right)] == []
