"""The four kinds → FleetConfig. Pure: the operator, `kvfleet router -f` and `kvfleet render` share it.

Nothing raises on a wrong reference. What can be served is put into the configuration, and each thing that is wrong
becomes a `Problem`: the operator turns it into a condition, the command line into an error. A fleet in service is
thus never emptied because a profile was deleted: its pool keeps a generic cost until the profile is back.

Order of policies (the router takes the first that matches a request): higher `priority`, then the more specific match
(one point each for named models, every header, context range and priority range), then the older object, then the name.
ModelPools that no policy names share one generated policy with the default objective, at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final
from urllib.parse import urlsplit

from kvfleet_api.acceleratorprofile import AcceleratorProfile
from kvfleet_api.common import Resource
from kvfleet_api.cost import CostModel
from kvfleet_api.fleetconfig import Endpoint, FleetConfig, PolicyConfig, PoolConfig, WeightedPool, WorkerTLS
from kvfleet_api.fleetrouter import FleetRouter
from kvfleet_api.modelpool import ModelPool
from kvfleet_api.power import report_small_budgets, watts
from kvfleet_api.problems import Problem, did_you_mean, problem_of
from kvfleet_api.resolve import GENERIC_COST, CostError, integer_argument, resolve_cost
from kvfleet_api.routingpolicy import RoutingPolicy, RoutingPolicySpec, TokenRange

GENERATED_POLICY: Final = "kvfleet.default"
"""Name of the policy for pools no policy names. With its dot it can be nobody's RoutingPolicy."""
TOKENIZERS_PATH: Final = "/etc/kvfleet-tokenizers"
WORKER_CA_PATH: Final = "/etc/kvfleet-worker-ca"
WORKER_CLIENT_PATH: Final = "/etc/kvfleet-worker-client"
ANY_MODEL: Final = "*"
"""As a pool's or a policy's model: whatever name the client sends."""


@dataclass(frozen=True, slots=True)
class CompiledFleet:
    config: FleetConfig
    problems: list[Problem]

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == "Error"]

    def problems_of(self, resource: Resource) -> list[Problem]:
        """Those of one object of the fleet's namespace."""
        own = (resource.kind, resource.metadata.name)
        return [problem for problem in self.problems if (problem.kind, problem.name) == own]


def workers_service_name(pool: str) -> str:
    """Name of the headless Service whose EndpointSlices list the pool's workers; at most 63 characters."""
    return _bounded(pool, "-workers")


def lws_name(pool: str) -> str:
    """Name of the LeaderWorkerSet of a pool whose workers are spread over nodes; at most 63 characters."""
    return _bounded(pool, "-lws")


def _bounded(name: str, suffix: str) -> str:
    if len(name) + len(suffix) <= 63:
        return name + suffix
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: 63 - len(suffix) - 9]}-{digest}{suffix}"


def compile_fleet(
    router: FleetRouter | None,
    pools: Iterable[ModelPool],
    policies: Iterable[RoutingPolicy],
    profiles: Iterable[AcceleratorProfile],
    *,
    namespace: str = "default",
) -> CompiledFleet:
    """What the routers of `namespace` load. Objects of other namespaces are left out; `router` None takes defaults."""
    problems: list[Problem] = []
    own_pools = sorted((pool for pool in pools if _namespace(pool) == namespace), key=_age)
    own_policies = sorted((policy for policy in policies if _namespace(policy) == namespace), key=_precedence)
    by_name = {profile.metadata.name: profile for profile in profiles}
    adapters = _usable_adapters(own_pools, problems)
    compiled_pools = [_pool(pool, adapters[pool.metadata.name], by_name, problems) for pool in own_pools]
    compiled_policies = _policies(own_policies, compiled_pools, problems)
    _report_conflicts(own_policies, compiled_policies, problems)
    spec = router.spec if router else FleetRouter.model_validate({"metadata": {"name": "local"}}).spec
    report_small_budgets(router, own_pools, own_policies, compiled_pools, problems)
    config = FleetConfig(
        name=router.metadata.name if router else "local",
        namespace=namespace,
        pools=sorted(compiled_pools, key=lambda pool: pool.name),
        policies=compiled_policies,
        limits=spec.limits,
        routers=max(spec.replicas * spec.processes, 1) if router else 1,
        max_watts=watts(spec.max_watts),
        telemetry=spec.telemetry,
        drain_s=float(spec.drain_seconds),
    )
    return CompiledFleet(config, problems)


