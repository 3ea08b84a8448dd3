"""Whether an answer of which nothing has gone to the client had better come from another worker.

What says that the engine is leaving or gone is worth another try; so are the refusals of proxies. Other errors belong to the
request: one that breaks an engine may break the next one too. The words are vLLM's.
"""

from __future__ import annotations

import re

ABORTED = b'"finish_reason":"abort"'
"""The engine was told to leave and ended what ran, half-way. (Inside a model's text the quotes would be escaped.)"""

_BROKEN_EVENT = re.compile(rb'^(?:[0-9a-fA-F]+\r\n)?data: ?\{"error":.*"code": ?5\d\d', re.DOTALL)
"""A stream that begins with a server's error: the engine died while it read the prompt."""
_LEAVING = re.compile(
    rb"cannot schedule new futures after shutdown|EngineCore|EngineDead|engine is dead", re.IGNORECASE
)


def failure(status: int, event_stream: bool, body: bytes) -> str:
    """The cause to give the answer up for; empty: it is good as it is. `body`: what came of it, framing included."""
    if status < 300:
        if event_stream and _BROKEN_EVENT.match(body):
            return "engine_failed"
        return "engine_aborted" if ABORTED in body else ""
    if status in (502, 503, 504):
        return f"status_{status}"
    return "engine_failed" if status == 500 and _LEAVING.search(body) else ""
