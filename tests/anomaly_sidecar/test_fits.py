"""Fits take effect by the time of the data: replicas with workers of different speed say the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomaly_sidecar import snapshot
from anomaly_sidecar.forecast import Forecast, ForecastSettings
from anomaly_sidecar.interface import Column, Frame, JobResult, Labels, State
from anomaly_sidecar.workers import InlineWorkers, WorkerPool
from tests.anomaly_sidecar.fake_server import FakeServer, running
from tests.anomaly_sidecar.rig import ManualClock, Rig, fleet, sidecar_on
from tests.anomaly_sidecar.scripted import START, Floats, day_course

pytestmark = pytest.mark.timeout(300)
"""Seconds: they take a tenth of it, where nothing else runs."""

STEP = 900.0
CELLS = 96
DELAY = 4
"""Cells of the hour after which a fit takes effect."""
LIVE = 3 * CELLS
SETTINGS = ForecastSettings(step=STEP, horizons=(900.0, 3600.0), decomposition=True)
NAMES: list[Labels] = [(("service", name),) for name in ("chat", "code")]


class Timed(InlineWorkers):
    """Answers `lag` cells after it was asked; `now` is the cell that the test has come to."""

    def __init__(self, lag: float = 0.0, error: str = "") -> None:
        super().__init__()
        self.lag = lag
        self.error = error
        self.now = 0
        self.asked: list[tuple[str, int, int]] = []
        """(key, cell of the test, last cell of the arguments)."""
        self._ready: dict[str, float] = {}

    def submit(self, key: str, job: str, arguments: State) -> bool:
        self.asked.append((key, self.now, arguments.meta["first"] + len(arguments.arrays["values"]) - 1))
        self._ready[key] = self.now + self.lag
        return super().submit(key, job, arguments)

    def take(self, key: str) -> JobResult | None:
        if self.now < self._ready.get(key, np.inf):
            return None
        found = super().take(key)
        return JobResult(None, self.error) if self.error and found else found

    def wait(self, key: str, seconds: float) -> tuple[JobResult | None, float]:
        self._ready[key] = 0.0
        return self.take(key), 0.1


def load(days: float = 5, rows: int = 2) -> Floats:
    rng = np.random.default_rng(3)
    cells = int(days * CELLS)
    return 1000 * day_course(np.arange(cells) * STEP) * rng.lognormal(0, 0.05, (rows, cells))


class Replica:
    """One sidecar's forecast with its workers."""

    def __init__(self, workers: Timed, names: list[Labels] = NAMES) -> None:
        self.workers = workers
        self.names = names
        self.forecast = Forecast("load", SETTINGS, workers)
        self.forecast.admit(np.arange(len(names)), names, len(names))

    def feed(self, values: Floats, cell: int, live: bool) -> None:
        self.workers.now = cell
        order = [NAMES.index(name) for name in self.names]
        self.forecast.observe(Frame(START + cell * STEP, {"value": values[order, cell]}, STEP, live))

    def shown(self) -> Mapping[str, list[str]]:
        """All that is published, by series, to the last bit."""
        outputs = [output for output in self.forecast.outputs() if isinstance(output, Column)]
        return {
            repr(name): [
                f"{output.family.name} {sorted(output.labels.items())} {output.values[row].hex()}"
                for output in outputs
            ]
            for row, name in enumerate(self.names)
        }

    def restarted(self, workers: Timed) -> Replica:
        twin = Replica(workers, self.names)
        twin.workers.now = self.workers.now
        twin.forecast.restore(snapshot.from_bytes(snapshot.to_bytes(self.forecast.save())))
        return twin


def bootstrapped(lag: float, values: Floats, names: list[Labels] = NAMES) -> Replica:
    replica = Replica(Timed(lag), names)
    for cell in range(LIVE):
        replica.feed(values, cell, live=False)
    assert not replica.workers.asked, "not while the first history is read"
    return replica


