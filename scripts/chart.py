"""The generated files of the Helm chart; generate.py writes and checks them. What comes from where:

- files/crds/: copies of crds/*.yaml; files/profiles/: copies of the bundled AcceleratorProfiles. A chart can only read
  files below itself.
- files/rbac.yaml: the operator's own list of the rights it needs (kvfleet_operator.rbac).
- values.schema.json and the table in README.md: values.yaml, see chart_values.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from chart_values import read_values, values_schema, values_table

from kvfleet_operator import rbac

ROOT = Path(__file__).resolve().parents[1]
CHART = Path("helm/kvfleet")
CRDS = Path("crds")
PROFILES = Path("crds/kvfleet_api/profiles")
COPIES = {CRDS: CHART / "files/crds", PROFILES: CHART / "files/profiles"}
"""Folder → the chart's folder that holds copies of its YAML files, and nothing else."""
LEASE_NAME = "LEASE_NAME"
"""Stands for the Lease's name, which the template knows."""
RBAC_HEAD = """\
# Generated from kvfleet_operator.rbac by `make generate`. Do not edit.
# cluster: the ClusterRole beside Roles (watchNamespaces is set); clusterWide: the ClusterRole otherwise;
# namespaced: the Role in each watched namespace; lease: the Role in the release's namespace.
"""
TABLE_START, TABLE_END = "<!-- values: start -->", "<!-- values: end -->"


class ChartError(Exception):
    """A source of the chart is not as it should be; the message says which and what to do."""


def outputs(root: Path = ROOT) -> dict[Path, str]:
    """Every generated file (path below `root`) and what should be in it."""
    wanted = {
        target / source.name: source.read_text()
        for folder, target in COPIES.items()
        for source in sorted((root / folder).glob("*.yaml"))
    }
    wanted[CHART / "files/rbac.yaml"] = rbac_file()
    values = read_values((root / CHART / "values.yaml").read_text())
    schema = values_schema(values, lambda kind: crd_spec_schema(root, kind))
    wanted[CHART / "values.schema.json"] = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    readme = (root / CHART / "README.md").read_text()
    wanted[CHART / "README.md"] = with_table(readme, values_table(values))
    return wanted


def rbac_file() -> str:
    """The operator's rules, by the Role or ClusterRole they belong into."""
    rules = {
        "cluster": rbac.cluster_rules(cluster_wide=False),
        "clusterWide": rbac.cluster_rules(cluster_wide=True),
        "namespaced": rbac.namespaced_rules(),
        "lease": rbac.lease_rules(LEASE_NAME),
    }
    manifests = {role: [rule.manifest() for rule in listed] for role, listed in rules.items()}
    return RBAC_HEAD + yaml.safe_dump(manifests, sort_keys=False, default_flow_style=None)


def crd_spec_schema(root: Path, kind: str) -> dict[str, Any]:
    """The schema of `spec` in the CRD of `kind`."""
    for path in sorted((root / CRDS).glob("*.yaml")):
        crd = yaml.safe_load(path.read_text())
        if crd["spec"]["names"]["kind"] == kind:
            schema: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
            return schema
    raise ChartError(
        f"values.yaml asks for the spec of {kind}, but no file in {CRDS}/ defines that kind: run `make generate`"
    )


def with_table(readme: str, table: str) -> str:
    """The README with the table of values between its marks replaced."""
    before, start, rest = readme.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not start or not end:
        raise ChartError(
            f"{CHART}/README.md lacks the marks {TABLE_START} … {TABLE_END}: put them where the table belongs"
        )
    return f"{before}{start}\n{table}\n{end}{after}"
