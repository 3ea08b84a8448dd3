"""Reads just enough of a request body to route it; the body itself travels to the engine verbatim.

One typed msgspec pass: the prompt's strings are taken as raw slices of the body (never decoded, never copied but once),
unknown fields are skipped without allocating, and a wrong type ends the pass where it stands. So a hostile body costs
time and memory in proportion to its size and nothing more. Prefix matching compares these raw slices: two clients that
escape the same text differently miss each other's cache view, which costs a little affinity and no correctness.

Images, audio and video are keyed by a digest of their content part and stand for MEDIA_BYTES of prompt each.

The reader is lenient where the engine decides (sampling options, roles, tools) and strict where routing needs the field
(`model`, `messages` or `prompt`). What it refuses, it refuses as OpenAI's API does: RequestError says which field.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Final, Literal

import msgspec
from xxhash import xxh3_128_digest

from kvfleet_router.core.bodies import (
    ANTHROPIC,
    CHAT,
    COMPLETION,
    NO_RAW,
    OTHER,
    PART,
    RAW_LIST,
    Body,
    Chat,
    Scalar,
)
from kvfleet_router.core.longstrings import Cut, cut, is_marked

Kind = Literal["chat", "completions", "other"]
_NO_HEADERS: Mapping[bytes, bytes] = {}
_LIST, _OBJECT = b"[{"
_ROLES = {role: b"\n%b\n" % role.encode() for role in ("system", "developer", "user", "assistant", "tool")}

MEDIA_BYTES: Final = 4096
"""What an image, an audio clip or a video counts in the prompt: about a thousand tokens."""
WITHOUT_OUTPUT = frozenset(
    ["embeddings", "pooling", "classify", "score", "rerank", "tokenize", "detokenize", "count_tokens"]
)
"""Endpoints (last part of the path) that prefill and generate nothing."""
MAX_NAME_BYTES: Final = 256
"""Longest model, tenant, session or salt; the API allows model names of 253."""
MAX_PRIORITY = 2**31
MAX_OUTPUT_TOKENS = 2**24
MAX_SEQUENCES: Final = 1024


class RequestError(Exception):
    """The request cannot be routed; carries what an OpenAI error body says."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",  # noqa: A002 - OpenAI's own field name
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code


class ParsedRequest:
    """What routing needs of a request. The simulator builds it directly, with `block_hashes` and `prompt_tokens` given."""

    __slots__ = (
        "block_hashes",
        "body",
        "cache_salt",
        "headers",
        "include_usage",
        "kind",
        "max_output_tokens",
        "model",
        "priority",
        "prompt",
        "prompt_bytes",
        "prompt_tokens",
        "sequences",
        "session_id",
        "stream",
        "tenant",
        "transfers",
    )

    def __init__(
        self,
        kind: Kind,
        model: str,
        *,
        stream: bool = False,
        prompt: bytes = b"",
        prompt_bytes: int = 0,
        prompt_tokens: int | None = None,
        block_hashes: list[int] | None = None,
        max_output_tokens: int | None = None,
        sequences: int = 1,
        priority: int = 0,
        session_id: str | None = None,
        tenant: str = "",
        cache_salt: str | None = None,
        include_usage: bool = False,
        transfers: bool = False,
        headers: Mapping[bytes, bytes] = _NO_HEADERS,
    ) -> None:
        self.kind = kind
        self.model = model
        """Empty: the client named none."""
        self.stream = stream
        self.prompt = prompt
        """The prompt's bytes in the engine's order (tools, then messages); emptied by the dispatcher once hashed."""
        self.prompt_bytes = prompt_bytes
        """Length of the prompt. With given `block_hashes`: 4 bytes for each token."""
        self.prompt_tokens = prompt_tokens
        """Exact, where the request carries token ids (or a simulator knows)."""
        self.block_hashes = block_hashes
        """Chained hashes of the whole blocks (`prefix.blockBytes` each) of the prompt, if known already."""
        self.body = b""
        """The whole body; dropped by the dispatcher once the prompt was read from it."""
        self.max_output_tokens = max_output_tokens
        self.sequences = sequences
        """Sequences the engine decodes for this request (`n` x prompts)."""
        self.priority = priority
        """Lower is more urgent, as in vLLM."""
        self.session_id = session_id
        self.tenant = tenant
        self.cache_salt = cache_salt
        self.include_usage = include_usage
        self.transfers = transfers
        """The client itself says where KV entries come from or go to."""
        self.headers = headers
        """Lower-case names."""

    def for_prefill(self) -> ParsedRequest:
        """The request as a Prefill worker gets it: one token, whose arrival is the end of the prefill."""
        return ParsedRequest(
            self.kind,
            self.model,
            stream=True,
            prompt=self.prompt,
            prompt_bytes=self.prompt_bytes,
            prompt_tokens=self.prompt_tokens,
            block_hashes=self.block_hashes,
            max_output_tokens=1,
            sequences=self.sequences,
            priority=self.priority,
            session_id=self.session_id,
            tenant=self.tenant,
            cache_salt=self.cache_salt,
            include_usage=self.include_usage,
            transfers=self.transfers,
            headers=self.headers,
        )