def test_replicas_whose_workers_answer_at_different_speeds_say_the_same() -> None:
    values = load()
    one = bootstrapped(0, values)
    other = bootstrapped(DELAY - 0.5, values, list(reversed(NAMES)))
    for cell in range(LIVE, values.shape[1]):
        for replica in (one, other):
            replica.feed(values, cell, live=True)
        assert one.shown() == other.shown(), f"cell {cell - LIVE} of the present"
        fitted = np.isfinite(one.forecast.state.model.parameters).all()
        assert fitted == (cell >= LIVE + DELAY), "an hour after it was asked for, not before"
    counts = one.forecast.fits.counts
    assert counts == other.forecast.fits.counts
    assert counts["taken"] >= 4, "at once, and daily"
    assert counts["late"] == 0


def test_fits_of_a_day_are_spread_and_see_nothing_after_their_cell() -> None:
    rows = 10
    names: list[Labels] = [(("service", str(number)),) for number in range(rows)]
    forecast = Forecast("load", SETTINGS, workers := Timed())
    forecast.admit(np.arange(rows), names, rows)
    values = load(4.5, rows)
    for cell in range(values.shape[1]):
        workers.now = cell
        forecast.observe(Frame(START + cell * STEP, {"value": values[:, cell]}, STEP, cell >= LIVE))
    first = {number for _, number, _ in workers.asked if number == LIVE}
    daily = [number for _, number, _ in workers.asked if LIVE < number <= LIVE + CELLS]
    assert first == {LIVE}
    assert len(daily) == rows
    assert len(set(daily)) >= rows / 2
    for key, number, last in workers.asked:
        assert last == int(START / STEP) + number
        assert key.endswith(f"/{last}")


def test_a_late_fit_is_told_and_taken_a_multiple_of_the_delay_later() -> None:
    values = load()
    one, slow = bootstrapped(0, values), bootstrapped(DELAY + 1, values)
    for cell in range(LIVE, LIVE + 3 * DELAY):
        for replica in (one, slow):
            replica.feed(values, cell, live=True)
        fitted = np.isfinite(slow.forecast.state.model.parameters).all()
        assert fitted == (cell >= LIVE + 2 * DELAY)
        assert (one.shown() == slow.shown()) == (cell < LIVE + DELAY), "this is what late means"
    assert slow.forecast.fits.counts["late"] == 2
    assert slow.forecast.fits.counts["taken"] == 2
    assert one.forecast.fits.counts["late"] == 0


@pytest.mark.parametrize("live", [True, False], ids=["at once", "after a gap"])
def test_a_restart_between_asking_and_taking_changes_nothing(live: bool) -> None:
    values = load(4)
    one = bootstrapped(1, values)
    other = bootstrapped(1, values)
    for cell in range(LIVE, LIVE + 2):
        for replica in (one, other):
            replica.feed(values, cell, live=True)
    other = other.restarted(Timed(1))
    for cell in range(LIVE + 2, values.shape[1]):
        one.feed(values, cell, live=True)
        # What was missed is read at once: the replay waits for the fit that was under way.
        other.feed(values, cell, live=live or cell > LIVE + 20)
        assert one.shown() == other.shown(), f"cell {cell - LIVE} of the present"
    assert other.workers.asked[0][2] == one.workers.asked[0][2], "about the same cells"
    assert other.forecast.fits.counts["late"] == 0


def test_a_replay_does_not_wait_for_ever() -> None:
    values = load(4)
    one = bootstrapped(1, values)
    one.feed(values, LIVE, live=True)

    class Dead(Timed):
        def wait(self, key: str, seconds: float) -> tuple[JobResult | None, float]:
            waits.append(seconds)
            return None, seconds

    waits: list[float] = []
    twin = one.restarted(Dead(np.inf))
    for cell in range(LIVE + 1, LIVE + 3 * DELAY):
        twin.feed(values, cell, live=False)
    assert len(waits) == 1
    assert twin.forecast.fits.counts["late"] == 2


def test_a_fit_that_fails_is_counted_and_the_rest_goes_on() -> None:
    values = load(4)
    replica = Replica(Timed(error="out of memory"))
    for cell in range(values.shape[1]):
        replica.feed(values, cell, live=cell >= LIVE)
    assert replica.forecast.fits.counts["failed"] >= 2
    assert np.isnan(replica.forecast.state.model.parameters).all()
    assert np.isfinite(replica.forecast.state.point).all()


