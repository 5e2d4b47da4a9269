"""The leak suite: every leaking behaviour is found, no healthy one is accused, over many variants of each.

Runs are in simulated time. `GPUGLASS_LEAK_VARIANTS` raises the number of variants (default 6).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from ebpf.verdict.leak import State
from tests.ebpf.verdict.behaviours import (
    GIB,
    HEALTHY,
    HOUR,
    LEAKING,
    MIB,
    MINUTE,
    Behaviour,
    Seen,
    fragmentation,
    growth_like_a_logarithm,
    leak_of_1_gib_per_hour,
    load,
    memory_that_follows_the_load,
    slow_warm_up,
    steady,
    watch,
)

VARIANTS = int(os.environ.get("GPUGLASS_LEAK_VARIANTS", "6"))
Make = Callable[[random.Random], Behaviour]


def played(make: Make, variant: int, seeds: str = "") -> tuple[Behaviour, Seen]:
    rng = random.Random(f"{seeds}{make.__name__}{variant}")
    behaviour = make(rng)
    return behaviour, watch(behaviour, rng)


@pytest.mark.parametrize("make", LEAKING, ids=lambda make: make.__name__)
def test_a_leak_is_found_and_not_before_it_leaks(make: Make) -> None:
    for variant in range(VARIANTS):
        behaviour, seen = played(make, variant)
        assert seen.suspected, (variant, behaviour.leak / MIB)
        assert seen.suspected[0] > behaviour.leaks_from, variant


@pytest.mark.parametrize("make", HEALTHY, ids=lambda make: make.__name__)
def test_a_healthy_process_is_never_accused(make: Make) -> None:
    for variant in range(VARIANTS):
        _, seen = played(make, variant)
        assert not seen.suspected, (variant, seen.first)


@pytest.mark.parametrize("seeds", ["", "second-"], ids=["first", "second"])
def test_1_gib_per_hour_is_found_within_a_quarter_of_an_hour(seeds: str) -> None:
    for variant in range(24):
        behaviour, seen = played(leak_of_1_gib_per_hour, variant, seeds)
        assert seen.suspected[0] - behaviour.leaks_from <= 15 * MINUTE, variant


@pytest.mark.parametrize(
    ("make", "variant"),
    [
        (slow_warm_up, 6),  # its last floors held something temporary, and the curve looked straight once
        (fragmentation, 2),
        (growth_like_a_logarithm, 0),
        (growth_like_a_logarithm, 7),
        (memory_that_follows_the_load, 6),  # it quickens with the load, slowly
    ],
    ids=lambda what: getattr(what, "__name__", str(what)),
)
def test_what_looked_like_a_leak_for_a_minute_is_not_accused(make: Make, variant: int) -> None:
    _, seen = played(make, variant, "second-")
    assert not seen.suspected, seen.first


def test_a_slope_is_measured_and_its_beginning_found() -> None:
    for variant in range(VARIANTS):
        behaviour, seen = played(leak_of_1_gib_per_hour, variant)
        verdict = seen.last
        assert verdict is not None and verdict.trend is not None
        assert verdict.trend.slope * HOUR == pytest.approx(GIB, rel=0.2)
        assert verdict.trend.since == pytest.approx(behaviour.leaks_from, abs=5 * MINUTE)
        assert 0.5 <= verdict.confidence <= 1


def test_a_leak_that_stops_or_is_freed_is_taken_back() -> None:
    base, warm = load(random.Random(1))
    leak = steady(random.Random(1), GIB, warm + HOUR)
    ends = warm + 2 * HOUR
    stopped = watch(Behaviour(lambda t: base(t) + leak(min(t, ends)), hours=6), random.Random(2))
    freed = watch(Behaviour(lambda t: base(t) + (leak(t) if t < ends else 0.0), hours=6), random.Random(2))
    for seen in (stopped, freed):
        assert len(seen.suspected) == 1
        assert seen.last is not None and seen.last.state is State.HEALTHY


def test_while_nothing_can_be_told_it_says_unknown_and_not_healthy() -> None:
    fast = 20 * GIB / HOUR
    base, warm = load(random.Random(1))
    rising = Behaviour(lambda t: base(t) + fast * max(0.0, t - warm - HOUR), hours=warm / HOUR + 1.4)
    seen = watch(rising, random.Random(2))
    assert not seen.suspected
    assert seen.last is not None and seen.last.state is State.UNKNOWN
    assert seen.last.why in ("fast", "slowing")
