"""Workers coming and going in a simulated fleet: a controller is asked, machines start or leave, routers are told. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvfleet_router.core.dispatcher import Dispatcher, Ticket, Worker, WorkerEndpoint
from kvfleet_sim.elastic import Elastic, PoolView
from kvfleet_sim.machines import Machine, Power


class Shifts:
    """The machines by pool, and what the routers know of them."""

    def __init__(self, machines: Sequence[Machine], routers: Sequence[Dispatcher]) -> None:
        self._pools: dict[str, list[Machine]] = {}
        for machine in machines:
            self._pools.setdefault(machine.pool, []).append(machine)
        self._routers = routers
        self._prompt_tokens = self._cached_tokens = 0.0
        self.known: list[dict[str, Worker]] = []
        """By router: its workers by name."""
        self._know()

    def sent(self, ticket: Ticket) -> None:
        """A request was sent: how much of it the router expected to be cached counts for the predicted TTFT."""
        self._prompt_tokens += ticket.prompt_tokens
        self._cached_tokens += ticket.cached_tokens

    def step(self, elastic: Elastic, served: Mapping[str, int], now_s: float) -> list[Machine]:
        """Ask the controller and do as it says; returns the machines that start now. `served`: requests by worker."""
        starting: list[Machine] = []
        views = [self._view(name, machines, served, now_s) for name, machines in self._pools.items()]
        decided = elastic.controller.wanted(views, now_s)
        for name, wanted in decided.items():
            starting += scale(self._pools[name], wanted, now_s, elastic.startup_s)
        leaving = elastic.controller.leaving()
        for name, machines in self._pools.items():
            if spare(machines, leaving.get(name, 0), now_s) or name in decided:
                self._tell(name)
        return starting

    def began(self, machine: Machine, now_s: float) -> None:
        """A start-up is over, unless it was broken off."""
        if machine.power is Power.STARTING and machine.begins_s == now_s:
            machine.began(now_s)
            self._tell(machine.pool)

    def ended(self, machine: Machine, now_s: float) -> None:
        """A leaving machine's work is done."""
        machine.stop(now_s)
        self._tell(machine.pool)

    def _tell(self, pool: str) -> None:
        endpoints = roster(self._pools[pool])
        for router in self._routers:
            router.set_endpoints(pool, endpoints)
        self._know()

    def _know(self) -> None:
        self.known = [{worker.name: worker for worker in router.workers()} for router in self._routers]

    def _view(self, name: str, machines: Sequence[Machine], served: Mapping[str, int], now_s: float) -> PoolView:
        ready = [machine for machine in machines if machine.power is Power.ON]
        known = [pool for router in self._routers for pool in router.pools() if pool.name == name]
        for pool in known:
            pool.refresh_load()
        cached = self._cached_tokens / self._prompt_tokens if self._prompt_tokens else 0.0
        return PoolView(
            name,
            ready=len(ready),
            starting=sum(machine.power is Power.STARTING for machine in machines),
            total=len(machines),
            in_flight=sum(worker.own.in_flight for pool in known for worker in pool.workers.values()),
            packed=sum(pool.packed_sequences(now_s) for pool in known),
            held=sum(sum(router.queue_depths().values()) for router in self._routers),
            served=sum(served.get(machine.name, 0) for machine in machines),
            pack_target=min(pool.pack_target() for pool in known),
            predicted_ttft_s=max(router.predicted_ttft_s(name, cached) for router in self._routers),
            load=max(pool.load for pool in known),
            idle_s=tuple(machine.idle_s_at(now_s) for machine in ready),
        )


def roster(machines: Sequence[Machine]) -> list[WorkerEndpoint]:
    """The endpoints a router would see of these workers."""
    return [
        WorkerEndpoint(
            machine.name, machine.endpoint.url, terminating=machine.power is Power.LEAVING, draining=machine.draining
        )
        for machine in machines
        if machine.power in (Power.ON, Power.LEAVING)
    ]


def _least_to_lose(machines: Sequence[Machine], now_s: float) -> list[Machine]:
    return sorted(
        machines,
        key=lambda machine: (
            not machine.draining,
            machine.engine.num_running + machine.engine.num_waiting,
            -machine.idle_s_at(now_s),
        ),
    )


def spare(machines: Sequence[Machine], count: int, now_s: float) -> bool:
    """Routers shall spare `count` of the pool's workers, those that would go first. True: these are others than before."""
    on = [machine for machine in machines if machine.power is Power.ON]
    spared = set(_least_to_lose(on, now_s)[:count])
    changed = False
    for machine in machines:
        changed = changed or machine.draining != (machine in spared)
        machine.draining = machine in spared
    return changed


def scale(machines: Sequence[Machine], wanted: int, now_s: float, startup_s: float) -> list[Machine]:
    """Bring one pool's workers to `wanted`; returns those that start now. Workers that leave and have no work are off.

    More: those that leave stay, then those that are off start. Fewer: those that start go, then those with the fewest
    requests, of those the one idle for longest.
    """
    by_power = {power: [machine for machine in machines if machine.power is power] for power in Power}
    missing = wanted - len(by_power[Power.ON]) - len(by_power[Power.STARTING])
    if missing >= 0:
        back = by_power[Power.LEAVING][:missing]
        for machine in back:
            machine.stay()
        starting = by_power[Power.OFF][: missing - len(back)]
        for machine in starting:
            machine.start(now_s, startup_s)
        return starting
    for machine in [*reversed(by_power[Power.STARTING]), *_least_to_lose(by_power[Power.ON], now_s)][:-missing]:
        machine.leave(now_s)
        if machine.power is Power.LEAVING and not machine.engine.has_work:
            machine.stop(now_s)
    return []
