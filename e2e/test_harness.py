"""The harness itself: what Kubernetes promises, the built-in cluster keeps.

These tests run on any cluster that has the self-tests' image; those that need the process kubelet's levers say so.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from harness.cluster import Cluster
from harness.kube import Kube, Object
from harness.sentences import Given, Story, Then, When, is_ready
from harness.settings import WEB_IMAGE
from harness.traffic import traffic

from kvfleet_api.fleetrouter import DEFAULT_ROUTER_IMAGE

WEB = "app=web"


def web_container(**fields: Any) -> Object:
    return {
        "name": "web",
        "image": WEB_IMAGE,
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 1},
        **fields,
    }


def web_deployment(replicas: int = 1, container: Object | None = None, **pod: Any) -> Object:
    template = {
        "metadata": {"labels": {"app": "web"}},
        "spec": {"terminationGracePeriodSeconds": 10, "containers": [container or web_container()], **pod},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template},
    }


def web_service() -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]},
    }


def web_pod(name: str = "web", container: Object | None = None, **spec: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "web"}},
        "spec": {"terminationGracePeriodSeconds": 10, "containers": [container or web_container()], **spec},
    }


def settings(**data: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": data}


def sleeper(name: str, **fields: Any) -> Object:
    """Ends at once on SIGTERM."""
    script = "trap 'exit 0' TERM; while :; do sleep 0.05; done"
    return web_pod(name, {"name": "main", "image": "busybox:1", "command": ["sh", "-c", script], **fields})


def container_status(pod: Object, index: int = 0) -> Object:
    statuses: list[Object] = pod["status"].get("containerStatuses") or [{}]
    return statuses[index]


def test_a_deployment_becomes_ready_and_its_service_answers(given: Given, then: Then, story: Story) -> None:
    given.applied(web_deployment(2), web_service())
    then.ready("Deployment", "web")
    names = {pod["metadata"]["name"] for pod in story.kube.list("Pod", WEB)}
    url = story.url("web")

    answered: set[str] = set()

    def both_answered() -> bool:
        answered.add(httpx.get(url).raise_for_status().text.split()[0])
        return answered == names

    then.eventually("both pods have answered through the Service", both_answered)


def test_pods_find_services_and_the_api_server_by_name(given: Given, then: Then, kube: Kube) -> None:
    """As any operator does: the Service's DNS name, and the in-cluster configuration of the official client."""
    script = (
        "import urllib.request, kubernetes as k; k.config.load_incluster_config(); "
        "print(urllib.request.urlopen('http://web/', timeout=5).read().decode()); "
        "print(k.client.VersionApi().get_code().git_version)"
    )
    asker = {"name": "asker", "image": DEFAULT_ROUTER_IMAGE, "command": ["python", "-c", script]}
    given.applied(web_deployment(), web_service())
    then.ready("Deployment", "web")
    given.applied(web_pod("asker", asker, restartPolicy="Never"))
    then.is_so("Pod", "asker", "has succeeded", lambda pod: pod["status"]["phase"] == "Succeeded")
    name, version = kube.logs("asker").splitlines()
    assert name.startswith("web-")
    assert version.startswith("v1.")


def test_a_mounted_config_map_follows_its_object(given: Given, when: When, then: Then, story: Story) -> None:
    container = web_container(volumeMounts=[{"name": "settings", "mountPath": "/etc/settings"}])
    volume = {"name": "settings", "configMap": {"name": "settings"}}
    given.applied(settings(greeting="hello"), web_deployment(1, container, volumes=[volume]), web_service())
    then.ready("Deployment", "web")
    url = story.url("web", path="/file/etc/settings/greeting")
    assert httpx.get(url).text == "hello"
    when.applied(settings(greeting="good evening"))
    # A real kubelet looks once a minute; the process kubelet watches.
    within_s = 2 if story.cluster.reaches_pods else 120
    then.eventually("the pod sees the new text", lambda: httpx.get(url).text == "good evening", within_s)


def test_a_pod_waits_for_what_it_mounts(given: Given, when: When, then: Then) -> None:
    container = web_container(volumeMounts=[{"name": "settings", "mountPath": "/etc/settings"}])
    volume = {"name": "settings", "configMap": {"name": "settings"}}
    given.applied(web_pod(container=container, volumes=[volume]))

    def waits(pod: Object) -> bool:
        return bool(container_status(pod).get("state", {}).get("waiting", {}).get("reason") == "ContainerCreating")

    then.is_so("Pod", "web", "waits for its volume", waits)
    when.applied(settings(greeting="hello"))
    then.ready("Pod", "web")


