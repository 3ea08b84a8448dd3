"""Compiles the router's hot path to C with mypyc: the same sources, about half the CPU time. Optional: plain Python serves as well.

    python scripts/compile_router.py            build in place, beside the sources; Python prefers what is built
    python scripts/compile_router.py --clean    remove what was built

Needs a C compiler, mypy and setuptools. What is built must be built again when a source changes: `stale()` tells, the tests
refuse to run then. pip builds it into the wheel where KVFLEET_COMPILE=1 is set (hatch_build.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "router"
PACKAGE = SOURCES / "kvfleet_router"
GROUP = "kvfleet_router_compiled"
"""What the shared library of all modules is named after: GROUP__mypyc."""
CORE_MODULES = (
    "breaker",
    "budget",
    "calibration",
    "choose",
    "circuits",
    "columns",
    "decisions",
    "disaggregation",
    "dispatcher",
    "energy",
    "exact",
    "hashing",
    "holdqueue",
    "index",
    "kvevents/enginecache",
    "kvevents/stream",
    "kvevents/view",
    "learning",
    "longstrings",
    "parse",
    "placement",
    "policy",
    "pool",
    "powerbudget",
    "predict",
    "routes",
    "savings",
    "ticket",
    "worker",
)
"""Of kvfleet_router.core the same. Not `bodies` and `kvevents/wire`: msgspec reads their annotations, which compiled modules do not
keep. Not `kvevents/walk` and `kvevents/prompt`: compiled they are no faster."""
IO_MODULES = (
    "connection",
    "dechunker",
    "exchange",
    "metrics",
    "proxy",
    "request",
    "templates",
    "upstream",
    "usage",
    "verdict",
    "wire",
)
"""Of kvfleet_router.io what every request goes through; policies are compiled whole."""
_SETUP = """
from mypyc.build import mypycify
from setuptools import setup
options = ["--config-file", {config!r}]
modules = mypycify(options + {paths!r}, opt_level="2", debug_level="0", group_name={group!r})
setup(name={group!r}, version="0", ext_modules=modules, script_args=["build_ext", "--inplace", "--build-temp", {temporary!r}])
"""


def sources() -> list[Path]:
    """The modules to compile."""
    named = [PACKAGE / "core" / f"{name}.py" for name in CORE_MODULES]
    named += [PACKAGE / "io" / f"{name}.py" for name in IO_MODULES]
    return sorted(named + [path for path in (PACKAGE / "policies").glob("*.py") if path.stem != "__init__"])


def built() -> list[Path]:
    """What was built, for whatever Python."""
    return sorted({*PACKAGE.rglob("*.so"), *SOURCES.glob(f"{GROUP}__mypyc*.so")})


def in_use() -> bool:
    """Whether this Python finds the router compiled."""
    return _library().exists()


def stale() -> list[Path]:
    """Modules whose source has changed since they were compiled for this Python."""
    when = _library().stat().st_mtime if in_use() else float("inf")
    return [path for path in sources() if path.stat().st_mtime > when]


def _library() -> Path:
    return SOURCES / f"{GROUP}__mypyc{sysconfig.get_config_var('EXT_SUFFIX')}"


def compile_router() -> list[Path]:
    """Build in place; returns the files built. Raises CalledProcessError, its output shown."""
    clean()
    with tempfile.TemporaryDirectory() as name:
        config = Path(name) / "mypy.ini"
        config.write_text(
            "[mypy]\nstrict = true\nexplicit_package_bases = true\n"
            f"mypy_path = {ROOT / 'crds'}:{SOURCES}\n"
            "[mypy-httptools.*,xxhash.*]\nignore_missing_imports = true\n"
        )
        paths = [str(path.relative_to(SOURCES)) for path in sources()]
        setup = _SETUP.format(config=str(config), paths=paths, group=GROUP, temporary=name)
        environment = {**os.environ, "MYPY_CACHE_DIR": str(Path(name) / "cache")}
        subprocess.run([sys.executable, "-c", setup], cwd=SOURCES, env=environment, check=True, stdout=sys.stderr)
    shutil.rmtree(SOURCES / "build", ignore_errors=True)
    _try_imports()
    return built()


def _try_imports() -> None:
    """What cannot even be imported must not shadow the sources: remove it, and raise CalledProcessError."""
    names = [".".join(path.relative_to(SOURCES).with_suffix("").parts) for path in sources()]
    # Built for a wheel, kvfleet is not installed yet.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "crds"), str(SOURCES)])}
    try:
        for name in names:  # a process each: which module comes first can matter
            subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, env=environment, check=True)
    except subprocess.CalledProcessError:
        clean()
        raise


def clean() -> None:
    for path in built():
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requirements", action="store_true", help="print what kvfleet itself needs, for pip")
    parser.add_argument("--clean", action="store_true", help="remove what was built")
    arguments = parser.parse_args()
    if arguments.clean:
        clean()
    elif arguments.requirements:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        print(*(requirement.replace(" ", "") for requirement in project["dependencies"]))  # noqa: T201 - a command's answer
    else:
        print(f"{len(compile_router())} files built in {SOURCES}")  # noqa: T201 - a command's answer


if __name__ == "__main__":
    main()
