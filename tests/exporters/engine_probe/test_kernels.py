"""Profiled steps: how often, at what cost, and what is told of them. The profiler is a stand-in here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuglass_vllm import worker
from gpuglass_vllm.gpu_clock import WallClock
from gpuglass_vllm.kernels import (
    BUDGET,
    SHOWN,
    SWITCH_NS,
    Kernel,
    KernelSampler,
    TooSlow,
    device_time,
    summary,
)
from gpuglass_vllm.records import StepKernels, StepSample
from gpuglass_vllm.worker import KERNELS, STEPS, Probe, WorkerSource

from .test_attribution import new, output
from .test_worker import probe, step

__all__ = ["probe"]

SECOND = 1_000_000_000
KERNELS_OF_A_STEP = [Kernel(f"k{n}", 7, 1000 + n, 100 - n) for n in range(20)]


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


class Profiler:
    """Takes `cost` of the clock's time to start and to stop."""

    def __init__(self, clock: Clock, cost: int = 2_000_000) -> None:
        self.clock, self.cost = clock, cost
        self.running = False
        self.runs = 0
        self.error: Exception | None = None

    def start(self) -> None:
        assert not self.running
        if self.error is not None:
            raise self.error
        self.running = True
        self.runs += 1
        self.clock.ns += self.cost

    def stop(self) -> Callable[[], list[Kernel]]:
        assert self.running
        self.running = False
        self.clock.ns += self.cost
        return lambda: KERNELS_OF_A_STEP


def run(sampler: KernelSampler, clock: Clock, seconds: float) -> int:
    """Steps of 10 ms; how many were profiled."""
    profiled, until, number = 0, clock.ns + int(seconds * SECOND), 0
    while clock.ns < until:
        number += 1
        due = sampler.due()
        if due:
            profiled += 1
            sampler.begin()
        clock.ns += 10_000_000
        if due:
            sampler.end(number)
            assert sampler.take() is not None
    return profiled


def test_at_most_one_step_in_the_interval_is_profiled() -> None:
    clock = Clock()
    assert run(KernelSampler(Profiler(clock), 10, clock), clock, 100) in (9, 10)


def test_a_profiler_that_takes_more_than_its_budget_is_used_less_often() -> None:
    clock = Clock()
    sampler = KernelSampler(Profiler(clock, cost=50_000_000), 10, clock)
    profiled = run(sampler, clock, 1000)
    assert 0 < profiled <= 10
    assert sampler.spent_ns == profiled * 100_000_000 <= 1.1 * BUDGET * clock.ns


def test_one_that_takes_far_too_long_says_so() -> None:
    clock = Clock()
    sampler = KernelSampler(Profiler(clock, cost=200_000_000), 10, clock)
    clock.ns = 20 * SECOND
    sampler.begin()
    with pytest.raises(TooSlow, match="400 ms"):
        sampler.end(1)


def test_the_next_step_waits_until_the_last_one_was_read() -> None:
    clock = Clock()
    sampler = KernelSampler(Profiler(clock), 10, clock)
    clock.ns = 20 * SECOND
    sampler.begin()
    sampler.end(1)
    clock.ns = 1000 * SECOND
    assert not sampler.due()
    assert sampler.take() is not None and sampler.take() is None
    assert sampler.due()


def test_a_step_that_fails_ends_the_profile() -> None:
    clock = Clock()
    profiler = Profiler(clock)
    sampler = KernelSampler(profiler, 10, clock)
    clock.ns = 20 * SECOND
    sampler.begin()
    sampler.cancel()
    sampler.end(1)
    assert not profiler.running and sampler.take() is None and not sampler.due()


