"""Decomposition, fitted model, regression's past: against what is known of made series."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_sidecar.interface import State
from anomaly_sidecar.models import history as past
from anomaly_sidecar.models import seasonal
from anomaly_sidecar.models.history import History
from anomaly_sidecar.models.level_ar import LevelAr
from anomaly_sidecar.models.panel import Panel
from anomaly_sidecar.workers import run_job
from tests.anomaly_sidecar.scripted import Floats, day_course

STEP = 900.0
PERIOD = 96


def load(rng: np.random.Generator, days: int, noise: float = 0.05) -> Floats:
    """(cells,) around 1000."""
    cells = days * PERIOD
    return 1000 * day_course(np.arange(cells) * STEP) * (1 + rng.normal(0, noise, cells))


def test_a_decomposition_adds_up_and_finds_the_course_of_the_day() -> None:
    values = load(np.random.default_rng(0), 7)
    parts = seasonal.decompose(values, PERIOD)
    assert parts is not None
    assert parts.trend + parts.seasonal + parts.remainder == pytest.approx(values)
    course = 1000 * (day_course(np.arange(7 * PERIOD) * STEP) - 1)
    assert np.corrcoef(parts.seasonal, course)[0, 1] > 0.99
    assert np.std(parts.remainder) < 80


def test_gaps_are_filled_and_too_many_too_few_and_nothing_are_refused() -> None:
    values = load(np.random.default_rng(1), 4)
    values[100:120] = np.nan
    parts = seasonal.decompose(values, PERIOD)
    assert parts is not None
    assert np.isfinite(parts.trend).all()
    assert seasonal.decompose(values[: PERIOD + 5], PERIOD) is None
    values[: 3 * PERIOD] = np.nan
    assert seasonal.decompose(values, PERIOD) is None
    assert seasonal.fit(np.full(4 * PERIOD, np.nan), 0, PERIOD) is None
    assert seasonal.fit(np.full(4 * PERIOD, 7.0), 0, PERIOD) is None, "nothing to fit in a constant"


def test_the_job_gives_plain_arrays_and_says_nothing_where_nothing_fits() -> None:
    values = load(np.random.default_rng(2), 5)
    job = "anomaly_sidecar.models.seasonal:job"
    done = run_job(job, State({"values": values}, {"first": 0, "period": PERIOD}))
    assert done.state is not None
    shapes = {name: array.shape for name, array in done.state.arrays.items()}
    assert shapes == {"pattern": (PERIOD,), "parameters": (3,), "panel": (3,)}
    assert done.state.meta == {"last": 5 * PERIOD - 1}
    empty = run_job(job, State({"values": values[:10]}, {"first": 0, "period": PERIOD}))
    assert empty.state == State()


def test_the_fitted_model_goes_on_with_the_course_of_the_day() -> None:
    rng = np.random.default_rng(3)
    values = load(rng, 9)
    learnt = 8 * PERIOD
    history = History.empty(1, STEP)
    for index in range(learnt):
        history.push(index, values[index : index + 1])
    found = seasonal.fit(values[:learnt], 0, PERIOD)
    assert found is not None
    model = LevelAr.empty(1, PERIOD)
    assert np.isnan(model.expect(0, np.array([1]))).all(), "nothing is fitted yet"
    model.refit(0, found.pattern, found.parameters, history)
    horizon = np.array([16])
    errors, changes = [], []
    for index in range(learnt, 9 * PERIOD - 16):
        model.push(index, values[index : index + 1])
        errors.append(abs(model.expect(index, horizon)[0, 0] - values[index + 16]))
        changes.append(abs(values[index] - values[index + 16]))
    assert np.mean(errors) < 0.35 * np.mean(changes)


def test_the_filter_agrees_with_statsmodels() -> None:
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    values = np.cumsum(np.random.default_rng(4).normal(0, 1, 300)) + 50
    model = UnobservedComponents(values, level=True, stochastic_level=True, irregular=False, autoregressive=1)
    named = {"sigma2.level": 0.5, "sigma2.ar": 0.7, "ar.L1": 0.6}
    expected = model.filter([named[name] for name in model.param_names]).forecast(5)
    own = LevelAr.empty(1, PERIOD)
    own.parameters[0] = 0.5, 0.7, 0.6
    own.mean[0] = values[0], 0.0
    own.covariance[0] = 1e6, 0.0, 0.7 / (1 - 0.36)
    for index, value in enumerate(values):
        own.push(index, np.array([value]))
    assert own.expect(299, np.arange(1, 6))[0] == pytest.approx(expected, abs=1e-3)


def test_a_gap_keeps_the_latest_value_for_a_while_and_then_nothing_is_known() -> None:
    history = History.empty(2, STEP)
    for index in range(20):
        history.push(index, np.array([5.0, 7.0]))
    for index in range(20, 20 + past.RECENT):
        history.push(index, np.array([np.nan, 7.0]))
        assert history.now.tolist() == [5.0, 7.0]
    history.push(40, np.array([np.nan, 7.0]))
    assert np.isnan(history.now[0])
    assert np.isnan(history.latest(12)[0]).all()


def test_a_sudden_zero_is_a_dropout_and_one_that_lasts_is_believed() -> None:
    rng = np.random.default_rng(5)
    history = History.empty(1, STEP)
    for index in range(50):
        history.push(index, 100 + rng.normal(0, 2, 1))
    zero = np.zeros(1)
    assert history.dropout(zero).all()
    assert not history.dropout(np.full(1, 60.0)).any()
    for index in range(50, 56):
        history.push(index, zero)
    assert not history.dropout(zero).any()
    quiet = History.empty(1, STEP)
    for index in range(50):
        quiet.push(index, rng.poisson(1.0, 1).astype(float))
    assert not quiet.dropout(zero).any(), "zeros are usual here"


def test_one_outage_does_not_stay_in_the_profile() -> None:
    history = History.empty(1, STEP)
    for index in range(3 * PERIOD):
        history.push(index, np.full(1, 100.0))
    history.push(3 * PERIOD, np.full(1, 1e9))
    assert history.profile[0, 0] < 200


def test_the_trend_goes_on_from_stl_and_strengths_tell_a_course_from_noise() -> None:
    rng = np.random.default_rng(6)
    growth = np.linspace(0, 1500, 9 * PERIOD)
    values = load(rng, 9) + growth
    found, noise = seasonal.fit(values[: 8 * PERIOD], 0, PERIOD), rng.normal(1000, 50, 8 * PERIOD)
    assert found is not None
    trend, of_trend, of_course = found.panel
    assert trend == pytest.approx(1000 + growth[8 * PERIOD - 1], rel=0.04)
    assert min(of_trend, of_course) > 0.9
    of_noise = seasonal.fit(noise, 0, PERIOD)
    assert of_noise is not None
    assert of_noise.panel[2] < 0.6
    history, panel = History.empty(2, STEP), Panel.empty(2)
    for index in range(8 * PERIOD + 4):
        history.push(index, np.repeat(values[index], 2))
    panel.refit(0, found.panel, 8 * PERIOD - 1, found.pattern, history)
    for index in range(8 * PERIOD + 4, 9 * PERIOD):
        panel.push(index, np.repeat(values[index], 2), np.tile(found.pattern, (2, 1)), STEP)
    assert panel.trend[0] == pytest.approx(1000 + growth[-1], rel=0.05)
    assert np.isnan(panel.trend[1]), "not fitted"