def static_fleet(
    urls: Sequence[str],
    strategy: str = "kvfleet",
    model: str | None = None,
    *,
    cost: CostModel = GENERIC_COST,
    ttft_slo_s: float = 1.0,
    itl_slo_s: float = 0.05,
    tokenizer_path: str | None = None,
    kv_events_port: int = 5557,
    kv_replay_port: int | None = 5558,
) -> FleetConfig:
    """A fleet of the engines at `urls`, without manifests. `model` None: any name a client sends. `tokenizer_path`: where the
    model's tokenizer lies; engines then publish KV events at `kv_events_port` of their hosts.

    Raises ValueError where a URL is not `http://host:port`.
    """
    endpoints = [_endpoint(url) for url in dict.fromkeys(urls)]
    if tokenizer_path is not None:
        endpoints = [_publishing(endpoint, kv_events_port, kv_replay_port) for endpoint in endpoints]
    if not endpoints:
        raise ValueError("no worker URL: give at least one, such as http://127.0.0.1:8000")
    served = model or ANY_MODEL
    pool = PoolConfig(name="static", model=served, cost=cost, endpoints=endpoints, tokenizer_path=tokenizer_path)
    policy = PolicyConfig(
        name=GENERATED_POLICY,
        models=[served],
        pools=[WeightedPool(name=pool.name)],
        strategy=strategy,
        ttft_slo_s=ttft_slo_s,
        itl_slo_s=itl_slo_s,
    )
    return FleetConfig(pools=[pool], policies=[policy])


def _publishing(endpoint: Endpoint, events_port: int, replay_port: int | None) -> Endpoint:
    """The worker, its KV events published at these ports of its host."""
    host = endpoint.name.rpartition(":")[0]
    replay = None if replay_port is None else f"tcp://{host}:{replay_port}"
    return endpoint.model_copy(update={"kv_events_url": f"tcp://{host}:{events_port}", "kv_replay_url": replay})


def _endpoint(url: str) -> Endpoint:
    remedy = "write it as http://host:port or https://host:port"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"worker {url!r}: {error}: {remedy}") from error
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"worker {url!r}: scheme {parts.scheme!r} is not supported: {remedy}")
    if not host or parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"worker {url!r}: only a host and a port may be given: {remedy}")
    address = f"{f'[{host}]' if ':' in host else host}:{port or (443 if parts.scheme == 'https' else 80)}"
    return Endpoint(name=address, url=f"{parts.scheme}://{address}")


def _namespace(resource: Resource) -> str:
    return resource.metadata.namespace or "default"


def _age(resource: Resource) -> tuple[bool, str, str]:
    """Sort key: older first, objects without a creation time (from files) last, then by name."""
    created = resource.metadata.creation_timestamp
    return (created is None, created or "", resource.metadata.name)


# Pools


def _usable_adapters(pools: Sequence[ModelPool], problems: list[Problem]) -> dict[str, list[str]]:
    """Pool → the adapters it may serve: a name that means another model elsewhere is left to its older owner."""
    bases: dict[str, str] = {
        pool.spec.model.name: "" for pool in pools
    }  # served name → base model; "" for a model itself
    owners = {pool.spec.model.name: pool.metadata.name for pool in reversed(pools)}
    usable: dict[str, list[str]] = {}
    for pool in pools:
        base, kept = pool.spec.model.name, []
        for index, adapter in enumerate(pool.spec.adapters):
            if bases.setdefault(adapter.name, base) == base:
                owners.setdefault(adapter.name, pool.metadata.name)
                kept.append(adapter.name)
                continue
            other = bases[adapter.name]
            meaning = f"an adapter of {other}" if other else "a model"
            message = (
                f"{adapter.name!r} is already {meaning} (ModelPool {owners[adapter.name]}); this adapter gets no requests: "
                "rename one of the two"
            )
            problems.append(problem_of(pool, f"spec.adapters[{index}].name", "Accepted", "NameTaken", message))
        usable[pool.metadata.name] = kept
    return usable


