"""Scripted behaviours of memory, load and engines, for detectors: healthy and ill, randomised by seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GIB = float(1 << 30)
HOUR, DAY = 3600.0, 86400.0
START = 1_800_000_000.0 - 1_800_000_000.0 % (7 * DAY) + 4 * DAY
"""A midnight in UTC; a Monday."""


def flat_pools(rng: np.random.Generator, rows: int, seconds: float, step: float) -> Floats:
    """(rows, samples) of a pool of 70 GiB: noise of 20 MiB, and a step of 0.25 to 0.5 GiB up or down
    about once a day (a graph that is captured, an adapter that is loaded)."""
    shape = (rows, int(seconds / step))
    steps = (rng.random(shape) < step / DAY) * rng.choice([-1.0, 1.0], shape) * rng.uniform(0.25, 0.5, shape)
    return 70 * GIB + rng.normal(0, 20 * 2.0**20, shape) + GIB * np.cumsum(steps, axis=1)


def swapping_pods(rng: np.random.Generator, rows: int, seconds: float, step: float) -> Floats:
    """(rows, samples) of pods that load and drop models all day: jumps of many GiB around a base that
    also moves now and then."""
    count = int(seconds / step)
    used = np.zeros((rows, count))
    for row in range(rows):
        base, models = rng.uniform(3, 15), rng.uniform(2, 30, rng.integers(2, 6))
        stay, idle = rng.choice([3, 10, 40, 120]) * 60 / step, rng.uniform(0.2, 0.7)
        at = 0
        while at < count:
            length = max(1, int(rng.exponential(stay)))
            loaded = 0.0 if rng.random() < idle else rng.choice(models) + rng.normal(0, 0.5)
            used[row, at : at + length] = base + loaded
            at += length
            if rng.random() < 0.01:
                base = max(2.0, base + rng.normal(0, 2))
    return GIB * (used + rng.normal(0, 0.02, used.shape))


def leaking(used: Floats, step: float, begin: int, per_hour: float) -> Floats:
    """The same with a leak of `per_hour` bytes from sample `begin` on."""
    grown = np.maximum(np.arange(used.shape[1]) - begin, 0) * per_hour * step / HOUR
    return used + grown


def day_course(times: Floats) -> Floats:
    """A smooth course of the day around 1."""
    phase = 2 * np.pi * times / DAY
    return 1 + 0.5 * np.sin(phase) + 0.15 * np.sin(2 * phase + 1)
