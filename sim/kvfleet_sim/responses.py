"""The bodies of answers, in the very shape vLLM writes them (checked against recordings). Pure.

Streams are the hot path: everything of a chunk but its text is made once per choice, and the text of the simulated model
needs no escaping.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any, Final

import numpy as np
import orjson
import xxhash

from kvfleet_sim.generation import Choice, Job
from kvfleet_sim.tokens import Tokenizer, draw_words

DONE: Final = b"data: [DONE]\n\n"
LOGPROB: Final = -1.25
"""Every token's log probability: the simulated model has none."""
EMBEDDING_SIZE: Final = 256


class Responses:
    def __init__(self, tokenizer: Tokenizer, fingerprint: str, *, prompt_tokens_details: bool) -> None:
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        self._details = prompt_tokens_details

    # -- streams

    def opening(self, job: Job) -> list[bytes]:
        """What a stream begins with: in a chat, a chunk with the role for each choice."""
        if not job.params.chat:
            return []
        events = []
        for choice in job.choices:
            body = self._chunk_head(job)
            delta = {"role": "assistant", "content": ""}
            body["choices"] = [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]
            if job.params.continuous_usage:
                body["usage"] = self._running_usage(job, 0)
            body["prompt_token_ids"] = job.params.prompts[0].tolist() if job.params.return_token_ids else None
            body["prompt_text"] = None
            events.append(_event(body))
        return events

    def chunk(self, choice: Choice, start: int, end: int) -> bytes:
        """The chunk of output tokens [start, end); with the reason if they finish the choice."""
        params = choice.job.params
        text = choice.text_of(start, end)
        if choice.finish_reason is None and not (
            params.continuous_usage or params.return_token_ids or params.echo or params.logprobs is not None
        ):
            return self._plain_head(choice) + text.encode() + (_CHAT_TAIL if params.chat else _COMPLETION_TAIL)
        token_ids = choice.output[start:end].tolist() if params.return_token_ids else None
        logprobs = self._logprobs(choice, start, end) if params.logprobs is not None else None
        body = self._chunk_head(choice.job)
        if params.chat:
            item = {"index": choice.index, "delta": {"content": text}, "logprobs": logprobs}
            item["finish_reason"] = choice.finish_reason
            if choice.finish_reason is not None:
                item["stop_reason"] = choice.stop_reason
            item["token_ids"] = token_ids
        else:
            if params.echo and start == 0:
                text = self._tokenizer.decode(choice.tokens[: choice.prompt_tokens]) + text
            item = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
            item |= {"stop_reason": choice.stop_reason, "prompt_token_ids": None, "token_ids": token_ids}
            if params.return_token_ids and start == 0:
                item["prompt_token_ids"] = choice.tokens[: choice.prompt_tokens].tolist()
        body["choices"] = [item]
        if params.continuous_usage:
            body["usage"] = self._running_usage(choice.job, end)
        if choice.finish_reason is not None and not params.include_usage:
            body["system_fingerprint"] = self._fingerprint
        return _event(body)

    def closing(self, job: Job) -> list[bytes]:
        """The end of a stream: the usage, where asked for, and [DONE]."""
        if not job.params.include_usage:
            return [DONE]
        output = sum(choice.sent_tokens for choice in job.choices)
        usage: dict[str, Any] = {
            "prompt_tokens": job.prompt_tokens,
            "total_tokens": job.prompt_tokens + output,
            "completion_tokens": output,
        }
        if self._details:
            usage["prompt_tokens_details"] = {"cached_tokens": job.cached_tokens}
            if job.params.chat:
                usage["prompt_tokens_details"]["created_cache_tokens"] = 0
        body = self._chunk_head(job)
        return [_event(body | {"choices": [], "usage": usage, "system_fingerprint": self._fingerprint}), DONE]

    def _plain_head(self, choice: Choice) -> bytes:
        head = choice.stream_head
        if not head:
            body = self._chunk_head(choice.job)
            delta = b'"delta":{"content":"' if choice.job.params.chat else b'"text":"'
            start = b"data: " + orjson.dumps(body)[:-1]
            head = choice.stream_head = start + b',"choices":[{"index":%d,%b' % (choice.index, delta)
        return head

    def _chunk_head(self, job: Job) -> dict[str, Any]:
        kind = "chat.completion.chunk" if job.params.chat else "text_completion"
        return {"id": job.id, "object": kind, "created": job.created, "model": job.params.model}

    def _running_usage(self, job: Job, output: int) -> dict[str, Any]:
        prompt = len(job.params.prompts[0])
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + output,
            "completion_tokens": output,
            "completion_tokens_details": None,
        }

    # -- whole answers

    def whole(self, job: Job) -> bytes:
        """The answer of a request that did not ask for a stream."""
        if job.params.embedding is not None:
            return self._embeddings(job)
        chat = job.params.chat
        body: dict[str, Any] = {
            "id": job.id,
            "object": "chat.completion" if chat else "text_completion",
            "created": job.created,
            "model": job.params.model,
            "choices": [
                self._chat_choice(choice) if chat else self._completion_choice(choice) for choice in job.choices
            ],
            "service_tier": None,
            "system_fingerprint": self._fingerprint,
            "usage": self._usage(job),
        }
        if chat:
            ids = job.params.prompts[0].tolist() if job.params.return_token_ids else None
            body |= {"prompt_logprobs": None, "prompt_token_ids": ids, "prompt_text": None}
        transfer = self._transfer_params(job) if job.params.remote_decode else None
        return orjson.dumps(body | {"kv_transfer_params": transfer, "ec_transfer_params": None, "metrics": None})

    def _transfer_params(self, job: Job) -> dict[str, Any]:
        """What the router hands to the engine that decodes. Where the blocks lie matters to real engines only."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [],
            "remote_engine_id": self._fingerprint,
            "remote_request_id": job.id,
            "remote_host": None,
            "remote_port": None,
            "tp_size": 1,
        }

    def _chat_choice(self, choice: Choice) -> dict[str, Any]:
        count = choice.sent_tokens
        message = {"role": "assistant", "content": choice.text_of(0, count), "refusal": None, "annotations": None}
        message |= {"audio": None, "function_call": None, "reasoning": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice, 0, count) if choice.job.params.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.output[:count].tolist() if choice.job.params.return_token_ids else None,
            "routed_experts": None,
        }

    def _completion_choice(self, choice: Choice) -> dict[str, Any]:
        params, count = choice.job.params, choice.sent_tokens
        prompt = choice.tokens[: choice.prompt_tokens]
        echoed = self._tokenizer.decode(prompt) if params.echo else ""
        logprobs = self._logprobs(choice, 0, count) if params.logprobs is not None else None
        return {
            "index": choice.index,
            "text": echoed + choice.text_of(0, count),
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.output[:count].tolist() if params.return_token_ids else None,
            "prompt_logprobs": self._prompt_logprobs(choice) if params.echo and logprobs else None,
            "prompt_token_ids": prompt.tolist() if params.return_token_ids else None,
            "routed_experts": None,
        }

    def _usage(self, job: Job) -> dict[str, Any]:
        output = sum(choice.sent_tokens for choice in job.choices)
        details = {
            "cached_tokens": job.cached_tokens,
            "created_cache_tokens": 0 if job.params.chat else None,
            "multimodal_tokens": None,
        }
        return {
            "prompt_tokens": job.prompt_tokens,
            "total_tokens": job.prompt_tokens + output,
            "completion_tokens": output,
            "prompt_tokens_details": details if self._details else None,
            "completion_tokens_details": None,
        }

    def _embeddings(self, job: Job) -> bytes:
        """A unit vector for each prompt, drawn from the prompt's hash."""
        data: list[dict[str, Any]] = []
        for index, prompt in enumerate(job.params.prompts):
            drawn = draw_words(xxhash.xxh3_64_intdigest(prompt.tobytes()), EMBEDDING_SIZE, 2**20)
            vector = (drawn / 2**19 - 1.0).astype("<f4")
            vector /= np.linalg.norm(vector)
            base64 = job.params.embedding == "base64"
            value = b64encode(vector.tobytes()).decode() if base64 else vector.tolist()
            data.append({"index": index, "object": "embedding", "embedding": value})
        usage = {"prompt_tokens": job.prompt_tokens, "total_tokens": job.prompt_tokens, "completion_tokens": 0}
        usage_all = usage | {"prompt_tokens_details": None}
        body = {"id": job.id, "object": "list", "created": job.created, "model": job.params.model}
        return orjson.dumps(body | {"data": data, "usage": usage_all})

    # -- log probabilities

    def _logprobs(self, choice: Choice, start: int, end: int) -> dict[str, Any]:
        """Of output tokens [start, end), in the chat's or the completion's shape. Alternatives: the vocabulary's first words."""
        count = choice.job.params.logprobs or 0
        texts = [choice.text_of(index, index + 1) for index in range(start, end)]
        others = [[word for word in self._tokenizer.words[: count + 1] if word != text] for text in texts]
        if choice.job.params.chat:
            tops = [[text, *other][:count] for text, other in zip(texts, others, strict=True)]
            return {
                "content": [
                    _chat_logprob(text) | {"top_logprobs": [_chat_logprob(one) for one in top]}
                    for text, top in zip(texts, tops, strict=True)
                ]
            }
        offsets = [choice.ends[index - 1] if index else 0 for index in range(start, end)]
        tops = [[text, *other[:count]] for text, other in zip(texts, others, strict=True)]
        result: dict[str, list[Any]] = {
            "text_offset": offsets,
            "token_logprobs": [LOGPROB] * len(texts),
            "tokens": texts,
            "top_logprobs": [dict.fromkeys(top, LOGPROB) for top in tops],
        }
        if choice.job.params.echo and start == 0:
            return self._with_prompt(choice, result)
        return result

    def _with_prompt(self, choice: Choice, output: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """An echoed prompt's tokens come first; the very first has no probability."""
        texts = self._tokenizer.strings(choice.tokens[: choice.prompt_tokens])
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        shift = offsets.pop()
        return {
            "text_offset": offsets + [offset + shift for offset in output["text_offset"]],
            "token_logprobs": [None] + [LOGPROB] * (len(texts) - 1) + output["token_logprobs"],
            "tokens": texts + output["tokens"],
            "top_logprobs": [None, *({text: LOGPROB} for text in texts[1:]), *output["top_logprobs"]],
        }

    def _prompt_logprobs(self, choice: Choice) -> list[dict[str, Any] | None]:
        prompt = choice.tokens[: choice.prompt_tokens]
        texts = self._tokenizer.strings(prompt)
        known = zip(prompt.tolist(), texts, strict=True)
        rows: list[dict[str, Any] | None] = [
            {str(token): {"logprob": LOGPROB, "rank": 1, "decoded_token": text}} for token, text in known
        ]
        return [None, *rows[1:]]


_CHAT_TAIL: Final = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
_COMPLETION_TAIL: Final = (
    b'","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _chat_logprob(text: str) -> dict[str, Any]:
    return {"token": text, "logprob": LOGPROB, "bytes": list(text.encode())}
