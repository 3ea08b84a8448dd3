"""One container of a pod, over all its starts.

    waiting ──► running ──► terminated ──► (restart policy) waiting, with back-off ──► …
                   │
                   ├─ startup probe ─► then readiness and liveness
                   └─ liveness fails ─► ended with grace, restarted

`stop()` ends it for good: preStop hook, SIGTERM, grace period, SIGKILL.
"""

from __future__ import annotations

import asyncio
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from harness.kubelet import images, probes
from harness.kubelet.api import Object
from harness.kubelet.config import ImageConfig, KubeletConfig
from harness.kubelet.env import ConfigSource, PodFacts, container_env
from harness.kubelet.sandbox import PROGRAMS_DIR, Sandbox, SandboxError, SandboxSpec
from harness.kubelet.store import MissingReferenceError
from harness.kubelet.volumes import PodVolumes

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BACKOFF_RESET_S = 600
MINIMUM_GRACE_S = 2
RETRY_S = 0.5


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class PodContext(Protocol):
    """What a container needs of its pod; `PodWorker` is one."""

    pod: Object
    config: KubeletConfig
    facts: PodFacts
    volumes: PodVolumes
    network: str
    folder: Path
    log_folder: Path
    hosts_file: Path

    def services(self) -> list[Object]: ...
    def config_source(self) -> ConfigSource: ...
    def changed(self) -> None: ...
    def event(self, kind: str, reason: str, message: str) -> None: ...


