"""Which ports the demo's servers take: those the user asked for, or free ones near the documented.

In: a documented port and what the user asked for. Out: a port that was free a moment ago, or one line that
says which is busy.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection

from gpuglass.errors import ConfigError

HOST = "127.0.0.1"
TRIES = 50
"""Ports after the documented one that are tried."""


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as server:
        server.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: TIME_WAIT is no hindrance
        try:
            server.bind((HOST, port))
        except OSError:
            return False
    return True


def choose(
    option: str,
    documented: int,
    asked: int | None,
    avoid: Collection[int] = (),
    is_free: Callable[[int], bool] = is_free,
) -> int:
    """The port for a server. Raises ConfigError if `asked` is busy, or none near `documented` is free."""
    if asked is not None:
        if asked in avoid or not is_free(asked):
            raise ConfigError(f"{option} {asked}: the port is in use on {HOST}; give another or leave it out")
        return asked
    for port in range(documented, documented + TRIES):
        if port not in avoid and is_free(port):
            return port
    last = documented + TRIES - 1
    raise ConfigError(f"ports {documented} to {last} of {HOST} are all in use; give a free one with {option}")