def test_a_fit_of_a_series_that_has_gone_is_not_taken_for_its_successor() -> None:
    values = load()
    replica = bootstrapped(2, values)
    replica.feed(values, LIVE, live=True)
    row = np.array([0])
    replica.forecast.evict(row)
    replica.forecast.admit(row, [(("service", "new"),)], 2)
    for cell in range(LIVE + 1, LIVE + 3 * DELAY):
        replica.feed(values, cell, live=True)
    parameters = replica.forecast.state.model.parameters
    assert np.isnan(parameters[0]).all()
    assert np.isfinite(parameters[1]).all()
    assert replica.forecast.fits.counts["taken"] == 1


def test_where_the_queue_is_full_it_is_asked_again_about_the_same_cells() -> None:
    values = load(4)
    replica = bootstrapped(0, values)
    full = [True]

    class Full(Timed):
        def submit(self, key: str, job: str, arguments: State) -> bool:
            return not full[0] and super().submit(key, job, arguments)

    twin = replica.restarted(Full())
    for cell in range(LIVE, LIVE + DELAY + 1):
        full[0] = cell < LIVE + 2
        for each in (replica, twin):
            each.feed(values, cell, live=True)
    assert twin.shown() == replica.shown()
    assert twin.forecast.fits.counts["taken"] == 2


def test_without_fits_nothing_is_asked_for() -> None:
    workers = Timed()
    forecast = Forecast("load", ForecastSettings(step=STEP, horizons=(900.0,), fit=False), workers)
    forecast.admit(np.arange(2), NAMES, 2)
    values = load(4)
    for cell in range(values.shape[1]):
        forecast.observe(Frame(START + cell * STEP, {"value": values[:, cell]}, STEP))
    assert not workers.asked


def test_two_sidecars_one_with_slow_processes_and_restarted_publish_the_same_forecasts(
    tmp_path: Path,
) -> None:
    detector = {
        "name": "ahead",
        "kind": "forecast",
        "inputs": {"value": "load"},
        "interval": "5m",
        "offset": "0s",
        "history": "54h",
        "settings": {"decomposition": True},
    }
    sections: dict[str, Any] = {"queries": [], "detectors": [detector], "state": {"folder": str(tmp_path)}}
    steps = 16
    shown: list[list[dict[Any, float]]] = [[], []]

    def advance(rig: Rig, into: list[dict[Any, float]]) -> None:
        rig.advance(300)
        names = ("gpuglass_forecast", "gpuglass_decomposition", "gpuglass_forecast_usable")
        into.append({key: value for name in names for key, value in rig.samples(name).items()})

    with running(FakeServer(fleet(3))) as server:
        with sidecar_on(server, queries=[], detectors=[detector]) as rig:
            rig.advance(0)
            for _ in range(steps):
                advance(rig, shown[0])
            assert rig.value("gpuglass_anomaly_fits_total", result="taken") == 3
        clock = ManualClock()
        pool = WorkerPool(1)
        with sidecar_on(server, clock, pool, **sections) as rig:
            rig.advance(0)
            for _ in range(4):
                advance(rig, shown[1])
            assert pool.submit("slow", "anomaly_sidecar.workers:rest", State(meta={"seconds": 0.5}))
        pool = WorkerPool(1)
        with sidecar_on(server, clock, pool, **sections) as rig:
            assert rig.sidecar.units[0].restored == "latest"
            rig.sidecar.settle(250)
            for step in range(4, steps):
                if step == 11:  # the latest moment
                    deadline = time.monotonic() + 250
                    while pool.pending or not pool.jobs:
                        assert time.monotonic() < deadline
                        time.sleep(0.02)
                advance(rig, shown[1])
            assert rig.value("gpuglass_anomaly_fits_total", result="taken") == 3
            assert rig.value("gpuglass_anomaly_fits_total", result="late") == 0
    for step, (one, other) in enumerate(zip(*shown, strict=True)):
        assert one == other, f"step {step}"
    assert not any(dict(key).get("part") for key in shown[0][10])
    assert any(dict(key).get("part") for key in shown[0][11]), "taken an hour after it was asked for"
