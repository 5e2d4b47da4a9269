"""A bench for each promtool: the distribution's and Prometheus 3's."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuglass.demo import distribution
from tests.recording_rules.promtool import PATIENCE, Bench
from tests.support import tools


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.needs(name)) for name in ("debian-prometheus", "prometheus3")
    ]
)
def promtool(request: pytest.FixtureRequest) -> Path:
    """Runs the test with both promtools, as far as they are there."""
    if request.param == "debian-prometheus":
        return distribution.find("promtool")
    built = tools.PROMETHEUS.program("promtool")
    assert built
    return built


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run a promtool get more time than others: beside five busy processes it takes minutes."""
    for item in items:
        if "recording_rules" in str(item.path):
            item.add_marker(pytest.mark.timeout(2 * PATIENCE))


@pytest.fixture
def bench(promtool: Path, tmp_path: Path) -> Bench:
    """The rules with default options."""
    return Bench(promtool, tmp_path)
