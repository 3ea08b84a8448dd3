"""Start and end of the process: SIGTERM with and without draining, addresses in use, bad arguments."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from sim_client import TIMEOUT_S, Answer, OpenStream, call, complete, serving, until

from kvfleet_sim.config import parse
from kvfleet_sim.server import Server, main

SHUTDOWN_ERROR = {
    "message": "cannot schedule new futures after shutdown",
    "type": "InternalServerError",
    "param": None,
    "code": 500,
}


@dataclass
class Process:
    """`kvfleet worker` as a process of its own; has `port` like a Server."""

    process: asyncio.subprocess.Process
    port: int


@asynccontextmanager
async def process(*args: str) -> AsyncIterator[Process]:
    argv = ["-m", "kvfleet_sim.server", "llama-8b", "--host", "127.0.0.1", "--port", "0", *args]
    child = await asyncio.create_subprocess_exec(sys.executable, *argv, stderr=asyncio.subprocess.PIPE)
    try:
        assert child.stderr is not None
        log = ""
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log)):
            line = await asyncio.wait_for(child.stderr.readline(), TIMEOUT_S)
            assert line, log
            log += line.decode()
        yield Process(child, int(found[1]))
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


def finish_reasons(answer: Answer) -> list[str | None]:
    return [choice["finish_reason"] for event in answer.events[:-1] for choice in event["choices"]]


async def test_sigterm_ends_every_request_with_reason_abort() -> None:
    async with process() as worker:
        stream = await OpenStream.start(worker, {"prompt": "a", "max_tokens": 50_000})
        await stream.read_until(b"data:")
        whole = asyncio.create_task(complete(worker, "b", 50_000))
        metric = b'vllm:num_requests_running{engine="0",model_name="llama-8b"} 2.0'
        while metric not in (await call(worker, "GET", "/metrics")).body:
            pass
        worker.process.send_signal(signal.SIGTERM)
        ended = await stream.read_all()
        assert ended.events[-1] == "[DONE]"
        assert finish_reasons(ended)[-1] == "abort"
        answer = await whole
        assert answer.status == 200
        (choice,) = answer.json["choices"]
        assert choice["finish_reason"] == "abort"
        assert answer.json["usage"]["completion_tokens"] * 4 == len(choice["text"]) < 50_000
        # The port stays open for a moment: alive, but taking nothing.
        assert (await call(worker, "GET", "/health")).status == 200
        late = await complete(worker, "c")
        assert (late.status, late.json["error"]) == (500, SHUTDOWN_ERROR)
        assert [name for name, _ in late.headers] == ["date", "server", "content-length", "content-type", "connection"]
        assert await asyncio.wait_for(worker.process.wait(), TIMEOUT_S) == 0


async def test_a_drain_lets_running_requests_finish() -> None:
    async with process("--shutdown-timeout", "1", "--speed", "5") as worker:
        stream = await OpenStream.start(worker, {"prompt": "a", "max_tokens": 200})
        await stream.read_until(b"data:")
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        worker.process.send_signal(signal.SIGTERM)
        ended = await stream.read_all()
        assert finish_reasons(ended)[-1] == "length"
        assert "".join(event["choices"][0]["text"] for event in ended.events[:-1]).count(" ") == 200
        late = await complete(worker, "c")
        assert (late.status, late.json["error"]) == (500, SHUTDOWN_ERROR)
        assert await asyncio.wait_for(worker.process.wait(), TIMEOUT_S) == 0
        assert loop.time() - asked_s >= 0.95, "it takes its time even when nothing is left"


async def test_a_second_sigterm_ends_a_drain() -> None:
    async with process("--shutdown-timeout", "60") as worker:
        worker.process.send_signal(signal.SIGTERM)
        while (await complete(worker, "c")).status != 500:
            pass
        worker.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(worker.process.wait(), TIMEOUT_S) == 0


async def test_streams_beyond_the_drain_time_hear_nothing_more() -> None:
    """As vLLM: no bytes and no end, until the client gives up; only then is the server done."""
    async with serving("llama-8b", "--shutdown-timeout", "0.05", speed=1.0) as server:
        stream = await OpenStream.start(server, {"prompt": "a", "max_tokens": 50_000})
        await stream.read_until(b"data:")
        leaving = asyncio.create_task(server.shut_down())
        await until(lambda: not server._listeners)
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", server.port)
        read_all = asyncio.create_task(stream.read_all())
        _, pending = await asyncio.wait({read_all, leaving}, timeout=0.2)
        assert pending == {read_all, leaving}
        read_all.cancel()
        await asyncio.gather(read_all, return_exceptions=True)
        await asyncio.wait_for(leaving, TIMEOUT_S)


async def test_sigterm_while_loading_ends_at_once() -> None:
    argv = ["-m", "kvfleet_sim.server", "llama-8b", "--port", "0", "--startup-seconds", "1000"]
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTED_CODE, *argv[2:], stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    assert await asyncio.wait_for(child.stdout.readline(), TIMEOUT_S) == b"loading\n"
    child.send_signal(signal.SIGTERM)
    await child.communicate()
    assert child.returncode == 0


STARTED_CODE = """
import asyncio, sys
from kvfleet_sim import server
wait = asyncio.sleep
async def loading(seconds):
    print("loading", flush=True)
    await wait(seconds)
