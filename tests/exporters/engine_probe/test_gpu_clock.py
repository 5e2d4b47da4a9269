"""The clock on a device that runs behind the host: order, idleness, lag, failures."""

from __future__ import annotations

from itertools import pairwise

import pytest

from gpuglass_vllm import gpu_clock
from gpuglass_vllm.gpu_clock import EventClock, WallClock


class Device:
    """A stream with a clock of its own; events are passed when the device gets there."""

    def __init__(self) -> None:
        self.queued = 0.0
        """When what is queued will be done, in ms."""
        self.now = 0.0
        self.events = 0

    def work(self, ms: float) -> None:
        self.queued = max(self.queued, self.now) + ms

    def event(self) -> Event:
        self.events += 1
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at: float | None = None

    def record(self) -> None:
        self.at = max(self.device.queued, self.device.now)
        self.device.queued = self.at

    def query(self) -> bool:
        return self.at is not None and self.device.now >= self.at

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query(), "asked before the device was there"
        assert self.at is not None and end.at is not None
        return end.at - self.at


class Seen:
    def __init__(self) -> None:
        self.steps: list[tuple[str, float, float, float]] = []

    def __call__(self, tag: str, busy: float, idle: float, unknown: float) -> None:
        self.steps.append((tag, round(busy / 1e6, 6), round(idle / 1e6, 6), round(unknown / 1e6, 6)))


def run(clock: EventClock[str], device: Device, tag: str, prepare: float, forward: float) -> bool:
    timed = clock.begin(tag)
    device.work(prepare)
    clock.forward()
    device.work(forward)
    clock.pause()
    clock.resume()
    device.work(0.5)
    clock.end()
    return timed


def test_a_host_that_is_ahead_leaves_no_idleness() -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    for tag in "abc":
        run(clock, device, tag, 0.25, 3)
    clock.poll(seen)
    assert seen.steps == []
    device.now = 4.0
    clock.poll(seen)
    assert seen.steps == [("a", 3.5, 0, 0)], "before the first step nothing is known"
    device.now = 100
    clock.poll(seen)
    assert [step[0] for step in seen.steps] == ["a", "b", "c"]
    assert seen.steps[1:] == [("b", 3.75, 0, 0), ("c", 3.75, 0, 0)]


def test_waiting_for_the_host_is_idleness() -> None:
    """Between two steps, and within one while the batch is prepared."""
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    run(clock, device, "a", 0.25, 3)
    device.now = 10
    clock.begin("b")
    device.now = 12
    clock.forward()
    device.work(3)
    clock.pause()
    clock.end()
    device.now = 20
    clock.poll(seen)
    assert seen.steps[1][0] == "b"
    assert seen.steps[1][1] == 3
    assert seen.steps[1][2] == pytest.approx((10 - 3.75) + 2)


def test_a_device_that_runs_dry_while_the_batch_is_prepared_is_idle() -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    run(clock, device, "a", 0.25, 3)
    device.now = 3
    clock.begin("b")
    device.now = 5
    clock.forward()
    device.work(3)
    clock.end()
    device.now = 20
    clock.poll(seen)
    assert seen.steps[1] == ("b", 3, 5 - 3.75, 0)


def test_a_device_that_is_behind_costs_one_event_per_step() -> None:
    device, seen = Device(), Seen()
    recorded: list[Event] = []

    def record(event: Event) -> None:
        recorded.append(event)
        event.record()

    clock = EventClock[str](device.event, record)
    for number in range(10):
        run(clock, device, str(number), 0.25, 3)
    assert len(recorded) == 10 + 2, "the first one had a begin, recorded again before its forward pass"
    device.now = 1000
    while clock.poll(seen):
        pass
    assert sum(busy for _, busy, _, _ in seen.steps) == pytest.approx(3.5 + 9 * 3.75)


