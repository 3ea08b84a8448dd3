"""What a container runs: its image's row in the table, joined with its `command` and `args` as Kubernetes joins them."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from harness.kubelet.api import Object
from harness.kubelet.config import ImageConfig


def find(images: list[ImageConfig], name: str) -> ImageConfig | None:
    return next((image for image in images if fnmatchcase(name, image.match)), None)


def command(container: Object, image: ImageConfig, environment: dict[str, str]) -> list[str]:
    """`command` replaces the entrypoint and with it the image's own arguments; `args` replace only these."""
    chosen, arguments = container.get("command") or [], container.get("args") or []
    if chosen:
        words = [*chosen, *arguments]
    else:
        words = [*image.entrypoint, *(arguments or image.cmd)]
    return [expand(word, environment) for word in words]


def expand(text: str, environment: dict[str, str]) -> str:
    """`$(NAME)` becomes the variable's value, `$$` a dollar; an unknown name stays as it is written."""

    def replacement(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return environment.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)", replacement, text)


def image_env(image: ImageConfig, labels: dict[str, str]) -> dict[str, str]:
    return {
        name: re.sub(r"\{labels\[([^\]]+)\]\}", lambda found: labels.get(found[1], ""), value)
        for name, value in image.env.items()
    }
