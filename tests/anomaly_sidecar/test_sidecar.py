"""The sidecar from answers to lines, and through what goes wrong: servers, clocks, files, churn."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from anomaly_sidecar import snapshot
from anomaly_sidecar.interface import State, StateError
from gpuglass.errors import ConfigError
from tests.anomaly_sidecar.fake_server import FakeServer, Series, running
from tests.anomaly_sidecar.rig import DAY, ManualClock, Rig, fleet, load_at, sidecar_on
from tests.support.ports import free_port

pytestmark = pytest.mark.timeout(300)
"""Seconds: they take a tenth of it, where nothing else runs."""

SCORE = "gpuglass_anomaly_score"
READY = "gpuglass_anomaly_ready"
LAST = "gpuglass_anomaly_last_evaluation_timestamp_seconds"


def test_scores_carry_the_labels_of_their_series_and_the_query() -> None:
    with running(FakeServer(fleet(3))) as server, sidecar_on(server) as rig:
        rig.advance(0)
        found = rig.samples(SCORE)
        assert set(found) == {
            (("job", "j"), ("metric", "load"), ("pod", f"p{number}"), ("query", "load"))
            for number in range(3)
        }
        assert all(0 <= value < 1 for value in found.values())
        assert set(rig.samples(READY).values()) == {1.0}
        assert rig.value("gpuglass_anomaly_series", query="load") == 3
        assert rig.value("gpuglass_anomaly_backfilled_samples_total") >= 3 * 3 * 287


def test_while_it_warms_up_it_says_so_and_gives_no_score() -> None:
    def world(query: str, at: float) -> Series:
        return fleet(1)(query, at) if at > ManualClock().wall - 3600 else {}

    with running(FakeServer(world)) as server, sidecar_on(server) as rig:
        rig.advance(0)
        assert list(rig.samples(READY).values()) == [0.0]
        assert rig.samples(SCORE) == {}


def test_an_anomaly_is_published_and_a_series_that_goes_is_withdrawn_at_once() -> None:
    bad: set[str] = set()
    gone: set[str] = set()

    def world(query: str, at: float) -> Series:
        return {
            labels: value + 100 * (labels[-1][1] in bad)
            for labels, value in fleet(4)(query, at).items()
            if labels[-1][1] not in gone
        }

    with running(FakeServer(world)) as server, sidecar_on(server) as rig:
        rig.advance(0)
        bad.add("p1")
        gone.add("p2")
        rig.advance(300)
        found = {dict(labels)["pod"]: value for labels, value in rig.samples(SCORE).items()}
        assert sorted(found) == ["p0", "p1", "p3"]
        assert [pod for pod, value in found.items() if value > 1] == ["p1"]
        assert len(rig.samples(READY)) == 3


def test_labels_called_like_ours_are_renamed_and_never_collide() -> None:
    def world(query: str, at: float) -> Series:
        return {
            (("query", "theirs"),): load_at(at),
            (("exported_query", "theirs"),): load_at(at, 1),
            (("metric", "x"), ("__name__", "m")): load_at(at, 2),
        }

    with running(FakeServer(world)) as server, sidecar_on(server) as rig:
        rig.advance(0)
        published = [dict(labels) for labels in rig.samples(SCORE)]
        assert {"query": "load", "exported_query": "theirs"} in published
        assert {"query": "load", "metric": "m", "exported_metric": "x"} in published
        assert len(published) == 2  # of two that would be one after renaming the first stays
        assert rig.value("gpuglass_anomaly_label_collisions") >= 1


def test_two_samples_of_one_series_are_dropped_and_counted() -> None:
    def world(query: str, at: float) -> Series:
        return {(("a", "1"), ("empty", "")): 1.0, (("a", "1"),): 2.0, (("a", "2"),): load_at(at)}

    with running(FakeServer(world)) as server, sidecar_on(server) as rig:
        rig.advance(0)
        assert [dict(labels)["a"] for labels in rig.samples(READY)] == ["2"]
        assert rig.value("gpuglass_anomaly_series_changes_total", change="ambiguous") > 0


def test_beyond_the_limit_series_are_refused_and_the_others_go_on() -> None:
    queries = [{"name": "load", "expr": "load", "history": "2d", "interval": "5m", "limit": 3}]
    with running(FakeServer(fleet(5))) as server, sidecar_on(server, queries=queries) as rig:
        rig.advance(0)
        assert len(rig.samples(SCORE)) == 3
        assert rig.value("gpuglass_anomaly_series_changes_total", change="refused") > 0


def test_half_of_the_series_replaced_again_and_again_stays_within_bounds() -> None:
    generation = [0]

    def world(query: str, at: float) -> Series:
        names = [f"stays{n}" for n in range(10)] + [f"g{generation[0]}-{n}" for n in range(10)]
        return {(("pod", name),): load_at(at, zlib.crc32(name.encode()) % 97) for name in names}

    queries = [
        {"name": "load", "expr": "load", "history": "2d", "interval": "5m", "limit": 30, "offset": "0s"}
    ]
    with running(FakeServer(world)) as server, sidecar_on(server, queries=queries) as rig:
        rig.advance(0)
        for generation[0] in range(1, 8):
            rig.advance(300)
            published = {dict(labels)["pod"] for labels in rig.samples(READY)}
            assert published == {f"stays{n}" for n in range(10)} | {
                f"g{generation[0]}-{n}" for n in range(10)
            }
        assert rig.value("gpuglass_anomaly_series") <= 30
        assert rig.value("gpuglass_anomaly_series_changes_total", change="refused") == 0
        # Those that stayed kept what they learned.
        assert {dict(labels)["pod"] for labels in rig.samples(SCORE)} >= {f"stays{n}" for n in range(10)}


@pytest.mark.parametrize("fault", ["html", "429", "500", "422", "half", "cut", "empty", "nonsense"])
def test_a_server_that_fails_is_told_and_nothing_is_lost_when_it_is_back(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("gpuglass").propagate = True
    with running(FakeServer(fleet(2))) as server, sidecar_on(server) as rig:
        rig.advance(0)
        before, last = rig.value("gpuglass_anomaly_samples_total"), rig.value(LAST)
        server.fault = fault
        server.faulty = "load"
        rig.clock.advance(900)
        until(rig, lambda: bool(rig.samples("gpuglass_anomaly_evaluations_total", result="failed")))
        assert any("load: " in record.message for record in caplog.records)
        server.fault = ""
        until(rig, lambda: rig.value(LAST) > rig.clock.wall - 300)
        passed = rig.value(LAST) - last
        assert passed >= 900
        assert rig.value("gpuglass_anomaly_samples_total") == before + 2 * passed / 300
        assert rig.samples(SCORE)


def test_one_failing_query_stops_no_other() -> None:
    queries = [
        {"name": "good", "expr": "load", "history": "2d", "interval": "5m", "offset": "0s"},
        {"name": "bad", "expr": "broken", "history": "2d", "interval": "5m", "offset": "0s"},
        {"name": "hangs", "expr": "broken + slow", "history": "2d", "interval": "5m", "offset": "0s"},
    ]
    with running(FakeServer(fleet(2))) as server, sidecar_on(server, queries=queries) as rig:
        server.fault, server.faulty = "500", "broken"
        until(rig, lambda: bool(rig.samples(SCORE, query="good")))
        assert len(rig.samples(SCORE, query="good")) == 2
        assert rig.samples(SCORE, query="bad") == {}
        assert rig.value("gpuglass_anomaly_evaluations_total", query="bad", result="failed") >= 1


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_server_that_does_not_answer_or_only_drips_is_left_at_the_timeout(fault: str) -> None:
    with running(FakeServer(fleet(1))) as server, sidecar_on(server, prometheus={"timeout": "1s"}) as rig:
        until(rig, lambda: bool(rig.samples(SCORE)))  # may take longer than the timeout on a slow machine
        last = rig.value(LAST)
        failed = rig.samples("gpuglass_anomaly_evaluations_total", result="failed")
        server.fault, server.faulty = fault, "load"
        rig.clock.advance(300)
        until(rig, lambda: rig.samples("gpuglass_anomaly_evaluations_total", result="failed") != failed)
        assert rig.value(LAST) == last
        server.fault = ""
        server.release.set()
        until(rig, lambda: rig.value(LAST) > last)


def test_a_server_that_is_down_at_the_start_and_again_later_is_waited_for_and_nothing_is_lost() -> None:
    port = free_port()
    server = FakeServer(fleet(2), url=f"http://127.0.0.1:{port}")
    with sidecar_on(server) as rig:
        for _ in range(5):
            rig.clock.advance(30)
            rig.sidecar.turn(0.05)
        assert rig.sidecar.not_ready() == "the server to read from does not answer"
        assert rig.samples(SCORE) == {}
        with running(server, port=port):
            until(rig, lambda: rig.sidecar.not_ready() is None)
            assert len(rig.samples(SCORE)) == 2
        samples, last = rig.value("gpuglass_anomaly_samples_total"), rig.value(LAST)
        rig.clock.advance(1800)
        until(rig, lambda: bool(rig.samples("gpuglass_anomaly_evaluations_total", result="failed")))
        until(rig, lambda: not rig.samples(SCORE))
        with running(server, port=port):
            until(rig, lambda: len(rig.samples(SCORE)) == 2)
        passed = rig.value(LAST) - last
        assert passed >= 1800
        assert rig.value("gpuglass_anomaly_samples_total") == samples + 2 * passed / 300


def until(rig: Rig, holds: Callable[[], bool], seconds: float = 250, passes: float = 5.0) -> None:
    """Turn until something holds; time passes in each, for what waits after a failure."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        rig.clock.advance(passes)
        rig.sidecar.turn(0.05)


