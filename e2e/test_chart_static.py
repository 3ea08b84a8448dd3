"""What the chart renders, with both Helm versions and without a cluster.

Golden files under e2e/chart/ hold what each of the values files beside them renders to, less what comes from other
sources (CRDs, profiles, the operator's rights, the hook's program), which is held against those sources instead.
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
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import typer
import yaml
from chart.rendered import (
    CASES,
    CHART,
    CRD,
    E2E,
    HELM_VERSIONS,
    KUBERNETES,
    REPOSITORY,
    ROUTER,
    Helm,
    HelmError,
    Manifest,
    Render,
    applied,
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
from harness.build import binaries

from kvfleet.main import app
from kvfleet_api import manifests
from kvfleet_operator.render import render as render_children

RELEASES = ["kvfleet", "a", "team-a-kvfleet-blue", "x" * 53, "kvfleet-" + "y" * 45]


@pytest.fixture(scope="session", params=HELM_VERSIONS)
def helm(request: pytest.FixtureRequest) -> Helm:
    return helm_command(request.param)


@pytest.fixture(scope="session")
def template(helm: Helm) -> Render:
    return renderer(helm)


def snapshot(objects: list[Manifest]) -> str:
    kept = sorted((manifest for manifest in objects if manifest["kind"] != CRD), key=key)
    for manifest in [*component(kept, "Role", "operator"), *component(kept, "ClusterRole", "operator")]:
        manifest["rules"] = "from kvfleet_operator.rbac"
    for manifest in component(kept, "ConfigMap", "objects"):
        manifest["data"] = {name: text for name, text in manifest["data"].items() if "kind: FleetRouter" in text}
    for manifest in of_kind(kept, "PrometheusRule"):
        manifest["spec"] = "from files/rules"
    for manifest in of_kind(kept, "ConfigMap"):
        if "grafana_dashboard" in manifest["metadata"]["labels"]:
            manifest["data"] = dict.fromkeys(manifest["data"], "from files/dashboards")
    for manifest in component(kept, "Pod", "objects"):
        manifest["spec"]["containers"][0]["args"][0] = "from files/apply_objects.py"
    return yaml.safe_dump_all(kept, sort_keys=True, width=120)


@pytest.mark.parametrize("case", CASES)
def test_the_chart_renders_what_its_golden_file_says(template: Render, case: str) -> None:
    golden = E2E / "chart" / f"{case}.golden.yaml"
    rendered = snapshot(template(*values(case)))
    if os.environ.get("KVFLEET_UPDATE_GOLDEN"):
        golden.write_text(rendered)
    assert rendered == golden.read_text()


@pytest.mark.parametrize("case", CASES)
def test_lint_finds_nothing(helm: Helm, case: str) -> None:
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
        ("operator.prometheus.url=prometheus:9090", "'/operator/prometheus/url': 'prometheus:9090' does not match"),
        ("operator.prometheus.tokenSecret.name=token", "say nothing without url: set operator.prometheus.url, too"),
        ("monitoring.serviceMonitor.interval=often", "'/monitoring/serviceMonitor/interval': 'often' does not match"),
        ("router.enabled=true,watchNamespaces={a}", 'namespace "kvfleet-system" is not in watchNamespaces ["a"]'),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(template: Render, setting: str, message: str) -> None:
    with pytest.raises(HelmError) as refused:
        template("--set", setting)
    assert message in str(refused.value).replace("\\", "")


def test_an_older_kubernetes_is_refused(helm: Helm) -> None:
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
        if kind in {"Deployment", "Pod"}:
            spec = manifest["spec"].get("template", manifest)["spec"]
            if "serviceAccountName" in spec:
                yield name, ("ServiceAccount", namespace, spec["serviceAccountName"])


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


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", CASES)
def test_any_release_and_namespace_gives_consistent_objects(template: Render, release: str, case: str) -> None:
    namespace = "n" * 63
    objects = template(*values(case), release=release, namespace=namespace)
    keys = [key(manifest) for manifest in objects]
    assert len(set(keys)) == len(keys)
    for kind, place, name in keys:
        cluster_scoped = kind.startswith("Cluster") or kind == CRD
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
        return {key(manifest) for manifest in template(*chosen, *ROUTER, namespace=namespace)}

    assert not render("one") & render("two")


def test_crds_are_the_repositorys_own(template: Render) -> None:
    rendered = {crd["metadata"]["name"]: crd for crd in of_kind(template(), CRD)}
    sources = [yaml.safe_load(path.read_text()) for path in (REPOSITORY / "crds").glob("*.yaml")]
    assert len(sources) == len(rendered) == 4
    for source in sources:
        crd = rendered[source["metadata"]["name"]]
        assert crd["spec"] == source["spec"]
        assert source["metadata"]["labels"].items() <= crd["metadata"]["labels"].items()
        assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_crds_can_be_left_out_and_can_be_let_go(template: Render) -> None:
    assert of_kind(template("--set", "crds.enabled=false"), CRD) == []
    for crd in of_kind(template("--set", "crds.keep=false"), CRD):
        assert "annotations" not in crd["metadata"]


def test_profiles_are_the_bundled_ones(template: Render) -> None:
    sources = [yaml.safe_load(path.read_text()) for path in (REPOSITORY / "crds/kvfleet_api/profiles").glob("*.yaml")]
    found = applied(template())
    assert len(found) == len(sources) >= 5
    for source in sources:
        profile = found[f"acceleratorprofile-{source['metadata']['name']}.yaml"]
        assert profile["spec"] == source["spec"]
        assert profile["metadata"].get("annotations") == source["metadata"].get("annotations")


def test_what_the_hook_applies_is_valid_and_labelled(template: Render) -> None:
    found = applied(template(*values("all"), release="blue"))
    parsed = manifests.parse(yaml.safe_dump_all(found.values()))
    assert [(router.metadata.name, router.metadata.namespace) for router in parsed.routers] == [("front", "inference")]
    assert len(parsed.profiles) == len(found) - 1
    assert {each["metadata"]["labels"]["app.kubernetes.io/instance"] for each in found.values()} == {"blue"}


def test_the_hook_runs_the_chart_s_program_on_its_objects(template: Render) -> None:
    objects = template()
    hook = pods(objects)["objects"]
    program, folder = hook["containers"][0]["args"]
    assert program == (CHART / "files/apply_objects.py").read_text()
    assert folder == hook["containers"][0]["volumeMounts"][0]["mountPath"]
    assert hook["volumes"][0]["configMap"]["name"] in {o["metadata"]["name"] for o in of_kind(objects, "ConfigMap")}


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
    objects = template("--set", settings, *ROUTER)
    assert container(objects)["image"] == image
    assert applied(objects)["fleetrouter-kvfleet.yaml"]["spec"]["image"] == image
    assert {spec["containers"][0]["image"] for spec in pods(objects).values()} == {image}


def test_a_router_image_of_ones_own_wins(template: Render) -> None:
    objects = template(*ROUTER, "--set", "router.spec.image=mine:1")
    assert applied(objects)["fleetrouter-kvfleet.yaml"]["spec"]["image"] == "mine:1"


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


def test_the_charts_own_rules_and_dashboards_are_all_there(template: Render) -> None:
    objects = template("--set", "monitoring.prometheusRule.enabled=true,monitoring.dashboards.enabled=true")
    rules = {
        each["metadata"]["name"].removeprefix("kvfleet-"): each["spec"] for each in of_kind(objects, "PrometheusRule")
    }
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (CHART / "files/rules").glob("*.yaml")}
    assert rules == files and len(files) >= 3
    found = [each["data"] for each in of_kind(objects, "ConfigMap") if "-dashboard-" in each["metadata"]["name"]]
    shown = {name: json.loads(text) for data in found for name, text in data.items()}
    assert shown == {path.name: json.loads(path.read_text()) for path in (CHART / "files/dashboards").glob("*.json")}
    assert len(shown) == 5


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


def test_the_package_holds_all_files_and_nothing_else(helm: Helm, tmp_path: Path) -> None:
    helm("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("kvfleet-*.tgz")
    with tarfile.open(package) as archive:
        packed = {name.removeprefix("kvfleet/") for name in archive.getnames()}
    assert packed == {str(path.relative_to(CHART)) for path in CHART.rglob("*") if path.is_file()}
