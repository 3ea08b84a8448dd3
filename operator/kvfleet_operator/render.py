"""What the operator would apply, without a cluster: the very functions it reconciles with, on manifests from files.

The only difference to the live objects are owner references, which need the owner's uid.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from kvfleet_api.common import Resource
from kvfleet_api.compile import compile_fleet
from kvfleet_api.manifests import Manifests, with_bundled
from kvfleet_operator.reconcile import fleetrouter, modelpool
from kvfleet_operator.reconcile.plan import Manifest
from kvfleet_operator.resources import CHILDREN

_ORDER = {resource.kind: index for index, resource in enumerate(CHILDREN)}


def render(manifests: Manifests) -> list[Manifest]:
    """The children of every ModelPool and FleetRouter: accounts and permissions, configuration, Services, workloads.

    Raises ValueError where a `podTemplate` does not fit or an AcceleratorProfile is missing. Profiles that come with
    kvfleet need not be among the files.
    """
    profiles = {profile.metadata.name: profile for profile in with_bundled(manifests.profiles)}
    rendered: list[Manifest] = []
    for pool in manifests.pools:
        reference = pool.spec.accelerator.profile_ref
        given = modelpool.PoolInput(pool, profiles.get(reference))
        if given.profile is None:
            known = ", ".join(sorted(profiles)) or "none"
            _refuse(
                pool, f"spec.accelerator.profileRef: no AcceleratorProfile {reference!r}: add its manifest ({known})"
            )
        _refuse(pool, modelpool.template_problem(given))
        rendered += modelpool.children(given).objects
    for router in manifests.routers:
        namespace = router.metadata.namespace or "default"
        fleet = compile_fleet(router, manifests.pools, manifests.policies, profiles.values(), namespace=namespace)
        router_input = fleetrouter.RouterInput(router, fleet, {})
        _refuse(router, fleetrouter.template_problem(router))
        rendered += fleetrouter.children(router_input).objects
    return _sorted(rendered)


def _refuse(resource: Resource, problem: str | None) -> None:
    if problem:
        raise ValueError(f"{resource.kind} {resource.key}: {problem}")


def _sorted(objects: Iterable[Manifest]) -> list[Manifest]:
    def place(manifest: Manifest) -> tuple[int, str, str]:
        return _ORDER[manifest["kind"]], manifest["metadata"]["namespace"], manifest["metadata"]["name"]

    # Through JSON, so that no two places share one object: YAML would print them as an anchor and an alias.
    return [json.loads(json.dumps(manifest)) for manifest in sorted(objects, key=place)]
