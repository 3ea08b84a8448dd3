"""The chart on a real API server with Helm 3 and 4: installed, upgraded, rolled back, uninstalled, installed again.

Named to run last: a first install needs a cluster that has never seen kvfleet, so these tests remove every kvfleet
release and the CRDs, from a cluster that was made for tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.cluster import Cluster, ClusterError, ExistingCluster

from kvfleet_api.manifests import bundled_profiles

CHART = Path(__file__).resolve().parents[1] / "helm/kvfleet"
NAMESPACE = "kvfleet-system"
GROUP = "kvfleet.io"
READY = ["--wait", "--timeout", "120s"]

Object = dict[str, Any]


class Release:
    """The release `kvfleet` in NAMESPACE, by one of the Helm commands."""

    def __init__(self, cluster: Cluster, helm: str) -> None:
        self._cluster = cluster
        self._helm = helm

    def helm(self, *arguments: str) -> str:
        return self._cluster.run(self._helm, *arguments, "--namespace", NAMESPACE, timeout_s=180)

    def install(self, *arguments: str, chart: Path = CHART) -> str:
        return self.helm("install", "kvfleet", str(chart), "--create-namespace", *arguments)

    def upgrade(self, *arguments: str, chart: Path = CHART) -> str:
        return self.helm("upgrade", "kvfleet", str(chart), *arguments)

    def objects(self, resource: str, *arguments: str) -> dict[str, Object]:
        """Name → object, of the release's namespace or of the cluster."""
        answer = self._cluster.run("kubectl", "get", resource, "--namespace", NAMESPACE, "--output=json", *arguments)
        return {item["metadata"]["name"]: item for item in json.loads(answer)["items"]}

    def crds(self) -> dict[str, Object]:
        return {name: crd for name, crd in self.objects("customresourcedefinitions").items() if name.endswith(GROUP)}

    def uids(self, resource: str) -> dict[str, str]:
        return {name: item["metadata"]["uid"] for name, item in self.objects(resource).items()}


def remove_everything(cluster: Cluster) -> None:
    """Every release of the chart, the CRDs and with them all their objects, the namespace."""
    releases = json.loads(cluster.run("helm", "list", "--all-namespaces", "--output=json"))
    for release in releases:
        if release["chart"].startswith("kvfleet-"):
            cluster.run("helm", "uninstall", release["name"], "--namespace", release["namespace"])
    found = cluster.run("kubectl", "get", "customresourcedefinitions", "--output=name").split()
    crds = [name for name in found if name.endswith(f".{GROUP}")]
    if crds:
        cluster.run("kubectl", "delete", *crds, "--timeout=60s")
    cluster.run("kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=90s")


@pytest.fixture(params=["helm", "helm3"])
def release(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Release]:
    if isinstance(cluster, ExistingCluster) and f".{GROUP}" in cluster.run("kubectl", "get", "crd", "--output=name"):
        pytest.fail(
            "this cluster has kvfleet's CRDs, and the test would delete them: run it on kind or the built-in cluster"
        )
    remove_everything(cluster)
    yield Release(cluster, request.param)
    remove_everything(cluster)


@pytest.fixture
def can(cluster: Cluster) -> Callable[..., bool]:
    """Whether the operator's account may do something."""

    def ask(verb: str, resource: str, namespace: str) -> bool:
        account = f"system:serviceaccount:{NAMESPACE}:kvfleet-operator"
        question = ["auth", "can-i", verb, resource, "--namespace", namespace, "--as", account]
        try:
            return cluster.run("kubectl", *question).strip() == "yes"
        except ClusterError:  # kubectl says no with exit status 1
            return False

    return ask


BUNDLED = {profile.metadata.name for profile in bundled_profiles()}


def test_a_first_install_brings_everything_and_its_test_passes(release: Release) -> None:
    release.install("--set", "router.enabled=true")
    assert len(release.crds()) == 4
    assert release.objects("acceleratorprofiles").keys() == BUNDLED
    assert release.objects("fleetrouters").keys() == {"kvfleet"}
    assert "kvfleet-kinds" not in release.objects("pods")

    release.upgrade("--set", "router.enabled=true", *READY)
    assert "Succeeded" in release.helm("test", "kvfleet", "--timeout", "60s")


