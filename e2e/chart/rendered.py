"""The chart rendered for tests: both Helm versions as functions, and ways into the objects."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from harness.build import binaries

E2E = Path(__file__).resolve().parents[1]
REPOSITORY = E2E.parent
CHART = REPOSITORY / "helm/kvfleet"
CASES = ("default", "all", "namespaced")
"""Values files beside this one, each with a golden file."""
KUBERNETES = "1.29.0"
"""The oldest version the chart says it works on."""
HELM_VERSIONS = ("helm", "helm3")
ROUTER = ["--set", "router.enabled=true"]
CRD = "CustomResourceDefinition"
COMPONENT = "app.kubernetes.io/component"

Manifest = dict[str, Any]
Helm = Callable[..., str]
Render = Callable[..., list[Manifest]]


class HelmError(Exception):
    """What Helm printed when it failed."""


def helm_command(name: str) -> Helm:
    """One of HELM_VERSIONS as a function: arguments → output; HelmError where it fails."""
    program = binaries().path(name)

    def run(*arguments: str) -> str:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
        if result.returncode:
            raise HelmError(result.stderr)
        return result.stdout

    return run


def renderer(helm: Helm) -> Render:
    """`helm template` as a function: arguments → objects."""

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


def component(objects: list[Manifest], kind: str, name: str) -> list[Manifest]:
    return [found for found in of_kind(objects, kind) if found["metadata"]["labels"].get(COMPONENT) == name]


def container(objects: list[Manifest]) -> Manifest:
    (only,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(only)


def pods(objects: list[Manifest]) -> dict[str, Manifest]:
    """Pod specs by component: operator, objects (the hook), test."""
    owners = [*of_kind(objects, "Pod"), *of_kind(objects, "Deployment")]
    specs = [owner["spec"].get("template", owner)["spec"] for owner in owners]
    return {owner["metadata"]["labels"][COMPONENT]: spec for owner, spec in zip(owners, specs, strict=True)}


def applied(objects: list[Manifest]) -> dict[str, Manifest]:
    """Objects that the chart's hook applies."""
    data = [found["data"] for found in of_kind(objects, "ConfigMap") if found["metadata"]["name"].endswith("-objects")]
    return {name: yaml.safe_load(text) for each in data for name, text in each.items()}
