"""The pure parts of the process kubelet: environment, images, volumes, status, names. No cluster."""

from __future__ import annotations

import subprocess
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from harness.kubelet import images
from harness.kubelet.api import Object
from harness.kubelet.config import ImageConfig
from harness.kubelet.env import PodFacts, container_env, service_links
from harness.kubelet.probes import ProbeFailure, Prober, attempt, port_number
from harness.kubelet.sandbox import SandboxSpec, launch_script
from harness.kubelet.status import ContainerView, PodView, pod_status
from harness.kubelet.store import MissingReferenceError, hosts_file
from harness.kubelet.volumes import File, Mount, project, write_atomically
from harness.kubelet.worker import unsupported
from harness.settings import Settings, SettingsError

FACTS = PodFacts(pod_ip="10.244.1.7", host_ip="10.244.0.1")


class Source:
    """ConfigMaps and Secrets of one namespace."""

    def __init__(self, config_maps: dict[str, Object] | None = None, secrets: dict[str, Object] | None = None) -> None:
        self._config_maps = config_maps or {}
        self._secrets = secrets or {}

    def config_map(self, namespace: str, name: str) -> Object:
        return self._find(self._config_maps, name)

    def secret(self, namespace: str, name: str) -> Object:
        return self._find(self._secrets, name)

    @staticmethod
    def _find(items: dict[str, Object], name: str) -> Object:
        if name not in items:
            raise MissingReferenceError(name)
        return items[name]


SOURCE = Source(
    {"settings": {"data": {"a": "1", "b": "2"}}},
    {"keys": {"type": "Opaque", "data": {"token": b64encode(b"secret").decode()}}},
)


def pod(**spec: Any) -> Object:
    metadata = {"name": "web-0", "namespace": "ns", "uid": "u", "labels": {"app": "web"}, "generation": 1}
    return {"metadata": metadata, "spec": {"nodeName": "node-0", **spec}}


def environment(container: Object, services: list[Object] | None = None) -> dict[str, str]:
    return container_env(pod(), container, {"PATH": "/bin"}, services or [], SOURCE, FACTS)


# --- environment


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A)-$(A)", "1-1"),
        ("$$(A)", "$(A)"),
        ("$(UNKNOWN) $A", "$(UNKNOWN) $A"),
        ("$$$(A)", "$1"),
    ],
)
def test_references_are_expanded_as_kubernetes_does(text: str, expanded: str) -> None:
    assert images.expand(text, {"A": "1"}) == expanded


def test_later_entries_of_the_environment_win() -> None:
    container = {
        "envFrom": [{"configMapRef": {"name": "settings"}, "prefix": "S_"}, {"secretRef": {"name": "keys"}}],
        "env": [{"name": "S_a", "value": "own"}, {"name": "PATH", "value": "$(PATH):/opt"}],
    }
    assert environment(container) == {"PATH": "/bin:/opt", "S_a": "own", "S_b": "2", "token": "secret"}


def test_a_missing_reference_is_an_error_unless_it_is_optional() -> None:
    def entry(**reference: Any) -> Object:
        return {"env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"key": "a", **reference}}}]}

    assert environment(entry(name="settings"))["X"] == "1"
    assert "X" not in environment(entry(name="none", optional=True))
    assert "X" not in environment(entry(name="settings", key="none", optional=True))
    with pytest.raises(MissingReferenceError, match="none"):
        environment(entry(name="none"))
    with pytest.raises(MissingReferenceError, match='no key "none"'):
        environment(entry(name="settings", key="none"))


def test_a_service_named_like_a_program_shadows_its_settings() -> None:
    """The trap that links are reproduced for."""
    service = {"metadata": {"name": "vllm"}, "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80, "name": "api"}]}}
    headless = {"metadata": {"name": "peers"}, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}}
    assert service_links([service, headless]) == {
        "VLLM_SERVICE_HOST": "10.96.0.9",
        "VLLM_SERVICE_PORT": "80",
        "VLLM_SERVICE_PORT_API": "80",
        "VLLM_PORT": "tcp://10.96.0.9:80",
    }


# --- images


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({}, ["vllm", "serve", "default"]),
        ({"args": ["m", "--port", "$(PORT)"]}, ["vllm", "serve", "m", "--port", "8000"]),
        ({"command": ["sh"]}, ["sh"]),
        ({"command": ["sh", "-c"], "args": ["true"]}, ["sh", "-c", "true"]),
    ],
)
def test_command_and_args_replace_entrypoint_and_cmd(container: Object, words: list[str]) -> None:
    image = ImageConfig(match="vllm:*", entrypoint=["vllm", "serve"], cmd=["default"])
    assert images.command(container, image, {"PORT": "8000"}) == words


