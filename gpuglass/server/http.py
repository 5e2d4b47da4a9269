"""`MetricsServer`: serves a store's expositions over HTTP/1.1 to any number of scrapers, within bounds.

| path | answer |
|---|---|
| `/metrics/fast`, `/metrics/slow` | the families of one tier |
| `/metrics` | the families of both |
| `/healthz` | 200 while the process is alive |
| `/readyz` | 200, or 503 and one line that says why not |
| `/` | a page with links and the version |

The exporter-toolkit authenticates every path. Here `/healthz` and `/readyz` need no password, because the
kubelet's probes cannot take one from a secret; so the readiness line must not say what only scrapers may
know. Client certificates are part of TLS and are demanded for probes, too.

The accept loop is a `socketserver.TCPServer`; it starts a daemon thread per connection
(`gpuglass.server.connection`) and, between accepts, cuts the connections whose deadline has passed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpuglass.server.address import Address, bind, parse_listen
from gpuglass.server.connection import Connection, Exposition, Site
from gpuglass.server.limits import ServerLimits
from gpuglass.server.reload import WebConfigSource
from gpuglass.server.response import REFUSED_AT_DOOR, landing_page
from gpuglass.server.stats import Counters, Reason, ServerStats

DEFAULT_LISTEN = "127.0.0.1:9835"

_POLL_SECONDS = 0.5
"""How exactly deadlines are kept, and how long `stop` may wait for the accept loop."""

log = logging.getLogger("gpuglass.server")


def _ready() -> str | None:
    return None


class MetricsServer:
    """Serves `store` on `listen` from `start` to `stop`; it is not started a second time.

    `web_config` is an exporter-toolkit web configuration file (`gpuglass.server.web_config`). `readiness`
    returns None or one line that says why the process is not ready; it must be quick and only read memory.
    The constructor raises `ListenError` for an address that cannot be read.
    """

    def __init__(
        self,
        store: Exposition,
        *,
        listen: str = DEFAULT_LISTEN,
        web_config: Path | None = None,
        limits: ServerLimits | None = None,
        readiness: Callable[[], str | None] = _ready,
        title: str = "GPUGlass",
        version: str = "",
    ) -> None:
        self._store = store
        self._listen = parse_listen(listen)
        self._web_config = web_config
        self._limits = limits or ServerLimits()
        self._readiness = readiness
        self._title = title
        self._version = version
        self._counters = Counters()
        self._loop: _AcceptLoop | None = None
        self._address: Address | None = None

    @property
    def address(self) -> Address:
        """The address in use, with the real port. Before `start` it is the one that was asked for."""
        return self._address or self._listen

    def start(self) -> None:
        """Read the web configuration, bind and serve. Raises `WebConfigError` and `ListenError`."""
        if self._loop is not None:
            raise RuntimeError("the server was started before")
        site = Site(
            self._store,
            self._limits,
            self._counters,
            WebConfigSource(self._web_config),
            self._readiness,
            landing_page(self._title, self._version),
            threading.BoundedSemaphore(self._limits.scrapes),
        )
        sock = bind(self._listen)
        host, port = sock.getsockname()[:2]
        self._address = Address(host, port)
        self._loop = _AcceptLoop(sock, site)
        self._loop.start()

    def stop(self, timeout: float = 5.0) -> bool:
        """Stop serving within `timeout` seconds.

        No connection is accepted any more, idle ones end at once, and answers under way may end in the first
        half of the time; then all are cut. False if a thread was still busy (a hung rendering); it is a
        daemon.
        """
        return self._loop is None or self._loop.stop(timeout)

    def stats(self) -> ServerStats:
        """A snapshot of what the server did so far; quick enough for each scrape."""
        loop, counters = self._loop, self._counters
        reload = loop.site.source.stats if loop else None
        with counters.lock:
            return ServerStats(
                requests=dict(counters.requests),
                rejected=dict(counters.rejected),
                renderings=dict(counters.renderings),
                connections=loop.connections if loop else 0,
                scrapes=counters.scrapes,
                sent_bytes=counters.sent_bytes,
                web_config_ok=reload.ok if reload else True,
                reloads=reload.reloads if reload else 0,
                reload_failures=reload.failures if reload else 0,
            )


class _AcceptLoop(socketserver.TCPServer):
    """Accepts connections in one thread, starts theirs, and watches their deadlines."""

    def __init__(self, sock: socket.socket, site: Site) -> None:
        # The handler class is not used: `process_request` starts a `Connection` instead.
        super().__init__(("", 0), socketserver.BaseRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.site = site
        self._open: dict[Connection, threading.Thread] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self.serve_forever, args=(_POLL_SECONDS,), name="http-accept", daemon=True
        )

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._open)

    def start(self) -> None:
        """Start the accept loop."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """See `MetricsServer.stop`."""
        now = time.monotonic()
        self.site.stopping.set()
        # In a thread, since it waits for the loop without a bound.
        threading.Thread(target=self.shutdown, name="http-stop", daemon=True).start()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the loop, which then finds that it is to end
        self._thread.join(timeout)
        self.server_close()
        self._cut(lambda connection: connection.idle)
        self._join(now + timeout / 2)
        self._cut(lambda connection: True)
        self._join(now + timeout)
        with self._lock:
            return not self._open and not self._thread.is_alive()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept one connection. When the process has no descriptor left, wait instead of spinning."""
        try:
            return self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.site.counters.reject(Reason.ERROR)
                self.site.stopping.wait(_POLL_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread, or turn it away."""
        if len(self._open) >= self.site.limits.connections:
            self.site.counters.reject(Reason.CONNECTIONS)
            self._turn_away(request)
            return
        connection = Connection(request, self.site)
        thread = threading.Thread(target=self._run, args=(connection,), name="http-connection", daemon=True)
        with self._lock:
            self._open[connection] = thread
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            with self._lock:
                del self._open[connection]
            self.site.counters.reject(Reason.ERROR)
            self._turn_away(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log instead of printing to stderr."""
        self.site.counters.reject(Reason.ERROR)
        log.exception("a connection could not be started")

    def service_actions(self) -> None:
        """Cut the connections whose deadline has passed. Called about five times a second."""
        now = time.monotonic()
        self._cut(lambda connection: now >= connection.deadline)

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                self._open.pop(connection, None)

    def _cut(self, which: Callable[[Connection], bool]) -> None:
        count = not self.site.stopping.is_set()
        with self._lock:
            chosen = [connection for connection in self._open if which(connection)]
        for connection in chosen:
            connection.expire(count)

    def _join(self, until: float) -> None:
        with self._lock:
            threads = list(self._open.values())
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _turn_away(self, request: socket.socket) -> None:
        """Answer 503 without waiting for anything, and close."""
        with contextlib.suppress(OSError):
            request.setblocking(False)
            if self.site.source.current().context is None:
                request.send(REFUSED_AT_DOOR)
                request.shutdown(socket.SHUT_WR)
                request.recv(65536)  # what is unread when it closes would reset the connection
        request.close()
