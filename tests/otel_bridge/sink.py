"""A collector for tests: takes OTLP over gRPC or HTTP in this process, and misbehaves when told to.

In: what to answer. Out: the requests that came, decoded, with their headers. Real collectors are tried with
Jaeger; this one is for what Jaeger does not do on demand.
"""

from __future__ import annotations

import gzip
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from otel_bridge.transport import EXPORT


@dataclass
class Sink:
    """What came."""

    url: str = ""
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answer: Callable[[], Any] = lambda: None
    """Called for each request. gRPC: what it gives is a (status code, details) to fail with; HTTP: (status,
    headers). None: all is well. It may wait."""
    hangs_up: bool = False
    """HTTP: the connection is closed after each answer, without a word."""
    refused_spans: int = 0
    """Told as a partial success."""

    def take(self, body: bytes, headers: dict[str, str]) -> bytes:
        """A request that is taken; gives the answer's body."""
        self.headers.append(headers)
        self.requests.append(ExportTraceServiceRequest.FromString(body))
        response = ExportTraceServiceResponse()
        if self.refused_spans:
            response.partial_success.rejected_spans = self.refused_spans
            response.partial_success.error_message = "no room"
        return response.SerializeToString()

    @property
    def spans(self) -> list[Span]:
        """All spans that were taken."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@contextmanager
def grpc_sink(key: bytes = b"", certificate: bytes = b"", port: int = 0) -> Iterator[Sink]:
    """An OTLP/gRPC server; with TLS if there are key and certificate."""
    sink = Sink()

    def export(body: bytes, context: grpc.ServicerContext) -> bytes:
        fault = sink.answer()
        if fault is not None:
            code, details, *trailing = fault
            if trailing:
                context.set_trailing_metadata(trailing[0])
            context.abort(code, details)
        return sink.take(body, dict(context.invocation_metadata()))

    service, method = EXPORT[1:].split("/")
    handler = grpc.method_handlers_generic_handler(
        service, {method: grpc.unary_unary_rpc_method_handler(export)}
    )
    server = grpc.server(ThreadPoolExecutor(4), handlers=(handler,), options=(("grpc.so_reuseport", 0),))
    address = f"127.0.0.1:{port}"
    if key:
        bound = server.add_secure_port(address, grpc.ssl_server_credentials([(key, certificate)]))
    else:
        bound = server.add_insecure_port(address)
    sink.url = f"{'https' if key else 'http'}://localhost:{bound}"
    server.start()
    try:
        yield sink
    finally:
        server.stop(0).wait()


@contextmanager
def http_sink(files: tuple[str, str] | None = None) -> Iterator[Sink]:
    """An OTLP/HTTP server; with TLS if there are files with certificate and key."""
    sink = Sink()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            fault = sink.answer()
            status, more, answer = (*fault, b"") if fault else (200, {}, b"")
            if not fault:
                answer = sink.take(
                    body, {**{k.lower(): v for k, v in self.headers.items()}, "path": self.path}
                )
            self.send_response(status)
            for name, value in {**more, "Content-Length": str(len(answer))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)
            self.close_connection = self.close_connection or sink.hangs_up

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hung up is what tests ask for."""

    server = Server(("127.0.0.1", 0), Handler)
    if files:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*files)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    sink.url = f"{'https' if files else 'http'}://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield sink
    finally:
        server.shutdown()
        server.server_close()
