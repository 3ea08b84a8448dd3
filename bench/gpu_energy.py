"""Step times and joules of a real GPU: Llama-shaped models with random weights, decoded and prefilled with torch.

    python bench/gpu_energy.py --out bench/measured/h100-80gb.json [--model llama-3.1-8b …] [--seconds 2] [--limit-seconds 400]

Runs where the GPU is; needs torch, numpy and nvidia-ml-py, nothing of kvfleet. bench/gpu_energy_fit.py turns what it writes into
coefficients. Each model has a process of its own, so that the device is also seen with a context alone and after the exit.

    bare      no process on the device                             watts
    context   a process with a CUDA context, nothing loaded        watts
    resident  weights and KV cache in memory, nothing running      watts
    decode    b sequences with c tokens of context each            seconds and joules of a step
    gap       the same, with pauses between steps: what a host that is late costs
    prefill   one prompt of u tokens                               seconds and joules

A decode step is the whole model in one CUDA graph: norms, merged QKV, rotary embedding, KV written and attended to (a context of
random keys and values), gated feed-forward, logits, arg max. What an engine adds (scheduling, sampling, detokenising) is not in it.
Energy is the device's own counter (NVML, mJ): a point begins and ends where the counter moves, with work queued all the while.
Weights and keys are normally distributed: trained ones may flip other bits, and draw some watts more or less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (256, 1024, 4096)
PROMPTS = (512, 1024, 2048, 4096, 8192, 12_288)
GAPS_MS = (0.5, 1.0, 2.0, 5.0)
IDLE_S, SETTLE_S = 5.0, 4.0
SPARE_BYTES = 6 << 30
"""Left for activations."""
CHUNK_S = 0.025
"""Work queued at once: two such chunks keep the device busy while the counter is read."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder-only transformer; sizes as its config.json has them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    head: int = 128

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.layers * self.kv_heads * self.head

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.feed_forward) + 2 * self.vocabulary * self.hidden


SHAPES = {
    "llama-3.2-3b": Shape(28, 3072, 24, 8, 8192, 128_256),
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 14_336, 128_256),
    "qwen3-14b": Shape(40, 5120, 40, 8, 17_408, 151_936),
    "qwen3-32b": Shape(64, 5120, 64, 8, 25_600, 151_936),
}


class Device:
    """One GPU as NVML tells of it."""

    def __init__(self, index: int = 0) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)

    def joules(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000

    def state(self) -> dict[str, Any]:
        nvml, handle = self._nvml, self._handle
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "celsius": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        }

    def about(self) -> dict[str, Any]:
        nvml, handle = self._nvml, self._handle
        return {
            "product": nvml.nvmlDeviceGetName(handle),
            "driver": nvml.nvmlSystemGetDriverVersion(),
            "power_limit_watts": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        }

    def idle_watts(self, seconds: float) -> float:
        """Between two moves of the counter, while this process does nothing but read it."""
        start_s, before = self._next_move()
        time.sleep(seconds)
        end_s, after = self._next_move()
        return (after - before) / (end_s - start_s)

    def _next_move(self) -> tuple[float, float]:
        first = self.joules()
        limit_s = time.perf_counter() + 2.0
        while (now := self.joules()) == first:
            if time.perf_counter() > limit_s:
                raise SystemExit("the device's energy counter does not move")
            time.sleep(0.002)
        return time.perf_counter(), now