def test_a_rolling_update_keeps_serving(given: Given, when: When, then: Then, story: Story) -> None:
    # New connections still come while the endpoint's removal spreads: the process lingers as a good server does.
    def version(text: str) -> Object:
        container = web_container(args=["--linger", "1"], env=[{"name": "VERSION", "value": text}])
        return web_deployment(2, container)

    given.applied(version("v1"), web_service())
    then.ready("Deployment", "web")
    with traffic(story.url("web")) as requests:
        then.eventually("v1 answers", lambda: any("v1" in answer for answer in requests.answers))
        when.applied(version("v2"))
        then.ready("Deployment", "web").counts("Pod", 2, WEB)
        seen = len(requests.answers)
        then.eventually("v2 answers", lambda: any("v2" in answer for answer in requests.answers[seen:]))
    assert requests.failures == []
    assert not any("v1" in answer for answer in requests.answers[-2:])


def test_scaling_adds_and_removes_pods(given: Given, when: When, then: Then) -> None:
    given.applied(web_deployment(1))
    then.ready("Deployment", "web")
    when.scaled("Deployment", "web", to=3)
    then.ready("Deployment", "web").counts("Pod", 3, WEB)
    when.scaled("Deployment", "web", to=0)
    then.counts("Pod", 0, WEB)


def test_deletion_runs_the_hook_then_sends_sigterm_then_waits(
    given: Given, when: When, then: Then, story: Story
) -> None:
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "echo preStop > /proc/1/fd/1; sleep 0.5"]}}}
    given.applied(web_pod(container=web_container(lifecycle=hook)), web_service())
    then.ready("Pod", "web")
    url = story.url("web", path="/slow?s=2")
    with httpx.stream("GET", url, timeout=10) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "0"
        when.deleted("Pod", "web")
        log = _last_log(then, story, "SIGTERM")
        assert log.splitlines() == ["serving", "preStop", "SIGTERM"]
        assert list(lines)[-1] == "9"  # The answer in the making is finished.
    then.gone("Pod", "web", within_s=5)


def _last_log(then: Then, story: Story, word: str) -> str:
    log = ""

    def has_word() -> bool:
        nonlocal log
        log = story.kube.logs("web")
        return word in log

    then.eventually(f"the log has {word}", has_word)
    return log


def test_a_process_that_ignores_sigterm_is_killed_after_its_grace_period(given: Given, when: When, then: Then) -> None:
    stubborn = {
        "name": "main",
        "image": "busybox:1",
        "command": ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"],
    }
    given.applied(web_pod(container=stubborn, terminationGracePeriodSeconds=2))
    then.ready("Pod", "web")
    when.deleted("Pod", "web")
    then.is_so("Pod", "web", "is on its way out", lambda pod: "deletionTimestamp" in pod["metadata"])
    then.gone("Pod", "web", within_s=6)


def test_a_failing_liveness_probe_restarts_the_container(given: Given, then: Then, story: Story) -> None:
    probe = {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1, "failureThreshold": 2}
    given.applied(web_deployment(1, web_container(livenessProbe=probe)), web_service())
    then.ready("Deployment", "web")
    pod = story.kube.list("Pod", WEB)[0]["metadata"]["name"]
    httpx.post(story.url("web", path="/break")).raise_for_status()
    then.is_so("Pod", pod, "has restarted", lambda pod: container_status(pod).get("restartCount") == 1)
    then.ready("Pod", pod)
    assert "SIGTERM" in story.kube.logs(pod, previous=True)


def test_a_startup_probe_holds_the_others_back(given: Given, then: Then, kube: Kube) -> None:
    """Liveness would fail at once; it is not asked before the startup probe has passed."""
    script = "sleep 2; touch /tmp/started; trap 'exit 0' TERM; while :; do sleep 0.05; done"
    check = {"exec": {"command": ["test", "-e", "/tmp/started"]}, "periodSeconds": 1}
    slow = {
        "name": "main",
        "image": "busybox:1",
        "command": ["sh", "-c", script],
        "startupProbe": {**check, "failureThreshold": 10},
        "livenessProbe": {**check, "failureThreshold": 1},
    }
    given.applied(web_pod(container=slow))
    then.ready("Pod", "web")
    assert container_status(kube.get("Pod", "web"))["restartCount"] == 0


