"""API keys: who may send requests, as which tenant, and how many.

The file (a mounted Secret) has one key a line, hashed: `NAME:SHA256`, where SHA256 is `printf %s "$KEY" | sha256sum`, and behind
it, where wanted, `tenant=T`, `requests-per-minute=N` and `tokens-per-minute=N`. Empty lines and lines that begin with `#` are
skipped. Keys are long and random, so a plain digest is enough, and looking it up tells nobody's key by its timing. A file that
changes is read again; one that cannot be used leaves the old keys in place. Lines with the same NAME share its limits.

A client sends `Authorization: Bearer KEY` or `x-api-key: KEY`. Neither goes on to a worker. The key's tenant (its NAME, unless
the line says) becomes the request's, whatever `x-tenant-id` says. Who is over a limit gets 429 and `Retry-After`
(core/ratelimit.py). /health needs no key.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, Metric

from kvfleet_router.core.ratelimit import Account, Limits, OverLimit
from kvfleet_router.core.shareduse import Used
from kvfleet_router.io import wire
from kvfleet_router.io.connection import ClientConnection
from kvfleet_router.io.files import read_bounded
from kvfleet_router.io.metrics import PREFIX
from kvfleet_router.io.proxy import PROXIED_PATHS
from kvfleet_router.io.request import Request
from kvfleet_router.io.server import Handler

log = logging.getLogger("kvfleet.router")

MAX_FILE_BYTES = 16 * 1_048_576
OPEN_PATHS = frozenset(("/health",))

_LINE = re.compile(r"([!-9;-~]{1,256}):([0-9a-fA-F]{64})((?:\s+[a-z-]+=[!-~]{1,256})*)")
_CREDENTIALS = {b"authorization", b"x-api-key"}
_LIMITS = {"requests-per-minute": "requests_per_minute", "tokens-per-minute": "tokens_per_minute"}
MAX_PER_MINUTE = 10**12


class KeysRejected(Exception):
    """The file holds no usable keys: says the line and the remedy."""


class Entry(NamedTuple):
    """One line of the file."""

    name: str
    tenant: str
    limits: Limits


class ApiKeys:
    """The keys of one file. Raises KeysRejected when it cannot be used at first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._accounts: dict[str, Account] = {}
        self._by_digest: dict[bytes, Account] = {}
        self._changed: set[Account] = set()
        """Used since others were told; with nobody to be told, no more than there are accounts."""
        self._take(_read(path))

    def reload(self) -> None:
        try:
            self._take(_read(self.path))
        except KeysRejected as error:
            log.error("API keys were not taken, the old ones stay: %s", error)

    def account_of(self, key: bytes) -> Account | None:
        """Whose key it is; None: nobody's."""
        return self._by_digest.get(sha256(key).digest())

    def changed_use(self) -> dict[str, Used]:
        """See core/shareduse.py, as for the next."""
        changed = {each.name: (float(each.used_requests), each.used_tokens) for each in self._changed}
        self._changed.clear()
        return changed

    def used_elsewhere(self, name: str, requests: float, tokens: float) -> None:
        account = self._accounts.get(name)
        if account is not None:
            account.used_elsewhere(requests, tokens)

    def metrics(self) -> Iterator[Metric]:
        """By tenant. (A tenant's accounts that left the file are forgotten, and what they had counted.)"""
        requests = CounterMetricFamily(PREFIX + "tenant_requests", "Requests let in, by tenant.", labels=("tenant",))
        tokens = CounterMetricFamily(
            PREFIX + "tenant_tokens", "Tokens used, by tenant and kind.", labels=("tenant", "kind")
        )
        limited = CounterMetricFamily(
            PREFIX + "tenant_limited", "Requests refused at a limit, by tenant and limit.", labels=("tenant", "limit")
        )
        for tenant in sorted({account.tenant for account in self._accounts.values()}):
            accounts = [account for account in self._accounts.values() if account.tenant == tenant]
            requests.add_metric((tenant,), sum(account.requests for account in accounts))
            tokens.add_metric((tenant, "prompt"), sum(account.prompt_tokens for account in accounts))
            tokens.add_metric((tenant, "output"), sum(account.output_tokens for account in accounts))
            limited.add_metric((tenant, "requests"), sum(account.limited_requests for account in accounts))
            limited.add_metric((tenant, "tokens"), sum(account.limited_tokens for account in accounts))
        yield from (requests, tokens, limited)

    def _take(self, entries: dict[bytes, Entry]) -> None:
        """Names that stay keep what they have used."""
        now = time.monotonic()
        accounts: dict[str, Account] = {}
        for name, tenant, limits in entries.values():
            account = accounts[name] = self._accounts.get(name) or Account(name, tenant, limits, now, self._changed)
            account.tenant = tenant
            account.limit(limits, now)
        self._accounts = accounts
        self._changed.intersection_update(accounts.values())
        self._by_digest = {digest: accounts[entry.name] for digest, entry in entries.items()}


