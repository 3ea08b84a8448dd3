"""What one API key may use: requests and tokens a minute, as token buckets. Pure; the time is passed in.

A bucket holds a minute's worth and fills steadily. Requests are taken when they come. Of tokens an estimate is taken when the
request comes (a quarter of its bytes), and corrected by what it really used when it has ended: a key may overdraw by what it has
under way, and then waits until the debt is paid. So no request is ever too large for its limit.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

BYTES_PER_TOKEN = 4
ROUNDING = 1e-6


class Bucket:
    """`per_minute` units, of which as many may be saved up."""

    __slots__ = ("_at", "_level", "per_minute")

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._at = now

    def wait_s(self, now: float, least: float) -> float:
        """Seconds until the bucket holds `least`; 0: it does."""
        self._level = min(self._level + (now - self._at) * self.per_minute / 60.0, self.per_minute)
        self._at = now
        short = least - self._level
        return short * 60.0 / self.per_minute if short > ROUNDING else 0.0

    def take(self, amount: float) -> None:
        """Negative: give back."""
        self._level = min(self._level - amount, self.per_minute)


class Limits(NamedTuple):
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class OverLimit(NamedTuple):
    """A request that has to wait."""

    kind: str
    """requests | tokens"""
    limit: int
    retry_after_s: int


class Account:
    """One key's use."""

    __slots__ = (
        "_changed",
        "_limits",
        "_requests",
        "_tokens",
        "limited_requests",
        "limited_tokens",
        "name",
        "output_tokens",
        "prompt_tokens",
        "requests",
        "tenant",
        "used_requests",
        "used_tokens",
    )

    def __init__(self, name: str, tenant: str, limits: Limits, now: float, changed: set[Account] | None = None) -> None:
        """`changed`: where it puts itself whenever it was used, if it has limits."""
        self._changed = set() if changed is None else changed
        self.used_requests = 0
        self.used_tokens = 0.0
        """As taken from the buckets: of requests under way an estimate."""
        self.name = name
        self.tenant = tenant
        self._limits = Limits()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.requests = self.limited_requests = self.limited_tokens = 0
        self.prompt_tokens = self.output_tokens = 0.0
        self.limit(limits, now)

    def limit(self, limits: Limits, now: float) -> None:
        """These limits from now on; a bucket whose limit stays the same stays as full as it is."""
        if limits.requests_per_minute != self._limits.requests_per_minute:
            self._requests = Bucket(limits.requests_per_minute, now) if limits.requests_per_minute else None
        if limits.tokens_per_minute != self._limits.tokens_per_minute:
            self._tokens = Bucket(limits.tokens_per_minute, now) if limits.tokens_per_minute else None
        self._limits = limits

    def admit(self, body_bytes: int, now: float) -> Charge | OverLimit:
        """A request comes: what it is charged with, to be settled when it has ended; or that it has to wait."""
        if self._requests is not None and (wait_s := self._requests.wait_s(now, 1.0)):
            self.limited_requests += 1
            return OverLimit("requests", int(self._requests.per_minute), max(ceil(wait_s), 1))
        if self._tokens is not None:
            if wait_s := self._tokens.wait_s(now, 1.0):
                self.limited_tokens += 1
                return OverLimit("tokens", int(self._tokens.per_minute), max(ceil(wait_s), 1))
            self._tokens.take(body_bytes / BYTES_PER_TOKEN)
        if self._requests is not None:
            self._requests.take(1.0)
        self.requests += 1
        self._used(1, body_bytes / BYTES_PER_TOKEN)
        return Charge(self, body_bytes / BYTES_PER_TOKEN)

    def settle(self, estimate: float, prompt_tokens: float, output_tokens: float) -> None:
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens
        if self._tokens is not None:
            self._tokens.take(prompt_tokens + output_tokens - estimate)
        self._used(0, prompt_tokens + output_tokens - estimate)

    def used_elsewhere(self, requests: float, tokens: float) -> None:
        """At another replica, under the same limits; of what was missed no more than a minute's worth counts."""
        for bucket, amount in ((self._requests, requests), (self._tokens, tokens)):
            if bucket is not None:
                bucket.take(min(amount, bucket.per_minute))

    def _used(self, requests: int, tokens: float) -> None:
        self.used_requests += requests
        self.used_tokens = max(self.used_tokens + tokens, 0.0)  # rounding
        if self._requests is not None or self._tokens is not None:
            self._changed.add(self)


class Charge(NamedTuple):
    """What an admitted request was charged with."""

    account: Account
    tokens: float

    def settle(self, prompt_tokens: float, output_tokens: float) -> None:
        """The request has ended and used this: to be called once."""
        self.account.settle(self.tokens, prompt_tokens, output_tokens)