def _pool(
    pool: ModelPool, adapters: list[str], profiles: dict[str, AcceleratorProfile], problems: list[Problem]
) -> PoolConfig:
    spec, engine = pool.spec, pool.spec.engine
    scales_to_zero = spec.autoscaling is not None and spec.autoscaling.min_replicas == 0
    events = engine.kv_events if engine.kv_events.enabled else None
    tokenizer = spec.model.tokenizer
    return PoolConfig(
        name=pool.metadata.name,
        namespace=_namespace(pool),
        model=spec.model.name,
        adapters=adapters,
        role=spec.role,
        accelerator=spec.accelerator.profile_ref,
        gpus_per_worker=spec.devices_per_pod * spec.parallelism.nodes,
        cost=_cost(pool, profiles, problems),
        max_watts=watts(spec.max_watts),
        block_tokens=integer_argument(engine.args, "block-size") or engine.block_tokens,
        max_context_tokens=integer_argument(engine.args, "max-model-len") or spec.model.max_context_tokens,
        service=workers_service_name(pool.metadata.name),
        port=engine.port,
        tls=_tls(pool),
        kv_events_port=events.port if events else None,
        kv_replay_port=events.replay_port if events else None,
        data_parallel=integer_argument(engine.args, "data-parallel-size") or 1,
        tokenizer_path=_tokenizer_path(pool) if events else None,
        tokenizer_config_map=tokenizer.config_map_ref if tokenizer and events else None,
        scales_to_zero=scales_to_zero,
        wake_target=_workload(pool) if scales_to_zero else None,
    )


def worker_server_name(pool: ModelPool) -> str:
    """The name that the certificates of a pool's workers are to have."""
    given = pool.spec.engine.tls.server_name if pool.spec.engine.tls else None
    return given or f"{workers_service_name(pool.metadata.name)}.{_namespace(pool)}.svc"


def _tls(pool: ModelPool) -> WorkerTLS | None:
    tls, name = pool.spec.engine.tls, pool.metadata.name
    if tls is None:
        return None
    ca, client = tls.ca_config_map_ref, tls.client_certificate_secret_ref
    return WorkerTLS(
        server_name=worker_server_name(pool),
        ca_path=f"{WORKER_CA_PATH}/{name}/{ca.key}" if ca else None,
        ca_config_map=ca.name if ca else None,
        client_certificate_path=f"{WORKER_CLIENT_PATH}/{name}" if client else None,
        client_certificate_secret=client,
    )


def tokenizer_mount(pool: str) -> str:
    """Where routers mount the ConfigMap with the tokenizer of a pool."""
    return f"{TOKENIZERS_PATH}/{pool}"


def _tokenizer_path(pool: ModelPool) -> str | None:
    tokenizer = pool.spec.model.tokenizer
    if tokenizer is None:
        return None
    return tokenizer.path or tokenizer_mount(pool.metadata.name)


def _workload(pool: ModelPool) -> str:
    """The resource whose `replicas` are the pool's workers."""
    name = pool.metadata.name
    if pool.spec.parallelism.nodes > 1:
        return f"leaderworkersets/{lws_name(name)}"
    return f"deployments/{workers_service_name(name)}"


