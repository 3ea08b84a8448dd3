"""Fixtures of the end-to-end tests: one cluster a session, one namespace a test, and given / when / then over both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from harness.cluster import Cluster, ClusterError, open_cluster
from harness.diagnosis import describe
from harness.kube import Kube, wait_until
from harness.sentences import Given, Story, Then, When
from harness.settings import SettingsError
from support.installation import Installation

NAMESPACE_GONE_S = 60

_numbers = itertools.count(1)
_removed: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--keep", action="store_true", help="leave the cluster and the namespaces of failed tests for inspection"
    )
    parser.addoption(
        "--curves",
        type=Path,
        metavar="DIRECTORY",
        help="test_replicas_follow_the_load takes 15 minutes and writes its page, its plot and the dashboards' pictures there",
    )


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    keep = bool(request.config.getoption("--keep"))
    try:
        opened = open_cluster(tmp_path_factory.mktemp("cluster"), keep)
    except (ClusterError, SettingsError) as error:
        pytest.exit(f"no cluster for the end-to-end tests: {error}", returncode=3)
    yield opened
    try:
        if not keep:
            _wait_for_removal(opened, tmp_path_factory.mktemp("removal"))
    finally:
        request.config.stash[_farewell] = opened.close(keep)


@pytest.fixture
def story(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Iterator[Story]:
    """The test's own namespace, removed with all that is in it."""
    namespace = f"e2e-{next(_numbers)}-{_short(request.node.name)}"
    kube = Kube(cluster.kubeconfig, namespace, tmp_path / "discovery.json")
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    # Pods are refused until their service account is there.
    wait_until(lambda: kube.find("ServiceAccount", "default"), f"namespace {namespace} is usable", 30)
    yield Story(cluster, kube)
    try:
        if not (request.config.getoption("--keep") and request.node.stash.get(_failed, False)):
            _remove(kube, namespace)
    finally:
        kube.close()


@pytest.fixture(scope="session")
def installation(
    request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """The session's release of the chart, not yet installed. It leaves the CRDs to the cluster."""
    release = Installation(cluster, tmp_path_factory.mktemp("installation"))
    yield release
    try:
        if not request.config.getoption("--keep"):
            release.uninstall()
    finally:
        release.close()


@pytest.fixture
def kvfleet(installation: Installation) -> Installation:
    """The session's release, installed and at work."""
    return installation.ensure()


@pytest.fixture
def given(story: Story) -> Given:
    return Given(story)


@pytest.fixture
def when(story: Story) -> When:
    return When(story)


@pytest.fixture
def then(story: Story) -> Then:
    return Then(story)


@pytest.fixture
def kube(story: Story) -> Kube:
    return story.kube


@pytest.fixture
def tells(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Has a measurement shown at the end of the run, whether or not the test passes."""

    def tell(sentence: str) -> None:
        request.config.stash.setdefault(_measurements, []).append(f"{request.node.name}: {sentence}")

    return tell


_failed = pytest.StashKey[bool]()
_farewell = pytest.StashKey[str]()
_measurements = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if measurements := config.stash.get(_measurements, []):
        terminalreporter.section("measured")
        for line in measurements:
            terminalreporter.write_line(line)
    if farewell := config.stash.get(_farewell, ""):
        terminalreporter.write_line(farewell)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fixtures = getattr(item, "funcargs", {})
    story = fixtures.get("story")
    if report.when == "call" and report.failed and story is not None:
        item.stash[_failed] = True
        report.sections.append(("cluster", describe(story.cluster, story.kube.namespace)))
        for namespace in {each.namespace for each in fixtures.values() if isinstance(each, Installation)}:
            report.sections.append(("kvfleet", describe(story.cluster, namespace)))
    return report


def _short(name: str) -> str:
    """As a part of a namespace's name."""
    words = "".join(letter if letter.isalnum() else "-" for letter in name.lower().removeprefix("test_"))
    return words[:40].strip("-")


def _remove(kube: Kube, namespace: str) -> None:
    """The grace period of pods is a test's subject, not its end's: what is left is killed."""
    _removed.append(namespace)
    kube.delete("Namespace", namespace)

    def no_pods() -> bool:
        pods = kube.list("Pod")
        for pod in pods:
            kube.delete_if_there("Pod", pod["metadata"]["name"], grace_s=0)
        return not pods

    wait_until(no_pods, f"the pods of {namespace} are gone", NAMESPACE_GONE_S)


def _wait_for_removal(cluster: Cluster, scratch: Path) -> None:
    """Nothing may hold the namespaces of the tests back, such as a finalizer that nobody takes away."""
    kube = Kube(cluster.kubeconfig, "default", scratch / "discovery.json")
    try:
        for namespace in _removed:
            kube.wait_gone("Namespace", namespace, NAMESPACE_GONE_S)
    finally:
        kube.close()
