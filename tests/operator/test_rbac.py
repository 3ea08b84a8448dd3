"""The permissions are enough for everything the operator does, and no more than that."""

import kmock
import pytest
from operator_running import poll, ready, replica, running, settled_pool, watching
from scaling_fleet import worker_pod

from kvfleet_operator.rbac import Rule, allows, cluster_rules, lease_rules, namespaced_rules
from kvfleet_operator.scaling.loop import ScalerOptions

VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
LENT = {("get", "endpointslices"), ("list", "endpointslices"), ("watch", "endpointslices"), ("get", "configmaps")}
"""Handed on to routers: a right nobody has cannot be granted."""
LENT |= {(verb, f"{workload}/scale") for verb in ("get", "patch") for workload in ("deployments", "leaderworkersets")}
UNSEEN = {"create", "delete", "update"}
"""Server-side apply creates where nothing is; other leftovers than workloads need a former version; finalizers."""

SOON = ScalerOptions(period_s=0.2, wake_s=0.05)


def rights_used(cluster):
    """(verb, API group, resource, name) of every request made."""
    used = set()
    for request in cluster:
        if request.resource is None or not request.resource.plural:
            continue  # discovery
        verb = VERBS.get(request.method.value) or {kmock.action.LIST: "list", kmock.action.WATCH: "watch"}.get(
            request.action, "get"
        )
        plural = request.resource.plural + (f"/{request.subresource}" if request.subresource else "")
        used.add((verb, request.resource.group, plural, request.name))
    return used


async def live_a_little(operator, cluster, make, port):
    """Everything an operator does: create, adopt drift, report, delete a leftover, be asked again."""
    await settled_pool(operator, cluster, make)
    cluster.put(make.policy())
    cluster.put(make.router(adminPort=port))
    await cluster.until(lambda: cluster.get("Deployment", "router"))
    cluster.roll_out("router")
    async with replica(port, cluster):
        cluster.put(make.router_pod())
        await cluster.until(lambda: ready(cluster, "RoutingPolicy", "policy"))
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(parallelism={"tensor": 8, "nodes": 2}))
    await cluster.until(
        lambda: cluster.get("LeaderWorkerSet", "llama-lws") and not cluster.get("Deployment", "llama-workers")
    )
    await scale_down(cluster, make)
    await watching(cluster)


async def scale_down(cluster, make):
    """Bounds hold without any signal: two workers are one too many."""
    cluster.put(make.pool("small", autoscaling={"minReplicas": 1, "maxReplicas": 1}))
    for name in ("a", "b"):
        cluster.put(worker_pod(name, pool="small"))
    await cluster.until(lambda: cluster.get("Deployment", "small-workers"))
    cluster.edit("Deployment", "small-workers", lambda found: found["spec"].update(replicas=2))
    await cluster.until(lambda: cluster.get("Deployment", "small-workers")["spec"]["replicas"] == 1)


@pytest.mark.parametrize("cluster_wide", [True, False])
async def test_every_request_is_allowed(cluster, login, make, unused_tcp_port, cluster_wide):
    namespaces = () if cluster_wide else ("default",)
    async with running(login, namespaces=namespaces, resync_s=0.1, scaling=SOON) as operator:
        await live_a_little(operator, cluster, make, unused_tcp_port)
        await poll(lambda: operator.queue.idle)
    rules = cluster_rules(cluster_wide=cluster_wide) + lease_rules("kvfleet-operator")
    if not cluster_wide:
        rules += namespaced_rules()
    used = rights_used(cluster)
    assert [right for right in used if not allows(rules, *right)] == []
    # And what is allowed is used, but for what no such test can show.
    done = {(verb, plural) for verb, _group, plural, _name in used}
    unused = {(verb, resource) for rule in rules for resource in rule.resources for verb in rule.verbs} - done - LENT
    assert {right for right in unused if right[0] not in UNSEEN} == set()


def test_without_cluster_wide_rights_only_the_cluster_scoped_kind_is_read_everywhere():
    resources = {resource for rule in cluster_rules(cluster_wide=False) for resource in rule.resources}
    assert resources == {"acceleratorprofiles", "acceleratorprofiles/status"}


def test_nothing_allows_secrets_pods_of_others_or_wildcards():
    rules = [*cluster_rules(cluster_wide=True), *lease_rules("x")]
    for rule in rules:
        assert "*" not in rule.verbs + rule.resources + rule.groups
        assert "secrets" not in rule.resources
    assert not allows(rules, "delete", "", "pods")
    assert not allows(rules, "update", "coordination.k8s.io", "leases", "another")


def test_a_rule_reads_as_kubernetes_has_it():
    assert Rule(("",), ("pods",), ("get",)).manifest() == {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}
    assert Rule(("",), ("pods",), ("get",), ("a",)).manifest()["resourceNames"] == ["a"]
