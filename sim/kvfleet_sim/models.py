"""The names a worker answers to: the base model's, and its LoRA adapters', loaded and unloaded at run time."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from kvfleet_sim.config import WorkerConfig
from kvfleet_sim.openai import ApiError, Fields

_REPOSITORY: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""What may be a Hugging Face repository, and is believed to be one; anything else must be a path that exists."""
MAX_ADAPTERS: Final = 1024


class Models:
    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._adapters = {adapter.name: adapter.path for adapter in config.adapters}
        self.lora_ids = {adapter.name: number for number, adapter in enumerate(config.adapters, 1)}
        """Adapters by the number KV events carry; a number is never given twice."""

    def resolve(self, name: str | None) -> tuple[str, str | None]:
        """(name to answer with, adapter) of the model a request names; without one, it is the base model."""
        names = self._config.served_names
        if name is None or name == "" or name in names:
            return name or names[0], None
        if name in self._adapters:
            return name, name
        aliases = ", ".join(names)
        message = f"The model `{name}` does not exist. Valid aliases: {aliases}."
        raise ApiError(404, message, "NotFoundError", "model")

    def list(self) -> dict[str, Any]:
        base, length = self._config.model, self._config.max_model_len
        cards = [_card(name, base, None, length) for name in self._config.served_names]
        parent = self._config.served_names[0]
        cards += [_card(name, path, parent, None) for name, path in self._adapters.items()]
        return {"object": "list", "data": cards}

    def load(self, values: dict[str, Any]) -> str:
        """POST /v1/load_lora_adapter. Returns the answer's text."""
        fields = Fields(values)
        name, path = fields.required_string("lora_name"), fields.required_string("lora_path")
        if not name or not path:
            raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
        in_place = fields.boolean("load_inplace")
        if name in self._adapters and not in_place:
            raise ApiError(
                400,
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True.",
                "InvalidUserInput",
            )
        if not _REPOSITORY.fullmatch(path) and not Path(path).is_dir():
            raise ApiError(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        if name not in self._adapters and len(self._adapters) >= MAX_ADAPTERS:
            raise ApiError(400, f"{MAX_ADAPTERS} adapters are loaded: unload one first.", "InvalidUserInput")
        self._adapters[name] = path
        self.lora_ids.setdefault(name, len(self.lora_ids) + 1)
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, values: dict[str, Any]) -> str:
        """POST /v1/unload_lora_adapter. Returns the answer's text."""
        name = Fields(values).required_string("lora_name")
        if name not in self._adapters:
            raise ApiError(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        del self._adapters[name]
        return f"Success: LoRA adapter '{name}' removed successfully."


def _card(name: str, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
    created = int(time.time())
    permission = {
        "id": f"modelperm-{uuid4().hex[:16]}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    card: dict[str, Any] = {"id": name, "object": "model", "created": created, "owned_by": "vllm", "root": root}
    return card | {"parent": parent, "max_model_len": max_model_len, "permission": [permission]}
