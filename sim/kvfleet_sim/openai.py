"""OpenAI requests as vLLM reads them: from the body's JSON to a `Generate`, or an `ApiError` in vLLM's words. Pure.

Unknown fields are ignored, as in vLLM; known ones are checked by type as pydantic does it, with its error messages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from kvfleet_sim.chat import ChatError, render_chat
from kvfleet_sim.tokens import Tokenizer, TokenizerError, Tokens, token_array

DEFAULT_COMPLETION_TOKENS: Final = 16
DEFAULT_CHAT_TOKENS: Final = 256
"""vLLM's default is all that is left of the context; a simulated model has no end-of-text of its own to stop at."""
MAX_CHOICES: Final = 1024
MAX_STOPS: Final = 64
MAX_LOGPROBS: Final = 20


class ApiError(Exception):
    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(slots=True)
class Generate:
    """A request for text."""

    chat: bool
    model: str
    """As the client named it."""
    prompts: list[Tokens]
    max_tokens: int
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """Alternatives to list for each token; None: no log probabilities."""
    echo: bool = False
    return_token_ids: bool = False
    priority: int = 0
    seed: int = 0
    cache_salt: str | None = None
    remote_prefill: bool = False
    """Another engine computed the prompt (vLLM: kv_transfer_params.do_remote_prefill)."""
    remote_decode: bool = False
    """Another engine will go on from here (kv_transfer_params.do_remote_decode)."""
    embedding: str | None = None
    """Not text but a vector is wanted, in this encoding: `float` or `base64`."""


def invalid(kind: str, location: str, message: str, value: object, context: dict[str, str] | None = None) -> ApiError:
    """A validation error as vLLM reports pydantic's."""
    shown = f"<{type(value).__name__} of {len(value)} items>" if isinstance(value, dict | list) else str(value)
    detail: dict[str, Any] = {"type": kind, "loc": location, "msg": message, "input": shown}
    if context is not None:
        detail["ctx"] = context
    return ApiError(400, f"1 validation error:\n  {detail}", "Bad Request", location)


def parse_body(body: bytes, content_type: bytes) -> dict[str, Any]:
    if content_type.partition(b";")[0].strip().lower() != b"application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise ApiError(400, message, "Bad Request")
    if not body:
        raise invalid("missing", "body", "Field required", None)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = _parse_slowly(body)
    if not isinstance(value, dict):
        text = "Input should be a valid dictionary or object to extract fields from"
        raise invalid("model_attributes_type", "body", text, value)
    return value


def _parse_slowly(body: bytes) -> Any:
    """With the standard library, which takes NaN as vLLM does and tells where and why it fails."""
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        position, reason = error.pos, error.msg
    except UnicodeDecodeError as error:
        position, reason = error.start, "Invalid UTF-8"
    except RecursionError:
        position, reason = 0, "Too deeply nested"
    raise invalid("json_invalid", f"body.{position}", "JSON decode error", {}, {"error": reason})


