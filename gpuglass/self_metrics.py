"""What a process of the pack says about itself at each scrape: build, configuration, server, CPU and
memory."""

from __future__ import annotations

import os
import platform
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import gpuglass
from gpuglass.families import agent as families
from gpuglass.family import Batch, Tier
from gpuglass.server import ServerStats

_PAGE = os.sysconf("SC_PAGE_SIZE")


class ReloadState:
    """How the last load of the configuration went."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self.ok = True
        self.taken_at = round(wall(), 3)

    def taken(self) -> None:
        """The configuration on disk is in force."""
        self.ok, self.taken_at = True, round(self._wall(), 3)

    def refused(self) -> None:
        """The one on disk was refused and the old one stays."""
        self.ok = False


class SelfMetrics:
    """Fills a batch from memory and /proc/self."""

    def __init__(
        self,
        server: Callable[[], ServerStats],
        series: Callable[[], Mapping[Tier, int]],
        reloads: ReloadState,
        capabilities: Sequence[Callable[[], Mapping[str, str]]],
        has_web_config: bool,
    ) -> None:
        self._server = server
        self._series = series
        self._reloads = reloads
        self._capabilities = capabilities
        self._has_web_config = has_web_config
        self._started = round(time.time(), 3)

    def fill(self, batch: Batch) -> None:
        """Add all samples."""
        batch.add(families.BUILD_INFO, 1, gpuglass.__version__, platform.python_version())
        batch.add(families.START_TIME, self._started)
        batch.add(families.CONFIG_RELOAD_OK, int(self._reloads.ok))
        batch.add(families.CONFIG_RELOAD_TIME, self._reloads.taken_at)
        for states in self._capabilities:
            for feature, state in states().items():
                batch.add(families.CAPABILITY, 1, feature, state)
        for tier, count in self._series().items():
            batch.add(families.SERIES, count, tier.value)
        self._fill_server(batch, self._server())
        usage = resource.getrusage(resource.RUSAGE_SELF)
        batch.add(families.CPU, round(usage.ru_utime + usage.ru_stime, 2))
        batch.add(families.THREADS, threading.active_count())
        resident, fds = resident_bytes(), open_fds()
        if resident is not None:
            batch.add(families.MEMORY, resident)
        if fds is not None:
            batch.add(families.OPEN_FDS, fds)

    def _fill_server(self, batch: Batch, stats: ServerStats) -> None:
        for (handler, code), count in stats.requests.items():
            batch.add(families.HTTP_REQUESTS, count, handler, str(code))
        for reason, count in stats.rejected.items():
            batch.add(families.HTTP_REJECTED, count, reason.value)
        for handler, rendering in stats.renderings.items():
            batch.add(families.SCRAPES, rendering.count, handler)
            batch.add(families.SCRAPE_SECONDS, round(rendering.seconds, 4), handler)
        batch.add(families.HTTP_BYTES, stats.sent_bytes)
        batch.add(families.HTTP_CONNECTIONS, stats.connections)
        if self._has_web_config:
            batch.add(families.WEB_CONFIG_OK, int(stats.web_config_ok))


def resident_bytes() -> int | None:
    """Resident memory of this process; None if /proc does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return None


def open_fds() -> int | None:
    """Open file descriptors of this process; None if /proc does not tell."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None
