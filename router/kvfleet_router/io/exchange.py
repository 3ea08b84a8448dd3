"""One request's way: parse, submit, send to a worker, pass the answer on; and what happens when something breaks.

    begin ─ read_request ─ dispatcher.submit ─┬─ Refusal ─ answer it
                                              ├─ Held ─ … assigned
                                              └─ Ticket ─ connect or reuse ─ answer_began ─ … ─ answer_complete

Nothing goes to the client before the worker's first body byte. Until then a failure costs the client nothing: a kept-alive
connection that turns out closed is replaced once, and a worker that cannot be reached, resets the connection or answers
that it is shutting down is replaced by another one, as often as the policy's `resilience.retries` says. Complete answers
up to HOLD_BYTES are held to their end, so that one cut off by a dying worker is repeated as well.

Where prompts are computed apart (core/disaggregation.py), a first answer comes from a Prefill worker and is kept here: with
what it hands on, the dispatcher is asked who decodes, and the request goes out a second time.

After the first byte an event stream that breaks gets an error event and `[DONE]`; any other answer is cut off, so that it
cannot be taken for a whole one. Where the policy asks for it, texts go on at another worker instead (resume.py).
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import time
from typing import TYPE_CHECKING, Final

from kvfleet_router.core.parse import ParsedRequest, RequestError, read_request
from kvfleet_router.core.ticket import Held, Refusal, Ticket
from kvfleet_router.io import resume, wire
from kvfleet_router.io.dechunker import Dechunker
from kvfleet_router.io.disaggregation import MAX_ANSWER_BYTES, decode_body, prefill_body, transfer_params
from kvfleet_router.io.hedge import Hedge
from kvfleet_router.io.multipart import form_model
from kvfleet_router.io.tls import CertificateRejected
from kvfleet_router.io.usage import NO_USAGE, SEARCHED_BYTES, read_usage
from kvfleet_router.io.verdict import ABORTED, failure

if TYPE_CHECKING:
    from kvfleet_router.io.connection import ClientConnection
    from kvfleet_router.io.proxy import Proxy
    from kvfleet_router.io.request import Request
    from kvfleet_router.io.resume import ResumableStream
    from kvfleet_router.io.upstream import Origin, UpstreamConnection

log = logging.getLogger("kvfleet.router")

HOLD_BYTES: Final = 262_144
"""Complete answers (and error answers) up to this size are held back until whole."""
EVENT_END = b"\n\n\r\n"
"""How an HTTP chunk ends that ends with a whole event."""

_CLIENT_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_UNREAD = ParsedRequest("other", "")


class Exchange:
    """A request under way. The connection's Answer and the upstream connection's Receiver at once."""

    __slots__ = (
        "connection",
        "done",
        "first_byte_at",
        "handed",
        "hedge",
        "held",
        "parsed",
        "proxy",
        "replaced",
        "request",
        "request_id",
        "resume",
        "seen_at",
        "seen_bytes",
        "started_at",
        "ticket",
        "upstream",
    )

    def __init__(self, proxy: Proxy, request: Request, connection: ClientConnection) -> None:
        self.proxy = proxy
        self.request = request
        self.connection = connection
        self.request_id = b""
        self.parsed = _UNREAD
        self.started_at = proxy.clock()
        self.first_byte_at = 0.0
        self.held: Held | None = None
        self.ticket: Ticket | None = None
        self.upstream: UpstreamConnection | None = None
        self.handed = b""
        """`kv_transfer_params` of the worker that computed the prompt."""
        self.replaced = False
        """A kept-alive connection was found closed and replaced."""
        self.hedge: Hedge | None = None
        """Set where the policy asks for a second try when the first byte is late."""
        self.resume: ResumableStream | None = None
        """Set where the policy asks that the stream goes on when its worker dies, and the request allows it."""
        self.seen_bytes = 0
        self.seen_at = 0.0
        self.done = False

    def begin(self) -> None:
        proxy, request = self.proxy, self.request
        given = request.headers.get(b"x-request-id")
        if given is not None and _CLIENT_REQUEST_ID.fullmatch(given):
            self.request_id = given
        else:
            self.request_id = proxy.new_request_id()
        started = time.perf_counter()
        try:
            parsed = read_request(
                request.path,
                request.body,
                request.headers,
                max_body_bytes=self.connection.server.max_body_bytes,
            )
            if not parsed.model:
                parsed.model = form_model(request.body, request.headers.get(b"content-type", b"")) or ""
        except RequestError as error:
            self._end("refused", error.code or "bad_request")
            body = wire.error_object(error.status, error.message, kind=error.type, param=error.param, code=error.code)
            self._reply(error.status, body)
            return
        self.parsed = parsed
        outcome = proxy.dispatcher.submit(parsed, request_id=self.request_id.decode(), on_assigned=self.assigned)
        proxy.metrics.decision.observe(time.perf_counter() - started)
        self.take(outcome)

    def assigned(self, outcome: Ticket | Refusal) -> None:
        """The dispatcher decided on what it had held."""
        if self.ticket is None and isinstance(outcome, Ticket) and outcome.arrival.decision.deferred_s:
            self.started_at += outcome.arrival.decision.deferred_s  # latencies are those of a request that came then
        self.held = None
        self.take(outcome)

    def take(self, outcome: Ticket | Refusal | Held) -> None:
        if isinstance(outcome, Ticket):
            self._send(outcome)
        elif isinstance(outcome, Refusal):
            self._refuse(outcome)
        else:
            self.held = outcome
            self.proxy.request_tick()

    # To the worker

    def _send(self, ticket: Ticket) -> None:
        lane = ticket.arrival.lane
        if self.ticket is None and lane.resumes and self.parsed.stream and not self.request.http10:
            self.resume = resume.resumable(self.request.path, self.parsed, self.request.body)
        if self.ticket is None and lane.hedge_after_ms is not None:
            self.hedge = Hedge(self, lane.hedge_after_ms / 1000)
        self.ticket = ticket
        origin = self.proxy.upstreams.origin(ticket.worker)
        upstream = None if self.replaced else origin.take_idle()
        if upstream is None:
            self.proxy.spawn(self._connect(origin, ticket))
        else:
            self.write(upstream, ticket)

    async def _connect(self, origin: Origin, ticket: Ticket) -> None:
        timeout_s = ticket.policy.resilience.connect_timeout_milliseconds / 1000
        try:
            async with asyncio.timeout(timeout_s):
                upstream = await origin.connect()
        except TimeoutError:
            cause = "connect_timeout"
        except (ssl.SSLError, CertificateRejected) as error:
            cause = f"connect_failed: {error}"
        except (OSError, ValueError):  # a ValueError: a host name that is none
            cause = "connect_failed"
        else:
            if self.done or self.ticket is not ticket:
                origin.keep(upstream)
            else:
                self.write(upstream, ticket)
            return
        if not self.done and self.ticket is ticket:
            self.try_again(cause)

    def write(self, upstream: UpstreamConnection, ticket: Ticket) -> None:
        self.upstream = upstream
        self.seen_bytes = 0
        self.seen_at = self.proxy.upstreams.now
        upstream.send(self, ticket, *self.request_bytes(upstream, ticket))

    def request_bytes(self, upstream: UpstreamConnection, ticket: Ticket) -> tuple[bytes, bytes]:
        """Head and body for this worker."""
        request = self.request
        body = request.body if self.resume is None else self.resume.resumption.body()
        if ticket.hands_on:
            body = prefill_body(body, chat=self.parsed.kind == "chat")
        elif ticket.arrival.received_tokens:
            body = decode_body(body, self.handed)
        head = b"".join(
            (
                b"POST ",
                request.target,
                upstream.origin.host_header,
                b"%d\r\nx-request-id: " % len(body),
                self.request_id,
                b"\r\n",
                *request.forward,
                b"\r\n",
            )
        )
        return head, body

    # From the worker

    def answer_began(self) -> None:
        upstream, ticket = self.upstream, self.ticket
        assert upstream is not None and ticket is not None
        if ticket.hands_on and upstream.status < 300:
            if upstream.held_bytes > MAX_ANSWER_BYTES:
                self.upstream = None
                upstream.abort()
                self.try_again("bad_response: too long an answer of a Prefill worker")
            return
        if upstream.held_bytes <= HOLD_BYTES:
            if upstream.status >= 500:
                return
            if upstream.event_stream:
                if self._another_may_do(upstream):
                    return
            elif upstream.body_length is not None and upstream.body_length <= HOLD_BYTES:
                return
        self._release(upstream)

    def answer_complete(self) -> None:
        upstream, ticket = self.upstream, self.ticket
        assert upstream is not None and ticket is not None
        if upstream.forward is None:
            if self._another_may_do(upstream):
                return
            if ticket.hands_on and upstream.status < 300:
                self._hand_on(upstream, ticket)
                return
            self._release(upstream)
            if self.done:
                return
        if self.resume is not None and not resume.ended_well(self, self.resume, upstream, ticket):
            return
        self._finish(upstream, ticket)

    def _hand_on(self, upstream: UpstreamConnection, ticket: Ticket) -> None:
        """The prompt is computed: go on where it is to be decoded."""
        body = upstream.held_body()
        if upstream.chunked:
            pieces: list[bytes] = []
            Dechunker(pieces.append).feed(body)
            body = b"".join(pieces)
        usage = read_usage(body[-SEARCHED_BYTES:])
        self.handed = transfer_params(body)
        self.upstream = None
        upstream.detach()
        self.proxy.metrics.handed_on(ticket, bool(self.handed))
        if not self.handed:
            log.warning("worker %s: no kv_transfer_params: is it started with a KV connector?", ticket.worker.name)
        self.take(
            self.proxy.dispatcher.prefilled(
                ticket,
                self.assigned,
                handed=bool(self.handed),
                prompt_tokens=usage.prompt,
                cached_tokens=usage.cached,
            )
        )

    def _another_may_do(self, upstream: UpstreamConnection) -> bool:
        """Whether what came, of which nothing has gone out, was given up and the request sent to another worker."""
        cause = failure(upstream.status, upstream.event_stream, upstream.held_body())
        if not cause or not self.may_try_again():
            return False
        self.upstream = None
        if upstream.complete:
            upstream.detach()
        else:
            upstream.abort()
        self.try_again(cause)
        return True

    def _release(self, upstream: UpstreamConnection) -> None:
        """The worker answers: pass its answer on from here."""
        proxy, connection, ticket = self.proxy, self.connection, self.ticket
        assert ticket is not None
        if self.hedge is not None:
            self.hedge.cancel()
            self.hedge = None
        if upstream.status < 300:
            proxy.dispatcher.first_token(ticket)
        if self.resume is not None:
            if self.resume.started:
                resume.go_on(self, self.resume, upstream, ticket)
                return
            if not self.resume.fits(upstream):
                self.resume = None
        self.first_byte_at = proxy.clock()
        if self.resume is None:
            connection.release_body()
        head = b"".join(
            (
                wire.status_line(upstream.status),
                *upstream.lines,
                b"x-request-id: ",
                self.request_id,
                upstream.origin.answer_header,
                ticket.id.encode(),
                b"\r\n",
                b"" if ticket.worker.ledger is None else self._joules_header(upstream, ticket),
                connection.connection_header(self._keeps_alive(upstream)),
                b"\r\n",
            )
        )
        transport = connection.transport
        if self.resume is not None:
            self.resume.follow(upstream, transport, head)
        elif self.request.http10 and upstream.chunked:
            transport.write(head.replace(b"transfer-encoding: chunked\r\n", b"", 1))
            upstream.release(Dechunker(transport.write).feed, b"")
        else:
            upstream.release(transport.write, head)

    def _joules_header(self, upstream: UpstreamConnection, ticket: Ticket) -> bytes:
        """What the answer took: known only where it is here to its end."""
        if not upstream.complete or upstream.event_stream or upstream.status >= 300:
            return b""
        tokens = read_usage(upstream.held_body()[-SEARCHED_BYTES:]).output
        joules = self.proxy.dispatcher.joules_so_far(ticket, tokens)
        return b"" if joules is None else wire.header(b"x-kvfleet-energy-joules", f"{joules:.3f}")

    def _keeps_alive(self, upstream: UpstreamConnection) -> bool:
        request = self.request
        if not request.keep_alive or upstream.until_close or self.connection.server.draining:
            return False
        return not (request.http10 and upstream.chunked)

    def _finish(self, upstream: UpstreamConnection, ticket: Ticket) -> None:
        parsed, proxy = self.parsed, self.proxy
        if upstream.chunked:
            ticket.chunks -= 1  # the empty one that ends the body
        end = b"".join(upstream.tail)[-SEARCHED_BYTES:]
        if self.resume is not None:
            usage = self.resume.usage()
        else:
            usage = read_usage(end) if parsed.include_usage or not parsed.stream else NO_USAGE
        failed = upstream.status >= 500
        if ABORTED in end:
            failed = True
            proxy.metrics.error("engine_aborted")
        proxy.dispatcher.finish(
            ticket, output_tokens=usage.output, prompt_tokens=usage.prompt, cached_tokens=usage.cached, ok=not failed
        )
        self.done = True
        self.upstream = None
        outcome = "failed" if failed else "ok" if upstream.status < 400 else "client_error"
        proxy.metrics.answered(self, ticket, outcome, usage, proxy.clock())
        keep_alive = upstream.clean and self._keeps_alive(upstream)
        upstream.detach()
        self.connection.answered(keep_alive)

    # What breaks

    def answer_lost(self, cause: str) -> None:
        upstream, ticket = self.upstream, self.ticket
        assert upstream is not None and ticket is not None
        self.upstream = None
        if upstream.forward is not None:
            self.break_off(upstream, ticket, cause)
        elif upstream.reused and not upstream.received and not self.replaced:
            self.replaced = True
            self._send(ticket)
        else:
            self.try_again(cause)

    def may_try_again(self) -> bool:
        ticket = self.ticket
        if self.hedge is not None and self.hedge.ticket is not None:
            return True
        if ticket is None or ticket.attempt >= ticket.policy.resilience.retries:
            return False
        allowed = self.proxy.dispatcher.may_retry(ticket)
        if not allowed:
            self.proxy.metrics.error("retry_budget")
        return allowed

    def try_again(self, cause: str) -> None:
        """Nothing has gone to the client: another worker may do."""
        ticket = self.ticket
        assert ticket is not None
        cause, _, detail = cause.partition(": ")
        self.proxy.metrics.error(cause)
        detail = f" ({detail})" if detail else ""
        log.warning("worker %s: %s%s, request %s", ticket.worker.name, cause, detail, self.request_id.decode())
        if self.hedge is not None and self.hedge.take_over(cause):
            return
        if self.may_try_again():
            self.proxy.metrics.retried(ticket, cause)
            self.take(self.proxy.dispatcher.retry(ticket, cause, self.assigned))
            return
        if cause.startswith("connect"):
            self.give_up(ticket, cause, 503, "no_worker_available", "No worker could be reached: try again.")
        else:
            self.give_up(ticket, cause, 502, "upstream_failed", "The worker failed before it answered: try again.")

    def give_up(self, ticket: Ticket, cause: str, status: int, code: str, message: str) -> None:
        self.proxy.dispatcher.finish(ticket, ok=False)
        self._end("failed", cause)
        self._reply(status, wire.error_object(status, message, code=code), retry_after_s=1)

    def break_off(self, upstream: UpstreamConnection, ticket: Ticket, cause: str) -> None:
        """The worker failed inside its answer."""
        cause = cause.partition(": ")[0]
        log.warning("worker %s: %s inside an answer, request %s", ticket.worker.name, cause, self.request_id.decode())
        self.proxy.metrics.error(cause)
        if self.resume is not None:
            resume.broken_off(self, self.resume, ticket, cause)
            return
        self.proxy.dispatcher.finish(ticket, ok=False)
        self._end("failed", cause)
        transport = self.connection.transport
        if upstream.until_close:
            self.connection.abort()
            return
        events = upstream.event_stream and upstream.chunked and not self.request.http10
        if events and b"".join(upstream.tail).endswith(EVENT_END):
            transport.write(wire.error_event(wire.BROKEN, "upstream_failed"))
        self.connection.answered(keep_alive=False)

    def _refuse(self, refusal: Refusal) -> None:
        if self.resume is not None and self.resume.started:
            self._end("failed", refusal.code)
        else:
            self._end("refused", refusal.code)
        body = wire.error_object(
            refusal.status, refusal.message, kind=refusal.type, param=refusal.param, code=refusal.code
        )
        self._reply(refusal.status, body, retry_after_s=refusal.retry_after_s)

    def _reply(self, status: int, body: bytes, *, retry_after_s: int | None = None) -> None:
        if self.resume is not None and self.resume.started:
            self.connection.transport.write(wire.closing_event(body))
            self.connection.answered(keep_alive=False)
            return
        headers = [b"x-request-id: %b\r\n" % self.request_id]
        if self.ticket is not None:
            headers.append(wire.header(b"x-kvfleet-decision", self.ticket.id))
        if retry_after_s is not None:
            headers.append(wire.header(b"retry-after", retry_after_s))
        self.connection.reply(status, body, headers=headers)

    def _end(self, outcome: str, cause: str) -> None:
        self.done = True
        if self.hedge is not None:
            self.hedge.cancel()
            self.hedge = None
        self.proxy.metrics.ended(self, outcome, cause)

    # The client's connection calls

    def client_gone(self) -> None:
        if self.done:
            return
        self._end("cancelled", "client_gone")
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.abort()
        if self.held is not None:
            self.proxy.dispatcher.cancel(self.held)
        elif self.ticket is not None:
            self.proxy.dispatcher.abandon(self.ticket, "client_gone")

    def client_paused(self) -> None:
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.upstream.transport.pause_reading()

    def client_resumed(self) -> None:
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.seen_at = self.proxy.upstreams.now
            self.upstream.transport.resume_reading()

    def sweep(self, now: float) -> None:
        """The policy's time limit for the first byte and between two."""
        upstream, ticket = self.upstream, self.ticket
        if upstream is None or ticket is None:
            return
        if upstream.received != self.seen_bytes or self.connection.write_paused:
            self.seen_bytes = upstream.received
            self.seen_at = now
            return
        resilience, waited_s = ticket.policy.resilience, now - self.seen_at
        first_byte_s = resilience.first_byte_timeout_seconds
        if waited_s > resilience.timeout_seconds:
            self.upstream = None
            broken_off = upstream.forward is not None
            upstream.abort()
            if broken_off:
                self.break_off(upstream, ticket, "idle_timeout")
            else:
                self.give_up(
                    ticket, "first_byte_timeout", 504, "upstream_timeout", "The worker did not answer in time."
                )
        elif (
            first_byte_s is not None
            and waited_s > first_byte_s
            and self.parsed.stream
            and not upstream.received
            and self.may_try_again()
        ):
            self.upstream = None
            upstream.abort()
            self.try_again("first_byte_timeout")
