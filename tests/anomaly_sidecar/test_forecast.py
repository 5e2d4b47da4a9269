"""Forecasts: better than persistence where that can be, never much worse, quantiles that hold; life of rows,
cells, fits and state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from anomaly_sidecar import snapshot
from anomaly_sidecar.forecast import Forecast, ForecastSettings, shown
from anomaly_sidecar.forecaster import Forecaster
from anomaly_sidecar.interface import Column, Frame, State, StateError
from anomaly_sidecar.workers import InlineWorkers
from gpuglass.families import anomaly as families
from tests.anomaly_sidecar.scripted import DAY, START, Floats, day_course
from tests.support import demand

pytestmark = pytest.mark.timeout(300)
"""Seconds: they take a tenth of it, where nothing else runs."""

STEP = 900.0
CELLS = 96
DAYS = 12
LEARN = 7
HORIZONS = (1, 2, 4, 8)
ROWS = 6


def times(days: float = DAYS) -> Floats:
    return np.arange(int(days * CELLS)) * STEP


def seasonal_load(rng: np.random.Generator) -> Floats:
    return 1000 * day_course(times()) * rng.lognormal(0, 0.08, (ROWS, DAYS * CELLS))


def random_walk(rng: np.random.Generator) -> Floats:
    return np.abs(1000 + np.cumsum(rng.normal(0, 20, (ROWS, DAYS * CELLS)), axis=1))


def few_requests(rng: np.random.Generator) -> Floats:
    return rng.poisson(np.tile(3 * day_course(times()), (ROWS, 1))).astype(np.float64)


def other_weekends(rng: np.random.Generator) -> Floats:
    weekend = np.where(times() // DAY % 7 < 5, 1.0, 0.5)
    return 1000 * day_course(times()) * weekend * rng.lognormal(0, 0.05, (ROWS, DAYS * CELLS))


def bursts(rng: np.random.Generator) -> Floats:
    kicks = (rng.random((ROWS, DAYS * CELLS)) < 0.02) * rng.normal(0, 1.0, (ROWS, DAYS * CELLS))
    decay = np.exp(-np.arange(20) / 5)
    smooth = np.stack([np.convolve(row, decay)[: DAYS * CELLS] for row in kicks])
    return 1000 * day_course(times()) * np.exp(smooth)


def outages(rng: np.random.Generator) -> Floats:
    load = seasonal_load(rng)
    for _ in range(15):
        begin = int(rng.integers(100, load.shape[1] - 10))
        load[:, begin : begin + int(rng.integers(1, 5))] = 0.0
    return load


def followed(load: Floats) -> tuple[Floats, Floats, Floats]:
    """Error ÷ persistence's error and coverage of p90, each (rows, horizons), after the learning days;
    point forecasts (rows, horizons, cells)."""
    state = Forecaster.empty(len(load), STEP, HORIZONS, (0.5, 0.9), nonnegative=True)
    points, bounds = [], []
    for index in range(load.shape[1]):
        state.push(index, load[:, index])
        points.append(state.point.copy())
        bounds.append(state.bounds[..., 1].copy())
    point, bound = np.stack(points, axis=2), np.stack(bounds, axis=2)
    ratios, coverage = np.empty((len(load), len(HORIZONS))), np.empty((len(load), len(HORIZONS)))
    for place, horizon in enumerate(HORIZONS):
        at = np.arange(LEARN * CELLS, load.shape[1])
        actual, then = load[:, at], at - horizon
        error = np.abs(actual - point[:, place, then]).sum(axis=1)
        persistence = np.abs(actual - load[:, then]).sum(axis=1)
        # Of a constant both are 0: then the ratio is 1.
        ratios[:, place] = np.divide(error, persistence, out=np.ones(len(load)), where=persistence > 0)
        coverage[:, place] = (actual <= bound[:, place, then]).mean(axis=1)
    return ratios, coverage, point


KINDS: dict[str, tuple[Callable[[np.random.Generator], Floats], float]] = {
    "seasonal": (seasonal_load, 0.6),
    "few requests": (few_requests, 0.9),
    "weekends": (other_weekends, 0.7),
    "bursts": (bursts, 0.8),
    "outages": (outages, 0.9),
    "random walk": (random_walk, 1.02),
}
"""Loads, and the error as a share of persistence's that has to be reached at the longest horizon."""


