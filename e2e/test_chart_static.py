"""What the chart renders, with both Helm versions and without a cluster.

Golden files under e2e/chart/ hold what each of the values files beside them renders to, less what is generated from
other sources (CRDs, profiles, the operator's rights), which is held against those sources instead.
KVFLEET_UPDATE_GOLDEN=1 writes them anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from harness.build import binaries

from kvfleet.main import app
from kvfleet_api import manifests
from kvfleet_operator import rbac
from kvfleet_operator.render import render as render_children

E2E = Path(__file__).resolve().parent
REPOSITORY = E2E.parent
CHART = REPOSITORY / "helm/kvfleet"
CASES = ("default", "all", "namespaced")
KUBERNETES = "1.29.0"
"""The oldest version the chart says it works on."""
FROM_OTHER_SOURCES = {"CustomResourceDefinition", "AcceleratorProfile"}

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]


class HelmError(Exception):
    """What Helm printed when it failed."""


@pytest.fixture(scope="session", params=["helm", "helm3"])
def helm(request: pytest.FixtureRequest) -> Callable[..., str]:
    program = binaries().path(request.param)

    def run(*arguments: str) -> str:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
        if result.returncode:
            raise HelmError(result.stderr)
        return result.stdout

    return run


@pytest.fixture(scope="session")
def template(helm: Callable[..., str]) -> Render:
    """helm template → the objects."""

    def run(
        *arguments: str, release: str = "kvfleet", namespace: str = "kvfleet-system", chart: Path = CHART
    ) -> list[Manifest]:
        version = ["--kube-version", KUBERNETES]
        output = helm("template", release, str(chart), "--namespace", namespace, *version, *arguments)
        return [document for document in yaml.safe_load_all(output) if document]

    return run


def values(case: str) -> list[str]:
    return ["--values", str(E2E / "chart" / f"{case}.yaml")]


def of_kind(objects: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in objects if manifest["kind"] == kind]


def one(objects: list[Manifest], kind: str) -> Manifest:
    (found,) = of_kind(objects, kind)
    return found


def key(manifest: Manifest) -> tuple[str, str, str]:
    metadata = manifest["metadata"]
    return manifest["kind"], metadata.get("namespace", ""), metadata["name"]


def container(objects: list[Manifest]) -> Manifest:
    (only,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(only)


def snapshot(objects: list[Manifest]) -> str:
    kept = sorted((manifest for manifest in objects if manifest["kind"] not in FROM_OTHER_SOURCES), key=key)
    for manifest in kept:
        if (
            manifest["kind"] in {"Role", "ClusterRole"}
            and "app.kubernetes.io/component" in manifest["metadata"]["labels"]
        ):
            manifest["rules"] = "from kvfleet_operator.rbac"
    return yaml.safe_dump_all(kept, sort_keys=True, width=120)


@pytest.mark.parametrize("case", CASES)
def test_the_chart_renders_what_its_golden_file_says(template: Render, case: str) -> None:
    golden = E2E / "chart" / f"{case}.golden.yaml"
    rendered = snapshot(template(*values(case)))
    if os.environ.get("KVFLEET_UPDATE_GOLDEN"):
        golden.write_text(rendered)
    assert rendered == golden.read_text()


@pytest.mark.parametrize("case", CASES)
def test_lint_finds_nothing(helm: Callable[..., str], case: str) -> None:
    output = helm("lint", "--strict", "--kube-version", KUBERNETES, str(CHART), *values(case))
    assert "0 chart(s) failed" in output
    assert "WARNING" not in output and "ERROR" not in output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("operator.replica=3", "'/operator': additional properties 'replica' not allowed"),
        ("surprise=1", "additional properties 'surprise' not allowed"),
        ("operator.replicas=many", "'/operator/replicas': got string, want integer"),
        ("operator.logLevel=loud", "'/operator/logLevel': value must be one of 'debug', 'info', 'warning', 'error'"),
        ("operator.metricsPort=80", "'/operator/metricsPort': minimum: got 80, want 1,024"),
        (
            "operator.podDisruptionBudget.maxUnavailable=few",
            "'/operator/podDisruptionBudget/maxUnavailable': 'few' does not",
        ),
        ("image.digest=sha256:1", "'/image/digest': 'sha256:1' does not match pattern"),
        ("image.pullSecrets[0]=pull", "'/image/pullSecrets/0': got string, want object"),
        ("watchNamespaces={Team A}", "'/watchNamespaces/0': 'Team A' does not match pattern"),
        ("watchNamespaces={a,a}", "'/watchNamespaces': items at 0 and 1 are equal"),
        ("router.spec.replica=3", "'/router/spec': additional properties 'replica' not allowed"),
        ("router.spec.replicas=-1", "'/router/spec/replicas': minimum: got -1, want 0"),
        ("router.spec.service.type=Ingress", "'/router/spec/service/type': value must be one of 'ClusterIP'"),
        ("monitoring.serviceMonitor.interval=often", "'/monitoring/serviceMonitor/interval': 'often' does not match"),
        ("router.enabled=true,watchNamespaces={a}", 'namespace "kvfleet-system" is not in watchNamespaces ["a"]'),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(template: Render, setting: str, message: str) -> None:
    with pytest.raises(HelmError) as refused:
        template("--set", setting)
    assert message in str(refused.value).replace("\\", "")


def test_an_older_kubernetes_is_refused(helm: Callable[..., str]) -> None:
    with pytest.raises(HelmError, match=r"chart requires kubeVersion: >=1\.29\.0-0"):
        helm("template", "kvfleet", str(CHART), "--kube-version", "1.28.9")


def references(objects: list[Manifest]) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """(who refers, what to): every reference by name within the chart."""
    for manifest in objects:
        kind, namespace, name = key(manifest)
        if kind in {"RoleBinding", "ClusterRoleBinding"}:
            role = manifest["roleRef"]
            yield f"{kind} {name}", (role["kind"], namespace if role["kind"] == "Role" else "", role["name"])
            for subject in manifest["subjects"]:
                yield f"{kind} {name}", (subject["kind"], subject["namespace"], subject["name"])
        if kind == "Deployment":
            yield name, ("ServiceAccount", namespace, manifest["spec"]["template"]["spec"]["serviceAccountName"])


def selectors(objects: list[Manifest]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Everything that selects the operator's pods."""
    for manifest in objects:
        spec, name = manifest.get("spec", {}), f"{manifest['kind']} {manifest['metadata']['name']}"
        match manifest["kind"]:
            case "Service":
                yield name, spec["selector"]
            case "Deployment" | "PodDisruptionBudget":
                yield name, spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                yield name, spec["podSelector"]["matchLabels"]


