"""RoutingPolicy, FleetRouter and AcceleratorProfile: what they report over what is the case around them."""

import json

import pytest
import typer

from kvfleet.main import app
from kvfleet_api.compile import compile_fleet
from kvfleet_operator.reconcile import acceleratorprofile, fleetrouter, routerpods, routingpolicy
from kvfleet_operator.reconcile.names import label_value
from kvfleet_operator.reconcile.plan import Applied
from kvfleet_operator.reconcile.routingpolicy import Loaded, RouterView

NOW = "2026-01-01T00:00:00Z"


def fleet_of(make, pools=("llama",), policies=(), router=None):
    parsed = [make.parse(make.pool(name)) for name in pools]
    return compile_fleet(router, parsed, policies, [make.parse(make.profile())])


def policy_conditions(make, policy, routers, pools=("llama",), others=()):
    """`routers`: pods of each router → what is `serve`d there: CURRENT, OLD, or a Loaded, or None."""
    policy = make.parse(policy)
    others = [make.parse(other) for other in others]
    fleet = fleet_of(make, pools, [policy, *others])
    problems = [p for p in fleet.problems if p.name == policy.metadata.name]
    written = {config.name: config for config in fleet.config.policies}
    current = Loaded(fleet.config.revision, {name: config.revision for name, config in written.items()})
    stands = {CURRENT: current, OLD: Loaded("0ff", dict.fromkeys(written, "0ff"))}
    views = [
        RouterView(
            f"router-{number}",
            current.revision,
            {pod: stands[say] if isinstance(say, str) else say for pod, say in pods.items()},
            written,
        )
        for number, pods in enumerate(routers)
    ]
    status = routingpolicy.status(policy, problems, policy.metadata.name in written, views, NOW)
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}, status


CURRENT, OLD = "serves with what was written", "serves with what was written before"
SERVING = {"router-0": CURRENT, "router-1": CURRENT}


def test_a_policy_served_by_every_replica_is_ready(make):
    policy = make.policy(metadata={"generation": 4})
    conditions, status = policy_conditions(make, policy, [SERVING])
    assert conditions == {
        "Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs"), "Conflicted": ("False", "NoConflict"),
        "Programmed": ("True", "Programmed"), "Ready": ("True", "Ready"),
    }  # fmt: skip
    (message,) = [c["message"] for c in status["conditions"] if c["type"] == "Programmed"]
    assert message == "2 of 2 router replicas serve with generation 4"
    first, second = status["programmedBy"]
    assert (first["pod"], second["pod"]) == ("router-0", "router-1")
    assert first["revision"] == second["revision"] == fleet_of(make, policies=[make.parse(policy)]).config.revision
    assert {c["observedGeneration"] for c in status["conditions"]} == {4}


@pytest.mark.parametrize(
    ("routers", "programmed", "by"),
    [
        ([], ("False", "NoRouter"), []),
        ([{}], ("False", "NoRouterReady"), []),
        ([{"a": CURRENT, "b": OLD}], ("False", "Pending"), ["a"]),
        ([{"a": None}], ("False", "Pending"), []),
        ([{"a": Loaded("0ff")}], ("False", "Pending"), []),
        ([SERVING, {"c": OLD}], ("False", "Pending"), ["router-0", "router-1"]),
    ],
)
def test_programmed_needs_every_replica_of_every_router(make, routers, programmed, by):
    conditions, status = policy_conditions(make, make.policy(), routers)
    assert conditions["Programmed"] == conditions["Ready"] == programmed
    assert [entry["pod"] for entry in status["programmedBy"]] == by


def test_a_policy_that_is_served_as_written_is_programmed_whatever_else_is_being_changed(make):
    written = fleet_of(make, policies=[make.parse(make.policy())]).config.policies[0]
    elsewhere = Loaded("0ff", {"policy": written.revision, "gone": "1"}, "policy other: strategy 'x' is unknown")
    conditions, status = policy_conditions(make, make.policy(), [{"a": elsewhere, "b": CURRENT}])
    assert (conditions["Programmed"], conditions["Ready"]) == (("True", "Programmed"), ("True", "Ready"))
    assert status["programmedBy"][0] == {"pod": "a", "revision": "0ff"}


def test_a_configuration_that_routers_refuse_is_told_with_their_words(make):
    refusing = Loaded("0ff", {}, "policy policy: strategy 'x' is unknown: use one of a, b")
    conditions, status = policy_conditions(make, make.policy(), [{"a": refusing, "b": CURRENT, "c": refusing}])
    assert conditions["Programmed"] == ("False", "ConfigRefused")
    (message,) = [c["message"] for c in status["conditions"] if c["type"] == "Programmed"]
    assert "1 of 3 router replicas" in message
    assert message.endswith("; a, c refused it: policy policy: strategy 'x' is unknown: use one of a, b")


