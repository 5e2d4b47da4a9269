"""HTTP GET as the doctor needs it: bounded in time and size, and careful with where credentials go.

In flows a `Url`, which never shows its credentials; out flows an `Answer` of any status, or `NoAnswer` with
one line. A redirect is followed only to the same host and never from TLS to plain text. No proxy is used.
"""

from __future__ import annotations

import base64
import http.client
import ssl
import time
from dataclasses import dataclass, field, replace
from urllib.parse import unquote, urljoin, urlsplit

import gpuglass
from gpuglass.doctor.bounded import TookTooLong, bounded

MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class UrlError(ValueError):
    """Not a URL that can be used; the text does not repeat it, because it may hold a password."""


class NoAnswer(Exception):
    """No HTTP answer. `refused` is true if nobody listens there."""

    def __init__(self, text: str, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


@dataclass(frozen=True, slots=True)
class Url:
    """Where to ask. Its text leaves the credentials out."""

    scheme: str
    host: str
    port: int
    path: str = ""
    """Without a slash at its end."""
    authorization: str = field(default="", repr=False)
    """Value of the Authorization field."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, two header fields and the body's beginning."""

    status: int
    content_type: str
    server: str
    body: bytes
    complete: bool = True
    """False if the body was longer than the limit."""


def parse_url(text: str) -> Url:
    """Read an http or https URL, with or without user:password@. Raises `UrlError`."""
    try:
        parts = urlsplit(text.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UrlError("is not a URL; special characters of a password must be percent-encoded") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UrlError("must be a URL such as http://127.0.0.1:9090")
    if not all(char.isprintable() and not char.isspace() for char in parts.path + host):
        raise UrlError("has characters that a URL cannot have")
    authorization = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
    return Url(
        parts.scheme,
        host,
        port or (443 if parts.scheme == "https" else 80),
        parts.path.rstrip("/"),
        authorization,
    )


def get(url: Url, target: str, *, seconds: float = 3.0, limit: int = 1 << 20, verify: bool = True) -> Answer:
    """GET `url` + `target`. At most `seconds` in all, redirects and name resolution included; raises
    `NoAnswer`."""
    deadline = time.monotonic() + seconds
    try:
        return bounded("http", seconds, lambda: _get(url, url.path + target, deadline, limit, verify))
    except (TookTooLong, TimeoutError):
        raise NoAnswer(f"no answer within {seconds:g} s") from None


def _get(url: Url, target: str, deadline: float, limit: int, verify: bool) -> Answer:
    for _ in range(MAX_REDIRECTS + 1):
        answer, location = _ask(url, target, deadline, limit, verify)
        if answer.status not in _REDIRECTS or not location:
            return answer
        url, target = _redirected(url, target, location)
    raise NoAnswer("redirects in a circle")


def _redirected(url: Url, target: str, location: str) -> tuple[Url, str]:
    try:
        parts = urlsplit(urljoin(f"{replace(url, path='')}{target}", location))
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = parts.hostname or ""
    except ValueError:
        raise NoAnswer("redirects to something that is not a URL") from None
    upgraded = url.scheme == "http" and parts.scheme == "https"
    same_place = parts.scheme == url.scheme and port == url.port
    if host != url.host or not (same_place or upgraded):
        raise NoAnswer(f"redirects to another place ({host[:80]}), which is not followed")
    query = f"?{parts.query}" if parts.query else ""
    return replace(url, scheme=parts.scheme, port=port), f"{parts.path or '/'}{query}"


def _ask(url: Url, target: str, deadline: float, limit: int, verify: bool) -> tuple[Answer, str]:
    left = max(0.05, deadline - time.monotonic())
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        context = ssl.create_default_context()
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(url.host, url.port, timeout=left, context=context)
    else:
        connection = http.client.HTTPConnection(url.host, url.port, timeout=left)
    headers = {"User-Agent": f"gpuglass-doctor/{gpuglass.__version__}", "Connection": "close"}
    if url.authorization:
        headers["Authorization"] = url.authorization
    try:
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        body = response.read(limit + 1)
        answer = Answer(
            response.status,
            response.getheader("Content-Type") or "",
            response.getheader("Server") or "",
            body[:limit],
            len(body) <= limit,
        )
        return answer, response.getheader("Location") or ""
    except TimeoutError:
        raise
    except ssl.SSLCertVerificationError as error:
        raise NoAnswer(f"its certificate is not trusted: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise NoAnswer(f"TLS fails: {(error.reason or 'handshake').lower().replace('_', ' ')}") from None
    except ConnectionRefusedError:
        raise NoAnswer("connection refused: nothing listens there", refused=True) from None
    except OSError as error:
        raise NoAnswer(f"cannot connect: {error.strerror or type(error).__name__}") from None
    except (http.client.HTTPException, UnicodeError) as error:
        raise NoAnswer(f"no HTTP there ({type(error).__name__})") from None
    finally:
        connection.close()
