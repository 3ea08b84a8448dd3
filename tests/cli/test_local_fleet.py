"""What the operator renders, as local processes."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest

from kvfleet import local
from kvfleet.local import HOST, LocalFleet, LocalFleetError, die_with_parent, free_ports
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


@pytest.mark.skipif(sys.platform != "linux", reason="a parent-death signal is Linux's")
def test_a_process_whose_parent_died_while_it_was_started_ends() -> None:
    gone = os.getppid()  # not its parent any more
    command = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, preexec_fn=partial(die_with_parent, gone))
    try:
        assert child.wait(30) == 1
    finally:
        child.kill()
        child.communicate()


def test_no_port_is_handed_out_twice() -> None:
    ports = free_ports(2000)
    assert len(set(ports)) == 2000


def test_ports_in_use_are_left_out_and_the_lack_of_any_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        [port] = free_ports(1)
        taken.bind((HOST, port))
        monkeypatch.setattr(local, "PORTS", (port, port + 1))
        with pytest.raises(LocalFleetError, match=f"no 1 free ports from {port} to {port} at {HOST}"):
            free_ports(1)
