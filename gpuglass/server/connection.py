"""One client connection, from the TLS handshake to the last answer, in a thread of its own.

The thread reads and writes blocking; `Connection.deadline` says until when. Whoever watches the deadlines
calls `expire`, which shuts the socket down under the thread: so one absolute deadline holds for slow
handshakes, requests that drip in, hung renderings and clients that do not read. What clients do wrong goes to
the counters, never to stderr.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol

from gpuglass.family import Tier
from gpuglass.server.auth import Verdict
from gpuglass.server.limits import ServerLimits
from gpuglass.server.reload import InForce, WebConfigSource
from gpuglass.server.request import BadRequest, Head, gzip_accepted, take_head
from gpuglass.server.response import PLAIN_ON_TLS, Response, head_bytes, text
from gpuglass.server.stats import Counters, Reason
from gpuglass.server.tls import san_allowed
from gpuglass.store import Format, negotiate

TIERS: Mapping[str, frozenset[Tier]] = {
    "/metrics/fast": frozenset({Tier.FAST}),
    "/metrics/slow": frozenset({Tier.SLOW}),
    "/metrics": frozenset(Tier),
}
PROBES = frozenset({"/healthz", "/readyz"})
"""Paths that need no authentication."""

GZIP_LEVEL = 1
"""On 200 kB of exposition level 1 takes 0.9 ms for 31 kB, level 6 takes 3.0 ms for 26 kB."""

_CHUNK = 8192
_SMALL = 16 * 1024
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 64 * 1024
_CHALLENGE = ("WWW-Authenticate", 'Basic realm="gpuglass", charset="UTF-8"')
_RETRY = ("Retry-After", "1")
_VARY = ("Vary", "Accept, Accept-Encoding")

log = logging.getLogger("gpuglass.server")


class Exposition(Protocol):
    """What is served; `gpuglass.store.Store` is one."""

    def exposition(self, tiers: frozenset[Tier], fmt: Format) -> bytes:
        """Render all families of `tiers`."""


@dataclass(frozen=True, slots=True)
class Site:
    """What all connections of a server share."""

    store: Exposition
    limits: ServerLimits
    counters: Counters
    source: WebConfigSource
    readiness: Callable[[], str | None]
    landing: Response
    slots: threading.Semaphore
    """One for each scrape that may be in flight."""
    stopping: threading.Event = field(default_factory=threading.Event)


class Connection:
    """Serves the requests of one client. `run` is the thread's body; `expire` is for other threads."""

    def __init__(self, sock: socket.socket, site: Site) -> None:
        self._sock = sock
        self._site = site
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._expired = False
        self._generation = 0
        self.idle = False
        """Waiting for a further request, with nothing half done."""
        # A client connects because it wants something now: the wait for its first byte counts, too.
        self.deadline = time.monotonic() + site.limits.request_seconds
        """When to cut the connection, by the monotonic clock."""

    def expire(self, count: bool = True) -> None:
        """Cut the connection: whatever its thread waits for in the socket ends at once."""
        with self._lock:
            if self._expired:
                return
            self._expired = True
            if count and not self.idle:
                self._site.counters.reject(Reason.DEADLINE)
            with contextlib.suppress(OSError):
                # Not SSLSocket.shutdown: that drops the TLS state, and the thread could go on in plain text.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def run(self) -> None:
        """Serve until the client or the server has had enough, then close. Never raises."""
        try:
            self._serve()
        except OSError:
            self._broken()
        except Exception as error:
            self._site.counters.reject(Reason.ERROR)
            log.exception("a connection failed: %s", type(error).__name__)
        finally:
            with self._lock:
                self._expired = True
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
                self._sock.close()

    def _broken(self) -> None:
        if not self._expired and not self.idle:
            self._site.counters.reject(Reason.INCOMPLETE)

    def _serve(self) -> None:
        limits = self._site.limits
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        in_force = self._site.source.current()
        if in_force.context is not None and not self._secure(in_force, in_force.context):
            return
        try:
            while (head := self._next_head()) is not None:
                if not self._answer(head):
                    self._linger()
                    return
                if self._site.stopping.is_set():
                    return
                self.deadline = time.monotonic() + limits.idle_seconds
        except BadRequest as error:
            self._site.counters.reject(error.reason)
            with contextlib.suppress(OSError):
                self._send(None, text(error.status, error.text), close=True)
                self._linger()

    def _secure(self, in_force: InForce, context: ssl.SSLContext) -> bool:
        """Do the TLS handshake; False if the client was turned away."""
        self._generation = in_force.generation
        try:
            with self._lock:  # wrapping moves the descriptor into another object
                self._sock = sock = context.wrap_socket(
                    self._sock, server_side=True, do_handshake_on_connect=False
                )
            sock.do_handshake()
        except (OSError, ValueError) as error:
            if not self._expired:
                self._site.counters.reject(Reason.TLS)
            if isinstance(error, ssl.SSLError) and error.reason == "HTTP_REQUEST":
                with contextlib.suppress(OSError):
                    socket.socket.sendall(self._sock, PLAIN_ON_TLS)
            return False
        allowed = in_force.tls.client_allowed_sans if in_force.tls else None
        if allowed and not san_allowed(sock.getpeercert(), allowed):
            self._site.counters.reject(Reason.CERTIFICATE)
            return False
        return True

    def _next_head(self) -> Head | None:
        """Wait for a request; None if the client is done. Raises `BadRequest`."""
        limits = self._site.limits
        if not self._buffer:
            self.idle = True
            received = self._sock.recv(_CHUNK)
            if not received:
                return None
            self._buffer += received
        # The deadline moves before the state does: an idle connection that expires in between is not counted.
        self.deadline = time.monotonic() + limits.request_seconds
        self.idle = False
        while (head := take_head(self._buffer, limits.head_bytes, limits.header_fields)) is None:
            received = self._sock.recv(_CHUNK)
            if not received:
                if self._buffer.strip():
                    self._broken()
                self.idle = True
                return None
            self._buffer += received
        return head

    def _answer(self, head: Head) -> bool:
        """Answer one request; False if the connection is to be closed."""
        source, counters = self._site.source, self._site.counters
        in_force = source.current()
        keep = head.keep_alive
        if in_force.context is not None and in_force.generation != self._generation:
            # TLS was set up by an older configuration: the client must connect anew, at once if its
            # certificate might no longer be good.
            if in_force.tls and in_force.tls.client_auth_type.verifies:
                return False
            keep = False
        keep = keep and not head.has_body and not self._site.stopping.is_set()
        response: Response | None = None
        if head.path not in PROBES:
            response = self._gate(head, in_force)
        if response is None and head.method not in ("GET", "HEAD"):
            response = text(
                HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are allowed", ("Allow", "GET, HEAD")
            )
        if response is None and head.has_body:
            counters.reject(Reason.BODY)
            response = text(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "requests must not have a body")
        if response is None and head.path in TIERS:
            return self._scrape(head, in_force, keep)
        self._send(head, response or self._page(head.path), close=not keep, in_force=in_force)
        return keep

    def _gate(self, head: Head, in_force: InForce) -> Response | None:
        """The answer for a client that may not pass, or None."""
        counters = self._site.counters
        if in_force.bucket is not None and not in_force.bucket.take():
            counters.reject(Reason.RATE_LIMIT)
            return text(HTTPStatus.TOO_MANY_REQUESTS, "too many requests", _RETRY)
        if in_force.auth is None:
            return None
        verdict = in_force.auth.check(head.fields.get("authorization", ""), self.deadline - time.monotonic())
        if verdict is Verdict.ACCEPTED:
            return None
        if verdict is Verdict.BUSY:
            counters.reject(Reason.BUSY)
            return text(HTTPStatus.SERVICE_UNAVAILABLE, "too many passwords to check", _RETRY)
        counters.reject(Reason.UNAUTHORIZED)
        return text(HTTPStatus.UNAUTHORIZED, "unauthorized", _CHALLENGE)

    def _page(self, path: str) -> Response:
        if path == "/":
            return self._site.landing
        if path == "/healthz":
            return text(HTTPStatus.OK, "ok")
        if path == "/readyz":
            try:
                reason = self._site.readiness()
            except Exception as error:
                self._site.counters.reject(Reason.ERROR)
                log.exception("the readiness check failed: %s", type(error).__name__)
                reason = "the readiness check failed"
            if reason is None:
                return text(HTTPStatus.OK, "ok")
            return text(HTTPStatus.SERVICE_UNAVAILABLE, " ".join(reason.split())[:300])
        return text(HTTPStatus.NOT_FOUND, "not found")

    def _scrape(self, head: Head, in_force: InForce, keep: bool) -> bool:
        """Render and send metrics, holding a slot for as long as the body is in memory."""
        site = self._site
        if not site.slots.acquire(blocking=False):
            site.counters.reject(Reason.SCRAPES)
            self._send(
                head,
                text(HTTPStatus.SERVICE_UNAVAILABLE, "too many scrapes at once", _RETRY),
                close=not keep,
                in_force=in_force,
            )
            return keep
        site.counters.scraping(+1)
        try:
            started = time.monotonic()
            if head.scrape_timeout is not None:
                self.deadline = min(self.deadline, started + head.scrape_timeout)
            try:
                response = self._render(head)
            except Exception as error:
                site.counters.reject(Reason.ERROR)
                log.exception("%s could not be rendered: %s", head.path, type(error).__name__)
                response = text(HTTPStatus.INTERNAL_SERVER_ERROR, "the metrics could not be rendered")
            ended = time.monotonic()
            site.counters.rendered(head.path, ended - started)
            if ended >= self.deadline:
                # The scraper counts this as a failure already. An answer now would only be misread as the
                # next one's; often the connection is cut by this time, and the client sees it end.
                if not self._expired:
                    site.counters.reject(Reason.LATE)
                response = text(HTTPStatus.SERVICE_UNAVAILABLE, "the metrics were not ready in time", _RETRY)
                keep = False
                self.deadline = ended + 1.0
            self._send(head, response, close=not keep, in_force=in_force)
            return keep
        finally:
            site.counters.scraping(-1)
            site.slots.release()

    def _render(self, head: Head) -> Response:
        fmt = negotiate(head.fields.get("accept", ""))
        body = self._site.store.exposition(TIERS[head.path], fmt)
        if gzip_accepted(head.fields.get("accept-encoding", "")):
            # Not cached: ages and the server's own counters differ in every body.
            body = gzip.compress(body, GZIP_LEVEL, mtime=0)
            return Response(HTTPStatus.OK, body, fmt.content_type, (_VARY, ("Content-Encoding", "gzip")))
        return Response(HTTPStatus.OK, body, fmt.content_type, (_VARY,))

    def _send(
        self, head: Head | None, response: Response, *, close: bool, in_force: InForce | None = None
    ) -> None:
        """Send an answer, its body only if the request was not HEAD."""
        counters = self._site.counters
        counters.answered(head.path if head else "other", response.status.value)
        start = head_bytes(response, close, (in_force or self._site.source.current()).headers)
        body = b"" if head and head.method == "HEAD" else response.body
        if len(body) <= _SMALL:
            self._sock.sendall(start + body)
        else:  # no copy of a large body
            self._sock.sendall(start)
            self._sock.sendall(body)
        counters.sent(len(body))

    def _linger(self) -> None:
        """Let the client read the last answer: closing over unread bytes would reset the connection.

        RFC 9112, section 9.6. The socket's own timeout and the size bound it.
        """
        end = time.monotonic() + _LINGER_SECONDS
        self.deadline = min(self.deadline, end)
        self.idle = True  # nothing is owed any more
        with contextlib.suppress(OSError, ValueError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
            left = _LINGER_BYTES
            while left > 0 and (received := self._sock.recv(_CHUNK)):
                left -= len(received)