def test_with_a_graph_to_come_nothing_is_asked_before_it() -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    run(clock, device, "a", 0, 3)
    device.now = 10
    clock.begin("b", graph=True)
    device.now = 12
    clock.forward()
    device.work(3)
    clock.end()
    clock.begin("c", graph=True)
    clock.forward()
    device.work(2)
    clock.end()
    device.now = 30
    clock.begin("no graph came", graph=True)
    device.work(1)
    clock.end()
    device.now = 40
    clock.poll(seen)
    assert seen.steps[1:] == [("b", 3, 12 - 3.5, 0), ("c", 2, 0, 0), ("no graph came", 0, 0, 31 - 17)]


@pytest.mark.parametrize("passed", range(41))
@pytest.mark.parametrize("limit", [1, 8, 100])
def test_what_the_device_has_passed_is_delivered_and_no_more(passed: int, limit: int) -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    for number in range(40):
        run(clock, device, str(number), 0, 0.5)
    device.now = float(passed)
    total = 0
    while found := clock.poll(seen, limit):
        assert found <= limit
        total += found
    assert total == passed
    assert [tag for tag, _, _, _ in seen.steps] == [str(number) for number in range(passed)]


def test_what_has_no_time_is_delivered_in_its_turn() -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event, limit=5)
    assert clock.note("first")
    run(clock, device, "a", 0, 3)
    assert clock.note("between") and clock.note("too")
    run(clock, device, "b", 0, 3)
    assert not clock.note("no room")
    clock.poll(seen)
    assert [step[0] for step in seen.steps] == ["first"]
    device.now = 4
    while clock.poll(seen, 1):
        pass
    assert [step[0] for step in seen.steps] == ["first", "a", "between", "too"]
    device.now = 10
    clock.poll(seen)
    assert seen.steps[1:] == [("a", 3.5, 0, 0), ("between", 0, 0, 0), ("too", 0, 0, 0), ("b", 3.5, 0, 0)]


def test_only_the_first_graph_of_a_step_marks_its_forward_pass() -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    clock.begin("a")
    device.now = 1
    for _ in range(3):
        clock.forward()
        device.work(2)
    clock.end()
    device.now = 50
    clock.poll(seen)
    assert seen.steps == [("a", 6, 0, 0)]


def test_a_device_that_hangs_costs_no_memory() -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event, limit=4)
    timed = [run(clock, device, str(number), 0, 1) for number in range(100)]
    assert timed == [True] * 4 + [False] * 96
    assert len(clock) == 4 and clock.untimed == 96
    events = device.events
    device.now = 1000
    run_again = run(clock, device, "late", 0, 1)
    assert not run_again
    assert clock.poll(seen, 100) == 4
    assert run(clock, device, "next", 0, 1)
    device.now = 2000
    clock.poll(seen)
    tag, busy, idle, unknown = seen.steps[-1]
    assert (tag, busy) == ("next", 1.5)
    assert idle == 0 and unknown > 0, "time of steps that were not timed belongs to nobody"
    assert device.events == events


def test_events_are_used_again() -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    for number in range(200):
        run(clock, device, str(number), 0.25, 1)
        device.now = device.queued
        clock.poll(seen)
    assert len(seen.steps) == 200
    assert device.events < 20


def test_a_failed_step_is_not_timed() -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    run(clock, device, "a", 0, 1)
    clock.begin("broken")
    clock.forward()
    clock.pause()
    clock.cancel()
    run(clock, device, "b", 0, 1)
    device.now = 100
    clock.poll(seen)
    assert [step[0] for step in seen.steps] == ["a", "b"]


def test_a_step_without_sampling_ends_with_its_forward_pass() -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    for tag in "ab":
        clock.begin(tag)
        device.work(2)
        clock.pause()
    clock.end()
    device.now = 100
    clock.poll(seen)
    assert [(tag, busy) for tag, busy, _, _ in seen.steps] == [("a", 2), ("b", 2)]


