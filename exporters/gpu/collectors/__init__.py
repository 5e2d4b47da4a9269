"""Collectors: each reads one concept of one GPU.

A collector is made anew when the driver is loaded, runs in the thread of its GPU, and notes entries in the
`Observations` it is given. It may raise `GpuDown` and `DriverDown`; any other exception is its own failure.
"""

from __future__ import annotations

from threading import Thread
from typing import Protocol

from exporters.gpu.observe import Observations
from gpuglass.family import Tier


class Collector(Protocol):
    """Reads one concept of one GPU at the rate of its tier."""

    name: str
    tier: Tier

    def collect(self, see: Observations, now: float) -> None:
        """Read the driver and note entries. `now` is CLOCK_MONOTONIC in seconds."""

    def close(self) -> Thread | None:
        """Give back what the driver lent; the driver may be gone.

        Returns a thread of its own that may still be inside a call: until it has ended the library must stay
        loaded.
        """
