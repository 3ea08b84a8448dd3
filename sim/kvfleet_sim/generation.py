"""What an answer will be: the simulated model's words, decided when the request comes in.

A `Job` is one HTTP request, a `Choice` one sequence of it (n, or a batch of prompts). The words follow from the prompt's text,
the seeds and the choice's index alone, and from the words before them only as text: a prompt that ends with the beginning of
an answer goes on as that answer did. Since they are known at once, so are the keys of the blocks they will fill and the
place where a stop string ends them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import xxhash

from kvfleet_sim.http import Exchange
from kvfleet_sim.openai import Generate
from kvfleet_sim.request import Request
from kvfleet_sim.tokens import Continuation, Tokenizer, Tokens, block_keys, root_key


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence: `request` is what the engine runs, and its `payload` is this."""

    job: Job
    index: int
    tokens: Tokens
    """Prompt and output."""
    prompt_tokens: int
    text: str
    """The whole output, cut before a stop string."""
    ends: list[int]
    """Where the text of output token i ends."""
    stop_reason: str | int | None
    request: Request
    seen_tokens: int = 0
    """Output tokens there are for the client to see."""
    sent_tokens: int = 0
    """Of them, what was written to its stream."""
    finish_reason: str | None = None
    last_token_s: float = 0.0
    stream_head: bytes = b""
    """What every plain chunk of its stream begins with."""

    @property
    def output(self) -> Tokens:
        return self.tokens[self.prompt_tokens :]

    def text_of(self, start: int, end: int) -> str:
        """The text of output tokens [start, end)."""
        return self.text[self.ends[start - 1] if start else 0 : self.ends[end - 1] if end else 0]


@dataclass(slots=True, eq=False)
class Job:
    """One request for text and its connection."""

    id: str
    params: Generate
    exchange: Exchange
    created: int = field(default_factory=lambda: int(time.time()))
    choices: list[Choice] = field(default_factory=list)
    unfinished: int = 0
    opened: bool = False
    """Whether its stream has begun."""

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.params.prompts)

    @property
    def cached_tokens(self) -> int:
        """Of the first choice of each prompt; what another engine sent counts as cached, as in vLLM."""
        requests = [choice.request for choice in self.choices[:: self.params.n]]
        return sum(request.cached_tokens + request.received_tokens for request in requests)


class Writer:
    """Writes the outputs of one worker's model."""

    def __init__(self, tokenizer: Tokenizer, block_tokens: int, seed: int) -> None:
        self.tokenizer = tokenizer
        self._block_tokens = block_tokens
        self._seed = seed
        self._words = tokenizer.words
        self._ids = tokenizer.word_ids
        self._lengths = np.array([len(word) for word in tokenizer.words])
        self._continuation = Continuation(tokenizer.words)

    def add_choices(self, job: Job, lora: str | None) -> None:
        """Fill `job.choices`."""
        params = job.params
        root = root_key(lora, params.cache_salt)
        for prompt in params.prompts:
            text = self.tokenizer.decode(prompt)
            for _ in range(params.n):
                job.choices.append(self._choice(job, len(job.choices), prompt, text, root, lora))
        job.unfinished = len(job.choices)

    def _choice(self, job: Job, index: int, prompt: Tokens, before: str, root: int, lora: str | None) -> Choice:
        params = job.params
        key = xxhash.xxh3_64_intdigest(f"{self._seed}:{params.seed}:{index % params.n}".encode(), root)
        drawn = self._continuation.draw(key, before, params.max_tokens)
        text = "".join([self._words[word] for word in drawn.tolist()])
        ends = np.cumsum(self._lengths[drawn]).tolist()
        output = self._ids[drawn]
        count, text, stop_reason = _stopped(params, output, text, ends)
        tokens = np.concatenate([prompt, output[:count]]) if count else prompt
        request = Request(
            id=f"{job.id}-{index}",
            prompt_tokens=len(prompt),
            output_tokens=count,
            block_keys=block_keys(tokens, self._block_tokens, root),
            priority=params.priority,
            lora=lora,
            remote_tokens=len(prompt) if params.remote_prefill else 0,
        )
        choice = Choice(job, index, tokens, len(prompt), text, ends[:count], stop_reason, request)
        request.payload = choice
        return choice


def _stopped(params: Generate, output: Tokens, text: str, ends: list[int]) -> tuple[int, str, str | int | None]:
    """(tokens, text, reason) of an output that ends at the first stop token or stop string, whichever comes first."""
    count, reason = len(output), None
    if params.stop_token_ids:
        found = np.flatnonzero(np.isin(output, params.stop_token_ids))
        if len(found):
            at = int(found[0])
            count, reason = at + 1, int(output[at])
            text = text[: ends[at - 1] if at else 0]  # the stop token's own text is left out
    matches = [(at + len(stop), at, stop) for stop in params.stop if (at := text.find(stop)) >= 0]
    if not matches:
        return count, text, reason
    end, at, stop = min(matches)
    return int(np.searchsorted(ends, end)) + 1, text[:at], stop