def test_an_upgrade_adopts_what_the_first_install_made_by_hooks(release: Release) -> None:
    release.install("--set", "router.enabled=true")
    profiles = release.uids("acceleratorprofiles")

    release.upgrade("--set", "router.enabled=true,router.spec.replicas=1")
    assert release.objects("fleetrouters")["kvfleet"]["spec"]["replicas"] == 1
    assert release.uids("acceleratorprofiles") == profiles
    assert release.helm("get", "manifest", "kvfleet").count("kind: AcceleratorProfile") == len(BUNDLED)

    release.helm("rollback", "kvfleet", "1")
    assert release.uids("acceleratorprofiles") == profiles
    assert release.objects("fleetrouters").keys() == {"kvfleet"}


def test_an_upgrade_brings_new_crds_and_keeps_what_users_made(release: Release, tmp_path: Path) -> None:
    older = shutil.copytree(CHART, tmp_path / "kvfleet")
    file = older / "files/crds/kvfleet.io_modelpools.yaml"
    crd = yaml.safe_load(file.read_text())
    crd["spec"]["names"]["shortNames"] = ["old"]
    file.write_text(yaml.safe_dump(crd))
    release.install(chart=older)
    assert release.crds()["modelpools.kvfleet.io"]["spec"]["names"]["shortNames"] == ["old"]

    release.upgrade("--set", "router.enabled=true")
    assert release.crds()["modelpools.kvfleet.io"]["spec"]["names"]["shortNames"] == ["mp"]


def test_what_users_have_survives_an_uninstall_and_the_next_install_takes_it_over(release: Release) -> None:
    release.install("--set", "router.enabled=true")
    profiles, routers = release.uids("acceleratorprofiles"), release.uids("fleetrouters")

    release.helm("uninstall", "kvfleet")
    assert "kvfleet-operator" not in release.objects("deployments")
    assert len(release.crds()) == 4
    assert (release.uids("acceleratorprofiles"), release.uids("fleetrouters")) == (profiles, routers)

    release.install("--set", "router.enabled=true")
    assert (release.uids("acceleratorprofiles"), release.uids("fleetrouters")) == (profiles, routers)


def test_without_keep_an_uninstall_leaves_nothing(release: Release, cluster: Cluster) -> None:
    release.install("--set", "crds.keep=false,router.enabled=true")
    crds = [f"crd/{name}" for name in release.crds()]
    release.helm("uninstall", "kvfleet")
    cluster.run("kubectl", "wait", "--for=delete", *crds, "--timeout=60s")
    assert release.crds() == {}
    roles = cluster.run("kubectl", "get", "clusterroles,clusterrolebindings", "--output=name")
    assert "kvfleet" not in roles


def test_an_operator_of_some_namespaces_can_nothing_in_others(
    release: Release, can: Callable[..., bool], cluster: Cluster
) -> None:
    release.install("--set", f"watchNamespaces={{{NAMESPACE}}}", *READY)
    assert can("patch", "deployments.apps", NAMESPACE)
    assert can("list", "modelpools.kvfleet.io", NAMESPACE)
    assert can("update", "leases.coordination.k8s.io/kvfleet-operator", NAMESPACE)
    assert not can("update", "leases.coordination.k8s.io/other", NAMESPACE)
    assert not can("get", "secrets", NAMESPACE)
    for resource in ("deployments.apps", "modelpools.kvfleet.io", "pods", "configmaps"):
        assert not can("list", resource, "default"), resource


def test_users_who_may_edit_a_namespace_may_edit_its_fleet(release: Release, cluster: Cluster) -> None:
    release.install()
    member = ["--as", "a-user", "--namespace", NAMESPACE]
    cluster.run("kubectl", "create", "rolebinding", "a-user", "--clusterrole=edit", "--user=a-user", f"-n={NAMESPACE}")
    cluster.run(
        "kubectl",
        "wait",
        "clusterrole/edit",
        "--for=jsonpath={.rules[?(@.resources[0]=='modelpools')]}",
        "--timeout=30s",
    )
    assert cluster.run("kubectl", "auth", "can-i", "create", "modelpools.kvfleet.io", *member).strip() == "yes"
    with pytest.raises(ClusterError):
        cluster.run("kubectl", "auth", "can-i", "delete", "acceleratorprofiles.kvfleet.io", *member)
