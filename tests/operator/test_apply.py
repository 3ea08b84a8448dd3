"""Bringing a plan about: writes only where something differs, never on what is not ours."""

import copy

import pytest

from kvfleet_api.compile import compile_fleet
from kvfleet_operator.api import ApiError
from kvfleet_operator.apply import Applier, OwnerGone
from kvfleet_operator.reconcile import fleetrouter, modelpool
from kvfleet_operator.reconcile.plan import Plan
from kvfleet_operator.world import World

DEPLOYMENT, SERVICE = ("Deployment", "llama-workers"), ("Service", "llama-workers")


@pytest.fixture
def world():
    return World()


@pytest.fixture
def applier(api, world):
    return Applier(api, world)


@pytest.fixture
def pool(cluster, make):
    """A ModelPool the API server knows."""
    return make.parse(cluster.put(make.pool(replicas=2)))


def plan_for(make, pool):
    return modelpool.children(modelpool.PoolInput(pool, make.parse(make.profile())))


async def bring_about(applier, make, pool):
    return await applier.bring_about(pool, plan_for(make, pool))


async def test_children_are_created_with_their_owner_as_controller(applier, cluster, make, pool):
    applied, written = await bring_about(applier, make, pool)
    assert written and not applied.rejections
    assert set(applied.live) == {DEPLOYMENT, SERVICE, ("PodDisruptionBudget", "llama-workers")}
    owner = cluster.get(*DEPLOYMENT)["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["name"], owner["controller"]) == ("ModelPool", "llama", True)


async def test_applying_again_makes_no_request_at_all(applier, cluster, make, pool):
    await bring_about(applier, make, pool)
    before = len(cluster)
    _, written = await bring_about(applier, make, pool)
    assert not written
    assert len(cluster) == before


async def test_a_restarted_operator_reads_and_writes_nothing(api, applier, cluster, make, pool):
    await bring_about(applier, make, pool)
    cluster.writes.clear()
    _, written = await bring_about(Applier(api, World()), make, pool)
    assert not written
    assert cluster.writes == []


async def test_drift_in_our_fields_is_repaired_and_others_additions_stay(applier, world, cluster, make, pool):
    await bring_about(applier, make, pool)

    def meddle(found):
        found["spec"]["template"]["spec"]["containers"][0]["image"] = "evil"
        found["metadata"]["labels"]["theirs"] = "kept"

    world.put(cluster.edit(*DEPLOYMENT, meddle))
    await bring_about(applier, make, pool)
    live = cluster.get(*DEPLOYMENT)
    assert live["spec"]["template"]["spec"]["containers"][0]["image"] == "vllm/vllm-openai:v0.32.0"
    assert live["metadata"]["labels"]["theirs"] == "kept"
    assert [write[:2] for write in cluster.writes][-1] == ("patch", "deployments")


async def test_an_addition_that_excludes_ours_is_removed(applier, world, cluster, make, pool):
    """Server-side apply alone would add our port beside the foreign one of the same name, and be refused."""
    await bring_about(applier, make, pool)
    before = cluster.get(*SERVICE)["spec"]["ports"]
    world.put(cluster.edit(*SERVICE, lambda found: found["spec"].update(ports=[{"name": "http", "port": 1}])))
    applied, _ = await bring_about(applier, make, pool)
    assert not applied.rejections
    assert cluster.get(*SERVICE)["spec"]["ports"] == before
    _, written = await bring_about(applier, make, pool)
    assert not written


async def test_what_a_spec_no_longer_says_is_removed_from_the_child(applier, cluster, make, pool):
    def with_env(env):
        return make.parse(
            cluster.put(
                {
                    **make.pool(replicas=2, engine={"env": env}),
                    "metadata": {**make.pool()["metadata"], "uid": pool.metadata.uid},
                }
            )
        )

    await bring_about(applier, make, with_env([{"name": "A", "value": "1"}]))
    assert "A" in str(cluster.get(*DEPLOYMENT)["spec"])
    await bring_about(applier, make, with_env([]))
    names = [e["name"] for e in cluster.get(*DEPLOYMENT)["spec"]["template"]["spec"]["containers"][0]["env"]]
    assert "A" not in names and "HF_HOME" in names


async def test_a_foreign_namesake_is_never_touched(applier, cluster, make, pool):
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "llama-workers"}, "spec": {"ports": []}}
    before = copy.deepcopy(cluster.put(theirs))
    applied, _ = await bring_about(applier, make, pool)
    assert [(r.kind, r.reason) for r in applied.rejections] == [("Service", "NameConflict")]
    assert "was not made by kvfleet" in applied.rejections[0].message
    assert cluster.get(*SERVICE) == before
    assert cluster.get(*DEPLOYMENT)  # the others are brought about all the same


