"""Simulated vLLM workers inside the test's process, as the operator meets them: an address and an HTTP API."""

import contextlib

import httpx

from kvfleet_sim.config import parse
from kvfleet_sim.server import Server


@contextlib.asynccontextmanager
async def worker(*args, host="127.0.0.1", port=0, with_lora=True):
    """A worker with LoRA that serves at once."""
    given = [*args, *(["--enable-lora"] if with_lora else []), "--host", host, "--port", str(port)]
    server = Server(parse(["meta-llama/Llama-3.1-8B-Instruct", "--served-model-name", "llama-8b", *given]))
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def models_of(server, host="127.0.0.1"):
    """Adapter → path, by the worker's own word."""
    async with httpx.AsyncClient(trust_env=False) as client:
        cards = (await client.get(f"http://{host}:{server.port}/v1/models")).json()["data"]
    return {card["id"]: card["root"] for card in cards if card["parent"]}
