"""Recurring peaks, level shifts, stragglers, silence, stranded memory; beside each its healthy twin."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_sidecar.detectors.recurrence import Recurrences, strength
from anomaly_sidecar.detectors.shift import Shifts
from anomaly_sidecar.detectors.silence import Held, silent, stranded
from anomaly_sidecar.detectors.straggler import Stragglers, compare
from tests.anomaly_sidecar.scripted import HOUR, START, Floats, day_course

# Recurring peaks


def hourly(rng: np.random.Generator, days: int, rows: int = 20) -> Floats:
    """(rows, hours) of noise around 10."""
    return 10 + rng.normal(0, 0.5, (rows, days * 24))


def recur(values: Floats) -> Recurrences:
    found = Recurrences.empty(len(values))
    for hour in range(values.shape[1] + 1):
        sample = values[:, hour] if hour < values.shape[1] else np.full(len(values), np.nan)
        for part in (0.0, 1800.0):
            found.observe(START + hour * HOUR + part, sample)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_fragmentation_from_19_to_21_is_declared_after_three_repeats_with_window_and_strength(
    seed: int,
) -> None:
    values = hourly(np.random.default_rng(seed), 3)
    for day in range(3):
        values[:, day * 24 + 19 : day * 24 + 21] += 12
    found = recur(values)
    declared = (found.start == 19) & (found.hours == 2)
    assert declared.mean() >= 0.9
    assert (found.repeats[declared] == 3).all()
    assert (found.weekday[declared] == -1).all()
    assert (found.strength[declared] > 0.8).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_peak_that_happens_twice_is_not_declared(seed: int) -> None:
    values = hourly(np.random.default_rng(seed), 3)
    for day in range(2):
        values[:, day * 24 + 19 : day * 24 + 21] += 12
    assert (recur(values).start == -1).mean() >= 0.95


def test_noise_smooth_days_and_peaks_at_other_hours_are_not_declared() -> None:
    rng = np.random.default_rng(7)
    assert (recur(hourly(rng, 14, 200)).start == -1).mean() >= 0.95
    smooth = np.tile(10 * day_course(np.arange(14 * 24) * HOUR), (5, 1))
    assert (recur(smooth).start == -1).all()
    wandering = hourly(rng, 14)
    for day in range(14):
        for row in range(20):
            wandering[row, day * 24 + rng.integers(0, 24)] += 12
    assert (recur(wandering).start == -1).mean() >= 0.9


def test_a_peak_of_one_weekday_needs_three_weeks_and_names_the_day() -> None:
    rng = np.random.default_rng(1)
    values = hourly(rng, 22)
    for week in range(3):
        values[:, (week * 7 + 1) * 24 + 3] += 15
    assert (recur(values[:, : 9 * 24]).start == -1).mean() >= 0.9, "two Tuesdays"
    found = recur(values)
    declared = (found.start == 3) & (found.weekday == 1)
    assert declared.mean() >= 0.9
    assert (found.repeats[declared] == 3).all()


def test_a_window_may_go_over_midnight_and_a_peak_that_stays_away_is_forgotten() -> None:
    values = hourly(np.random.default_rng(2), 14)
    for day in range(5):
        values[:, day * 24 + 23 : day * 24 + 24] += 12
        values[:, (day + 1) * 24 : (day + 1) * 24 + 1] += 12
    found = recur(values[:, : 5 * 24])
    assert ((found.start == 23) & (found.hours == 2)).mean() >= 0.9
    assert (recur(values).start == -1).mean() >= 0.95


def test_days_that_were_hardly_seen_do_not_count() -> None:
    values = hourly(np.random.default_rng(3), 3)
    for day in range(3):
        values[:, day * 24 + 19 : day * 24 + 21] += 12
    values[:, 24:34] = np.nan
    assert (recur(values).start == -1).all()


def test_strength_is_the_share_of_the_variance() -> None:
    means = np.zeros((3, 24))
    means[:, 5] = 1.0
    assert strength(means, 5, 1) == pytest.approx(1.0)
    assert strength(means, 6, 1) < 0.05
    assert strength(np.ones((3, 24)), 5, 1) == 0.0


# Level shift


def deploy(values: Floats, at: int | None, step: float = 300.0) -> Shifts:
    """(rows, samples) with a deployment before sample `at`."""
    shifts = Shifts.empty(len(values))
    for sample in range(values.shape[1]):
        version = np.full(len(values), 1.0 if at is None or sample < at else 2.0)
        shifts.observe(START + sample * step, values[:, sample], version)
    return shifts


def latencies(rng: np.random.Generator, rows: int, samples: int) -> Floats:
    """A course of the day with noise and slow wandering."""
    wander = np.cumsum(rng.normal(0, 0.003, (rows, samples)), axis=1)
    return 2.0 * day_course(np.arange(samples) * 300.0) * (1 + rng.normal(0, 0.05, (rows, samples))) + wander


@pytest.mark.parametrize("seed", range(3))
def test_a_deployment_that_changes_the_level_is_told_and_one_that_changes_nothing_is_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = latencies(rng, 50, 330)
    same = deploy(values, 300)
    assert (same.judged == 1).all()
    assert np.isnan(same.shift).mean() >= 0.95
    values[:, 300:] *= 1.8
    shifted = deploy(values, 300)
    assert np.isfinite(shifted.shift).mean() >= 0.95
    assert 0.5 < np.nanmedian(shifted.relative) < 1.2, "0.8, and what the course of the day adds"


def test_the_same_change_without_a_deployment_is_no_level_shift() -> None:
    values = latencies(np.random.default_rng(1), 20, 330)
    values[:, 300:] *= 1.8
    found = deploy(values, None)
    assert np.isnan(found.shift).all()
    assert (found.judged == 0).all()


def test_a_new_series_and_one_with_gaps_are_not_judged() -> None:
    values = latencies(np.random.default_rng(2), 5, 60)
    values[:, 30:] *= 3
    assert np.isnan(deploy(values, 30).shift).all(), "too few comparisons without a deployment"
    values = latencies(np.random.default_rng(2), 5, 330)
    values[:, 300:] *= 3
    values[:, 302:] = np.nan
    assert np.isnan(deploy(values, 300).shift).all()


def test_a_verdict_ends_after_six_hours_and_with_the_next_deployment() -> None:
    values = latencies(np.random.default_rng(3), 5, 400)
    values[:, 300:] += 4
    assert np.isfinite(deploy(values[:, :340], 300).shift).all()
    assert np.isnan(deploy(values, 300).shift).all()
    shifts = deploy(values[:, :340], 300)
    shifts.observe(START + 340 * 300.0, values[:, 340], np.full(5, 3.0))
    assert np.isnan(shifts.shift).all()


# Stragglers


def race(values: Floats, groups: list[int], low_is_slow: bool = False) -> Stragglers:
    """(rows, samples), one every 30 s."""
    found = Stragglers.empty(len(values), 0.15, 120.0, low_is_slow)
    found.group[:] = groups
    for sample in range(values.shape[1]):
        found.observe(START + 30.0 * sample, values[:, sample])
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_that_lags_is_named_and_load_that_slows_all_is_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    load = 1 + np.cumsum(np.abs(rng.normal(0, 0.05, 60)))
    steps = 0.02 * load * rng.normal(1, 0.03, (8, 60))
    assert not race(steps, [0] * 8).verdict.any()
    slow = int(rng.integers(8))
    steps[slow] *= 1.4
    found = race(steps, [0] * 8)
    assert np.flatnonzero(found.verdict).tolist() == [slow]
    assert found.rank[slow] == 1
    assert found.ratio[slow] == pytest.approx(1.4, abs=0.15)
    assert np.flatnonzero(race(1 / steps, [0] * 8, low_is_slow=True).verdict).tolist() == [slow]


def test_a_short_hiccup_is_no_straggler_and_one_that_recovers_is_let_go() -> None:
    steps = np.full((4, 60), 0.02)
    steps[2, 10:14] = 0.05
    assert not race(steps, [0] * 4).verdict.any()
    steps[2, 10:40] = 0.05
    assert race(steps[:, :40], [0] * 4).verdict.tolist() == [False, False, True, False]
    assert not race(steps, [0] * 4).verdict.any()


def test_groups_are_compared_apart_and_small_ones_not_at_all() -> None:
    values = np.array([1.0, 1.1, 0.9, 10.0, 11.0, 10.0, 5.0, 50.0, np.nan])
    ratio, rank = compare(values, np.array([0, 0, 0, 1, 1, 1, 2, 2, 2]), low_is_slow=False)
    assert ratio[:6] == pytest.approx([1.0, 1.1, 0.9, 1.0, 1.1, 1.0])
    assert np.isnan(ratio[6:]).all(), "of two nobody knows which one is wrong"
    assert rank[:3].tolist() == [2, 1, 3]
    assert np.isnan(compare(np.zeros(3), np.zeros(3, np.int64), False)[0]).all()
    assert np.isnan(compare(np.full(3, np.nan), np.zeros(3, np.int64), False)[0]).all()


# Silence and stranded memory


def held(needed: float, samples: list[tuple[float, float, float]], step: float = 30.0) -> Held:
    """Of (alive, demand, tokens) every 30 s."""
    found = Held.empty(1, needed)
    for number, (alive, demand, tokens) in enumerate(samples):
        found.observe(number * step, *silent(*(np.array([x]) for x in (alive, demand, tokens))))
    return found


def test_an_engine_that_is_asked_and_says_nothing_fails_silently() -> None:
    found = held(120, [(1, 5, 100)] * 3 + [(1, 5, 0)] * 5)
    assert found.verdict(7 * 30.0).all()
    assert found.seconds(7 * 30.0) == [120.0]


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param([(1, 0, 0)] * 20, id="no traffic"),
        pytest.param([(0, 5, 0)] * 20, id="down, which is said elsewhere"),
        pytest.param([(1, 5, 0), (1, 5, 0), (1, 5, 0), (1, 5, 20)] * 5, id="slow"),
        pytest.param([(1, 5, 0)] * 4, id="not for long enough"),
        pytest.param([(1, 5, np.nan)] * 20, id="unknown"),
        pytest.param([(1, 5, 0)] * 2 + [(np.nan,) * 3] * 6 + [(1, 5, 0)] * 2, id="nothing known in between"),
    ],
)
def test_what_is_no_silent_failure(samples: list[tuple[float, float, float]]) -> None:
    assert not held(120, samples).verdict((len(samples) - 1) * 30.0).any()


def test_a_short_gap_does_not_hide_a_silent_failure() -> None:
    found = held(120, [(1, 5, 0)] * 3 + [(1, 5, np.nan)] + [(1, 5, 0)] * 3)
    assert found.verdict(6 * 30.0).all()
    assert np.isnan(found.seconds(6 * 30.0 + 500)).all(), "too old to be said"


def test_memory_is_stranded_where_the_gpu_idles_and_nobody_asks() -> None:
    used = np.array([20e9, 20e9, 20e9, 1e8, np.nan])
    busy = np.array([0.0, 0.3, 0.0, 0.0, 0.0])
    demand = np.array([0.0, 0.0, 2.0, 0.0, 0.0])
    holds, known = stranded(used, busy, demand, 1e9)
    assert (holds & known).tolist() == [True, False, False, False, False]
    holds, known = stranded(used, busy, None, 1e9)
    assert (holds & known).tolist() == [True, False, True, False, False]
