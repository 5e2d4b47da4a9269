"""The kernel's ledger against processes that make known calls; the same tests for both loaders."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ebpf.layout import Kind, Layer
from tests.ebpf.conftest import Rig

pytestmark = pytest.mark.needs("cc", "bpf", "ebpf")

MIB = 1 << 20

ALLOCATIONS = [
    ("cuMemAlloc_v2", Kind.DEVICE, "cuMemFree_v2"),
    ("cuMemAlloc", Kind.DEVICE, "cuMemFree"),
    ("cuMemAllocAsync", Kind.DEVICE, "cuMemFreeAsync"),
    ("cuMemAllocAsync_ptsz", Kind.DEVICE, "cuMemFreeAsync_ptsz"),
    ("cuMemAllocFromPoolAsync", Kind.DEVICE, "cuMemFreeAsync"),
    ("cuMemAllocFromPoolAsync_ptsz", Kind.DEVICE, "cuMemFreeAsync_ptsz"),
    ("cuMemAllocManaged", Kind.MANAGED, "cuMemFree_v2"),
    ("cuMemAllocHost_v2", Kind.HOST, "cuMemFreeHost"),
    ("cuMemAllocHost", Kind.HOST, "cuMemFreeHost"),
    ("cuMemHostAlloc", Kind.HOST, "cuMemFreeHost"),
]


@pytest.mark.parametrize(("allocate", "kind", "free"), ALLOCATIONS)
def test_each_variant_is_booked_in_its_kind_and_freed(rig: Rig, allocate: str, kind: Kind, free: str) -> None:
    player = rig.player()
    first = player.out(allocate, 3 * MIB)
    player.out(allocate, 5 * MIB)
    sums = rig.sums(player.pid, kind)
    assert (sums.live_bytes, sums.live_count, sums.allocations) == (8 * MIB, 2, 2)
    player.call(free, first)
    sums = rig.sums(player.pid, kind)
    assert (sums.live_bytes, sums.live_count) == (5 * MIB, 1)
    assert (sums.freed_bytes, sums.frees, sums.allocated_bytes) == (3 * MIB, 1, 8 * MIB)
    others = [key for key in rig.traced(player.pid).process.sums if key != (Layer.DRIVER, kind)]
    assert others == []


@pytest.mark.parametrize("name", ["cuMemAllocPitch_v2", "cuMemAllocPitch"])
def test_a_pitched_allocation_is_as_large_as_its_rows_and_what_it_calls_within_is_not_counted(
    rig: Rig, name: str
) -> None:
    player = rig.player()
    code, _, pitch = player.do("pitch", name, 1000, 64)
    assert (code, pitch) == (0, 1024)
    sums = rig.sums(player.pid, Kind.DEVICE)
    assert (sums.live_bytes, sums.allocations) == (1024 * 64, 1)


def test_failures_are_counted_by_code_and_book_nothing(rig: Rig) -> None:
    player = rig.player()
    kept = player.out("cuMemAlloc_v2", MIB)
    player.do("fail", "cuMemAlloc_v2", 2)
    assert player.do("out", "cuMemAlloc_v2", MIB)[0] == 2
    assert player.do("out", "cuMemAlloc_v2", MIB)[0] == 2
    player.do("fail", "cuMemFree_v2", 700)
    assert player.do("call", "cuMemFree_v2", kept) == 700
    traced = rig.traced(player.pid)
    assert traced.process.failures == {
        (Layer.DRIVER, Kind.DEVICE, 2): 2,
        (Layer.DRIVER, Kind.UNKNOWN, 700): 1,
    }
    assert rig.sums(player.pid, Kind.DEVICE).live_bytes == MIB
    player.do("fail", "cuMemFree_v2", 0)
    player.call("cuMemFree_v2", kept)  # what failed to be freed is still known
    assert rig.sums(player.pid, Kind.DEVICE).live_bytes == 0


def test_physical_memory_lives_until_released_and_unmapped(rig: Rig) -> None:
    player = rig.player()
    handle = player.do("create", 20 * MIB)[1]
    base = 0x700000000000
    player.call("cuMemMap", base, 20 * MIB, 0, handle, 0)
    sums = rig.traced(player.pid).process.sums
    assert sums[Layer.DRIVER, Kind.VIRTUAL].live_bytes == 20 * MIB
    assert sums[Layer.DRIVER, Kind.MAPPED].live_bytes == 20 * MIB
    player.call("cuMemRelease", handle)
    assert rig.sums(player.pid, Kind.VIRTUAL).live_bytes == 20 * MIB  # still mapped
    player.call("cuMemUnmap", base, 20 * MIB)
    sums = rig.traced(player.pid).process.sums
    assert sums[Layer.DRIVER, Kind.VIRTUAL].live_bytes == 0
    assert sums[Layer.DRIVER, Kind.MAPPED].live_bytes == 0
    assert sums[Layer.DRIVER, Kind.VIRTUAL].freed_bytes == 20 * MIB


def test_one_unmap_undoes_many_mappings_and_a_retained_handle_needs_two_releases(rig: Rig) -> None:
    player = rig.player()
    base = 0x710000000000
    handles = [player.do("create", 2 * MIB)[1] for _ in range(4)]
    for index, handle in enumerate(handles):
        player.call("cuMemMap", base + index * 2 * MIB, 2 * MIB, 0, handle, 0)
    player.do("call", "fakeCudaRetains", handles[0])
    player.out("cuMemRetainAllocationHandle", base)
    player.call("cuMemUnmap", base, 8 * MIB)
    for handle in handles:
        player.call("cuMemRelease", handle)
    assert rig.sums(player.pid, Kind.MAPPED).live_bytes == 0
    assert rig.sums(player.pid, Kind.VIRTUAL).live_bytes == 2 * MIB
    player.call("cuMemRelease", handles[0])
    assert rig.sums(player.pid, Kind.VIRTUAL).live_bytes == 0


def test_physical_memory_of_the_host_is_no_memory_of_a_gpu(rig: Rig) -> None:
    player = rig.player()
    player.do("create", 4 * MIB, 2)
    assert rig.sums(player.pid, Kind.HOST).live_bytes == 4 * MIB
    assert rig.sums(player.pid, Kind.VIRTUAL).live_bytes == 0
    assert rig.traced(player.pid).process.gpu_bytes() == 0


CONTEXTS = [
    ("cuCtxCreate", (0, 0), "cuCtxDestroy"),
    ("cuCtxCreate_v2", (0, 1), "cuCtxDestroy_v2"),
    ("cuCtxCreate_v3", (0, 0, 0, 2), "cuCtxDestroy_v2"),
    ("cuCtxCreate_v4", (0, 0, 3), "cuCtxDestroy_v2"),
]


@pytest.mark.parametrize(("create", "arguments", "destroy"), CONTEXTS)
def test_a_context_takes_its_memory_with_it_and_no_other(
    rig: Rig, create: str, arguments: tuple[int, ...], destroy: str
) -> None:
    player = rig.player()
    other = player.out("cuDevicePrimaryCtxRetain", 5)
    context = player.out(create, *arguments)
    player.out("cuMemAlloc_v2", 3 * MIB)
    assert rig.traced(player.pid).process.devices == {arguments[-1]: 3 * MIB}
    player.call("cuCtxPushCurrent_v2", other)
    player.out("cuMemAlloc_v2", 4 * MIB)
    player.out("cuCtxPopCurrent_v2")
    player.call(destroy, context)
    sums = rig.sums(player.pid, Kind.DEVICE)
    assert (sums.live_bytes, sums.context_bytes, sums.context_frees) == (4 * MIB, 3 * MIB, 1)
    assert rig.traced(player.pid).process.devices[5] == 4 * MIB


@pytest.mark.parametrize("end", ["cuDevicePrimaryCtxRelease", "cuDevicePrimaryCtxRelease_v2"])
def test_the_primary_context_goes_with_its_last_release(rig: Rig, end: str) -> None:
    player = rig.player()
    context = player.out("cuDevicePrimaryCtxRetain", 1)
    player.out("cuDevicePrimaryCtxRetain", 1)
    player.call("cuCtxSetCurrent", context)
    player.out("cuMemAlloc_v2", MIB)
    player.call(end, 1)
    assert rig.sums(player.pid, Kind.DEVICE).live_bytes == MIB
    player.call(end, 1)
    sums = rig.sums(player.pid, Kind.DEVICE)
    assert (sums.live_bytes, sums.context_bytes) == (0, MIB)


@pytest.mark.parametrize("reset", ["cuDevicePrimaryCtxReset", "cuDevicePrimaryCtxReset_v2"])
def test_a_reset_frees_all_of_the_primary_context(rig: Rig, reset: str) -> None:
    player = rig.player()
    context = player.out("cuDevicePrimaryCtxRetain", 1)
    player.out("cuDevicePrimaryCtxRetain", 1)
    player.call("cuCtxSetCurrent", context)
    player.out("cuMemAlloc_v2", MIB)
    player.call(reset, 1)
    assert rig.sums(player.pid, Kind.DEVICE).live_bytes == 0


def test_memory_of_an_unknown_context_goes_with_the_last_one(rig: Rig) -> None:
    player = rig.player()
    player.out("cuMemAlloc_v2", 2 * MIB)  # before any context was seen
    context = player.out("cuCtxCreate_v2", 0, 0)
    player.call("cuCtxDestroy_v2", context)
    assert rig.sums(player.pid, Kind.DEVICE).live_bytes == 0


def test_a_free_of_what_was_never_seen_changes_nothing_but_a_count(rig: Rig) -> None:
    player = rig.player()
    player.call("cuMemFree_v2", 0)
    assert player.do("call", "cuMemFree_v2", 0x123) == 1
    handle_of_before = 0x99
    player.call("cuMemRelease", handle_of_before)
    sums = rig.sums(player.pid, Kind.UNKNOWN)
    assert (sums.frees, sums.live_bytes) == (1, 0)
    assert rig.sums(player.pid, Kind.DEVICE).live_bytes == 0


RUNTIME = [
    ("cudaMalloc", (), Kind.DEVICE, "cudaFree", ()),
    ("cudaMallocAsync", (0,), Kind.DEVICE, "cudaFreeAsync", (0,)),
    ("cudaMallocAsync_ptsz", (0,), Kind.DEVICE, "cudaFreeAsync_ptsz", (0,)),
    ("cudaMallocFromPoolAsync", (0, 0), Kind.DEVICE, "cudaFreeAsync", (0,)),
    ("cudaMallocManaged", (1,), Kind.MANAGED, "cudaFree", ()),
    ("cudaMallocHost", (), Kind.HOST, "cudaFreeHost", ()),
    ("cudaHostAlloc", (0,), Kind.HOST, "cudaFreeHost", ()),
]


@pytest.mark.parametrize(("allocate", "more", "kind", "free", "after"), RUNTIME)
def test_the_runtime_has_a_ledger_of_its_own(
    rig: Rig, allocate: str, more: tuple[int, ...], kind: Kind, free: str, after: tuple[int, ...]
) -> None:
    player = rig.player()
    player.do("load", rig.runtime)
    rig.look(player)
    address = player.out(allocate, MIB, *more)
    player.out(allocate, 2 * MIB, *more)
    player.call(free, address, *after)
    for layer in (Layer.DRIVER, Layer.RUNTIME):
        sums = rig.sums(player.pid, kind, layer)
        assert (sums.live_bytes, sums.allocations, sums.frees) == (2 * MIB, 2, 1), layer


def test_a_reset_of_the_runtime_empties_its_ledger(rig: Rig) -> None:
    player = rig.player()
    player.do("load", rig.runtime)
    rig.look(player)
    player.do("pitch", "cudaMallocPitch", 512, 8)
    assert rig.sums(player.pid, Kind.DEVICE, Layer.RUNTIME).live_bytes == 4096
    player.call("cudaDeviceReset")
    assert rig.sums(player.pid, Kind.DEVICE, Layer.RUNTIME).live_bytes == 0
    assert rig.sums(player.pid, Kind.DEVICE, Layer.RUNTIME).context_bytes == 4096


def test_threads_that_are_given_each_others_addresses_leave_nothing_behind(rig: Rig) -> None:
    player = rig.player()
    player.do("threads", 8, 500, 4096)
    sums = rig.sums(player.pid, Kind.DEVICE)
    assert (sums.allocations, sums.frees) == (4000, 4000)
    assert (sums.live_bytes, sums.live_count) == (0, 0)
    assert rig.tracer.ledger.holdings().get(rig.traced(player.pid).process.id) is None


def test_what_a_thread_was_freeing_when_it_ended_is_still_there(rig: Rig) -> None:
    player = rig.player()
    player.do("keep", player.out("cuMemAlloc_v2", MIB))
    player.do("die_within_call")
    holdings = rig.tracer.ledger.holdings()[rig.traced(player.pid).process.id]
    assert sum(holding.bytes for holding in holdings.values()) == MIB
    assert rig.sums(player.pid, Kind.DEVICE).live_bytes == MIB


def test_a_forked_child_has_a_ledger_of_its_own(rig: Rig) -> None:
    player = rig.player()
    player.out("cuMemAlloc_v2", 4 * MIB)
    child = player.do("fork")
    assert rig.sums(player.pid, Kind.DEVICE).live_bytes == 4 * MIB
    sums = rig.sums(child, Kind.DEVICE)
    assert (sums.allocated_bytes, sums.live_bytes, sums.exit_bytes) == (MIB, 0, MIB)


def test_exec_begins_anew_under_the_same_pid(rig: Rig) -> None:
    player = rig.player()
    player.out("cuMemAlloc_v2", 4 * MIB)
    player.tell("replace", rig.library)
    assert player.answer() == "ready"
    player.out("cuMemAlloc_v2", MIB)
    before, after = rig.lives(player.pid)
    assert before.process.sums[Layer.DRIVER, Kind.DEVICE].exit_bytes == 4 * MIB
    assert after.process.sums[Layer.DRIVER, Kind.DEVICE].live_bytes == MIB


@pytest.mark.parametrize("how", ["exit", "kill", "kill_within_call"])
def test_what_a_process_leaves_is_freed_with_it(rig: Rig, how: str) -> None:
    player = rig.player()
    address = player.out("cuMemAlloc_v2", 3 * MIB)
    player.do("create", 2 * MIB)
    if how == "kill_within_call":
        player.do("call", "fakeCudaSleep", 5000)
        player.tell("call", "cuMemFree_v2", address)
        time.sleep(0.2)
    if how == "exit":
        player.end()
    else:
        os.kill(player.pid, signal.SIGKILL)
        player.end()
    traced = rig.traced(player.pid)
    assert traced.ended_at is not None
    sums = traced.process.sums
    assert sums[Layer.DRIVER, Kind.DEVICE].exit_bytes == 3 * MIB
    assert sums[Layer.DRIVER, Kind.VIRTUAL].exit_bytes == 2 * MIB
    assert traced.process.id not in rig.tracer.ledger.records()
    assert traced.process.id not in rig.tracer.ledger.holdings()


def test_a_process_that_came_and_went_between_two_looks_is_in_the_ledger(rig: Rig) -> None:
    player = rig.player()
    pid = player.do("spawn", rig.library, 7 * MIB)
    sums = rig.sums(pid, Kind.DEVICE)
    assert (sums.allocated_bytes, sums.exit_bytes) == (7 * MIB, 7 * MIB)


def test_sizes_and_times_fall_into_their_powers_of_two(rig: Rig) -> None:
    player = rig.player()
    for size in (1, 1024, 1025, 2 * MIB):
        player.out("cuMemAlloc_v2", size)
    player.do("call", "fakeCudaSleep", 5)
    player.out("cuMemAlloc_v2", 3 * MIB)
    sums = rig.sums(player.pid, Kind.DEVICE)
    assert {slot: count for slot, count in enumerate(sums.sizes) if count} == {
        0: 1,
        10: 1,
        11: 1,
        21: 1,
        22: 1,
    }
    assert sum(sums.latencies) == 5
    assert sum(sums.latencies[23:]) >= 1  # above 2^22 ns, which is 4 ms
    assert sums.allocate_ns >= 5_000_000


def test_launches_are_counted_apart(rig: Rig) -> None:
    player = rig.player()
    for name in ("cuLaunchKernel", "cuLaunchKernel_ptsz"):
        player.call(name, 0)
    player.call("cuGraphLaunch", 0, 0)
    record = rig.traced(player.pid).process.record
    assert (record.launches, record.graph_launches) == (2, 1)


def test_two_hundred_processes_are_told_apart(rig: Rig) -> None:
    players = [rig.player() for _ in range(20)]
    pids = {}
    for player in players:
        for index in range(9):
            pids[player.do("spawn", rig.library, (index + 1) * 4096)] = (index + 1) * 4096
    for index, player in enumerate(players):
        player.out("cuMemAlloc_v2", (index + 1) * MIB)
        pids[player.pid] = (index + 1) * MIB
    rig.tracer.read(time.monotonic())
    found = {
        traced.process.pid: traced.process.sums[Layer.DRIVER, Kind.DEVICE].allocated_bytes
        for traced in rig.tracer.traced.values()
        if traced.process.pid in pids
    }
    assert len(pids) == 200
    assert found == pids
