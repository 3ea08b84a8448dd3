"""The whole operator, kopf included, against an API server: what a cluster's user sees."""

import asyncio
import copy

import pytest
from operator_running import poll, ready, reason, replica, rounds, running, settled_pool, watching

from kvfleet_operator.main import Operator, OperatorOptions, run_operator
from kvfleet_operator.reconcile.dependents import KINDS
from kvfleet_operator.resources import BY_KIND


@pytest.fixture
async def operator(cluster, login):
    async with running(login) as found:
        yield found


async def test_a_pool_becomes_objects_and_its_status_follows_them(operator, cluster, make):
    cluster.put(make.profile())
    cluster.put(make.pool(replicas=2))
    await cluster.until(
        lambda: all(cluster.get(kind, "llama-workers") for kind in ("Service", "PodDisruptionBudget", "Deployment"))
    )
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "Ready") == "RollingOut")
    cluster.roll_out("llama-workers", ready=1)
    await cluster.until(lambda: cluster.get("ModelPool", "llama")["status"].get("readyReplicas") == 1)
    cluster.roll_out("llama-workers")
    await cluster.until(lambda: ready(cluster, "ModelPool", "llama"))
    await cluster.until(
        lambda: cluster.get("AcceleratorProfile", "h100").get("status", {}).get("pools") == ["default/llama"]
    )
    await cluster.until(lambda: any(event["note"].startswith("Ready=True") for event in cluster.all("Event")))


async def test_kopf_leaves_no_trace_on_the_objects(operator, cluster, make):
    await settled_pool(operator, cluster, make)
    metadata = cluster.get("ModelPool", "llama")["metadata"]
    assert "finalizers" not in metadata and "annotations" not in metadata


async def test_once_settled_a_resync_writes_nothing(cluster, login, make):
    async with running(login, resync_s=0.05) as operator:
        await settled_pool(operator, cluster, make)
        await rounds(cluster, 2)
        cluster.writes.clear()
        await rounds(cluster, 3)
        assert [write for write in cluster.writes if write[1] != "leases"] == []
    assert operator.code == 0


async def test_drift_is_repaired(operator, cluster, make):
    await settled_pool(operator, cluster, make)
    cluster.edit("Deployment", "llama-workers", lambda found: found["spec"].update(replicas=7))
    await cluster.until(lambda: cluster.get("Deployment", "llama-workers")["spec"]["replicas"] == 2)


async def test_a_child_that_lost_our_labels_gets_them_back(operator, cluster, make):
    await settled_pool(operator, cluster, make)
    cluster.edit("Deployment", "llama-workers", lambda found: found["metadata"].pop("labels"))
    await cluster.until(lambda: cluster.get("Deployment", "llama-workers")["metadata"].get("labels"))
    cluster.roll_out("llama-workers", ready=1)  # and it is followed as before
    await cluster.until(lambda: cluster.get("ModelPool", "llama")["status"]["readyReplicas"] == 1)


async def test_a_deleted_child_comes_back(operator, cluster, make):
    await settled_pool(operator, cluster, make)
    old = cluster.get("Service", "llama-workers")["metadata"]["uid"]
    cluster.remove("Service", "llama-workers")
    await cluster.until(
        lambda: (cluster.get("Service", "llama-workers") or {"metadata": {"uid": old}})["metadata"]["uid"] != old
    )


async def test_a_deleted_pool_is_left_to_the_garbage_collector(operator, cluster, make):
    await settled_pool(operator, cluster, make)
    cluster.writes.clear()
    cluster.remove("ModelPool", "llama")
    await cluster.until(lambda: cluster.get("AcceleratorProfile", "h100")["status"]["pools"] == [])
    await poll(lambda: operator.queue.idle)
    assert not {"deployments", "services", "poddisruptionbudgets"} & {write[1] for write in cluster.writes}
    assert cluster.get("Deployment", "llama-workers") is None