class Transformer:
    """The model, in bf16 with random weights; `decode` and `prefill` are what is measured."""

    def __init__(self, shape: Shape, device: str, pool_tokens: int) -> None:
        import torch

        self.torch, self.shape, self.device = torch, shape, device
        self._functions = _fused(torch, compiled=device == "cuda")
        heads = shape.heads + 2 * shape.kv_heads

        def weight(rows: int, columns: int) -> Any:
            return torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(0, columns**-0.5)

        self._embedding = weight(shape.vocabulary, shape.hidden)
        self._logits = weight(shape.vocabulary, shape.hidden)
        self._norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
        self._layers = [
            (
                weight(heads * shape.head, shape.hidden),
                weight(shape.hidden, shape.heads * shape.head),
                weight(2 * shape.feed_forward, shape.hidden),
                weight(shape.hidden, shape.feed_forward),
            )
            for _ in range(shape.layers)
        ]
        values = pool_tokens * shape.kv_bytes_per_token // 2
        self._pool = torch.empty(values, dtype=torch.bfloat16, device=device)
        for part in self._pool.split(1 << 28):
            part.normal_()
        angles = torch.outer(torch.arange(16_384), 500_000.0 ** -(torch.arange(0, shape.head, 2) / shape.head))
        self._cos, self._sin = (f(angles).to(torch.bfloat16).to(device) for f in (torch.cos, torch.sin))

    def caches(self, batch: int, length: int) -> list[tuple[Any, Any]]:
        """(keys, values) of each layer: [batch, kv heads, length, head], views of one pool of random values."""
        shape = self.shape
        size = batch * shape.kv_heads * length * shape.head
        parts = self._pool[: 2 * shape.layers * size].view(2 * shape.layers, batch, shape.kv_heads, length, shape.head)
        return [(parts[2 * i], parts[2 * i + 1]) for i in range(shape.layers)]

    def decode(self, tokens: Any, caches: list[tuple[Any, Any]]) -> Any:
        """One step: `tokens` [batch] go to the last position of each cache; answers logits [batch, vocabulary]."""
        shape, functional = self.shape, self.torch.nn.functional
        batch, length = len(tokens), caches[0][0].shape[2]
        cos, sin = self._cos[length - 1], self._sin[length - 1]

        def attend(qkv: Any, layer: int) -> Any:
            keys, values = caches[layer]
            query, key, value = self._split(qkv.view(batch, -1, shape.head))
            keys[:, :, length - 1] = self._functions.rotate(key, cos, sin)
            values[:, :, length - 1] = value
            # The query heads of one KV head stand as that head's queries: the same sums, its keys read once.
            query = self._functions.rotate(query, cos, sin).view(batch, shape.kv_heads, -1, shape.head)
            return functional.scaled_dot_product_attention(query, keys, values).reshape(batch, -1)

        return self._forward(self._embedding[tokens], attend)

    def prefill(self, tokens: Any, caches: list[tuple[Any, Any]]) -> Any:
        """One prompt, `tokens` [length], from position 0; answers the last position's logits [1, vocabulary]."""
        shape, functional = self.shape, self.torch.nn.functional
        length = len(tokens)
        cos, sin = self._cos[:length, None], self._sin[:length, None]

        def attend(qkv: Any, layer: int) -> Any:
            keys, values = caches[layer]
            query, key, value = self._split(qkv.view(length, -1, shape.head))
            query, key = self._functions.rotate(query, cos, sin), self._functions.rotate(key, cos, sin)
            keys[0, :, :length], values[0, :, :length] = key.transpose(0, 1), value.transpose(0, 1)
            found = functional.scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                is_causal=True,
                enable_gqa=True,
            )
            return found[0].transpose(0, 1).reshape(length, -1)

        return self._forward(self._embedding[tokens], attend, last=True)

    def _split(self, heads: Any) -> Any:
        return heads.split((self.shape.heads, self.shape.kv_heads, self.shape.kv_heads), dim=1)

    def _forward(self, stream: Any, attend: Callable[[Any, int], Any], last: bool = False) -> Any:
        linear, fused = self.torch.nn.functional.linear, self._functions
        x = fused.norm(stream, self._norm)
        for index, (qkv, out, gate_up, down) in enumerate(self._layers):
            x, stream = fused.add_norm(linear(attend(linear(x, qkv), index), out), stream, self._norm)
            x, stream = fused.add_norm(linear(fused.gated(linear(x, gate_up)), down), stream, self._norm)
        return linear(x[-1:] if last else x, self._logits)


class _Functions:
    norm: Any
    add_norm: Any
    rotate: Any
    gated: Any


def _fused(torch: Any, compiled: bool) -> _Functions:
    """What engines fuse into one kernel each."""
    functional = torch.nn.functional
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # every shape that is one, in two models

    def norm(x: Any, weight: Any) -> Any:
        return functional.rms_norm(x, (x.shape[-1],), weight, 1e-5)

    def add_norm(x: Any, stream: Any, weight: Any) -> Any:
        stream = stream + x
        return norm(stream, weight), stream

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def gated(x: Any) -> Any:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up

    made = _Functions()
    for function in (norm, add_norm, rotate, gated):
        setattr(made, function.__name__, torch.compile(function, dynamic=True) if compiled else function)
    return made


def check(device: str) -> float:
    """That decoding a prompt's last token gives what prefilling the prompt gives. Answers the relative distance."""
    import torch

    torch.manual_seed(0)
    model = Transformer(Shape(2, 256, 4, 2, 512, 1000), device, pool_tokens=256)
    tokens = torch.randint(1000, (100,), device=device)
    with torch.inference_mode():
        whole = model.prefill(tokens, model.caches(1, 100)).float()
        model.prefill(tokens[:99], model.caches(1, 100))
        step = model.decode(tokens[99:], model.caches(1, 100)).float()
    distance = float((whole - step).norm() / whole.norm())
    if not distance < 0.02:
        raise SystemExit(f"decode and prefill disagree by {distance:.3f}: not measured")
    return distance


def run(device: Device, launch: Callable[[], None], seconds: float) -> dict[str, float]:
    """Launches again and again for so long; from one move of the energy counter to another, with work queued meanwhile."""
    import torch

    launch()
    torch.cuda.synchronize()
    begun_s = time.perf_counter()
    launch()
    torch.cuda.synchronize()
    chunk = max(1, round(CHUNK_S / (time.perf_counter() - begun_s)))

    def enqueue() -> Any:
        for _ in range(chunk):
            launch()
        event = torch.cuda.Event()
        event.record()
        return event

    warm_s = time.perf_counter() + 0.4
    while time.perf_counter() < warm_s:
        enqueue().synchronize()
    waiting, last, count = enqueue(), device.joules(), 0
    start: tuple[float, float, int] | None = None
    while True:
        following = enqueue()
        waiting.synchronize()
        waiting, count = following, count + chunk
        now_s, joules = time.perf_counter(), device.joules()
        if joules != last:
            last = joules
            if start is None:
                start = (now_s, joules, count)
            elif now_s - start[0] >= seconds:
                break
    waiting.synchronize()
    steps, taken_s = count - start[2], now_s - start[0]
    return {"steps": steps, "seconds": taken_s, "joules": joules - start[1]}