def test_a_killed_container_is_restarted(given: Given, when: When, then: Then, kube: Kube) -> None:
    given.applied(sleeper("victim"))
    then.ready("Pod", "victim")
    when.signalled("victim", "main", 9)

    def restarted(pod: Object) -> bool:
        status = container_status(pod)
        return status.get("restartCount") == 1 and "running" in status["state"]

    then.is_so("Pod", "victim", "has restarted once", restarted).ready("Pod", "victim")
    last = container_status(kube.get("Pod", "victim"))["lastState"]["terminated"]
    assert last["exitCode"] == 137


def test_a_container_that_keeps_failing_is_backed_off(given: Given, then: Then) -> None:
    failing = {"name": "main", "image": "busybox:1", "command": ["sh", "-c", "exit 3"]}
    given.applied(web_pod(container=failing))

    def backed_off(pod: Object) -> bool:
        status = container_status(pod)
        waiting, last = status.get("state", {}).get("waiting"), status.get("lastState", {}).get("terminated")
        return bool(waiting and waiting["reason"] == "CrashLoopBackOff" and last and last["exitCode"] == 3)

    then.is_so("Pod", "web", "is in CrashLoopBackOff after exit code 3", backed_off)


def test_init_containers_run_first_and_in_order(given: Given, then: Then, kube: Kube) -> None:
    def step(name: str, script: str) -> Object:
        mount = {"name": "work", "mountPath": "/work"}
        return {"name": name, "image": "busybox:1", "command": ["sh", "-c", script], "volumeMounts": [mount]}

    pod = web_pod(
        container=step("main", "cat /work/steps"),
        initContainers=[step("one", "echo one >> /work/steps"), step("two", "echo two >> /work/steps")],
        volumes=[{"name": "work", "emptyDir": {}}],
        restartPolicy="Never",
    )
    given.applied(pod)
    then.is_so("Pod", "web", "has succeeded", lambda pod: pod["status"]["phase"] == "Succeeded")
    assert kube.logs("web").split() == ["one", "two"]


def test_the_environment_is_complete(given: Given, then: Then, kube: Kube) -> None:
    def field(path: str) -> Object:
        return {"valueFrom": {"fieldRef": {"fieldPath": path}}}

    variables = [
        {"name": "POD", **field("metadata.name")},
        {"name": "IP", **field("status.podIP")},
        {"name": "APP", **field("metadata.labels['app']")},
        {"name": "GREETING", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "greeting"}}},
        {"name": "BOTH", "value": "$(POD) says $(GREETING), $$(POD) stays"},
        {"name": "ABSENT", "valueFrom": {"secretKeyRef": {"name": "none", "key": "k", "optional": True}}},
    ]
    script = 'echo "$POD|$APP|$BOTH|${ABSENT-unset}|$(hostname)"; echo "$IP"'
    shell = {"name": "main", "image": "busybox:1", "command": ["sh", "-c", script], "env": variables}
    given.applied(settings(greeting="hello"), web_pod(container=shell, restartPolicy="Never"))
    then.is_so("Pod", "web", "has succeeded", lambda pod: pod["status"]["phase"] == "Succeeded")
    first, address = kube.logs("web").splitlines()
    assert first == "web|web|web says hello, $(POD) stays|unset|web"
    assert address == kube.get("Pod", "web")["status"]["podIP"]


def test_a_read_only_root_is_read_only_and_volumes_are_not(given: Given, then: Then, kube: Kube) -> None:
    script = "for d in / /tmp /etc /work; do touch $d/x 2>/dev/null && echo $d writable || echo $d read-only; done"
    shell = {
        "name": "main",
        "image": "busybox:1",
        "command": ["sh", "-c", script],
        "securityContext": {"readOnlyRootFilesystem": True},
        "volumeMounts": [{"name": "work", "mountPath": "/work"}],
    }
    given.applied(web_pod(container=shell, volumes=[{"name": "work", "emptyDir": {}}], restartPolicy="Never"))
    then.is_so("Pod", "web", "has succeeded", lambda pod: pod["status"]["phase"] == "Succeeded")
    assert kube.logs("web").splitlines() == ["/ read-only", "/tmp read-only", "/etc read-only", "/work writable"]


