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
LOG_LIMIT_BYTES = 16 * 1024 * 1024
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

# The shell's child is process 1 of the namespace that `unshare --pid` made. (`unshare --fork` would do, but cannot tell
# that its child was killed.) The shell's own word on how its child ended does not belong in the container's log.
_FIRST_PROCESS = 'exec 4>&2 2>/dev/null; setpriv --pdeathsig KILL sh "$0" 2>&4 4>&-; exit $?'


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


def launch_script(spec: SandboxSpec) -> str:
    """Run by sh as process 1 of the new namespaces; ends by becoming the container's command.

    Standard input is a pipe to the kubelet, open for writing: a line in it tells that the command takes over.
    """
    lines = [
        "set -e",
        f"root={quote(str(spec.folder / 'root'))}",
        f"layer={quote(str(spec.folder / 'layer'))}",
        'mkdir -p "$root" "$layer"',
        'mount -t tmpfs -o size=1g,mode=755 layer "$layer"',
        'mkdir "$layer/upper" "$layer/work"',
        'mount -t overlay -o "lowerdir=/,upperdir=$layer/upper,workdir=$layer/work" overlay "$root"',
        'mount -t proc proc "$root/proc"',
        'mount --rbind /sys "$root/sys"',
        *_device_mounts(),
        # What the machine keeps there is none of the container's business.
        'mount -t tmpfs -o mode=755 run "$root/run"',
        'mount -t tmpfs -o size=1g,mode=1777 tmp "$root/tmp"',
        # There is no DNS server: a look-up of what /etc/hosts does not have fails at once, not after a time-out.
        'rm -f "$root/etc/resolv.conf"',
        'echo "nameserver 127.0.0.1" > "$root/etc/resolv.conf"',
        f"echo {quote(spec.hostname)} > /proc/sys/kernel/hostname",
    ]
    if spec.programs:
        lines += _bind(Mount(spec.folder / "programs", PROGRAMS_DIR, read_only=True))
    lines += _bind(Mount(spec.hosts_file, "/etc/hosts", read_only=True))
    # Deeper targets last: a mount on /data must not cover one on /data/cache.
    for mount in sorted(spec.mounts, key=lambda mount: mount.target.count("/")):
        lines += _bind(mount)
    # After the volumes: one on /tmp would cover a checkout that lies there.
    lines += _machine_mounts()
    if spec.read_only_root:
        volumes = {mount.target for mount in spec.mounts}
        lines += [f'mount -o remount,bind,ro "$root{path}"' for path in ("", "/tmp", "/run") if path not in volumes]
    privileges = "--bounding-set -all --inh-caps -all --no-new-privs " if spec.drop_capabilities else ""
    variables = " ".join(quote(f"{name}={value}") for name, value in spec.environment.items())
    words = " ".join(quote(word) for word in spec.command)
    enter = quote(f'cd {quote(spec.working_dir)} && exec "$@"')
    lines += [
        "echo ready >&0",
        "exec </dev/null",
        f'exec chroot "$root" setpriv {privileges}-- env -i {variables} sh -c {enter} container {words}',
    ]
    return "\n".join(lines) + "\n"


def _bind(mount: Mount) -> list[str]:
    # Links are followed here, where the machine's root is the container's: `mkdir $root/var/run/x` would follow the
    # link /var/run out of the container.
    inside = os.path.realpath(mount.target)
    source, target = quote(str(mount.source)), f'"$root"{quote(inside)}'
    if mount.source.is_dir():
        make = f"mkdir -p {target}"
    else:
        make = f'mkdir -p "$root"{quote(str(Path(inside).parent))}; [ -e {target} ] || touch {target}'
    lines = [make, f"mount --bind {source} {target}"]
    return [*lines, f"mount -o remount,bind,ro {target}"] if mount.read_only else lines


def _device_mounts() -> list[str]:
    return [
        'mount -t tmpfs -o mode=755 dev "$root/dev"',
        'mkdir "$root/dev/shm"',
        'mount -t tmpfs -o size=1g,mode=1777 shm "$root/dev/shm"',
        f"for name in {' '.join(_DEVICES)}; do",
        '  touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"',
        "done",
        'ln -s /proc/self/fd "$root/dev/fd"',
        'ln -s /proc/self/fd/1 "$root/dev/stdout"',
        'ln -s /proc/self/fd/2 "$root/dev/stderr"',
    ]


def _machine_mounts() -> list[str]:
    """Binds what programs need and what the root lacks: it is another mount than the machine's root, or under /tmp."""
    needed = {CHECKOUT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), Path("/usr")}
    device = Path("/").stat().st_dev
    missing = sorted(path for path in needed if path.stat().st_dev != device or path.is_relative_to("/tmp"))
    return [line for path in missing for line in _bind(Mount(path, str(path), read_only=True))]


class Sandbox:
    """A running container."""

    def __init__(self, spec: SandboxSpec, process: asyncio.subprocess.Process) -> None:
        self._spec = spec
        self._process = process
        self._log = asyncio.create_task(self._copy_log())

    @classmethod
    async def start(cls, spec: SandboxSpec) -> Sandbox:
        """Returns when the container's command takes over. Raises SandboxError where a step before it failed."""
        _write_programs(spec)
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        reader, writer = os.pipe()
        try:
            script = spec.folder / "launch.sh"
            script.write_text(launch_script(spec))
            process = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL"),
                *("nsenter", f"--net={NETNS_DIR / spec.network}"),
                *("unshare", "--mount", "--uts", "--ipc", "--pid"),
                *("sh", "-c", _FIRST_PROCESS, str(script)),
                stdin=writer,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        sandbox = cls(spec, process)
        try:
            launched = await asyncio.wait_for(asyncio.to_thread(_read_line, reader), LAUNCH_TIMEOUT_S)
        except BaseException:
            await sandbox.kill()
            raise
        if not launched:
            code = await sandbox.wait()
            errors = spec.log_file.read_text(errors="replace").strip()[-500:]
            raise SandboxError(f"setting up the container failed with status {code}: {errors}")
        return sandbox

    async def wait(self) -> int:
        """The exit code as Kubernetes counts: 128 + the signal's number where one ended it."""
        code = await self._process.wait()
        await asyncio.shield(self._log)
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

    async def _copy_log(self) -> None:
        """From a pipe, as with any container runtime: to write to /proc/1/fd/1 must not overwrite a file."""
        assert self._process.stdout is not None
        with self._spec.log_file.open("wb", buffering=0) as file:
            while chunk := await self._process.stdout.read(65536):
                if file.tell() + len(chunk) > LOG_LIMIT_BYTES:
                    file.truncate(0)
                    file.seek(0)
                    file.write(b"(earlier output was dropped)\n")
                file.write(chunk)

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


def _read_line(descriptor: int) -> bytes:
    """Nothing where the other side was closed before it wrote."""
    with os.fdopen(descriptor, "rb") as file:
        return file.readline()
