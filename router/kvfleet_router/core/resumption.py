"""A streamed text that can go on at another worker: what of it the client has, and how to ask for the rest.

    Resumption.of(request) ── body() ──► worker ── events ──► take() ──► what the client gets
                                 ▲          │ dies
                                 └─ broke() ◄

Pure. The first worker is asked for the request itself, and on top of it for its running count of tokens
(`stream_options.continuous_usage_stats`), which the client only gets if it asked. When that worker dies, the next one is
asked to go on: completions with the prompt and the text so far, chats with an assistant message of the text so far
(vLLM: `continue_final_message`), both with what is left of max_tokens. Its events are passed on under the first one's `id`
and `created`, the role is not said again, and counts of tokens are those of the whole.

Exactly once: only whole events are passed on (io/resume.py), each at once and each text remembered; so what is remembered is
what the client has. A chat template may strip the blanks at the end of a message, and the model then says them again: they
are left out of what the next worker is told, and dropped where its text begins with them.

Not resumable is what a second worker could not continue alike: several sequences, tools, grammars, log probabilities, echo,
prompts of token ids, reasoning; and texts beyond MAX_TEXT_BYTES.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import orjson

from kvfleet_router.core.parse import ParsedRequest

MAX_TEXT_BYTES: Final = 1 << 20
DEFAULT_COMPLETION_TOKENS: Final = 16
"""max_tokens of a completion that says nothing, as OpenAI and vLLM have it."""
DONE: Final = b"[DONE]"

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NOTHING: Final = frozenset((b"null", b"false", b"0", b'""', b"[]", b"{}", b'"none"', b'{"type":"text"}'))
_REFUSED: Final = (
    *("tools", "functions", "logprobs", "top_logprobs", "prompt_logprobs", "echo", "suffix", "use_beam_search"),
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("guided_whitespace_pattern", "structural_tag", "return_token_ids", "return_tokens_as_token_ids", "prompt_embeds"),
    *("truncate_prompt_tokens", "kv_transfer_params", "continue_final_message", "audio"),
)
"""Fields that, set to anything, end it."""
_PATHS: Final = {"/v1/chat/completions": True, "/v1/completions": False}
_TEXT_DELTA: Final = frozenset(("role", "content"))


class Resumption:
    """One answer's stream, over all the workers it takes."""

    __slots__ = (
        "_again",
        "_base_tokens",
        "_blanks",
        "_chat",
        "_continuous",
        "_counted",
        "_fields",
        "_head",
        "_pieces",
        "_prompt_tokens",
        "_size",
        "_solid_tokens",
        "_tokens",
        "_usage",
        "able",
        "cached_tokens",
        "done",
        "failure",
        "finished",
    )

    def __init__(self, fields: dict[str, msgspec.Raw], *, chat: bool, include_usage: bool, continuous: bool) -> None:
        self._fields = fields
        self._chat = chat
        self._usage, self._continuous = include_usage, continuous
        self._counted = False
        """The client has the closing count of tokens."""
        self._pieces: list[str] = []
        """The text the client has."""
        self._size = 0
        self._head: dict[str, Any] = {}
        """id, object, created and model of the first worker's events."""
        self._tokens = 0
        """Tokens the client has: as of the last event with text, for what came later is asked for again."""
        self._solid_tokens = 0
        """Of them, without the blanks at the end."""
        self._base_tokens = 0
        """Of them, what the worker at hand was told: its own counts come on top."""
        self._prompt_tokens: int | None = None
        self._again = False
        """It is not the first worker that answers."""
        self._blanks = ""
        """Blanks that the client has and this worker was not told of."""
        self.cached_tokens: int | None = None
        self.able = True
        """Whether the rest may come from another worker."""
        self.failure = ""
        """Why what this worker still sends is not for the client."""
        self.finished = False
        """The client has the reason why the text ended."""
        self.done = False
        """The client has all of it, [DONE] included."""

    @classmethod
    def of(cls, path: str, parsed: ParsedRequest, body: bytes) -> Resumption | None:
        """None where the request cannot be resumed."""
        chat = _PATHS.get(path)
        if chat is None or not parsed.stream or parsed.sequences != 1:
            return None
        try:
            fields = _FIELDS.decode(body)
            options = orjson.loads(bytes(fields["stream_options"])) if "stream_options" in fields else None
        except (ValueError, msgspec.DecodeError):
            return None
        if any(bytes(fields[name]).replace(b" ", b"") not in _NOTHING for name in _REFUSED if name in fields):
            return None
        wanted = fields.get("messages" if chat else "prompt")
        if wanted is None or bytes(wanted)[:1] != (b"[" if chat else b'"'):
            return None
        if any(_number(fields, name) is _ODD for name in ("max_tokens", "max_completion_tokens", "min_tokens")):
            return None
        if chat and bytes(fields.get("add_generation_prompt", b"true")) != b"true":
            return None
        continuous = (
            parsed.include_usage and isinstance(options, dict) and options.get("continuous_usage_stats") is True
        )
        usage = {"include_usage": True, "continuous_usage_stats": True}
        fields["stream_options"] = _raw((options if isinstance(options, dict) else {}) | usage)
        return cls(fields, chat=chat, include_usage=parsed.include_usage, continuous=continuous)

    # What is asked

    def body(self) -> bytes:
        """The request to the worker at hand."""
        text = "".join(self._pieces)
        told = text.rstrip() if self._chat else text
        if not told:
            self._blanks, self._base_tokens = text, 0
            return msgspec.json.encode(self._fields)
        self._blanks = text[len(told) :]
        self._base_tokens = self._solid_tokens if self._blanks else self._tokens
        fields = dict(self._fields)
        if self._chat:
            message = orjson.dumps({"role": "assistant", "content": told})
            fields["messages"] = msgspec.Raw(bytes(fields["messages"]).rstrip()[:-1] + b"," + message + b"]")
            fields |= {"add_generation_prompt": _raw(False), "continue_final_message": _raw(True)}
        else:
            fields["prompt"] = msgspec.Raw(bytes(fields["prompt"])[:-1] + orjson.dumps(told)[1:])
            fields.setdefault("max_tokens", _raw(DEFAULT_COMPLETION_TOKENS))
        for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
            limit = _number(fields, name)
            if limit is not None:
                fields[name] = _raw(max(limit - self._base_tokens, 0 if name == "min_tokens" else 1))
        return msgspec.json.encode(fields)

    def broke(self) -> None:
        """The worker died: from here on events come from another one."""
        self._again = bool(self._head)
        self.failure = ""

    @property
    def exhausted(self) -> bool:
        """The client has as many tokens as it may."""
        limits = [_number(self._fields, name) for name in ("max_completion_tokens", "max_tokens")]
        limit = next((limit for limit in limits if limit is not None), None)
        if limit is None and not self._chat and "max_tokens" not in self._fields:
            limit = DEFAULT_COMPLETION_TOKENS
        return limit is not None and self._tokens >= limit

    # What comes

    def take(self, event: bytes) -> bytes:
        """An event of the worker, without the empty line at its end; returns what the client gets, with it."""
        if self.failure or self.done:
            return b""
        if not event.startswith(b"data:"):
            return event + b"\n\n"
        data = event[5:].strip()
        if data == DONE:
            return self._ended()
        try:
            value = orjson.loads(data)
            if "error" in value:
                return self._error(event, value["error"])
            return self._chunk(event, value)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return self._unable(event)  # nothing an engine of OpenAI's API sends

    def ended_early(self) -> bool:
        """The worker has nothing more to say: whether the rest must come from another one (see `failure`)."""
        if self.able and not self.finished and not self.failure:
            self.failure = "engine_ended"
        return bool(self.failure)

    def closing(self) -> bytes:
        """The end of a text whose last worker died after its last token: finish reason, usage and [DONE], as far as missing."""
        events = b""
        if not self.finished:
            choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
            choice["delta" if self._chat else "text"] = {} if self._chat else ""
            events += _event(self._head | {"choices": [choice]})
        if self._usage and not self._counted:
            events += _event(self._head | {"choices": [], "usage": self._counts({})})
        self.finished = self.done = True
        return events + b"data: [DONE]\n\n"

    @property
    def prompt_tokens(self) -> int | None:
        return self._prompt_tokens

    @property
    def output_tokens(self) -> int:
        return self._tokens

    # Inside

    def _chunk(self, event: bytes, value: dict[str, Any]) -> bytes:
        usage, choices = value.get("usage"), value["choices"]
        if usage is not None:
            self._count(usage)
        if not self._head:
            self._head = {name: value[name] for name in ("id", "object", "created", "model") if name in value}
        if choices:
            if not self._choice(choices[0], usage):
                return b""
        elif not self._usage:
            return b""
        else:
            self._counted = True
        if usage is not None:
            if choices and not self._continuous:
                del value["usage"]
            elif not self._again:
                return event + b"\n\n"
            else:
                value["usage"] = self._counts(usage)
        elif not self._again:
            return event + b"\n\n"
        return _event(value | self._head if self._again else value)

    def _choice(self, choice: dict[str, Any], usage: dict[str, Any] | None) -> bool:
        """Whether the client gets it."""
        reason = choice.get("finish_reason")
        if reason == "abort" and self.able:
            self.failure = "engine_aborted"
            return False
        text = self._text(choice)
        if text is None:
            self.able = False
            return True
        if self._blanks and text:
            text = self._without_blanks(choice, text)
        if text:
            self._pieces.append(text)
            self._size += len(text)
            self.able = self.able and self._size <= MAX_TEXT_BYTES
            if not self.able:
                self._pieces.clear()
            self._tokens = self._base_tokens + usage["completion_tokens"] if usage else self._tokens + 1
            if not text[-1].isspace():
                self._solid_tokens = self._tokens
        self.finished = reason is not None
        if self.finished and usage:
            self._tokens = self._base_tokens + usage["completion_tokens"]
        return bool(text) or self.finished or not self._again

    def _text(self, choice: dict[str, Any]) -> str | None:
        """None: there is more to it than text."""
        if not self._chat:
            return choice["text"] or ""
        delta = choice["delta"]
        if any(value and name not in _TEXT_DELTA for name, value in delta.items()):
            return None
        if self._again:
            delta.pop("role", None)
        return delta.get("content") or ""

    def _without_blanks(self, choice: dict[str, Any], text: str) -> str:
        """Drop what the client has of the blanks before."""
        same = 0
        while same < min(len(text), len(self._blanks)) and text[same] == self._blanks[same]:
            same += 1
        self._blanks = self._blanks[same:] if same == len(text) else ""
        text = text[same:]
        if self._chat:
            choice["delta"]["content"] = text
        else:
            choice["text"] = text
        return text

    def _count(self, usage: dict[str, Any]) -> None:
        if self._prompt_tokens is None:
            self._prompt_tokens = max(usage["prompt_tokens"] - self._base_tokens, 0)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached is not None:
            self.cached_tokens = min(cached, self._prompt_tokens)

    def _counts(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The usage of the whole answer, in the form of `usage`."""
        prompt = self._prompt_tokens or 0
        output = self._base_tokens + usage["completion_tokens"] if usage else self._tokens
        whole = usage | {"prompt_tokens": prompt, "total_tokens": prompt + output, "completion_tokens": output}
        if usage.get("prompt_tokens_details") and self.cached_tokens is not None:
            whole["prompt_tokens_details"] = usage["prompt_tokens_details"] | {"cached_tokens": self.cached_tokens}
        return whole

    def _error(self, event: bytes, error: Any) -> bytes:
        code = error.get("code")
        if not self.able or (isinstance(code, int) and code < 500):
            return self._unable(event)  # the request's own fault
        self.failure = "engine_failed"
        return b""

    def _ended(self) -> bytes:
        if self.ended_early():
            return b""
        self.done = True
        return b"data: [DONE]\n\n"

    def _unable(self, event: bytes) -> bytes:
        self.able = False
        self._pieces.clear()
        return event + b"\n\n"


_ODD: Final = -1


def _number(fields: dict[str, msgspec.Raw], name: str) -> int | None:
    """A count among the fields; None: none is given; _ODD: it is given as what no count is."""
    raw = fields.get(name)
    value = None if raw is None else orjson.loads(bytes(raw))
    if value is None:
        return None
    return value if type(value) is int and value >= 0 else _ODD


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(orjson.dumps(value))


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