RELEASES = ["kvfleet", "a", "team-a-kvfleet-blue", "x" * 53, "kvfleet-" + "y" * 45]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", CASES)
def test_any_release_and_namespace_gives_consistent_objects(template: Render, release: str, case: str) -> None:
    namespace = "n" * 63
    objects = template(*values(case), release=release, namespace=namespace)
    keys = [key(manifest) for manifest in objects]
    assert len(set(keys)) == len(keys)
    for kind, place, name in keys:
        cluster_scoped = kind.startswith("Cluster") or kind in FROM_OTHER_SOURCES
        assert bool(place) is not cluster_scoped, (kind, name)
        assert len(name) <= (253 if cluster_scoped or "Role" in kind else 63), (kind, name)
    for who, target in references(objects):
        assert target in keys, who
    pod_labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    for who, wanted in selectors(objects):
        assert wanted.items() <= pod_labels.items(), who
    for monitor in of_kind(objects, "ServiceMonitor"):
        assert (
            monitor["spec"]["selector"]["matchLabels"].items() <= one(objects, "Service")["metadata"]["labels"].items()
        )


@pytest.mark.parametrize("case", CASES)
def test_every_object_carries_the_recommended_labels(template: Render, case: str) -> None:
    for manifest in template(*values(case), "--set-string", "commonLabels.cost-center=7", release="blue"):
        labels = manifest["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "kvfleet", key(manifest)
        assert labels["app.kubernetes.io/instance"] == "blue"
        assert labels["app.kubernetes.io/part-of"] == "kvfleet"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert {"app.kubernetes.io/version", "helm.sh/chart"} <= labels.keys()
        assert labels["cost-center"] == "7"
        assert all(len(value) <= 63 for value in labels.values())


def test_two_releases_in_two_namespaces_share_no_object(template: Render) -> None:
    def render(namespace: str) -> set[tuple[str, str, str]]:
        chosen = ["--set", f"watchNamespaces={{{namespace}}},crds.enabled=false,profiles.enabled=false"]
        return {key(manifest) for manifest in template(*chosen, namespace=namespace)}

    assert not render("one") & render("two")


def test_crds_are_the_repositorys_own(template: Render) -> None:
    rendered = {crd["metadata"]["name"]: crd for crd in of_kind(template(), "CustomResourceDefinition")}
    sources = [yaml.safe_load(path.read_text()) for path in (REPOSITORY / "crds").glob("*.yaml")]
    assert len(sources) == len(rendered) == 4
    for source in sources:
        crd = rendered[source["metadata"]["name"]]
        assert crd["spec"] == source["spec"]
        assert source["metadata"]["labels"].items() <= crd["metadata"]["labels"].items()
        assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_crds_can_be_left_out_and_can_be_let_go(template: Render) -> None:
    assert of_kind(template("--set", "crds.enabled=false"), "CustomResourceDefinition") == []
    for crd in of_kind(template("--set", "crds.keep=false"), "CustomResourceDefinition"):
        assert "annotations" not in crd["metadata"]


def test_profiles_are_the_bundled_ones(template: Render) -> None:
    sources = [yaml.safe_load(path.read_text()) for path in (REPOSITORY / "crds/kvfleet_api/profiles").glob("*.yaml")]
    rendered = of_kind(template(), "AcceleratorProfile")
    assert {p["metadata"]["name"]: p["spec"] for p in rendered} == {p["metadata"]["name"]: p["spec"] for p in sources}
    assert len(sources) >= 5
    assert of_kind(template("--set", "profiles.enabled=false"), "AcceleratorProfile") == []


CUSTOM = ["--set", "router.enabled=true"]
KNOWN = [
    "--api-versions",
    "kvfleet.io/v1alpha1/AcceleratorProfile",
    "--api-versions",
    "kvfleet.io/v1alpha1/FleetRouter",
]


def custom_resources(objects: list[Manifest]) -> list[Manifest]:
    found = [manifest for manifest in objects if manifest["apiVersion"] == "kvfleet.io/v1alpha1"]
    assert {manifest["kind"] for manifest in found} == {"AcceleratorProfile", "FleetRouter"}
    return found


def helm_annotations(manifest: Manifest) -> dict[str, str]:
    annotations = manifest["metadata"].get("annotations", {})
    return {name: value for name, value in annotations.items() if "helm.sh/" in name}


def test_objects_of_kinds_that_the_cluster_does_not_know_yet_come_after_their_crds(template: Render) -> None:
    for manifest in custom_resources(template(*CUSTOM, namespace="here")):
        assert helm_annotations(manifest) == {
            "helm.sh/hook": "post-install,post-upgrade",
            "helm.sh/resource-policy": "keep",
            "meta.helm.sh/release-name": "kvfleet",
            "meta.helm.sh/release-namespace": "here",
        }


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        ([], {"AcceleratorProfile"}),
        (CUSTOM, {"AcceleratorProfile", "FleetRouter"}),
        ([*CUSTOM, "--set", "profiles.enabled=false"], {"FleetRouter"}),
        ([*CUSTOM, *KNOWN[:2]], {"FleetRouter"}),
        (["--set", "profiles.enabled=false"], set()),
        ([*CUSTOM, *KNOWN], set()),
    ],
)
def test_hooks_wait_for_the_kinds_that_are_not_served_yet(
    template: Render, arguments: list[str], kinds: set[str]
) -> None:
    objects = template(*arguments)
    hook = pods(objects).get("hook")
    assert (set(hook["containers"][0]["args"][1:]) if hook else set()) == kinds
    if hook:
        assert hook["containers"][0]["args"][0] == (CHART / "files/wait_for_kinds.py").read_text()


