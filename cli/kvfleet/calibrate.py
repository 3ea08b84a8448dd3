"""`kvfleet calibrate`: drives a running vLLM through batch sizes, prompt and context lengths, and writes what it costs.

    idle       nothing is sent                                      watts
    prefill    prompts of growing length, one at a time, 1 token    seconds and joules by length
    decode     b streams at once, short and long contexts           seconds and joules of a step by b and context

Prompts are random token ids, so that no prefix cache helps. Every point lasts `seconds / points`: counters of the DCGM exporter
move as seldom as it collects (30 s by default), so give it time, or let it collect more often. The engine should be alone on
its devices and get no other requests. Fits are in calibrate_fit.py.
"""

from __future__ import annotations

import asyncio
import ctypes
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import httpx
import yaml

from kvfleet.calibrate_fit import Coefficient, Decode, Fitted, Prefill, fit
from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_router.io.telemetry import ENERGY, exposition

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
SHORT_CONTEXT, LONG_CONTEXT = 64, 4096
PROMPTS = (1024, 2048, 4096, 8192, 12_288)
MAX_OUTPUT_TOKENS = 4096
FIRST_ID, LAST_ID = 1000, 30_000
"""Token ids that every vocabulary has, and that end no answer."""
TIMEOUT_S = 120.0
_COMPLETION_TOKENS = re.compile(r'"completion_tokens":\s*(\d+)')


class CalibrationError(Exception):
    """The engine or a counter cannot be used; says what to do."""


class Counter(Protocol):
    async def joules(self) -> float:
        """Of all devices of the engine, since boot."""


class DcgmCounter:
    """The exporter at this URL; `pod`: its devices alone."""

    def __init__(self, client: httpx.AsyncClient, url: str, pod: str | None = None) -> None:
        self._client, self._url, self._pod = client, url, pod

    async def joules(self) -> float:
        try:
            answer = await self._client.get(self._url)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise CalibrationError(f"--dcgm-url {self._url}: {error or type(error).__name__}") from error
        values = [
            value
            for name, labels, value in exposition(answer.text)
            if name == ENERGY and self._pod in (None, labels.get("pod"))
        ]
        if not values:
            raise CalibrationError(f"--dcgm-url {self._url}: no {ENERGY}: is it a DCGM exporter (and --pod right)?")
        return sum(values) / 1000


class NvmlCounter:
    """The devices of this machine, asked through NVIDIA's own library."""

    def __init__(self, devices: Sequence[int]) -> None:
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise CalibrationError(f"--nvml: {error}: run it where the GPUs are, or give --dcgm-url") from error
        self._check(self._nvml.nvmlInit_v2())
        self._handles = []
        for index in devices:
            handle = ctypes.c_void_p()
            self._check(self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)))
            self._handles.append(handle)

    async def joules(self) -> float:
        total = 0
        for handle in self._handles:
            value = ctypes.c_ulonglong()
            self._check(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)))
            total += value.value
        return total / 1000

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise CalibrationError(f"--nvml: NVML error {code}: the device has no energy counter, or may not be asked")


@dataclass(slots=True)
class Runs:
    """What was measured."""

    prefills: list[Prefill] = field(default_factory=list)
    decodes: list[Decode] = field(default_factory=list)
    idle_watts: float | None = None


