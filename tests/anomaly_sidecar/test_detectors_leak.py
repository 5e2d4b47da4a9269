"""Memory leaks: found in time on flat and on noisy memory; what only looks like one is none."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_sidecar.detectors.leak import Leaks
from tests.anomaly_sidecar.scripted import GIB, HOUR, START, Floats, flat_pools, leaking, swapping_pods

MINIMUM = 0.2 * GIB


def watch(used: Floats, step: float, **roles: Floats) -> tuple[Floats, Leaks]:
    """Seconds until the first verdict of each row, infinite without one, and the detector at the end."""
    leaks = Leaks.empty(len(used), MINIMUM)
    first = np.full(len(used), np.inf)
    for sample in range(used.shape[1]):
        at = {name: values[:, sample] for name, values in roles.items()}
        leaks.observe(START + sample * step, used[:, sample], **at)
        new = leaks.leaking & np.isinf(first)
        first[new] = sample * step
    return first, leaks


@pytest.mark.parametrize("seed", range(3))
def test_a_leak_on_a_flat_pool_is_found_within_40_minutes_and_its_rate_is_told(seed: int) -> None:
    rng = np.random.default_rng(seed)
    begin = 240 + int(rng.integers(0, 60))
    used = leaking(flat_pools(rng, 100, 6 * HOUR, 60.0), 60.0, begin, GIB)
    first, leaks = watch(used, 60.0)
    assert np.mean(first - begin * 60.0 <= 40 * 60.0) >= 0.95
    assert (first >= begin * 60.0).mean() >= 0.97
    assert np.nanmedian(leaks.rate) == pytest.approx(GIB, rel=0.1)


@pytest.mark.parametrize("seed", range(2))
def test_flat_pools_with_steps_are_no_leak(seed: int) -> None:
    first, _ = watch(flat_pools(np.random.default_rng(seed), 200, 24 * HOUR, 60.0), 60.0)
    assert np.isfinite(first).mean() <= 0.03


def test_pods_that_swap_models_are_no_leak_and_a_leak_of_theirs_is_found_within_six_hours() -> None:
    rng = np.random.default_rng(4)
    used = swapping_pods(rng, 200, 20 * HOUR, 60.0)
    first, _ = watch(used, 60.0)
    assert np.isfinite(first).mean() <= 0.05
    found, _ = watch(leaking(used, 60.0, 720, GIB), 60.0)
    assert np.mean(found - 720 * 60.0 <= 6 * HOUR) >= 0.9


def cache_that_fills(rng: np.random.Generator, rows: int) -> Floats:
    """Grows fast at first and ever slower, as an allocator's cache does; 4 hours of minutes."""
    minutes = np.arange(240)
    size, speed = rng.uniform(2, 10, (rows, 1)), rng.uniform(10, 25, (rows, 1))
    return GIB * (20 + size * (1 - np.exp(-minutes / speed))) + rng.normal(0, 2e7, (rows, 240))


def test_a_pool_that_fills_its_cache_is_no_leak() -> None:
    first, _ = watch(cache_that_fills(np.random.default_rng(1), 100), 60.0)
    assert np.isfinite(first).mean() <= 0.05


def test_growth_of_the_kv_cache_is_no_leak_where_the_cache_is_known() -> None:
    rng = np.random.default_rng(2)
    kv = np.cumsum(rng.uniform(0, 0.05 * GIB, (20, 240)), axis=1)
    used = 20 * GIB + kv + rng.normal(0, 2e7, kv.shape)
    assert np.isinf(watch(used, 60.0, kv=kv)[0]).all()
    assert np.isfinite(watch(used, 60.0)[0]).all(), "without the KV cache nobody can know"


def test_growth_that_follows_the_load_is_no_leak_and_growth_at_equal_load_is() -> None:
    rng = np.random.default_rng(3)
    used = leaking(20 * GIB + rng.normal(0, 2e7, (20, 240)), 60.0, 0, GIB)
    rising = 1.0 + np.tile(np.arange(240) / 20.0, (20, 1))
    assert np.isinf(watch(used, 60.0, load=rising)[0]).mean() > 0.9
    assert np.isfinite(watch(used, 60.0, load=np.full(used.shape, 5.0))[0]).all()


def test_a_restart_ends_the_verdict_is_counted_and_the_search_begins_anew() -> None:
    rng = np.random.default_rng(5)
    used = leaking(20 * GIB + rng.normal(0, 2e7, (4, 120)), 60.0, 0, 2 * GIB)
    leaks = Leaks.empty(4, MINIMUM)
    for sample in range(120):
        leaks.observe(START + sample * 60.0, used[:, sample], started=np.full(4, START))
    assert leaks.leaking.all()
    after = START + 120 * 60.0
    leaks.observe(after, np.full(4, 20 * GIB), started=np.array([after, START, np.nan, after]))
    assert leaks.leaking.tolist() == [False, True, True, False]
    assert leaks.restarts.tolist() == [1, 0, 0, 1]
    for sample in range(20):
        level = 20 * GIB + sample * GIB / 30
        leaks.observe(after + 60.0 * (1 + sample), np.full(4, level), started=np.full(4, after))
    assert not leaks.leaking[0], "20 minutes after a restart are too few"


def test_a_gap_is_no_evidence_and_stale_verdicts_end() -> None:
    leaks = Leaks.empty(1, MINIMUM)
    for sample in range(120):
        gap = sample % 3 == 0
        leaks.observe(START + sample * 60.0, np.array([np.nan if gap else 20 * GIB + sample * GIB / 60]))
    assert leaks.leaking.all(), "two of three samples are enough for floors"
    leaks.observe(START + 10 * HOUR, np.array([np.nan]))
    assert not leaks.leaking.any()
    assert np.isnan(leaks.rate).all()
