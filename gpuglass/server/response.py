"""Answers as values, their bytes on the wire, and the pages that are not metrics."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus

TEXT = "text/plain; charset=utf-8"
SERVER = "gpuglass"
"""Value of the Server field, without a version: that is for those who may read `/`."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer. `fields` are those beside Content-Type, Content-Length, Date, Server and Connection."""

    status: HTTPStatus
    body: bytes
    content_type: str = TEXT
    fields: tuple[tuple[str, str], ...] = ()


def text(status: HTTPStatus, line: str, *fields: tuple[str, str]) -> Response:
    """An answer of one line."""
    return Response(status, line.encode("utf-8", "replace") + b"\n", TEXT, fields)


def head_bytes(response: Response, close: bool, more: Iterable[tuple[str, str]] = ()) -> bytes:
    """Status line and header fields, with the empty line that ends them."""
    status = response.status
    fields = [
        ("Date", formatdate(usegmt=True)),
        ("Server", SERVER),
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(response.body))),
        ("Connection", "close" if close else "keep-alive"),
        *response.fields,
        *more,
    ]
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in fields)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


def landing_page(title: str, version: str) -> Response:
    """What a person sees who opens the address in a browser."""
    links = (
        ("/metrics/fast", "metrics to scrape each second"),
        ("/metrics/slow", "metrics to scrape each 15 seconds"),
        ("/metrics", "both"),
        ("/healthz", "the process is alive"),
        ("/readyz", "the process has metrics to give"),
    )
    items = "".join(f'<li><a href="{path}">{path}</a>: {what}</li>' for path, what in links)
    name = html.escape(f"{title} {version}".strip())
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title></head>'
        f"<body><h1>{name}</h1><ul>{items}</ul></body></html>\n"
    )
    return Response(HTTPStatus.OK, page.encode("utf-8", "replace"), "text/html; charset=utf-8")


REFUSED_AT_DOOR = (
    b"HTTP/1.1 503 Service Unavailable\r\nServer: gpuglass\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: 21\r\nRetry-After: 1\r\nConnection: close\r\n\r\ntoo many connections\n"
)
"""Raw answer for a connection beyond the limit, for which no thread is started."""

PLAIN_ON_TLS = (
    b"HTTP/1.1 400 Bad Request\r\nServer: gpuglass\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: 26\r\nConnection: close\r\n\r\nthis port speaks TLS only\n"
)
"""Raw answer for a client that speaks plain HTTP to a port with TLS."""
