"""The chart on a real API server with Helm 3 and 4: installed, upgraded, rolled back, uninstalled, installed again.

Named to run last: a first install needs a cluster that has never seen kvfleet, so these tests remove every kvfleet
release and the CRDs, from a cluster that was made for tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.cluster import Cluster, ClusterError, ExistingCluster
from harness.kube import wait_until

from kvfleet_api.manifests import bundled_profiles

CHART = Path(__file__).resolve().parents[1] / "helm/kvfleet"
NAMESPACE = "kvfleet-system"
GROUP = "kvfleet.io"
CRDS_GONE = "--timeout=180s"
"""The API server gives up on a CRD's objects after a minute where it is busy, and then tries again."""
READY = ["--wait", "--timeout", "120s"]
QUICK = ["--set", "operator.terminationGracePeriodSeconds=1,operator.replicas=1,router.spec.drainSeconds=0"]
"""So that a release is gone quickly."""

Object = dict[str, Any]


class Release:
    """The release `kvfleet` in NAMESPACE, by one of the Helm commands."""

    def __init__(self, cluster: Cluster, helm: str) -> None:
        self._cluster = cluster
        self._helm = helm

    def helm(self, *arguments: str) -> str:
        return self._cluster.run(self._helm, *arguments, "--namespace", NAMESPACE, timeout_s=180)

    def install(self, *arguments: str, chart: Path = CHART) -> str:
        return self.helm("install", "kvfleet", str(chart), "--create-namespace", *QUICK, *arguments)

    def upgrade(self, *arguments: str, chart: Path = CHART) -> str:
        return self.helm("upgrade", "kvfleet", str(chart), *QUICK, *arguments)

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
        cluster.run("kubectl", "delete", *crds, CRDS_GONE, timeout_s=190)
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


def allowed(cluster: Cluster, verb: str, resource: str, *more: str) -> bool:
    """kubectl auth can-i."""
    try:
        return cluster.run("kubectl", "auth", "can-i", verb, resource, *more).strip() == "yes"
    except ClusterError as error:
        if str(error).rstrip().endswith("failed (1): no"):
            return False
        raise


BUNDLED = {profile.metadata.name for profile in bundled_profiles()}


def test_a_first_install_brings_everything_and_its_test_passes(release: Release) -> None:
    release.install("--set", "router.enabled=true")
    assert len(release.crds()) == 4
    assert release.objects("acceleratorprofiles").keys() == BUNDLED
    assert release.objects("fleetrouters").keys() == {"kvfleet"}
    assert "kvfleet-objects" not in release.objects("pods")

    release.upgrade("--set", "router.enabled=true", *READY)
    assert "Succeeded" in release.helm("test", "kvfleet", "--timeout", "60s")


def test_upgrade_and_rollback_change_objects_in_place(release: Release) -> None:
    def router_replicas() -> int:
        return int(release.objects("fleetrouters")["kvfleet"]["spec"]["replicas"])

    release.install("--set", "router.enabled=true,router.spec.replicas=3")
    assert router_replicas() == 3
    before = release.uids("acceleratorprofiles") | release.uids("fleetrouters")

    release.upgrade("--set", "router.enabled=true,router.spec.replicas=1")
    assert router_replicas() == 1
    release.helm("rollback", "kvfleet", "1")
    assert router_replicas() == 3
    assert release.uids("acceleratorprofiles") | release.uids("fleetrouters") == before


def test_an_upgrade_brings_new_crds_and_profiles(release: Release, tmp_path: Path) -> None:
    older = shutil.copytree(CHART, tmp_path / "kvfleet")
    crd_file, profile_file = older / "files/crds/kvfleet.io_modelpools.yaml", older / "files/profiles/nvidia-l40s.yaml"
    crd, profile = yaml.safe_load(crd_file.read_text()), yaml.safe_load(profile_file.read_text())
    watts = profile["spec"]["power"]["idleWatts"]
    crd["spec"]["names"]["shortNames"], profile["spec"]["power"]["idleWatts"] = ["old"], watts - 1
    crd_file.write_text(yaml.safe_dump(crd))
    profile_file.write_text(yaml.safe_dump(profile))

    def installed() -> tuple[list[str], int]:
        short_names = release.crds()["modelpools.kvfleet.io"]["spec"]["names"]["shortNames"]
        return short_names, release.objects("acceleratorprofiles")["nvidia-l40s"]["spec"]["power"]["idleWatts"]

    release.install(chart=older)
    assert installed() == (["old"], watts - 1)
    release.upgrade()
    assert installed() == (["mp"], watts)


def test_what_users_have_survives_an_uninstall_and_the_next_install_takes_it_over(release: Release) -> None:
    release.install("--set", "router.enabled=true")
    before = release.uids("acceleratorprofiles") | release.uids("fleetrouters")

    release.helm("uninstall", "kvfleet")
    assert "kvfleet-operator" not in release.objects("deployments")
    assert len(release.crds()) == 4
    assert release.uids("acceleratorprofiles") | release.uids("fleetrouters") == before

    release.install("--set", "router.enabled=true,router.spec.replicas=1")
    assert release.uids("acceleratorprofiles") | release.uids("fleetrouters") == before
    assert release.objects("fleetrouters")["kvfleet"]["spec"]["replicas"] == 1


def test_without_keep_an_uninstall_leaves_nothing(release: Release, cluster: Cluster) -> None:
    release.install("--set", "crds.keep=false,router.enabled=true")
    crds = [f"crd/{name}" for name in release.crds()]
    release.helm("uninstall", "kvfleet")
    cluster.run("kubectl", "wait", "--for=delete", *crds, CRDS_GONE, timeout_s=190)
    assert release.crds() == {}
    assert "kvfleet" not in cluster.run("kubectl", "get", "clusterroles,clusterrolebindings", "--output=name")


def test_an_operator_of_some_namespaces_can_nothing_in_others(release: Release, cluster: Cluster) -> None:
    release.install("--set", f"watchNamespaces={{{NAMESPACE}}}", *READY)
    account = f"--as=system:serviceaccount:{NAMESPACE}:kvfleet-operator"

    def may(verb: str, resource: str, namespace: str = NAMESPACE) -> bool:
        return allowed(cluster, verb, resource, account, f"--namespace={namespace}")

    assert may("patch", "deployments.apps")
    assert may("list", f"modelpools.{GROUP}")
    assert may("update", "leases.coordination.k8s.io/kvfleet-operator")
    assert not may("update", "leases.coordination.k8s.io/other")
    assert not may("get", "secrets")
    for resource in ("deployments.apps", f"modelpools.{GROUP}", "pods", "configmaps"):
        assert not may("list", resource, "default"), resource


def test_users_who_may_edit_a_namespace_may_edit_its_fleet(release: Release, cluster: Cluster) -> None:
    release.install()
    cluster.run("kubectl", "create", "rolebinding", "a-user", "--clusterrole=edit", "--user=a-user", f"-n={NAMESPACE}")

    def may(verb: str, resource: str, *more: str) -> bool:
        return allowed(cluster, verb, resource, "--as=a-user", f"--namespace={NAMESPACE}", *more)

    wait_until(lambda: may("create", f"modelpools.{GROUP}"), "the role `edit` takes in kvfleet's kinds", 30)
    assert may("patch", f"modelpools.{GROUP}", "--subresource=scale")
    assert not may("patch", f"modelpools.{GROUP}", "--subresource=status")
