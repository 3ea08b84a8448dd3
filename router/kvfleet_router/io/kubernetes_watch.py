"""One collection of the API server, kept up to date: list it, then watch it, for ever.

    list ──► objects, and the version of the whole ──► watch from that version ──► one line of JSON per change
      ▲                                                   │ the server ends it every few minutes: watch on from the last version
      └── the version is too old for the server (410), or something came that cannot be understood

Any failure is followed by a pause, which grows from failure to failure and is drawn at random, so that routers that lost an
API server together do not come back together. What was last known stays: losing the server changes nothing but `Contact`.

A watch may fall silent in two ways. The other side vanishes: the kernel's keep-alive ends the connection. Or something in
between keeps it open and passes nothing on: API servers send a bookmark about every minute, so a longer silence is a failure.

Objects are decoded straight into the few fields that are used (msgspec), and sizes are limited before anything is decoded.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import httpx
import msgspec

from kvfleet_router.io.kubernetes_access import Access

log = logging.getLogger("kvfleet.router")

MAX_EVENT_BYTES = 8 * 1_048_576
"""The API server itself stores objects of at most 1.5 MiB; JSON text in them is escaped once more."""
MAX_PAGE_BYTES = 64 * 1_048_576
MAX_REFUSAL_BYTES = 1_048_576
MAX_OBJECTS = 10_000
PAGE_OBJECTS = 100
MAX_REASON_CHARS = 300
RELIST_AFTER = 3
"""Failures in a row after which the version itself is in doubt, such as one of a server that was restored from a copy."""


@dataclass(frozen=True)
class Timings:
    """Seconds."""

    connect_s: float = 5.0
    list_s: float = 30.0
    """A list's longest silence."""
    stalled_s: float = 90.0
    """A watch's longest silence."""
    watch_s: tuple[float, float] = (240.0, 300.0)
    """The server is asked to end a watch after a time between these."""
    brief_s: float = 1.0
    """A watch that ends sooner without a change has failed."""
    backoff_s: tuple[float, float] = (0.1, 5.0)
    """First and longest pause after a failure."""


class Metadata(msgspec.Struct):
    name: str = ""
    resource_version: str = msgspec.field(default="", name="resourceVersion")
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class KubernetesObject(Protocol):
    @property
    def metadata(self) -> Metadata: ...


T = TypeVar("T", bound=KubernetesObject)


class _PageMetadata(msgspec.Struct):
    resource_version: str = msgspec.field(default="", name="resourceVersion")
    next_page: str | None = msgspec.field(default=None, name="continue")


class _Page(msgspec.Struct):
    metadata: _PageMetadata
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Bookmark(msgspec.Struct):
    metadata: Metadata


class _Status(msgspec.Struct):
    code: int = 0
    reason: str = ""
    message: str = ""


class Failure(Exception):
    """A try ended without result. `cause` is a metric's label."""

    def __init__(self, cause: str, reason: str, *, retry_after_s: float = 0.0, status: int = 0) -> None:
        super().__init__(reason)
        self.cause = cause
        self.retry_after_s = retry_after_s
        self.status = status
        """Of the server's answer; 0: there was none."""


class Outdated(Failure):
    """The version watched from is no longer known: list again."""


@dataclass
class Contact:
    """How things stand with the API server about one kind of object."""

    connected: bool = False
    last_at: float | None = None
    """time.monotonic() when it last said something."""
    reason: str = "not asked yet"
    """Why it is not connected."""
    lists: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """By cause."""

    def heard(self) -> None:
        self.last_at = time.monotonic()

    def made(self) -> None:
        self.heard()
        self.connected = True
        self.reason = ""

    def lost(self, cause: str, reason: str) -> None:
        self.connected = False
        self.reason = reason
        self.failures[cause] = self.failures.get(cause, 0) + 1