def test_what_is_too_old_is_withdrawn() -> None:
    with running(FakeServer(fleet(1))) as server, sidecar_on(server) as rig:
        rig.advance(0)
        server.fault = "500"
        rig.clock.advance(1200)
        for _ in range(10):
            rig.sidecar.turn(0.05)
        assert rig.samples(SCORE) == {}


def test_after_an_outage_the_gap_is_read_and_the_scores_are_those_without_one() -> None:
    with running(FakeServer(fleet(3))) as server:
        with sidecar_on(server) as rig:
            rig.advance(0)
            for _ in range(24):
                rig.advance(300)
            steady = rig.samples(SCORE)
        with sidecar_on(server) as rig:
            rig.advance(0)
            rig.advance(24 * 300)
            assert rig.samples(SCORE) == steady


def test_two_replicas_that_read_the_same_data_publish_the_same() -> None:
    def shuffled(query: str, at: float) -> Series:
        return dict(reversed(list(fleet(5)(query, at).items())))

    results = []
    for world in (fleet(5), shuffled):
        with running(FakeServer(world)) as server, sidecar_on(server) as rig:
            rig.advance(0)
            for _ in range(5):
                rig.advance(300)
            results.append(rig.samples(SCORE))
    assert results[0] == results[1]
    assert len(results[0]) == 5


