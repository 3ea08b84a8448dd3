"""Bring about what a plan wants: write where something differs, delete what is owned and not wanted any more.

Rules, in the order in which they are checked for each wanted child:

- It does not exist: server-side apply without force, once the owner is known to exist still (its end may be about to be
  noticed). Somebody who creates a namesake meanwhile is not overwritten.
- It exists and is not ours: never touched; the owner's condition says so. Without any controller, but with our labels,
  it is an orphan of ours (`kvfleet render | kubectl apply`, a restored backup) and is adopted.
- It is on its way out: left alone until it is gone.
- It would run under a foreign namesake (`NEEDS`): it waits, so that no pod gets somebody else's account or configuration.
- It is ours and as wanted: no request at all. Otherwise server-side apply with force, bound to its uid.

The API server may store a field otherwise than it was sent (a webhook, a canonical form). What still differs right after
an apply is remembered as its spelling, so that it does not cause a write each time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from kvfleet_api.common import Resource
from kvfleet_operator.api import TERMINATING, ApiError, KubeApi
from kvfleet_operator.reconcile import names
from kvfleet_operator.reconcile.dependents import key_of
from kvfleet_operator.reconcile.drift import difference
from kvfleet_operator.reconcile.plan import Applied, Manifest, Plan, Rejection, leftovers
from kvfleet_operator.resources import BY_KIND, CHILDREN
from kvfleet_operator.world import World

logger = logging.getLogger(__name__)
MAX_SPELLINGS: Final = 10_000
ORDER: Final = {resource.kind: index for index, resource in enumerate(CHILDREN)}
NEEDS: Final = {"RoleBinding": {"ServiceAccount"}, "Deployment": {"ServiceAccount", "ConfigMap"}}
"""Kind → the kinds that must not be somebody else's before it is applied."""


class Applier:
    def __init__(self, api: KubeApi, world: World) -> None:
        self._api = api
        self._world = world
        self._spellings: dict[str, str] = {}
        """uid → digest of an object that differs from what was applied through no drift."""

    async def bring_about(self, owner: Resource, plan: Plan) -> tuple[Applied, bool]:
        """What came of it, and whether anything was written.

        Raises ApiError where trying again may help, OwnerGone where there is nothing left to do.
        """
        rejections: list[Rejection] = []
        written = False
        for manifest in sorted(plan.objects, key=lambda manifest: ORDER[manifest["kind"]]):
            foreign = {rejection.kind for rejection in rejections if rejection.reason == "NameConflict"}
            if foreign & NEEDS.get(manifest["kind"], set()):
                continue
            try:
                written |= await self._one(owner, manifest)
            except Refused as refused:
                rejections.append(refused.rejection)
        try:
            written |= await self._delete_leftovers(owner, plan)
        except Refused as refused:
            rejections.append(refused.rejection)
        for rejection in rejections:
            log = logger.info if rejection.reason == "Terminating" else logger.warning
            log("%s: %s: %s", owner.key, rejection.reason, rejection.message)
        return Applied(rejections, self._world.children(owner)), written

    async def _one(self, owner: Resource, wanted: Manifest) -> bool:
        """Bring about one child. True where it was written; raises Refused where it cannot be."""
        key = key_of(wanted)
        live = self._world.get(key)
        if live is None:  # watched are only objects with our labels: look before taking a name
            with _refusals_of(wanted):
                live = await self._api.get(BY_KIND[key.kind], key.namespace, key.name)
        if live is None:
            with _refusals_of(wanted):
                await self._check(owner)
            logger.info("%s: creating %s", owner.key, key)
            await self._apply(wanted, force=False)
            return True
        if live["metadata"].get("deletionTimestamp"):
            raise Refused(wanted, "Terminating", f"{key} is being deleted; it is created again when it is gone.")
        if not names.is_owned(live, owner.metadata.uid) and not _orphan_of(live, wanted):
            raise Refused(wanted, *_foreign(live, owner))
        why = difference(wanted, live)
        if why is None or self._spellings.get(live["metadata"]["uid"]) == _digest(live):
            self._world.put(live)
            return False
        logger.info("%s: applying %s (%s)", owner.key, key, why)
        bound = {**wanted, "metadata": {**wanted["metadata"], "uid": live["metadata"]["uid"]}}
        await self._apply(bound, force=True)
        return True

    async def _check(self, owner: Resource) -> None:
        """Raise OwnerGone unless the owner exists, by the API server's own word."""
        metadata = owner.metadata
        live = await self._api.get(BY_KIND[owner.kind], metadata.namespace, metadata.name)
        if live is None or live["metadata"].get("uid") != metadata.uid or live["metadata"].get("deletionTimestamp"):
            raise OwnerGone(owner.key)

    async def _apply(self, wanted: Manifest, *, force: bool) -> None:
        with _refusals_of(wanted):
            result = await self._sent(wanted, force)
        uid = result["metadata"]["uid"]
        self._spellings.pop(uid, None)
        if difference(wanted, result) is not None:
            self._spellings[uid] = _digest(result)
            if len(self._spellings) > MAX_SPELLINGS:
                del self._spellings[next(iter(self._spellings))]  # the oldest; at worst it is applied once more
        self._world.put(result)

    async def _sent(self, wanted: Manifest, force: bool) -> Manifest:
        """Applied; where what others added to a list makes that impossible, the list is ours alone again.

        A Service's ports are one list to its validation and several items to server-side apply: a foreign port with the
        name of ours would keep ours out for good.
        """
        try:
            return await self._api.apply(wanted, force=force)
        except ApiError as error:
            if error.status != 422 or "uid" not in wanted["metadata"]:
                raise
        await self._api.overwrite(wanted)
        return await self._api.apply(wanted, force=force)

    async def _delete_leftovers(self, owner: Resource, plan: Plan) -> bool:
        doomed = leftovers(self._world.children(owner), plan)
        for live in doomed:
            logger.info("%s: deleting %s, which is not wanted any more", owner.key, key_of(live))
            with _refusals_of(live):
                await self._api.delete(live)
            self._world.remove(live)
            self._spellings.pop(live["metadata"]["uid"], None)
        return bool(doomed)


