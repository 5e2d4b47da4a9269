"""Reads samples from a Prometheus-compatible API: instant queries per cycle, ranges for history and gaps.

In flow expressions and times, out flow `Vector`s and `Matrix`es whose series are known by the bytes of their
labels as the server wrote them: 10,000 series are told apart without being parsed. Everything is bounded
(time, bytes, points per request), and whatever the server answers instead, HTML, an error, half of it, is a
`ReadError` with one line. Files with secrets are read for each request, so that they can be rotated.
"""

from __future__ import annotations

import base64
import http.client
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import msgspec
import numpy as np

import gpuglass
from anomaly_sidecar.config import PrometheusConfig
from anomaly_sidecar.interface import FloatArray, Labels

MAX_ANSWER_BYTES = 512 << 20
_MAX_SECRET_BYTES = 64 << 10
_CHUNK = 1 << 20


class ReadError(Exception):
    """A read failed; the text is one line. `smaller` is true where asking for less may help."""

    def __init__(self, text: str, retry_after: float = 0.0, smaller: bool = False) -> None:
        super().__init__(" ".join(text.split())[:300])
        self.retry_after = retry_after
        self.smaller = smaller


class _Element(msgspec.Struct):
    metric: msgspec.Raw
    value: tuple[float, str] | None = None
    values: msgspec.Raw = msgspec.Raw(b"")


class _Data(msgspec.Struct):
    resultType: str = ""
    result: msgspec.Raw = msgspec.Raw(b"[]")


class _Answer(msgspec.Struct):
    status: str = ""
    data: _Data | None = None
    error: str = ""
    warnings: list[str] = []
    isPartial: bool = False  # VictoriaMetrics


_DECODE = msgspec.json.Decoder(_Answer)
_ELEMENTS = msgspec.json.Decoder(list[_Element])
_SCALAR = msgspec.json.Decoder(tuple[float, str])
_SAMPLES = msgspec.json.Decoder(list[tuple[float, str]])
_LABELS = msgspec.json.Decoder(dict[str, str])


@dataclass(frozen=True, slots=True)
class Vector:
    """The answer to an instant query: label bytes and values, in the server's order."""

    keys: list[bytes]
    values: FloatArray
    partial: bool = False
    """The server said that something is missing."""
    bytes_read: int = 0


@dataclass(frozen=True, slots=True)
class Matrix:
    """The answer to a range query: values, shape (steps, series), NaN where there is no sample."""

    keys: list[bytes]
    times: FloatArray
    values: FloatArray
    partial: bool = False
    bytes_read: int = 0


def labels_of(key: bytes) -> Labels:
    """Labels of a series, its name as the label `metric`. Raises `ReadError`."""
    try:
        labels = _LABELS.decode(key)
    except msgspec.DecodeError:
        raise ReadError("answers with a series whose labels are no text") from None
    name = labels.pop("__name__", "")
    if name:
        while "metric" in labels:
            labels["exported_metric"] = labels.pop("metric")
        labels["metric"] = name
    return tuple(sorted((label, value) for label, value in labels.items() if value))


