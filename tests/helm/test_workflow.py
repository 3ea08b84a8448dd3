"""The CI workflow: what can be checked of it without running it.

Actions pinned by commit, least permissions, time limits, no text of strangers in a shell, and every make target and
path it names is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Workflow = dict[Any, Any]


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / ".github/workflows/ci.yaml").read_text()


@pytest.fixture(scope="module")
def workflow(text: str) -> Workflow:
    return dict(yaml.safe_load(text))


def steps(workflow: Workflow) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


def scripts(workflow: Workflow) -> list[str]:
    return [step["run"] for step in steps(workflow) if "run" in step]


def actions_are_pinned(workflow: Workflow) -> bool:
    """By commit: a tag can be moved."""
    return all(
        re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", step["uses"]) for step in steps(workflow) if "uses" in step
    )


def the_token_reads_only(workflow: Workflow) -> bool:
    """By default; a job that publishes says what it writes."""
    writes = [job["permissions"] for job in workflow["jobs"].values() if "permissions" in job]
    return workflow.get("permissions") == {"contents": "read"} and all(
        permissions == {"contents": "read", "packages": "write"} for permissions in writes
    )


def jobs_end(workflow: Workflow) -> bool:
    return all(job.get("timeout-minutes", 999) <= 90 for job in workflow["jobs"].values())


def no_expression_in_scripts(workflow: Workflow) -> bool:
    """What strangers write (titles, branch names) would become code; it goes through the environment instead."""
    return not any("${{" in script for script in scripts(workflow))


def only_tags_publish(workflow: Workflow) -> bool:
    def publishes(step: dict[str, Any]) -> bool:
        return "login-action" in step.get("uses", "") or " push " in step.get("run", "")

    return all("refs/tags/v" in step.get("if", "") for step in steps(workflow) if publishes(step))


def credentials_are_not_kept(workflow: Workflow) -> bool:
    checkouts = [step for step in steps(workflow) if "actions/checkout" in step.get("uses", "")]
    return all(step.get("with", {}).get("persist-credentials") is False for step in checkouts)


def job(**fields: Any) -> Workflow:
    return {"permissions": {"contents": "read"}, "jobs": {"a": {"timeout-minutes": 5, "steps": [], **fields}}}


RULES: dict[Callable[[Workflow], bool], Workflow] = {
    actions_are_pinned: job(steps=[{"uses": "actions/checkout@v5"}]),
    the_token_reads_only: job(permissions={"contents": "write"}),
    jobs_end: {"jobs": {"a": {"steps": []}}},
    no_expression_in_scripts: job(steps=[{"run": "echo ${{ github.head_ref }}"}]),
    only_tags_publish: job(steps=[{"run": "helm push a oci://b"}]),
    credentials_are_not_kept: job(steps=[{"uses": "actions/checkout@v5"}]),
}
RULE_NAMES = [rule.__name__ for rule in RULES]


@pytest.mark.parametrize("rule", RULES, ids=RULE_NAMES)
def test_the_workflow_keeps_the_rule(rule: Callable[[Workflow], bool], workflow: Workflow) -> None:
    assert rule(workflow), rule.__doc__


@pytest.mark.parametrize(("rule", "bad"), RULES.items(), ids=RULE_NAMES)
def test_the_rule_finds_a_workflow_that_breaks_it(rule: Callable[[Workflow], bool], bad: Workflow) -> None:
    assert not rule(bad)


def test_every_pin_says_which_release_it_is(text: str) -> None:
    pins = re.findall(r"uses: \S+@[0-9a-f]{40}(.*)", text)
    assert pins and all(re.fullmatch(r" # v\d+\.\d+\.\d+", comment) for comment in pins)


def test_one_action_has_one_pin(text: str) -> None:
    pins = set(re.findall(r"uses: (\S+)@([0-9a-f]{40})", text))
    assert len({action for action, _ in pins}) == len(pins)


def test_every_make_target_is_in_the_makefile(workflow: Workflow, repository: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    used = {target for script in scripts(workflow) for target in re.findall(r"\bmake ([a-z0-9-]+)", script)}
    assert {"test", "e2e"} <= used <= targets


def test_every_path_exists(text: str, repository: Path) -> None:
    tracked = {path.name for path in repository.iterdir()} - {"dist"}
    own_words = re.sub(r"uses: .*", "", text)
    mentioned = set(re.findall(r"(?<![\w./~-])([\w.-]+(?:/[\w.*-]+)+|[\w-]+\.txt)", own_words))
    paths = {path for path in mentioned if path.split("/")[0] in tracked}
    assert {"constraints.txt", "helm/kvfleet", "e2e/controlplane/go.mod"} <= paths
    for path in paths:
        if not path.startswith(".venv/"):
            assert list(repository.glob(path)), path


def test_the_matrix_tests_every_python_the_project_names(workflow: Workflow, repository: Path) -> None:
    project = (repository / "pyproject.toml").read_text()
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == named
