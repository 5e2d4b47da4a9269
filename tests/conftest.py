"""Fixtures for the tests of all rooms; tests/README.md explains them and `@pytest.mark.needs`."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

from gpuglass.demo import distribution
from tests.support import tools

pytest_plugins = ["tests.support.plugin"]

# A loaded machine is no defect of the code: `timeout` ends what hangs.
hypothesis.settings.register_profile("gpuglass", deadline=None)
hypothesis.settings.load_profile("gpuglass")


def _built(name: str) -> Path:
    program = tools.PROMETHEUS.program(name)
    assert program, 'mark the test with @pytest.mark.needs("prometheus3")'
    return program


@pytest.fixture
def debian_prometheus() -> Path:
    """The distribution's Prometheus (2.42 on Debian 12); needs debian-prometheus."""
    return distribution.find("prometheus")


@pytest.fixture
def debian_promtool() -> Path:
    """The distribution's promtool; needs debian-prometheus."""
    return distribution.find("promtool")


@pytest.fixture
def prometheus3() -> Path:
    """Prometheus 3; needs prometheus3."""
    return _built("prometheus")


@pytest.fixture
def promtool3() -> Path:
    """The promtool of Prometheus 3; needs prometheus3."""
    return _built("promtool")


@pytest.fixture
def alertmanager_program() -> Path:
    """Alertmanager; needs alertmanager."""
    program = tools.ALERTMANAGER.program("alertmanager")
    assert program, 'mark the test with @pytest.mark.needs("alertmanager")'
    return program


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.needs(name)) for name in ("debian-prometheus", "prometheus3")
    ]
)
def prometheus(request: pytest.FixtureRequest) -> Path:
    """Runs the test with the distribution's Prometheus and with Prometheus 3, as far as they are there."""
    return distribution.find("prometheus") if request.param == "debian-prometheus" else _built("prometheus")
