"""Listen addresses: the text of the setting becomes an `Address`, and an `Address` a bound, listening socket.

Everything that can go wrong on the way is one `ListenError` of one line that names the setting and the mend.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from dataclasses import dataclass

_LISTEN = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[^\s:\[\]/@]*)):(?P<port>[0-9]{1,5})\Z"
)
_MEND = "choose another with listen: HOST:PORT"
_BACKLOG = 128


class ListenError(Exception):
    """The address cannot be used; the text is one line for the user."""


@dataclass(frozen=True, slots=True)
class Address:
    """Host and port. An empty host means all interfaces, port 0 any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_listen(listen: str) -> Address:
    """Read `127.0.0.1:9835`, `[::1]:9835`, `name:9835` or `:9835`.

    The last means all interfaces, as Go's exporters read it. Raises `ListenError`.
    """
    match = _LISTEN.match(listen.strip())
    if match is None:
        raise ListenError(f"listen: {listen[:80]!r} is not HOST:PORT, [IPV6]:PORT or :PORT")
    port = int(match["port"])
    if port > 65535:
        raise ListenError(f"listen: port {port} is above 65535; {_MEND}")
    return Address(match["v6"] or match["host"] or "", port)


def bind(address: Address) -> socket.socket:
    """Return a listening TCP socket. Raises `ListenError`."""
    try:
        if address.host in ("", "::"):
            # Both families on one socket where the kernel has IPv6, as Go does for an unspecified host.
            with contextlib.suppress(OSError):
                return _listen(socket.AF_INET6, ("::", address.port), dual=True)
            if address.host == "":
                return _listen(socket.AF_INET, ("0.0.0.0", address.port))
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # getaddrinfo types its address as a union that includes what only other families use.
        return _listen(found[0][0], found[0][4])
    except socket.gaierror as error:
        raise ListenError(f"listen: cannot resolve {address.host!r}: {error.strerror}; {_MEND}") from None
    except (OSError, UnicodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ListenError(
            f"listen: cannot bind {address}: {reason[:1].lower()}{reason[1:]}; {_MEND}"
        ) from None


def _listen(family: int, where: object, dual: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        sock.bind(where)  # type: ignore[arg-type]
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
