"""Reading the engine's command line as vLLM does: `--a-b V`, `--a_b=V` and short forms mean the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

ALIASES: Final = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-n": "--nnodes",
    "-r": "--node-rank",
}


def flag_name(argument: str) -> str:
    """`--max_model_len=5` → `--max-model-len`; short forms as the long ones."""
    name = argument.partition("=")[0]
    return ALIASES.get(name, name.replace("_", "-"))


def flags(arguments: Sequence[str]) -> set[str]:
    """The flags that are given."""
    return {flag_name(argument) for argument in arguments if argument.startswith("-")}


def values(arguments: Sequence[str], flag: str) -> list[str]:
    """What follows a flag that takes several values; the last one counts, as in the engine."""
    found: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("-"):
            inside = flag_name(argument) == flag
            found = [argument.partition("=")[2]] if inside and "=" in argument else [] if inside else found
        elif inside:
            found.append(argument)
    return found
