"""The device's times on the host's clock: errors that are true, clocks that drift."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gpuglass_vllm.gpu_anchor import INTERVAL_NS, Anchors

SECOND = 1_000_000_000


@dataclass
class World:
    """A host's clock, and a device whose clock runs `drift` faster and is asked with some delay."""

    host: float = 5000.0 * SECOND
    drift: float = 0.0
    delay_ns: float = 10_000.0
    """Of the device, from being asked until it is there; the answer takes as long."""

    def now(self) -> int:
        return int(self.host)

    def device_ms(self) -> float:
        return self.host * (1.0 + self.drift) / 1e6

    def event(self) -> Event:
        return Event(self)

    def pass_event(self, event: Event) -> None:
        self.host += self.delay_ns * 0.7
        event.record()
        self.host += self.delay_ns * 1.3


class Event:
    def __init__(self, world: World) -> None:
        self.world = world
        self.at_ms = 0.0
        self.true_ns = 0.0

    def record(self) -> None:
        self.at_ms = self.world.device_ms()
        self.true_ns = self.world.host

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


def anchors(world: World) -> Anchors:
    return Anchors(world.event, world.pass_event, world.now)


def step(world: World, seconds: float = 0.02) -> tuple[Event, Event]:
    begin, end = world.event(), world.event()
    begin.record()
    world.host += seconds * SECOND
    end.record()
    return begin, end


@pytest.mark.parametrize("drift", [0.0, 20e-6, -40e-6])
def test_a_step_lies_where_it_was_within_the_error_that_is_told(drift: float) -> None:
    world = World(drift=drift)
    found = anchors(world)
    for second in range(300):
        found.refresh()
        begin, end = step(world)
        begin_ns, end_ns, error = found.place(begin, end)
        assert abs(end_ns - end.true_ns) <= error, second
        assert end_ns - begin_ns == pytest.approx(0.02 * SECOND, rel=1e-4)
        world.host += SECOND


def test_the_drift_is_learnt() -> None:
    world = World(drift=30e-6)
    found = anchors(world)
    found.refresh()
    world.host += INTERVAL_NS - SECOND
    _, _, before = found.place(*step(world))
    for _ in range(3):
        world.host += INTERVAL_NS
        found.refresh()
    world.host += INTERVAL_NS - SECOND
    begin, end = step(world)
    _, end_ns, after = found.place(begin, end)
    assert before > SECOND // 1000 and after < before / 10
    assert abs(end_ns - end.true_ns) <= after


def test_the_anchor_with_the_least_error_is_taken() -> None:
    world = World()
    delays = iter([5_000_000.0, 8_000.0, 5_000_000.0, 5_000_000.0, 5_000_000.0])

    def pass_event(event: Event) -> None:
        world.delay_ns = next(delays)
        world.pass_event(event)

    found = Anchors(world.event, pass_event, world.now)
    found.refresh()
    begin, end = step(world)
    assert found.place(begin, end)[2] < 100_000


def test_a_minute_passes_between_two_anchors() -> None:
    world = World()
    taken = []
    found = Anchors(world.event, lambda event: taken.append(world.pass_event(event)), world.now)
    found.refresh()
    first = len(taken)
    world.host += INTERVAL_NS / 2
    found.refresh()
    assert len(taken) == first
    world.host += INTERVAL_NS
    found.refresh()
    assert len(taken) == 2 * first


def test_before_the_first_anchor_nothing_is_known() -> None:
    world = World()
    assert anchors(world).place(*step(world)) == (0, 0, 0)


def test_a_host_that_was_suspended_teaches_no_rate() -> None:
    world = World()
    found = anchors(world)
    found.refresh()
    begin = world.device_ms
    world.host += INTERVAL_NS
    ahead = 30_000.0
    world.device_ms = lambda: begin() + ahead  # type: ignore[method-assign]
    found.refresh()
    _, end = pair = step(world)
    _, end_ns, error = found.place(*pair)
    assert abs(end_ns - end.true_ns) <= error