def _cost(pool: ModelPool, profiles: dict[str, AcceleratorProfile], problems: list[Problem]) -> CostModel:
    spec, reference = pool.spec, pool.spec.accelerator.profile_ref
    profile = profiles.get(reference)
    if profile is None:
        known = ", ".join(sorted(profiles)) or "none"
        message = (
            f"no AcceleratorProfile {reference!r}{did_you_mean(reference, profiles)}; a generic cost is used: "
            f"create it or name one that exists ({known})"
        )
        problems.append(problem_of(pool, "spec.accelerator.profileRef", "ResolvedRefs", "ProfileNotFound", message))
        return GENERIC_COST
    try:
        parallelism = spec.parallelism
        return resolve_cost(profile.spec, spec.model, parallelism.tensor, parallelism.pipeline, spec.engine.args)
    except CostError as error:
        message = f"{error} (until then a generic cost is used)"
        problems.append(problem_of(pool, f"spec.{error.field}", "Accepted", "CostUnknown", message, "Warning"))
        return GENERIC_COST


# Policies


def _policies(
    policies: Sequence[RoutingPolicy], pools: Sequence[PoolConfig], problems: list[Problem]
) -> list[PolicyConfig]:
    by_name = {pool.name: pool for pool in pools}
    compiled = [config for policy in policies if (config := _policy(policy, by_name, problems))]
    named = {reference.name for policy in policies for reference in policy.spec.pools}
    alone = sorted((pool for pool in pools if pool.name not in named), key=lambda pool: pool.name)
    if alone:
        compiled.append(
            PolicyConfig(
                name=GENERATED_POLICY,
                namespace=alone[0].namespace,
                models=_served(alone),
                pools=[WeightedPool(name=pool.name) for pool in alone],
            )
        )
    return compiled


def _policy(policy: RoutingPolicy, pools: dict[str, PoolConfig], problems: list[Problem]) -> PolicyConfig | None:
    """The policy resolved, or None where no pool is left that could serve it."""
    spec = policy.spec
    usable: list[PoolConfig] = []
    for index, reference in enumerate(spec.pools):
        pool = pools.get(reference.name)
        if pool is None:
            known = ", ".join(sorted(pools)) or "none"
            message = (
                f"no ModelPool {reference.name!r} in namespace {_namespace(policy)}{did_you_mean(reference.name, pools)}: "
                f"create it or name one that exists ({known})"
            )
            problems.append(problem_of(policy, f"spec.pools[{index}].name", "ResolvedRefs", "PoolNotFound", message))
        elif reference.weight > 0:
            usable.append(pool)
    if not usable:
        message = (
            "none of the pools can be used; the policy takes no requests: name an existing pool with a weight above 0"
        )
        problems.append(problem_of(policy, "spec.pools", "Accepted", "NoUsablePool", message))
        return None
    models = _policy_models(policy, usable, problems)
    if not models:
        message = "none of the models is served by the policy's pools; it takes no requests: correct models or pools"
        problems.append(problem_of(policy, "spec.match.models", "Accepted", "NoUsablePool", message))
        return None
    _report_half_pairs(policy, usable, problems)
    return _policy_config(policy, models, {pool.name for pool in usable})


def _policy_config(policy: RoutingPolicy, models: list[str], usable: set[str]) -> PolicyConfig:
    spec = policy.spec
    return PolicyConfig(
        name=policy.metadata.name,
        namespace=_namespace(policy),
        generation=policy.metadata.generation or 0,
        models=models,
        headers=spec.match.headers,
        context_tokens=spec.match.context_tokens,
        priority=spec.match.priority,
        pools=[
            WeightedPool(name=ref.name, weight=ref.weight, tier=ref.tier) for ref in spec.pools if ref.name in usable
        ],
        strategy=spec.strategy,
        ttft_slo_s=spec.slo.ttft_milliseconds / 1000,
        itl_slo_s=spec.slo.itl_milliseconds / 1000,
        energy_mode=spec.energy.mode,
        energy_s_per_joule=spec.energy.microseconds_per_joule * 1e-6,
        max_watts=watts(spec.energy.max_watts),
        defer=spec.energy.defer,
        prefix=spec.prefix,
        disaggregation=spec.disaggregation,
        admission=spec.admission,
        resilience=spec.resilience,
    )