@pytest.fixture(scope="module")
def all_kinds() -> dict[str, tuple[Floats, Floats]]:
    """Ratios and coverage by kind, followed side by side."""
    loads = [load(np.random.default_rng(1)) for load, _ in KINDS.values()]
    ratios, coverage, _ = followed(np.concatenate(loads))
    parts = [slice(number * ROWS, (number + 1) * ROWS) for number in range(len(KINDS))]
    return {kind: (ratios[part], coverage[part]) for kind, part in zip(KINDS, parts, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_it_beats_persistence_where_that_can_be_and_is_never_much_worse(
    kind: str, all_kinds: dict[str, tuple[Floats, Floats]]
) -> None:
    ratios, coverage = all_kinds[kind]
    assert (ratios.mean(axis=0) <= 1.02).all(), "mean of the series at each horizon"
    assert ratios[:, -1].mean() <= KINDS[kind][1]
    assert (np.abs(coverage.mean(axis=0) - 0.9) <= 0.03).all()


def test_a_load_that_changes_entirely_costs_no_more_than_2_percent_at_any_horizon() -> None:
    loads = demand.loads(6, DAYS, STEP)
    hard = ("noise_to_walk_half", "noise_to_walk_late", "courses_8", "regimes_8", "noise_to_trend_half")
    loads |= {name: load for name, load in demand.abrupt_loads(6, DAYS, STEP).items() if name in hard}
    ratios, _, _ = followed(np.stack(list(loads.values())))
    assert {name: row.tolist() for name, row in zip(loads, ratios, strict=True) if row.max() > 1.02} == {}
    better = dict(zip(loads, ratios[:, -1].tolist(), strict=True))
    assert max(better[name] for name in loads if name.startswith(("phase", "regime_", "weekend"))) < 0.8


def test_a_constant_is_forecast_as_it_is_and_what_is_below_0_never() -> None:
    _, coverage, point = followed(np.full((1, 9 * CELLS), 500.0))
    assert point[..., -1] == pytest.approx(500.0)
    assert (coverage == 1).all()
    _, _, point = followed(np.maximum(0, np.random.default_rng(2).normal(0, 5, (1, 9 * CELLS))))
    assert np.nanmin(point) >= 0


def test_the_future_is_not_known() -> None:
    load = seasonal_load(np.random.default_rng(3))[:1, : 9 * CELLS]
    other = load.copy()
    other[:, 8 * CELLS :] *= 5
    assert np.array_equal(
        followed(load)[2][..., : 8 * CELLS], followed(other)[2][..., : 8 * CELLS], equal_nan=True
    )


# As an analyzer


def admitted(settings: ForecastSettings, rows: int = 2, workers: InlineWorkers | None = None) -> Forecast:
    forecast = Forecast("load", settings, workers or InlineWorkers())
    forecast.admit(np.arange(rows), [(("service", str(row)),) for row in range(rows)], rows)
    return forecast


SETTINGS = ForecastSettings(step=STEP, horizons=(900.0, 1800.0, 3600.0))


def feed(forecast: Forecast, load: Floats, first: int = 0, live: bool = False, **roles: Floats) -> None:
    for index in range(load.shape[1]):
        values = {"value": load[:, index], **{name: array[:, index] for name, array in roles.items()}}
        forecast.observe(Frame(START + (first + index) * STEP, values, STEP, live))


def published(forecast: Forecast, **labels: str) -> dict[str, Floats]:
    return {
        output.family.name: output.values
        for output in forecast.outputs()
        if isinstance(output, Column) and labels.items() <= output.labels.items()
    }


def test_nothing_is_published_before_targets_have_come_then_forecasts_and_their_skill() -> None:
    load = seasonal_load(np.random.default_rng(4))[:2]
    forecast = admitted(SETTINGS)
    feed(forecast, load[:, :5])
    assert np.isnan(published(forecast, horizon="1h", quantile="0.9")[families.FORECAST.name]).all()
    feed(forecast, load[:, 5:], 5)
    upper = published(forecast, horizon="1h", quantile="0.9")[families.FORECAST.name]
    middle = published(forecast, horizon="1h", quantile="0.5")[families.FORECAST.name]
    assert (upper > middle).all()
    assert (published(forecast, horizon="1h")[families.FORECAST_SKILL.name] > 0.1).all()
    assert (published(forecast, horizon="1h")[families.FORECAST_USABLE.name] == 1).all()


def test_samples_within_a_cell_are_averaged_and_one_at_its_end_belongs_to_it() -> None:
    fine = admitted(SETTINGS, 1)
    for index in range(1, 31):
        fine.observe(Frame(START + index * 60.0, {"value": np.array([float(index)])}, 60.0))
    assert fine.state.history.latest(2).tolist() == [[8.0, 23.0]]


def test_gaps_of_the_grid_are_gaps_and_a_long_one_costs_nothing() -> None:
    forecast = admitted(SETTINGS, 1)
    load = seasonal_load(np.random.default_rng(5))[:1, : 3 * CELLS]
    feed(forecast, load)
    forecast.observe(Frame(START + 400 * DAY, {"value": np.array([900.0])}, STEP))
    assert np.isnan(forecast.state.history.latest(3)[0, :2]).all()
    assert forecast.state.history.now[0] == 900.0
    feed(forecast, load, 401 * CELLS)
    assert np.isfinite(forecast.state.point).all()


def test_state_goes_to_bytes_and_back_and_everything_goes_on_bit_identically() -> None:
    load = seasonal_load(np.random.default_rng(8))[:2]
    one = admitted(SETTINGS)
    feed(one, load[:, : 5 * CELLS])
    feed(one, load[:, 5 * CELLS : 5 * CELLS + 9], 5 * CELLS, live=True)
    assert np.isfinite(one.state.model.parameters).all()
    two = admitted(SETTINGS)
    two.restore(snapshot.from_bytes(snapshot.to_bytes(one.save())))
    for forecast in (one, two):
        feed(forecast, load[:, 5 * CELLS + 9 : 6 * CELLS], 5 * CELLS + 9)
    a, b = one.save(), two.save()
    assert a.meta == b.meta
    for name, array in a.arrays.items():
        assert array.tobytes() == b.arrays[name].tobytes(), name


@pytest.mark.parametrize("fault", ["version", "horizons", "array", "rows"])
def test_a_state_of_another_kind_is_refused(fault: str) -> None:
    forecast = admitted(SETTINGS)
    saved = forecast.save()
    state = State(dict(saved.arrays), dict(saved.meta))
    if fault == "version":
        state.meta["version"] = 0
    elif fault == "horizons":
        state.meta["horizons"] = [1]
    elif fault == "array":
        del state.arrays["history.ring"]
    else:
        state.arrays.update(admitted(SETTINGS, 3).save().arrays)
    with pytest.raises(StateError):
        admitted(SETTINGS).restore(state)


def test_an_evicted_row_starts_from_nothing_and_others_go_on() -> None:
    load = seasonal_load(np.random.default_rng(9))[:2]
    forecast = admitted(SETTINGS)
    feed(forecast, load[:, : 3 * CELLS])
    before = forecast.state.point[1].copy()
    forecast.evict(np.array([0]))
    forecast.admit(np.array([0]), [(("service", "new"),)], 4)
    assert np.isnan(forecast.state.point[0]).all()
    assert (forecast.state.history.seen == [0, 3 * CELLS, 0, 0]).all()
    assert np.array_equal(forecast.state.point[1], before)


def test_time_to_a_limit_is_told_where_it_is_near() -> None:
    rising = np.stack([np.linspace(0, 95, 3 * CELLS), np.full(3 * CELLS, 20.0)])
    rising += np.random.default_rng(10).normal(0, 0.2, rising.shape)
    forecast = admitted(SETTINGS)
    feed(forecast, rising, limit=np.full(rising.shape, 96.0))
    seconds = published(forecast, quantile="0.9")[families.EXHAUSTION.name]
    assert 0 < seconds[0] <= 3600
    assert np.isnan(seconds[1])


def test_time_to_the_end_of_a_quota_follows_the_forecast_rate() -> None:
    rate = np.full((2, 3 * CELLS), 10.0)
    used = np.array([[1000.0], [0.0]]) + 0 * rate
    quota = np.array([[19000.0], [np.nan]]) + 0 * rate
    forecast = admitted(SETTINGS)
    feed(forecast, rate, quota_used=used, quota=quota)
    seconds = published(forecast, quantile="0.9")[families.EXHAUSTION.name]
    assert seconds[0] == pytest.approx(1800)
    assert np.isnan(seconds[1])


def test_a_decomposition_is_published_where_asked_for_and_adds_up() -> None:
    load = seasonal_load(np.random.default_rng(11))[:1, : 5 * CELLS]
    forecast = admitted(ForecastSettings(step=STEP, horizons=(900.0,), decomposition=True), 1)
    feed(forecast, load[:, :-10])
    assert np.isnan(published(forecast, part="trend")[families.DECOMPOSITION.name]).all()
    feed(forecast, load[:, -10:], 5 * CELLS - 10, live=True)
    assert 0.5 < published(forecast, part="seasonal")[families.DECOMPOSITION_STRENGTH.name][0] <= 1
    parts = {
        part: published(forecast, part=part)[families.DECOMPOSITION.name][0]
        for part in ("trend", "seasonal", "remainder")
    }
    assert sum(parts.values()) == pytest.approx(load[0, -1])
    course = 1000 * (day_course(times(5))[-1] - 1)
    assert parts["seasonal"] == pytest.approx(course, abs=120)
    assert not [o for o in admitted(SETTINGS).outputs() if o.family is families.DECOMPOSITION]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"step": 7.0}, "step: must divide a day"),
        ({"horizons": (450.0,)}, "horizons: must be ascending multiples"),
        ({"horizons": ()}, "horizons: must be"),
        ({"quantiles": (0.9, 0.5)}, "quantiles: must be ascending"),
        ({"quantiles": (1.0,)}, "quantiles: must be"),
        ({"refit": 60.0}, "refit: must be at least"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ForecastSettings(**settings)  # type: ignore[arg-type]


def test_horizons_are_shown_as_prometheus_writes_them() -> None:
    assert [shown(s) for s in (90, 300, 5400, 7200)] == ["90s", "5m", "90m", "2h"]