def test_a_missing_pool_is_tolerated_while_another_serves(make):
    conditions, status = policy_conditions(make, make.policy(pools=["llama", "lama"]), [SERVING])
    assert conditions["ResolvedRefs"] == conditions["Ready"] == ("False", "PoolNotFound")
    assert conditions["Accepted"] == ("True", "Accepted")
    assert conditions["Programmed"] == ("True", "Programmed")
    assert "did you mean llama?" in next(c for c in status["conditions"] if c["type"] == "ResolvedRefs")["message"]


def test_a_policy_without_any_pool_is_not_accepted_and_never_programmed(make):
    conditions, status = policy_conditions(make, make.policy(pools=["gone"]), [SERVING])
    assert conditions["Accepted"] == ("False", "NoUsablePool")
    assert conditions["Programmed"] == ("False", "NotAccepted")
    assert status["programmedBy"] == []


def test_the_losing_one_of_two_overlapping_policies_says_so(make):
    older = make.policy("older", metadata={"creationTimestamp": "2025-01-01T00:00:00Z"})
    newer = make.policy("newer", metadata={"creationTimestamp": "2026-01-01T00:00:00Z"})
    loser, _ = policy_conditions(make, newer, [SERVING], others=[older])
    winner, _ = policy_conditions(make, older, [SERVING], others=[newer])
    assert loser["Conflicted"] == ("True", "OverlappingMatch")
    assert loser["Ready"] == ("False", "OverlappingMatch")
    assert winner["Conflicted"] == ("False", "NoConflict")


def test_a_policy_whose_power_budget_is_too_small_is_served_and_says_so(make):
    policy = make.policy(energy={"mode": "Strict", "maxWatts": 1})
    conditions, status = policy_conditions(make, policy, [SERVING])
    assert conditions["Accepted"] == ("True", "AcceptedWithWarnings")
    assert conditions["Ready"] == ("True", "Ready")
    (message,) = [c["message"] for c in status["conditions"] if c["type"] == "Accepted"]
    assert message.startswith("spec.energy.maxWatts: 1 W are less than the")


# FleetRouter


def router_input(make, replicas=None, **spec):
    replicas = {pod: Loaded(say) if isinstance(say, str) else say for pod, say in (replicas or {}).items()}
    router = make.parse(make.router(metadata={"uid": "u", "generation": 2}, **spec))
    return fleetrouter.RouterInput(router, fleet_of(make, router=router), replicas)


def deployment(ready=2, wanted=2):
    counts = {"observedGeneration": 1, "replicas": wanted, "updatedReplicas": wanted, "readyReplicas": ready}
    return {"kind": "Deployment", "metadata": {"generation": 1}, "spec": {"replicas": wanted}, "status": counts}


def router_conditions(given, live=None):
    applied = Applied([], {("Deployment", "router"): live} if live else {})
    status = fleetrouter.status(given, applied, NOW)
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}, status


def test_a_router_is_ready_when_its_replicas_serve_the_written_revision(make):
    revision = router_input(make).fleet.config.revision
    ready, status = router_conditions(router_input(make, {"a": revision, "b": revision}), deployment())
    assert ready["Ready"] == ("True", "Ready")
    assert (status["revision"], status["address"]) == (revision, "http://router.default.svc")
    behind, _ = router_conditions(router_input(make, {"a": revision, "b": "old"}), deployment())
    assert behind["Programmed"] == behind["Ready"] == ("False", "Pending")
    refusing, status = router_conditions(router_input(make, {"a": Loaded("old", {}, "no good")}), deployment())
    assert refusing["Programmed"] == refusing["Ready"] == ("False", "ConfigRefused")
    assert "a refused it: no good" in next(c for c in status["conditions"] if c["type"] == "Programmed")["message"]
    starting, _ = router_conditions(router_input(make), deployment(ready=0))
    assert starting["Ready"] == ("False", "RollingOut")


def test_a_router_whose_power_budget_is_too_small_says_so(make):
    conditions, status = router_conditions(router_input(make, maxWatts=1), deployment())
    assert conditions["Accepted"] == ("True", "AcceptedWithWarnings")
    (message,) = [c["message"] for c in status["conditions"] if c["type"] == "Accepted"]
    assert message.startswith("spec.maxWatts: 1 W are less than the")
    assert router_conditions(router_input(make, maxWatts=10_000), deployment())[0]["Accepted"] == ("True", "Accepted")


def test_the_config_map_holds_the_compiled_fleet_and_no_pod_depends_on_it(make):
    def objects(pools):
        router = make.parse(make.router(metadata={"uid": "u"}))
        given = fleetrouter.RouterInput(router, fleet_of(make, pools, router=router), {})
        return {child["kind"]: child for child in fleetrouter.children(given).objects}

    one, two = objects(["llama"]), objects(["llama", "mistral"])
    assert [pool["name"] for pool in json.loads(two["ConfigMap"]["data"]["fleet.json"])["pools"]] == [
        "llama",
        "mistral",
    ]
    assert one["ConfigMap"] != two["ConfigMap"]
    assert one["Deployment"] == two["Deployment"]  # so nothing restarts


