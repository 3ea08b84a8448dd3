"""ModelPool: what it wants and what it reports, over everything that can be the case around it."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet_api.compile import compile_fleet
from kvfleet_api.manifests import KINDS
from kvfleet_operator.reconcile import modelpool, rollout
from kvfleet_operator.reconcile.adapters import WorkerAdapters
from kvfleet_operator.reconcile.drift import difference
from kvfleet_operator.reconcile.plan import Applied, Rejection, kind_name
from kvfleet_operator.statuses import changes

UID = {"uid": "u1", "generation": 3}


def given_for(make, profile=True, live=None, metadata=UID, workers=None, **spec):
    pool = make.parse(make.pool(metadata=metadata, **spec))
    profiles = [make.parse(make.profile())] if profile else []
    problems = [p for p in compile_fleet(None, [pool], [], profiles).problems if p.name == pool.metadata.name]
    return modelpool.PoolInput(pool, profiles[0] if profiles else None, problems, live, workers or {})


def workload(ready=2, wanted=2, **status):
    full = {"observedGeneration": 1, "replicas": wanted, "updatedReplicas": wanted, "readyReplicas": ready, **status}
    metadata = {"name": "llama-workers", "generation": 1}
    return {"kind": "Deployment", "metadata": metadata, "spec": {"replicas": wanted}, "status": full}


def conditions_of(given, live=None, rejections=()):
    applied = Applied(list(rejections), {("Deployment", "llama-workers"): live} if live else {})
    status = modelpool.status(given, applied, "2026-01-01T00:00:00Z")
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}, status


def test_a_rolled_out_pool_is_ready(make):
    conditions, status = conditions_of(given_for(make, replicas=2), workload())
    assert conditions == {
        "Accepted": ("True", "Accepted"),
        "ResolvedRefs": ("True", "ResolvedRefs"),
        "Available": ("True", "MinimumReady"),
        "Progressing": ("False", "Complete"),
        "Ready": ("True", "Ready"),
    }
    assert (status["replicas"], status["readyReplicas"], status["observedGeneration"]) == (2, 2, 3)
    assert status["selector"] == "app.kubernetes.io/component=engine,kvfleet.io/pool=llama"


@pytest.mark.parametrize(
    ("live", "available", "progressing", "ready"),
    [
        (None, ("False", "NotCreated"), ("False", "NotCreated"), ("False", "NotCreated")),
        (workload(ready=0), ("False", "NoneReady"), ("True", "RollingOut"), ("False", "RollingOut")),
        (workload(ready=1), ("True", "MinimumReady"), ("True", "RollingOut"), ("False", "RollingOut")),
        (workload(updatedReplicas=1), ("True", "MinimumReady"), ("True", "RollingOut"), ("False", "RollingOut")),
        (workload(observedGeneration=0), ("True", "MinimumReady"), ("True", "RollingOut"), ("False", "RollingOut")),
        (workload(ready=0, wanted=0), ("False", "ScaledToZero"), ("False", "Complete"), ("True", "Ready")),
        (
            workload(ready=1, conditions=[{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]),
            ("True", "MinimumReady"), ("False", "Stuck"), ("False", "Stuck"),
        ),
        (
            workload(ready=0, conditions=[{"type": "ReplicaFailure", "status": "True", "message": "quota exceeded"}]),
            ("False", "NoneReady"), ("False", "Stuck"), ("False", "Stuck"),
        ),
    ],
)  # fmt: skip
def test_readiness_follows_the_workload(make, live, available, progressing, ready):
    conditions, _ = conditions_of(given_for(make, replicas=2), live)
    assert (conditions["Available"], conditions["Progressing"], conditions["Ready"]) == (available, progressing, ready)


@pytest.mark.parametrize(
    ("says", "complete"),
    [({}, False), ({"Progressing": "True", "Available": "False"}, False), ({"Available": "True"}, True)],
)
def test_a_group_that_is_about_to_be_replaced_is_no_end_of_a_rollout(says, complete):
    """While a surged group stands in for one that is not replaced yet, the counts are already as wanted."""
    live = workload(conditions=[{"type": kind, "status": status} for kind, status in says.items()])
    del live["status"]["observedGeneration"]
    read = rollout.read(live | {"kind": "LeaderWorkerSet"})
    assert read.complete is complete
    assert rollout.read(live).complete is False, "a Deployment says which generation it has seen"


def test_a_missing_profile_holds_a_new_workload_back_and_leaves_a_running_one_alone(make):
    given = given_for(make, profile=False)
    plan = modelpool.children(given)
    assert {kind for kind, _ in map(kind_name, plan.objects)} == {"Service", "PodDisruptionBudget"}
    assert ("Deployment", "llama-workers") in plan.untouched
    conditions, _ = conditions_of(given, workload())
    assert conditions["ResolvedRefs"] == ("False", "ProfileNotFound")
    assert conditions["Available"] == ("True", "MinimumReady")
    assert conditions["Ready"] == ("False", "ProfileNotFound")


def test_a_foreign_object_and_a_refused_one_are_told_in_accepted(make):
    for reason in ("NameConflict", "Rejected"):
        rejection = Rejection("Deployment", "llama-workers", reason, "what is wrong")
        conditions, status = conditions_of(given_for(make), None, [rejection])
        assert conditions["Accepted"] == conditions["Ready"] == ("False", reason)
        assert "what is wrong" in status["conditions"][0]["message"]


def test_a_misfit_pod_template_changes_nothing_that_runs(make):
    given = given_for(make, podTemplate={"spec": {"containers": [{"image": "x"}]}})
    plan = modelpool.children(given)
    assert ("Deployment", "llama-workers") in plan.untouched
    assert "Deployment" not in {manifest["kind"] for manifest in plan.objects}
    conditions, _ = conditions_of(given, workload())
    assert conditions["Accepted"] == ("False", "InvalidPodTemplate")


def test_arguments_that_cut_the_wiring_warn_without_refusing(make):
    conditions, _ = conditions_of(given_for(make, replicas=2, engine={"args": ["--port", "1"]}), workload())
    assert conditions["Accepted"] == ("True", "AcceptedWithWarnings")
    assert conditions["Ready"] == ("True", "Ready")


def test_an_unknown_cost_warns_without_refusing(make):
    given = given_for(make, replicas=2, model={"name": "mystery"})
    conditions, status = conditions_of(given, workload())
    assert conditions["Accepted"] == ("True", "AcceptedWithWarnings")
    assert conditions["Ready"] == ("True", "Ready")
    message = status["conditions"][0]["message"]
    assert "spec.model.parametersMillions" in message and "generic cost" in message


def test_a_name_that_is_taken_refuses_and_its_message_carries_the_warnings_too(make):
    adapters = [{"name": "qwen-8b", "uri": "/a"}]
    pool = make.parse(make.pool(metadata=UID, model={"name": "mystery"}, adapters=adapters))
    other = make.parse(make.pool("other", model={"name": "qwen-8b"}))
    profiles = [make.parse(make.profile())]
    problems = [p for p in compile_fleet(None, [pool, other], [], profiles).problems if p.name == "llama"]
    conditions, status = conditions_of(modelpool.PoolInput(pool, profiles[0], problems), workload())
    assert conditions["Accepted"] == ("False", "NameTaken")
    message = status["conditions"][0]["message"]
    assert "spec.adapters[0].name" in message and "spec.model.parametersMillions" in message


# Adapters

SQL, LAW = {"name": "sql", "uri": "/a"}, {"name": "law", "uri": "/b"}


def test_adapters_are_reported_as_every_ready_worker_has_them(make):
    both, one = WorkerAdapters({"sql": "/a", "law": "/b"}), WorkerAdapters({"law": "/b"})
    given = given_for(make, replicas=2, adapters=[SQL, LAW], workers={"a": both, "b": one})
    conditions, status = conditions_of(given, workload())
    assert status["adapters"] == ["law"]
    assert conditions["AdaptersLoaded"] == ("Unknown", "Loading")
    assert conditions["Ready"] == ("False", "Loading")
    given = given_for(make, replicas=2, adapters=[SQL, LAW], workers={"a": both, "b": both, "just came": None})
    conditions, status = conditions_of(given, workload())
    assert status["adapters"] == ["sql", "law"]
    assert conditions["AdaptersLoaded"] == ("True", "Loaded") and conditions["Ready"] == ("True", "Ready")


def test_an_adapter_that_does_not_load_keeps_the_pool_from_ready(make):
    failed = WorkerAdapters({}, {"sql": "no such path"})
    conditions, _ = conditions_of(given_for(make, adapters=[SQL], workers={"a": failed}), workload(1, 1))
    assert conditions["AdaptersLoaded"] == conditions["Ready"] == ("False", "LoadFailed")
    assert conditions["Available"] == ("True", "MinimumReady")


def test_only_pools_with_adapters_speak_of_them_and_those_that_had_some(make):
    conditions, _ = conditions_of(given_for(make, replicas=2), workload())
    assert "AdaptersLoaded" not in conditions
    before = {"conditions": [{"type": "AdaptersLoaded", "status": "False", "reason": "LoadFailed"}]}
    pool = make.parse({**make.pool(metadata=UID), "status": before})
    given = modelpool.PoolInput(pool, make.parse(make.profile()), (), {}, {"a": WorkerAdapters()})
    conditions, _ = conditions_of(given, workload())
    assert conditions["AdaptersLoaded"] == ("True", "NoAdapters")


def test_the_list_of_adapters_stays_where_the_workload_is_left_alone(make):
    """Its workers mount it."""
    spec = {"adapters": [SQL]}
    for unbuilt in (given_for(make, profile=False, **spec), given_for(make, podTemplate={"spec": 1}, **spec)):
        wanted = {kind_name(manifest) for manifest in modelpool.children(unbuilt).objects}
        assert ("ConfigMap", "llama-adapters") in wanted


# replicas


def replicas_of(make, live=None, **spec):
    given = given_for(make, live={("Deployment", "llama-workers"): live} if live else None, **spec)
    return next(m for m in modelpool.children(given).objects if m["kind"] == "Deployment")["spec"].get("replicas")


def scaled(replicas, *managers):
    fields = [{"manager": name, "fieldsV1": {"f:spec": {"f:replicas": {}}}} for name in managers]
    return {"kind": "Deployment", "metadata": {"managedFields": fields}, "spec": {"replicas": replicas}}


def test_fixed_replicas_are_always_stated(make):
    assert replicas_of(make) == 1
    assert replicas_of(make, replicas=0) == 0
    assert replicas_of(make, live=scaled(5, "kubectl"), replicas=3) == 3


def test_an_autoscaled_pool_starts_at_its_minimum_and_is_then_the_scalers(make):
    autoscaling = {"minReplicas": 2, "maxReplicas": 9}
    assert replicas_of(make, autoscaling=autoscaling) == 2
    assert replicas_of(make, live=scaled(2, "kvfleet-operator"), autoscaling=autoscaling) == 2
    assert replicas_of(make, live=scaled(7, "kvfleet-autoscaler"), autoscaling=autoscaling) is None
    assert replicas_of(make, live=scaled(7, "kvfleet-operator", "kvfleet-autoscaler"), autoscaling=autoscaling) is None


def test_switching_to_autoscaling_keeps_the_present_size_until_the_scaler_takes_over(make):
    assert replicas_of(make, live=scaled(6, "kvfleet-operator"), autoscaling={"minReplicas": 1, "maxReplicas": 9}) == 6


# Idempotence

SPECS = st.fixed_dictionaries(
    {},
    optional={
        "replicas": st.integers(0, 5),
        "role": st.sampled_from(["Unified", "Prefill", "Decode"]),
        "parallelism": st.sampled_from([{"tensor": 2}, {"tensor": 4, "pipeline": 2, "nodes": 2}, {"nodes": 1}]),
        "adapters": st.lists(st.sampled_from("abc"), unique=True).map(lambda names: [{"name": n, "uri": f"/{n}"} for n in names]),
        "engine": st.fixed_dictionaries({}, optional={
            "args": st.lists(st.sampled_from(["--x", "--block-size=8", "1"]), max_size=3),
            "env": st.lists(st.sampled_from(["A", "HF_HOME"]), unique=True).map(lambda ns: [{"name": n, "value": ""} for n in ns]),
            "kvEvents": st.sampled_from([{"enabled": False}, {"port": 7000}]),
        }),
        "autoscaling": st.just({"minReplicas": 0, "maxReplicas": 3}),
        "podTemplate": st.sampled_from([
            {"spec": {"containers": [{"name": "engine", "resources": {"requests": {"cpu": 0.5}}}]}},
            {"metadata": {"annotations": {"a": "b"}}},
        ]),
    },
)  # fmt: skip


def as_stored(manifest):
    """As an API server has it after the apply: bookkeeping, defaults and quantities in their canonical form."""
    stored = copy.deepcopy(manifest)
    stored["metadata"] |= {"uid": f"uid-{manifest['kind']}", "resourceVersion": "7", "generation": 1}
    owns = {"f:spec": {"f:replicas": {}}}
    stored["metadata"]["managedFields"] = [{"manager": "kvfleet-operator", "fieldsV1": owns}]
    if "spec" in stored:
        stored["spec"]["defaultedByTheServer"] = True
        for container in stored["spec"].get("template", {}).get("spec", {}).get("containers", []):
            container["imagePullPolicy"] = "IfNotPresent"
            requests = container["resources"].get("requests", {})
            if requests.get("cpu") == 0.5:
                requests["cpu"] = "500m"
            container["env"] = [{k: v for k, v in entry.items() if v != ""} for entry in container["env"]]
    return stored


@settings(max_examples=80, deadline=None)
@given(SPECS, st.booleans())
def test_reconciling_what_was_just_applied_writes_nothing(spec, with_profile):
    base = {"model": {"name": "llama-8b"}, "accelerator": {"profileRef": "h100"}}
    manifest = {
        "kind": "ModelPool",
        "metadata": {"name": "llama", "namespace": "default", **UID},
        "spec": {**base, **spec},
    }
    pool = KINDS["ModelPool"].model_validate(manifest)
    given = modelpool.PoolInput(pool, PROFILE if with_profile else None)
    first = modelpool.children(given)
    live = {kind_name(child): as_stored(child) for child in first.objects}
    again = modelpool.children(modelpool.PoolInput(pool, given.profile, (), live))
    assert {kind_name(child) for child in again.objects} == live.keys()
    assert [difference(child, live[kind_name(child)]) for child in again.objects] == [None] * len(live)

    status = modelpool.status(given, Applied([], live), "2026-01-01T00:00:00Z")
    reported = KINDS["ModelPool"].model_validate({**manifest, "status": status})
    later = modelpool.status(
        modelpool.PoolInput(reported, given.profile, (), live), Applied([], live), "2027-01-01T00:00:00Z"
    )
    assert changes(status, later) == {}


PROFILE = KINDS["AcceleratorProfile"].model_validate(
    {
        "metadata": {"name": "h100"},
        "spec": {
            "accelerator": {"product": "H100", "memoryGiB": 80},
            "power": {"idleWatts": 1, "maxWatts": 2},
            "prior": {
                "stepMicrosecondsPerWeightGB": 1, "stepNanosecondsPerSequence": 1, "prefillNanosecondsPerBillionParameters": 1,
                "stepMillijoulesPerWeightGB": 1, "tokenMicrojoulesPerBillionParameters": 1,
                "prefillTokenMicrojoulesPerBillionParameters": 1, "kvBytesPerTokenPerBillionParameters": 1,
            },
        },
    }
)  # fmt: skip