def test_a_disruption_budget_is_honoured(given: Given, when: When, then: Then, kube: Kube) -> None:
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "web"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "web"}}},
    }
    given.applied(web_deployment(2), budget)
    then.ready("Deployment", "web")
    then.is_so("PodDisruptionBudget", "web", "allows one", lambda item: item["status"]["disruptionsAllowed"] == 1)
    first, second = [pod["metadata"]["name"] for pod in kube.list("Pod", WEB)]
    kube.patch("Deployment", "web", {"spec": {"paused": True}})  # The budget, not a replacement, protects the other.
    assert when.evicted(first) == 201
    assert when.evicted(second) == 429
    then.gone("Pod", first)


def test_gpus_are_counted(given: Given, when: When, then: Then, kube: Kube) -> None:
    nodes = [node for node in kube.list("Node") if "nvidia.com/gpu" in node["status"]["allocatable"]]
    total = sum(int(node["status"]["allocatable"]["nvidia.com/gpu"]) for node in nodes)
    fitting, resources = total // 4, {"limits": {"nvidia.com/gpu": 4}}
    given.applied(*(sleeper(f"gpu-{number}", resources=resources) for number in range(fitting + 1)))

    def running() -> list[str]:
        return [pod["metadata"]["name"] for pod in kube.list("Pod") if pod["status"]["phase"] == "Running"]

    then.eventually("as many pods run as GPUs allow", lambda: len(running()) == fitting)
    (waiting,) = {f"gpu-{number}" for number in range(fitting + 1)} - set(running())

    def refused(pod: Object) -> bool:
        conditions = pod["status"].get("conditions") or []
        return any("Insufficient nvidia.com/gpu" in entry.get("message", "") for entry in conditions)

    then.is_so("Pod", waiting, "is refused for want of GPUs", refused)
    when.deleted("Pod", running()[0])
    then.ready("Pod", waiting)


def test_a_lost_node_s_pods_are_replaced_elsewhere_or_start_again_with_it(
    given: Given, then: Then, story: Story, cluster: Cluster
) -> None:
    tolerations = [
        {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}
        for state in ("unreachable", "not-ready")
    ]
    given.applied(web_deployment(1, tolerations=tolerations), web_service())
    then.ready("Deployment", "web")
    node = story.kube.list("Pod", WEB)[0]["spec"]["nodeName"]
    patient = sleeper("patient")
    patient["metadata"]["labels"], patient["spec"]["nodeName"] = {}, node
    given.applied(patient)
    then.ready("Pod", "patient")
    before = story.kube.get("Pod", "patient")["status"]
    cluster.fail_node(node)
    try:

        def served_elsewhere() -> bool:
            pods = [pod for pod in story.kube.list("Pod", WEB) if pod["spec"].get("nodeName") != node]
            name = httpx.get(story.url("web"), timeout=1).raise_for_status().text.split()[0]
            return name in {pod["metadata"]["name"] for pod in pods}

        then.eventually("another node's pod answers", served_elsewhere, within_s=90)
    finally:
        cluster.recover_node(node)
    then.ready("Node", node).counts("Pod", 1, WEB)

    def runs_anew(pod: Object) -> bool:
        return is_ready(pod) and container_status(pod)["state"] != before["containerStatuses"][0]["state"]

    then.is_so("Pod", "patient", "runs again", runs_anew, within_s=90)
    if cluster.reaches_pods:  # where a pod that starts again has a network of its own again
        now = story.kube.get("Pod", "patient")["status"]
        assert now["podIP"] != before["podIP"]
        assert now["podIPs"] == [{"ip": now["podIP"]}]


def test_an_unknown_image_and_an_unsupported_field_are_told_by_name(given: Given, then: Then, cluster: Cluster) -> None:
    if not cluster.reaches_pods:
        pytest.skip("the process kubelet's own errors")
    given.applied(web_pod("stranger", {"name": "main", "image": "registry.example/none:1"}))
    given.applied(web_pod("greedy", hostNetwork=True))

    def image_missing(pod: Object) -> bool:
        return bool(container_status(pod).get("state", {}).get("waiting", {}).get("reason") == "ImagePullBackOff")

    then.is_so("Pod", "stranger", "waits for its image", image_missing)
    then.is_so("Pod", "greedy", "is refused", lambda pod: "hostNetwork" in pod["status"].get("message", ""))
