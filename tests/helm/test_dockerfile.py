"""The image's recipe keeps the rules for images, and takes in what the program needs and nothing else.

An image cannot be built without a registry to pull the base from; these are the rules hadolint and a reviewer would
check. Each rule is tried on a recipe that breaks it.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Instructions = list[tuple[str, str]]


def parse(text: str) -> Instructions:
    """(INSTRUCTION, arguments) in order; comments dropped, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    parts = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in parts]


def arguments(instructions: Instructions, name: str) -> list[str]:
    return [rest for instruction, rest in instructions if instruction == name]


def base_images(instructions: Instructions) -> Iterator[str]:
    """What the stages start from, with ARG defaults filled in; earlier stages left out."""
    defaults = dict(arg.split("=", 1) for arg in arguments(instructions, "ARG") if "=" in arg)
    stages: set[str] = set()
    for rest in arguments(instructions, "FROM"):
        image, _, stage = rest.partition(" AS ")
        resolved = re.sub(r"\$\{?(\w+)\}?", lambda match: defaults.get(match[1], match[0]), image)
        if resolved not in stages:
            yield resolved
        stages.add(stage)


def final_stage(instructions: Instructions) -> Instructions:
    last = max(index for index, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[last:]


def base_is_a_release(instructions: Instructions) -> bool:
    """Tag with a patch version or a digest: a rebuild starts from the same thing."""
    return all(re.search(r":\d+\.\d+\.\d+[-\w.]*$|@sha256:[0-9a-f]{64}$", image) for image in base_images(instructions))


def user_is_a_number_above_0(instructions: Instructions) -> bool:
    """`runAsNonRoot` can only check numbers."""
    users = arguments(final_stage(instructions), "USER")
    return bool(users) and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]) is not None


def nothing_is_added(instructions: Instructions) -> bool:
    """COPY does not unpack and does not download."""
    return not arguments(instructions, "ADD")


def apt_is_lean(instructions: Instructions) -> bool:
    runs = [run for run in arguments(instructions, "RUN") if "apt-get install" in run]
    return all("--no-install-recommends" in run and "rm -rf /var/lib/apt/lists" in run for run in runs)


def packages_are_pinned(instructions: Instructions) -> bool:
    """Every `pip install` follows the constraints."""
    runs = arguments(instructions, "RUN")
    return all(
        "--constraint constraints.txt" in step
        for run in runs
        for step in run.split("&&")
        if " install " in step and "apt-get" not in step
    )


def entrypoint_is_a_list(instructions: Instructions) -> bool:
    """A shell as process 1 would swallow SIGTERM."""
    entrypoints = arguments(final_stage(instructions), "ENTRYPOINT")
    return len(entrypoints) == 1 and entrypoints[0].startswith("[")


def nothing_runs_in_the_final_stage(instructions: Instructions) -> bool:
    """No tool and no cache of a build step is left in the image, and it builds for foreign platforms without emulation."""
    return not arguments(final_stage(instructions), "RUN")


def no_secret_is_baked_in(instructions: Instructions) -> bool:
    settings = [*arguments(instructions, "ENV"), *arguments(instructions, "ARG")]
    return not any(re.search(r"TOKEN|PASSWORD|SECRET|_KEY", text) for text in settings)


RULES = {
    base_is_a_release: "FROM python:3.13-slim",
    user_is_a_number_above_0: "FROM python:3.13.1-slim\nUSER root",
    nothing_is_added: "FROM python:3.13.1-slim\nADD https://example.org/x /x",
    apt_is_lean: "FROM python:3.13.1-slim\nRUN apt-get update && apt-get install -y curl",
    packages_are_pinned: "FROM python:3.13.1-slim\nRUN pip install kopf",
    entrypoint_is_a_list: "FROM python:3.13.1-slim\nENTRYPOINT kvfleet",
    nothing_runs_in_the_final_stage: "FROM python:3.13.1-slim AS b\nFROM python:3.13.1-slim\nRUN true",
    no_secret_is_baked_in: "FROM python:3.13.1-slim\nENV REGISTRY_TOKEN=x",
}
RULE_NAMES = [rule.__name__ for rule in RULES]


@pytest.fixture(scope="module")
def recipe(repository: Path) -> Instructions:
    return parse((repository / "Dockerfile").read_text())


@pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
def test_the_dockerfile_keeps_the_rule(rule: Callable[[Instructions], bool], recipe: Instructions) -> None:
    assert rule(recipe), rule.__doc__


@pytest.mark.parametrize(("rule", "bad"), RULES.items(), ids=RULE_NAMES)
def test_the_rule_finds_a_dockerfile_that_breaks_it(rule: Callable[[Instructions], bool], bad: str) -> None:
    assert not rule(parse(bad))


def test_the_script_that_installs_the_wheel_follows_the_constraints(repository: Path) -> None:
    steps = [" ".join(step) for step in parse((repository / "scripts" / "install_wheel.sh").read_text())]
    installs = [step for step in steps if " install " in step]
    assert len(installs) == 3
    assert packages_are_pinned([("RUN", " && ".join(installs))])


def test_continued_lines_are_one_instruction() -> None:
    assert parse("# c\nRUN a \\\n  # d\n  && b\nuser 1:1\n") == [("RUN", "a && b"), ("USER", "1:1")]


def copied(recipe: Instructions) -> list[str]:
    """Sources that the build takes from the repository."""
    sources = [rest.split() for rest in arguments(recipe, "COPY") if not rest.startswith("--from")]
    return [source.rstrip("/") for words in sources for source in words[:-1]]


def test_what_is_copied_exists_and_passes_the_dockerignore(repository: Path, recipe: Instructions) -> None:
    patterns = (repository / ".dockerignore").read_text().splitlines()
    allowed = [line.removeprefix("!") for line in patterns if line.startswith("!")]
    assert "*" in patterns
    for source in copied(recipe):
        assert (repository / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), source
    assert sorted(allowed) == sorted(copied(recipe))


def test_everything_that_the_wheel_is_made_of_is_copied(repository: Path, recipe: Instructions) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel.get("force-include", {}), project["project"]["readme"]]
    needed += [project["tool"]["hatch"]["version"]["path"], *project["project"]["license-files"], "constraints.txt"]
    assert {path.split("/")[0] for path in needed} <= {path.split("/")[0] for path in copied(recipe)}


def test_every_dependency_is_pinned_to_a_version_that_the_project_allows(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for dependency in map(Requirement, project["dependencies"]):
        assert canonicalize_name(dependency.name) in pins, dependency
        assert dependency.specifier.contains(pins[canonicalize_name(dependency.name)]), dependency
