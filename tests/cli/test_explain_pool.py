"""`kvfleet explain pool`: from a cluster's API server to the words on the terminal."""

import json
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from kvfleet.explain_pool import explain_pool
from kvfleet.main import UsageError, app
from kvfleet_api.modelpool import ModelPool

PATH = "/apis/kvfleet.io/v1alpha1/namespaces/prod/modelpools/llama"


def pool(autoscaling=None, status=None):
    spec = {
        "model": {"name": "llama-8b", "uri": "meta-llama/Llama-3.1-8B-Instruct"},
        "accelerator": {"profileRef": "h100"},
    }
    spec |= {"autoscaling": autoscaling} if autoscaling else {}
    metadata = {"name": "llama", "namespace": "prod"}
    return {
        "apiVersion": "kvfleet.io/v1alpha1",
        "kind": "ModelPool",
        "metadata": metadata,
        "spec": spec,
        "status": status,
    }


SCALED = pool(
    {"minReplicas": 1, "maxReplicas": 8},
    {
        "replicas": 5,
        "readyReplicas": 4,
        "autoscaling": {
            "desiredReplicas": 5,
            "bindingSignal": "concurrency: 48 against 10",
            "forecast": "61.2 within 3 min (confidence 84%)",
            "startupSeconds": 170,
            "heldBackBy": "GPU budget: 10 of 10 are used and a worker needs 2",
            "lastScaleTime": "2026-01-01T00:00:00Z",
        },
        "conditions": [
            {
                "type": "ScalingActive",
                "status": "False",
                "reason": "SomeMetrics",
                "message": "kvUsage: absent",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
        ],
    },
)


def words(manifest):
    console = Console(width=200, record=True, file=StringIO())
    console.print(explain_pool(ModelPool.model_validate(manifest), datetime(2026, 1, 1, 0, 5, tzinfo=UTC)))
    return console.export_text()


def test_it_says_what_decided_what_holds_it_back_and_when_it_changed():
    assert words(SCALED).splitlines() == [
        "prod/llama  wants 5 workers, has 5, 4 ready",
        "  bounds:         1 to 8",
        "  binding signal: concurrency: 48 against 10",
        "  held back by:   GPU budget: 10 of 10 are used and a worker needs 2",
        "  last change:    2026-01-01T00:00:00Z (5 min ago)",
        "  forecast:       61.2 within 3 min (confidence 84%)",
        "  start-up:       170 s until a worker is ready",
        "  ScalingActive:  False, SomeMetrics: kvUsage: absent",
        "",
    ]


ENERGY = {
    "source": "Measured",
    "errorPercent": 3,
    "samples": 120,
    "coefficients": [
        {"coefficient": "StepEnergy", "valueMicrounits": 3_100_000, "standardErrorMicrounits": 210_000},
        {"coefficient": "TokenEnergy", "valueMicrounits": 67_000, "standardErrorMicrounits": 4_000},
        {"coefficient": "IdlePower", "valueMicrounits": 115_000_000, "standardErrorMicrounits": 3_000_000},
    ],
}


def test_it_says_what_was_learned_of_energy_and_whether_it_is_believed():
    condition = {
        "type": "EnergyTrusted",
        "status": "False",
        "reason": "Stale",
        "message": "Joules do not steer requests.",
    }
    lines = words(pool(status={"energy": ENERGY, "conditions": [condition]})).splitlines()
    assert lines[2:4] == [
        "  energy:         Measured: 120 intervals, off by 3 %; E0 3.1 ± 0.21 J/step; E1 67 ± 4 mJ/token; idle 115 ± 3 W",
        "  EnergyTrusted:  False, Stale: Joules do not steer requests.",
    ]


def test_pools_that_are_not_autoscaled_or_not_judged_yet_say_so():
    assert "not autoscaled" in words(pool(status={"replicas": 1, "desiredReplicas": 1}))
    assert "has not judged it yet" in words(pool({"maxReplicas": 3}))


@pytest.fixture
def kubeconfig(tmp_path):
    """A kubeconfig whose API server has the pool `llama`, and no other."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == PATH
            body = json.dumps(SCALED if found else {"kind": "Status", "code": 404}).encode()
            self.send_response(200 if found else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "prod"}}],
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "me", "user": {}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(document))
    yield path
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_command_reads_the_pool_from_the_cluster(kubeconfig):
    result = CliRunner().invoke(app, ["explain", "pool", "llama", "--kubeconfig", str(kubeconfig)])
    assert result.exit_code == 0, result.output
    assert "wants 5 workers" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pool", "other"], "there is no ModelPool prod/other"),
        (["pool"], "which pool"),
        (["1f3a-27", "llama"], "only `kvfleet explain pool NAME` takes a name"),
        (["pool", "llama", "--context", "elsewhere"], "no cluster"),
    ],
)
def test_wrong_use_says_what_to_do(kubeconfig, arguments, message):
    result = CliRunner().invoke(app, ["explain", *arguments, "--kubeconfig", str(kubeconfig)])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prometheus-url", "prometheus:9090"], "write it as https://host:port"),
        (["--prometheus-token-file", "token"], "give both"),
        (["--prometheus-url", "http://p:9090", "--prometheus-ca-file", "/nowhere"], "there is no such file"),
    ],
)
def test_wrong_settings_of_prometheus_say_what_to_do(arguments, message):
    result = CliRunner().invoke(app, ["operator", *arguments])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
