"""Reading manifests: what is found, and how everything wrong is named."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from kvfleet_api import manifests
from kvfleet_api.manifests import ManifestError, load, parse

POOL = """\
apiVersion: kvfleet.io/v1alpha1
kind: ModelPool
metadata: {name: llama}
spec:
  model: {name: llama-8b}
  accelerator: {profileRef: nvidia-h100-80gb}
"""
POLICY = """\
apiVersion: kvfleet.io/v1alpha1
kind: RoutingPolicy
metadata: {name: chat, namespace: prod}
spec:
  pools: [{name: llama}]
"""


def problems(text: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse(text, name="x.yaml")
    return str(caught.value).splitlines()


def test_objects_of_all_files_with_their_sources(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"# empty document first\n---\n{POOL}---\n{POLICY}")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/b.yml").write_text(POOL.replace("llama}", "other}"))
    (tmp_path / "notes.txt").write_text("not: read")
    found = load([tmp_path])
    assert [pool.key for pool in found.pools] == ["default/llama", "default/other"]
    assert [policy.key for policy in found.policies] == ["prod/chat"]
    source = found.source(found.policies[0])
    assert source is not None
    assert (source.file, source.document, source.line) == (str(tmp_path / "a.yaml"), 2, 10)
    assert found.namespaces() == ["default", "prod"]
    assert len(list(found.objects())) == 3


def test_lists_are_unfolded_and_other_groups_handed_back() -> None:
    items = "\n".join(f"- {line}" if line.startswith("api") else f"  {line}" for line in POOL.splitlines())
    service = "apiVersion: v1\nkind: Service\nmetadata: {name: s}\n"
    found = parse(f"apiVersion: v1\nkind: List\nitems:\n{items}\n---\n{service}")
    assert [pool.metadata.name for pool in found.pools] == ["llama"]
    assert [other["kind"] for other in found.others] == ["Service"]


def test_namespace_is_given_to_objects_without_one() -> None:
    found = parse(f"{POOL}---\n{POLICY}", namespace="llm")
    assert [found.pools[0].key, found.policies[0].key] == ["llm/llama", "prod/chat"]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(POOL.encode())))
    assert load(["-"]).pools[0].metadata.name == "llama"


def test_an_exported_object_is_read_without_its_status() -> None:
    status = "status: {replicas: many, conditions: [{type: Ready}]}\n"
    found = parse(POOL.replace("{name: llama}", "{name: llama, uid: u, managedFields: [], generation: 3}") + status)
    assert found.pools[0].status is None
    assert found.pools[0].metadata.generation == 3


def test_null_means_absent_except_in_free_form_fields() -> None:
    found = parse(POOL + "  replicas: null\n  podTemplate: {spec: {nodeSelector: null}}\n")
    assert found.pools[0].spec.replicas == 1
    assert found.pools[0].spec.pod_template == {"spec": {"nodeSelector": None}}


def test_all_problems_of_all_files_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(POOL + "  replica: 3\n  autoscaling: {minReplicas: 3, maxReplicas: 2}\n")
    (tmp_path / "b.yaml").write_text(POLICY.replace("pools:", "pool:"))
    with pytest.raises(ManifestError) as caught:
        load([tmp_path, tmp_path / "absent.yaml"])
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/a.yaml:7: ModelPool default/llama: spec.replica: unknown field (did you mean replicas?): rename or "
        "remove it; known here: model, engine, role, accelerator, parallelism, replicas, autoscaling, maxWatts, adapters, rollout, podTemplate",
        f"{tmp_path}/a.yaml:8: ModelPool default/llama: spec.autoscaling.minReplicas: minReplicas (3) must not exceed "
        "maxReplicas (2): lower minReplicas or raise maxReplicas",
        f"{tmp_path}/b.yaml:4: RoutingPolicy prod/chat: spec.pools: missing: add it",
        f"{tmp_path}/b.yaml:5: RoutingPolicy prod/chat: spec.pool: unknown field (did you mean pools?): rename or remove it; "
        "known here: match, pools, strategy, priority, slo, energy, prefix, disaggregation, admission, resilience",
        f"{tmp_path}/absent.yaml: no such file or directory: check the path",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (POOL.replace("ModelPool", "ModelPol"), "x.yaml:2: kind: unknown kind 'ModelPol' (did you mean ModelPool?): one of ModelPool, "
         "RoutingPolicy, FleetRouter, AcceleratorProfile"),
        (POOL.replace("v1alpha1", "v2"), "x.yaml:1: ModelPool: apiVersion: 'kvfleet.io/v2' is not served: write kvfleet.io/v1alpha1"),
        ("apiVersion: kvfleet.io/v1alpha1\nkind: FleetRouter\nmetadata: {name: r}\nspce: {}\n",
         "x.yaml:4: FleetRouter default/r: spce: unknown field (did you mean spec?): rename or remove it"),
        (POOL.replace("{name: llama}", "{name: llama, lables: {}}"),
         "x.yaml:3: ModelPool default/llama: metadata.lables: unknown field (did you mean labels?): rename or remove it"),
        (f"{POOL}---\n{POOL}", "x.yaml:8: ModelPool default/llama: metadata.name: already defined at x.yaml:1: remove one or rename it"),
        ("replicas: 3\n", "x.yaml:1: not a Kubernetes object: it needs apiVersion and kind (strings)"),
        ("- 1\n", "x.yaml:1: not a Kubernetes object: it needs apiVersion and kind (strings)"),
        (POLICY + "  energy: {mode: Off}\n", "x.yaml:6: RoutingPolicy prod/chat: spec.energy.mode: YAML reads a bare Off as a boolean: "
         'write "Off" in quotes (one of Off, Prefer, Strict)'),
        (POLICY + "  energy: {mode: prefer}\n", "x.yaml:6: RoutingPolicy prod/chat: spec.energy.mode: must be one of Off, Prefer, Strict; "
         "found 'prefer' (did you mean Prefer?)"),
        (POOL + "  replicas: '2'\n", "x.yaml:7: ModelPool default/llama: spec.replicas: must be a whole number; found '2': write it without "
         "quotes or decimals"),
        (POOL + "  rollout: {max_surge: 1}\n", "x.yaml:7: ModelPool default/llama: spec.rollout.max_surge: unknown field (did you mean "
         "maxSurge?): rename or remove it; known here: maxSurge, maxUnavailable, drainSeconds"),
        (POOL + "  replicas: -1\n", "x.yaml:7: ModelPool default/llama: spec.replicas: must be at least 0; found -1"),
        (POOL + "  engine: {args: {a: 1}}\n", "x.yaml:7: ModelPool default/llama: spec.engine.args: must be a list; found a mapping: start "
         "each entry with `- `"),
        (POOL + "  engine: {args: [--port, 1]}\n", "x.yaml:7: ModelPool default/llama: spec.engine.args[1]: must be a string; found 1: put "
         "it in quotes"),
        (POOL + "  engine: fast\n", "x.yaml:7: ModelPool default/llama: spec.engine: must be a mapping of fields; found 'fast'"),
        (POOL + "  podTemplate: {a: .nan}\n", "x.yaml:1: ModelPool default/llama: holds a value JSON cannot express: Out of range float "
         "values are not JSON compliant"),
        (POOL.replace("name: llama}", "name: Llama_8}"), "x.yaml:3: ModelPool default/Llama_8: metadata.name: 'Llama_8' does not match "
         "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$: change it"),
        ("apiVersion: kvfleet.io/v1alpha1\nkind: FleetRouter\n", "x.yaml:1: FleetRouter default/(unnamed): metadata: missing: add it"),
        ("apiVersion: kvfleet.io/v1alpha1\nkind: FleetRouter\nmetadata: []\n",
         "x.yaml:3: FleetRouter default/(unnamed): metadata: must be a mapping of fields; found a list"),
        (POOL + "a: [1\n", "x.yaml:8: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ],
    ids=lambda value: value.rsplit(": ", 2)[-2][:40] if value.startswith("x.yaml") else "",
)  # fmt: skip
def test_a_problem_names_file_line_object_field_and_remedy(text: str, expected: str) -> None:
    assert problems(text) == [expected]


def test_a_cluster_scoped_object_has_no_namespace() -> None:
    profile = manifests.bundled_profiles()[0].model_dump_json(by_alias=True, exclude_none=True)
    assert parse(profile).profiles[0].key == manifests.bundled_profiles()[0].metadata.name
    assert parse(profile).namespaces() == []
    (problem,) = problems(profile.replace('"metadata":{', '"metadata":{"namespace":"a",'))
    assert problem.endswith("metadata.namespace: AcceleratorProfile is cluster-scoped: remove it")


def test_a_directory_without_manifests_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no \*.yaml or \*.yml file in this directory: check the path"):
        load([tmp_path])


def test_an_unreadable_file_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(POOL)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ManifestError, match=r"a\.yaml: cannot be read: Permission denied"):
        load([path])


def test_own_profile_replaces_the_bundled_one_of_its_name() -> None:
    bundled = manifests.bundled_profiles()
    own = bundled[0].model_copy(update={"spec": bundled[0].spec.model_copy(update={"models": []})})
    together = manifests.with_bundled([own])
    assert sorted(profile.metadata.name for profile in together) == [profile.metadata.name for profile in bundled]
    assert together[0].spec.models == []
