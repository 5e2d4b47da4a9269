"""Every alert on raw series, through all recording rules, by promtool: exactly what is expected fires, with
all labels and annotations, in both layouts of endpoints and both forms of histograms."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from alert_rules import files, groups
from gpuglass.demo import distribution
from gpuglass.promql import Histograms
from recording_rules.groups import Options
from recording_rules.settings import Settings
from tests.alert_rules import cases_health, cases_self
from tests.alert_rules.world import Layout, World
from tests.support import tools

WORLDS: dict[str, tuple[Callable[[World], None], int]] = {
    "health": (cases_health.build, cases_health.MINUTES),
    "self": (cases_self.build, cases_self.MINUTES),
    "no sidecar": (cases_self.build_without_sidecar, cases_self.MINUTES),
}
RUNS: list[tuple[str, Layout, Histograms]] = [
    ("debian-prometheus", "union", "classic"),
    ("prometheus3", "pair", "classic"),
    ("prometheus3", "union", "native"),
]


def write(folder: Path, name: str, layout: Layout, histograms: Histograms) -> Path:
    """Rule files and the test file of one world."""
    settings = Settings()
    options = Options(histograms=histograms)
    rules = files.rule_files(settings, options, "prometheus")
    for file, text in rules.items():
        (folder / file).write_text(text)
    build, minutes = WORLDS[name]
    world = World(layout, histograms)
    build(world)
    order = [group.name for group in files.all_groups(settings, options)]
    test = {
        "rule_files": list(rules),
        "evaluation_interval": "1m",
        "group_eval_order": order,
        "tests": [world.test(minutes)],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(test))
    return path


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("version", "layout", "histograms"),
    [pytest.param(*run, marks=pytest.mark.needs(run[0])) for run in RUNS],
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
    for build, _ in WORLDS.values():
        world = World()
        build(world)
        fires.update({name: len(alerts) for name, alerts in world.expected.items()})
        near.update(name for name, _ in set(world.near_misses))
    names = {alert.name for alert in groups.alerts(Settings())}
    assert {name for name in names if not fires[name]} == set()
    assert {name for name in names if near[name] < 2} == set()
