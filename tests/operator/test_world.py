"""The observed world: versions only grow, derived state is fresh, changes reach what depends on them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_manifests import pool as pool_manifest
from operator_manifests import router as router_manifest

from kvfleet_api.manifests import KINDS
from kvfleet_operator.reconcile.adapters import WorkerAdapters
from kvfleet_operator.reconcile.dependents import Key, dependents
from kvfleet_operator.reconcile.names import label_value
from kvfleet_operator.reconcile.plan import Plan, kind_name, leftovers
from kvfleet_operator.reconcile.routingpolicy import Loaded
from kvfleet_operator.world import World


def at(manifest, version, uid="u1", **metadata):
    manifest["metadata"] |= {"resourceVersion": str(version), "uid": uid, **metadata}
    return manifest


@pytest.fixture
def world():
    return World()


def test_an_event_that_comes_late_never_overwrites_something_newer(world, make):
    assert world.put(at(make.pool(replicas=2), 5))
    assert not world.put(at(make.pool(replicas=1), 4))
    assert not world.put(at(make.pool(replicas=1), 5))
    assert world.parsed(Key("ModelPool", "default", "llama")).spec.replicas == 2


def test_the_end_of_a_namesake_does_not_remove_its_successor(world, make):
    world.put(at(make.pool(), 9, uid="new"))
    assert not world.remove(at(make.pool(), 8, uid="old"))
    assert world.keys("ModelPool") == [Key("ModelPool", "default", "llama")]
    assert world.remove(at(make.pool(), 10, uid="new"))
    assert world.keys("ModelPool") == []


def test_the_late_answer_to_a_write_does_not_bring_a_deleted_object_back(world, make):
    world.put(at(make.pool(), 5))
    world.remove(at(make.pool(), 9))
    assert not world.put(at(make.pool(), 8))
    assert world.keys("ModelPool") == []
    assert world.put(at(make.pool(), 10, uid="a successor"))


def test_what_only_left_the_selector_can_come_back(world, make):
    world.put(at(make.router_pod(), 5))
    world.remove(at(make.router_pod(), 6))  # its label was taken away, and the watch ends it so
    assert not world.put(at(make.router_pod(), 6))
    assert world.put(at(make.router_pod(), 7))


def test_what_is_wrong_with_an_object_is_kept_in_its_place(world, make):
    world.put(at(make.pool(replicas=-1), 1))
    problems = world.parsed(Key("ModelPool", "default", "llama"))
    assert [str(problem) for problem in problems] == ["spec.replicas: must be at least 0; found -1"]
    assert world.pools() == []


def test_the_compiled_fleet_follows_specs_and_is_shared_otherwise(world, make):
    world.put(at(make.profile(), 1))
    world.put(at(make.pool(), 2, generation=1))
    first = world.fleet("default")
    assert world.fleet("default") is first
    world.put(at({**make.pool(), "status": {"replicas": 1}}, 3, generation=1))  # status only
    assert world.fleet("default") is first
    world.put(at(make.pool(replicas=4), 4, generation=2))
    assert world.fleet("default") is not first
    second = world.fleet("default")
    world.put(at(make.profile(product="other"), 5, generation=2))
    assert world.fleet("default") is not second


def test_pods_and_managed_fields_do_not_fill_the_memory(world, make):
    pod = at(make.router_pod(), 1)
    pod["spec"] = {"containers": ["…"]}
    world.put(pod)
    assert world.get(Key("Pod", "default", "router-0"))["spec"] == {}
    config = {"kind": "ConfigMap", "metadata": {"name": "c", "namespace": "default", "managedFields": [1]}}
    world.put(at(config, 2))
    assert "managedFields" not in world.get(Key("ConfigMap", "default", "c"))["metadata"]


def test_only_ready_pods_of_the_router_count_as_replicas(world, make):
    router = make.parse(make.router())
    for version, pod in enumerate(
        [
            make.router_pod("a", "10.0.0.1"),
            make.router_pod("b", ready=False),
            make.router_pod("c", router="other"),
            make.router_pod("d"),
        ]
    ):
        world.put(at(pod, version + 1, uid=pod["metadata"]["name"]))
    leaving = at(make.router_pod("d"), 9, uid="d", deletionTimestamp="2026-01-01T00:00:00Z")
    world.put(leaving)
    assert world.router_pods(router) == {"a": "10.0.0.1"}
    world.reports["default", "a"] = Loaded("abc")
    assert world.replicas(router) == {"a": Loaded("abc")}
    world.remove(at(make.router_pod("a"), 10, uid="a"))
    assert world.reports == {}


def test_ready_workers_are_known_with_what_their_engines_can_load(world, make):
    long = "a-pool-with-a-name-of-no-less-than-sixty-three-characters-so-it"
    for version, pod in enumerate(
        [
            make.worker_pod("a", "10.0.0.1"),
            make.worker_pod("b", "10.0.0.2", with_lora=False),
            make.worker_pod("c", ready=False),
            make.worker_pod("d", pool="other"),
            make.worker_pod("e", pool=label_value(long)),
        ]
    ):
        world.put(at(pod, version + 1, uid=pod["metadata"]["name"]))
    follower = at(make.worker_pod("f"), 9, uid="f")
    follower["metadata"]["labels"]["app.kubernetes.io/component"] = "engine-follower"
    world.put(follower)
    pool = make.parse(make.pool())
    assert {name: pod.ip for name, pod in world.lora_workers(pool).items()} == {"a": "10.0.0.1"}
    assert world.worker_adapters(pool) == {"a": None, "b": WorkerAdapters(lora=False)}
    world.adapters["default", "a"] = WorkerAdapters({"sql": "/a"})
    assert world.worker_adapters(pool)["a"].loaded == {"sql": "/a"}
    assert list(world.lora_workers(make.parse(make.pool(long)))) == ["e"]
    world.remove(at(make.worker_pod("a"), 10, uid="a"))
    assert world.adapters == {}
    assert world.worker_adapters(pool).keys() == {"b"}


def test_a_worker_whose_engine_was_restarted_is_another_one(world, make):
    pool = make.parse(make.pool())

    def incarnation(version, **changes):
        world.put(at(make.worker_pod(**changes), version))
        return {name: pod.incarnation for name, pod in world.lora_workers(pool).items()}

    first = incarnation(1, since="2026-01-01T00:00:00Z")
    assert incarnation(2, since="2026-01-01T00:00:00Z") == first
    assert incarnation(3, ready=False) == {}
    assert incarnation(4, since="2026-01-01T00:00:30Z") != first


PODS = st.tuples(st.sampled_from("ab"), st.sampled_from(["llama", "other", None]), st.sampled_from(["router", None]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), PODS), max_size=20))
def test_pods_are_found_by_what_their_labels_say_now(steps):
    world, labelled = World(), {}
    for version, (present, (name, pool, router)) in enumerate(steps, 1):
        labels = {"kvfleet.io/pool": pool, "kvfleet.io/router": router, "app.kubernetes.io/component": "engine"}
        labels = {key: value for key, value in labels.items() if value}
        metadata = {
            "name": name,
            "namespace": "default",
            "labels": labels,
            "uid": name,
            "resourceVersion": str(version),
        }
        conditions = [{"type": "Ready", "status": "True"}]
        pod = {"kind": "Pod", "metadata": metadata, "status": {"podIP": "10.0.0.1", "conditions": conditions}}
        if present:
            world.put(pod)
            labelled[name] = (pool, router)
        else:
            world.remove(pod)
            labelled.pop(name, None)
    for pool in ("llama", "other"):
        found = world.worker_adapters(KINDS["ModelPool"].model_validate(pool_manifest(pool)))
        assert found.keys() == {name for name, (of, _) in labelled.items() if of == pool}
    routers = world.router_pods(KINDS["FleetRouter"].model_validate(router_manifest("router")))
    assert routers.keys() == {name for name, (_, of) in labelled.items() if of == "router"}


def test_every_kind_reaches_what_depends_on_it(world, make):
    world.put(at(make.profile(), 1))
    for version, manifest in enumerate(
        [make.pool(), make.pool("other", profile="a100"), make.policy(), make.router(), make.router("second")]
    ):
        world.put(at(manifest, version + 2, uid=manifest["metadata"]["name"]))
    routing = {"RoutingPolicy policy", "FleetRouter router", "FleetRouter second"}

    def reached(manifest):
        return {f"{key.kind} {key.name}" for key in dependents(manifest, world)}

    assert reached(make.profile()) == {"AcceleratorProfile h100", "ModelPool llama", *routing}
    assert reached(make.pool()) == {"ModelPool llama", "ModelPool other", "AcceleratorProfile h100", *routing}
    assert reached(make.policy()) == routing
    assert reached(make.router()) == {"FleetRouter router", "RoutingPolicy policy"}
    assert reached(make.router_pod()) == routing
    assert reached(make.worker_pod()) == {"ModelPool llama"}
    assert reached(make.worker_pod(with_lora=False)) == set()
    owner = {"kind": "ModelPool", "name": "llama", "controller": True}
    child = {"kind": "Deployment", "metadata": {"name": "x", "namespace": "default", "ownerReferences": [owner]}}
    assert reached(child) == {"ModelPool llama"}
    assert reached({"kind": "Deployment", "metadata": {"name": "x", "namespace": "default"}}) == set()
    broken = {**make.pool(), "spec": None}
    assert "ModelPool llama" in reached(broken)


def test_changes_of_other_namespaces_reach_nothing_here(world, make):
    world.put(at(make.router(), 1))
    elsewhere = make.policy()
    elsewhere["metadata"]["namespace"] = "elsewhere"
    assert dependents(elsewhere, world) == {Key("RoutingPolicy", "elsewhere", "policy")}


# Owned-only deletion

LABELS = st.sampled_from([{}, {"app.kubernetes.io/managed-by": "kvfleet-operator", "kvfleet.io/pool": "llama"}])
OWNERS = st.lists(
    st.fixed_dictionaries({
        "kind": st.just("ModelPool"), "name": st.just("llama"),
        "uid": st.sampled_from(["ours", "other"]), "controller": st.booleans(),
    }),
    max_size=2,
)  # fmt: skip
OBJECTS = st.builds(
    lambda kind, name, namespace, labels, owners: {
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace, "labels": labels, "ownerReferences": owners, "uid": f"{kind}{name}{namespace}"},
    },
    st.sampled_from(["Deployment", "Service", "ConfigMap", "Pod", "FleetRouter"]),
    st.sampled_from(["llama-workers", "a", "b"]), st.sampled_from(["default", "elsewhere"]), LABELS, OWNERS,
)  # fmt: skip
WANTED = st.frozensets(st.tuples(st.sampled_from(["Deployment", "Service"]), st.sampled_from(["llama-workers", "a"])))


@settings(max_examples=200, deadline=None)
@given(st.lists(OBJECTS, max_size=8), WANTED, WANTED)
def test_only_what_the_owner_controls_and_nobody_wants_is_ever_deleted(objects, wanted, untouched):
    world = World()
    for version, manifest in enumerate(objects):
        world.put(at(manifest, version + 1, uid=manifest["metadata"]["uid"]))
    owner = KINDS["ModelPool"].model_validate(pool_manifest(metadata={"uid": "ours"}))
    plan = Plan([{"kind": kind, "metadata": {"name": name}} for kind, name in wanted], untouched)
    doomed = {
        (m["kind"], m["metadata"]["namespace"], m["metadata"]["name"]) for m in leftovers(world.children(owner), plan)
    }
    last = {(m["kind"], m["metadata"]["namespace"], m["metadata"]["name"]): m for m in objects}
    for place, manifest in last.items():
        controllers = [ref["uid"] for ref in manifest["metadata"]["ownerReferences"] if ref["controller"]]
        mine = controllers[:1] == ["ours"] and place[1] == "default" and place[0] not in ("Pod", "FleetRouter")
        assert (place in doomed) == (mine and kind_name(manifest) not in wanted | untouched)