@pytest.mark.parametrize(
    ("kind", "held"), [("ServiceAccount", ["RoleBinding", "Deployment"]), ("ConfigMap", ["Deployment"])]
)
async def test_no_pod_runs_under_a_foreign_namesake(applier, cluster, make, kind, held):
    router = make.parse(cluster.put(make.router()))
    cluster.put({"apiVersion": "v1", "kind": kind, "metadata": {"name": "router"}})
    plan = fleetrouter.children(fleetrouter.RouterInput(router, compile_fleet(router, [], [], []), {}))
    applied, _ = await applier.bring_about(router, plan)
    assert [(r.kind, r.reason) for r in applied.rejections] == [(kind, "NameConflict")]
    wanted = {child["kind"] for child in plan.objects}
    assert {name for name, _ in applied.live} == wanted - {kind, *held}
    cluster.remove(kind, "router")
    applied, _ = await applier.bring_about(router, plan)
    assert {name for name, _ in applied.live} == wanted


async def test_a_child_of_another_owner_is_never_touched(applier, cluster, make, pool):
    owner = {"apiVersion": "x/v1", "kind": "Other", "name": "o", "uid": "else", "controller": True}
    labels = {"app.kubernetes.io/managed-by": "kvfleet-operator"}
    metadata = {"name": "llama-workers", "labels": labels, "ownerReferences": [owner]}
    cluster.put({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {}})
    applied, _ = await bring_about(applier, make, pool)
    assert "belongs to Other o" in applied.rejections[0].message


async def test_an_orphan_with_our_labels_is_adopted(applier, cluster, make, pool):
    rendered = copy.deepcopy(plan_for(make, pool).objects[0])
    del rendered["metadata"]["ownerReferences"]
    cluster.put(rendered)
    applied, _ = await bring_about(applier, make, pool)
    assert not applied.rejections
    assert cluster.get(*SERVICE)["metadata"]["ownerReferences"][0]["uid"] == pool.metadata.uid


async def test_children_of_a_former_owner_are_waited_for(applier, cluster, make, pool):
    old = make.parse(make.pool(metadata={"uid": "former"}))
    cluster.put(plan_for(make, old).objects[0])
    applied, _ = await bring_about(applier, make, pool)
    assert [r.reason for r in applied.rejections] == ["Terminating"]
    assert cluster.get(*SERVICE)["metadata"]["ownerReferences"][0]["uid"] == "former"


async def test_a_child_on_its_way_out_is_left_alone(applier, world, cluster, make, pool):
    await bring_about(applier, make, pool)
    world.put(cluster.edit(*SERVICE, lambda found: found["metadata"].update(deletionTimestamp="2026-01-01T00:00:00Z")))
    cluster.writes.clear()
    applied, _ = await bring_about(applier, make, pool)
    assert [r.reason for r in applied.rejections] == ["Terminating"]
    assert cluster.writes == []


@pytest.mark.parametrize("ending", ["deleted", "deleting", "replaced"])
async def test_nothing_is_created_for_an_owner_whose_end_was_not_yet_noticed(applier, cluster, make, pool, ending):
    cluster.remove("ModelPool", "llama") if ending != "deleting" else None
    if ending == "replaced":
        cluster.put(make.pool())
    if ending == "deleting":
        cluster.edit(
            "ModelPool", "llama", lambda found: found["metadata"].update(deletionTimestamp="2026-01-01T00:00:00Z")
        )
    with pytest.raises(OwnerGone):
        await bring_about(applier, make, pool)
    assert cluster.writes == []


async def test_owned_leftovers_go_and_nothing_else(applier, cluster, make, pool):
    await bring_about(applier, make, pool)
    bystander = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "bystander"}, "data": {}}
    cluster.put(bystander)
    wanted = plan_for(make, pool)
    without_service = Plan([child for child in wanted.objects if child["kind"] != "Service"])
    _, written = await applier.bring_about(pool, without_service)
    assert written
    assert cluster.get(*SERVICE) is None
    assert cluster.get("ConfigMap", "bystander") and cluster.get(*DEPLOYMENT)


async def test_an_untouched_child_is_neither_written_nor_deleted(applier, world, cluster, make, pool):
    await bring_about(applier, make, pool)
    world.put(cluster.edit(*DEPLOYMENT, lambda found: found["spec"].update(replicas=9)))
    wanted = plan_for(make, pool)
    held = Plan([child for child in wanted.objects if child["kind"] != "Deployment"], frozenset({DEPLOYMENT}))
    _, written = await applier.bring_about(pool, held)
    assert not written
    assert cluster.get(*DEPLOYMENT)["spec"]["replicas"] == 9


