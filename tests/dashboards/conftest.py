"""A simulated fleet in a real Prometheus, once per session and version: two hours at full rate, eight
days at a minute, the rules evaluated into both by that version."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from alert_rules.groups import groups as alert_groups
from gpuglass.demo import distribution
from gpuglass.families import engine, gpu, prices
from gpuglass.family import Tier
from recording_rules.groups import groups
from recording_rules.settings import Settings
from tests.support import tools
from tests.support.backfill import FLAGS, Span, evaluate, fire, write
from tests.support.fleet import Fleet, gpus
from tests.support.prometheus import Prometheus, running_prometheus

END = 1_764_158_400.0
"""A Wednesday noon, UTC, at the border of two blocks."""
HOURS, DAYS = 7_200.0, 8 * 86_400.0
LONG = (
    gpu.INFO,
    gpu.UP,
    gpu.BUSY,
    gpu.SM_ACTIVE,
    gpu.MEMORY_USED,
    gpu.MEMORY_TOTAL,
    gpu.POWER,
    gpu.PROCESS_MEMORY,
    gpu.PROCESS_SM,
    engine.INFO,
    engine.UP,
    engine.REQUESTS,
    engine.KV_USED_BLOCKS,
    engine.KV_POOL_BLOCKS,
    engine.GPU_SECONDS_BY_PART,
    engine.IDLE,
    engine.TENANT_GPU,
    engine.TENANT_TOKENS,
    engine.FRAGMENTATION,
    engine.ALLOCATOR_RESERVED,
    engine.ALLOCATOR_INACTIVE_SPLIT,
    prices.GPU_HOUR,
)
"""What the records of long ranges rest on: these families are there for eight days."""


@dataclass(frozen=True, slots=True)
class World:
    """A server with the fleet, and which fleet that is."""

    prometheus: Prometheus
    fleet: Fleet
    refused: dict[str, str]
    """Records whose expression Prometheus refused."""
    fired: frozenset[str]


@pytest.fixture(scope="session")
def fleet() -> Fleet:
    """Eight GPUs."""
    return Fleet(gpus(8), END - DAYS - 3_600)


@pytest.fixture(scope="session")
def samples(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the fleet's samples; both versions read it."""
    folder = tmp_path_factory.mktemp("fleet")
    promtool = distribution.find("promtool")
    seconds, quarters = np.arange(END - HOURS, END + 1, 1.0), np.arange(END - HOURS, END + 1, 15.0)
    minutes = np.arange(END - DAYS, END - HOURS, 60.0)
    write(folder, promtool, seconds, fleet.blocks(seconds, [Tier.FAST]))
    write(folder, promtool, quarters, [*fleet.blocks(quarters, [Tier.SLOW]), *fleet.foreign(quarters)])
    write(folder, promtool, minutes, fleet.blocks(minutes, [*Tier], [family.name for family in LONG]))
    return folder


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=pytest.mark.needs("debian-prometheus", name))
        for name in ("debian-prometheus", "prometheus3")
    ],
)
def world(
    request: pytest.FixtureRequest, fleet: Fleet, samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """The fleet with its rules evaluated, in the distribution's Prometheus and in Prometheus 3."""
    debian = request.param == "debian-prometheus"
    found = distribution.find if debian else tools.PROMETHEUS.program
    program, promtool = found("prometheus"), found("promtool")
    assert program and promtool
    folder = tmp_path_factory.mktemp("store") / "store"
    shutil.copytree(samples, folder)
    settings = Settings()
    spans = [Span(END - DAYS, END - HOURS - 300, 300), Span(END - HOURS, END, 30)]
    refused = evaluate(folder, program, promtool, groups(settings), spans)
    fired = fire(folder, program, promtool, alert_groups(settings), Span(END - HOURS, END, 60))
    with running_prometheus(program, [], folder, flags=FLAGS) as server:
        yield World(server, fleet, refused, frozenset(fired))