class Reflector(Generic[T]):
    """See the module's text. `objects` is by name; `synced` once it was listed."""

    def __init__(
        self,
        access: Access,
        path: str,
        kind: type[T],
        selector: Mapping[str, str],
        contact: Contact,
        *,
        on_change: Callable[[Sequence[T] | None], None],
        on_failure: Callable[[], None] = lambda: None,
        timings: Timings = Timings(),
        rng: random.Random,
    ) -> None:
        """`on_change` is called with what changed, before and after, or None: anything may; `on_failure` after a failed try."""
        self.objects: dict[str, T] = {}
        self.synced = False
        self._access = access
        self._path = path
        self._decoder = msgspec.json.Decoder(kind)
        self._selector = dict(selector)
        self._contact = contact
        self._on_change = on_change
        self._on_failure = on_failure
        self._timings = timings
        self._rng = rng
        self._version = ""
        self._failures = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._follow()
            except Exception as error:
                await asyncio.sleep(self._failed(as_failure(error)))

    async def _follow(self) -> None:
        timings = self._timings
        client = self._access.client(connect_timeout_s=timings.connect_s, read_timeout_s=timings.list_s)
        async with client:
            if not self._version:
                await self._list(client)
            while True:
                await self._watch(client)

    def _failed(self, failure: Failure) -> float:
        """Note it; returns how long to pause."""
        reason = str(failure)[:MAX_REASON_CHARS]
        if reason != self._contact.reason:
            log.warning("watching %s: %s; what is known stays in use", self._path, reason)
        if isinstance(failure, Outdated) or self._failures >= RELIST_AFTER:
            self._version = ""
        self._contact.lost(failure.cause, reason)
        self._on_failure()
        first_s, longest_s = self._timings.backoff_s
        pause_s: float = min(longest_s, first_s * 2.0 ** min(self._failures, 30)) * self._rng.uniform(0.5, 1.0)
        self._failures += 1
        return max(pause_s, min(failure.retry_after_s, 6 * longest_s))

    def _made_contact(self) -> None:
        if not self._contact.connected:
            log.info("watching %s", self._path)
        self._contact.made()

    # Listing

    async def _list(self, client: httpx.AsyncClient) -> None:
        objects: dict[str, T] = {}
        query = {**self._selector, "limit": str(PAGE_OBJECTS)}
        while True:
            async with client.stream("GET", self._path, params=query, headers=self._access.headers()) as response:
                await check_answer(response)
                page = msgspec.json.decode(await whole_body(response, MAX_PAGE_BYTES), type=_Page)
            self._contact.heard()
            for raw in page.items or ():
                item = self._decoder.decode(raw)
                objects[item.metadata.name] = item
            if len(objects) > MAX_OBJECTS:
                raise Failure("bad_answer", f"more than {MAX_OBJECTS} objects")
            if not page.metadata.next_page:
                break
            query["continue"] = page.metadata.next_page
        if not page.metadata.resource_version:
            raise Failure("bad_answer", "a list without resourceVersion")
        self.objects = objects
        self.synced = True
        self._contact.lists += 1
        self._made_contact()
        self._version = page.metadata.resource_version
        self._on_change(None)

    # Watching

    async def _watch(self, client: httpx.AsyncClient) -> None:
        """Until the server ends it in good order. Raises Failure and what httpx raises otherwise."""
        timings = self._timings
        query = {
            **self._selector,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(max(1, round(self._rng.uniform(*timings.watch_s)))),
        }
        timeout = httpx.Timeout(timings.connect_s, read=timings.stalled_s)
        began, events = time.monotonic(), 0
        request = client.stream("GET", self._path, params=query, headers=self._access.headers(), timeout=timeout)
        async with request as response:
            await check_answer(response)
            self._made_contact()
            lines = Lines(MAX_EVENT_BYTES)
            async for piece in response.aiter_raw():
                self._contact.heard()
                for line in lines.feed(piece):
                    self._take(msgspec.json.decode(line, type=_Event))
                    events += 1
                    self._failures = 0
        if not events and time.monotonic() - began < timings.brief_s:
            raise Failure("closed", "the server closed the watch at once")
        self._failures = 0

    def _take(self, event: _Event) -> None:
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=_Status)
            raise _refusal(status.code, status.message or status.reason)
        if event.type == "BOOKMARK":
            self._version = msgspec.json.decode(event.object, type=_Bookmark).metadata.resource_version or self._version
            return
        item = self._decoder.decode(event.object)
        name = item.metadata.name
        before = self.objects.pop(name, None)
        if event.type in ("ADDED", "MODIFIED"):
            self.objects[name] = item
        elif event.type != "DELETED":
            raise Outdated("bad_answer", f"an event of the unknown type {event.type[:40]!r}")
        if len(self.objects) > MAX_OBJECTS:
            raise Outdated("bad_answer", f"more than {MAX_OBJECTS} objects")
        self._version = item.metadata.resource_version
        self._on_change([item] if before is None else [before, item])


def as_failure(error: Exception) -> Failure:
    """What went wrong, in a metric's word. What cannot be understood is asked for anew, from the list on."""
    what = str(error) or type(error).__name__
    match error:
        case Failure():
            return error
        case httpx.ReadTimeout():
            return Failure("stalled", "the server fell silent")
        case httpx.HTTPError() | OSError():
            return Failure("unreachable", what)
        case msgspec.MsgspecError() | RecursionError():
            return Outdated("bad_answer", f"cannot be understood: {what}")
    log.error("watching the API server: an error nobody foresaw", exc_info=error)
    return Outdated("internal", what)


def _refusal(status: int, message: str, retry_after: str = "") -> Failure:
    text = f"{status}: {message}" if message else str(status)
    if status == 410:
        return Outdated("outdated", text)
    if 400 <= status < 500 and status != 429:
        return Failure("refused", text, status=status)
    return Failure("server_error", text, retry_after_s=float(retry_after) if retry_after.isdecimal() else 0.0)


async def check_answer(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    try:
        message = msgspec.json.decode(await whole_body(response, MAX_REFUSAL_BYTES), type=_Status).message
    except msgspec.MsgspecError:
        message = ""
    raise _refusal(response.status_code, message, response.headers.get("retry-after", ""))


async def whole_body(response: httpx.Response, limit_bytes: int) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > limit_bytes:
            raise Failure("bad_answer", f"an answer of more than {limit_bytes} bytes")
    return bytes(body)


class Lines:
    """Cuts what arrives in pieces into lines; the last one, if it never ends, is never given out."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that are now whole. Raises Failure where one grows too long."""
        if b"\n" in piece:
            *lines, rest = bytes(self._buffer + piece).split(b"\n")
            self._buffer[:] = rest
        else:
            lines = []
            self._buffer += piece
        if len(self._buffer) > self._limit_bytes:
            raise Outdated("bad_answer", f"an event of more than {self._limit_bytes} bytes")
        return [line for line in lines if line]