def test_events_that_cannot_be_had_are_told_at_once() -> None:
    def broken() -> Event:
        raise RuntimeError("no CUDA")

    with pytest.raises(RuntimeError, match="no CUDA"):
        EventClock[str](broken)


def test_the_hosts_clock_counts_what_lies_between_as_idle() -> None:
    now = [1_000_000_000]
    seen = Seen()
    clock = WallClock[str](lambda: now[0])

    def later(ms: float) -> None:
        now[0] += int(ms * 1e6)

    for tag in "ab":
        clock.begin(tag)
        later(5)
        clock.pause()
        later(1)
        clock.resume()
        later(2)
        clock.end()
        later(10)
    clock.poll(seen)
    assert seen.steps == [("a", 7, 1, 0), ("b", 7, 11, 0)]


def test_while_a_step_is_delivered_its_events_are_its_own() -> None:
    device = Device()
    clock: EventClock[str] = EventClock(device.event)
    found: list[tuple[str, float, float, float]] = []

    def deliver(tag: str, busy: float, idle: float, unknown: float) -> None:
        assert clock.span is not None
        begin, end, _ = clock.span
        pool = clock._pool
        assert begin not in pool and end not in pool, "the other thread could record them anew"
        found.append((tag, begin.at, end.at, busy / 1e6))  # type: ignore[attr-defined]

    for tag in ("a", "b", "c"):
        run(clock, device, tag, 1, 5)
    device.now = device.queued
    device.now += 3
    run(clock, device, "d", 1, 5)
    device.now = device.queued
    clock.poll(deliver, 100)
    assert [tag for tag, *_ in found] == ["a", "b", "c", "d"]
    assert [end - begin for _, begin, end, _ in found] == pytest.approx([busy for *_, busy in found])
    assert all(later[1] >= earlier[2] for earlier, later in pairwise(found))
    assert clock.span is None


def paced(
    clock: EventClock[str], device: Device, host_ms: float, work_ms: float, launch_ms: float = 0
) -> None:
    """A step whose forward pass is one graph."""
    device.now += host_ms
    clock.begin("s", graph=True)
    clock.forward(int(device.now * 1e6))
    device.now += launch_ms
    clock.launched()
    device.work(work_ms)
    clock.end()


def test_a_device_that_stays_behind_is_asked_now_and_then() -> None:
    """The host is ahead by some steps and keeps its pace: one step in four is looked at."""
    device = Device()
    asked = [0]

    def query(event: Event) -> bool:
        asked[0] += 1
        return event.query()

    clock = EventClock[str](device.event, query=query)
    device.work(50)
    for _ in range(40):
        paced(clock, device, 1, 1)
    assert asked[0] == pytest.approx(4 + 36 / 4, abs=1)


def test_a_host_that_slows_down_is_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step in which the device waits for the host is never one that is passed over."""
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    monkeypatch.setattr(gpu_clock.time, "monotonic_ns", lambda: int(device.now * 1e6))
    device.work(3)
    for _ in range(21):
        paced(clock, device, 1, 1)
    paced(clock, device, 9, 1)
    device.now += 20
    while clock.poll(seen):
        pass
    assert [idle for _, _, idle, _ in seen.steps if idle] == [pytest.approx(5, abs=1.01)]
    assert sum(busy for _, busy, _, _ in seen.steps[1:]) == pytest.approx(21)


def test_what_the_launch_takes_while_the_device_waits_is_idleness(monkeypatch: pytest.MonkeyPatch) -> None:
    device, seen = Device(), Seen()
    clock = EventClock[str](device.event)
    monkeypatch.setattr(gpu_clock.time, "monotonic_ns", lambda: int(device.now * 1e6))
    for _ in range(3):
        paced(clock, device, 10, 4, launch_ms=0.5)
    device.now += 20
    while clock.poll(seen):
        pass
    assert [busy for _, busy, _, _ in seen.steps][1:] == [4, 4], "of the first step nothing is known"
    assert [idle for _, _, idle, _ in seen.steps][1:] == [6.5, 6.5]
