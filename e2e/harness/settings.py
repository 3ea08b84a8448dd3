"""What a run is told by its environment, and the table of images that follows from it.

KVFLEET_E2E_SPEED   simulated seconds that pass in a real one (default 20)
KVFLEET_E2E_IMAGES  JSON file with further images, tried first: [{"match": "…", "entrypoint": ["…"], …}]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import msgspec

from harness.build import lws_folder
from harness.kubelet.config import ImageConfig, NodeConfig

E2E_DIR = Path(__file__).resolve().parent.parent

PROFILE_LABEL = "kvfleet.io/accelerator-profile"
WEB_IMAGE = "e2e/web:1"
"""The self-tests' HTTP process, `web.py`."""


class SettingsError(Exception):
    """A setting with a value that cannot be meant."""


@dataclass(frozen=True)
class Settings:
    speed: float = 20.0
    extra_images: tuple[ImageConfig, ...] = ()

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        return cls(
            speed=_positive(environment, "KVFLEET_E2E_SPEED", cls.speed),
            extra_images=_images(environment.get("KVFLEET_E2E_IMAGES", "")),
        )

    def images(self) -> list[ImageConfig]:
        python = f'#!/bin/sh\nexec {quote(sys.executable)} "$@"\n'
        kvfleet = f'#!/bin/sh\nexec {quote(str(Path(sys.executable).parent / "kvfleet"))} "$@"\n'
        lws = f'#!/bin/sh\nexec {quote(str(lws_folder() / "manager"))} "$@"\n'
        web = f'#!/bin/sh\nexec python {quote(str(E2E_DIR / "harness" / "web.py"))} "$@"\n'
        return [
            *self.extra_images,
            ImageConfig(
                match="vllm/vllm-openai:*",
                entrypoint=["vllm", "serve"],
                env={"E2E_SPEED": f"{self.speed:g}", "E2E_PROFILE": f"{{labels[{PROFILE_LABEL}]}}"},
                programs={"vllm": (E2E_DIR / "vllm.sh").read_text(), "kvfleet": kvfleet},
            ),
            ImageConfig(  # As the Dockerfile has it.
                match="*/kvfleet:*",
                entrypoint=["kvfleet"],
                env={"USER": "kvfleet", "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"},
                working_dir="/tmp",
                programs={"kvfleet": kvfleet, "python": python},
            ),
            ImageConfig(match=WEB_IMAGE, entrypoint=["web"], programs={"web": web, "python": python}),
            ImageConfig(match="registry.k8s.io/lws/lws:*", entrypoint=["manager"], programs={"manager": lws}),
            ImageConfig(match="busybox:*", cmd=["sh"]),
        ]


def default_nodes() -> list[NodeConfig]:
    product = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    zones = ("a", "b")
    return [
        NodeConfig(name=f"node-{number}", labels={**product, "topology.kubernetes.io/zone": f"zone-{zone}"})
        for number, zone in enumerate(zones)
    ]


def _positive(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 < value < 1e6:
        raise SettingsError(f"{name}={text}: give a positive number")
    return value


def _images(file: str) -> tuple[ImageConfig, ...]:
    if not file:
        return ()
    try:
        return tuple(msgspec.json.decode(Path(file).read_bytes(), type=list[ImageConfig]))
    except (OSError, msgspec.DecodeError) as error:
        raise SettingsError(f"KVFLEET_E2E_IMAGES={file}: {error}") from None