async def test_what_a_webhook_changes_is_not_fought_over(applier, world, cluster, make, pool):
    def mutate(manifest):
        if manifest["kind"] == "Deployment":
            manifest["spec"]["template"]["spec"]["containers"][0]["image"] = "mirror/vllm"

    cluster.normalise = mutate
    await bring_about(applier, make, pool)
    cluster.writes.clear()
    _, written = await bring_about(applier, make, pool)
    assert not written and cluster.writes == []
    world.put(cluster.edit(*DEPLOYMENT, lambda found: found["spec"].update(replicas=9)))  # real drift beside it
    await bring_about(applier, make, pool)
    assert cluster.get(*DEPLOYMENT)["spec"]["replicas"] == 2


async def test_a_namesake_created_meanwhile_is_not_overwritten(applier, cluster, make, pool):
    child = plan_for(make, pool).objects[0]
    with pytest.raises(ApiError) as raised:
        cluster.put({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "llama-workers"}, "spec": {}})
        await applier._apply(child, force=False)
    assert raised.value.status == 409
    bound = {**child, "metadata": {**child["metadata"], "uid": "the one we saw"}}
    with pytest.raises(ApiError) as raised:
        await applier._apply(bound, force=True)
    assert raised.value.status == 409


@pytest.mark.parametrize(("status", "reason"), [(422, "Rejected"), (403, "Rejected"), (404, "KindNotInstalled")])
async def test_a_refusal_is_told_and_does_not_stop_the_others(applier, cluster, make, pool, status, reason):
    path = "/apis/policy/v1/namespaces/default/poddisruptionbudgets/llama-workers"
    body = {"kind": "Status", "message": "not like this", "reason": "Because"}
    cluster[f"patch {path}"] << status << body
    applied, _ = await bring_about(applier, make, pool)
    assert [(r.kind, r.reason) for r in applied.rejections] == [("PodDisruptionBudget", reason)]
    assert cluster.get(*DEPLOYMENT)


async def test_a_missing_right_is_told_whatever_it_is_for(applier, cluster, make, pool):
    body = {"kind": "Status", "message": "services is forbidden:\nUser kvfleet cannot get it", "reason": "Forbidden"}
    cluster["get /api/v1/namespaces/default/services/llama-workers"] << 403 << body
    applied, _ = await bring_about(applier, make, pool)
    assert [(r.kind, r.reason) for r in applied.rejections] == [("Service", "Rejected")]
    assert "services is forbidden: User" in applied.rejections[0].message
    cluster["delete /apis/apps/v1/namespaces/default/deployments/llama-workers"] << 403 << body
    applied, _ = await applier.bring_about(pool, Plan([]))
    assert [(r.kind, r.reason) for r in applied.rejections] == [("Deployment", "Rejected")]


async def test_a_dying_namespace_is_no_missing_right(applier, cluster, make, pool, metrics):
    """As kube-apiserver 1.34 answers, shortened."""
    why = {
        "reason": "NamespaceTerminating",
        "message": "namespace default is being terminated",
        "field": "metadata.namespace",
    }
    body = {
        "kind": "Status", "status": "Failure", "reason": "Forbidden", "code": 403,
        "message": 'poddisruptionbudgets.policy "llama-workers" is forbidden: unable to create new content in namespace default'
        " because it is being terminated",
        "details": {"name": "llama-workers", "kind": "poddisruptionbudgets", "causes": [why]},
    }  # fmt: skip
    cluster["patch /apis/policy/v1/namespaces/default/poddisruptionbudgets/llama-workers"] << 403 << body
    applied, _ = await bring_about(applier, make, pool)
    assert [(r.kind, r.reason) for r in applied.rejections] == [("PodDisruptionBudget", "Terminating")]
    codes = {
        sample.labels["code"]: sample.value
        for family in metrics.api_requests.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["resource"] == "poddisruptionbudgets"
    }
    assert codes.get("NamespaceTerminating") == 1
    assert "403" not in codes


async def test_a_passing_failure_is_raised_to_be_tried_again(applier, cluster, make, pool):
    cluster["patch /apis/policy/v1/namespaces/default/poddisruptionbudgets/llama-workers"] << 503
    with pytest.raises(ApiError) as raised:
        await bring_about(applier, make, pool)
    assert not raised.value.permanent
