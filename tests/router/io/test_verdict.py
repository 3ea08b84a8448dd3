"""Which answers are given up for another worker's."""

import orjson
import pytest

from kvfleet_router.io import wire
from kvfleet_router.io.verdict import failure

LEAVING = b'{"error":{"message":"cannot schedule new futures after shutdown","code":500}}'
DEAD = b'{"error":{"message":"EngineCore encountered an issue.","type":"InternalServerError","code":500}}'


def event(data: bytes) -> bytes:
    return b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data)


@pytest.mark.parametrize(
    ("status", "event_stream", "body", "cause"),
    [
        (200, False, b'{"choices":[{"finish_reason":"stop"}]}', ""),
        (200, False, b'{"choices":[{"finish_reason":"abort"}]}', "engine_aborted"),
        (200, True, event(b'{"choices":[{"finish_reason":"abort"}]}'), "engine_aborted"),
        (200, True, event(b'{"choices":[{"delta":{"content":"hi"}}]}'), ""),
        (200, True, event(DEAD), "engine_failed"),
        (200, True, b"data: " + DEAD + b"\n\n", "engine_failed"),
        (200, True, event(b'{"error":{"message":"too long","code":400}}'), ""),
        (200, True, event(b'{"choices":[]}') + event(DEAD), ""),
        (200, False, DEAD, ""),
        (500, False, LEAVING, "engine_failed"),
        (500, False, DEAD, "engine_failed"),
        (500, False, b'{"error":{"message":"list index out of range"}}', ""),
        (500, False, b"", ""),
        (501, False, DEAD, ""),
        (502, False, b"", "status_502"),
        (503, True, b"", "status_503"),
        (504, False, b"", "status_504"),
        (429, False, b"", ""),
        (400, False, LEAVING, ""),
    ],
)
def test_verdicts(status: int, event_stream: bool, body: bytes, cause: str) -> None:
    assert failure(status, event_stream, body) == cause


def test_a_models_text_cannot_ask_for_another_worker() -> None:
    text = '"finish_reason":"abort" {"error":{"code":500}} EngineCore'
    assert (
        failure(200, False, orjson.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})) == ""
    )


def test_names_cannot_break_a_header() -> None:
    assert wire.printable("pod-1.ns:8000") == b"pod-1.ns:8000"
    assert wire.printable("a\r\nx-evil: 1\té") == b"a??x-evil:?1??"
