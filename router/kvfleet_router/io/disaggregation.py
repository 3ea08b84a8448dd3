"""Bodies for prefill and decode apart (core/disaggregation.py), in the words of vLLM's KV connectors (NixlConnector).

    to the Prefill worker   the client's body with max_tokens 1, no stream, kv_transfer_params {do_remote_decode: true}
    its answer              kv_transfer_params {do_remote_prefill: true, remote_engine_id, remote_block_ids, remote_host, …}
    to the Decode worker    the client's body with exactly those

Bodies are not taken apart: fields are added at the end, and of equal keys the last one counts, for engines read JSON as Python
does. So what the client sent reaches both workers as it was written.
"""

from __future__ import annotations

import msgspec

_NONE = msgspec.Raw(b"null")

_TO_PREFILL = (
    b',"stream":false,"stream_options":null,"max_tokens":1,"min_tokens":0,"kv_transfer_params":{"do_remote_decode":true,'
    b'"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
_ONE_COMPLETION_TOKEN = b',"max_completion_tokens":1'
MAX_ANSWER_BYTES = 4_194_304
"""Of a Prefill worker: one token, and the ids of the prompt's blocks."""


class _Answer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = _NONE


_ANSWER = msgspec.json.Decoder(_Answer)


def prefill_body(body: bytes, *, chat: bool) -> bytes:
    """The client's body (a JSON object that is not empty), for a worker that computes the prompt only."""
    return _with(body, (_ONE_COMPLETION_TOKEN if chat else b"") + _TO_PREFILL)


def decode_body(body: bytes, transfer_params: bytes) -> bytes:
    """The client's body, for a worker that fetches the prompt's KV entries."""
    return _with(body, b',"kv_transfer_params":' + transfer_params)


def transfer_params(answer: bytes) -> bytes:
    """Where the KV entries are, as the Prefill worker wrote it; empty where it does not say."""
    try:
        params = bytes(_ANSWER.decode(answer).kv_transfer_params)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return b""
    return params if params[:1] == b"{" else b""


def _with(body: bytes, fields: bytes) -> bytes:
    return body.rstrip(b" \t\r\n")[:-1] + fields + b"}"
