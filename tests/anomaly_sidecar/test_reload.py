"""Another configuration while it runs: what did not change goes on, what is broken is not taken."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuglass.errors import ConfigError
from tests.anomaly_sidecar.fake_server import FakeServer, running
from tests.anomaly_sidecar.process import running_sidecar
from tests.anomaly_sidecar.rig import fleet, sidecar_on
from tests.support.ports import free_port

pytestmark = pytest.mark.timeout(300)
"""Seconds: they take a tenth of it, where nothing else runs."""

SCORE = "gpuglass_anomaly_score"
OK = "gpuglass_anomaly_config_last_reload_success"


def query(name: str, expr: str = "load", **settings: Any) -> dict[str, Any]:
    return {"name": name, "expr": expr, "history": "2d", "interval": "5m", "offset": "0s", **settings}


FORECAST = {
    "name": "ahead",
    "kind": "forecast",
    "inputs": {"value": "load"},
    "interval": "5m",
    "offset": "0s",
    "history": "2d",
}


def test_entries_that_did_not_change_go_on_and_others_come_and_go(tmp_path: Path) -> None:
    state = {"folder": str(tmp_path)}
    before = [query("same"), query("floors"), query("other"), query("goes")]
    after = [
        query("comes"),
        query("other", "load * 2"),
        query("floors", min_deviation=1e9),
        query("same"),
    ]
    with running(FakeServer(fleet(3))) as server:
        with sidecar_on(server, queries=before, detectors=[FORECAST]) as rig:
            for seconds in (0, 300, 300):
                rig.advance(seconds)
            steady = {name: rig.samples(SCORE, query=name) for name in ("same", "floors")}
            forecasts = rig.samples("gpuglass_forecast")
            steps = len(server.requests)
        with sidecar_on(server, queries=before, detectors=[FORECAST], state=state) as rig:
            rig.advance(0)
            rig.advance(300)
            units = {unit.spec.name: unit for unit in rig.sidecar.units}
            server.requests.clear()
            rig.reload(queries=after, detectors=[FORECAST], state=state)
            rig.sidecar.turn(0.05)
            assert rig.samples(SCORE, query="same"), "its scores stay there to be scraped"
            assert rig.samples(SCORE, query="floors")
            assert not rig.samples(SCORE, query="goes")
            rig.advance(300)
            now = {unit.spec.name: unit for unit in rig.sidecar.units}
            assert list(now) == ["comes", "other", "floors", "same", "ahead"]
            assert (now["same"], now["ahead"]) == (units["same"], units["ahead"])
            assert rig.samples(SCORE, query="same") == steady["same"]
            assert rig.samples("gpuglass_forecast") == forecasts
            assert now["floors"].analyzer is not units["floors"].analyzer
            assert now["floors"].counts.backfilled == units["floors"].counts.backfilled, "nothing read again"
            learned = rig.samples("gpuglass_anomaly_ready", query="floors")
            assert set(learned.values()) == {1.0}
            assert now["other"].restored == "changed"
            assert len(rig.samples(SCORE, query="comes")) == len(rig.samples(SCORE, query="other")) == 3
            asked = [form["query"] for _, form, _ in server.requests if "start" in form]
            assert set(asked) == {"load", "load * 2"}
            assert len(server.requests) < steps


def test_floors_count_at_once_after_a_reload() -> None:
    bad = [0.0]

    def world(expression: str, at: float) -> Any:
        return {labels: value + bad[0] for labels, value in fleet(2)(expression, at).items()}

    with running(FakeServer(world)) as server, sidecar_on(server, queries=[query("load")]) as rig:
        rig.advance(0)
        bad[0] = 100.0
        rig.advance(300)
        assert min(rig.samples(SCORE).values()) > 1
        rig.reload(queries=[query("load", min_deviation=500.0)])
        rig.advance(300)
        assert max(rig.samples(SCORE).values()) <= 1


def test_a_lower_limit_that_does_not_hold_what_was_learned_starts_anew() -> None:
    with running(FakeServer(fleet(40))) as server, sidecar_on(server, queries=[query("load")]) as rig:
        rig.advance(0)
        rig.reload(queries=[query("load", limit=2)])
        rig.advance(300)
        assert len(rig.samples(SCORE)) == 2


def test_a_read_under_way_is_dropped_with_its_entry() -> None:
    with running(FakeServer(fleet(2))) as server, sidecar_on(server, queries=[query("goes")]) as rig:
        rig.advance(0)
        server.fault, server.faulty = "slow", "load"
        rig.clock.advance(300)
        for _ in range(3):
            rig.sidecar.turn(0.05)
        rig.reload(queries=[query("comes", "other")])
        rig.sidecar.turn(0.05)
        server.release.set()
        server.fault = ""
        rig.sidecar.settle(250)
        assert {unit.spec.name for unit in rig.sidecar.units} == {"comes"}
        assert {dict(labels)["query"] for labels in rig.samples(SCORE)} == {"comes"}


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"workers": 3}, "workers"),
        ({"state": {"folder": "/elsewhere"}}, "state.folder"),
        ({"server": {"listen": "127.0.0.1:1"}}, "server"),
        ({"prometheus": {"concurrency": 9}}, "prometheus.concurrency"),
    ],
)
def test_what_cannot_change_is_refused_by_name(sections: dict[str, Any], named: str) -> None:
    with running(FakeServer(fleet(1))) as server, sidecar_on(server) as rig:
        with pytest.raises(ConfigError, match=f"{named}: cannot change"):
            rig.reload(**sections)
        rig.reload(prometheus={"timeout": "9s"})
        rig.sidecar.turn(0.05)
        assert rig.sidecar.config.prometheus.timeout == 9


# As a process


def test_sighup_takes_a_good_file_and_keeps_the_last_one_where_it_is_broken(tmp_path: Path) -> None:
    config, port = tmp_path / "anomaly.yaml", free_port()
    with running(FakeServer(fleet(2))) as server:
        document: dict[str, Any] = {
            "server": {"listen": f"127.0.0.1:{port}"},
            "prometheus": {"url": server.url},
            "queries": [query("first", history="2d")],
        }
        config.write_text(yaml.safe_dump(document))
        with running_sidecar(config, port) as sidecar:
            sidecar.wait('gpuglass_anomaly_series{query="first"}', 2)
            sidecar.wait(OK, 1)
            for broken, said in (
                ("queries: [", "line 1"),
                ("queries: [{name: x, expr: y_total}]", "use rate"),
                ("{}", "nothing to watch"),
                (yaml.safe_dump({**document, "workers": 5}), "workers: cannot change"),
            ):
                config.write_text(broken)
                sidecar.process.send_signal(signal.SIGHUP)
                line = sidecar.said("configuration")
                assert "not taken, the old one stays" in line
                assert said in line
                sidecar.wait(OK, 0)
                sidecar.wait('gpuglass_anomaly_series{query="first"}', 2)
            document["queries"].append(query("second", history="2d"))
            config.write_text(yaml.safe_dump(document))
            sidecar.process.send_signal(signal.SIGHUP)
            assert "changed: second" in sidecar.said("configuration")
            sidecar.wait(OK, 1)
            sidecar.wait('gpuglass_anomaly_series{query="second"}', 2)
            sidecar.wait('gpuglass_anomaly_series{query="first"}', 2)