class Authenticator:
    """A Handler that lets through who has a key."""

    def __init__(self, behind: Handler, keys: ApiKeys) -> None:
        self._behind = behind
        self._keys = keys

    def handle(self, request: Request, connection: ClientConnection) -> None:
        if request.path not in OPEN_PATHS:
            key = _key(request)
            account = self._keys.account_of(key) if key else None
            if account is None:
                connection.server.refuse("invalid_api_key")
                message = "Incorrect API key provided." if key else "No API key: send `Authorization: Bearer KEY`."
                body = wire.error_object(401, message, code="invalid_api_key")
                connection.reply(401, body, headers=[wire.header(b"www-authenticate", "Bearer")])
                return
            request.headers[b"x-tenant-id"] = account.tenant.encode()
            request.drop(_CREDENTIALS)
            if request.method == b"POST" and request.path in PROXIED_PATHS:
                charge = account.admit(len(request.body), time.monotonic())
                if isinstance(charge, OverLimit):
                    _refuse(account, charge, connection)
                    return
                request.charge = charge
        self._behind.handle(request, connection)


def _refuse(account: Account, over: OverLimit, connection: ClientConnection) -> None:
    connection.server.refuse("rate_limit_exceeded")
    message = (
        f"Rate limit reached for {account.name} on {over.kind} per minute: limit {over.limit}. "
        f"Try again in {over.retry_after_s} s."
    )
    body = wire.error_object(429, message, kind=over.kind, code="rate_limit_exceeded")
    connection.reply(429, body, headers=[wire.header(b"retry-after", over.retry_after_s)])


def _key(request: Request) -> bytes:
    scheme, _, key = request.headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    return request.headers.get(b"x-api-key", b"").strip()


def _read(path: Path) -> dict[bytes, Entry]:
    """By digest."""
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode()
    except OSError as error:
        raise KeysRejected(f"{path}: {error.strerror}: mount the Secret with the keys there") from error
    except ValueError as error:
        raise KeysRejected(f"{path}: {error}") from error
    entries: dict[bytes, Entry] = {}
    by_name: dict[str, Entry] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = _LINE.fullmatch(stripped)
        if match is None:
            raise KeysRejected(
                f"{path}, line {number}: not NAME:SHA256 [tenant=T] [requests-per-minute=N] [tokens-per-minute=N]: "
                'hash a key by `printf %s "$KEY" | sha256sum`'
            )
        try:
            entry = _entry(match[1], match[3])
        except ValueError as error:
            raise KeysRejected(f"{path}, line {number}: {error}") from None
        if by_name.setdefault(entry.name, entry) != entry:
            message = f"{entry.name} has another tenant or other limits above: give all its keys the same"
            raise KeysRejected(f"{path}, line {number}: {message}")
        entries[bytes.fromhex(match[2])] = entry
    if not entries:
        raise KeysRejected(f"{path}: holds no key: add a line NAME:SHA256")
    return entries


def _entry(name: str, options: str) -> Entry:
    """Raises ValueError where an option is unknown, repeated or no number."""
    tenant, limits = name, dict.fromkeys(_LIMITS.values(), 0)
    seen = set()
    for option in options.split():
        key, _, value = option.partition("=")
        if key in seen:
            raise ValueError(f"{key} is there twice: keep one")
        seen.add(key)
        if key == "tenant":
            tenant = value
        elif key not in _LIMITS:
            raise ValueError(f"unknown option {key}: use tenant, {', '.join(_LIMITS)}")
        elif not (value.isascii() and value.isdigit() and 1 <= int(value) <= MAX_PER_MINUTE):
            raise ValueError(f"{key}={value}: give a whole number from 1 to {MAX_PER_MINUTE}")
        else:
            limits[_LIMITS[key]] = int(value)
    return Entry(name, tenant, Limits(*(limits[field] or None for field in Limits._fields)))
