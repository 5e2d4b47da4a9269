"""What the receiver remembers and thinks of senders: pure parts, as tables and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.vllm.counts import Quiet
from exporters.vllm.peers import PENDING_SECONDS, is_allowed, judge
from exporters.vllm.senders import STRIKE_SECONDS, STRIKES, Budget, Memory, Strikes
from exporters.vllm.sink import GpuClaim
from gpuglass.config import EnginesConfig
from gpuglass.gpu_processes import MAX_AGE, GpuProcesses

# Memory


def test_a_name_keeps_its_last_packet_and_its_user() -> None:
    memory = Memory()
    taken = memory.claim("a", 1)
    assert taken is not None
    taken.seq = 5
    again = memory.claim("a", 1)
    assert again is not None
    assert again.seq == 5
    assert memory.claim("a", 2) is None


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), max_size=200))
def test_memory_is_bounded_whoever_claims_what(claims: list[tuple[int, int]]) -> None:
    memory = Memory(size=10, per_user=6)
    for name, uid in claims:
        memory.claim(f"{uid}-{name}", uid)
        assert len(memory) <= 10


@given(st.integers(1, 100))
def test_inventing_names_makes_nobody_else_forgotten(count: int) -> None:
    memory = Memory(size=10, per_user=6)
    honest = memory.claim("honest", 1)
    assert honest is not None
    honest.seq = 9
    for number in range(count):
        memory.claim(f"invented-{number}", 2)
    kept = memory.claim("honest", 1)
    assert kept is not None
    assert kept.seq == 9


def test_the_least_recently_connected_name_is_forgotten_first() -> None:
    memory = Memory(size=10, per_user=2)
    for name in ("a", "b", "a", "c"):
        taken = memory.claim(name, 1)
        assert taken is not None
        taken.seq += 1
    kept, lost = memory.claim("a", 1), memory.claim("b", 1)
    assert kept is not None and lost is not None
    assert (kept.seq, lost.seq) == (2, 0)


# Budget


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=100),
    st.integers(1, 100),
)
def test_who_waits_as_told_never_takes_more_than_rate_and_burst(
    steps: list[tuple[float, int]], rate: int
) -> None:
    budget = Budget(rate, 2 * rate)
    now, used = 0.0, 0
    for pause, cost in steps:
        now += pause
        wait = budget.take(cost, now)
        used += cost
        assert wait >= 0
        now += wait
        # One packet may overdraw; it is paid for before the next one is read.
        assert used <= 2 * rate + rate * now + cost


def test_a_slow_sender_never_waits() -> None:
    budget = Budget(10, 20)
    assert all(budget.take(1, now / 10) == 0 for now in range(1000))


# Strikes, quiet


def test_strikes_count_only_within_their_time() -> None:
    strikes = Strikes()
    assert not any(strikes.add(number * STRIKE_SECONDS) for number in range(10))
    strikes = Strikes()
    assert [strikes.add(0.0) for _ in range(STRIKES)] == [False] * (STRIKES - 1) + [True]


def test_a_message_is_said_once_an_hour_and_endless_keys_say_nothing_more() -> None:
    quiet = Quiet(size=3, seconds=10)
    assert [quiet.may("a", 0), quiet.may("a", 9), quiet.may("a", 10)] == [True, False, True]
    assert sum(quiet.may(number, 11) for number in range(100)) == 2
    assert quiet.may("late", 30)


# Peers


@pytest.mark.parametrize(
    ("claimed", "pid", "listed", "knows_any", "seconds", "expected"),
    [
        ("", 5, {5}, True, 0, GpuClaim.NONE),
        ("GPU-1", 5, {5, 6}, True, 0, GpuClaim.VERIFIED),
        ("GPU-1", 5, {6}, True, 0, GpuClaim.PENDING),
        ("GPU-1", 5, {6}, True, PENDING_SECONDS, GpuClaim.REFUSED),
        ("GPU-1", 5, {5}, True, PENDING_SECONDS, GpuClaim.VERIFIED),
        ("GPU-9", 5, None, True, 0, GpuClaim.PENDING),
        ("GPU-9", 5, None, True, PENDING_SECONDS, GpuClaim.REFUSED),
        ("GPU-1", 5, None, False, PENDING_SECONDS, GpuClaim.UNVERIFIED),
        ("GPU-1", 0, {6}, True, PENDING_SECONDS, GpuClaim.UNVERIFIED),
    ],
)
def test_what_is_thought_of_a_claimed_gpu(
    claimed: str, pid: int, listed: set[int] | None, knows_any: bool, seconds: float, expected: GpuClaim
) -> None:
    lists = None if listed is None else frozenset(listed)
    assert judge(claimed, pid, lists, knows_any, seconds) is expected


def test_lists_of_the_driver_say_nothing_when_they_are_old() -> None:
    now = [0.0]
    processes = GpuProcesses(lambda: now[0])
    assert (processes.on("GPU-1"), processes.knows_any) == (None, False)
    processes.note("GPU-1", [5])
    assert processes.on("GPU-1") == frozenset({5})
    assert (processes.on("GPU-2"), processes.knows_any) == (None, True)
    now[0] = MAX_AGE + 1
    assert (processes.on("GPU-1"), processes.knows_any) == (None, False)


@pytest.mark.parametrize(
    ("uids", "patterns", "uid", "namespace", "expected"),
    [
        ((), (), 5, None, True),
        ((5,), (), 5, None, True),
        ((6,), (), 5, None, False),
        ((), ("prod-*",), 5, "prod-a", True),
        ((), ("prod-*",), 5, "dev", False),
        ((), ("*",), 5, "", False),
        ((), ("*",), 5, None, False),
        ((6,), ("*",), 5, "prod", False),
    ],
)
def test_who_may_send(
    uids: tuple[int, ...], patterns: tuple[str, ...], uid: int, namespace: str | None, expected: bool
) -> None:
    config = EnginesConfig(allow_uids=uids, allow_namespaces=patterns)
    assert is_allowed(config, uid, namespace) is expected