def test_objects_of_known_kinds_belong_to_the_release(template: Render) -> None:
    for manifest in custom_resources(template(*CUSTOM, *KNOWN)):
        assert helm_annotations(manifest) == {"helm.sh/resource-policy": "keep"}
    for manifest in custom_resources(template(*CUSTOM, *KNOWN, "--set", "crds.keep=false")):
        assert helm_annotations(manifest) == {}


def rules(listed: list[rbac.Rule]) -> list[Manifest]:
    return [rule.manifest() for rule in listed]


def operator_roles(objects: list[Manifest], kind: str) -> list[Manifest]:
    found = of_kind(objects, kind)
    return [role for role in found if role["metadata"]["labels"].get("app.kubernetes.io/component") == "operator"]


def test_the_operator_has_exactly_the_rights_it_names(template: Render) -> None:
    objects = template()
    (cluster_role,) = operator_roles(objects, "ClusterRole")
    (lease_role,) = operator_roles(objects, "Role")
    assert cluster_role["rules"] == rules(rbac.cluster_rules(cluster_wide=True))
    assert lease_role["metadata"]["namespace"] == "kvfleet-system"
    assert lease_role["rules"] == rules(rbac.lease_rules("kvfleet-operator"))
    assert "--lease-name=kvfleet-operator" in container(objects)["args"]


