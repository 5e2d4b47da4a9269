"""A real Prometheus at another time: passes everything on and answers the question for the time itself."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs


@dataclass
class Shifted:
    """The server behind it at `now`, in Unix seconds, which a test moves."""

    url: str
    now: float


@contextmanager
def shifted(behind: str, now: float) -> Iterator[Shifted]:
    """Serves until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if parse_qs(body.decode()).get("query") == ["time()"]:
                data = {"resultType": "scalar", "result": [server.now, str(server.now)]}
                status, answer = 200, json.dumps({"status": "success", "data": data}).encode()
            else:
                headers = {"Content-Type": self.headers["Content-Type"]}
                request = urllib.request.Request(behind + self.path, body, headers)
                try:
                    with urllib.request.urlopen(request, timeout=60) as response:
                        status, answer = response.status, response.read()
                except urllib.error.HTTPError as error:
                    status, answer = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Shifted(f"http://127.0.0.1:{http.server_address[1]}", now)
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
