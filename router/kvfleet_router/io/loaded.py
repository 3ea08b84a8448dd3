"""Which configuration is being served, and what is wrong with a newer one: told at the admin port, and from there to the
operator, which reports in each object's status what routers really do.

Computed once for each change, but for what there is to say of pools: probes and scrapes only read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from kvfleet_api.fleetconfig import FleetConfig

MAX_REFUSED_CHARS = 1000


class Loaded:
    def __init__(self, config: FleetConfig, pools: Callable[[], dict[str, dict[str, Any]]] = dict) -> None:
        """`pools`: what each pool's cached prefixes are known by, and what is known of its energy."""
        self._pools = pools
        self.errors = 0
        """Configurations that could not be taken, ever."""
        self.take(config)

    def take(self, config: FleetConfig) -> None:
        """`config` is being served."""
        self.revision = config.revision
        self.refused = ""
        """Why a newer one is not served; empty: there is none, or none that was refused."""
        self._policies = {
            policy.name: {"generation": policy.generation, "revision": policy.revision} for policy in config.policies
        }

    def still_wanted(self) -> None:
        """The one being served is the newest again."""
        self.refused = ""

    def refuse(self, reason: str) -> None:
        """A newer one cannot be served."""
        self.errors += 1
        self.refused = reason[:MAX_REFUSED_CHARS]

    def to_json(self) -> bytes:
        document: dict[str, Any] = {
            "revision": self.revision,
            "policies": self._policies,
            "refused": self.refused or None,
            "pools": self._pools(),
        }
        return orjson.dumps(document)