def paused(launch: Callable[[], None], gap_s: float) -> Callable[[], None]:
    """A launch that waits for its end, and so long after it."""
    import torch

    def one() -> None:
        launch()
        torch.cuda.synchronize()
        until_s = time.perf_counter() + gap_s
        while time.perf_counter() < until_s:
            pass

    return one


def captured(model: Transformer, batch: int, context: int) -> Callable[[], None]:
    """A decode step as a CUDA graph; each replay decodes what the one before it answered."""
    import torch

    tokens, caches = torch.randint(1000, (batch,), device="cuda"), model.caches(batch, context)

    def step() -> None:
        tokens.copy_(model.decode(tokens, caches).argmax(-1))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(name: str, seconds: float, limit_s: float, send: Callable[[dict[str, Any]], None]) -> None:
    """All points of one model, each sent as it is found; none is begun after `limit_s` (perf_counter)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device, shape = Device(), SHAPES[name]
    torch.zeros(1, device="cuda")
    time.sleep(SETTLE_S)
    send({"point": "context", "watts": device.idle_watts(IDLE_S), **device.state()})
    send({"point": "check", "distance": check("cuda")})
    free, _ = torch.cuda.mem_get_info()
    pool_tokens = (free - 2 * shape.parameters - SPARE_BYTES) // shape.kv_bytes_per_token
    with torch.inference_mode(), sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        model = Transformer(shape, "cuda", int(pool_tokens))
        captured(model, 1, 256)()
        torch.cuda.synchronize()
        time.sleep(SETTLE_S)
        send({"point": "resident", "watts": device.idle_watts(IDLE_S), "kv_tokens": int(pool_tokens), **device.state()})
        for context in CONTEXTS:
            for batch in BATCHES:
                if batch * context > pool_tokens or time.perf_counter() > limit_s:
                    continue
                launch = captured(model, batch, context)
                found = run(device, launch, seconds)
                send({"point": "decode", "sequences": batch, "context": context, **found, **device.state()})
                for gap_ms in GAPS_MS if batch in (1, 32) and context == 1024 and name == "llama-3.1-8b" else ():
                    found = run(device, paused(launch, gap_ms / 1000), seconds)
                    send({"point": "gap", "sequences": batch, "context": context, "gap_ms": gap_ms, **found})
        for prompt in PROMPTS:
            if prompt > pool_tokens or time.perf_counter() > limit_s:
                continue
            tokens, caches = torch.randint(1000, (prompt,), device="cuda"), model.caches(1, prompt)
            found = run(device, lambda tokens=tokens, caches=caches: model.prefill(tokens, caches), seconds)  # type: ignore[misc]
            send({"point": "prefill", "tokens": prompt, **found, **device.state()})


def _child(name: str, seconds: float, left_s: float, connection: Any) -> None:
    """In a process of its own, which has a clock of its own: what is left is told, not when it ends."""
    measure(name, seconds, time.perf_counter() + left_s, connection.send)
    connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what was measured, as JSON")
    parser.add_argument("--model", action="append", choices=SHAPES, help="(default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="a point lasts (default: 2)")
    parser.add_argument("--limit-seconds", type=float, default=600.0, help="no point begins after these (default: 600)")
    args = parser.parse_args()

    import torch

    device = Device()
    begun_s = time.perf_counter()
    points: list[dict[str, Any]] = []
    result = {
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device.about(),
        "torch": torch.__version__,
        "dtype": "bfloat16",
        "shapes": {name: {**asdict(SHAPES[name]), "parameters": SHAPES[name].parameters} for name in SHAPES},
        "points": points,
    }

    def keep(model: str, point: dict[str, Any]) -> None:
        points.append({"model": model, **point})
        print(f"{time.perf_counter() - begun_s:5.0f} s  {model}  {point}", flush=True)
        args.out.write_text(json.dumps(result, indent=1))

    context = multiprocessing.get_context("spawn")
    keep("", {"point": "bare", "watts": device.idle_watts(IDLE_S), **device.state()})
    for name in args.model or SHAPES:
        left_s = args.limit_seconds - (time.perf_counter() - begun_s)
        if left_s < 30:
            print(f"{name}: no time left", file=sys.stderr)
            continue
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(name, args.seconds, left_s, send))
        child.start()
        send.close()
        try:
            while True:
                keep(name, receive.recv())
        except EOFError:
            child.join()
        if child.exitcode:
            print(f"{name}: ended with {child.exitcode}", file=sys.stderr)
        time.sleep(SETTLE_S)
        keep(name, {"point": "exited", "watts": device.idle_watts(IDLE_S), **device.state()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