class Reader:
    """Asks one server. Safe for several threads."""

    def __init__(self, config: PrometheusConfig) -> None:
        self._config = config
        parts = urlsplit(config.url)
        self._host = parts.hostname or ""
        self._tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/") + "/api/v1/"

    def now(self) -> float:
        """The server's clock, in Unix seconds."""
        body = self._post("query", {"query": "time()"})
        answer = self._answer(body)
        try:
            return float(_SCALAR.decode(answer.result)[1])
        except (msgspec.DecodeError, ValueError):
            raise ReadError("answers time() with no number: is this a Prometheus API?") from None

    def instant(self, expression: str, at: float) -> Vector:
        """All series of an expression at a time; a scalar is one series without labels."""
        body = self._post("query", {"query": expression, "time": _number(at)})
        answer = _parsed(body)
        data = _data(answer)
        if data.resultType == "scalar":
            try:
                return Vector(
                    [b"{}"], np.array([float(_SCALAR.decode(data.result)[1])], np.float64), False, len(body)
                )
            except (msgspec.DecodeError, ValueError):
                raise ReadError("answers a scalar that is no number") from None
        if data.resultType != "vector":
            raise ReadError(f"the expression gives a {data.resultType or 'nothing'}, not an instant vector")
        try:
            # An element without a value is a native histogram.
            samples = [(e.metric, e.value[1]) for e in _ELEMENTS.decode(data.result) if e.value is not None]
            values = np.array([float(value) for _, value in samples], np.float64)
        except (msgspec.DecodeError, ValueError):
            raise ReadError("answers with samples that cannot be read") from None
        keys = [bytes(metric) for metric, _ in samples]
        return Vector(keys, values, bool(answer.warnings or answer.isPartial), len(body))

    def range(self, expression: str, start: float, end: float, step: float) -> Matrix:
        """All series from start to end, both included; the caller keeps it within the limits."""
        parameters = {
            "query": expression,
            "start": _number(start),
            "end": _number(end),
            "step": _number(step),
        }
        body = self._post("query_range", parameters)
        answer = _parsed(body)
        data = _data(answer)
        if data.resultType != "matrix":
            raise ReadError(f"the expression gives a {data.resultType or 'nothing'}, not a matrix")
        try:
            elements = [e for e in _ELEMENTS.decode(data.result) if len(bytes(e.values)) > 2]
        except msgspec.DecodeError:
            raise ReadError("answers with series that cannot be read") from None
        times = step * np.arange(int((end - start) / step + 1e-6) + 1, dtype=np.float64) + start
        values = np.full((len(times), len(elements)), np.nan)
        for column, element in enumerate(elements):
            pairs = _pairs(bytes(element.values))
            index = np.rint((pairs[:, 0] - start) / step).astype(np.intp)
            inside = (index >= 0) & (index < len(times))
            values[index[inside], column] = pairs[inside, 1]
        keys = [bytes(e.metric) for e in elements]
        return Matrix(keys, times, values, bool(answer.warnings or answer.isPartial), len(body))

    def history(
        self, expression: str, start: float, end: float, step: float, series: int
    ) -> Iterator[Matrix]:
        """A long range in pieces within the limits of points and samples; halves them when refused."""
        most = min(self._config.max_points, max(1, self._config.max_samples // max(1, series)))
        at = start
        while at <= end:
            until = min(end, at + (most - 1) * step)
            try:
                yield self.range(expression, at, until, step)
            except ReadError as error:
                if not error.smaller or most == 1:
                    raise
                most = max(1, most // 2)
                continue
            at = until + step

    # HTTP

    def _answer(self, body: bytes) -> _Data:
        return _data(_parsed(body))

    def _post(self, path: str, parameters: dict[str, str]) -> bytes:
        """The body of the answer. Raises `ReadError`."""
        deadline = time.monotonic() + self._config.timeout
        connection: http.client.HTTPConnection
        try:
            headers = self._headers()
            if self._tls:
                connection = http.client.HTTPSConnection(
                    self._host, self._port, timeout=self._config.timeout, context=self._context()
                )
            else:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=self._config.timeout)
        except ssl.SSLError:
            raise ReadError("ca_file, cert_file or key_file is no PEM file that fits") from None
        except OSError as error:
            raise ReadError(f"cannot read {error.filename}: {error.strerror}") from None
        try:
            connection.request("POST", self._prefix + path, urlencode(parameters), headers)
            response = connection.getresponse()
            body = _read(response, connection, deadline)
            if response.status != 200:
                raise _refusal(response, body)
            return body
        except ssl.SSLCertVerificationError as error:
            raise ReadError(f"its certificate is not trusted: {error.verify_message}") from None
        except (TimeoutError, ssl.SSLWantReadError):
            raise ReadError(f"no answer within {self._config.timeout:g} s") from None
        except http.client.IncompleteRead:
            raise ReadError("the answer ends in the middle") from None
        except OSError as error:
            raise ReadError(f"cannot connect: {error.strerror or type(error).__name__}") from None
        except (http.client.HTTPException, UnicodeError) as error:
            raise ReadError(f"no HTTP there ({type(error).__name__})") from None
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        config = self._config
        headers = {
            "Content-Type": "application/x-www-form-urlencoded",
            "Accept": "application/json",
            "User-Agent": f"gpuglass-anomaly/{gpuglass.__version__}",
            "Connection": "close",
            **config.headers,
        }
        headers |= {name: _secret(path) for name, path in config.header_files.items()}
        if config.bearer_token_file:
            headers["Authorization"] = f"Bearer {_secret(config.bearer_token_file)}"
        elif config.username:
            pair = f"{config.username}:{_secret(config.password_file)}".encode()
            headers["Authorization"] = "Basic " + base64.b64encode(pair).decode("ascii")
        return headers

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._config.ca_file or None)
        if self._config.cert_file:
            context.load_cert_chain(self._config.cert_file, self._config.key_file)
        return context


def _secret(path: str) -> str:
    with Path(path).open("rb") as file:
        text = file.read(_MAX_SECRET_BYTES).decode("utf-8", "replace").strip()
    if not text or not text.isprintable():
        raise ReadError(f"{path}: must hold one printable line")
    return text


def _read(
    response: http.client.HTTPResponse, connection: http.client.HTTPConnection, deadline: float
) -> bytes:
    """The whole body; a server that drips is cut at the deadline."""
    parts: list[bytes] = []
    size = 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if connection.sock is not None:
            connection.sock.settimeout(left)
        part = response.read1(_CHUNK)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise ReadError(f"answers with more than {MAX_ANSWER_BYTES >> 20} MiB", smaller=True)
    if response.length:  # what Content-Length promised and did not come; read1 does not complain
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _refusal(response: http.client.HTTPResponse, body: bytes) -> ReadError:
    retry = response.getheader("Retry-After") or ""
    wait = float(retry) if retry.isdigit() and len(retry) < 6 else 0.0
    try:
        text = _DECODE.decode(body).error
    except msgspec.DecodeError:
        text = ""
    status = response.status
    if status in (301, 302, 303, 307, 308):
        return ReadError(f"redirects (status {status}), which is not followed: name the final url")
    if status in (401, 403):
        return ReadError(f"refuses the credentials (status {status})")
    if status == 404:
        return ReadError("has no query API there (status 404): is the prefix in the url right?")
    smaller = status in (400, 413, 422, 503) and any(
        word in text for word in ("too many samples", "maximum resolution", "exceed", "limit", "timed out")
    )
    return ReadError(f"refuses with status {status}" + (f": {text}" if text else ""), wait, smaller)


def _parsed(body: bytes) -> _Answer:
    try:
        return _DECODE.decode(body)
    except msgspec.DecodeError:
        if body.lstrip()[:1] == b"<":
            raise ReadError("answers with a page instead of JSON: is the url that of a query API?") from None
        raise ReadError("answers with broken or cut-off JSON") from None


def _data(answer: _Answer) -> _Data:
    if answer.status != "success" or answer.data is None:
        raise ReadError(f"refuses the query: {answer.error or 'no reason given'}")
    return answer.data


def _pairs(text: bytes) -> FloatArray:
    """`[[t,"v"],…]` as an array of shape (samples, 2)."""
    try:
        pairs = _SAMPLES.decode(text)
        return np.array([(at, float(value)) for at, value in pairs])
    except (msgspec.DecodeError, ValueError):
        raise ReadError("answers with samples that cannot be read") from None


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
