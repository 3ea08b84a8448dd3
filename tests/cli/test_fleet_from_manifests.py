"""Manifests become a FleetConfig, or an error that names file, object, field and remedy."""

from pathlib import Path

import pytest

from kvfleet.fleet import FleetError, compile_manifests, with_strategy, with_workers
from kvfleet_api.manifests import load

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"

POOL = """
apiVersion: kvfleet.io/v1alpha1
kind: ModelPool
metadata: {name: a}
spec:
  model: {name: llama-8b}
  accelerator: {profileRef: nvidia-h100-80gb}
"""
POLICY = """
---
apiVersion: kvfleet.io/v1alpha1
kind: RoutingPolicy
metadata: {name: p}
spec:
  pools: [{name: b}]
"""
ROUTER = """
---
apiVersion: kvfleet.io/v1alpha1
kind: FleetRouter
metadata: {name: r, namespace: elsewhere}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return path


def test_the_quickstart_is_one_model_on_two_accelerators() -> None:
    config = compile_manifests(load([QUICKSTART]))
    assert {pool.accelerator for pool in config.pools} == {"nvidia-h100-80gb", "nvidia-a100-80gb"}
    assert [policy.energy_mode for policy in config.policies] == ["Prefer"]
    h100, a100 = sorted(config.pools, key=lambda pool: pool.accelerator, reverse=True)
    assert h100.cost.step_s < a100.cost.step_s


def test_a_missing_pool_names_file_policy_and_field(tmp_path: Path) -> None:
    path = write(tmp_path, POOL + POLICY)
    with pytest.raises(FleetError) as error:
        compile_manifests(load([path]))
    message = str(error.value)
    for word in (str(path), "RoutingPolicy default/p", "spec.pools[0]", "'b'"):
        assert word in message


def test_a_router_without_pools_beside_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="elsewhere holds no ModelPool"):
        compile_manifests(load([write(tmp_path, POOL + ROUTER)]))


def test_no_pool_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no ModelPool"):
        compile_manifests(load([write(tmp_path, ROUTER)]))


def test_workers_are_given_by_pool() -> None:
    config = with_workers(
        compile_manifests(load([QUICKSTART])), ["llama-8b-h100=http://127.0.0.1:1,http://127.0.0.1:2"]
    )
    urls = {pool.name: [endpoint.url for endpoint in pool.endpoints] for pool in config.pools}
    assert urls == {"llama-8b-h100": ["http://127.0.0.1:1", "http://127.0.0.1:2"], "llama-8b-a100": []}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("llama-8b-h10=http://127.0.0.1:1", "did you mean llama-8b-h100"),
        ("http://127.0.0.1:1", "POOL=URL"),
        ("llama-8b-h100=ftp://127.0.0.1:1", "http://host:port"),
        ("llama-8b-h100=http://127.0.0.1:1/v1", "http://host:port"),
    ],
)
def test_a_wrong_worker_entry_is_named(entry: str, words: str) -> None:
    config = compile_manifests(load([QUICKSTART]))
    with pytest.raises(ValueError, match=words):
        with_workers(config, [entry])


def test_one_strategy_for_every_policy() -> None:
    config = with_strategy(compile_manifests(load([QUICKSTART])), "round_robin")
    assert {policy.strategy for policy in config.policies} == {"round_robin"}