class Fields:
    """Typed access to the fields of a JSON object; null counts as absent."""

    def __init__(self, values: dict[str, Any], location: str = "body") -> None:
        self.values = values
        self._location = location

    def integer(self, name: str, default: int) -> int:
        value = self.optional_integer(name)
        return default if value is None else value

    def optional_integer(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        where = f"{self._location}.{name}"
        if isinstance(value, float):
            if value.is_integer():
                return int(value)
            text = "Input should be a valid integer, got a number with a fractional part"
            raise invalid("int_from_float", where, text, value)
        if isinstance(value, str):
            if value.strip().removeprefix("-").isdecimal() and len(value) < 32:
                return int(value)
            text = "Input should be a valid integer, unable to parse string as an integer"
            raise invalid("int_parsing", where, text, value)
        raise invalid("int_type", where, "Input should be a valid integer", value)

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise invalid("float_type", f"{self._location}.{name}", "Input should be a valid number", value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        raise invalid("bool_type", f"{self._location}.{name}", "Input should be a valid boolean", value)

    def string(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is None or isinstance(value, str):
            return value
        raise invalid("string_type", f"{self._location}.{name}", "Input should be a valid string", value)

    def required_string(self, name: str) -> str:
        if name not in self.values:
            raise invalid("missing", f"{self._location}.{name}", "Field required", self.values)
        return self.string(name) or ""

    def array(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if value is None:
            return []
        if isinstance(value, list):
            return value
        raise invalid("list_type", f"{self._location}.{name}", "Input should be a valid list", value)

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.values.get(name)
        if value is None or isinstance(value, dict):
            return value
        text = "Input should be a valid dictionary or object to extract fields from"
        raise invalid("model_attributes_type", f"{self._location}.{name}", text, value)


class RequestReader:
    """Reads the bodies of /v1/chat/completions and /v1/completions for one model."""

    def __init__(
        self, tokenizer: Tokenizer, max_model_len: int, *, auto_tool_choice: bool, kv_transfer: bool = False
    ) -> None:
        self._kv_transfer = kv_transfer
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._auto_tool_choice = auto_tool_choice

    def chat(self, values: dict[str, Any], model: str) -> Generate:
        fields = Fields(values)
        prompt = self.chat_prompt(fields)
        asked = fields.optional_integer("max_completion_tokens")
        if asked is None:
            asked = fields.optional_integer("max_tokens")
        logprobs = fields.integer("top_logprobs", 0) if fields.boolean("logprobs") else None
        default = max(DEFAULT_CHAT_TOKENS - self._begun_tokens(fields), 1)
        return self._generate(fields, True, model, [prompt], asked, default, logprobs)

    def completion(self, values: dict[str, Any], model: str) -> Generate:
        fields = Fields(values)
        prompts = self._prompts(values.get("prompt"))
        asked, logprobs = fields.optional_integer("max_tokens"), fields.optional_integer("logprobs")
        it = self._generate(fields, False, model, prompts, asked, DEFAULT_COMPLETION_TOKENS, logprobs)
        it.echo = fields.boolean("echo")
        return it

    def embedding(self, values: dict[str, Any], model: str) -> Generate:
        fields = Fields(values)
        encoding = fields.string("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            message = f"encoding_format must be 'float' or 'base64', got {encoding!r}."
            raise ApiError(400, message, param="encoding_format")
        prompts = self._prompts(values.get("input"), "input")
        self.check_context(max(len(prompt) for prompt in prompts))
        priority = fields.integer("priority", 0)
        return Generate(False, model, prompts, max_tokens=1, priority=priority, embedding=encoding)

    def chat_prompt(self, fields: Fields) -> Tokens:
        """The tokens of a chat."""
        values = fields.values
        if "messages" not in values:
            raise invalid("missing", "body.messages", "Field required", values)
        if not isinstance(values["messages"], list):
            raise invalid("list_type", "body.messages", "Input should be a valid list", values["messages"])
        messages = fields.array("messages")
        for index, message in enumerate(messages):
            if not isinstance(message, dict):
                raise invalid("dict_type", f"body.messages.{index}", "Input should be a valid dictionary", message)
            if not isinstance(message.get("role"), str):
                raise invalid("missing", f"body.messages.{index}.role", "Field required", message)
        if fields.boolean("continue_final_message") and fields.boolean("add_generation_prompt"):
            message = "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
            raise ApiError(400, message, "Bad Request")
        tools = fields.array("tools")
        choice = values.get("tool_choice", "auto")
        if tools and choice == "auto" and not self._auto_tool_choice:
            raise ApiError(
                400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
            )
        try:
            text = render_chat(
                messages,
                () if choice == "none" else tools,
                add_generation_prompt=fields.boolean("add_generation_prompt", True),
                continue_final_message=fields.boolean("continue_final_message"),
            )
        except ChatError as error:
            raise ApiError(400, str(error)) from None
        except RecursionError:
            raise ApiError(400, "tools or tool call arguments are nested too deeply") from None
        return self._tokenizer.encode(text)

    def _begun_tokens(self, fields: Fields) -> int:
        """Tokens of the answer that are there already, in a final message to be continued."""
        if not fields.boolean("continue_final_message"):
            return 0
        content = fields.values["messages"][-1].get("content")
        return len(self._tokenizer.encode(content)) if isinstance(content, str) else 0

    def prompt(self, prompt: Any) -> Tokens:
        """The tokens of one prompt: a text or a list of token ids."""
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        try:
            return token_array(prompt)
        except TokenizerError as error:
            raise ApiError(400, f"{error} (parameter=prompt)", param="prompt") from None

    def _prompts(self, prompt: Any, name: str = "prompt") -> list[Tokens]:
        many = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], list | str)
        prompts = prompt if many else [prompt]
        if not all(isinstance(one, str | list) and one for one in prompts):
            wanted = "Either prompt or prompt_embeds" if name == "prompt" else name
            message = f"{wanted} must be provided and non-empty. (parameter={name})"
            raise ApiError(400, message, param=name)
        if len(prompts) > MAX_CHOICES:
            raise ApiError(400, f"at most {MAX_CHOICES} prompts a request (parameter={name})", param=name)
        return [self.prompt(one) for one in prompts]

    def _generate(
        self,
        fields: Fields,
        chat: bool,
        model: str,
        prompts: list[Tokens],
        asked: int | None,
        default: int,
        logprobs: int | None,
    ) -> Generate:
        """`asked` is the request's max_tokens, `default` what it is without."""
        values = fields.values
        max_tokens = self._check_lengths(asked, default, max(len(prompt) for prompt in prompts))
        self._check_sampling(fields)
        stream = fields.boolean("stream")
        options = Fields(fields.object("stream_options") or {}, "body.stream_options")
        if values.get("stream_options") is not None and not stream:
            message = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
            raise ApiError(400, message, param="stream_options")
        n = fields.integer("n", 1)
        if n < 1 or n * len(prompts) > MAX_CHOICES:
            raise ApiError(
                400, f"n must be at least 1 and at most {MAX_CHOICES} in all, got {n}. (parameter=n)", param="n"
            )
        if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
            raise ApiError(400, f"logprobs must be from 0 to {MAX_LOGPROBS}, got {logprobs}.", param="logprobs")
        transfer = Fields(fields.object("kv_transfer_params") or {}, "body.kv_transfer_params")
        salt = fields.string("cache_salt")
        if salt == "":
            message = "Parameter 'cache_salt' must be a non-empty string if provided. (parameter=cache_salt)"
            raise ApiError(400, message, param="cache_salt")
        return Generate(
            chat=chat,
            model=model,
            prompts=prompts,
            max_tokens=max_tokens,
            n=n,
            stream=stream,
            include_usage=options.boolean("include_usage"),
            continuous_usage=options.boolean("continuous_usage_stats") and options.boolean("include_usage"),
            stop=_stops(values.get("stop")),
            stop_token_ids=_stop_ids(fields.array("stop_token_ids")),
            logprobs=logprobs,
            return_token_ids=fields.boolean("return_token_ids"),
            priority=fields.integer("priority", 0),
            seed=fields.integer("seed", 0),
            cache_salt=salt,
            remote_prefill=self._kv_transfer and transfer.boolean("do_remote_prefill"),
            remote_decode=self._kv_transfer and transfer.boolean("do_remote_decode"),
        )

    def _check_lengths(self, asked: int | None, default: int, prompt_tokens: int) -> int:
        """How many tokens to generate."""
        limit = self._max_model_len
        if asked is not None and asked < 1:
            message = f"max_tokens must be at least 1, got {asked}. (parameter=max_tokens, value={asked})"
            raise ApiError(400, message, param="max_tokens")
        if asked is not None and asked > limit:
            raise ApiError(
                400,
                f"max_tokens={asked} cannot be greater than max_model_len={limit}. Please request fewer output tokens. "
                f"(parameter=max_tokens, value={asked})",
                param="max_tokens",
            )
        self.check_context(prompt_tokens)
        if asked is not None and prompt_tokens + asked > limit:
            raise ApiError(
                400,
                f"This model's maximum context length is {limit} tokens. However, you requested {asked} output tokens and "
                f"your prompt contains {prompt_tokens} input tokens, for a total of {prompt_tokens + asked} tokens. "
                "Please reduce the length of the input prompt or the number of requested output tokens. "
                f"(parameter=input_tokens, value={prompt_tokens})",
                param="input_tokens",
            )
        return min(default, limit - prompt_tokens) if asked is None else asked

    def check_context(self, prompt_tokens: int) -> None:
        """A prompt must leave room for a token."""
        limit = self._max_model_len
        if prompt_tokens < limit:
            return
        least = min(prompt_tokens, limit + 1)
        raise ApiError(
            400,
            f"This model's maximum context length is {limit} tokens. However, your prompt contains at least {least} input "
            "tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
            f"(parameter=input_tokens, value={least})",
            param="input_tokens",
        )

    def _check_sampling(self, fields: Fields) -> None:
        temperature = fields.number("temperature", 1.0)
        if temperature < 0:
            message = (
                f"temperature must be non-negative, got {temperature}. (parameter=temperature, value={temperature})"
            )
            raise ApiError(400, message, param="temperature")
        top_p = fields.number("top_p", 1.0)
        if not 0 < top_p <= 1:
            message = f"top_p must be in (0, 1], got {top_p}. (parameter=top_p, value={top_p})"
            raise ApiError(400, message, param="top_p")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("string_type", "body.stop", "Input should be a valid string", value)
    if len(stops) > MAX_STOPS or "" in stops:
        raise ApiError(400, f"stop takes up to {MAX_STOPS} strings that are not empty. (parameter=stop)", param="stop")
    return tuple(stops)


def _stop_ids(values: Sequence[Any]) -> tuple[int, ...]:
    if len(values) > MAX_STOPS or not all(type(value) is int for value in values):
        message = f"stop_token_ids takes up to {MAX_STOPS} whole numbers. (parameter=stop_token_ids)"
        raise ApiError(400, message, param="stop_token_ids")
    return tuple(values)