class OwnerGone(Exception):
    """The owner was deleted; its children go with it."""


class Refused(Exception):
    """One child cannot be brought about; the others can."""

    def __init__(self, wanted: Manifest, reason: str, message: str) -> None:
        super().__init__(message)
        self.rejection = Rejection(wanted["kind"], wanted["metadata"]["name"], reason, message)


@contextmanager
def _refusals_of(manifest: Manifest) -> Iterator[None]:
    """Turns an answer that trying again cannot change into a Refused of this child."""
    try:
        yield
    except ApiError as error:
        if error.status == 404:
            kind = manifest["kind"]
            message = f"The cluster has no {kind} (or no such namespace): install its CRDs or change the spec."
            raise Refused(manifest, "KindNotInstalled", message) from error
        if error.reason == TERMINATING:
            raise Refused(manifest, "Terminating", "Its namespace is being deleted.") from error
        if error.permanent:
            words = " ".join(str(error).split())  # in one line, for logs
            raise Refused(manifest, "Rejected", f"The API server refuses it: {words}") from error
        raise


def _foreign(live: Manifest, owner: Resource) -> tuple[str, str]:
    """(reason, message) for an object that has a name we need."""
    controller = names.controller_of(live) or {}
    what = f"{live['kind']} {live['metadata']['name']}"
    if controller.get("kind") == owner.kind and controller.get("name") == owner.metadata.name:
        return (
            "Terminating",
            f"{what} belongs to a former {owner.kind} of this name; waiting for its garbage collection.",
        )
    belongs = f"belongs to {controller['kind']} {controller['name']}" if controller else "was not made by kvfleet"
    return (
        "NameConflict",
        f"{what} exists and {belongs}; it is left alone: delete or rename it, or rename this {owner.kind}.",
    )


def _orphan_of(live: Manifest, wanted: Manifest) -> bool:
    """Without a controller, and labelled as ours for this very owner."""
    if names.controller_of(live) is not None:
        return False
    labels, ours = live["metadata"].get("labels") or {}, wanted["metadata"]["labels"]
    identity = (names.MANAGED_BY, names.COMPONENT, names.POOL, names.ROUTER)
    return all(labels.get(name) == ours.get(name) for name in identity)


def _digest(live: Mapping[str, object]) -> str:
    """Of everything but what changes by itself: status and bookkeeping."""
    metadata = live["metadata"]
    assert isinstance(metadata, Mapping)
    stable = {key: metadata.get(key) for key in ("labels", "annotations", "ownerReferences")}
    rest = {key: value for key, value in live.items() if key not in ("metadata", "status")}
    return hashlib.sha256(json.dumps([stable, rest], sort_keys=True).encode()).hexdigest()