@pytest.mark.parametrize("jump", [-2 * DAY, -60.0, 60.0, 30 * DAY])
def test_a_jump_of_this_machines_clock_changes_nothing_but_is_told(jump: float) -> None:
    with running(FakeServer(fleet(2))) as server, sidecar_on(server) as rig:
        rig.advance(0)
        real = rig.clock.wall
        server.now = lambda: real + rig.clock.mono - started
        started = rig.clock.mono
        rig.clock.wall += jump
        rig.advance(300)
        until(rig, lambda: rig.value("gpuglass_anomaly_clock_jumps_total") > 0, passes=0.0)
        assert rig.value(LAST) == real + 300
        assert len(rig.samples(SCORE)) == 2
        assert rig.value("gpuglass_anomaly_clock_jumps_total") == 1


def test_when_the_servers_clock_goes_back_by_days_it_learns_anew() -> None:
    with running(FakeServer(fleet(2))) as server, sidecar_on(server) as rig:
        rig.advance(0)
        rig.clock.wall -= 5 * DAY
        rig.advance(301)
        rig.advance(301)
        last = rig.value("gpuglass_anomaly_last_evaluation_timestamp_seconds")
        assert abs(last - rig.clock.wall) < 600
        assert len(rig.samples(SCORE)) == 2


# State


def state(folder: Path) -> dict[str, object]:
    return {"state": {"folder": str(folder)}}