def test_an_operator_of_some_namespaces_has_no_right_in_others(template: Render) -> None:
    objects = template(*values("namespaced"))
    (cluster_role,) = operator_roles(objects, "ClusterRole")
    assert cluster_role["rules"] == rules(rbac.cluster_rules(cluster_wide=False))
    roles = {role["metadata"]["namespace"]: role["rules"] for role in operator_roles(objects, "Role")}
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


def pods(objects: list[Manifest]) -> dict[str, Manifest]:
    """Pod specs by component: operator, hook (until the kinds are served), test."""
    owners = [*of_kind(objects, "Pod"), *of_kind(objects, "Deployment")]
    component = "app.kubernetes.io/component"
    specs = [owner["spec"].get("template", owner)["spec"] for owner in owners]
    return {owner["metadata"]["labels"][component]: spec for owner, spec in zip(owners, specs, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_pods_meet_the_restricted_pod_security_standard(template: Render, case: str) -> None:
    found = pods(template(*values(case)))
    assert found.keys() == {"operator", "hook", "test"}
    for spec in found.values():
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all(volume.keys() <= {"name", "emptyDir"} for volume in spec.get("volumes", []))
        for each in spec["containers"]:
            context = each["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_only_what_talks_to_the_api_server_gets_a_token(template: Render) -> None:
    objects = template()
    assert one(objects, "ServiceAccount")["automountServiceAccountToken"] is False
    tokens = {component: spec["automountServiceAccountToken"] for component, spec in pods(objects).items()}
    assert tokens == {"operator": True, "hook": True, "test": False}


@pytest.mark.parametrize("case", CASES)
def test_the_operator_command_knows_every_argument(template: Render, case: str) -> None:
    command = typer.main.get_command(app).commands["operator"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    rendered = container(template(*values(case)))
    assert rendered["command"] == ["kvfleet", "operator"]
    assert {argument.partition("=")[0] for argument in rendered["args"]} - {"--help"} <= options


@pytest.mark.parametrize(
    ("settings", "image"),
    [
        ("image.tag=", "ghcr.io/kvfleet/kvfleet:0.1.0"),
        ("image.tag=dev", "ghcr.io/kvfleet/kvfleet:dev"),
        ("image.registry=", "kvfleet/kvfleet:0.1.0"),
        ("image.registry=localhost:5000,image.repository=k", "localhost:5000/k:0.1.0"),
        (f"image.tag=dev,image.digest=sha256:{'a' * 64}", f"ghcr.io/kvfleet/kvfleet@sha256:{'a' * 64}"),
    ],
)
def test_everything_runs_the_chosen_image(template: Render, settings: str, image: str) -> None:
    objects = template("--set", settings, "--set", "router.enabled=true")
    assert container(objects)["image"] == image
    assert one(objects, "FleetRouter")["spec"]["image"] == image
    assert {spec["containers"][0]["image"] for spec in pods(objects).values()} == {image}


def test_a_router_image_of_ones_own_wins(template: Render) -> None:
    assert one(template(*CUSTOM, "--set", "router.spec.image=mine:1"), "FleetRouter")["spec"]["image"] == "mine:1"


def test_one_replica_has_no_disruption_budget(template: Render) -> None:
    assert of_kind(template("--set", "operator.replicas=1"), "PodDisruptionBudget") == []
    assert of_kind(template("--set", "operator.podDisruptionBudget.enabled=false"), "PodDisruptionBudget") == []


def test_monitors_select_the_pods_and_ports_that_the_operator_makes(template: Render) -> None:
    children = render_children(manifests.load([REPOSITORY / "examples/quickstart"]))
    templates = [child["spec"]["template"] for child in children if child["kind"] == "Deployment"]
    monitors = of_kind(template("--set", "monitoring.podMonitor.enabled=true"), "PodMonitor")
    assert len(monitors) == 2
    for monitor in monitors:
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        matched = [pod for pod in templates if wanted <= pod["metadata"]["labels"].items()]
        assert matched, monitor["metadata"]["name"]
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        for pod in matched:
            assert endpoint["port"] in {port["name"] for each in pod["spec"]["containers"] for port in each["ports"]}
            assert set(monitor["spec"]["podTargetLabels"]) <= pod["metadata"]["labels"].keys()


def test_monitors_stay_in_the_watched_namespaces(template: Render) -> None:
    for monitor in of_kind(
        template(*values("namespaced"), "--set", "monitoring.podMonitor.enabled=true"), "PodMonitor"
    ):
        assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["team-a", "team-b"]}


def test_rules_and_dashboards_in_the_chart_reach_the_cluster_unchanged(template: Render, tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "kvfleet")
    rule = {"alert": "A", "expr": "up == 0", "annotations": {"summary": "{{ $labels.pod }} is down"}}
    spec = {"groups": [{"name": "kvfleet", "rules": [rule]}]}
    dashboard = json.dumps({"title": "Fleet", "legend": "{{pool}}"}, indent=2)
    for path, text in {"rules/extra.yaml": yaml.safe_dump(spec), "dashboards/extra.json": dashboard}.items():
        (chart / "files" / path).parent.mkdir(exist_ok=True)
        (chart / "files" / path).write_text(text)
    objects = {key(manifest): manifest for manifest in template(*values("all"), chart=chart)}
    assert objects["PrometheusRule", "kvfleet-system", "kvfleet-extra"]["spec"] == spec
    config_map = objects["ConfigMap", "kvfleet-system", "kvfleet-dashboard-extra"]
    assert config_map["data"] == {"extra.json": dashboard}
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_manifests_in_the_notes_are_valid() -> None:
    # Helm 3 wants a cluster even for a dry run on the client.
    for routers, setting in ((1, "router.enabled=false"), (0, "router.enabled=true")):
        command = [
            binaries().path("helm"),
            "install",
            "x",
            str(CHART),
            "--dry-run=client",
            "--output=json",
            "--set",
            setting,
        ]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        (text,) = re.findall(r"<<'MANIFESTS'\n(.*?)\n  MANIFESTS", json.loads(answer)["info"]["notes"], re.DOTALL)
        found = manifests.parse(textwrap.dedent(text))
        assert [len(found.pools), len(found.policies), len(found.routers)] == [1, 1, routers]


def test_the_package_holds_all_files_and_nothing_else(helm: Callable[..., str], tmp_path: Path) -> None:
    helm("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("kvfleet-*.tgz")
    with tarfile.open(package) as archive:
        packed = {name.removeprefix("kvfleet/") for name in archive.getnames()}
    assert packed == {str(path.relative_to(CHART)) for path in CHART.rglob("*") if path.is_file()}