async def test_a_missing_reference_heals_when_it_appears(operator, cluster, make):
    cluster.put(make.pool())
    cluster.put(make.policy(pools=["llama", "later"]))
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "ResolvedRefs") == "ProfileNotFound")
    await cluster.until(lambda: reason(cluster, "RoutingPolicy", "policy", "ResolvedRefs") == "PoolNotFound")
    assert cluster.get("Deployment", "llama-workers") is None
    cluster.put(make.profile())
    cluster.put(make.pool("later"))
    await cluster.until(
        lambda: cluster.get("Deployment", "llama-workers") and cluster.get("Deployment", "later-workers")
    )
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "ResolvedRefs") == "ResolvedRefs")
    await cluster.until(lambda: reason(cluster, "RoutingPolicy", "policy", "ResolvedRefs") == "ResolvedRefs")


async def test_an_object_the_schema_let_through_gets_a_condition_and_no_retries(operator, cluster, make):
    cluster.put(make.pool(replicas=-3))
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "Accepted") == "Invalid")
    condition = cluster.conditions("ModelPool", "llama")["Accepted"]
    assert condition["message"] == "spec.replicas: must be at least 0; found -3"
    await poll(lambda: operator.queue.idle)
    errors = {"kind": "ModelPool", "result": "error"}
    assert not operator.metrics.registry.get_sample_value("kvfleet_operator_reconciles_total", errors)
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(replicas=3))
    cluster.put(make.profile())
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "Accepted") == "Accepted")


async def test_a_foreign_object_is_left_alone_until_it_is_out_of_the_way(operator, cluster, make):
    theirs = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "llama-workers"},
        "spec": {"replicas": 1},
    }
    before = copy.deepcopy(cluster.put(theirs))
    cluster.put(make.profile())
    cluster.put(make.pool(replicas=2))
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "Accepted") == "NameConflict")
    assert cluster.get("Deployment", "llama-workers") == before
    cluster.remove("Deployment", "llama-workers")
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(replicas=3))  # or the next resync
    await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "Accepted") == "Accepted")


async def test_one_node_more_turns_the_deployment_into_a_leader_worker_set(operator, cluster, make):
    await settled_pool(operator, cluster, make)
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(parallelism={"tensor": 8, "nodes": 2}))
    await cluster.until(
        lambda: cluster.get("LeaderWorkerSet", "llama-lws") and not cluster.get("Deployment", "llama-workers")
    )


