"""The `model` field of a multipart form (audio uploads), without reading the file beside it.

The form travels to the engine as it came; whether it is well-formed is the engine's to say. Here a missing, repeated or
odd field only means that no model is known."""

from __future__ import annotations

import re

MAX_PARTS = 64
_MAX_PART_HEAD_BYTES = 4096
_MAX_MODEL_BYTES = 256

_BOUNDARY = re.compile(rb'multipart/form-data\s*;.*?boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_MODEL_NAME = re.compile(rb'content-disposition:\s*form-data\s*;\s*name="?model"?\s*(?:;|\r\n|$)', re.IGNORECASE)


def form_model(body: bytes, content_type: bytes) -> str | None:
    """The form's `model`; None where there is none to be found."""
    found = _BOUNDARY.match(content_type)
    if found is None:
        return None
    delimiter = b"--" + (found[1] or found[2])
    start = body.find(delimiter)
    for _ in range(MAX_PARTS):
        if start < 0:
            return None
        head_end = body.find(b"\r\n\r\n", start, start + _MAX_PART_HEAD_BYTES)
        if head_end < 0:
            return None
        next_start = body.find(b"\r\n" + delimiter, head_end + 2)
        if _MODEL_NAME.search(body, start, head_end):
            value = body[head_end + 4 : max(next_start, 0)]
            return value.decode("utf-8", "replace").strip() if len(value) <= _MAX_MODEL_BYTES else None
        start = next_start
    return None