server.asyncio.sleep = loading
sys.exit(server.main(sys.argv[1:]))
"""
"""Says when it loads, that is, when its signal handlers are there."""


async def test_nothing_listens_while_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = parse(["llama-8b", "--host", "127.0.0.1", "--port", str(port), "--startup-seconds", "0.3"])
    server = Server(config)
    starting = asyncio.create_task(server.start())
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", port)
    await starting
    assert (await call(server, "GET", "/health")).status == 200
    await server.close()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--profile", "abacus"], "--profile 'abacus' is neither a file nor one of"),
        (["--data-parallel-size", "2"], "one rank"),
        (["--max-model-len", "9999999"], "more than the KV cache holds"),
        (["--max-model-len", "long"], "--max-model-len must be a number"),
        (["--max-num-seqs", "512", "--max-num-batched-tokens", "256"], "lower --max-num-seqs"),
        (["--max-num-seqs", "many"], "--max-num-seqs must be a whole number"),
        (["--kv-events-config", "{"], "--kv-events-config is not JSON"),
        (["--kv-events-config", '{"enable_kv_cache_events": true, "port": 1}'], "unknown field 'port'"),
        (["--kv-events-config", '{"topic": 1}'], "topic has the wrong type"),
        (["--lora-modules", "a=b"], "needs --enable-lora"),
        (["--enable-lora", "--lora-modules", "a"], "write NAME=PATH"),
        (["--speed", "0"], "--speed must be above 0"),
        (["--speed", "nan"], "--speed must be above 0"),
        (["--kv-tokens", "5"], "--kv-tokens must be at least"),
        (["--block-size", "0"], "--block-size must be at least 1"),
        (["--tokenizer", "/nowhere/tokenizer.json"], "no such file"),
    ],
)
def test_bad_arguments_are_named_with_a_remedy(args: list[str], words: str, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["llama-8b", "--port", "0", *args]) != 0
    assert words in caplog.text


def test_bad_syntax_and_help_give_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "eight"]) == 2
    assert main(["--help"]) == 0
    assert "--speed" in capsys.readouterr().out


def test_an_address_in_use_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["llama-8b", "--host", "127.0.0.1", "--port", str(port)]) == 1
        events = f'{{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:{port}"}}'
        assert main(["llama-8b", "--host", "127.0.0.1", "--port", "0", "--kv-events-config", events]) == 1
    assert caplog.text.count("in use") == 2
    assert "--kv-events-config" in caplog.text


def test_environment_names_the_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "POD_NAME", "llama-0")
    monkeypatch.setitem(os.environ, "POD_NAMESPACE", "inference")
    config = parse(["llama-8b"])
    assert (config.pod, config.namespace) == ("llama-0", "inference")