def test_the_first_matching_image_is_taken_and_labels_fill_its_environment() -> None:
    table = [ImageConfig(match="a/b:1"), ImageConfig(match="a/*", env={"P": "{labels[k/x]}|{labels[none]}"})]
    assert images.find(table, "a/b:1") is table[0]
    found = images.find(table, "a/b:2")
    assert found is table[1]
    assert images.image_env(found, {"k/x": "h100"}) == {"P": "h100|"}
    assert images.find(table, "b") is None


# --- volumes


def test_volumes_show_all_new_files_at_once_and_drop_old_ones(tmp_path: Path) -> None:
    old = {"kept": File(b"1", 0o644), "dropped": File(b"x", 0o644), "sub/deep": File(b"d", 0o600)}
    assert write_atomically(tmp_path, old)
    generation = (tmp_path / "..data").readlink()
    assert not write_atomically(tmp_path, old)
    assert (tmp_path / "..data").readlink() == generation
    assert write_atomically(tmp_path, {"kept": File(b"2", 0o644)})
    assert (tmp_path / "kept").read_bytes() == b"2"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("..")) == ["kept"]
    assert len(list(tmp_path.iterdir())) == 3  # kept, ..data and the one folder behind it


def test_a_projected_volume_joins_its_sources() -> None:
    sources = [
        {"serviceAccountToken": {"path": "token"}},
        {"configMap": {"name": "settings", "items": [{"key": "a", "path": "conf/a", "mode": 0o400}]}},
        {"secret": {"name": "none", "optional": True}},
        {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
    ]
    volume = {"name": "v", "projected": {"sources": sources, "defaultMode": 0o440}}
    assert project(volume, pod(), SOURCE, FACTS, {("v", "token"): "t"}) == {
        "token": File(b"t", 0o440),
        "conf/a": File(b"1", 0o400),
        "labels": File(b'app="web"', 0o440),
    }


# --- status


def view(*states: Object, init: tuple[Object, ...] = (), will_restart: bool = True, **fields: Any) -> PodView:
    def container(number: int, state: Object) -> ContainerView:
        running = "running" in state
        return ContainerView(f"c{number}", "image", state, state.get("last", {}), 0, running, running)

    return PodView(
        pod_ip="10.244.1.7",
        host_ip="10.244.0.1",
        started_at="t",
        network_ready=True,
        init=[container(number, state) for number, state in enumerate(init)],
        main=[container(number, state) for number, state in enumerate(states)],
        will_restart=will_restart,
        **fields,
    )


RUNNING: Object = {"running": {"startedAt": "t"}}
WAITING: Object = {"waiting": {"reason": "ContainerCreating"}}


def ended(code: int) -> Object:
    return {"terminated": {"exitCode": code}}


@pytest.mark.parametrize(
    ("seen", "phase", "ready"),
    [
        (view(WAITING), "Pending", "False"),
        (view(RUNNING, WAITING), "Pending", "False"),
        (view(RUNNING, RUNNING), "Running", "True"),
        (view(RUNNING, ended(1)), "Running", "False"),
        (view(ended(0), will_restart=False), "Succeeded", "False"),
        (view(ended(0), ended(1), will_restart=False), "Failed", "False"),
        (view(WAITING, init=(RUNNING,)), "Pending", "False"),
        (view(WAITING, init=(ended(1),), will_restart=False), "Failed", "False"),
        (view(RUNNING, gates=["example/gate"]), "Running", "False"),
        (view(WAITING, refused="spec.hostNetwork"), "Failed", "False"),
    ],
)
def test_phase_and_readiness_follow_the_containers(seen: PodView, phase: str, ready: str) -> None:
    status = pod_status(pod(), seen, "now")
    assert status["phase"] == phase
    assert {entry["type"]: entry["status"] for entry in status["conditions"]}["Ready"] == ready


def test_a_condition_keeps_its_time_until_it_turns() -> None:
    before = pod()
    before["status"] = {"conditions": pod_status(before, view(WAITING), "earlier")["conditions"]}
    after = {entry["type"]: entry for entry in pod_status(before, view(RUNNING), "now")["conditions"]}
    assert after["Initialized"]["lastTransitionTime"] == "earlier"
    assert after["Ready"]["lastTransitionTime"] == "now"


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"volumes": [{"name": "v", "persistentVolumeClaim": {}}]}, "persistentVolumeClaim"),
        ({"initContainers": [{"name": "side", "restartPolicy": "Always"}]}, "side"),
        ({"containers": [{"name": "c", "livenessProbe": {"grpc": {"port": 1}}}]}, "livenessProbe.grpc"),
        ({}, ""),
    ],
)
def test_what_is_not_supported_is_named(spec: Object, named: str) -> None:
    reason = unsupported({"containers": [{"name": "main"}], **spec})
    assert named in reason
    assert bool(reason) == bool(named)