async def test_an_autoscaled_pool_keeps_what_the_scaler_wrote(operator, cluster, make):
    cluster.put(make.profile())
    cluster.put(make.pool(autoscaling={"minReplicas": 1, "maxReplicas": 9}))
    await cluster.until(lambda: cluster.get("Deployment", "llama-workers"))

    def scale(found):
        found["spec"]["replicas"] = 6
        entry = {"manager": "kvfleet-autoscaler", "operation": "Update", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
        found["metadata"]["managedFields"] = [entry]

    cluster.edit("Deployment", "llama-workers", scale)
    cluster.edit("ModelPool", "llama", lambda found: found["spec"].update(engine={"args": ["--new"]}))
    await cluster.until(lambda: "--new" in str(cluster.get("Deployment", "llama-workers")))
    assert cluster.get("Deployment", "llama-workers")["spec"]["replicas"] == 6


async def test_policies_are_programmed_when_the_replicas_say_so(cluster, login, make, unused_tcp_port):
    async with running(login) as operator:
        await settled_pool(operator, cluster, make)
        cluster.put(make.policy())
        cluster.put(make.router(adminPort=unused_tcp_port))
        await cluster.until(lambda: cluster.get("Deployment", "router"))
        cluster.roll_out("router")
        await cluster.until(lambda: reason(cluster, "RoutingPolicy", "policy", "Programmed") == "NoRouterReady")
        async with replica(unused_tcp_port, cluster):
            cluster.put(make.router_pod())
            await cluster.until(
                lambda: ready(cluster, "RoutingPolicy", "policy") and ready(cluster, "FleetRouter", "router")
            )
            old = cluster.get("FleetRouter", "router")["status"]["revision"]
            pods = cluster.get("Deployment", "router")["spec"]["template"]
            cluster.edit("RoutingPolicy", "policy", lambda found: found["spec"].update(slo={"ttftMilliseconds": 5}))
            await cluster.until(lambda: cluster.get("FleetRouter", "router")["status"]["revision"] != old)
            await cluster.until(lambda: ready(cluster, "RoutingPolicy", "policy"))
            assert cluster.get("Deployment", "router")["spec"]["template"] == pods
        (by,) = cluster.get("RoutingPolicy", "policy")["status"]["programmedBy"]
        assert by["pod"] == "router-0" and by["revision"] != old


async def test_a_restart_in_a_settled_cluster_writes_nothing_but_the_lease(cluster, login, make, unused_tcp_port):
    async with replica(unused_tcp_port, cluster):
        async with running(login) as operator:
            await settled_pool(operator, cluster, make)
            cluster.put(make.policy())
            cluster.put(make.router(adminPort=unused_tcp_port))
            cluster.put(make.router_pod())
            await cluster.until(lambda: cluster.get("Deployment", "router"))
            cluster.roll_out("router")
            await cluster.until(
                lambda: ready(cluster, "RoutingPolicy", "policy") and ready(cluster, "FleetRouter", "router")
            )
            await poll(lambda: operator.queue.idle)
        cluster.writes.clear()
        async with running(login, resync_s=0.1) as operator:
            await rounds(cluster, 2)
            await poll(lambda: operator.queue.idle)
    assert {write[1] for write in cluster.writes} == {"leases"}


async def test_what_routers_learn_of_energy_is_in_the_statuses_and_small_moves_write_nothing(
    cluster, login, make, unused_tcp_port
):
    energy = {"source": "Measured", "trusted": True, "message": "", "error": 0.03, "intervals": 50, "estimates": {}}
    step = {"value": 3.1, "standard_error": 0.2}
    energy["estimates"]["StepEnergy"] = step
    view = {"mode": "Approximate", "reason": "NoTokenizer", "message": "", "energy": energy}
    async with replica(unused_tcp_port, cluster, lambda: {"llama": view}):
        async with running(login) as operator:
            await settled_pool(operator, cluster, make)
            cluster.put(make.policy())
            cluster.put(make.router(adminPort=unused_tcp_port, telemetry={"dcgmURLs": ["http://dcgm:9400/metrics"]}))
            cluster.put(make.router_pod())
            await cluster.until(lambda: cluster.get("Deployment", "router"))
            cluster.roll_out("router")
            await cluster.until(lambda: ready(cluster, "FleetRouter", "router"))
            await cluster.until(lambda: reason(cluster, "ModelPool", "llama", "EnergyTrusted") == "Measured")
            await cluster.until(lambda: cluster.get("AcceleratorProfile", "h100")["status"].get("estimates"))
            await poll(lambda: operator.queue.idle)
        learned = cluster.get("ModelPool", "llama")["status"]["energy"]["coefficients"]
        assert learned == [
            {"coefficient": "StepEnergy", "valueMicrounits": 3_100_000, "standardErrorMicrounits": 200_000}
        ]
        (estimate,) = cluster.get("AcceleratorProfile", "h100")["status"]["estimates"]
        assert (estimate["pool"], estimate["valueMicrounits"]) == ("default/llama", 3_100_000)
        cluster.writes.clear()
        step["value"], energy["intervals"] = 3.2, 60
        async with running(login, resync_s=0.1) as operator:
            await rounds(cluster, 2)
            await poll(lambda: operator.queue.idle)
    assert {write[1] for write in cluster.writes} == {"leases"}


async def test_failures_of_the_api_server_are_overcome(operator, cluster, make):
    path = "/apis/apps/v1/namespaces/default/deployments/llama-workers"
    cluster[f"patch {path}"][:2] << 503
    cluster.put(make.profile())
    cluster.put(make.pool())
    await cluster.until(lambda: cluster.get("Deployment", "llama-workers"))
    errors = {"kind": "ModelPool", "result": "error"}
    assert operator.metrics.registry.get_sample_value("kvfleet_operator_reconciles_total", errors) >= 2


async def test_what_a_silent_watch_withholds_is_found_by_the_resync(cluster, login, make):
    cluster.silent = set(KINDS)
    async with running(login, resync_s=0.2) as operator:
        await watching(cluster)
        cluster.put(make.profile())
        cluster.put(make.pool())
        await cluster.until(lambda: cluster.get("Deployment", "llama-workers"), timeout_s=30)
        name, labels = "kvfleet_operator_watch_missed_events_total", {"kind": "ModelPool"}
        assert operator.metrics.registry.get_sample_value(name, labels) == 1


async def test_in_fixed_namespaces_nothing_else_is_looked_at(cluster, login, make):
    async with running(login, namespaces=("team",)):
        elsewhere, own = make.pool(), make.pool("own")
        own["metadata"]["namespace"] = "team"
        cluster.put(make.profile())
        cluster.put(elsewhere)
        cluster.put(own)
        await cluster.until(lambda: cluster.get("Deployment", "own-workers", "team"))
        assert cluster.get("Deployment", "llama-workers") is None
    namespaced = {resource.plural for resource in BY_KIND.values() if resource.namespaced}
    asked = {
        request.namespace for request in cluster["get"] if request.resource and request.resource.plural in namespaced
    }
    assert asked <= {"team", "default"}  # the Lease is in default


async def test_a_standby_takes_over_when_the_leader_goes(cluster, login, make):
    times = {"lease_retry_s": 0.05}
    stop = asyncio.Event()
    second = Operator(
        OperatorOptions(
            lease_namespace="default", identity="second", metrics_host="127.0.0.1", metrics_port=0, **times
        ),
        login,
    )
    async with running(login, identity="first", **times):
        waiting = asyncio.create_task(second.run(stop))
        lease = "get /apis/coordination.k8s.io/v1/namespaces/default/leases/kvfleet-operator"
        await poll(lambda: len(cluster[lease]) > 4)
        assert not second.started.is_set()
        assert cluster.get("Lease", "kvfleet-operator")["spec"]["holderIdentity"] == "first"
    await asyncio.wait_for(second.started.wait(), 30)
    cluster.put(make.profile())
    cluster.put(make.pool())
    await cluster.until(lambda: cluster.get("Deployment", "llama-workers"))
    assert cluster.get("Lease", "kvfleet-operator")["spec"]["leaseTransitions"] == 1
    stop.set()
    assert await asyncio.wait_for(waiting, 20) == 0


async def test_a_standby_can_be_stopped_while_it_waits(cluster, login):
    async with running(login):
        options = OperatorOptions(
            lease_namespace="default", metrics_host="127.0.0.1", metrics_port=0, lease_retry_s=0.05
        )
        standby, stop = Operator(options, login), asyncio.Event()
        task = asyncio.create_task(standby.run(stop))
        await poll(lambda: standby.metrics.registry.get_sample_value("kvfleet_operator_leader") == 0)
        stop.set()
        assert await asyncio.wait_for(task, 10) == 0
        assert not standby.started.is_set()


def test_a_process_without_credentials_says_so_and_ends(caplog, tmp_path):
    assert run_operator(OperatorOptions(kubeconfig=str(tmp_path / "none"), metrics_port=0)) == 1
    assert "no credentials for a cluster" in caplog.text and "--kubeconfig" in caplog.text


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="workers at least 1"):
        OperatorOptions(workers=0)


async def test_a_leader_that_lost_its_lease_writes_nothing_more_and_ends(cluster, login, make):
    times = {"lease_retry_s": 0.05}
    options = OperatorOptions(
        lease_namespace="default", metrics_host="127.0.0.1", metrics_port=0, debounce_s=0.005, **times
    )
    operator = Operator(options, login)
    task = asyncio.create_task(operator.run(asyncio.Event()))
    await asyncio.wait_for(operator.started.wait(), 30)
    await watching(cluster)
    cluster.edit("Lease", "kvfleet-operator", lambda found: found["spec"].update(holderIdentity="usurper"))
    assert await asyncio.wait_for(task, 20) == 1
    cluster.put(make.profile())
    cluster.put(make.pool())
    assert cluster.get("Deployment", "llama-workers") is None
    assert cluster.get("Lease", "kvfleet-operator")["spec"]["holderIdentity"] == "usurper"
    assert operator.metrics.registry.get_sample_value("kvfleet_operator_leader") == 0
