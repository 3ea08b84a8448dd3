"""LoRA in a worker's pod: when the engines run with it, that the list restarts nothing, and how a starting worker loads it."""

import asyncio
import contextlib
import json
import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_workers import models_of, worker

from kvfleet_operator.reconcile import engine, lora
from kvfleet_operator.reconcile.workload import build

SQL, LAW = {"name": "sql", "uri": "my-org/sql"}, {"name": "law", "uri": "my-org/law"}


@pytest.fixture
def built(make):
    """The workload of a pool, next to what it is now."""

    def build_one(live=None, **spec):
        return build(make.parse(make.pool(**spec)), make.parse(make.profile()), live)

    return build_one


def template(workload):
    spec = workload["spec"]
    return spec.get("template") or spec["leaderWorkerTemplate"]["leaderTemplate"]


def container(workload):
    return template(workload)["spec"]["containers"][0]


def value_of(args, flag):
    return args[args.index(flag) + 1]


# When


def test_a_pool_without_adapters_pays_nothing_for_them(built):
    workload = built()
    assert "--enable-lora" not in container(workload)["args"]
    assert "kvfleet.io/lora" not in template(workload)["metadata"]["labels"]
    assert "httpGet" in container(workload)["startupProbe"]


def test_adapters_switch_it_on(built):
    workload = built(adapters=[SQL])
    args, env = container(workload)["args"], {e["name"]: e.get("value") for e in container(workload)["env"]}
    assert "--enable-lora" in args and "--lora-modules" not in args
    assert value_of(args, "--max-lora-rank") == "64"
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert template(workload)["metadata"]["labels"]["kvfleet.io/lora"] == "enabled"
    assert {"name": "kvfleet-adapters", "configMap": {"name": "llama-adapters", "optional": True}} in (
        template(workload)["spec"]["volumes"]
    )


def test_a_pool_can_be_made_ready_for_adapters_to_come(built):
    asked = built(engine={"args": ["--enable-lora"]})
    assert container(asked)["args"].count("--enable-lora") == 1
    assert template(built(live=asked, adapters=[SQL], engine={"args": ["--enable-lora"]})) == template(asked)


def test_who_forbids_it_gets_none(built):
    running = built(adapters=[SQL])
    for live in (None, running):
        workload = built(live=live, adapters=[SQL], engine={"args": ["--no-enable-lora"]})
        assert "--enable-lora" not in container(workload)["args"]
        assert "kvfleet.io/lora" not in template(workload)["metadata"]["labels"]


def test_the_users_flags_replace_the_generated_ones(built):
    args = container(built(adapters=[SQL], engine={"args": ["--max-loras=40", "--max_lora_rank", "256"]}))["args"]
    assert "--max-loras" not in args and "--max-lora-rank" not in args
    assert int(value_of(args, "--max-cpu-loras")) >= 40  # vLLM refuses fewer than are active


ADAPTERS = st.lists(st.sampled_from("abcdef"), unique=True).map(lambda ns: [{"name": n, "uri": f"/{n}"} for n in ns])


@pytest.mark.parametrize("parallelism", [{}, {"tensor": 8, "nodes": 2}])
@settings(max_examples=40, deadline=None)
@given(st.lists(ADAPTERS.filter(bool), min_size=1, max_size=1), st.lists(ADAPTERS, max_size=4))
def test_once_there_are_adapters_no_change_of_them_restarts_a_worker(parallelism, first, changes):
    from operator_manifests import pool, profile

    from kvfleet_api.manifests import KINDS

    def workload(adapters, live):
        spec = KINDS["ModelPool"].model_validate(pool(adapters=adapters, parallelism=parallelism))
        return build(spec, KINDS["AcceleratorProfile"].model_validate(profile()), live)

    live = workload(first[0], None)
    for adapters in changes:
        now = workload(adapters, live)
        assert now["spec"] == live["spec"]
        live = now


def test_the_list_is_in_a_config_map(make):
    manifest = lora.config_map(make.parse(make.pool(adapters=[SQL, LAW])), {})
    assert manifest["metadata"]["name"] == "llama-adapters"
    assert json.loads(manifest["data"]["adapters.json"]) == {"sql": "my-org/sql", "law": "my-org/law"}


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--lora-modules", "a=/x", '{"name": "b", "path": "/y"}', "--max-loras", "2"], {"a", "b"}),
        (["--lora-modules=a=/x"], {"a"}),
        (["--lora_modules", "a=/x", "--lora-modules", "b=/x"], {"b"}),
        (["--lora-modules", "{broken", "c=/z"], {"c"}),
        (["--max-loras", "a=/x"], set()),
        (["--lora-modules"], set()),
    ],
)
def test_adapters_given_on_the_command_line_are_known(make, args, names):
    assert lora.static_names(make.parse(make.pool(engine={"args": args})).spec) == names


def test_a_list_that_stays_within_the_startup_budget(make):
    spec = make.parse(make.pool(adapters=[SQL], engine={"startupSeconds": 601})).spec
    probe = engine.container(make.parse(make.pool(adapters=[SQL])), "gpu", with_lora=True)["startupProbe"]
    assert probe["timeoutSeconds"] > lora.LOAD_S
    assert lora.startup_check(spec)["exec"]["command"][3:5] == ["8000", "/etc/kvfleet-adapters/adapters.json"]


# A worker that starts


async def load_at_start(port, path, load_s=10.0):
    """The startup probe as the kubelet runs it: (exit code, what it says)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", lora.LOADER, str(port), str(path), str(load_s), "5",
        env={**os.environ, "POD_IP": "127.0.0.1", "http_proxy": "http://127.0.0.1:9"},
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, errors.decode()


async def test_a_starting_worker_loads_what_is_listed(tmp_path):
    listed = tmp_path / "adapters.json"
    listed.write_text(json.dumps({"sql": "my-org/sql", "nowhere": "/no/such/dir", "law": "my-org/law"}))
    async with worker() as server:
        assert await load_at_start(server.port, listed) == (0, "")
        assert await models_of(server) == {"sql": "my-org/sql", "law": "my-org/law"}
        assert await load_at_start(server.port, listed) == (0, "")  # again, as after a probe that took too long


@pytest.mark.parametrize("content", [None, "{", "[]", '"x"', '{"a": {"b": 1}}'])
async def test_a_list_that_cannot_be_read_keeps_no_worker_from_serving(tmp_path, content):
    listed = tmp_path / "adapters.json"
    if content is not None:
        listed.write_text(content)
    async with worker() as server:
        code, _ = await load_at_start(server.port, listed)
        assert code == 0
        assert await models_of(server) == {}


async def test_an_engine_that_does_not_answer_has_not_started(tmp_path, unused_tcp_port):
    code, said = await load_at_start(unused_tcp_port, tmp_path / "adapters.json")
    assert code == 1
    assert said.startswith(f"http://127.0.0.1:{unused_tcp_port}/health: ") and "Traceback" not in said


async def test_a_load_that_hangs_delays_a_worker_only_so_long(tmp_path):
    listed = tmp_path / "adapters.json"
    listed.write_text(json.dumps({"slow": "/a", "never tried": "/b"}))
    asked = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.split()[1].decode())
        if asked[-1] != "/v1/load_lora_adapter":
            body = b'{"data": []}'
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            writer.close()
        else:
            with contextlib.suppress(ConnectionError):
                await reader.read()  # until the other side gives up
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert (await load_at_start(port, listed, load_s=0.2))[0] == 0
    assert asked == ["/health", "/v1/models", "/v1/load_lora_adapter"]
