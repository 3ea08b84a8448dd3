"""Write a status only where it differs, and tell its transitions as Events."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from kvfleet_api.common import Condition
from kvfleet_operator.api import TERMINATING, ApiError, KubeApi
from kvfleet_operator.reconcile.conditions import Transition, dump, transitions
from kvfleet_operator.reconcile.names import MANAGER
from kvfleet_operator.reconcile.plan import Manifest
from kvfleet_operator.resources import BY_KIND, EVENT
from kvfleet_operator.world import World

logger = logging.getLogger(__name__)
MAX_NOTE = 1024
"""Characters the API server allows in an Event's note."""


def rfc3339(moment: datetime) -> str:
    """To the second, as conditions have it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def changes(live: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `wanted` that the live status has otherwise; an empty list equals an absent one."""
    found = {key: value for key, value in wanted.items() if live.get(key) != value and (live.get(key) or value != [])}
    if "conditions" in found and _conditions(live) == wanted["conditions"]:
        del found["conditions"]
    return found


def _conditions(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    return dump(Condition.model_validate(condition) for condition in status.get("conditions") or [])


class StatusWriter:
    def __init__(self, api: KubeApi, world: World, *, instance: str) -> None:
        self._api = api
        self._world = world
        self._instance = instance

    async def write(self, live: Manifest, wanted: Mapping[str, Any], now: datetime) -> bool:
        """True where something was written. Raises ApiError (409) where the object changed meanwhile."""
        before = live.get("status") or {}
        patch = changes(before, wanted)
        if not patch:
            return False
        resource = BY_KIND[live["kind"]]
        try:
            result = await self._api.patch_status(resource, live, patch)
        except ApiError as error:
            if error.status == 404:
                return False  # deleted meanwhile
            raise
        self._world.put({"apiVersion": resource.api_version, "kind": resource.kind, **result})
        old, new = ([Condition.model_validate(c) for c in s.get("conditions") or []] for s in (before, wanted))
        for transition in transitions(old, new):
            await self._post(live, transition, now)
        return True

    async def _post(self, regarding: Manifest, transition: Transition, now: datetime) -> None:
        condition = transition.condition
        await self.tell(
            regarding,
            action=condition.type,
            reason=condition.reason,
            note=f"{condition.type}={condition.status}: {condition.message}",
            warning=transition.warning,
            now=now,
        )

    async def tell(
        self, regarding: Manifest, *, action: str, reason: str, note: str, warning: bool, now: datetime
    ) -> None:
        """An Event. Losing one is no reason to fail a reconciliation."""
        metadata = regarding["metadata"]
        namespace = metadata.get("namespace") or "default"
        event = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"generateName": f"{metadata['name'][:40].rstrip('-.')}-", "namespace": namespace},
            "eventTime": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": f"kvfleet.io/{MANAGER}",
            "reportingInstance": self._instance[:128],
            "action": action,
            "reason": reason[:128],
            "note": note[:MAX_NOTE],
            "type": "Warning" if warning else "Normal",
            "regarding": {
                "apiVersion": regarding["apiVersion"],
                "kind": regarding["kind"],
                "name": metadata["name"],
                "namespace": metadata.get("namespace"),
                "uid": metadata.get("uid"),
                "resourceVersion": metadata.get("resourceVersion"),
            },
        }
        try:
            await self._api.create(EVENT, event)
        except ApiError as error:
            log = logger.info if error.reason == TERMINATING else logger.warning
            log("event about %s %s not posted: %s", regarding["kind"], metadata["name"], error)
