"""Configurations that are taken, and the one line for each that is not."""

from __future__ import annotations

from typing import Any

import pytest

from anomaly_sidecar.config import Config, parse
from anomaly_sidecar.detectors import KINDS
from anomaly_sidecar.presets import PRESETS
from gpuglass.errors import ConfigError

Q = {"name": "q", "expr": "up"}


def parsed(**document: Any) -> Config:
    return parse(document, "a.yaml", KINDS, PRESETS)


def test_defaults_and_durations() -> None:
    config = parsed(queries=[{**Q, "interval": "30s", "history": "14d"}])
    (query,) = config.queries
    assert (query.interval, query.history, query.direction) == (30, 14 * 86400, "both")
    assert config.server.listen.endswith(":9957")


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_a_configuration(preset: str) -> None:
    config = parsed(presets=[preset])
    assert config.queries or config.detectors


def test_an_entry_of_the_file_replaces_that_of_a_preset() -> None:
    name = PRESETS["gpu"]["queries"][0]["name"]
    config = parsed(presets=["gpu"], queries=[{"name": name, "expr": "up"}])
    assert [query.expr for query in config.queries if query.name == name] == ["up"]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"queries": [{"name": "q"}]}, "a.yaml: queries: q: lacks the key expr"),
        ({"queries": [{**Q, "expr": "x_total"}]}, "queries: q: expr: x_total is a counter, .* use rate"),
        ({"queries": [{**Q, "expr": " "}]}, "expr: must be a PromQL expression"),
        ({"queries": [Q, Q]}, "the name q is given twice"),
        ({"queries": [{**Q, "name": "Q q"}]}, "name: must be lower-case"),
        ({"queries": [{**Q, "direction": "up"}]}, "direction"),
        ({"queries": [{**Q, "interval": "1 week"}]}, "expected a duration"),
        ({"queries": [{**Q, "interval": "0s"}]}, "interval: must be between 1s and 3600s"),
        ({"queries": [{**Q, "history_step": "1s"}]}, "history_step: must be between 60s"),
        ({"queries": [{**Q, "valid": [2, 1]}]}, "valid: 2 is not below 1"),
        ({"queries": [{**Q, "color": 1}]}, "queries: q: there is no key"),
        ({"presets": ["gpus"]}, "presets: there is no 'gpus'; there are"),
        ({"prometheus": {"url": "prometheus:9090"}}, "url: must be a URL"),
        ({"prometheus": {"url": "http://u:p@h"}}, "url: must not hold a password"),
        ({"prometheus": {"username": "u"}}, "password_file"),
        ({"prometheus": {"bearer_token_file": "t", "username": "u", "password_file": "p"}}, "username"),
        ({"prometheus": {"headers": {"Authorization": "x"}}}, "headers: Authorization cannot be set here"),
        ({"prometheus": {"headers": {"X": "a\r\nB: c"}}}, "headers"),
        ({"detectors": [{"name": "d", "kind": "nothing", "inputs": {}}]}, "there is no kind 'nothing'"),
        ({"workers": 99}, "workers"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(document: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        parsed(**document)
    assert "\n" not in str(error.value)
