"""Jobs in processes of their own, and detectors of all kinds in a running sidecar."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from anomaly_sidecar.detectors import KINDS
from anomaly_sidecar.interface import JobResult, State
from anomaly_sidecar.workers import FIRST_BACKOFF, MAX_TRIES, InlineWorkers, WorkerPool
from tests.anomaly_sidecar.fake_server import FakeServer, running
from tests.anomaly_sidecar.rig import ManualClock, fleet, sidecar_on

pytestmark = pytest.mark.timeout(300)
"""Seconds: they take a tenth of it, where nothing else runs."""

ECHO = "anomaly_sidecar.workers:echo"
WAIT = "anomaly_sidecar.workers:rest"


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool(1, timeout=100.0)
    yield made
    made.close()


def result(pool: WorkerPool, key: str, seconds: float = 200) -> JobResult:
    deadline = time.monotonic() + seconds
    while (found := pool.take(key)) is None:
        assert time.monotonic() < deadline, "no result"
        time.sleep(0.02)
    return found


def test_arguments_and_results_cross_the_border(pool: WorkerPool) -> None:
    arrays = {"a": np.arange(5.0), "b": np.array([[1, 2]])}
    assert pool.submit("k", ECHO, State(arrays, {"x": [1, "ü"]}))
    found = result(pool, "k").state
    assert found is not None
    assert found.meta == {"x": [1, "ü"]}
    np.testing.assert_array_equal(found.arrays["a"], arrays["a"])
    assert pool.take("k") is None


@pytest.mark.parametrize("job", ["os:getcwd", "anomaly_sidecar.workers:_send", "anomaly_sidecar.nothing:f"])
def test_what_is_no_job_is_refused(pool: WorkerPool, job: str) -> None:
    assert pool.submit("k", job, State())
    assert "is no job" in result(pool, "k").error


def killed(pool: WorkerPool, before: int = 0, seconds: float = 200) -> int:
    """Kill the pool's process, as soon as there is one other than `before`; gives its number."""
    deadline = time.monotonic() + seconds
    while not (found := [p for p in pool.processes() if p.pid != before and p.poll() is None]):
        assert time.monotonic() < deadline, "no process"
        time.sleep(0.02)
    found[0].kill()
    return found[0].pid


def test_a_process_that_dies_is_told_and_another_does_its_job(
    pool: WorkerPool, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("gpuglass").propagate = True
    assert pool.submit("first", WAIT, State(meta={"seconds": 0.5}))
    killed(pool)
    assert result(pool, "first").state is not None
    assert (pool.jobs, pool.failed, pool.restarts) == (1, 0, 1)
    assert any("first: the worker died" in record.message for record in caplog.records)


def test_a_job_that_kills_its_process_again_and_again_ends_and_the_next_one_is_done(pool: WorkerPool) -> None:
    assert pool.submit("first", WAIT, State(meta={"seconds": 1000.0}))
    before, started = 0, time.monotonic()
    for _ in range(MAX_TRIES):
        before = killed(pool, before)
    assert "died" in result(pool, "first").error
    assert time.monotonic() - started >= FIRST_BACKOFF * (1 + 2), "later each time"
    assert pool.submit("second", ECHO, State(meta={"n": 2}))
    assert result(pool, "second").state is not None
    assert (pool.jobs, pool.failed, pool.restarts) == (2, 1, MAX_TRIES)


def test_a_result_is_waited_for_and_one_that_nobody_wants_is_not_kept(pool: WorkerPool) -> None:
    assert pool.submit("first", WAIT, State(meta={"seconds": 0.2}))
    found, waited = pool.wait("first", 200.0)
    assert found is not None
    assert found.state is not None
    assert 0 < waited < 200
    assert pool.wait("unknown", 0.05)[0] is None
    assert pool.submit("second", WAIT, State(meta={"seconds": 0.2}))
    pool.drop("second")
    assert pool.submit("third", ECHO, State())
    assert pool.wait("third", 200.0)[0] is not None
    assert pool.take("second") is None
    assert pool.pending == 0
    assert pool.submit("second", ECHO, State()), "its name is free again"


def test_a_job_that_takes_too_long_is_ended() -> None:
    pool = WorkerPool(1, timeout=0.5)
    try:
        assert pool.submit("k", WAIT, State(meta={"seconds": 1000.0}))
        assert not pool.submit("k", ECHO, State())  # one at a time for a key
        assert "took longer" in result(pool, "k").error
    finally:
        pool.close()
    assert not pool.submit("k", ECHO, State())


def test_inline_they_do_the_same() -> None:
    workers = InlineWorkers()
    assert workers.submit("k", ECHO, State(meta={"n": 1}))
    assert workers.take("k") == JobResult(State({}, {"n": 1}))
    assert workers.take("k") is None


def test_all_kinds_run_are_saved_and_go_on(tmp_path: Path) -> None:
    detectors = [
        {
            "name": f"d_{kind.name}",
            "kind": kind.name,
            "inputs": {role.name: f"load_{role.name}" for role in kind.roles},
            "interval": "5m",
            "offset": "0s",
            "history": "1d",
        }
        for kind in KINDS.values()
    ]
    sections = {"queries": [], "detectors": detectors, "state": {"folder": str(tmp_path)}}
    with running(FakeServer(fleet(4))) as server:
        with sidecar_on(server, **sections) as rig:
            rig.advance(0)
            rig.advance(300)
            for detector in detectors:
                assert (
                    rig.value("gpuglass_anomaly_evaluations_total", query=detector["name"], result="ok") >= 1
                )
            assert rig.samples("gpuglass_anomaly_evaluations_total", result="failed") == {}
            assert rig.samples("gpuglass_forecast", query="d_forecast")
        with sidecar_on(server, **{**sections, "state": {}}) as rig:
            for seconds in (0, 300, 300):
                rig.advance(seconds)
            steady = {name: rig.samples(name) for name in ("gpuglass_forecast", "gpuglass_memory_leak")}
        assert all(steady.values())
        clock = ManualClock()
        clock.advance(300)
        with sidecar_on(server, clock, **sections) as rig:
            assert {unit.restored for unit in rig.sidecar.units} == {"latest"}
            rig.advance(0)
            rig.advance(300)
            assert {name: rig.samples(name) for name in steady} == steady
