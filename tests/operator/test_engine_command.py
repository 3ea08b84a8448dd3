"""The `vllm serve` command, and the drain hook as the process it is."""

import http.server
import json
import ssl
import subprocess
import sys
import threading

import pytest
import trustme

from kvfleet_operator.reconcile import engine
from kvfleet_operator.reconcile.workload import build


def args_of(make, **spec):
    return engine.serve_args(make.parse(make.pool(**spec)))


def value_of(args, flag):
    return args[args.index(flag) + 1]


def test_the_model_comes_first_and_the_users_arguments_last(make):
    args = args_of(make, engine={"args": ["--max-num-seqs", "7"]})
    assert args[0] == "meta-llama/Llama-3.1-8B-Instruct"
    assert args[-2:] == ["--max-num-seqs", "7"]
    assert value_of(args, "--served-model-name") == "llama-8b"


@pytest.mark.parametrize(
    ("given", "dropped"),
    [
        (["--block-size", "32"], "--block-size"),
        (["--block-size=32"], "--block-size"),
        (["--block_size=32"], "--block-size"),
        (["-tp", "2"], "--tensor-parallel-size"),
        (["--no-enable-prefix-caching"], "--enable-prefix-caching"),
        (["--kv-events-config", "{}"], "--kv-events-config"),
    ],
)
def test_a_flag_the_user_gives_replaces_the_generated_one(make, given, dropped):
    args = args_of(make, engine={"args": given})
    own = args[: len(args) - len(given)]
    assert dropped not in own
    assert dropped in args_of(make)


def test_replacing_a_flag_takes_its_values_away_too(make):
    plain, replaced = args_of(make), args_of(make, engine={"args": ["--block-size=32"]})
    at = plain.index("--block-size")
    assert replaced == [*plain[:at], *plain[at + 2 :], "--block-size=32"]


def test_kv_events_are_published_where_the_service_says(make):
    args = args_of(make, engine={"kvEvents": {"port": 6001, "replayPort": 6002}})
    config = json.loads(value_of(args, "--kv-events-config"))
    assert config["endpoint"] == "tcp://*:6001"
    assert config["replay_endpoint"] == "tcp://*:6002"
    assert config["enable_kv_cache_events"] is True
    pool = make.parse(make.pool(engine={"kvEvents": {"port": 6001, "replayPort": 6002}}))
    assert ("kv-events", 6001) in engine.service_ports(pool.spec)
    assert "--kv-events-config" not in args_of(make, engine={"kvEvents": {"enabled": False}})


