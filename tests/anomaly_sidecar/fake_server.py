"""A query API that fails on command (HTML, refusals, half an answer, silence) and otherwise says what a
function of time says: for what a real Prometheus cannot be made to do."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

Series = Mapping[tuple[tuple[str, str], ...], float]
World = Callable[[str, float], Series]
"""Series and their values for an expression and a time."""


@dataclass
class FakeServer:
    """Settings may change while it runs."""

    world: World
    now: Callable[[], float] = time.time
    fault: str = ""
    """One of html, 429, 500, 422, half, cut, slow, drip, empty, nonsense; empty: none."""
    faulty: str = ""
    """Only expressions that contain this fail; empty: all."""
    requests: list[tuple[str, dict[str, str], dict[str, str]]] = field(default_factory=list)
    """(path, parameters, headers in lower case) of each request."""
    url: str = ""
    release: threading.Event = field(default_factory=threading.Event)

    def answer(self, path: str, form: dict[str, str]) -> dict[str, Any]:
        query = form["query"]
        if query == "time()":
            return _success("scalar", [self.now(), str(self.now())])
        if path.endswith("query_range"):
            start, end, step = (float(form[name]) for name in ("start", "end", "step"))
            points: dict[Any, list[Any]] = {}
            for number in range(int((end - start) / step + 1e-6) + 1):
                at = start + number * step
                for labels, value in self.world(query, at).items():
                    points.setdefault(labels, []).append([at, repr(value)])
            return _success("matrix", [{"metric": dict(k), "values": v} for k, v in points.items()])
        at = float(form["time"])
        found = self.world(query, at).items()
        return _success("vector", [{"metric": dict(k), "value": [at, repr(v)]} for k, v in found])


def _success(kind: str, result: Any) -> dict[str, Any]:
    return {"status": "success", "data": {"resultType": kind, "result": result}}


@contextmanager
def running(server: FakeServer, tls: ssl.SSLContext | None = None, port: int = 0) -> Iterator[FakeServer]:
    """Serves until the block ends, on a free port unless it is given."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"])).decode()
            form = {name: values[0] for name, values in parse_qs(raw).items()}
            server.requests.append((self.path, form, {k.lower(): v for k, v in self.headers.items()}))
            fault = server.fault if server.faulty in form["query"] and form["query"] != "time()" else ""
            if server.fault and not server.faulty:
                fault = server.fault
            if fault == "slow":
                server.release.wait(30)
                return
            body = json.dumps(server.answer(self.path, form)).encode()
            status, length = 200, len(body)
            if fault == "html":
                body = b"<!DOCTYPE html><html><body>Sign in</body></html>"
                length = len(body)
            elif fault in ("429", "500", "422"):
                status = int(fault)
                body = json.dumps({"status": "error", "errorType": "x", "error": f"fault {fault}"}).encode()
                length = len(body)
            elif fault == "half":
                body = body[: len(body) // 2]
            elif fault == "cut":
                body = body[: len(body) // 2]
                length = len(body)
            elif fault == "empty":
                body, length = b"", 0
            elif fault == "nonsense":
                body = json.dumps(_success("vector", [{"metric": {}, "value": [1, "x"]}])).encode()
                length = len(body)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length))
            if fault == "429":
                self.send_header("Retry-After", "1")
            self.end_headers()
            if fault == "drip":
                for byte in body:
                    if server.release.wait(0.05):
                        return
                    try:
                        self.wfile.write(bytes([byte]))
                    except OSError:
                        return
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    http.daemon_threads = True
    if tls is not None:
        http.socket = tls.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    server.url = f"http{'s' if tls else ''}://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        server.release.set()
        http.shutdown()
        http.server_close()
