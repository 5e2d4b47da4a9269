"""The bounds that keep a hostile or broken client from costing more than a little memory, CPU and time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds of one server. Raises `ValueError` for a bound that is not positive."""

    connections: int = 64
    """Open connections. One more is answered with 503 at once and closed."""
    scrapes: int = 8
    """Scrapes rendered or sent at once, which bounds the memory for bodies. One more gets 503."""
    head_bytes: int = 16 * 1024
    """Request line and header fields together."""
    header_fields: int = 64
    """Number of header fields of a request."""
    request_seconds: float = 10.0
    """From the first byte of a request (or the start of a connection) to the last byte of its answer."""
    idle_seconds: float = 60.0
    """How long a kept connection may wait for its next request; longer than usual scrape intervals."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: {value} is not a positive, finite number")
