"""Request heads: bytes from a socket become a `Head`, or a `BadRequest` that says how to answer.

Pure functions, and stricter than a general server: a scraper sends nothing unusual, so whatever RFC 9112 lets
a server refuse (bare LF, folded fields, bodies) is refused. Nothing here waits or counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from gpuglass.server.stats import Reason

MAX_LINE = 4096
"""Bytes of a request line; the longest path served has 13."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb"{1,32}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])\Z")
_FIELD = re.compile(rb"(" + _TOKEN + rb"+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*\Z")
_ABSOLUTE = re.compile(r"https?://[^/?#]+", re.IGNORECASE)
_FIRST = re.compile(_TOKEN)
_LENGTH = re.compile(r"[0-9]{1,18}\Z")
_TLS_HANDSHAKE = 0x16
"""Content type of the record that a TLS client sends first (RFC 8446, section 5.1)."""
_SINGLE = frozenset({"authorization", "content-length", "host"})


class BadRequest(Exception):
    """The bytes cannot be served: the status to answer, the reason to count, a line for the client."""

    def __init__(self, status: HTTPStatus, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason
        self.text = text


@dataclass(frozen=True, slots=True)
class Head:
    """A request without its body. Field names are lower-case; repeated fields are joined with commas."""

    method: str
    path: str
    http11: bool
    fields: Mapping[str, str]

    @property
    def keep_alive(self) -> bool:
        """Whether the client wants the connection to stay (RFC 9112, section 9.3)."""
        options = {option.strip().lower() for option in self.fields.get("connection", "").split(",")}
        return "close" not in options if self.http11 else "keep-alive" in options

    @property
    def has_body(self) -> bool:
        """Whether a body follows (RFC 9112, section 6.3)."""
        return "transfer-encoding" in self.fields or int(self.fields.get("content-length", "0")) > 0

    @property
    def scrape_timeout(self) -> float | None:
        """Seconds after which Prometheus no longer wants the answer; None if it does not say or says junk."""
        text = self.fields.get("x-prometheus-scrape-timeout-seconds", "")
        try:
            seconds = float(text)
        except ValueError:
            return None
        return seconds if math.isfinite(seconds) and seconds > 0 and "_" not in text else None


def take_head(buffer: bytearray, max_bytes: int, max_fields: int) -> Head | None:
    """Cut the first request head off `buffer`, or return None if it is not complete yet.

    Raises `BadRequest` as soon as the bytes can no longer become a request.
    """
    while buffer.startswith(b"\r\n"):  # RFC 9112, section 2.2: empty lines before a request are ignored
        del buffer[:2]
    if not buffer or buffer == b"\r":
        return None
    if buffer[0] == _TLS_HANDSHAKE:
        raise BadRequest(HTTPStatus.BAD_REQUEST, Reason.TLS, "this port does not speak TLS")
    if not _FIRST.match(buffer):
        raise _malformed("this is not HTTP")
    newline = buffer.find(b"\n", 0, MAX_LINE + 2)
    if newline < 0:
        if len(buffer) > MAX_LINE:
            raise BadRequest(
                HTTPStatus.REQUEST_URI_TOO_LONG, Reason.TOO_LARGE, "the request line is too long"
            )
        return None
    line = _request_line(bytes(buffer[:newline]))
    end = buffer.find(b"\r\n\r\n", 0, max_bytes)
    if end < 0:
        if len(buffer) >= max_bytes:
            raise _too_large("the header is too long")
        return None
    fields = _fields(bytes(buffer[newline + 1 : end + 2]), max_fields)
    del buffer[: end + 4]
    method, target, http11 = line
    if http11 and "host" not in fields:  # RFC 9112, section 3.2
        raise _malformed("the Host field is missing")
    if not _LENGTH.match(fields.get("content-length", "0")):
        raise _malformed("Content-Length is not a number")
    return Head(method, _path(target), http11, fields)


def gzip_accepted(accept_encoding: str) -> bool:
    """Whether gzip may be sent (RFC 9110, section 12.5.3): named, or covered by `*`, with a weight above 0.

    `prometheus_client` has a function of this name that does not read weights.
    """
    weights: dict[str, float] = {}
    for element in accept_encoding.split(","):
        coding, *parameters = (part.strip().lower() for part in element.split(";"))
        weight = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        weights["gzip" if coding == "x-gzip" else coding] = weight
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def _request_line(line: bytes) -> tuple[str, str, bool]:
    if not line.endswith(b"\r"):
        raise _malformed("lines end in CR LF")
    match = _REQUEST_LINE.match(line[:-1])
    if match is None:
        raise _malformed("the request line is malformed")
    method, target, major, minor = (group.decode("ascii") for group in match.groups())
    if major != "1":
        raise BadRequest(
            HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, Reason.MALFORMED, "this server speaks HTTP/1.1"
        )
    return method, target, minor != "0"


def _fields(block: bytes, max_fields: int) -> dict[str, str]:
    """Read the fields of `block`, which is empty or ends in CR LF."""
    if block.count(b"\n") > max_fields:
        raise _too_large("too many header fields")
    fields: dict[str, str] = {}
    for line in block.split(b"\r\n")[:-1]:
        match = _FIELD.match(line)
        if match is None:
            raise _malformed("a header field is malformed")
        name, value = match[1].decode("ascii").lower(), match[2].decode("latin-1")
        if name in fields and name in _SINGLE:
            raise _malformed("a header field is given twice")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def _path(target: str) -> str:
    """Path of a request target. It is compared as it stands: nothing is decoded or normalised."""
    if absolute := _ABSOLUTE.match(target):  # RFC 9112, section 3.2.2
        target = target[absolute.end() :]
        if not target.startswith("/"):
            target = "/" + target
    return target.partition("?")[0]


def _malformed(text: str) -> BadRequest:
    return BadRequest(HTTPStatus.BAD_REQUEST, Reason.MALFORMED, text)


def _too_large(text: str) -> BadRequest:
    return BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, Reason.TOO_LARGE, text)
