"""What the commands are given, checked: manifests, a FleetConfig, names. What is wrong is a UsageError that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from kvfleet_api.fleetconfig import FleetConfig
    from kvfleet_api.manifests import Manifests

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class UsageError(Exception):
    """Wrong input; the message says what and what to do."""


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def load_manifests(paths: list[Path]) -> Manifests:
    from kvfleet_api.manifests import ManifestError, load

    try:
        return load(paths)
    except ManifestError as error:
        raise UsageError(str(error)) from error


def render_objects(manifests: Manifests) -> list[dict[str, Any]]:
    """Objects as the operator would apply; what does not resolve is an error here, where no later apply can heal it."""
    from kvfleet_operator.render import render

    compile_fleet_config(manifests)
    try:
        return render(manifests)
    except ValueError as error:
        raise UsageError(str(error)) from error


def compile_fleet_config(manifests: Manifests) -> FleetConfig:
    from kvfleet.fleet import FleetError, compile_manifests, warnings

    try:
        config = compile_manifests(manifests)
    except FleetError as error:
        raise UsageError(str(error)) from error
    for line in warnings(manifests):
        Console(stderr=True, highlight=False).print(f"[yellow]warning:[/yellow] {escaped(line)}", soft_wrap=True)
    return config


def checked_log_level(name: str) -> str:
    if name.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise UsageError(f"--log-level {name}: use debug, info, warning or error")
    return name.upper()


def read_fleet_config(path: Path) -> FleetConfig:
    from pydantic import ValidationError

    from kvfleet_api.fleetconfig import FleetConfig

    try:
        return FleetConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}: give the path of a compiled FleetConfig") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise UsageError(f"--config {path}: {field}: {first['msg']}: write it with the operator's version") from error


def check_strategies(names: list[str]) -> None:
    from kvfleet_router.policies import REGISTRY

    for name in names:
        if name not in REGISTRY:
            raise UsageError(f"strategy {name!r} is not known: use one of {', '.join(sorted(REGISTRY))}")
