"""Every alert on raw series, through all recording rules, by promtool: exactly what is expected fires, with
all labels and annotations, in both layouts of endpoints and both forms of histograms."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from alert_rules import files
from gpuglass.demo import distribution
from gpuglass.promql import Histograms
from recording_rules.groups import Options
from recording_rules.settings import parse
from tests.alert_rules import cases_balance, cases_cost, cases_health, cases_latency, cases_memory, cases_self
from tests.alert_rules.world import RULES, Layout, World
from tests.support import tools


@dataclass(frozen=True, slots=True)
class Case:
    """A world, after how many minutes it is judged, how often rules run (seconds), settings."""

    build: Callable[[World], None]
    minutes: int
    every: int = 60
    settings: Mapping[str, Any] = field(default_factory=dict)
    everywhere: bool = True
    """Whether it is run with both versions of Prometheus and both layouts, or with the first only."""
    histograms: bool = False
    """Whether it holds histograms, and is run with both forms of them."""


WORLDS = {
    "health": Case(cases_health.build, cases_health.MINUTES),
    "memory": Case(cases_memory.build, cases_memory.MINUTES),
    "latency": Case(cases_latency.build, cases_latency.MINUTES, histograms=True),
    "balance": Case(cases_balance.build, cases_balance.MINUTES, cases_balance.EVERY, histograms=True),
    "cost": Case(cases_cost.build, cases_cost.MINUTES),
    "idle": Case(cases_cost.build_idle, cases_cost.IDLE_MINUTES, 120, everywhere=False),
    "used": Case(cases_cost.build_used, cases_cost.IDLE_MINUTES, 120, everywhere=False),
    "used until now": Case(cases_cost.build_used_until_now, cases_cost.IDLE_MINUTES, 120, everywhere=False),
    "target": Case(cases_cost.build_target, cases_cost.MINUTES, 60, cases_cost.TARGET, everywhere=False),
    "dcgm": Case(cases_cost.build_dcgm, cases_cost.MINUTES, everywhere=False),
    "self": Case(cases_self.build, cases_self.MINUTES),
    "no sidecar": Case(cases_self.build_without_sidecar, cases_self.MINUTES, everywhere=False),
}
RUNS: list[tuple[str, Layout, Histograms]] = [
    ("debian-prometheus", "union", "classic"),
    ("prometheus3", "pair", "classic"),
    ("prometheus3", "union", "native"),
]


def write(folder: Path, name: str, layout: Layout, histograms: Histograms) -> Path:
    """Rule files and the test file of one world."""
    case = WORLDS[name]
    settings = parse(case.settings, name)
    options = Options(histograms=histograms)
    rules = files.rule_files(settings, options, "prometheus")
    for file, text in rules.items():
        (folder / file).write_text(text)
    world = World(layout, histograms)
    case.build(world)
    order = [group.name for group in files.all_groups(settings, options)]
    test = {
        "rule_files": list(rules),
        "evaluation_interval": f"{case.every}s",
        "group_eval_order": order,
        "tests": [world.test(case.minutes)],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(test))
    return path


@pytest.mark.parametrize(
    ("version", "layout", "histograms", "world"),
    [
        pytest.param(*run, name, marks=pytest.mark.needs(run[0]))
        for run in RUNS
        for name, case in WORLDS.items()
        if case.everywhere or run == RUNS[0]
        if case.histograms or run[2] == "classic"
    ],
)
@pytest.mark.timeout(300)
def test_exactly_the_expected_alerts_fire(
    tmp_path: Path, version: str, layout: Layout, histograms: Histograms, world: str
) -> None:
    file = write(tmp_path, world, layout, histograms)
    debian = version == "debian-prometheus"
    promtool = distribution.find("promtool") if debian else tools.PROMETHEUS.program("promtool")
    done = subprocess.run(
        [str(promtool), "test", "rules", file.name], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]


def test_every_alert_fires_somewhere_and_nearly_fires_twice() -> None:
    fires: Counter[str] = Counter()
    near: Counter[str] = Counter()
    for case in WORLDS.values():
        world = World()
        case.build(world)
        fires.update({name: len(alerts) for name, alerts in world.expected.items()})
        near.update(name for name, _ in set(world.near_misses))
    names = {alert.name for alert in RULES}
    assert {name for name in names if not fires[name]} == set()
    assert {name for name in names if near[name] < 2} == set()
