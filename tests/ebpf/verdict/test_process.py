"""Processes: identity, corrections of the ledger, bounds, and the stacks that grew."""

from __future__ import annotations

import tracemalloc

import pytest

from ebpf.verdict.leak import State
from ebpf.verdict.process import MAX_STACKS, UNTRACKED, Processes
from gpuglass_vllm.records import CudaMemory, CudaOwner, CudaProcess

MIB, GIB = 1 << 20, 1 << 30


def report(seconds: float, live: float, pid: int = 1, **more: object) -> CudaProcess:
    told: dict[str, object] = {
        "memory": [CudaMemory(kind="device", live_bytes=int(live))],
        "start_ticks": 5,
        "tracking_since_ns": 0,
    }
    return CudaProcess(at=int(seconds * 1e9), pid=pid, **(told | more))  # type: ignore[arg-type]


def leaking(processes: Processes, begin: float, minutes: int, **more: object) -> None:
    for n in range(minutes * 4):
        at = begin + 15 * n
        processes.take(report(at, 8 * GIB + at * GIB / 3600, **more))


def test_a_leak_names_the_stacks_that_grew_since_it_began() -> None:
    processes = Processes()
    for n in range(240):
        at = 15.0 * n
        grown = max(0.0, at - 1200) * GIB / 3600
        owners = [
            CudaOwner(stack=1, kind="device", live_bytes=8 * GIB),
            CudaOwner(stack=2, kind="device", live_bytes=int(grown)),
            CudaOwner(stack=3, kind="host", live_bytes=int(9 * grown)),
        ]
        processes.take(report(at, 8 * GIB + grown, stacks=owners))
    ((watch, kind, verdict),) = processes.suspected()
    assert kind == "device" and verdict.trend is not None
    assert [grown_stack.stack for grown_stack in watch.grown(kind, verdict.trend.since)] == [2]


def test_a_pid_that_comes_again_is_another_process() -> None:
    processes = Processes()
    leaking(processes, 0, 10)
    leaking(processes, 600, 10, start_ticks=6)
    assert not list(processes.suspected())
    assert len(processes.by_key) == 2


def test_nothing_is_concluded_across_a_correction() -> None:
    processes = Processes()
    for part, epoch in enumerate((0, 1, 2)):
        leaking(processes, 600.0 * part, 10, epoch=epoch)
    assert not list(processes.suspected())
    leaking(processes, 1800, 10, epoch=2)
    assert list(processes.suspected())


def test_memory_that_no_api_shows_leaks_as_untracked() -> None:
    processes = Processes()
    for n in range(120):
        at = 15.0 * n
        processes.take(report(at, 8 * GIB, untracked_bytes=int(300 * MIB + at * GIB / 3600)))
    assert [kind for _, kind, _ in processes.suspected()] == [UNTRACKED]


def test_a_ledger_that_contradicts_the_driver_accuses_nobody() -> None:
    processes = Processes()
    leaking(processes, 0, 30, drifted=True)
    assert not list(processes.suspected())
    (watch,) = processes.by_key.values()
    assert watch.watches["device"].verdict.state is State.BLIND


@pytest.mark.parametrize(("lost", "state"), [(8, State.BLIND), (0, State.SUSPECTED)])
def test_a_ledger_that_misses_calls_enough_to_explain_the_growth_is_blind(lost: int, state: State) -> None:
    processes = Processes()
    for n in range(120):
        live = 8 * GIB + n * 15 * GIB // 3600
        memory = CudaMemory(
            kind="device", live_bytes=live, allocations=5 * n, allocated_bytes=5 * n * MIB, frees=n
        )
        processes.take(report(15.0 * n, live, memory=[memory], lost=lost * n))
    (watch,) = processes.by_key.values()
    assert watch.watches["device"].verdict.state is state


def test_who_has_ended_or_is_silent_is_forgotten() -> None:
    processes = Processes()
    processes.take(report(0, GIB))
    processes.take(report(0, GIB, pid=2))
    processes.take(report(15, GIB, ended=True))
    assert [pid for pid, _, _ in processes.by_key] == [2]
    processes.tick(int(700e9))
    assert not processes.by_key


def test_old_and_repeated_reports_change_nothing() -> None:
    processes = Processes()
    processes.take(report(100, GIB))
    processes.take(report(50, 9 * GIB))
    (watch,) = processes.by_key.values()
    assert watch.last.at == 100_000_000_000


def test_processes_and_stacks_and_time_are_bounded() -> None:
    processes = Processes(most=2)
    tracemalloc.start()
    try:
        sizes = []
        for part in range(4):
            for n in range(80):
                at = (part * 80 + n) * 2400.0
                for pid in range(1, 4):
                    owners = [CudaOwner(stack=n * 16 + k + 1, kind="device", live_bytes=5) for k in range(16)]
                    processes.take(report(at, GIB, pid=pid, stacks=owners))
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(processes.by_key) == 2 and processes.refused == 320
    assert all(len(watch._stacks) <= MAX_STACKS for watch in processes.by_key.values())
    assert sizes[3] < sizes[1] * 1.1
