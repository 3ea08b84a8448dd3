"""`kvfleet router` and `kvfleet worker` as processes, used with OpenAI's own client."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from kvfleet.local import HOST, free_ports

ROOT = Path(__file__).parents[2]
MODEL = "llama-8b"
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hello there"}]


@dataclass
class Fleet:
    """One worker and one router with the quickstart's manifests."""

    url: str
    admin: str
    worker: subprocess.Popen[bytes]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen([sys.executable, "-m", "kvfleet", *arguments], stdout=stream, stderr=stream, cwd=ROOT)


def answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    pause = threading.Event()
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        pause.wait(0.05)
    raise AssertionError(f"{url} did not answer:\n{log.read_text()}")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    worker_port, port, admin_port = free_ports(3)
    worker_url = f"http://{HOST}:{worker_port}"
    worker_log, router_log = tmp_path / "worker.log", tmp_path / "router.log"
    worker = start(
        worker_log, "worker", "any/model", "--served-model-name", MODEL, "--host", HOST, "--port", str(worker_port)
    )
    router = start(
        router_log,
        *("router", "-f", "examples/quickstart", "--workers", f"llama-8b-h100={worker_url}"),
        *("--host", HOST, "--port", str(port), "--admin-port", str(admin_port)),
    )
    try:
        answers(worker, f"{worker_url}/health", worker_log)
        answers(router, f"http://{HOST}:{admin_port}/readyz", router_log)
        yield Fleet(f"http://{HOST}:{port}", f"http://{HOST}:{admin_port}", worker)
    finally:
        for process in (router, worker):
            process.terminate()
        for process in (router, worker):
            process.wait(20)


def test_openais_client_gets_answers_streams_and_typed_errors(fleet: Fleet) -> None:
    client = fleet.client
    assert [model.id for model in client.models.list()] == [MODEL]

    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 5

    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content

    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert (unknown.value.code, MODEL in unknown.value.message) == ("model_not_found", True)
    with pytest.raises(openai.BadRequestError) as missing:
        client.post("/chat/completions", body={"model": MODEL}, cast_to=httpx.Response)
    assert missing.value.param == "messages"


def test_what_is_wrong_with_a_request_is_said_in_openais_shape(fleet: Fleet) -> None:
    chat = f"{fleet.url}/v1/chat/completions"
    json_type = {"content-type": "application/json"}

    broken = httpx.post(chat, content=b'{"model": ', headers=json_type)
    assert broken.status_code == 400
    assert broken.json()["error"]["type"] == "invalid_request_error"

    large = httpx.post(chat, content=b"x" * (33 * 1024 * 1024), headers=json_type)
    assert large.status_code == 413
    assert "33554432: send less" in large.json()["error"]["message"]

    fleet.worker.terminate()
    fleet.worker.wait(20)
    dead = httpx.post(chat, json={"model": MODEL, "messages": MESSAGES}, timeout=20)
    assert dead.status_code == 503
    assert int(dead.headers["retry-after"]) >= 1
    assert dead.json()["error"]["message"]


def explain(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvfleet", "explain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_a_request_is_explained_without_being_sent(fleet: Fleet, tmp_path: Path) -> None:
    body = tmp_path / "request.json"
    body.write_text(json.dumps({"model": MODEL, "messages": MESSAGES}))
    result = explain("--body", str(body), "--url", fleet.admin, "-H", "x-session-id: a")
    assert result.returncode == 0, result.stderr
    for word in (MODEL, "cost", "predicted: TTFT", "would be sent"):
        assert word in result.stdout
    assert httpx.get(f"{fleet.admin}/decisions").json()["decisions"] == []
    body.write_text(json.dumps({"model": "other", "messages": MESSAGES}))
    refused = explain("--body", str(body), "--url", fleet.admin)
    assert "would be refused: The model 'other' does not exist" in " ".join(refused.stdout.split())
    body.write_text("{")
    wrong = explain("--body", str(body), "--url", fleet.admin)
    assert wrong.returncode == 2
    assert "not valid JSON" in " ".join(wrong.stderr.split())


def test_a_decision_is_explained(fleet: Fleet) -> None:
    answer = httpx.post(
        f"{fleet.url}/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES, "max_tokens": 2}
    )
    decision = answer.headers["x-kvfleet-decision"]
    result = explain(decision, "--url", fleet.admin)
    assert result.returncode == 0, result.stderr
    for word in (decision, answer.headers["x-kvfleet-worker"], "cost", "predicted: TTFT", "came: ok"):
        assert word in result.stdout