def read_request(
    path: str, body: bytes, headers: Mapping[bytes, bytes], *, max_body_bytes: int = 33_554_432
) -> ParsedRequest:
    """Parse a request. Raises RequestError and nothing else. `headers`: lower-case names."""
    if len(body) > max_body_bytes:
        message = f"The body has {len(body)} bytes; this router takes {max_body_bytes}. Send less or raise the router's limit."
        raise RequestError(message, status=413, code="request_too_large")
    path = path.partition("?")[0].removesuffix("/")
    reader = _READERS.get(path, _read_other)
    try:
        request = reader(body, headers)
    except msgspec.ValidationError as error:
        raise _wrong_type(error) from None
    except msgspec.DecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error}", code="invalid_json") from None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"The body is not valid UTF-8: {error.reason} at byte {error.start}", code="invalid_json"
        ) from None
    except RecursionError:
        raise RequestError("The body nests too deeply: flatten it", code="invalid_json") from None
    if path.rpartition("/")[2] in WITHOUT_OUTPUT:
        request.max_output_tokens = 0
    request.headers = headers
    request.body = body
    request.tenant = _header(headers, b"x-tenant-id")
    request.session_id = _header(headers, b"x-session-id") or None
    return request


def _read_chat(body: bytes, headers: Mapping[bytes, bytes]) -> ParsedRequest:
    short = cut(body)
    chat = CHAT.decode(body if short is None else short.text)
    if short is not None and (is_marked(chat.model) or is_marked(chat.cache_salt)):
        chat, short = CHAT.decode(body), None
    limit = chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens
    return _request("chat", chat, _conversation(chat, NO_RAW, short), limit)


def _read_anthropic(body: bytes, headers: Mapping[bytes, bytes]) -> ParsedRequest:
    short = cut(body)
    chat = ANTHROPIC.decode(body if short is None else short.text)
    if short is not None and (is_marked(chat.model) or is_marked(chat.cache_salt)):
        chat, short = ANTHROPIC.decode(body), None
    return _request("other", chat, _conversation(chat, chat.system, short), chat.max_tokens)


def _conversation(chat: Chat, system: msgspec.Raw, short: Cut | None) -> bytes:
    """Tools, system prompt and messages, as most chat templates order them. `short`: what long strings were taken out of."""
    if not chat.messages:
        problem = "`messages` is missing or empty: send at least one message"
        raise RequestError(problem, param="messages", code="missing_required_parameter")
    pieces: list[bytes | msgspec.Raw] = [chat.tools, system]
    for message in chat.messages:
        role = message.role
        pieces.append(_ROLES.get(role) or b"\n%b\n" % role.encode())
        content = message.content
        if content:
            if memoryview(content)[0] == _LIST:
                _add_parts(content, pieces, short)
            else:
                pieces.append(content)
        pieces.append(message.tool_calls)
    prompt = b"".join(pieces)
    return prompt if short is None else b"".join(short.whole(prompt))


