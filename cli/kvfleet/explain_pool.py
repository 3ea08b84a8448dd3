"""Why a pool has so many workers, from its status: what decided, what holds it back, when it last changed.

The status is the operator's own word (`status.autoscaling`, `status.energy`, the conditions), read with whatever a kubeconfig gives.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.text import Text

from kvfleet_api import GROUP, VERSION
from kvfleet_api.common import Condition
from kvfleet_api.modelpool import EnergyStatus, ModelPool

TIMEOUT_S = 10
SHOWN = ("ScalingActive", "EnergyTrusted", "CacheKnown", "Ready", "Progressing", "Accepted")
"""Conditions that tell something about the number of workers, whether joules steer, and whether caches are known or guessed."""


class PoolError(Exception):
    """The pool cannot be shown; says what to do."""


async def read_pool(name: str, namespace: str | None, kubeconfig: Path | None, context: str | None) -> ModelPool:
    """The pool as the API server has it. Raises PoolError."""
    from kubernetes.aio import client, config

    configuration = client.Configuration()
    namespace = namespace or _namespace_of(kubeconfig, context)
    loading: Any = config
    try:
        await _load(loading, configuration, kubeconfig, context)
    except (config.ConfigException, OSError) as error:
        raise PoolError(f"no cluster: {error}: pass --kubeconfig") from error
    async with client.ApiClient(configuration) as api:
        objects: Any = client.CustomObjectsApi(api)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                found = await objects.get_namespaced_custom_object(GROUP, VERSION, namespace, "modelpools", name)
        except client.ApiException as error:
            if error.status == 404:
                raise PoolError(f"there is no ModelPool {namespace}/{name}: see `kubectl get modelpools -A`") from error
            raise PoolError(f"the API server answered {error.status} {error.reason}") from error
        except TimeoutError as error:
            raise PoolError(f"{configuration.host} did not answer within {TIMEOUT_S} s") from error
        except OSError as error:
            raise PoolError(f"{configuration.host}: {error}") from error
    try:
        return ModelPool.model_validate(found)
    except ValidationError as error:
        raise PoolError(f"ModelPool {namespace}/{name} is of another version of kvfleet: {error}") from error


async def _load(config: Any, configuration: Any, kubeconfig: Path | None, context: str | None) -> None:
    """As kubectl: the file given, else KUBECONFIG or ~/.kube/config, else the pod's service account."""
    if kubeconfig is None and context is None:
        try:
            await config.load_kube_config(client_configuration=configuration, persist_config=False)
        except config.ConfigException:
            config.load_incluster_config(client_configuration=configuration)
        return
    path = str(kubeconfig) if kubeconfig else None
    await config.load_kube_config(path, context, configuration, persist_config=False)


def _namespace_of(kubeconfig: Path | None, context: str | None) -> str:
    """The namespace of the context in use; `default` where it names none."""
    from kubernetes.aio import config

    listing: Any = config
    try:
        contexts, active = listing.list_kube_config_contexts(config_file=str(kubeconfig) if kubeconfig else None)
    except (config.ConfigException, OSError):
        return "default"
    chosen = next((entry for entry in contexts if entry["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")


def explain_pool(pool: ModelPool, now: datetime | None = None) -> RenderableType:
    """In words, most important first."""
    now = now or datetime.now(UTC)
    status, autoscaling = pool.status, pool.spec.autoscaling
    lines: list[RenderableType] = [_headline(pool)]
    if autoscaling is None:
        lines.append(Text("  not autoscaled: spec.replicas says how many workers there are", style="dim"))
    elif status is None or status.autoscaling is None:
        lines.append(Text("  the autoscaler has not judged it yet: is the operator running?", style="yellow"))
    else:
        told = status.autoscaling
        lines.append(_line("bounds", f"{autoscaling.min_replicas} to {autoscaling.max_replicas}"))
        lines.append(_line("binding signal", told.binding_signal or "none: no signal has a usable figure"))
        lines.append(_line("held back by", told.held_back_by or "nothing", "yellow" if told.held_back_by else ""))
        lines.append(_line("last change", _ago(told.last_scale_time, now)))
        if told.forecast:
            lines.append(_line("forecast", f"{told.forecast}{_says(autoscaling.forecast.mode)}"))
        if told.startup_seconds is not None:
            lines.append(_line("start-up", f"{told.startup_seconds} s until a worker is ready"))
    if status is not None and status.energy is not None:
        lines.append(_line("energy", _energy(status.energy)))
    conditions = {condition.type: condition for condition in (status.conditions if status else [])}
    lines += [_condition(conditions[kind]) for kind in SHOWN if kind in conditions]
    return Group(*lines, "")


def _headline(pool: ModelPool) -> Text:
    status = pool.status
    text = Text(f"{pool.metadata.namespace}/{pool.metadata.name}", style="bold")
    if status is None:
        return text.append("  no status yet", style="yellow")
    wanted = status.autoscaling.desired_replicas if status.autoscaling else status.desired_replicas
    text.append(f"  wants {'?' if wanted is None else wanted} workers", style="bold green")
    return text.append(f", has {status.replicas or 0}, {status.ready_replicas or 0} ready", style="default")


def _line(what: str, text: str, style: str = "") -> Text:
    return Text(f"  {what + ':':<16}").append(text, style=style)


UNITS = {
    "StepEnergy": ("E0", "J/step", 1e6),
    "TokenEnergy": ("E1", "mJ/token", 1e3),
    "PrefillTokenEnergy": ("prefill", "mJ/token", 1e3),
    "IdlePower": ("idle", "W", 1e6),
}


def _energy(energy: EnergyStatus) -> str:
    """What was learned: each coefficient with its standard error."""
    told = []
    for learned in energy.coefficients:
        name, unit, scale = UNITS[learned.coefficient]
        value, error = learned.value_microunits / scale, learned.standard_error_microunits / scale
        told.append(f"{name} {value:.3g} ± {error:.2g} {unit}")
    off = f"{energy.samples} intervals, off by {energy.error_percent} %"
    return "; ".join([f"{energy.source}: {off}", *told])


def _says(mode: str) -> str:
    return "; it only reports" if mode == "Observe" else ""


def _ago(stamp: str | None, now: datetime) -> str:
    if stamp is None:
        return "never by the autoscaler"
    seconds = max(0, int((now - datetime.fromisoformat(stamp)).total_seconds()))
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{stamp} ({seconds // size} {unit} ago)"
    return f"{stamp} ({seconds} s ago)"


def _condition(condition: Condition) -> Text:
    bad = condition.status != "True" and condition.type != "Progressing"
    text = f"{condition.status}, {condition.reason}: {condition.message}"
    return _line(condition.type, text, "red" if bad else "dim")