class Container:
    def __init__(self, pod: PodContext, spec: Object, restart_policy: str) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.state: Object = {"waiting": {"reason": "ContainerCreating"}}
        self.last_state: Object = {}
        self.restart_count = 0
        self.ready = False
        self.started = False
        self.stopping = asyncio.Event()
        """Set once: it shall not start again."""
        self._pod = pod
        self._restart_policy = restart_policy
        self._sandbox: Sandbox | None = None
        self._ending = False
        self._grace_s = 0.0
        self._failures_in_a_row = 0

    @property
    def succeeded(self) -> bool:
        return bool(self.state.get("terminated", {}).get("exitCode") == 0)

    @property
    def log_file(self) -> Path:
        return self.log_file_of(self.restart_count)

    def log_file_of(self, start: int) -> Path:
        return self._pod.log_folder / self.name / f"{start}.log"

    # --- life

    async def run(self) -> None:
        """Until it shall not run again: it ended and its policy leaves it so, or it was stopped."""
        while (launch := await self._resolve()) is not None:
            started = time.monotonic()
            code = await self._run_once(*launch)
            if self.stopping.is_set() or not self._restarts_after(code):
                return
            await self._back_off(time.monotonic() - started)
            if self.stopping.is_set():
                return
            self.restart_count += 1

    async def stop(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self.stopping.set()
        if self._sandbox is not None:
            await self._end(grace_s)

    async def kill(self) -> None:
        self.stopping.set()
        if self._sandbox is not None:
            await self._sandbox.kill()

    def signal(self, number: int) -> bool:
        """For tests; False where it does not run."""
        if self._sandbox is None or self._sandbox.ended:
            return False
        self._sandbox.signal(number)
        return True

    # --- starting

    async def _resolve(self) -> tuple[ImageConfig, dict[str, str]] | None:
        """Image and environment, waiting for what is missing; None where it was stopped meanwhile."""
        while not self.stopping.is_set():
            image = images.find(self._pod.config.images, self.spec["image"])
            if image is None:
                message = f'image "{self.spec["image"]}" matches no entry of the image table'
                self._wait_for("ImagePullBackOff", message)
            else:
                try:
                    return image, self._environment(image)
                except MissingReferenceError as error:
                    self._wait_for("CreateContainerConfigError", str(error))
            await self._sleep(RETRY_S)
        return None

    def _environment(self, image: ImageConfig) -> dict[str, str]:
        pod = self._pod.pod
        base = {
            "PATH": f"{PROGRAMS_DIR}:{PATH}",
            "HOME": "/root",
            "HOSTNAME": pod["metadata"]["name"],
            **images.image_env(image, pod["metadata"].get("labels", {})),
        }
        return container_env(pod, self.spec, base, self._pod.services(), self._pod.config_source(), self._pod.facts)

    def _wait_for(self, reason: str, message: str) -> None:
        if self.state.get("waiting", {}).get("reason") != reason:
            self._pod.event("Warning", "Failed", message)
        self.state = {"waiting": {"reason": reason, "message": message}}
        self._pod.changed()

    def _sandbox_spec(self, image: ImageConfig, environment: dict[str, str]) -> SandboxSpec:
        security = self.spec.get("securityContext") or {}
        dropped = [name.upper() for name in (security.get("capabilities") or {}).get("drop") or []]
        return SandboxSpec(
            folder=self._pod.folder / self.name / str(self.restart_count),
            log_file=self.log_file,
            network=self._pod.network,
            hostname=self._pod.pod["metadata"]["name"],
            hosts_file=self._pod.hosts_file,
            command=images.command(self.spec, image, environment),
            environment=environment,
            working_dir=self.spec.get("workingDir") or image.working_dir,
            mounts=self._pod.volumes.mounts(self.spec, environment),
            programs=image.programs,
            read_only_root=bool(security.get("readOnlyRootFilesystem")),
            drop_capabilities="ALL" in dropped,
        )

    async def _run_once(self, image: ImageConfig, environment: dict[str, str]) -> int:
        """One start, to its end; returns the exit code."""
        started_at = now()
        self._ending = False
        try:
            self._sandbox = await Sandbox.start(self._sandbox_spec(image, environment))
        except (SandboxError, MissingReferenceError, OSError) as error:
            self._pod.event("Warning", "Failed", f"Error: {error}")
            self._terminated(128, started_at, "StartError", str(error))
            return 128
        self.state = {"running": {"startedAt": started_at}}
        self._pod.event("Normal", "Started", f"Started container {self.name}")
        self._pod.changed()
        # Stopped while it was being started: it ends like any other, with its hook and its grace period.
        duty = self._end(self._grace_s) if self.stopping.is_set() else self._supervise(self._sandbox)
        supervision = asyncio.create_task(duty)
        try:
            code = await self._sandbox.wait()
        finally:
            supervision.cancel()
            await asyncio.gather(supervision, return_exceptions=True)
            self._sandbox = None
        self._terminated(code, started_at, "Completed" if code == 0 else "Error", "")
        return code

    def _terminated(self, code: int, started_at: str, reason: str, message: str) -> None:
        self.ready = self.started = False
        state: Object = {"exitCode": code, "reason": reason, "startedAt": started_at, "finishedAt": now()}
        if code != 0 and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError" and not message:
            message = self.log_file.read_text(errors="replace")[-2048:]
        if message:
            state["message"] = message
        self.state = {"terminated": state}
        self._pod.changed()

    # --- running

    async def _supervise(self, sandbox: Sandbox) -> None:
        """postStart, then probes until the container ends (and this is cancelled)."""
        hook = (self.spec.get("lifecycle") or {}).get("postStart")
        if hook:
            try:
                await self._handle(hook, sandbox, 60)
            except probes.ProbeFailure as failure:
                self._pod.event("Warning", "FailedPostStartHook", str(failure))
                await self._restart({})
                return
        if not await self._pass_startup(sandbox):
            return
        self.started = True
        self.ready = "readinessProbe" not in self.spec
        self._pod.changed()
        async with asyncio.TaskGroup() as tasks:
            if "readinessProbe" in self.spec:
                tasks.create_task(self._keep_readiness(self.spec["readinessProbe"], sandbox))
            if "livenessProbe" in self.spec:
                tasks.create_task(self._keep_alive("Liveness", self.spec["livenessProbe"], sandbox))

    async def _pass_startup(self, sandbox: Sandbox) -> bool:
        probe = self.spec.get("startupProbe")
        if not probe:
            return True
        prober = self._prober(probe, sandbox, verdict=None)
        await prober.initial_delay()
        passed, message = await prober.until_turned()
        if not passed:
            await self._unhealthy("Startup", message, probe)
        return passed

    async def _keep_readiness(self, probe: Object, sandbox: Sandbox) -> None:
        prober = self._prober(probe, sandbox, verdict=False)
        await prober.initial_delay()
        while True:
            self.ready, message = await prober.until_turned()
            if not self.ready and not self._ending:
                self._pod.event("Warning", "Unhealthy", f"Readiness probe failed: {message}")
            self._pod.changed()

    async def _keep_alive(self, kind: str, probe: Object, sandbox: Sandbox) -> None:
        prober = self._prober(probe, sandbox, verdict=True)
        await prober.initial_delay()
        _, message = await prober.until_turned()
        await self._unhealthy(kind, message, probe)

    async def _unhealthy(self, kind: str, message: str, probe: Object) -> None:
        if not self._ending:  # A container that is on its way out is not judged any more.
            self._pod.event("Warning", "Unhealthy", f"{kind} probe failed: {message}")
            self._pod.event(
                "Normal", "Killing", f"Container {self.name} failed {kind.lower()} probe, will be restarted"
            )
            await self._restart(probe)

    async def _restart(self, probe: Object) -> None:
        pod_grace = self._pod.pod["spec"].get("terminationGracePeriodSeconds", 30)
        await self._end(probe.get("terminationGracePeriodSeconds", pod_grace))

    def _prober(self, probe: Object, sandbox: Sandbox, verdict: bool | None) -> probes.Prober:
        return probes.Prober(probe, lambda timeout_s: self._handle(probe, sandbox, timeout_s), verdict)

    async def _handle(self, handler: Object, sandbox: Sandbox, timeout_s: float) -> None:
        await probes.attempt(handler, self.spec, self._pod.facts.pod_ip, sandbox.execute, timeout_s)

    # --- ending

    async def _end(self, grace_s: float) -> None:
        """preStop counts against the grace period; what is left of it, the process has after SIGTERM."""
        sandbox = self._sandbox
        if sandbox is None or self._ending:
            return
        self._ending = True
        deadline = time.monotonic() + grace_s
        hook = (self.spec.get("lifecycle") or {}).get("preStop")
        if hook and grace_s > 0:
            await self._pre_stop(hook, sandbox, grace_s)
        sandbox.signal(signal.SIGTERM)
        remaining_s = max(deadline - time.monotonic(), MINIMUM_GRACE_S if grace_s > 0 else 0)
        if not await _ends_within(sandbox, remaining_s):
            await sandbox.kill()

    async def _pre_stop(self, hook: Object, sandbox: Sandbox, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self._handle(hook, sandbox, grace_s)
        except (probes.ProbeFailure, TimeoutError) as failure:
            self._pod.event("Warning", "FailedPreStopHook", str(failure) or f"not done within {grace_s} s")

    def _restarts_after(self, code: int) -> bool:
        return self._restart_policy == "Always" or (self._restart_policy == "OnFailure" and code != 0)

    async def _back_off(self, ran_s: float) -> None:
        """The first restart is immediate; the pause doubles with each that follows soon."""
        self._failures_in_a_row = 0 if ran_s > BACKOFF_RESET_S else self._failures_in_a_row + 1
        self.last_state = self.state
        if self._failures_in_a_row == 1:
            return
        config = self._pod.config
        pause_s = min(config.restart_backoff_s * 2 ** (self._failures_in_a_row - 2), config.restart_backoff_limit_s)
        message = f"back-off {pause_s:g}s restarting failed container={self.name}"
        self.state = {"waiting": {"reason": "CrashLoopBackOff", "message": message}}
        self._pod.event("Warning", "BackOff", message)
        self._pod.changed()
        await self._sleep(pause_s)

    async def _sleep(self, seconds: float) -> None:
        """Shorter where the container is stopped."""
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except TimeoutError:
            pass


async def _ends_within(sandbox: Sandbox, seconds: float) -> bool:
    try:
        await asyncio.wait_for(sandbox.wait(), seconds)
    except TimeoutError:
        return False
    return True
