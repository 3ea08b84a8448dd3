"""What the process kubelet is told at its start: a JSON file, checked when read."""

from __future__ import annotations

from pathlib import Path

import msgspec


class NodeConfig(msgspec.Struct, forbid_unknown_fields=True):
    """A node to register."""

    name: str
    gpus: int = 8
    cpus: int = 64
    memory_gib: int = 1024
    labels: dict[str, str] = {}


class ImageConfig(msgspec.Struct, forbid_unknown_fields=True):
    """What stands in for a container image. The first whose pattern matches is taken."""

    match: str
    """Shell pattern over the image's name, such as `vllm/vllm-openai:*`."""
    entrypoint: list[str] = []
    """As an image's ENTRYPOINT: the container's `command` replaces it."""
    cmd: list[str] = []
    """As an image's CMD: the container's `args` replace it."""
    env: dict[str, str] = {}
    """As an image's ENV. `{labels[KEY]}` becomes the pod's label KEY, or nothing."""
    working_dir: str = "/"
    """As an image's WORKDIR."""
    programs: dict[str, str] = {}
    """Scripts that the image brings, by name; they come first in its PATH."""


class KubeletConfig(msgspec.Struct, forbid_unknown_fields=True):
    cluster_id: str
    folder: str
    """Where pods keep volumes and logs."""
    server: str
    ca_file: str
    token: str
    certificate_file: str
    key_file: str
    """The kubelet's serving certificate, for `kubectl logs`."""
    node_ip: str
    nodes: list[NodeConfig]
    images: list[ImageConfig]
    port: int = 10250
    restart_backoff_s: float = 1.0
    """First pause before a container that failed again is restarted (a real kubelet: 10 s); doubles each time."""
    restart_backoff_limit_s: float = 30.0


def load(path: Path) -> KubeletConfig:
    return msgspec.json.decode(path.read_bytes(), type=KubeletConfig)