def test_the_longest_are_told_and_the_others_are_summed() -> None:
    told = summary(7, KERNELS_OF_A_STEP, 5000, 20)
    assert told.step == 7 and told.names == [f"k{n}" for n in range(SHOWN)] and told.error_ns == 20
    assert told.duration_ns == sorted((k.duration_ns for k in KERNELS_OF_A_STEP), reverse=True)[:SHOWN]
    assert sum(told.device_ns) + told.other_ns == pytest.approx(sum(device_time(KERNELS_OF_A_STEP)), abs=20)
    assert told.others == 20 - SHOWN
    assert (told.begun_ns, told.ended_ns) == (
        1000,
        max(k.begin_ns + k.duration_ns for k in KERNELS_OF_A_STEP),
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 50_000), st.integers(1, 9_000)).map(lambda k: Kernel("k", 1, *k)),
        max_size=30,
    )
)
def test_kernels_divide_the_devices_time(kernels: list[Kernel]) -> None:
    """Their sum is the time in which some kernel ran, with short pauses closed; nobody has more than his own
    time and the pause before it."""
    had = device_time(kernels)
    busy, until = 0, None
    for begin, end in sorted((k.begin_ns, k.begin_ns + k.duration_ns) for k in kernels):
        if until is not None and begin - until <= SWITCH_NS:
            busy += max(0, end - until)
        else:
            busy += end - begin
        until = end if until is None else max(until, end)
    assert sum(had) == pytest.approx(busy)
    assert all(
        0 < share <= kernel.duration_ns + SWITCH_NS for share, kernel in zip(had, kernels, strict=True)
    )


def test_kernels_that_run_at_once_share() -> None:
    a, b = Kernel("a", 1, 0, 1000), Kernel("b", 2, 500, 1000)
    assert device_time([a, b]) == [750, 750]
    assert device_time([b, a]) == [750, 750]
    assert device_time([a, Kernel("c", 1, 1500, 100)]) == [1000, 600]
    assert device_time([a, Kernel("c", 1, 9000, 100)]) == [1000, 100]
    assert device_time([]) == []


@pytest.fixture
def profiled(probe: Probe) -> tuple[Probe, Profiler, Clock]:
    """A worker whose next step is due."""
    clock = Clock()
    profiler = Profiler(clock)
    KERNELS.state, KERNELS.errors = "unavailable", 0  # an earlier test may have switched it off
    KERNELS.activate()
    probe.kernels = KernelSampler(profiler, 10, clock)
    clock.ns = 20 * SECOND
    return probe, profiler, clock


def told(probe: Probe) -> list[StepSample | StepKernels]:
    assert probe.link is not None
    list(WorkerSource(probe).states(False))
    events = probe.link.events  # type: ignore[attr-defined]
    return [event for event in events if isinstance(event, StepSample | StepKernels)]


def test_a_profiled_step_is_told_before_its_kernels(profiled: tuple[Probe, Profiler, Clock]) -> None:
    probe, _, _ = profiled
    step(probe, output([new("a", 4)], {}, {"a": 4}))
    sample, kernels = told(probe)
    assert isinstance(sample, StepSample) and isinstance(kernels, StepKernels)
    assert sample.step == kernels.step == 1


def test_its_time_is_none_of_the_probes_own(profiled: tuple[Probe, Profiler, Clock]) -> None:
    probe, _, _ = profiled
    kernels, steps = KERNELS.ns, STEPS.ns
    step(probe, output([new("a", 4)], {}, {"a": 4}))
    took = KERNELS.ns - kernels
    assert took > 0 and STEPS.ns - steps == -took, "the methods are called here without their hook"
    assert worker.hooks.table.spent_ns("worker") == sum(
        hook.ns
        for hook in worker.hooks.table._hooks.values()
        if hook.role == "worker" and hook is not KERNELS
    )


def test_a_profiler_that_fails_leaves_the_step_alone(profiled: tuple[Probe, Profiler, Clock]) -> None:
    probe, profiler, clock = profiled
    profiler.error = RuntimeError("no CUPTI")
    for number in range(5):
        clock.ns += 1000 * SECOND
        step(
            probe, output([], {"a": 4 + number}, {"a": 1}) if number else output([new("a", 4)], {}, {"a": 4})
        )
    assert KERNELS.state == "disabled" and "no CUPTI" in KERNELS.reason
    assert probe.kernels is None
    assert STEPS.on and isinstance(probe.clock, WallClock)


def test_one_that_is_too_slow_is_switched_off_at_once(profiled: tuple[Probe, Profiler, Clock]) -> None:
    probe, profiler, _ = profiled
    profiler.cost = 200_000_000
    step(probe, output([new("a", 4)], {}, {"a": 4}))
    assert KERNELS.state == "unavailable" and "400 ms" in KERNELS.reason and probe.kernels is None
