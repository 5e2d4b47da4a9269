"""Detectors as the sidecar runs them: outputs by family, life of rows, state to bytes and back, settings."""

from __future__ import annotations

import datetime
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest

from anomaly_sidecar import snapshot
from anomaly_sidecar.detectors import KINDS
from anomaly_sidecar.interface import Analyzer, Column, Frame, Labels, Point, State, StateError
from anomaly_sidecar.workers import InlineWorkers
from gpuglass.families import anomaly as families
from gpuglass.family import Family
from tests.anomaly_sidecar.scripted import GIB, HOUR, START, Floats

DETECTORS = [name for name in KINDS if name not in ("forecast", "replicas")]
every_detector = pytest.mark.parametrize("kind", DETECTORS)


def made(kind: str, rows: int = 4, **settings: Any) -> Analyzer:
    """An analyzer of a kind with `rows` series of one group."""
    analyzer = KINDS[kind].create(kind, msgspec.convert(settings, KINDS[kind].settings), InlineWorkers())
    analyzer.admit(np.arange(rows), [labels(row) for row in range(rows)], rows)
    return analyzer


def labels(row: int) -> Labels:
    return (("model_name", "m"), ("rank", str(row)))


def feed(
    analyzer: Analyzer, kind: str, rng: np.random.Generator, first: int, count: int, rows: int = 4
) -> None:
    """Random samples with gaps for all roles, every ten minutes."""
    for sample in range(first, first + count):
        values: dict[str, Floats] = {}
        for role in KINDS[kind].roles:
            array = rng.uniform(0, 3, rows).round(1) * (GIB if role.name in ("used", "kv") else 1.0)
            if role.name in ("version", "started"):
                array = np.full(rows, float(sample // 90))
            array[rng.random(rows) < 0.1] = np.nan
            values[role.name] = array
        analyzer.observe(Frame(START + sample * 600.0, values, 600.0))


def shown(analyzer: Analyzer) -> list[tuple[str, dict[str, str], bytes]]:
    return [
        (o.family.name, dict(o.labels), np.asarray(o.values if isinstance(o, Column) else o.value).tobytes())
        for o in analyzer.outputs()
    ]


def column(analyzer: Analyzer, family: Family) -> Floats:
    (found,) = (o.values for o in analyzer.outputs() if isinstance(o, Column) and o.family is family)
    return found


@every_detector
@pytest.mark.parametrize("seed", range(3))
def test_a_restart_in_the_middle_changes_nothing(kind: str, seed: int) -> None:
    one = made(kind)
    feed(one, kind, np.random.default_rng(seed), 0, 500)
    two = made(kind)
    two.restore(snapshot.from_bytes(snapshot.to_bytes(one.save())))
    for analyzer in (one, two):
        feed(analyzer, kind, np.random.default_rng(seed + 100), 500, 300)
    assert shown(one) == shown(two)
    a, b = one.save(), two.save()
    assert a.meta == b.meta
    assert {k: x.tobytes() for k, x in a.arrays.items()} == {k: x.tobytes() for k, x in b.arrays.items()}


@every_detector
def test_states_of_another_version_or_shape_are_refused_and_change_nothing(kind: str) -> None:
    one = made(kind)
    feed(one, kind, np.random.default_rng(1), 0, 200)
    saved = snapshot.from_bytes(snapshot.to_bytes(one.save()))
    name = next(iter(saved.arrays))
    for bad in (
        State(saved.arrays, {**saved.meta, "version": 99}),
        State({k: a for k, a in saved.arrays.items() if k != name}, saved.meta),
        State({**saved.arrays, name: saved.arrays[name].astype("U3")}, saved.meta),
        State({**saved.arrays, name: np.concatenate([saved.arrays[name]] * 2)}, saved.meta),
    ):
        fresh = made(kind)
        before = {name: array.tobytes() for name, array in fresh.save().arrays.items()}
        with pytest.raises(StateError):
            fresh.restore(bad)
        assert {name: array.tobytes() for name, array in fresh.save().arrays.items()} == before


@every_detector
def test_rows_grow_an_evicted_one_says_nothing_and_starts_from_nothing(kind: str) -> None:
    analyzer = made(kind)
    feed(analyzer, kind, np.random.default_rng(2), 0, 400)
    analyzer.evict(np.array([1]))
    analyzer.admit(np.array([5]), [labels(5)], 8)
    nothing = {role.name: np.full(8, np.nan) for role in KINDS[kind].roles}
    analyzer.observe(Frame(START + 400 * 600.0, nothing, 600.0))
    for output in analyzer.outputs():
        if isinstance(output, Column):
            assert len(output.values) == 8
            assert np.isnan(output.values[1]), output.family.name
        else:
            assert output.row not in (1, 5)
    fresh = made(kind, 8).save()
    for name, array in analyzer.save().arrays.items():
        if name != "group":
            assert np.array_equal(array[5], fresh.arrays[name][5], equal_nan=True), name


@every_detector
def test_memory_per_series_is_bounded(kind: str) -> None:
    analyzer = made(kind)
    feed(analyzer, kind, np.random.default_rng(3), 0, 10)
    before = {name: array.nbytes for name, array in analyzer.save().arrays.items()}
    feed(analyzer, kind, np.random.default_rng(3), 10, 600)
    after = {name: array.nbytes for name, array in analyzer.save().arrays.items()}
    assert before == after
    assert sum(after.values()) / 4 < 8192


def test_a_leak_is_published_with_its_growth_and_a_row_without_a_sample_is_absent() -> None:
    leak = made("leak", 2)
    for minute in range(120):
        used = np.array([20 * GIB + minute * GIB / 60, 20 * GIB])
        leak.observe(Frame(START + minute * 60.0, {"used": used}, 60.0))
    assert column(leak, families.LEAK).tolist() == [1, 0]
    assert column(leak, families.LEAK_RATE)[0] == pytest.approx(GIB / 3600, rel=0.05)
    assert np.isnan(column(leak, families.LEAK_RATE)[1])
    leak.observe(Frame(START + 120 * 60.0, {"used": np.array([np.nan, 20 * GIB])}, 60.0))
    assert np.isnan(column(leak, families.LEAK)[0])


def test_stranded_bytes_appear_after_half_an_hour_of_idling() -> None:
    stranded = made("stranded", 2)
    for minute in range(40):
        values = {"used": np.full(2, 30 * GIB), "busy": np.array([0.0, 0.4])}
        stranded.observe(Frame(START + minute * 60.0, values, 60.0))
        if minute == 20:
            assert column(stranded, families.STRANDED).tolist() == [0, 0]
    assert column(stranded, families.STRANDED).tolist() == [30 * GIB, 0]
    assert column(stranded, families.STRANDED_SECONDS).tolist() == [39 * 60, 0]


def test_hours_of_a_recurring_peak_are_local_also_across_the_change_of_the_clock() -> None:
    recurring = made("recurring", 1, timezone="Europe/Berlin")
    # The clock goes forward in the night to 2027-03-28: 19:00 is 18:00 UTC before and 17:00 UTC after.
    begin = datetime.datetime(2027, 3, 25, 23, tzinfo=datetime.UTC).timestamp()
    rng = np.random.default_rng(0)
    for hour in range(5 * 24):
        local = datetime.datetime.fromtimestamp(begin + hour * HOUR, datetime.UTC)
        summer = local >= datetime.datetime(2027, 3, 28, 1, tzinfo=datetime.UTC)
        value = 20.0 if (local.hour + 1 + summer) % 24 in (19, 20) else 10 + rng.normal(0, 0.2)
        recurring.observe(Frame(begin + hour * HOUR, {"value": np.array([value])}, HOUR))
    points = [o for o in recurring.outputs() if isinstance(o, Point)]
    assert {o.labels["from_hour"] for o in points} == {"19:00"}
    assert {o.labels["to_hour"] for o in points} == {"21:00"}
    assert {o.labels["weekday"] for o in points} == {"every"}


def test_groups_of_stragglers_come_from_labels_and_survive_a_restart() -> None:
    one = made("straggler", 8, group_by=["node"])
    names: list[Labels] = [(("node", "ab"[row // 4]), ("rank", str(row))) for row in range(8)]
    one.admit(np.arange(8), names, 8)
    values = np.array([1, 1, 1, 2, 5, 5, 5, 5.0])
    for sample in range(40):
        one.observe(Frame(START + 30.0 * sample, {"value": values}, 30.0))
    assert column(one, families.STRAGGLER).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    two = made("straggler", 8, group_by=["node"])
    two.admit(np.arange(8), names, 8)
    two.restore(one.save())
    assert shown(two) == shown(one)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("leak", {"min_bytes_per_hour": -1.0}, "min_bytes_per_hour: must be a number above 0"),
        ("silent", {"seconds": 0.0}, "seconds: must be"),
        ("recurring", {"timezone": "Mars/Olympus"}, "timezone: 'Mars/Olympus' is not known"),
        ("recurring", {"timezone": "../../etc/passwd"}, "timezone: "),
        ("straggler", {"tolerance": 1.5}, "tolerance: must be below 1"),
        ("leak", {"min_bytes": 1.0}, "unknown field"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(kind: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.convert(settings, KINDS[kind].settings)


def test_the_sidecar_itself_loads_no_statsmodels() -> None:
    """It takes 100 MB and a second: only worker processes need it."""
    code = "import sys, anomaly_sidecar.detectors; sys.exit('statsmodels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