def test_a_restart_goes_on_where_it_was_and_reads_only_the_tail(tmp_path: Path) -> None:
    with running(FakeServer(fleet(3))) as server:
        with sidecar_on(server) as rig:
            rig.advance(0)
            rig.advance(300)
            rig.advance(300)
            steady = rig.samples(SCORE)
        with sidecar_on(server, **state(tmp_path)) as rig:
            rig.advance(0)
        clock = ManualClock()
        clock.advance(600)
        with sidecar_on(server, clock, **state(tmp_path)) as rig:
            server.requests.clear()
            rig.advance(0)
            assert rig.samples(SCORE) == steady
            assert rig.value("gpuglass_anomaly_state_restored", outcome="latest") == 1
            assert rig.value("gpuglass_anomaly_backfilled_samples_total") == 3
            starts = [float(form["start"]) for _, form, _ in server.requests if "start" in form]
            assert min(starts) > clock.wall - 900


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "pickle"])
def test_a_damaged_state_is_told_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "load.state"
    with running(FakeServer(fleet(3))) as server:
        with sidecar_on(server, **state(tmp_path)) as rig:
            rig.advance(0)
        data = bytearray(path.read_bytes())
        (tmp_path / "load.previous").write_bytes(data)
        if damage == "cut":
            data = data[: len(data) // 2]
        elif damage == "flipped":
            data[len(data) // 3] ^= 0xFF
        elif damage == "empty":
            data = bytearray()
        elif damage == "text":
            data = bytearray(b"not a state\n")
        else:
            np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
            data = bytearray((tmp_path / "x.npy").read_bytes())
        path.write_bytes(data)
        with sidecar_on(server, **state(tmp_path)) as rig:
            assert rig.sidecar.units[0].restored == "previous"
            rig.advance(300)
            assert len(rig.samples(SCORE)) == 3
        (tmp_path / "load.previous").write_bytes(data)
        path.write_bytes(data)
        with sidecar_on(server, **state(tmp_path)) as rig:
            assert rig.sidecar.units[0].restored == "damaged"
            rig.advance(300)
            assert len(rig.samples(SCORE)) == 3


def test_a_state_of_another_configuration_is_not_taken(tmp_path: Path) -> None:
    with running(FakeServer(fleet(1))) as server:
        with sidecar_on(server, **state(tmp_path)) as rig:
            rig.advance(0)
        other = [{"name": "load", "expr": "load * 2", "history": "3d", "interval": "5m"}]
        with sidecar_on(server, **state(tmp_path), queries=other) as rig:
            assert rig.sidecar.units[0].restored == "changed"


def test_two_sidecars_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        running(FakeServer(fleet(1))) as server,
        sidecar_on(server, **state(tmp_path)),
        pytest.raises(ConfigError, match="another sidecar"),
        sidecar_on(server, **state(tmp_path)),
    ):
        pass


WRITER = """
import sys
import numpy as np
from pathlib import Path
from anomaly_sidecar import snapshot
from anomaly_sidecar.interface import State

path, number = Path(sys.argv[1]), 0
while True:
    number += 1
    snapshot.save(State({"a": np.full(2_000_000, number)}, {"number": number}), path)
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_state(tmp_path: Path) -> None:
    path = tmp_path / "x.state"
    seen = 0
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        good = [found for _, found in snapshot.load(path) if isinstance(found, State)]
        assert good, "no whole state is left"
        assert (good[0].arrays["a"] == good[0].meta["number"]).all()
        seen += 1
    assert seen == 8


def test_objects_are_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="objects"):
        snapshot.to_bytes(State({"a": np.array([{}], object)}))
    with pytest.raises(StateError):
        snapshot.from_bytes(b"PK\x03\x04" + os.urandom(100))


def test_arrays_and_json_come_back_as_they_were() -> None:
    arrays = {
        "f": np.array([1.5, np.nan]),
        "i": np.arange(3),
        "s": np.array(["ä", "b"]),
        "e": np.zeros((0, 3)),
    }
    back = snapshot.from_bytes(snapshot.to_bytes(State(arrays, {"x": [1, {"y": None}]})))
    assert back.meta == {"x": [1, {"y": None}]}
    for name, array in arrays.items():
        np.testing.assert_array_equal(back.arrays[name], array)
        assert back.arrays[name].dtype == array.dtype
    assert json.dumps(back.meta)
