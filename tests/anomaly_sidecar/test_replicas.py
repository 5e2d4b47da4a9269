"""Replicas needed: by the load now and by the forecast, the larger counts; capacity is measured."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_sidecar.autoscale import Replicas, ReplicasSettings
from anomaly_sidecar.interface import Column, Frame
from anomaly_sidecar.replicas import HEADROOM, Capacity, needed, seconds_to_limit, seconds_to_quota
from anomaly_sidecar.workers import InlineWorkers
from gpuglass.families import anomaly as families
from tests.anomaly_sidecar.scripted import START, Floats, day_course

STEP = 900.0
CELLS = 96
EACH = 100.0
NAN = np.array([np.nan])


def of(*values: float) -> Floats:
    return np.array(values, np.float64)


def test_a_forecast_raises_the_number_and_never_lowers_it() -> None:
    load = of(80, 80, 80, 80)
    total, now, later = needed(load, of(1, 1, 1, 1), of(400, 80, 8, np.nan), of(100, 100, 100, 100), NAN)
    assert now.tolist() == [1, 1, 1, 1]
    assert later[:3].tolist() == [5, 1, 1]
    assert total.tolist() == [5, 1, 1, 1]
    rng = np.random.default_rng(0)
    loads, forecasts = rng.uniform(0, 1e4, 500), rng.uniform(0, 1e4, 500)
    total, now, _ = needed(loads, np.zeros(500), forecasts, np.full(500, 100.0), np.full(500, np.nan))
    assert (total >= now).all()


def test_a_queue_counts_where_throughput_cannot_rise_any_more() -> None:
    total, _, _ = needed(of(160), of(90), NAN, of(100), of(20))
    assert total == [5], "tokens ask for 2, 90 open requests at 20 each for 5"


def test_nothing_known_is_no_number_and_bounds_hold() -> None:
    assert np.isnan(needed(NAN, NAN, of(500), of(100), NAN)[0]).all(), "a forecast alone is no load"
    assert np.isnan(needed(of(500), NAN, NAN, NAN, NAN)[0]).all()
    assert needed(of(0), of(0), of(0), of(100), NAN)[0] == [1]
    assert needed(of(1e9), of(0), NAN, of(100), NAN, maximum=8)[0] == [8]


def test_capacity_is_what_a_replica_did_while_requests_waited() -> None:
    rng = np.random.default_rng(1)
    capacity = Capacity.empty(1)
    for minute in range(300):
        saturated = minute % 3 == 0
        each = rng.normal(100, 5) if saturated else rng.uniform(5, 60)
        capacity.observe(minute * 60.0, of(4 * each), of(10 if saturated else 0), of(40), of(4))
    assert capacity.measured.all()
    assert capacity.each() == pytest.approx(100, rel=0.05)


def test_without_saturation_the_highest_throughput_is_a_lower_bound() -> None:
    capacity = Capacity.empty(2)
    for minute in range(300):
        capacity.observe(minute * 60.0, of(60, np.nan), of(0, 0), of(5, 5), of(2, 0))
    assert not capacity.measured.any()
    assert capacity.each()[0] == pytest.approx(30)
    assert np.isnan(capacity.each()[1])


def test_time_to_a_limit_lies_on_the_line_between_horizons() -> None:
    seconds = seconds_to_limit(
        of(50, 101, 50, 50),
        of(100, 100, 100, np.nan),
        np.array([[60, 140]] * 4) * [[1], [1], [0.5], [1]],
        of(300, 600),
    )
    assert seconds[:2].tolist() == [450, 0]
    assert np.isnan(seconds[2:]).all()


def test_a_quota_runs_out_with_the_forecast_rate_which_goes_on_after_the_last_horizon() -> None:
    rate = np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    seconds = seconds_to_quota(of(0, 0, 0, 500), of(500, 5000, 10, 500), rate, of(300, 600))
    assert seconds[[0, 1, 3]].tolist() == [400, 2650, 0]
    assert np.isnan(seconds[2])


def test_with_a_load_that_rises_and_falls_it_leads_never_lies_below_the_need_and_falls_again() -> None:
    settings = ReplicasSettings(fit=False, capacity=EACH, step=STEP, horizons=(900.0, 1800.0), horizon=900.0)
    service = Replicas("service", settings, InlineWorkers())
    service.admit(np.arange(1), [(("service", "a"),)], 1)
    rng = np.random.default_rng(2)
    days = 9
    load = 2000 * day_course(np.arange(days * CELLS) * STEP) * rng.lognormal(0, 0.02, days * CELLS)
    total, now = [], []
    for cell in range(days * CELLS):
        values = {"value": of(load[cell]), "waiting": of(0), "running": of(load[cell] / 10), "ready": of(40)}
        service.observe(Frame(START + cell * STEP, values, STEP))
        outputs = [o for o in service.outputs() if isinstance(o, Column) and o.family is families.REPLICAS]
        by_basis = {output.labels["basis"]: float(output.values[0]) for output in outputs}
        total.append(by_basis["all"])
        now.append(by_basis["now"])
    wanted, present = np.array(total[8 * CELLS :]), np.array(now[8 * CELLS :])
    last = load[8 * CELLS :]
    assert (wanted >= present).all()
    assert (present == np.maximum(1, np.ceil(last / (EACH * HEADROOM) - 1e-6))).all()
    rising = day_course(np.arange(CELLS) * STEP + 900) > day_course(np.arange(CELLS) * STEP) + 0.005
    assert (wanted > present)[rising].mean() > 0.6, "raised ahead of the load"
    assert wanted.max() >= 30
    assert wanted.min() <= 0.6 * wanted.max(), "and falls when both fall"
    assert (wanted[:-1] * EACH >= last[1:]).all(), "what was asked for carries the load that comes next"


def test_saturation_without_a_known_capacity_is_measured_and_published_as_such() -> None:
    service = Replicas("service", ReplicasSettings(fit=False), InlineWorkers())
    service.admit(np.arange(1), [(("service", "a"),)], 1)

    def capacity() -> dict[str, float]:
        return {
            output.labels["source"]: float(output.values[0])
            for output in service.outputs()
            if isinstance(output, Column) and output.family is families.REPLICA_CAPACITY
        }

    for minute in range(40):
        waiting = 0.0 if minute < 20 else 30.0
        load = 50.0 if minute < 20 else 200.0
        values = {"value": of(load), "waiting": of(waiting), "running": of(20), "ready": of(2)}
        service.observe(Frame(START + minute * 60.0, values, 60.0))
        if minute == 19:
            assert capacity()["observed"] == pytest.approx(25)
            assert np.isnan(capacity()["measured"])
    assert capacity()["measured"] == pytest.approx(100)
    twin = Replicas("service", ReplicasSettings(fit=False), InlineWorkers())
    twin.admit(np.arange(1), [(("service", "a"),)], 1)
    twin.restore(service.save())
    shown = [o.values.tobytes() for part in (service, twin) for o in part.outputs() if isinstance(o, Column)]
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"horizon": 1200.0}, "horizon: must be one of"),
        ({"quantile": 0.95}, "quantile: must be one of"),
        ({"capacity": -1.0}, "capacity: must be 0"),
        ({"min_replicas": 5.0, "max_replicas": 2.0}, "min_replicas: must be between"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReplicasSettings(**settings)  # type: ignore[arg-type]
