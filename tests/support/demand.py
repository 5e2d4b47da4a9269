"""Made demand curves for forecasts: what they like, what changes on the way, and what nobody can forecast.

In: a seed, days and a step; out: one series per kind of load, around 1,000 in some unit. The seeds that the
gate of the forecasts was chosen with are 1 to 3; measure with others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DAY = 86400.0


class _Maker:
    """Pieces of which loads are made; `cells` of `step` seconds."""

    def __init__(self, seed: int, days: float, step: float) -> None:
        self.random = np.random.default_rng(seed)
        self.cells = round(days * DAY / step)
        self.times = np.arange(self.cells) * step
        self.phase = 2 * np.pi * self.times / DAY + self.random.uniform(0, 2 * np.pi)
        self.weekend = self.times // DAY % 7 >= 5
        change = int(self.cells * self.random.uniform(0.55, 0.8))
        self.after = np.arange(self.cells) >= change

    def course(self, shift: float = 0.0) -> Floats:
        """A course of the day with two waves."""
        waves: Floats = 0.5 * np.sin(self.phase + shift) + 0.2 * np.sin(2 * self.phase + 1 + shift)
        return 1000 * (1 + waves)

    def any_course(self) -> Floats:
        """A course of the day of random shape."""
        parts = self.random.normal(0, 1, 6) / np.array([1, 1, 2, 2, 3, 3])
        parts *= 0.5 / np.abs(parts).sum() ** 0.5
        waves = [np.sin(k * self.phase) for k in (1, 2, 3)] + [np.cos(k * self.phase) for k in (1, 2, 3)]
        course: Floats = 1000 * np.exp(parts @ np.array([waves[k] for k in (0, 3, 1, 4, 2, 5)]))
        return course

    def noise(self, size: float) -> Floats:
        """Factors around 1."""
        noise: Floats = self.random.lognormal(0, size, self.cells)
        return noise

    def walk(self, size: float) -> Floats:
        """Sums of steps that know nothing of each other."""
        walk: Floats = np.cumsum(self.random.normal(0, size, self.cells))
        return walk

    def levels(self, each: float, size: float) -> Floats:
        """Levels that hold until the next jump, which is as likely in each cell."""
        jumps = (self.random.random(self.cells) < each) * self.random.normal(0, size, self.cells)
        levels: Floats = 1000 * np.exp(np.clip(np.cumsum(jumps), -2, 2))
        return levels

    def kicks(self, each: float, kick: Callable[[int], Floats], decay: Floats) -> Floats:
        """Events that fade away as `decay` does."""
        events = (self.random.random(self.cells) < each) * kick(self.cells)
        kicks: Floats = np.convolve(events, decay)[: self.cells]
        return kicks

    def daily(self, values: Floats) -> Floats:
        """One value for each day."""
        return np.repeat(values, -(-self.cells // len(values)))[: self.cells]

    def tempered(self, size: float, stays: float) -> Floats:
        """A walk that is drawn back to 0."""
        values = np.zeros(self.cells)
        steps = self.random.normal(0, size, self.cells)
        for index in range(1, self.cells):
            values[index] = stays * values[index - 1] + steps[index]
        return values

    def regimes(self, parts: list[Floats], changes: list[int]) -> Floats:
        """One part after the other, from the first when there are no more."""
        made = np.empty(self.cells)
        for number, (start, end) in enumerate(zip([0, *changes], [*changes, self.cells], strict=True)):
            made[start:end] = parts[number % len(parts)][start:end]
        return made


def loads(seed: int, days: float = 14.0, step: float = 600.0) -> dict[str, Floats]:
    """Loads that change once at most, after something over half of the time, and those without a pattern."""
    m = _Maker(seed, days, step)
    r, after = m.random, m.after
    fading, flat = np.exp(-np.arange(20) / 5), np.full(m.cells, 1000.0)
    busy = np.where(np.cumsum(r.random(m.cells) < 1 / 20) % 2, 1.0, 0.3)
    change = int(after.argmax())
    return {
        "course_of_day": m.course() * m.noise(0.1),
        "other_weekends": m.course() * np.where(m.weekend, 0.4, 1.0) * m.noise(0.05),
        "few_requests": r.poisson(3 * (1 + 0.8 * np.sin(m.phase))).astype(np.float64),
        "growth": m.course() * np.exp(1.5 * np.arange(m.cells) / m.cells) * m.noise(0.04),
        "drift": (1000 + 0.6 * np.arange(m.cells)) * m.noise(0.03),
        "regime_other_course": np.where(after, 1000 + 480 * np.sign(np.sin(3 * m.phase)), m.course())
        * m.noise(0.06),
        "regime_level_x3": m.course() * np.where(after, 3.0, 1.0) * m.noise(0.05),
        "regime_level_third": m.course() * np.where(after, 0.3, 1.0) * m.noise(0.05),
        "regime_amplitude": 1000 * (1 + np.where(after, 0.8, 0.2) * np.sin(m.phase)) * m.noise(0.05),
        "pattern_vanishes": np.where(after, flat, m.course()) * m.noise(0.08),
        "pattern_vanishes_quiet": np.where(after, flat, m.course()) * m.noise(0.02),
        "pattern_becomes_walk": np.abs(
            np.where(after, m.course()[change] + m.walk(25) * after, m.course() * m.noise(0.03))
        ),
        "pattern_appears": np.where(after, m.course(), flat) * m.noise(0.05),
        "phase_jump_12h": 1000 * (1 + 0.5 * np.sin(m.phase + np.pi * after)) * m.noise(0.03),
        "phase_jump_6h": np.where(after, m.course(np.pi / 2), m.course()) * m.noise(0.03),
        "phase_jump_1h": np.where(after, m.course(np.pi / 12), m.course()) * m.noise(0.03),
        "phase_differs_daily": 1000
        * (1 + 0.5 * np.sin(m.phase + m.daily(r.normal(0, 0.5, round(days)))))
        * m.noise(0.03),
        "weekend_shape": np.where(m.weekend, 600 * (1 + 0.4 * np.sin(m.phase + 2.5)), m.course())
        * m.noise(0.05),
        "weekend_changes": m.course() * np.where(m.weekend, np.where(after, 1.3, 0.4), 1.0) * m.noise(0.05),
        "days_on_and_off": m.course()
        * m.daily(np.where(r.random(round(days)) < 0.5, 1.0, 0.2))
        * m.noise(0.05),
        "bursts_on_course": m.course() * np.exp(m.kicks(0.02, lambda n: r.normal(0, 1, n), fading)),
        "bursts_only": 300
        * np.exp(m.kicks(0.02, lambda n: np.abs(r.normal(0, 1.5, n)), fading))
        * m.noise(0.05),
        "constant": flat.copy(),
        "constant_with_noise": 1000 * m.noise(0.03),
        "random_walk": np.abs(1000 + m.walk(30)),
        "random_walk_of_logarithms": 1000 * np.exp(0.014 * m.walk(1)),
        "course_and_walk": np.abs(m.course() + m.walk(40) + 500),
        "tempered_walk": np.abs(1000 + m.tempered(40, 0.99)),
        "tempered_walk_fast": np.abs(1000 + m.tempered(80, 0.8)),
        "on_and_off": 1000 * busy * m.noise(0.05),
        "on_and_off_on_course": m.course() * busy * m.noise(0.03),
        "period_of_5_hours": 1000 * (1 + 0.5 * np.sign(np.sin(2 * np.pi * m.times / 18000))) * m.noise(0.05),
        "outliers": m.course() * np.exp(0.15 * np.clip(r.standard_t(2.5, m.cells), -12, 12)),
    }


def abrupt_loads(seed: int, days: float = 14.0, step: float = 600.0) -> dict[str, Floats]:
    """What is hardest: a pattern that gives way, just when it begins to count, to what nothing but
    persistence follows; several changes; rare events."""
    m = _Maker(seed, days, step)
    r, day = m.random, round(DAY / step)
    half = int(m.cells / 2 + r.integers(0, day))
    made = {}
    for name, place in (("half", half), ("late", half + 3 * day)):
        walk, trend = m.walk(30), 3.0 * (np.arange(m.cells) - place)
        parts = {
            "course_to_walk": [m.any_course() * m.noise(0.02), 1000 + walk - walk[place]],
            "course_to_levels": [m.any_course() * m.noise(0.02), m.levels(0.02, 0.5)],
            "course_to_other": [m.any_course() * m.noise(0.02), m.any_course() * m.noise(0.02)],
            "course_to_constant": [m.any_course() * m.noise(0.03), np.full(m.cells, 600.0)],
            "walk_to_course": [1000 + m.walk(20), m.any_course() * m.noise(0.02)],
            "noise_to_walk": [1000 * m.noise(0.05), 1000 + walk - walk[place]],
            "noise_to_levels": [1000 * m.noise(0.05), m.levels(0.02, 0.5)],
            "noise_to_trend": [1000 * m.noise(0.03), 1000 + trend],
        }
        made.update({f"{key}_{name}": np.abs(m.regimes(part, [place])) for key, part in parts.items()})
    changes = sorted(r.choice(np.arange(4 * day, m.cells), 8, replace=False).tolist())
    kinds = [m.any_course() * m.noise(0.03), 1000 + m.walk(20), 1000 * m.noise(0.05), m.levels(0.02, 0.4)]
    return {
        **made,
        "regimes_4": np.abs(m.regimes(kinds, changes[::2])),
        "regimes_8": np.abs(m.regimes(kinds, changes)),
        "courses_8": m.regimes([m.any_course() * m.noise(0.03) for _ in range(9)], changes),
        "levels_rare": m.levels(0.005, 0.6) * m.noise(0.01),
        "levels_often": m.levels(0.05, 0.3) * m.noise(0.01),
        "spikes": 1000 * (1 + (r.random(m.cells) < 0.02) * r.uniform(1, 5, m.cells)) * m.noise(0.02),
        "bursts_rare": 300
        * np.exp(m.kicks(0.005, lambda n: np.abs(r.normal(0, 2, n)), np.exp(-np.arange(40) / 12)))
        * m.noise(0.03),
        "jobs": m.kicks(0.01, lambda n: r.uniform(200, 2000, n), np.ones(9)) + 50 * m.noise(0.1),
        "jobs_long": m.kicks(0.004, lambda n: r.uniform(200, 2000, n), np.ones(40)) + 50 * m.noise(0.1),
        "ramp_and_reset": np.arange(m.cells) * 7.0 % 1000 + 100 * m.noise(0.05),
    }
