"""What the operator renders, as local processes."""

from pathlib import Path

import httpx
import pytest

from kvfleet.local import LocalFleet
from kvfleet_api.manifests import bundled_profiles, parse
from kvfleet_operator.render import render

FLEET = """
apiVersion: kvfleet.io/v1alpha1
kind: ModelPool
metadata: {name: llama}
spec:
  model: {name: llama-8b}
  accelerator: {profileRef: nvidia-h100-80gb}
  adapters: [{name: sql, uri: my-org/llama-8b-sql}]
---
apiVersion: kvfleet.io/v1alpha1
kind: FleetRouter
metadata: {name: router}
"""


@pytest.mark.parametrize("model", ["llama-8b", "sql"])
async def test_models_and_adapters_are_served_by_the_router(tmp_path: Path, model: str) -> None:
    fleet = LocalFleet(render(parse(FLEET)), bundled_profiles(), tmp_path, speed=20)
    async with fleet, httpx.AsyncClient(trust_env=False) as client:
        assert fleet.router is not None
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3}
        answer = await client.post(f"http://127.0.0.1:{fleet.router.port}/v1/chat/completions", json=body)
        assert answer.json()["model"] == model