class Driver:
    """Sends to one engine."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        model: str,
        counter: Counter | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._client, self._url, self._model = client, url.rstrip("/"), model
        self._counter, self._clock = counter, clock
        self._random = random.Random(0)

    async def idle(self, seconds: float) -> float | None:
        """Watts while nothing runs."""
        if self._counter is None:
            return None
        start_s, before = self._clock(), await self._counter.joules()
        await asyncio.sleep(seconds)
        return (await self._counter.joules() - before) / (self._clock() - start_s)

    async def prefill(self, tokens: int, seconds: float) -> Prefill:
        """Prompts of this length, one after the other, for so long."""
        count, taken_s = 0, 0.0
        start_s, before = self._clock(), await self._joules()
        while count < 2 or self._clock() - start_s < seconds:
            begun_s = self._clock()
            await self._stream(tokens, 1, asyncio.Event(), [])
            taken_s += self._clock() - begun_s
            count += 1
        after = await self._joules()
        joules = None if before is None or after is None else (after - before) / count
        return Prefill(tokens, taken_s / count, joules)

    async def decode(self, sequences: int, context_tokens: int, seconds: float) -> Decode:
        """So many streams at once; measured while all of them decode."""
        stop = asyncio.Event()
        counts: list[list[int]] = [[0] for _ in range(sequences)]
        streams = [
            asyncio.create_task(self._stream(context_tokens, MAX_OUTPUT_TOKENS, stop, count)) for count in counts
        ]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while min(count[0] for count in counts) < 2:
                    await asyncio.sleep(0.005)
                    _raise_failed(streams)
            # Counter, then tokens, at both ends: what passes between the two is the same and cancels out.
            before = await self._joules()
            start_s, begun = self._clock(), [count[0] for count in counts]
            await asyncio.wait(streams, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            after = await self._joules()
            taken_s, ended = self._clock() - start_s, [count[0] for count in counts]
            _raise_failed(streams)
        except TimeoutError as error:
            raise CalibrationError(f"{sequences} streams did not all begin within {TIMEOUT_S:.0f} s") from error
        finally:
            stop.set()
            await asyncio.gather(*streams, return_exceptions=True)
        tokens = [end - start for start, end in zip(begun, ended, strict=True)]
        steps = sum(tokens) / sequences
        if steps < 1:
            raise CalibrationError(f"{sequences} streams gave no token within {seconds:.0f} s: give it more --seconds")
        held = sum(context_tokens + start + count / 2 for start, count in zip(begun, tokens, strict=True))
        joules = None if before is None or after is None else after - before
        return Decode(sequences, held, steps, taken_s, joules)

    async def _joules(self) -> float | None:
        return None if self._counter is None else await self._counter.joules()

    async def _stream(self, prompt: int, output: int, stop: asyncio.Event, count: list[int]) -> None:
        """One completion; counts its tokens in `count[0]`."""
        body = {
            "model": self._model,
            "prompt": [self._random.randrange(FIRST_ID, LAST_ID) for _ in range(prompt)],
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        async with self._client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread())[:300].decode("utf-8", "replace")
                raise CalibrationError(f"{self._url} answered {answer.status_code} to {prompt} prompt tokens: {text}")
            async for line in answer.aiter_lines():
                found = _COMPLETION_TOKENS.search(line) if count else None
                if found is not None:
                    count[0] = int(found[1])
                if stop.is_set():
                    return


def _raise_failed(streams: Sequence[asyncio.Task[None]]) -> None:
    for stream in streams:
        if stream.done():
            error = stream.exception()
            raise (
                error
                if error is not None
                else CalibrationError("an answer ended before the point was measured: give fewer --seconds")
            )


async def measure(
    driver: Driver,
    *,
    seconds: float,
    max_sequences: int,
    max_context: int,
    say: Callable[[str], None],
) -> Runs:
    """All points, within about `seconds`."""
    batches = [batch for batch in BATCHES if batch <= max_sequences]
    contexts = [context for context in (SHORT_CONTEXT, LONG_CONTEXT) if context < max_context]
    prompts = [tokens for tokens in PROMPTS if tokens < max_context]
    point_s = seconds / (len(batches) * len(contexts) + len(prompts) + 1)
    runs = Runs(idle_watts=await driver.idle(point_s))
    if runs.idle_watts is not None:
        say(f"idle: {runs.idle_watts:.1f} W")
    for tokens in prompts:
        run = await driver.prefill(tokens, point_s)
        runs.prefills.append(run)
        say(f"prefill of {tokens} tokens: {1000 * run.seconds:.1f} ms" + _joules(run.joules))
    for context in contexts:
        for batch in batches:
            step = await driver.decode(batch, context, point_s)
            runs.decodes.append(step)
            say(
                f"{batch} sequences, {context} tokens each: {1000 * step.seconds / step.steps:.2f} ms a step"
                + _joules(None if step.joules is None else step.joules / step.steps)
            )
    return runs


def _joules(value: float | None) -> str:
    return "" if value is None else f", {value:.3f} J"


def profile(
    runs: Runs,
    fitted: Fitted,
    base: AcceleratorProfile,
    *,
    name: str,
    model: str,
    tensor: int,
    kv_tokens: int | None,
    conditions: str,
) -> dict[str, Any]:
    """`base` with this model's row in front; what was not measured is `base`'s, where it has a row for the model."""
    spec = base.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    measured = fitted.step_joules is not None and kv_tokens is not None
    known = {} if measured else base_row(base, model, tensor)
    if runs.idle_watts is not None:
        spec["power"]["idleWatts"] = min(round(runs.idle_watts / tensor), spec["power"]["maxWatts"])
    energy = (
        known["energy"]
        if fitted.step_joules is None
        else {
            "stepMillijoules": _scaled(fitted.step_joules, 1e3),
            "tokenMicrojoules": _scaled(fitted.token_joules, 1e6),
            "contextTokenNanojoules": _scaled(fitted.context_token_joules, 1e9),
            "prefillTokenMicrojoules": _scaled(fitted.prefill_token_joules, 1e6),
        }
    )
    row = {
        "model": model,
        "tensorParallel": tensor,
        "step": {
            "fixedMicroseconds": fitted.step_s.scaled(1e6),
            "perSequenceNanoseconds": fitted.step_s_per_sequence.scaled(1e9),
            "perContextTokenPicoseconds": fitted.step_s_per_context_token.scaled(1e12),
        },
        "prefill": {
            "perTokenNanoseconds": fitted.prefill_s_per_token.scaled(1e9),
            "perTokenPairFemtoseconds": fitted.prefill_s_per_token_pair.scaled(1e15),
        },
        "energy": energy,
        "kvTokens": kv_tokens or known["kvTokens"],
        "source": f"kvfleet calibrate: {conditions}; {errors(fitted)}"[:1024],
    }
    spec["models"] = [row, *spec.get("models", [])]
    return {"apiVersion": "kvfleet.io/v1alpha1", "kind": "AcceleratorProfile", "metadata": {"name": name}, "spec": spec}


def base_row(base: AcceleratorProfile, model: str, tensor: int) -> dict[str, Any]:
    """What the profile says of the model. Raises CalibrationError where it says nothing."""
    for row in base.spec.models:
        if row.tensor_parallel == tensor and fnmatch(model.lower(), row.model.lower()):
            found: dict[str, Any] = row.model_dump(mode="json", by_alias=True)
            return found
    raise CalibrationError(
        f"profile {base.metadata.name} has no row for {model!r} on {tensor} device(s) to take what is not measured from: "
        "give --kv-tokens and a counter, and --model as a row names it"
    )


def _scaled(coefficient: Coefficient | None, factor: float) -> int:
    return 0 if coefficient is None else coefficient.scaled(factor)


NAMED = (
    ("W", "step_s", 1e3, "ms"),
    ("H", "step_s_per_sequence", 1e6, "us"),
    ("C", "step_s_per_context_token", 1e9, "ns"),
    ("Pp", "prefill_s_per_token", 1e6, "us"),
    ("Pq", "prefill_s_per_token_pair", 1e9, "ns"),
    ("E0", "step_joules", 1.0, "J"),
    ("E1", "token_joules", 1e3, "mJ"),
    ("Ec", "context_token_joules", 1e6, "uJ"),
    ("ep", "prefill_token_joules", 1e3, "mJ"),
)


def errors(fitted: Fitted) -> str:
    """Every coefficient with its standard error."""
    found = []
    for symbol, attribute, factor, unit in NAMED:
        coefficient = getattr(fitted, attribute)
        if coefficient is None:
            found.append(f"{symbol} not measured")
        else:
            found.append(f"{symbol} {coefficient.value * factor:.3g}±{coefficient.standard_error * factor:.1g} {unit}")
    return ", ".join(found)


async def calibrate(
    url: str,
    *,
    seconds: float,
    max_sequences: int,
    dcgm_url: str | None,
    pod: str | None,
    nvml: Sequence[int],
    say: Callable[[str], None],
) -> tuple[Runs, Fitted, dict[str, Any]]:
    """Measure and fit; also what the engine says of itself. Raises CalibrationError."""
    limits = httpx.Limits(max_connections=max_sequences + 4)
    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S, limits=limits) as client:
        served = await _served(client, url)
        counter: Counter | None = NvmlCounter(nvml) if nvml else None
        if dcgm_url is not None:
            counter = DcgmCounter(client, dcgm_url, pod)
        driver = Driver(client, url, served["id"], counter)
        try:
            runs = await measure(
                driver,
                seconds=seconds,
                max_sequences=max_sequences,
                max_context=int(served.get("max_model_len") or 8192) - MAX_OUTPUT_TOKENS,
                say=say,
            )
        except httpx.HTTPError as error:
            raise CalibrationError(f"--url {url}: {error or type(error).__name__}") from error
    try:
        return runs, fit(runs.prefills, runs.decodes), served
    except ValueError as error:
        raise CalibrationError(str(error)) from error


async def _served(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    try:
        answer = await client.get(f"{url.rstrip('/')}/v1/models")
        answer.raise_for_status()
        first: dict[str, Any] = answer.json()["data"][0]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        raise CalibrationError(f"--url {url}: no model is served there: {error or type(error).__name__}") from error
    return first


def write(document: dict[str, Any], path: Path) -> None:
    path.write_text(yaml.safe_dump(document, sort_keys=False, width=120))
