"""A sidecar on a fake server, with clocks that a test moves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from anomaly_sidecar.command import make_units
from anomaly_sidecar.config import Config, check_reload, parse
from anomaly_sidecar.detectors import KINDS
from anomaly_sidecar.presets import PRESETS
from anomaly_sidecar.sidecar import Sidecar
from anomaly_sidecar.workers import InlineWorkers, WorkerPool
from gpuglass import catalog
from gpuglass.family import Owner, Tier
from gpuglass.store import Store, negotiate
from tests.anomaly_sidecar.fake_server import FakeServer, Series

START = 1_700_006_400.0
DAY = 86_400.0


@dataclass
class ManualClock:
    """Moves only when told, or when the sidecar waits."""

    wall: float = START
    mono: float = 1000.0
    ended: bool = False

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.mono

    def wait(self, seconds: float) -> bool:
        time.sleep(0.001)
        return self.ended

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.mono += seconds


def load_at(at: float, number: int = 0) -> float:
    """A load with a shape of the day and a repeatable noise."""
    noise = math.sin(at * 12.9898 + number * 78.233) * 43758.5453
    return 100 + 30 * math.sin(2 * math.pi * at / DAY + number) + 6 * (noise - math.floor(noise) - 0.5)


def fleet(count: int) -> Any:
    """A world of `count` pods for any expression."""

    def world(query: str, at: float) -> Series:
        return {
            (("__name__", "load"), ("job", "j"), ("pod", f"p{number}")): load_at(at, number)
            for number in range(count)
        }

    return world


def config(url: str, **sections: Any) -> Config:
    document = {
        "queries": [{"name": "load", "expr": "load", "history": "3d", "offset": "0s", "interval": "5m"}],
        **sections,
    }
    document["prometheus"] = {"url": url, "timeout": "60s", **document.get("prometheus", {})}
    return parse(document, "test", KINDS, PRESETS)


@dataclass
class Rig:
    sidecar: Sidecar
    store: Store
    clock: ManualClock
    server: FakeServer
    workers: InlineWorkers | WorkerPool

    def reload(self, **sections: Any) -> None:
        """Let it run another configuration, as SIGHUP does."""
        loaded = config(self.server.url, **sections)
        check_reload(self.sidecar.latest, loaded)
        self.sidecar.reload(loaded, make_units(loaded, self.workers))

    def advance(self, seconds: float) -> None:
        """Let time pass and read what has become due."""
        self.clock.advance(seconds)
        self.sidecar.settle(250)

    def samples(self, name: str, **labels: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Published samples of a family by labels, those that have `labels`."""
        text = self.store.exposition(frozenset(Tier), negotiate("")).decode()
        return {
            tuple(sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }

    def value(self, name: str, **labels: str) -> float:
        (found,) = self.samples(name, **labels).values()
        return found


@contextmanager
def sidecar_on(
    server: FakeServer,
    clock: ManualClock | None = None,
    workers: InlineWorkers | WorkerPool | None = None,
    **sections: Any,
) -> Iterator[Rig]:
    """A sidecar that has not read anything yet; its clock is the server's unless the test moves one."""
    workers = workers or InlineWorkers()
    clock = clock or ManualClock()
    server.now = lambda: clock.wall
    loaded = config(server.url, **sections)
    store = Store(catalog.owned_by(Owner.ANOMALY))
    sidecar = Sidecar(loaded, make_units(loaded, workers), workers, store, clock)
    sidecar.open()
    try:
        yield Rig(sidecar, store, clock, server, workers)
    finally:
        sidecar.close()