def test_nodes_of_one_worker_find_each_other_through_their_leader(make):
    pool = make.parse(make.pool(parallelism={"tensor": 8, "pipeline": 2, "nodes": 2}))
    live = build(pool, make.parse(make.profile()), None)
    template = live["spec"]["leaderWorkerTemplate"]
    leader, follower = (template[part]["spec"]["containers"][0] for part in ("leaderTemplate", "workerTemplate"))
    assert value_of(leader["args"], "--nnodes") == "2"
    assert value_of(leader["args"], "--master-addr") == "$(LWS_LEADER_ADDRESS)"
    assert value_of(follower["args"], "--node-rank") == "$(LWS_WORKER_INDEX)"
    assert "--headless" in follower["args"] and "--headless" not in leader["args"]
    assert "readinessProbe" not in follower and "ports" not in follower
    assert leader["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert template["size"] == 2
    labels = template["workerTemplate"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/component"] == "engine-follower"  # no Service selects it


def test_the_profile_says_which_resource_a_pod_asks_for(make):
    profile = make.profile()
    profile["spec"]["accelerator"]["resourceName"] = "amd.com/gpu"
    pod = build(make.parse(make.pool()), make.parse(profile), None)["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"amd.com/gpu": "1"}
    assert pod["tolerations"] == [{"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_there_is_time_for_settling_draining_and_teardown(make):
    def grace(**spec):
        pool = make.parse(make.pool(**spec))
        return build(pool, make.parse(make.profile()), None)["spec"]["template"]["spec"][
            "terminationGracePeriodSeconds"
        ]

    assert grace(rollout={"drainSeconds": 100}) == engine.SETTLE_S + 100 + engine.TEARDOWN_S
    # Who wants vLLM to wait after SIGTERM as well gets the time for it.
    added = grace(rollout={"drainSeconds": 100}, engine={"args": ["--shutdown-timeout", "60"]})
    assert added == engine.SETTLE_S + 100 + 60 + engine.TEARDOWN_S


def test_the_startup_probe_gives_the_engine_its_whole_budget(make):
    pool = make.parse(make.pool(engine={"startupSeconds": 601}))
    probe = engine.container(pool, "nvidia.com/gpu")["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 601


def test_arguments_that_cut_the_wiring_are_named_with_the_remedy(make):
    pool = make.parse(make.pool(engine={"args": ["--port=1", "--api-key", "k", "--max-num-seqs", "2"]}))
    assert engine.unwired(pool.spec) == [
        "engine.args sets --api-key: remove it, routers hold no key for engines",
        "engine.args sets --port: set spec.engine.port instead",
    ]


def test_an_engine_with_a_certificate_serves_https_and_is_probed_so(make):
    pool = make.parse(make.pool(engine={"tls": {"certificateSecretRef": "llama-tls"}}, adapters=[]))
    args = engine.serve_args(pool)
    assert value_of(args, "--ssl-certfile") == "/etc/kvfleet-engine-tls/tls.crt"
    assert value_of(args, "--ssl-keyfile") == "/etc/kvfleet-engine-tls/tls.key"
    assert "--enable-ssl-refresh" in args
    built = engine.container(pool, "nvidia.com/gpu")
    assert {"name": "kvfleet-engine-tls", "mountPath": "/etc/kvfleet-engine-tls", "readOnly": True} in built[
        "volumeMounts"
    ]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert built[probe]["httpGet"]["scheme"] == "HTTPS"


def test_a_certificate_may_come_another_way(make):
    given = {"tls": {}, "args": ["--ssl-certfile", "/own/tls.crt", "--ssl-keyfile", "/own/tls.key"]}
    pool = make.parse(make.pool(engine=given))
    assert value_of(engine.serve_args(pool), "--ssl-certfile") == "/own/tls.crt"
    assert engine.unwired(pool.spec) == []
    assert engine.container(pool, "nvidia.com/gpu")["livenessProbe"]["httpGet"]["scheme"] == "HTTPS"


def test_an_engine_that_serves_https_unknown_to_the_pool_is_told_of(make):
    pool = make.parse(make.pool(engine={"args": ["--ssl-certfile", "/own/tls.crt"]}))
    assert engine.unwired(pool.spec) == [
        "engine.args sets --ssl-certfile: set spec.engine.tls as well, or routers speak plain HTTP to engines"
    ]


# The drain hook


class Metrics(http.server.BaseHTTPRequestHandler):
    """An engine's /metrics whose busy requests run out one by one with every scrape."""

    def do_GET(self):
        self.server.scrapes += 1
        if self.server.scrapes == 20:
            self.server.scraped_often.set()
        running = max(0, self.server.busy - self.server.scrapes)
        text = f'# HELP x\nvllm:num_requests_running{{engine="0"}} {running}.0\nvllm:num_requests_waiting{{engine="0"}} 0.0\n'
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def engine_metrics():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
    server.busy, server.scrapes, server.scraped_often = 0, 0, threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def drain(port, settle_s, drain_s, mode="lead", hook=engine.DRAIN_SCRIPT):
    """The hook as the kubelet runs it, its half-second rests shortened."""
    script = hook.replace("time.sleep(0.5)", "time.sleep(0.01)")
    assert script != hook
    environment = {"POD_IP": "127.0.0.1", "LWS_LEADER_ADDRESS": "127.0.0.1"}
    command = [sys.executable, "-c", script, str(port), str(settle_s), str(drain_s), mode]
    return subprocess.run(command, env=environment, timeout=30, check=True)


def test_the_drain_waits_for_an_engine_that_serves_https(engine_metrics):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("llama-workers.default.svc").configure_cert(context)
    engine_metrics.socket = context.wrap_socket(engine_metrics.socket, server_side=True)
    engine_metrics.busy = 5
    drain(engine_metrics.server_port, 0, 20, hook=engine.over_tls(engine.DRAIN_SCRIPT))
    assert engine_metrics.scrapes == 7


def test_the_drain_waits_until_nothing_runs(engine_metrics):
    engine_metrics.busy = 5
    drain(engine_metrics.server_port, 0, 20)
    assert engine_metrics.scrapes == 7  # busy four times, then idle three times in a row


def test_the_drain_ends_when_its_time_is_over(engine_metrics):
    engine_metrics.busy = 10**9
    drain(engine_metrics.server_port, 0, 0.2)
    assert engine_metrics.scrapes >= 1


def test_an_idle_engine_still_serves_while_routers_learn_of_its_leave(engine_metrics):
    drain(engine_metrics.server_port, 0.3, 20)
    assert engine_metrics.scrapes > 3


def test_the_drain_of_a_dead_engine_ends_at_once(engine_metrics):
    engine_metrics.server_close()
    drain(engine_metrics.server_port, 60, 60)


def test_a_follower_stays_while_its_leader_serves(engine_metrics):
    engine_metrics.busy = 40
    drain(engine_metrics.server_port, 0, 20, "follow")
    assert engine_metrics.scrapes == 42


def test_a_follower_leaves_when_its_leader_is_gone(engine_metrics):
    engine_metrics.busy = 10**9
    ended = []
    thread = threading.Thread(target=lambda: ended.append(drain(engine_metrics.server_port, 0, 20, "follow")))
    thread.start()
    assert engine_metrics.scraped_often.wait(timeout=20)
    assert not ended
    engine_metrics.shutdown()
    engine_metrics.server_close()
    thread.join(timeout=25)
    assert ended


def test_the_hook_is_a_shell_line_that_falls_back_to_waiting(make):
    command = engine.container(make.parse(make.pool(rollout={"drainSeconds": 7})), "gpu")["lifecycle"]["preStop"][
        "exec"
    ]["command"]
    assert command[:2] == ["/bin/sh", "-c"]
    assert command[4:] == ["8000", "5", "7", "lead"]
    without_python = subprocess.run(
        [*command[:3], command[3], "8000", "0", "0", "lead"],
        env={"PATH": "/nowhere"},
        capture_output=True,
        timeout=10,
        check=False,
    )
    assert b"sleep" in without_python.stderr  # python3 was not found, so it went on to sleep
    compile(engine.DRAIN_SCRIPT, "drain", "exec")