def test_a_router_may_read_its_config_map_and_endpoint_slices_only(make):
    children = fleetrouter.children(router_input(make)).objects
    role = next(child for child in children if child["kind"] == "Role")
    follow = ["list", "watch"]
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["router"], "verbs": follow},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": follow},
    ]


@pytest.mark.parametrize(
    ("spec", "address"),
    [
        ({"service": {"port": 8080}}, "http://router.default.svc:8080"),
        ({"service": {"port": 443}, "tls": {"secretRef": "s"}}, "https://router.default.svc"),
        ({"tls": {"secretRef": "s"}}, "https://router.default.svc:80"),
    ],
)
def test_the_address_names_scheme_and_port(make, spec, address):
    assert router_conditions(router_input(make, **spec))[1]["address"] == address


def test_a_routers_misfit_pod_template_leaves_the_running_one_alone(make):
    given = router_input(make, podTemplate={"spec": {"containers": "x"}})
    plan = fleetrouter.children(given)
    assert plan.untouched == {("Deployment", "router")}
    assert router_conditions(given, deployment())[0]["Accepted"] == ("False", "InvalidPodTemplate")


# AcceleratorProfile


def test_a_profile_lists_the_pools_that_refer_to_it(make):
    pools = [
        make.parse(make.pool(name, profile=profile)) for name, profile in (("b", "h100"), ("a", "h100"), ("c", "a100"))
    ]
    status = acceleratorprofile.status(make.parse(make.profile()), pools, None, NOW)
    assert status["pools"] == ["default/a", "default/b"]
    assert {c["type"]: c["status"] for c in status["conditions"]} == {"Accepted": "True", "Ready": "True"}


def test_two_operators_of_different_namespaces_do_not_fight_over_a_profile(make):
    manifest = {**make.profile(), "status": {"pools": ["elsewhere/x", "default/stale"]}}
    pools = [make.parse(make.pool("a"))]
    status = acceleratorprofile.status(make.parse(manifest), pools, {"default"}, NOW)
    assert status["pools"] == ["default/a", "elsewhere/x"]


# Names


@pytest.mark.parametrize("text", ["a/b", "a:b@c", "x" * 80, "-a-", "ä", "a" * 63 + "/"])
def test_any_text_becomes_a_label_value_of_its_own(text):
    value = label_value(text)
    assert 0 < len(value) <= 63
    assert value[0].isalnum() and value[-1].isalnum()
    assert value != label_value(text + "x")


def test_a_valid_label_value_stays_as_it_is():
    assert label_value("llama-3.1_8B") == "llama-3.1_8B"


# How routers are started


def router_flags():
    command = typer.main.get_command(app).commands["router"]
    return {flag for parameter in command.params for flag in parameter.opts}


def router_args(make, **spec):
    manifest = routerpods.deployment(make.parse(make.router(**spec)))
    return manifest["spec"]["template"]["spec"]["containers"][0]["args"]


EVERYTHING = {
    "processes": 4,
    "auth": {"apiKeysSecretRef": {"name": "keys", "key": "keys.txt"}},
    "tls": {"secretRef": "tls"},
    "redis": {
        "url": "rediss://redis:6379/0",
        "passwordSecretRef": {"name": "redis", "key": "password"},
        "caSecretRef": {"name": "ca", "key": "ca.crt"},
    },
}


def test_routers_are_started_with_flags_they_know(make):
    command, *args = router_args(make, **EVERYTHING)
    assert command == "router"
    flags = {arg for arg in args if arg.startswith("--")}
    wanted = {"--tls-cert", "--tls-key", "--api-keys-file", "--processes", "--redis-url", "--redis-password-file"}
    assert wanted | {"--redis-ca-file"} <= flags <= router_flags()


def test_a_redis_password_is_read_from_its_secret(make):
    pod = routerpods.deployment(make.parse(make.router(**EVERYTHING)))["spec"]["template"]["spec"]
    args = router_args(make, **EVERYTHING)
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert args[args.index("--redis-password-file") + 1] == f"{mounts['redis-password']}/password"
    assert args[args.index("--redis-ca-file") + 1] == f"{mounts['redis-ca']}/ca.crt"
    assert (secrets["redis-password"], secrets["redis-ca"]) == ("redis", "ca")


def test_routers_are_told_how_many_they_are(make):
    router = make.parse(make.router(replicas=3, processes=4))
    assert fleet_of(make, router=router).config.routers == 12
    assert fleet_of(make, router=make.parse(make.router(replicas=0))).config.routers == 1
