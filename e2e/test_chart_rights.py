"""What the chart's accounts may do and what its pods may not, as rendered by Helm 3 and 4."""

from __future__ import annotations

import pytest
from chart.rendered import (
    CASES,
    HELM_VERSIONS,
    ROUTER,
    Helm,
    Manifest,
    Render,
    component,
    container,
    helm_command,
    key,
    of_kind,
    one,
    pods,
    renderer,
    values,
)

from kvfleet_operator import rbac


@pytest.fixture(scope="session", params=HELM_VERSIONS)
def helm(request: pytest.FixtureRequest) -> Helm:
    return helm_command(request.param)


@pytest.fixture(scope="session")
def template(helm: Helm) -> Render:
    return renderer(helm)


def rules(listed: list[rbac.Rule]) -> list[Manifest]:
    return [rule.manifest() for rule in listed]


def test_the_operator_has_exactly_the_rights_it_names(template: Render) -> None:
    objects = template()
    (cluster_role,) = component(objects, "ClusterRole", "operator")
    (lease_role,) = component(objects, "Role", "operator")
    assert cluster_role["rules"] == rules(rbac.cluster_rules(cluster_wide=True))
    assert lease_role["metadata"]["namespace"] == "kvfleet-system"
    assert lease_role["rules"] == rules(rbac.lease_rules("kvfleet-operator"))
    assert "--lease-name=kvfleet-operator" in container(objects)["args"]


def test_an_operator_of_some_namespaces_has_no_right_in_others(template: Render) -> None:
    objects = template(*values("namespaced"))
    (cluster_role,) = component(objects, "ClusterRole", "operator")
    assert cluster_role["rules"] == rules(rbac.cluster_rules(cluster_wide=False))
    roles = {role["metadata"]["namespace"]: role["rules"] for role in component(objects, "Role", "operator")}
    expected = rules(rbac.namespaced_rules())
    assert roles == {
        "kvfleet-system": rules(rbac.lease_rules("kvfleet-operator")),
        "team-a": expected,
        "team-b": expected,
    }


def test_rights_can_be_left_to_others(template: Render) -> None:
    off = "rbac.create=false,rbac.aggregateToDefaultRoles=false,serviceAccount.create=false"
    objects = template("--set", off)
    assert not {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "ServiceAccount"} & {
        o["kind"] for o in objects
    }
    assert one(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "default"


def test_no_role_for_users_reaches_beyond_kvfleets_own_kinds(template: Render) -> None:
    roles = [
        role for role in of_kind(template(), "ClusterRole") if role["metadata"]["name"].endswith(("-view", "-edit"))
    ]
    assert len(roles) == 2
    for role in roles:
        assert all(rule["apiGroups"] == ["kvfleet.io"] for rule in role["rules"])
        assert not any("*" in rule["verbs"] + rule["resources"] for rule in role["rules"])


@pytest.mark.parametrize("case", CASES)
def test_pods_meet_the_restricted_pod_security_standard(template: Render, case: str) -> None:
    found = pods(template(*values(case)))
    assert found.keys() == {"operator", "objects", "test"}
    for spec in found.values():
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all(volume.keys() <= {"name", "emptyDir", "configMap", "secret"} for volume in spec.get("volumes", []))
        for each in spec["containers"]:
            context = each["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_only_what_talks_to_the_api_server_gets_a_token(template: Render) -> None:
    objects = template()
    assert [account["automountServiceAccountToken"] for account in of_kind(objects, "ServiceAccount")] == [False, False]
    tokens = {component: spec["automountServiceAccountToken"] for component, spec in pods(objects).items()}
    assert tokens == {"operator": True, "objects": True, "test": False}


@pytest.mark.parametrize(
    ("arguments", "rights"),
    [
        ([], {("ClusterRole", "", "acceleratorprofiles")}),
        (ROUTER, {("ClusterRole", "", "acceleratorprofiles"), ("Role", "kvfleet-system", "fleetrouters")}),
        ([*ROUTER, "--set", "profiles.enabled=false,router.namespace=team"], {("Role", "team", "fleetrouters")}),
        (["--set", "profiles.enabled=false"], set()),
    ],
)
def test_the_hook_may_only_apply_what_it_is_there_for(
    template: Render, arguments: list[str], rights: set[tuple[str, str, str]]
) -> None:
    objects = template(*arguments)
    roles = [*component(objects, "ClusterRole", "objects"), *component(objects, "Role", "objects")]
    assert {
        (*key(role)[:2], resource) for role in roles for rule in role["rules"] for resource in rule["resources"]
    } == rights
    assert all(rule["verbs"] == ["create", "patch"] for role in roles for rule in role["rules"])
    assert ("objects" in pods(objects)) is bool(rights)
