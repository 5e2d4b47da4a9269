"""A real Alertmanager for tests, and the receivers that its notifications reach.

In: a configuration as plain data, alerts over its API or from a Prometheus. Out: the notifications that a
webhook and a chat service on loopback were sent, as frozen values, and what the API says of the alerts that
it holds.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.ports import free_port
from tests.support.servers import serving

READY_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Notification:
    """One request that a receiver got: its path names the receiver."""

    receiver: str
    body: Mapping[str, Any]

    @property
    def alerts(self) -> list[Mapping[str, Any]]:
        """The alerts of a webhook's notification."""
        return list(self.body.get("alerts", []))


@dataclass
class Inbox:
    """What the receivers got so far, oldest first."""

    url: str
    _received: list[Notification] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, notification: Notification) -> None:
        """Add one; called by the server."""
        with self._lock:
            self._received.append(notification)

    def all(self) -> list[Notification]:
        """All notifications so far."""
        with self._lock:
            return list(self._received)

    def wait(self, condition: Callable[[list[Notification]], Any], what: str, seconds: float = 60) -> Any:
        """Wait until `condition` of all notifications is true and give it; fails with what has come."""
        until = time.monotonic() + seconds
        while not (result := condition(self.all())):
            if time.monotonic() > until:
                got = [(n.receiver, n.body.get("groupLabels", n.body)) for n in self.all()]
                raise AssertionError(f"{what} did not come within {seconds:g} s; came: {got}")
            time.sleep(0.1)
        return result


@contextmanager
def receiving() -> Iterator[Inbox]:
    """A server on loopback that takes JSON by POST at any path."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            inbox.put(Notification(self.path.strip("/"), json.loads(body)))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    inbox = Inbox(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield inbox
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True, slots=True)
class Alertmanager:
    """A running server."""

    url: str
    log: Path

    @property
    def address(self) -> str:
        """Host and port."""
        return self.url.partition("//")[2]

    def alerts(self) -> list[Mapping[str, Any]]:
        """The alerts that it holds, as its API gives them."""
        with urllib.request.urlopen(f"{self.url}/api/v2/alerts", timeout=30) as answer:
            found: list[Mapping[str, Any]] = json.load(answer)
        return found

    def post(self, alerts: Sequence[Mapping[str, Any]]) -> None:
        """Send alerts, as Prometheus does: each has `labels` and may have `annotations`, `endsAt`, …"""
        request = urllib.request.Request(
            f"{self.url}/api/v2/alerts",
            json.dumps(list(alerts)).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30):
            pass


@contextmanager
def running_alertmanager(program: Path, config: Mapping[str, Any], folder: Path) -> Iterator[Alertmanager]:
    """Runs `program` with its files in `folder` until the block ends. Raises RuntimeError if it does not
    become ready."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alertmanager.yml").write_text(json.dumps(config, indent=2))  # JSON is YAML
    log, address = folder / "alertmanager.log", f"127.0.0.1:{free_port()}"
    command = [
        str(program),
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--cluster.listen-address=",  # no cluster: else it waits for peers
    ]
    server = Alertmanager(f"http://{address}", log)
    with serving("Alertmanager", command, log, f"{server.url}/-/ready", READY_SECONDS):
        yield server