# --- probes


@pytest.mark.parametrize(
    ("verdict", "outcomes", "turned_after"),
    [
        (False, "xx.", 3),  # readiness, not yet ready: the first success
        (True, "x.xx.xxx", 8),  # ready: three failures in a row
        (None, "xx.", 3),  # startup: whichever threshold comes first
        (None, "xxx.", 3),
    ],
)
async def test_a_verdict_turns_at_its_threshold(verdict: bool | None, outcomes: str, turned_after: int) -> None:
    asked = 0

    async def check(_timeout_s: float) -> None:
        nonlocal asked
        asked += 1
        if outcomes[asked - 1] == "x":
            raise ProbeFailure("no")

    prober = Prober({"periodSeconds": 0, "failureThreshold": 3, "successThreshold": 1}, check, verdict)
    turned, message = await prober.until_turned()
    assert (asked, turned) == (turned_after, outcomes[asked - 1] == ".")
    assert message == ("" if turned else "no")


async def test_an_exec_handler_fails_with_the_command_s_output() -> None:
    async def execute(command: list[str], timeout_s: float) -> tuple[int, str]:
        return 3, f"{command} {timeout_s}"

    with pytest.raises(ProbeFailure, match=r"exited with 3: \['check'\] 1"):
        await attempt({"exec": {"command": ["check"]}}, {}, "", execute, 1)


def test_ports_may_be_named() -> None:
    container = {"name": "main", "ports": [{"name": "http", "containerPort": 8080}]}
    assert port_number("http", container) == 8080
    assert port_number(9, container) == 9
    with pytest.raises(ProbeFailure, match='no port named "admin"'):
        port_number("admin", container)


# --- names, sandbox, settings


def test_hosts_hold_what_dns_would_answer() -> None:
    def service(name: str, namespace: str, address: str) -> Object:
        return {"metadata": {"name": name, "namespace": namespace}, "spec": {"clusterIP": address}}

    labels = {"service.kubernetes.io/headless": "", "kubernetes.io/service-name": "peers"}
    piece = {
        "metadata": {"name": "peers-x", "namespace": "ns", "labels": labels},
        "endpoints": [
            {"addresses": ["10.244.1.1"], "conditions": {"ready": True}, "hostname": "p-0"},
            {"addresses": ["10.244.1.2"], "conditions": {"ready": False}},
        ],
    }
    services = [service("web", "ns", "10.96.0.2"), service("web", "other", "10.96.0.3"), service("peers", "ns", "None")]
    lines = hosts_file("ns", services, [piece]).splitlines()
    names = {name: line.split()[0] for line in lines for name in line.split()[1:]}
    assert names["web"] == names["web.ns.svc.cluster.local"] == "10.96.0.2"
    assert names["web.other.svc"] == "10.96.0.3"
    assert names["peers"] == names["p-0.peers.ns.svc.cluster.local"] == "10.244.1.1"
    assert "10.244.1.2" not in "\n".join(lines)


def test_the_launch_script_keeps_awkward_words_whole(tmp_path: Path) -> None:
    spec = SandboxSpec(
        folder=tmp_path / "a b",
        log_file=tmp_path / "log",
        network="n",
        hostname="web-0",
        hosts_file=tmp_path / "hosts",
        command=["sh", "-c", "echo '$HOME' \"x\"; rm -rf $(pwd)"],
        environment={"A": "it's\n$(two) lines"},
        mounts=[Mount(tmp_path, "/data/cache", False), Mount(tmp_path, "/data", False)],
        read_only_root=True,
    )
    script = launch_script(spec)
    assert subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True, check=False).returncode == 0
    assert script.index('"$root"/data\n') < script.index('"$root"/data/cache\n')
    # The last line, with `chroot` and `setpriv` taken away, is a command whose words a shell reads as they were given.
    last = script.splitlines()
    start = next(number for number, line in enumerate(last) if line.startswith("exec chroot"))
    words = "\n".join(last[start:]).split(" container ", 1)[1]
    shown = subprocess.run(["sh", "-c", f"printf '%s|' {words}"], capture_output=True, text=True, check=True).stdout
    assert shown == "sh|-c|echo '$HOME' \"x\"; rm -rf $(pwd)|"


def test_settings_are_checked() -> None:
    assert Settings.read({"KVFLEET_E2E_SPEED": "5"}).speed == 5
    with pytest.raises(SettingsError, match="KVFLEET_E2E_SPEED=fast: give a positive number"):
        Settings.read({"KVFLEET_E2E_SPEED": "fast"})
    with pytest.raises(SettingsError, match="KVFLEET_E2E_IMAGES=/none"):
        Settings.read({"KVFLEET_E2E_IMAGES": "/none"})
