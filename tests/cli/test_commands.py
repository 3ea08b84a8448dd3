"""The command line: what is wrong is said with file, field and remedy, and the exit code tells."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

POOL = """
apiVersion: kvfleet.io/v1alpha1
kind: ModelPool
metadata: {name: a}
spec:
  model: {name: llama-8b}
  accelerator: {profileRef: nvidia-h100-80gb}
"""


def kvfleet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvfleet", *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )


WRONG = {
    "bad field": (POOL + "  replica: 3\n", ["ModelPool default/a", "spec.replica", "did you mean replicas"]),
    "min > max": (
        POOL + "  autoscaling: {minReplicas: 3, maxReplicas: 2}\n",
        ["ModelPool default/a", "spec.autoscaling", "minReplicas", "lower minReplicas or raise maxReplicas"],
    ),
    "missing pool": (
        POOL
        + "---\napiVersion: kvfleet.io/v1alpha1\nkind: RoutingPolicy\nmetadata: {name: p}\nspec: {pools: [{name: b}]}\n",
        ["RoutingPolicy default/p", "spec.pools[0]", "create"],
    ),
    "missing profile": (
        POOL.replace("nvidia-h100-80gb", "nvidia-h100-80g"),
        ["ModelPool default/a", "spec.accelerator.profileRef", "nvidia-h100-80gb"],
    ),
}


@pytest.mark.parametrize(
    "command", [["render"], ["router", "--port", "0", "--admin-port", "0"]], ids=["render", "router"]
)
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_manifest_names_file_object_field_and_remedy(command: list[str], case: str, tmp_path: Path) -> None:
    text, words = WRONG[case]
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    result = kvfleet(*command, "-f", str(path))
    assert result.returncode == 2, result.stderr
    for word in [str(path), *words]:
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_render_prints_what_kubectl_reads() -> None:
    result = kvfleet("render", "-f", "examples/quickstart")
    objects = list(yaml.safe_load_all(result.stdout))
    kinds = [obj["kind"] for obj in objects]
    assert kinds.count("Deployment") == 3
    assert kinds.count("ConfigMap") == 1
    assert all(obj["metadata"]["namespace"] == "default" for obj in objects)


def test_crds_prints_the_four_kinds() -> None:
    crds = list(yaml.safe_load_all(kvfleet("crds").stdout))
    assert sorted(crd["spec"]["names"]["kind"] for crd in crds) == [
        "AcceleratorProfile",
        "FleetRouter",
        "ModelPool",
        "RoutingPolicy",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["router"], "no fleet"),
        (["router", "--workers", "ftp://x"], "http://host:port"),
        (["router", "--workers", "http://127.0.0.1:1", "--strategy", "roundrobin"], "round_robin"),
        (["router", "--config", "/nonexistent.json"], "--config"),
        (["router", "--kubernetes"], "--config-map"),
        (["router", "--kubernetes", "--config-map", "a/b"], "not inside a cluster"),
        (["router", "--kubernetes", "-f", "examples/quickstart"], "leave -f and --workers out"),
        (["router", "--kubeconfig", "/nonexistent", "--config-map", "a/b"], "--kubeconfig /nonexistent"),
        (["router", "--workers", "http://127.0.0.1:1", "--tls-cert", "x.crt"], "give both or neither"),
        (["router", "--workers", "http://127.0.0.1:1", "--api-keys-file", "/nonexistent"], "/nonexistent"),
        (["render", "-f", "/nonexistent"], "no such file"),
        (["demo", "--trace", "/nonexistent"], "cannot be read"),
        (["demo", "--policy", "best"], "use one of"),
        (["demo", "--json", "/nonexistent/out.json"], "is not a directory"),
        (["router", "--workers", "http://127.0.0.1:1", "--host", "unix:/nowhere/r"], "say with --admin-host"),
        (["explain", "--url", "http://127.0.0.1:1"], "admin address"),
        (["explain", "--body", "/nonexistent"], "--body /nonexistent"),
        (["explain", "--body", "README.md", "--url", "http://127.0.0.1:1"], "admin address"),
        (["explain", "--body", "README.md", "-H", "x"], "write it as `name: value`"),
        (["explain", "--body", "README.md", "1f-2"], "leave out the decision"),
    ],
)
def test_wrong_usage_says_what_to_do(arguments: list[str], words: str) -> None:
    result = kvfleet(*arguments)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["demo", "router", "operator", "worker", "render", "crds", "explain"])
def test_help_has_an_example(command: str) -> None:
    result = kvfleet(command, "--help")
    assert result.returncode == 0
    assert f"kvfleet {command}" in result.stdout.replace("\n", " ")
