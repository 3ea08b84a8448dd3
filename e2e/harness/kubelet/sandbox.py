"""A container as a process: own mounts, processes, host name and network, over the machine's file system.

The root is an overlay: below, read-only, the machine's own root with its interpreters and this checkout; above, an
empty tmpfs that ends with the container. So a container writes where it likes, sees none of what others wrote, and
with `readOnlyRootFilesystem` writes only to its volumes. The command is process 1 of a process namespace: it gets
SIGTERM only if it handles it, as in any container, and when it ends the kernel ends all it started.

The steps are a shell script, kept beside the container's log: what was mounted and run can be read, and run again.

Not isolated, because the tests need it no further: users (everything runs as root, without the capabilities that the
security context drops), CPU and memory.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from harness.kubelet.volumes import Mount
from harness.network import NETNS_DIR

CHECKOUT = Path(__file__).resolve().parents[3]
LAUNCH_TIMEOUT_S = 30
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


class SandboxError(Exception):
    """A container could not be set up."""


@dataclass(frozen=True)
class SandboxSpec:
    folder: Path
    """Holds the root, the script and the programs of the image; one for each start of a container."""
    log_file: Path
    network: str
    """Name of the pod's network namespace."""
    hostname: str
    hosts_file: Path
    command: list[str]
    environment: dict[str, str]
    working_dir: str = "/"
    mounts: list[Mount] = field(default_factory=list)
    programs: dict[str, str] = field(default_factory=dict)
    read_only_root: bool = False
    drop_capabilities: bool = False


PROGRAMS_DIR = "/usr/local/e2e-image/bin"


def launch_script(spec: SandboxSpec, ready_descriptor: int) -> str:
    """Run by sh as process 1 of the new namespaces; ends by becoming the container's command."""
    root = quote(str(spec.folder / "root"))
    layer = quote(str(spec.folder / "layer"))
    lines = [
        "set -e",
        f"mkdir -p {root} {layer}",
        f"mount -t tmpfs -o size=1g,mode=755 layer {layer}",
        f"mkdir {layer}/upper {layer}/work",
        f"mount -t overlay -o lowerdir=/,upperdir={layer}/upper,workdir={layer}/work overlay {root}",
        f"mount -t proc proc {root}/proc",
        f"mount --rbind /sys {root}/sys",
        f"mount -t tmpfs -o mode=755 dev {root}/dev",
        f"mkdir {root}/dev/shm {root}/dev/pts",
        f"mount -t tmpfs -o size=256m,mode=1777 shm {root}/dev/shm",
        *(f"touch {root}/dev/{name}; mount --bind /dev/{name} {root}/dev/{name}" for name in _DEVICES),
        f"ln -s /proc/self/fd {root}/dev/fd",
        f"ln -s /proc/self/fd/1 {root}/dev/stdout",
        f"ln -s /proc/self/fd/2 {root}/dev/stderr",
        f"mount -t tmpfs -o mode=755 run {root}/run",
        *_machine_mounts(root),
        f"echo {quote(spec.hostname)} > /proc/sys/kernel/hostname",
    ]
    if spec.programs:
        lines += _bind(Mount(spec.folder / "programs", PROGRAMS_DIR, read_only=True), root)
    lines += _bind(Mount(spec.hosts_file, "/etc/hosts", read_only=True), root)
    # Deeper targets last: a mount on /data must not cover one on /data/cache.
    for mount in sorted(spec.mounts, key=lambda mount: mount.target.count("/")):
        lines += _bind(mount, root)
    if spec.read_only_root:
        lines.append(f"mount -o remount,bind,ro {root}")
    privileges = "--bounding-set -all --inh-caps -all --no-new-privs " if spec.drop_capabilities else ""
    variables = " ".join(quote(f"{name}={value}") for name, value in spec.environment.items())
    words = " ".join(quote(word) for word in spec.command)
    enter = quote(f'cd {quote(spec.working_dir)} && exec "$@"')
    lines += [
        f"echo ready >&{ready_descriptor}",
        f"exec {ready_descriptor}>&-",
        f"exec chroot {root} setpriv {privileges}-- env -i {variables} sh -c {enter} container {words}",
    ]
    return "\n".join(lines) + "\n"


def _bind(mount: Mount, root: str) -> list[str]:
    source, target = quote(str(mount.source)), f"{root}{quote(mount.target)}"
    make = (
        f"mkdir -p {target}"
        if mount.source.is_dir()
        else f"mkdir -p $(dirname {target}); [ -e {target} ] || touch {target}"
    )
    lines = [make, f"mount --bind {source} {target}"]
    return [*lines, f"mount -o remount,bind,ro {target}"] if mount.read_only else lines


def _machine_mounts(root: str) -> list[str]:
    """Binds what programs need and what the overlay lacks because it is another mount than the machine's root."""
    needed = {CHECKOUT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), Path("/usr")}
    elsewhere = sorted(path for path in needed if path.stat().st_dev != Path("/").stat().st_dev)
    return [line for path in elsewhere for line in _bind(Mount(path, str(path), read_only=True), root)]


class Sandbox:
    """A running container."""

    def __init__(self, spec: SandboxSpec, process: asyncio.subprocess.Process) -> None:
        self._spec = spec
        self._process = process

    @classmethod
    async def start(cls, spec: SandboxSpec) -> Sandbox:
        """Returns when the container's command takes over. Raises SandboxError where a step before it failed."""
        _write_programs(spec)
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        reader, writer = os.pipe()
        try:
            script = spec.folder / "launch.sh"
            script.write_text(launch_script(spec, writer))
            with spec.log_file.open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *("setpriv", "--pdeathsig", "KILL"),
                    *("nsenter", f"--net={NETNS_DIR / spec.network}"),
                    *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"),
                    *("sh", str(script)),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(writer,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        sandbox = cls(spec, process)
        try:
            launched = await asyncio.wait_for(asyncio.to_thread(_read_and_close, reader), LAUNCH_TIMEOUT_S)
        except BaseException:
            await sandbox.kill()
            raise
        if not launched:
            code = await process.wait()
            raise SandboxError(f"setting up the container failed with status {code}; see its log and {script}")
        return sandbox

    async def wait(self) -> int:
        """The exit code as Kubernetes counts: 128 + the signal's number where one ended it."""
        code = await self._process.wait()
        await asyncio.to_thread(shutil.rmtree, self._spec.folder, ignore_errors=True)
        return 128 - code if code < 0 else code

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    def signal(self, number: int) -> None:
        """To process 1 of the container; nothing where it has ended."""
        pid = self._first_process()
        if pid is not None:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self._first_process() is None and not self.ended:
            self._process.kill()  # Still before the fork.
        await self._process.wait()

    async def execute(self, command: list[str], timeout_s: float) -> tuple[int, str]:
        """Runs a command inside the container: its exit code and the end of its output; 124 on a timeout."""
        pid = self._first_process()
        if pid is None:
            return 126, "the container has ended"
        variables = [f"{name}={value}" for name, value in self._spec.environment.items()]
        process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL"),
            *("nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd"),
            *("env", "-i", *variables, *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), timeout_s)
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            return 124, f"timed out after {timeout_s} s"
        return process.returncode or 0, output.decode(errors="replace")[-1000:]

    def _first_process(self) -> int | None:
        try:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        except FileNotFoundError:
            return None
        return int(children[0]) if children else None


def _write_programs(spec: SandboxSpec) -> None:
    folder = spec.folder / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in spec.programs.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)


def _read_and_close(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
