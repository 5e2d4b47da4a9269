"""Scores: what is anomalous on one series and not on its healthy twin, from warm-up to gaps."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_sidecar import snapshot
from anomaly_sidecar.interface import Direction, FloatArray, Frame, Query, StateError
from anomaly_sidecar.scores import DAY, HOUR, Scores

START = 1_700_006_400.0  # midnight


def scores_of(query: Query, rows: int) -> Scores:
    scores = Scores(query)
    scores.admit(np.arange(rows), [()] * rows, rows)
    return scores


def query(**settings: object) -> Query:
    return Query("q", "x", **settings)  # type: ignore[arg-type]


def loads(rows: int, days: float, seed: int, step: float = 300.0) -> tuple[FloatArray, FloatArray]:
    """Times and values with a shape of the day and noise of 5, shape (steps, rows)."""
    times = START + step * np.arange(int(days * DAY / step))
    generator = np.random.default_rng(seed)
    shape = 100 + 40 * np.sin(2 * np.pi * times[:, None] / DAY + generator.uniform(0, 6, rows))
    return times, shape + 5 * generator.standard_normal((len(times), rows))


def run(scores: Scores, times: FloatArray, values: FloatArray) -> FloatArray:
    return np.array([scores.step(at, row) for at, row in zip(times.tolist(), values, strict=True)])


@pytest.mark.parametrize(("seed", "step"), [(0, 60.0), (1, 300.0), (2, 300.0), (3, 300.0)])
def test_a_step_of_six_sigma_is_seen_within_two_samples_and_healthy_twins_stay_below(
    seed: int, step: float
) -> None:
    days = 4.0 if step == 60 else 6.0
    times, values = loads(40, days, seed, step)
    cut = int(len(times) * 0.9)
    values[cut:, :20] += 6 * 5.0
    found = run(scores_of(query(), 40), times, values)
    assert (found[cut : cut + 2, :20].max(0) > 1).mean() >= 0.95  # noise may hide a sigma of the six
    assert (found[cut - 2 : cut + 2, 20:] <= 1).mean() > 0.95


def test_nothing_is_scored_in_the_first_day() -> None:
    times, values = loads(5, 2, 1)
    scores = scores_of(query(), 5)
    found = run(scores, times, values)
    assert np.isnan(found[times < START + DAY]).all()
    assert np.isfinite(found[times > START + DAY + 6 * HOUR]).all()


def test_an_anomaly_is_seen_for_as_long_as_a_rule_waits() -> None:
    times, values = loads(1, 2.5, 1, 60.0)
    cut = int(2 * DAY / 60) + 60
    values[cut:, 0] += 60
    found = run(scores_of(query(), 1), times, values)
    assert (found[cut : cut + 60, 0] > 1).all()


def test_a_level_that_stays_becomes_normal() -> None:
    times, values = loads(1, 12, 1)
    cut = int(4 * DAY / 300)
    values[cut:, 0] += 60
    found = run(scores_of(query(), 1), times, values)
    assert found[cut, 0] > 1
    assert (found[-int(DAY / 300) :, 0] > 1).mean() < 0.02


@pytest.mark.parametrize("seed", range(2))
def test_healthy_loads_rarely_fire(seed: int) -> None:
    times, values = loads(100, 8, seed)
    found = run(scores_of(query(), 100), times, values)
    scored = found[times > START + 3 * DAY]
    starts = (scored[1:] > 1) & ~(scored[:-1] > 1)
    assert starts.sum() / (100 * 5) < 0.1  # per series and day


@pytest.mark.parametrize(
    ("direction", "up", "down"), [("above", True, False), ("below", False, True), ("both", True, True)]
)
def test_the_direction_decides_which_side_counts(direction: str, up: bool, down: bool) -> None:
    times, values = loads(2, 3, 1)
    values[-1] += [80, -80]
    found = run(scores_of(query(direction=Direction(direction)), 2), times, values)
    assert (found[-1] > 1).tolist() == [up, down]


@pytest.mark.parametrize(
    ("settings", "fires"),
    [
        ({}, True),
        ({"min_deviation": 1000.0}, False),
        ({"min_deviation": 10.0}, True),
        ({"min_relative_deviation": 5.0}, False),
        ({"min_relative_deviation": 0.02}, True),
    ],
)
def test_floors_say_what_is_too_small(settings: dict[str, float], fires: bool) -> None:
    times, values = loads(1, 3, 1)
    values[-1] += 80
    found = run(scores_of(query(**settings), 1), times, values)
    assert (found[-1, 0] > 1) == fires


def test_a_constant_series_is_normal_and_its_first_change_is_not() -> None:
    times = START + 300 * np.arange(int(3 * DAY / 300))
    values = np.full((len(times), 1), 7.0)
    scores = scores_of(query(), 1)
    found = run(scores, times, values)
    assert (found[times > START + 1.5 * DAY] < 0.01).all()
    assert scores.step(times[-1] + 300, np.array([8.0]))[0] > 1


def test_gaps_are_gaps() -> None:
    times, values = loads(2, 3, 1)
    values[-200:-20, 0] = np.nan
    found = run(scores_of(query(), 2), times, values)
    assert np.isnan(found[-200:-20, 0]).all()
    assert np.isfinite(found[-20:, 0]).all()
    assert found[-20:, 0].max() < 1
    assert np.isfinite(found[-200:, 1]).all()


def test_infinities_and_what_is_no_number_are_gaps() -> None:
    times, values = loads(3, 3, 1)
    values[-5:] = [np.inf, -np.inf, np.nan]
    scores = scores_of(query(), 3)
    assert np.isnan(run(scores, times, values)[-1]).all()
    assert all(np.isfinite(array[np.isfinite(array)]).all() for array in scores.save().arrays.values())


def test_a_series_does_not_depend_on_its_row_or_its_neighbours() -> None:
    times, values = loads(3, 3, 1)
    alone = run(scores_of(query(), 1), times, values[:, 1:2])
    wide = np.full((len(times), 9), np.nan)
    wide[:, [7, 2, 4]] = values
    among = run(scores_of(query(), 9), times, wide)
    np.testing.assert_array_equal(alone[:, 0], among[:, 2])


def test_a_row_that_is_admitted_again_knows_nothing_of_its_former_series() -> None:
    times, values = loads(2, 4, 1)
    scores = scores_of(query(), 2)
    run(scores, times, values)
    scores.evict(np.array([1]))
    scores.admit(np.array([1]), [()], 2)
    later = times + 4 * DAY
    reused = run(scores, later, values)
    fresh = run(scores_of(query(), 2), later, values)
    np.testing.assert_array_equal(reused[:, 1], fresh[:, 1])
    assert np.isfinite(reused[0, 0])


def test_growing_keeps_what_was_learned() -> None:
    times, values = loads(2, 4, 1)
    small, large = scores_of(query(), 2), scores_of(query(), 2)
    run(small, times[:500], values[:500])
    run(large, times[:500], values[:500])
    large.admit(np.array([2, 3]), [(), ()], 300)
    wide = np.full((len(times) - 500, 300), np.nan)
    wide[:, :2] = values[500:]
    np.testing.assert_array_equal(run(large, times[500:], wide)[:, :2], run(small, times[500:], values[500:]))


def test_a_restored_state_goes_on_bit_identically() -> None:
    times, values = loads(4, 3, 1)
    whole, first = scores_of(query(), 4), scores_of(query(), 4)
    expected = run(whole, times, values)
    run(first, times[:600], values[:600])
    second = scores_of(query(), 4)
    second.restore(snapshot.from_bytes(snapshot.to_bytes(first.save())))
    np.testing.assert_array_equal(run(second, times[600:], values[600:]), expected[600:])


def test_a_state_of_another_version_or_shape_is_refused() -> None:
    scores = scores_of(query(), 2)
    state = scores.save()
    with pytest.raises(StateError, match="version"):
        scores.restore(snapshot.State(state.arrays, {"version": 0}))
    with pytest.raises(StateError, match="day"):
        scores.restore(snapshot.State({**state.arrays, "day": np.zeros((1, 2), np.float32)}, state.meta))
    with pytest.raises(StateError, match="rows"):
        Scores(query()).restore(state)


def test_bands_hold_what_the_seasonal_part_allows() -> None:
    times, values = loads(1, 3, 1)
    scores = scores_of(query(bands=True), 1)
    run(scores, times, values)
    scores.observe(Frame(times[-1] + 300, {"value": values[-1]}, 300.0))
    columns = {column.family.name: column.values[0] for column in scores.outputs()}  # type: ignore[union-attr]
    low, mid, high = (columns[f"gpuglass_anomaly_{name}"] for name in ("lower", "expected", "upper"))
    assert low < mid < high
    assert 60 < mid < 150
    assert columns["gpuglass_anomaly_ready"] == 1


def test_the_reasons_name_the_largest_part_first() -> None:
    times, values = loads(1, 3, 1)
    scores = scores_of(query(), 1)
    run(scores, times, values)
    scores.step(times[-1] + 300, values[-1] + 70)
    reasons = scores.explain(0)
    assert reasons[0].ratio == max(reason.ratio for reason in reasons if np.isfinite(reason.ratio)) > 1
    assert reasons[0].deviation > reasons[0].usual > 0
