"""What the server counts about itself.

Connection threads count into `Counters`; a `ServerStats` snapshot flows out at each scrape. Every label value
is from a fixed set, so that no client can make series.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """Why a connection or a request was not served as asked."""

    CONNECTIONS = "connections"
    """The limit of open connections was reached."""
    SCRAPES = "scrapes"
    """The limit of concurrent scrapes was reached."""
    DEADLINE = "deadline"
    """The request or its answer was not through in time, and the connection was cut."""
    LATE = "late"
    """Rendering ended after the scraper's own timeout, and 503 was answered instead."""
    MALFORMED = "malformed"
    """The bytes are no HTTP/1.x request."""
    INCOMPLETE = "incomplete"
    """The client went away in the middle of a request or an answer."""
    TOO_LARGE = "too_large"
    """The request's head is above its bounds."""
    BODY = "body"
    """The request carries a body."""
    TLS = "tls"
    """The TLS handshake failed, or a TLS hello came to a port without TLS."""
    CERTIFICATE = "certificate"
    """The client's certificate has none of the allowed names."""
    UNAUTHORIZED = "unauthorized"
    """No credentials, or wrong ones."""
    RATE_LIMIT = "rate_limit"
    """The rate limit of the web configuration file."""
    BUSY = "busy"
    """A password could not be checked in time because others were being checked."""
    ERROR = "error"
    """A defect or a lack of resources of this process, never of the client."""


HANDLERS = ("/", "/healthz", "/metrics", "/metrics/fast", "/metrics/slow", "/readyz", "other")
"""All values of the handler label; `other` stands for unknown paths and for what is no request."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """Number of renderings (compression included) and the seconds that they took together."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerStats:
    """Counts since the start, and the state now."""

    requests: Mapping[tuple[str, int], int]
    """Answers by (handler, status code). Handlers are `HANDLERS`."""
    rejected: Mapping[Reason, int]
    """Refusals; every reason is there, 0 included."""
    renderings: Mapping[str, Rendering]
    """By handler, only those of metrics."""
    connections: int
    """Open connections."""
    scrapes: int
    """Scrapes in flight."""
    sent_bytes: int
    """Bytes of bodies sent, after compression."""
    web_config_ok: bool
    """False while the web configuration file on disk is not the one in force because it cannot be used."""
    reloads: int
    """Changes of the web configuration or its certificates that were taken over."""
    reload_failures: int
    """Changes that could not be used, each counted once."""


@dataclass(slots=True)
class Counters:
    """The mutable side of `ServerStats`. Safe for any number of threads."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: dict[tuple[str, int], int] = field(default_factory=dict)
    rejected: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(Reason, 0))
    renderings: dict[str, Rendering] = field(default_factory=dict)
    scrapes: int = 0
    sent_bytes: int = 0

    def answered(self, handler: str, status: int) -> None:
        """Count an answer as it starts to be sent."""
        key = (handler if handler in HANDLERS else "other", status)
        with self.lock:
            self.requests[key] = self.requests.get(key, 0) + 1

    def sent(self, count: int) -> None:
        """Count bytes of a body."""
        with self.lock:
            self.sent_bytes += count

    def reject(self, reason: Reason) -> None:
        """Count a refusal."""
        with self.lock:
            self.rejected[reason] += 1

    def rendered(self, handler: str, seconds: float) -> None:
        """Count one rendering."""
        with self.lock:
            old = self.renderings.get(handler, Rendering())
            self.renderings[handler] = Rendering(old.count + 1, old.seconds + seconds)

    def scraping(self, change: int) -> None:
        """Move the number of scrapes in flight."""
        with self.lock:
            self.scrapes += change