def _served(pools: Iterable[PoolConfig]) -> list[str]:
    """Every model and adapter name of `pools`, each once."""
    return list(dict.fromkeys(name for pool in pools for name in (pool.model, *pool.adapters)))


def _policy_models(policy: RoutingPolicy, usable: Sequence[PoolConfig], problems: list[Problem]) -> list[str]:
    served = _served(usable)
    wanted = policy.spec.match.models
    if not wanted:
        return served
    for index, name in enumerate(wanted):
        if name not in served:
            message = (
                f"{name!r} is neither model nor adapter of the policy's pools{did_you_mean(name, served)}: "
                f"add a pool that serves it or remove it (served: {', '.join(served)})"
            )
            problems.append(
                problem_of(policy, f"spec.match.models[{index}]", "ResolvedRefs", "ModelNotServed", message)
            )
    return [name for name in dict.fromkeys(wanted) if name in served]


def _report_half_pairs(policy: RoutingPolicy, usable: Sequence[PoolConfig], problems: list[Problem]) -> None:
    """A model with Prefill workers but no Decode workers (or the other way round) cannot be served by that pair."""
    for model in dict.fromkeys(pool.model for pool in usable):
        roles = {pool.role for pool in usable if pool.model == model}
        for present, absent in (("Prefill", "Decode"), ("Decode", "Prefill")):
            if present in roles and absent not in roles:
                message = f"model {model!r} has a {present} pool but no {absent} pool in this policy: add one, or use role Unified"
                problems.append(problem_of(policy, "spec.pools", "ResolvedRefs", "IncompletePair", message))


# Precedence and conflicts


def specificity(spec: RoutingPolicySpec) -> int:
    """How many things a request must have for the policy to match it."""
    match = spec.match
    return bool(match.models) + len(match.headers) + (match.context_tokens is not None) + (match.priority is not None)


def _precedence(policy: RoutingPolicy) -> tuple[int, int, tuple[bool, str, str]]:
    return (-policy.spec.priority, -specificity(policy.spec), _age(policy))


def _report_conflicts(
    policies: Sequence[RoutingPolicy], compiled: Sequence[PolicyConfig], problems: list[Problem]
) -> None:
    """Name each policy that loses requests to another only because that one is older or first by name."""
    configs = {config.name: config for config in compiled}
    for winner, loser in combinations(policies, 2):
        first, second = configs.get(winner.metadata.name), configs.get(loser.metadata.name)
        if first is None or second is None or _precedence(winner)[:2] != _precedence(loser)[:2]:
            continue
        if not _overlap(first, second):
            continue
        created = winner.metadata.creation_timestamp, loser.metadata.creation_timestamp
        why = "it is older" if created[0] != created[1] else "its name comes first"
        shared = ", ".join(sorted(set(first.models) & set(second.models)))
        message = (
            f"matches requests that RoutingPolicy {winner.metadata.name} also matches, with equal priority and specificity "
            f"(models {shared}); {winner.metadata.name} wins because {why}: give one a higher priority or a narrower match"
        )
        problems.append(problem_of(loser, "spec.match", "Conflicted", "OverlappingMatch", message, "Warning"))


def _overlap(first: PolicyConfig, second: PolicyConfig) -> bool:
    """Whether some request matches both."""
    if not set(first.models) & set(second.models):
        return False
    wanted = {header.name.lower(): header.value for header in first.headers}
    if any(wanted.get(header.name.lower(), header.value) != header.value for header in second.headers):
        return False
    return _ranges_meet(first.context_tokens, second.context_tokens) and _ranges_meet(first.priority, second.priority)


def _ranges_meet(first: TokenRange | None, second: TokenRange | None) -> bool:
    if first is None or second is None:
        return True
    return (second.max is None or first.min <= second.max) and (first.max is None or second.min <= first.max)
