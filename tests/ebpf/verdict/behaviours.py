"""How processes use CUDA memory: scripted behaviours, leaking and healthy, each with any number of variants.

A behaviour is made from a random generator, which draws its sizes, rates and times. `watch` plays one in
simulated time through the verdict code, with jitter of the reports, missed reports, calls that the tracer
lost, noise of what is allocated for a moment.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ebpf.verdict.leak import State, Verdict
from ebpf.verdict.process import Processes
from gpuglass_vllm.records import CudaMemory, CudaOwner, CudaProcess

MIB, GIB = 1 << 20, 1 << 30
MINUTE, HOUR = 60.0, 3600.0
INTERVAL = 15.0
Level = Callable[[float], float]
"""Bytes, or requests so far, at a time in seconds since the process started."""


@dataclass
class Behaviour:
    """One process."""

    live: Level
    kind: str = "device"
    requests: Level | None = None
    """Requests served so far; None: nobody tells."""
    leak: float = 0.0
    """Bytes per hour that are lost; 0: it is healthy."""
    leaks_from: float = 0.0
    hours: float = 6.0
    granule: int = 2 * MIB
    """Sizes are multiples of it: a segment of the caching allocator."""
    spikes: float = 64 * MIB
    """Largest size of what is allocated for a moment."""
    restarts: list[float] = field(default_factory=list)
    """Times at which the process begins anew."""


@dataclass
class Seen:
    """What the verdict code said over time."""

    suspected: list[float] = field(default_factory=list)
    """When a suspicion began."""
    states: set[State] = field(default_factory=set)
    last: Verdict | None = None
    first: Verdict | None = None
    """The verdict when the first suspicion began."""


def watch(behaviour: Behaviour, rng: random.Random, missing: float = 0.1, lost: float = 0.02) -> Seen:
    """Play one behaviour."""
    processes, seen = Processes(), Seen()
    at, lost_calls, allocations, allocated, before, start = rng.uniform(0, INTERVAL), 0, 0, 0, 0, 0
    was = False
    silent_until = -1.0
    while at < behaviour.hours * HOUR:
        at += INTERVAL + rng.uniform(-1.5, 1.5)
        if rng.random() < missing or at < silent_until:
            continue
        if rng.random() < 0.002:
            silent_until = at + rng.uniform(30, 120)
        if behaviour.restarts and at >= behaviour.restarts[0]:
            behaviour.restarts.pop(0)
            start += 1
            lost_calls = allocations = allocated = before = 0
        level = max(0.0, behaviour.live(at))
        if behaviour.spikes and rng.random() < 0.3:
            level += rng.random() * behaviour.spikes
        live = math.ceil(level / behaviour.granule) * behaviour.granule
        grown = max(0, live - before)
        allocations += grown // behaviour.granule + rng.randrange(3)
        allocated += grown
        before = live
        lost_calls += rng.random() < lost
        memory = CudaMemory(
            kind=behaviour.kind,
            live_bytes=live,
            allocated_bytes=allocated,
            allocations=allocations,
        )
        report = CudaProcess(
            at=int(at * 1e9),
            pid=1,
            start_ticks=start,
            memory=[memory],
            stacks=[CudaOwner(stack=7, kind=behaviour.kind, live_bytes=live)],
            tracking_since_ns=0,
            lost=lost_calls,
        )
        process = processes.take(report, behaviour.requests(at) if behaviour.requests else math.nan)
        assert process is not None
        verdict = process.watches[behaviour.kind].verdict
        seen.states.add(verdict.state)
        seen.last = verdict
        is_suspected = verdict.state is State.SUSPECTED
        if is_suspected and not was:
            seen.suspected.append(at)
            seen.first = seen.first or verdict
        was = is_suspected
    return seen


# Pieces


def load(rng: random.Random) -> tuple[Level, float]:
    """Loading and warm-up of an engine, and how long they take: weights, a profile run, the KV pool,
    graphs."""
    weights, pool = rng.uniform(2, 40) * GIB, rng.uniform(5, 30) * GIB
    seconds = rng.uniform(30, 420)
    graphs, capture = rng.uniform(0.2, 3) * GIB, rng.uniform(20, 120)

    def level(t: float) -> float:
        if t < seconds:
            return weights * t / seconds
        if t < seconds + 20:
            return weights + pool * 0.7 * math.sin((t - seconds) / 20 * math.pi)
        return weights + pool + graphs * min(1.0, (t - seconds - 20) / capture)

    return level, seconds + 20 + capture


def steady(rng: random.Random, per_hour: float, begin: float) -> Level:
    """A leak in small pieces."""
    return lambda t: per_hour * max(0.0, t - begin) / HOUR


def poisson(rng: random.Random, per_second: Callable[[float], float], hours: float) -> Level:
    """Requests so far, arriving at random."""
    counts, total = [0.0], 0.0
    for second in range(0, int(hours * HOUR) + 60, 10):
        mean = per_second(second) * 10
        total += max(0.0, rng.gauss(mean, math.sqrt(mean)))
        counts.append(total)
    return lambda t: math.floor(counts[min(len(counts) - 1, int(t // 10))])


def walk(rng: random.Random, hours: float, every: float, step: float, low: float, high: float) -> Level:
    """A level that changes at random times between bounds, and comes back."""
    points, at, level = [(0.0, low)], 0.0, low
    while at < hours * HOUR:
        at += rng.expovariate(1 / every)
        level = min(high, max(low, level + rng.uniform(-step, step)))
        points.append((at, level))
    times = [point[0] for point in points]

    def at_time(t: float) -> float:
        from bisect import bisect_right

        return points[bisect_right(times, t) - 1][1]

    return at_time


# Leaks


def _rate(rng: random.Random) -> float:
    """64 MiB/h to 4 GiB/h, evenly by order of magnitude."""
    return 64 * MIB * 64 ** rng.random()


def _hours(per_hour: float) -> float:
    return 1.5 + 6 * 64 * MIB / per_hour + 1.0


def _leak(
    rng: random.Random, extra: Callable[[float, float], Level] | None = None, **more: object
) -> Behaviour:
    """A leak after the load, at once or later."""
    base, warm = load(rng)
    per_hour = _rate(rng)
    begin = warm + rng.choice([0.0, rng.uniform(0, 3600)])
    leak = steady(rng, per_hour, begin)
    other = extra(begin, per_hour) if extra is not None else lambda t: 0.0
    return Behaviour(
        lambda t: base(t) + leak(t) + other(t),
        leak=per_hour,
        leaks_from=begin,
        hours=begin / HOUR + _hours(per_hour),
        **more,  # type: ignore[arg-type]
    )


def leak_steady(rng: random.Random) -> Behaviour:
    return _leak(rng)


def leak_of_1_gib_per_hour(rng: random.Random) -> Behaviour:
    base, warm = load(rng)
    begin = warm + rng.choice([0.0, rng.uniform(0, 7200)])
    leak = steady(rng, GIB, begin)
    return Behaviour(
        lambda t: base(t) + leak(t),
        leak=GIB,
        leaks_from=begin,
        hours=begin / HOUR + 1,
        granule=rng.choice([4096, 2 * MIB, 10 * MIB]),
    )


def leak_slow(rng: random.Random) -> Behaviour:
    base, warm = load(rng)
    leak = steady(rng, 64 * MIB, warm)
    granule = rng.choice([2 * MIB, 20 * MIB])
    return Behaviour(lambda t: base(t) + leak(t), leak=64 * MIB, leaks_from=warm, hours=9, granule=granule)


def leak_from_the_start_of_tracking(rng: random.Random) -> Behaviour:
    """The process was loaded before it was tracked: its ledger begins at nothing."""
    per_hour = _rate(rng)
    leak = steady(rng, per_hour, 0)
    return Behaviour(leak, leak=per_hour, hours=_hours(per_hour))


def leak_per_request(rng: random.Random) -> Behaviour:
    """Bytes per request, under a load that swings."""
    base, warm = load(rng)
    per_hour = _rate(rng)
    hours = warm / HOUR + _hours(per_hour) + 2
    mean, swing, period = rng.uniform(0.5, 30), rng.uniform(0, 0.6), rng.uniform(1800, 14400)
    phase = rng.uniform(0, 2 * math.pi)
    requests = poisson(rng, lambda t: mean * (1 + swing * math.sin(2 * math.pi * t / period + phase)), hours)
    per_request = per_hour / HOUR / mean
    return Behaviour(
        lambda t: base(t) + per_request * (requests(t) - requests(min(t, warm))),
        requests=requests,
        leak=per_hour,
        leaks_from=warm,
        hours=hours,
    )


def leak_per_request_untold(rng: random.Random) -> Behaviour:
    """The same without an engine that tells of its requests."""
    behaviour = leak_per_request(rng)
    behaviour.requests = None
    behaviour.hours += 4
    return behaviour


def leak_in_steps(rng: random.Random) -> Behaviour:
    """A piece at a time."""
    base, warm = load(rng)
    per_hour = _rate(rng)
    piece = rng.uniform(8, 48) * MIB
    every = piece / per_hour * HOUR
    return Behaviour(
        lambda t: base(t) + piece * math.floor(max(0.0, t - warm) / every),
        leak=per_hour,
        leaks_from=warm,
        hours=warm / HOUR + _hours(per_hour) + 12 * every / HOUR,
    )


def leak_under_a_sawtooth(rng: random.Random) -> Behaviour:
    """Memory that rises and falls in periods, and never falls quite to where it was."""
    period, height = rng.uniform(120, 1800), rng.uniform(0.1, 1.5) * GIB

    def sawtooth(begin: float, per_hour: float) -> Level:
        return lambda t: height * ((t % period) / period) if t > begin else 0.0

    behaviour = _leak(rng, sawtooth)
    behaviour.hours += 24 * period / HOUR
    return behaviour


def leak_of_pinned_host_memory(rng: random.Random) -> Behaviour:
    return _leak(rng, kind="host", granule=4096)


def leak_of_virtual_segments(rng: random.Random) -> Behaviour:
    return _leak(rng, kind="virtual", granule=rng.choice([2 * MIB, 20 * MIB]))


def leak_beside_noise(rng: random.Random) -> Behaviour:
    """Beside it other memory comes and goes."""
    other = walk(rng, 60, rng.uniform(20, 300), 40 * MIB, 0, 120 * MIB)
    behaviour = _leak(rng, lambda begin, per_hour: other)
    behaviour.hours += 12
    return behaviour


def leak_after_a_cache_has_filled(rng: random.Random) -> Behaviour:
    base, warm = load(rng)
    size, tau = rng.uniform(0.2, 4) * GIB, rng.uniform(60, 600)
    per_hour = _rate(rng)
    begin = warm + 10 * tau
    leak = steady(rng, per_hour, begin)
    return Behaviour(
        lambda t: base(t) + size * (1 - math.exp(-max(0.0, t - warm) / tau)) + leak(t),
        leak=per_hour,
        leaks_from=begin,
        hours=begin / HOUR + _hours(per_hour),
    )


def leak_in_an_engine_that_sleeps(rng: random.Random) -> Behaviour:
    """It sleeps and wakes every few hours."""
    base, warm = load(rng)
    per_hour = max(_rate(rng), 128 * MIB)
    leak = steady(rng, per_hour, warm)
    period, nap = rng.uniform(3, 5) * HOUR, rng.uniform(60, 600)

    def live(t: float) -> float:
        level = base(t) + leak(t)
        return level * 0.05 if t > period and t % period < nap else level

    return Behaviour(live, leak=per_hour, leaks_from=warm, hours=warm / HOUR + _hours(per_hour) + 6)


LEAKING: tuple[Callable[[random.Random], Behaviour], ...] = (
    leak_steady,
    leak_of_1_gib_per_hour,
    leak_slow,
    leak_from_the_start_of_tracking,
    leak_per_request,
    leak_per_request_untold,
    leak_in_steps,
    leak_under_a_sawtooth,
    leak_of_pinned_host_memory,
    leak_of_virtual_segments,
    leak_beside_noise,
    leak_after_a_cache_has_filled,
    leak_in_an_engine_that_sleeps,
)


# Healthy


def _healthy(rng: random.Random, extra: Callable[[float], Level] | None = None, **more: object) -> Behaviour:
    base, warm = load(rng)
    other = extra(warm) if extra is not None else lambda t: 0.0
    level: Level = lambda t: base(t) + other(t)  # noqa: E731
    return Behaviour(level, hours=rng.choice([3, 8, 26]), **more)  # type: ignore[arg-type]


def loading_and_serving(rng: random.Random) -> Behaviour:
    return _healthy(rng)


def a_long_load(rng: random.Random) -> Behaviour:
    """From a slow store, up to an hour, with pauses."""
    size, seconds = rng.uniform(20, 140) * GIB, rng.uniform(300, 3600)
    return Behaviour(lambda t: size * min(1.0, t / seconds), hours=4)


def slow_warm_up(rng: random.Random) -> Behaviour:
    """The first requests bring workspaces and new shapes."""
    size, tau = rng.uniform(0.1, 3) * GIB, rng.uniform(60, 1500)
    return _healthy(rng, lambda warm: lambda t: size * (1 - math.exp(-max(0.0, t - warm) / tau)))


def a_caching_allocator(rng: random.Random) -> Behaviour:
    """New segments whenever a batch is larger than all before: ever rarer."""

    def made(warm: float) -> Level:
        record, level, points, at = 0.0, 0.0, [(0.0, 0.0)], warm
        while at < 26 * HOUR:
            at += rng.expovariate(1 / 20)
            size = rng.lognormvariate(0, 0.5) * 100 * MIB
            if size > record:
                level += size - record
                record = size
                points.append((at, level))
        return lambda t: next(level for at, level in reversed(points) if at <= t)

    return _healthy(rng, made)


def lora_adapters_swapped(rng: random.Random) -> Behaviour:
    """Adapters come and go, a bounded number at a time."""
    size, most = rng.uniform(50, 400) * MIB, rng.randint(2, 8)
    every = rng.uniform(30, 900)

    def made(warm: float) -> Level:
        slots = walk(rng, 26, every, 1.5, 0, most)
        return lambda t: size * round(slots(max(0.0, t - warm)))

    return _healthy(rng, made)


def sleeping_and_waking(rng: random.Random) -> Behaviour:
    """Sleep mode gives everything back for a while; waking takes a moment to minutes."""
    base, warm = load(rng)
    period, nap, wakes = rng.uniform(600, 7200), rng.uniform(60, 500), rng.uniform(1, 120)

    def live(t: float) -> float:
        level = base(t)
        phase = t % period
        if t < warm + period or phase >= nap + wakes:
            return level
        return level * (0.03 if phase < nap else 0.03 + 0.97 * (phase - nap) / wakes)

    return Behaviour(live, hours=rng.choice([4, 12]), kind="virtual")


def a_larger_batch_size(rng: random.Random) -> Behaviour:
    """The load is raised once or a few times, and memory with it."""
    times = sorted(rng.uniform(0.2, 8) * HOUR for _ in range(rng.randint(1, 3)))
    size = rng.uniform(0.2, 3) * GIB
    return _healthy(rng, lambda warm: lambda t: size * sum(t > at for at in times))


def memory_that_follows_the_load(rng: random.Random) -> Behaviour:
    """Up in the morning, down in the evening; the engine tells of its requests."""
    base, _ = load(rng)
    size, period = rng.uniform(0.5, 6) * GIB, rng.uniform(3, 24) * HOUR
    mean = rng.uniform(5, 50)
    hours = min(50.0, 2.2 * period / HOUR)

    def rate(t: float) -> float:
        return mean * (1 - 0.7 * math.cos(2 * math.pi * t / period))

    requests = poisson(rng, rate, hours)
    return Behaviour(lambda t: base(t) + size * rate(t) / mean, requests=requests, hours=hours)


def periodic_jobs(rng: random.Random) -> Behaviour:
    """Something runs every so often, and takes memory while it does."""
    period, size = rng.uniform(300, 14400), rng.uniform(0.1, 8) * GIB
    runs = rng.uniform(0.05, 0.5) * period
    rise = rng.uniform(0.01, 0.5) * min(runs, 600)

    def made(warm: float) -> Level:
        def level(t: float) -> float:
            phase = t % period
            return size * min(1.0, phase / rise) if t > warm and phase < runs else 0.0

        return level

    return _healthy(rng, made)


def sawtooth_to_the_same_floor(rng: random.Random) -> Behaviour:
    """Garbage is collected now and then."""
    period, size = rng.uniform(60, 600), rng.uniform(0.1, 4) * GIB
    return _healthy(rng, lambda warm: lambda t: size * (t % period) / period if t > warm else 0.0)


def fragmentation(rng: random.Random) -> Behaviour:
    """Reserved memory creeps up while free pieces do not fit, to a limit, and is given back at times."""
    bound, tau = rng.uniform(0.1, 2) * GIB, rng.uniform(120, 1500)
    jitter = walk(rng, 26, 60, 12 * MIB, 0, 24 * MIB)

    def made(warm: float) -> Level:
        return lambda t: bound * (1 - math.exp(-max(0.0, t - warm) / tau)) + jitter(t)

    return _healthy(rng, made)


def a_cache_that_fills_ever_more_slowly(rng: random.Random) -> Behaviour:
    """The more is in it, the more is found."""
    bound, tau = rng.uniform(0.5, 16) * GIB, rng.uniform(60, 1500)
    return _healthy(rng, lambda warm: lambda t: bound * (1 - math.exp(-max(0.0, t - warm) / tau)))


def a_cache_that_fills_fast(rng: random.Random) -> Behaviour:
    """Straight to its bound, in minutes."""
    bound = rng.uniform(2, 32) * GIB
    seconds = rng.uniform(60, 1500)
    seconds = min(seconds, bound / (8 * GIB / HOUR))
    return _healthy(rng, lambda warm: lambda t: bound * min(1.0, max(0.0, t - warm) / seconds))


def growth_like_a_logarithm(rng: random.Random) -> Behaviour:
    """New shapes, plans and workspaces: each doubling of time brings as much again."""
    piece, unit = rng.uniform(20, 400) * MIB, rng.uniform(30, 600)
    return _healthy(rng, lambda warm: lambda t: piece * math.log2(1 + max(0.0, t - warm) / unit))


def kv_offload_to_host_memory(rng: random.Random) -> Behaviour:
    """A pinned pool that fills and then turns over."""
    bound, seconds = rng.uniform(8, 200) * GIB, rng.uniform(60, 3000)
    over = walk(rng, 26, 30, 0.02 * bound, 0, 0.05 * bound)
    full = lambda t: min(1.0, t / seconds)  # noqa: E731
    return Behaviour(lambda t: bound * full(t) - (over(t) if t > seconds else 0.0), kind="host", hours=8)


def restarts(rng: random.Random) -> Behaviour:
    """It crashes and loads again, under the same pid."""
    base, _ = load(rng)
    times = sorted(rng.uniform(0.3, 8) * HOUR for _ in range(rng.randint(1, 6)))

    def live(t: float) -> float:
        return base(t - max([at for at in times if at <= t], default=0.0))

    return Behaviour(live, hours=9, restarts=list(times) if rng.random() < 0.5 else [])


def noise(rng: random.Random) -> Behaviour:
    """Memory that comes and goes at random, far and near."""
    size = rng.uniform(0.05, 2) * GIB
    other = walk(rng, 26, rng.uniform(10, 300), size / 2, 0, size)
    return _healthy(rng, lambda warm: other)


def idle(rng: random.Random) -> Behaviour:
    """Holds what it has, and that is much: outstanding bytes are no leak."""
    size = rng.uniform(10, 130) * GIB
    return Behaviour(lambda t: size, hours=26)


HEALTHY: tuple[Callable[[random.Random], Behaviour], ...] = (
    loading_and_serving,
    a_long_load,
    slow_warm_up,
    a_caching_allocator,
    lora_adapters_swapped,
    sleeping_and_waking,
    a_larger_batch_size,
    memory_that_follows_the_load,
    periodic_jobs,
    sawtooth_to_the_same_floor,
    fragmentation,
    a_cache_that_fills_ever_more_slowly,
    a_cache_that_fills_fast,
    growth_like_a_logarithm,
    kv_offload_to_host_memory,
    restarts,
    noise,
    idle,
)
