"""A pod's status out of what its containers are doing: the rules of the Kubernetes pod lifecycle."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.kubelet.api import Object


@dataclass(frozen=True)
class ContainerView:
    """What is reported of one container."""

    name: str
    image: str
    state: Object
    last_state: Object
    restart_count: int
    ready: bool
    started: bool

    @property
    def exit_code(self) -> int | None:
        code = self.state.get("terminated", {}).get("exitCode")
        return None if code is None else int(code)


@dataclass(frozen=True)
class PodView:
    pod_ip: str
    host_ip: str
    started_at: str
    network_ready: bool
    init: list[ContainerView]
    main: list[ContainerView]
    will_restart: bool
    """Whether an ended container of this pod is started again."""
    refused: str = ""
    """Why this kubelet does not run the pod at all."""
    gates: list[str] = field(default_factory=list)


def pod_status(pod: Object, view: PodView, now: str) -> Object:
    """The body of a status patch."""
    initialized = all(container.exit_code == 0 for container in view.init)
    phase = _phase(view, initialized)
    finished = phase in ("Succeeded", "Failed")
    containers_ready = initialized and not finished and all(container.ready for container in view.main)
    given = {entry["type"]: entry["status"] for entry in pod.get("status", {}).get("conditions") or []}
    gates_open = all(given.get(gate) == "True" for gate in view.gates)
    not_ready = [container.name for container in view.main if not container.ready]
    reason = "PodCompleted" if phase == "Succeeded" else "ContainersNotReady"
    message = f"containers with unready status: [{' '.join(not_ready)}]" if not_ready else ""
    ready_reason, ready_message = (reason, message)
    if containers_ready and not gates_open:
        ready_reason, ready_message = "ReadinessGatesNotReady", "a readiness gate is not True"
    conditions = [
        _condition("PodReadyToStartContainers", view.network_ready, "", ""),
        _condition("Initialized", initialized, "ContainersNotInitialized", ""),
        _condition("ContainersReady", containers_ready, reason, message),
        _condition("Ready", containers_ready and gates_open, ready_reason, ready_message),
    ]
    status: Object = {
        "phase": phase,
        "conditions": [_with_transition(entry, pod, now) for entry in conditions],
        "hostIP": view.host_ip,
        "hostIPs": [{"ip": view.host_ip}],
        "startTime": view.started_at,
        "containerStatuses": [_container_status(pod, container) for container in view.main],
        "initContainerStatuses": [_container_status(pod, container) for container in view.init],
        "observedGeneration": pod["metadata"].get("generation", 0),
    }
    if view.pod_ip:
        # Merged, the list would keep the address that the pod had before its node failed.
        status |= {"podIP": view.pod_ip, "podIPs": [{"$patch": "replace"}, {"ip": view.pod_ip}]}
    if view.refused:
        status |= {"reason": "UnsupportedByProcessKubelet", "message": view.refused}
    return status


def _phase(view: PodView, initialized: bool) -> str:
    if view.refused:
        return "Failed"
    if not initialized:
        failed = any(container.exit_code not in (None, 0) for container in view.init)
        return "Failed" if failed and not view.will_restart else "Pending"
    codes = [container.exit_code for container in view.main]
    if all(code is not None for code in codes) and not view.will_restart:
        return "Succeeded" if all(code == 0 for code in codes) else "Failed"
    never_started = [container for container in view.main if "waiting" in container.state and not container.last_state]
    return "Pending" if never_started else "Running"


def _condition(kind: str, holds: bool, reason: str, message: str) -> Object:
    entry: Object = {"type": kind, "status": "True" if holds else "False", "reason": None, "message": None}
    if not holds:
        entry |= {"reason": reason or None, "message": message or None}
    return entry


def _with_transition(entry: Object, pod: Object, now: str) -> Object:
    """Keeps the time of the last change of a condition that still has the same status."""
    entry["observedGeneration"] = pod["metadata"].get("generation", 0)
    for known in pod.get("status", {}).get("conditions") or []:
        if known["type"] == entry["type"] and known["status"] == entry["status"]:
            return {**entry, "lastTransitionTime": known["lastTransitionTime"]}
    return {**entry, "lastTransitionTime": now}


def _container_status(pod: Object, container: ContainerView) -> Object:
    identity = f"process://{pod['metadata']['uid']}/{container.name}/{container.restart_count}"
    # A strategic merge patch merges maps: the two other states must be removed by name.
    state = {"waiting": None, "running": None, "terminated": None, **_identified(container.state, identity)}
    last_state = {"waiting": None, "running": None, "terminated": None, **container.last_state}
    return {
        "name": container.name,
        "image": container.image,
        "imageID": f"process://{container.image}",
        "containerID": identity if "waiting" not in container.state else "",
        "state": state,
        "lastState": last_state,
        "restartCount": container.restart_count,
        "ready": container.ready,
        "started": container.started,
    }


def _identified(state: Object, identity: str) -> Object:
    return {"terminated": {**state["terminated"], "containerID": identity}} if "terminated" in state else state
