"""How often replicas are told: often enough to be heard, whatever happens to the process; and not more than the core bears."""

import random
import time
from types import SimpleNamespace

import pytest
from scripted import ScriptedWorker, fleet

from kvfleet_router.core.dispatcher import Dispatcher
from kvfleet_router.core.sharing import EXPIRY_S, FLUSH_S
from kvfleet_router.io.sharing import sharer as module
from kvfleet_router.io.sharing.sharer import MAX_PAUSE_S, Sharer
from kvfleet_router.policies import REGISTRY


@pytest.mark.parametrize(
    ("cpu_s", "pause_s"),
    [(0.0, FLUSH_S), (0.0001, FLUSH_S), (0.001, 0.02), (0.01, 0.2), (0.1, MAX_PAUSE_S)],
)
def test_the_pause_grows_with_the_cpu_time_of_a_flush_but_nobody_falls_silent(
    monkeypatch: pytest.MonkeyPatch, cpu_s: float, pause_s: float
) -> None:
    """However long the flush took by the clock: that is how long the process had to wait for a core."""
    dispatcher = Dispatcher(
        fleet([ScriptedWorker(port=1)]), clock=time.monotonic, rng=random.Random(1), policies=REGISTRY
    )
    bus = SimpleNamespace(reachable=True, send=lambda messages: None)
    sharer = Sharer(dispatcher, bus, identity=1)  # type: ignore[arg-type]
    pauses: list[float] = []
    sharer._loop = SimpleNamespace(call_later=lambda pause, flush: pauses.append(pause))  # type: ignore[assignment]
    clocks = {name: iter([0.0, step]) for name, step in (("thread_time", cpu_s), ("perf_counter", 60.0))}
    fake = SimpleNamespace(**{name: lambda clock=clock: next(clock) for name, clock in clocks.items()})
    monkeypatch.setattr(module, "time", fake)
    sharer._flush()
    assert pauses == [pytest.approx(pause_s)]
    assert MAX_PAUSE_S < EXPIRY_S / 2
