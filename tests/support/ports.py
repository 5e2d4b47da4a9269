"""Free TCP ports for servers that tests start.

They lie below the range from which the kernel gives ports to clients: a server that takes its port half a
minute later still finds it free.
"""

from __future__ import annotations

import secrets
import socket
import threading
from pathlib import Path

_FIRST = 10_000
_CLIENTS = Path("/proc/sys/net/ipv4/ip_local_port_range")

_lock = threading.Lock()
_given: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago; this process gets each but once."""
    clients = int(_CLIENTS.read_text().split()[0])
    end = clients if clients > 2 * _FIRST else 1 << 16
    with _lock:
        while True:
            # Not `random`, whose numbers repeat where a test sets its seed.
            port = _FIRST + secrets.randbelow(end - _FIRST)
            if port not in _given and _is_free(port):
                _given.add(port)
                return port


def _is_free(port: int) -> bool:
    with socket.socket() as server:
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
