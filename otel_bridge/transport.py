"""Carries encoded requests to a collector, over gRPC or HTTP, one at a time.

In: the bytes of an ExportTraceServiceRequest. Out: a `Reply`, which says whether they were taken, are to be
sent again, or are lost (OTLP 1.x, "Failures"). Nothing is raised but `ConfigError`, by `make`.
"""

from __future__ import annotations

import gzip
import http.client
import re
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from gpuglass.config import TracesConfig, TracesTlsConfig
from gpuglass.errors import ConfigError
from gpuglass.logs import LOG

Result = Literal["ok", "partial", "retry", "refused"]
MAX_REPLY = 1 << 20
MAX_HEADERS_FILE = 64 << 10
GRPC_PORT = 4317
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a request."""

    result: Result
    refused: int = 0
    """Spans that the collector did not take."""
    after: float = 0.0
    """Seconds that it asks to be left alone for; 0: it does not say."""
    why: str = ""
    """In a few words, for the log."""


class Transport(Protocol):
    """A way to a collector."""

    def send(self, body: bytes, timeout: float) -> Reply:
        """Send a request and wait for the answer, at most `timeout` seconds."""

    def abort(self) -> None:
        """From another thread: end what is under way, for good."""


class Headers:
    """Headers from a file, read anew when it changes: credentials are rotated by others."""

    def __init__(self, path: str) -> None:
        """Raises `ConfigError` if the file cannot be used."""
        self._path = Path(path) if path else None
        self._stamp: tuple[int, int] | None = None
        self._values: tuple[tuple[str, str], ...] = ()
        if self._path is not None:
            self._stamp = self._look()
            self._values = read_headers(self._path)

    def _look(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat() if self._path is not None else None
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_ino) if stat is not None else None

    def current(self) -> tuple[tuple[str, str], ...]:
        """Names in lower case and values; the last good ones while the file cannot be read."""
        stamp = self._look()
        if self._path is not None and stamp is not None and stamp != self._stamp:
            self._stamp = stamp
            try:
                self._values = read_headers(self._path)
            except ConfigError as error:
                LOG.warning("%s; the headers read before stay", error)
        return self._values


def read_headers(path: Path) -> tuple[tuple[str, str], ...]:
    """Lines `name: value`, `#` begins a comment; raises `ConfigError` that shows no value."""
    where = f"traces.headers_file: {path}"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_HEADERS_FILE + 1).decode()
    except OSError as error:
        raise ConfigError(f"{where}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: it is no UTF-8 text") from None
    if len(text) > MAX_HEADERS_FILE:
        raise ConfigError(f"{where}: larger than {MAX_HEADERS_FILE >> 10} KiB")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, value = line.partition(":")
        name, value = name.strip(), value.strip()
        if not colon or not _HEADER_NAME.match(name) or not value.isascii() or not value.isprintable():
            raise ConfigError(f"{where}: line {number}: expected `name: value` in printable ASCII")
        found.append((name.lower(), value))
    return tuple(found)


def _read_tls(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"traces.tls.{name}: {path}: cannot read it: {error.strerror}") from None


def make(config: TracesConfig) -> Transport:
    """The transport that the configuration asks for; raises `ConfigError`."""
    headers = Headers(config.headers_file)
    return Grpc(config, headers) if config.protocol == "grpc" else Http(config, headers)


# gRPC

_RETRYABLE = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"}
)
"""Status codes after which the same request may be sent again (OTLP, "Retryable Response Codes");
RESOURCE_EXHAUSTED only with a RetryInfo."""


class Grpc:
    """OTLP/gRPC."""

    def __init__(self, config: TracesConfig, headers: Headers) -> None:
        try:
            import grpc
        except ImportError:
            raise ConfigError(
                "traces.protocol: grpc needs the package grpcio: pip install 'gpuglass[traces]', "
                "or set traces.protocol to http"
            ) from None
        url = urlsplit(config.endpoint)
        host = f"[{url.hostname}]" if url.hostname and ":" in url.hostname else url.hostname
        target = f"{host}:{url.port or GRPC_PORT}"
        options = (
            ("grpc.initial_reconnect_backoff_ms", 500),
            ("grpc.max_reconnect_backoff_ms", 10_000),
            ("grpc.enable_retries", 0),
        )
        if url.scheme == "https":
            tls = config.tls
            credentials = grpc.ssl_channel_credentials(
                _read_tls("ca_file", tls.ca_file) if tls.ca_file else None,
                _read_tls("key_file", tls.key_file) if tls.key_file else None,
                _read_tls("cert_file", tls.cert_file) if tls.cert_file else None,
            )
            self._channel = grpc.secure_channel(target, credentials, options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._error: type[Exception] = grpc.RpcError
        self._compression = grpc.Compression.Gzip if config.compression == "gzip" else None
        self._call: Callable[..., bytes] = self._channel.unary_unary(EXPORT)
        self._headers = headers

    def send(self, body: bytes, timeout: float) -> Reply:
        """Send a request."""
        try:
            answer = self._call(
                body, timeout=timeout, metadata=self._headers.current(), compression=self._compression
            )
        except self._error as error:
            return self._failed(error)
        except ValueError as error:
            return Reply("retry", why=str(error))  # the channel was closed
        return _answered(answer)

    @staticmethod
    def _failed(error: Any) -> Reply:
        code = error.code().name
        why = f"{code}: {error.details()}"[:300]
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
        if code in _RETRYABLE or (code == "RESOURCE_EXHAUSTED" and b"google.rpc.RetryInfo" in details):
            return Reply("retry", why=why)
        return Reply("refused", why=why)

    def abort(self) -> None:
        """End the call that is under way."""
        self._channel.close()


def _answered(answer: bytes) -> Reply:
    """The reply in an ExportTraceServiceResponse."""
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    try:
        partial = ExportTraceServiceResponse.FromString(answer).partial_success
    except DecodeError:
        return Reply("ok", why="an answer that cannot be read")
    if partial.rejected_spans > 0:
        return Reply("partial", partial.rejected_spans, why=partial.error_message[:300])
    return Reply("ok", why=partial.error_message[:300])


# HTTP

_RETRYABLE_STATUS = frozenset({429, 502, 503, 504})


class Http:
    """OTLP/HTTP with protobuf, on one connection that is kept."""

    def __init__(self, config: TracesConfig, headers: Headers) -> None:
        url = urlsplit(config.endpoint)
        host, port = url.hostname or "", url.port
        path = url.path if url.path not in ("", "/") else "/v1/traces"
        self._path = f"{path}?{url.query}" if url.query else path
        self._connection: http.client.HTTPConnection
        if url.scheme == "https":
            self._connection = http.client.HTTPSConnection(host, port, context=_context(config.tls))
        else:
            self._connection = http.client.HTTPConnection(host, port)
        self._gzip = config.compression == "gzip"
        self._headers = headers
        self._aborted = threading.Event()

    def send(self, body: bytes, timeout: float) -> Reply:
        """Send a request."""
        headers = {"Content-Type": "application/x-protobuf", "User-Agent": "gpuglass"}
        if self._gzip:
            body = gzip.compress(body, 1)
            headers["Content-Encoding"] = "gzip"
        headers.update(self._headers.current())
        reused = self._connection.sock is not None
        try:
            return self._post(body, headers, timeout)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            if not reused or isinstance(error, TimeoutError) or self._aborted.is_set():
                return Reply("retry", why=f"{type(error).__name__}: {error}"[:300])
        # The server may have closed a connection that it kept; that says nothing about it.
        try:
            return self._post(body, headers, timeout)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return Reply("retry", why=f"{type(error).__name__}: {error}"[:300])

    def _post(self, body: bytes, headers: dict[str, str], timeout: float) -> Reply:
        connection = self._connection
        connection.timeout = timeout
        if connection.sock is not None:
            connection.sock.settimeout(timeout)
        connection.request("POST", self._path, body, headers)
        response = connection.getresponse()
        answer = response.read(MAX_REPLY)
        if response.will_close or not response.isclosed():
            connection.close()
        if 200 <= response.status < 300:
            return _answered(answer)
        why = f"status {response.status} {response.reason}"
        if response.status in _RETRYABLE_STATUS:
            return Reply("retry", after=_retry_after(response.getheader("Retry-After")), why=why)
        return Reply("refused", why=why)

    def abort(self) -> None:
        """End the request that is under way."""
        self._aborted.set()
        held = self._connection.sock
        if held is not None:
            with suppress(OSError):
                held.shutdown(2)


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header; a date is not understood."""
    return float(value) if value is not None and re.fullmatch(r"[0-9]{1,5}", value) else 0.0


def _context(tls: TracesTlsConfig) -> ssl.SSLContext:
    for name in ("ca_file", "cert_file", "key_file"):
        if getattr(tls, name):
            _read_tls(name, getattr(tls, name))
    try:
        context = ssl.create_default_context(cafile=tls.ca_file or None)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"traces.tls.ca_file: {tls.ca_file}: no certificates: {error}") from None
    if tls.cert_file:
        try:
            context.load_cert_chain(tls.cert_file, tls.key_file)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"traces.tls.cert_file: {tls.cert_file} and {tls.key_file} are no pair: {error}"
            ) from None
    return context