def _add_parts(content: msgspec.Raw, pieces: list[bytes | msgspec.Raw], short: Cut | None) -> None:
    """Content parts: texts as they are, everything else by digest."""
    for part in RAW_LIST.decode(content):
        text = PART.decode(part).text if memoryview(part)[0] == _OBJECT else part
        if text:
            pieces.append(text)
        else:  # not `or`: a Raw is bytes to mypy only, and mypyc would insist
            digest = xxh3_128_digest(part) if short is None else xxh3_128_digest(b"".join(short.whole(bytes(part))))
            pieces.append(digest * (MEDIA_BYTES // 16))


def _read_completion(body: bytes, headers: Mapping[bytes, bytes]) -> ParsedRequest:
    completion = COMPLETION.decode(body)
    prompt = completion.prompt
    if prompt is None or prompt == []:
        raise RequestError(
            "`prompt` is missing or empty: send a string, strings or token ids",
            param="prompt",
            code="missing_required_parameter",
        )
    if isinstance(prompt, str):
        return _request("completions", completion, prompt.encode(), completion.max_tokens)
    if isinstance(prompt[0], int):
        request = _request("completions", completion, _token_bytes(prompt), completion.max_tokens)
        request.prompt_tokens = len(prompt)
        return request
    prompts = [
        item.encode() if isinstance(item, str) else _token_bytes(item) for item in prompt if not isinstance(item, int)
    ]
    if len(prompts) != len(prompt):
        raise RequestError("`prompt` mixes token ids with prompts: send one kind", param="prompt", code="invalid_type")
    request = _request("completions", completion, b"".join(prompts), completion.max_tokens)
    request.sequences = min(request.sequences * len(prompts), MAX_SEQUENCES)
    if all(isinstance(item, list) for item in prompt):
        request.prompt_tokens = len(request.prompt) // 4
    return request


def _token_bytes(tokens: list[int] | list[str | int | list[int]]) -> bytes:
    """Four bytes a token."""
    try:
        return array("I", tokens).tobytes()  # type: ignore[type-var]  # a wrong element raises here
    except (TypeError, OverflowError):
        raise RequestError(
            "`prompt` holds something that is no token id: ids are integers from 0", param="prompt", code="invalid_type"
        ) from None


def _read_other(body: bytes, headers: Mapping[bytes, bytes]) -> ParsedRequest:
    """Responses, embeddings, scoring, audio and what engines invent: routed by `model` where there is one."""
    if not body or b"json" not in headers.get(b"content-type", b"json"):
        return ParsedRequest("other", "", prompt_bytes=len(body))
    other = OTHER.decode(body)
    limit = other.max_tokens if other.max_output_tokens is None else other.max_output_tokens
    return _request("other", other, b"".join((other.instructions, other.input)), limit)


def _request(kind: Kind, body: Body, prompt: bytes, output_limit: Scalar) -> ParsedRequest:
    model = body.model or ""
    salt = body.cache_salt
    if len(model) > MAX_NAME_BYTES:
        raise RequestError(f"`model` is longer than {MAX_NAME_BYTES} characters", param="model", code="invalid_value")
    if salt is not None and len(salt) > MAX_NAME_BYTES:
        raise RequestError(
            f"`cache_salt` is longer than {MAX_NAME_BYTES} characters", param="cache_salt", code="invalid_value"
        )
    options = body.stream_options
    return ParsedRequest(
        kind,
        model,
        stream=_truth(body.stream),
        prompt=prompt,
        prompt_bytes=len(prompt),
        max_output_tokens=_whole(output_limit, 0, MAX_OUTPUT_TOKENS, None),
        sequences=_whole(body.n, 1, MAX_SEQUENCES, 1) or 1,
        priority=_whole(body.priority, -MAX_PRIORITY, MAX_PRIORITY, 0) or 0,
        cache_salt=salt,
        transfers=bool(body.kv_transfer_params),
        include_usage=options is not None and _truth(options.include_usage),
    )


def _truth(value: Scalar) -> bool:
    """As the engine's own lax reading of a boolean."""
    return (
        value is True
        or value == 1
        or (isinstance(value, str) and value.lower() in ("true", "1", "yes", "on", "t", "y"))
    )


def _whole(value: Scalar, lowest: int, highest: int, default: int | None) -> int | None:
    """A number within bounds, else the default: whether it is an error is the engine's to say."""
    if value is None or isinstance(value, str):
        return default
    return int(min(max(value, lowest), highest))


def _header(headers: Mapping[bytes, bytes], name: bytes) -> str:
    value = headers.get(name)
    return "" if value is None else value[:MAX_NAME_BYTES].decode("latin-1")


def _wrong_type(error: msgspec.ValidationError) -> RequestError:
    """msgspec's "Expected `str`, got `int` - at `$.messages[0].role`" names the place: make it `param`."""
    reason, _, place = str(error).partition(" - at `")
    param = place.removeprefix("$").removeprefix(".").removesuffix("`") or None
    missing = "missing required field" in reason
    where = f"`{param}`" if param else "The body"
    return RequestError(
        f"{where}: {reason}", param=param, code="missing_required_parameter" if missing else "invalid_type"
    )


_READERS = {
    "/v1/chat/completions": _read_chat,
    "/v1/completions": _read_completion,
    "/v1/messages": _read_anthropic,
}
