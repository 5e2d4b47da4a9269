"""The pure parts: comparison with the driver, budget, what is published; ways of attaching and filtering."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ebpf import kernel
from ebpf.cost import Budget, Spent
from ebpf.layout import LIVE_KEY, Kind, Layer, Record
from ebpf.ledger import Process, Sums
from ebpf.publish import Publisher, Self
from ebpf.reconcile import Reconciled, reconcile, visible_gpus
from ebpf.stacks import Names, stack_id
from ebpf.symbols import FUNCTIONS, programs
from ebpf.tracer import NAMELESS, Tracer
from ebpf.view import Traced
from gpuglass import catalog
from gpuglass.config import Config, TracerConfig
from gpuglass.families import tracer as families
from gpuglass.family import Batch, Owner, Tier
from gpuglass.procfs import ProcFs
from gpuglass.store import Store, negotiate
from tests.ebpf.conftest import Player, running_rig
from tests.fakes.cuda import LIBRARY, build

GIB = 1 << 30
A, B, C = "GPU-aaaa", "GPU-bbbb", "GPU-cccc"
needs_bpf = pytest.mark.needs("cc", "bpf", "ebpf")


# Comparison


def test_on_one_gpu_all_of_the_ledger_is_there_whatever_its_ordinal() -> None:
    (one,) = reconcile({-1: 3 * GIB, 2: GIB}, {B: 5 * GIB}, None)
    assert (one.gpu_uuid, one.tracked, one.untracked) == (B, 4 * GIB, GIB)
    assert not one.contradicts


def test_on_several_gpus_the_ordinals_tell_where() -> None:
    found = reconcile({0: GIB, 1: 2 * GIB}, {A: 3 * GIB, C: 4 * GIB}, [C, A])
    assert {one.gpu_uuid: one.untracked for one in found} == {A: GIB, C: 3 * GIB}


@pytest.mark.parametrize(
    ("ordinals", "visible"), [({0: GIB, -1: 1}, [A, B]), ({0: GIB}, None), ({0: GIB, 2: GIB}, [A, B])]
)
def test_what_cannot_be_placed_is_not_compared(ordinals: dict[int, int], visible: list[str] | None) -> None:
    assert reconcile(ordinals, {A: GIB, B: GIB}, visible) == []


def test_hidden_memory_is_not_compared() -> None:
    assert reconcile({0: GIB}, {A: None}, None) == []


def test_a_ledger_above_the_drivers_figure_contradicts_it_beyond_rounding() -> None:
    assert not Reconciled(A, GIB, GIB + (1 << 20)).contradicts
    assert Reconciled(A, GIB, 2 * GIB).contradicts


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (b"CUDA_VISIBLE_DEVICES=GPU-cccc,GPU-aaaa\0X=1\0", [C, A]),
        (b"CUDA_VISIBLE_DEVICES=2,0\0CUDA_DEVICE_ORDER=PCI_BUS_ID\0", [C, A]),
        (b"CUDA_VISIBLE_DEVICES=2,0\0", None),
        (b"CUDA_DEVICE_ORDER=PCI_BUS_ID\0", [A, B, C]),
        (b"", None),
        (b"CUDA_VISIBLE_DEVICES=GPU-aaaa,nonsense,GPU-bbbb\0", [A]),
        (b"CUDA_VISIBLE_DEVICES=\xff\xfe\0", []),
    ],
)
def test_the_order_of_visible_gpus(environment: bytes, expected: list[str] | None) -> None:
    assert visible_gpus(environment, [A, B, C]) == expected


# Budget


def test_cost_is_per_active_process_over_a_full_window() -> None:
    budget = Budget(0.01, 10e-6, window=30)
    assert budget.cost(0, {1: Spent(0, 0), 2: Spent(0, 0), 3: Spent(5, 0)}, 1.0) == 0
    # 30,000 calls of 10 µs, 0.3 s within the programs, 0.3 s of the collector, in 30 s, of two processes
    spent = {1: Spent(20_000, 0.2), 2: Spent(10_000, 0.1), 3: Spent(5, 0)}
    cost = budget.cost(30, spent, 1.3)
    assert cost == pytest.approx((0.3 + 0.3 + 0.3) / 30 / 2)
    assert budget.exceeded(cost)
    assert not Budget(0, 0).exceeded(cost)


def test_a_burst_is_seen_against_the_whole_window() -> None:
    budget = Budget(0.01, 10e-6, window=30)
    budget.cost(0, {}, 0)
    assert budget.cost(1, {1: Spent(20_000, 0)}, 0) == pytest.approx(0.2 / 30)


def test_what_is_old_leaves_the_window() -> None:
    budget = Budget(0.01, 10e-6, window=30)
    for second in range(100):
        cost = budget.cost(second, {1: Spent(10_000 if second > 10 else 0, 0)}, 0)
    assert cost == 0


# Publishing

OWN = Self("core", "tracing", {}, 0, 0, {}, 0, 0.0, 0.0, 0.0, None, False, 0, False, 1.0)


def traced(id: int, pid: int, live: int) -> Traced:
    record = Record(1, 0, 1, 1, 0, 0, 0, 0, 0, 0, pid, 0, b"python")
    sums = Sums(live_bytes=live, live_count=1, allocated_bytes=live, allocations=1)
    return Traced(Process(id, record, {(Layer.DRIVER, Kind.DEVICE): sums}), "python", 7)


def live(batch: Batch) -> dict[tuple[str, str], float]:
    return {(key[3], key[4]): sample.value for key, sample in batch.samples[families.LIVE].items()}


def test_processes_beyond_the_limit_are_summed_and_stay_there() -> None:
    publisher = Publisher(2)
    listed = [traced(1, 11, 1), traced(2, 12, 2), traced(3, 13, 4), traced(4, 14, 8)]
    assert live(publisher.batch(listed, 0, OWN)) == {
        ("python", "11"): 1,
        ("python", "12"): 2,
        ("other", ""): 12,
    }
    # One place is free again: who was in the sum stays there, a newcomer takes the place.
    listed = [*listed[1:], traced(5, 15, 16)]
    assert live(publisher.batch(listed, 0, OWN)) == {
        ("python", "12"): 2,
        ("python", "15"): 16,
        ("other", ""): 12,
    }


def test_two_lives_of_one_pid_are_one_series() -> None:
    batch = Publisher(8).batch([traced(1, 11, 1), traced(2, 11, 2)], 0, OWN)
    assert live(batch) == {("python", "11"): 3}


def test_all_that_is_published_is_declared() -> None:
    store = Store(catalog.owned_by(Owner.TRACER))
    store.publish("tracer", Publisher(8).batch([traced(1, 11, 1)], 0, OWN))


# Names of frames


def test_the_same_frames_have_the_same_id_everywhere() -> None:
    assert stack_id(["a (b)", "c+0x1"]) == stack_id(["a (b)", "c+0x1"])
    assert 0 < stack_id(["a (b)"]) < 1 << 53
    assert stack_id(["a (b)"]) != stack_id(["b (a)"])


@pytest.mark.needs("cc")
def test_an_address_is_named_by_the_function_around_it() -> None:
    import ctypes

    library = ctypes.CDLL(str(build() / LIBRARY))
    address = ctypes.cast(library.cuMemAlloc_v2, ctypes.c_void_p).value or 0
    names = Names(ProcFs()).frames(1, os.getpid(), [address + 4, 0x10])
    assert names == [f"cuMemAlloc_v2 ({LIBRARY})", "0x10"]


# Ways of attaching and filtering


def test_every_program_of_the_table_is_in_the_source() -> None:
    source = (Path(kernel.__file__).parent / "program/trace.c").read_text()
    groups = frozenset(function.group for table in FUNCTIONS.values() for function in table.values())
    for name in programs(groups, list(Layer)):
        assert f"PROBE({name})" in source or f"RAW_TRACEPOINT({name})" in source, name


@needs_bpf
def test_where_the_kernel_has_no_multiple_probes_single_ones_do_the_same(
    bpf_object: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "has_uprobe_multi", lambda version: False)
    with running_rig(loader="core", object=str(bpf_object), contexts=False, runtime=False) as rig:
        player = rig.player()
        address = player.out("cuMemAlloc_v2", 4096)
        player.out("cuMemAlloc_v2", 8192)
        player.call("cuMemFree_v2", address)
        sums = rig.sums(player.pid, Kind.DEVICE)
        assert (sums.live_bytes, sums.allocations, sums.frees) == (8192, 2, 1)
        assert rig.tracer.pair is not None and rig.tracer.pair > 0


@needs_bpf
def test_only_the_listed_process_is_traced(bpf_object: Path) -> None:
    players = [Player(str(build() / LIBRARY)) for _ in range(2)]
    config = Config(tracer=TracerConfig(socket="", object=str(bpf_object), loader="core"))
    store = Store(catalog.owned_by(Owner.TRACER))
    tracer = Tracer(config, store.publish, only=frozenset({players[0].pid}))
    try:
        for player in players:
            tracer.discovery.look(player.pid, time.monotonic())
            player.out("cuMemAlloc_v2", 4096)
        tracer.read(time.monotonic())
        assert {one.process.pid for one in tracer.traced.values()} == {players[0].pid}
    finally:
        tracer.close()
        for player in players:
            player.end()


@needs_bpf
def test_what_is_of_no_wanted_namespace_is_booked_no_further(bpf_object: Path) -> None:
    with running_rig(loader="core", object=str(bpf_object), namespaces=("team-*",)) as rig:
        player = rig.player()
        player.out("cuMemAlloc_v2", 4096)
        assert rig.traced(player.pid).wanted is None  # nobody knows yet whose it is
        rig.tracer.read(time.monotonic() + NAMELESS + 1)
        assert rig.traced(player.pid).wanted is False
        player.out("cuMemAlloc_v2", 4096)
        assert rig.sums(player.pid, Kind.DEVICE).allocations == 1
        fmt = negotiate("")
        assert str(player.pid) not in rig.store.exposition(frozenset(Tier), fmt).decode()


@needs_bpf
def test_a_sum_that_drifted_from_the_single_entries_is_corrected_and_said(bpf_object: Path) -> None:
    with running_rig(loader="core", object=str(bpf_object)) as rig:
        player = rig.player()
        player.out("cuMemAlloc_v2", 4096)
        address = player.out("cuMemAlloc_v2", 8192)
        traced = rig.traced(player.pid)
        rig.tracer.reconcile(time.monotonic())
        assert (traced.exact, traced.drift) == (True, {})
        # An entry that got lost: its free will never be booked.
        rig.tracer.maps["live"].delete(LIVE_KEY.pack(traced.process.id, address))
        rig.tracer.reconcile(time.monotonic())
        assert traced.exact
        rig.tracer.reconcile(time.monotonic())
        assert not traced.exact
        assert rig.sums(player.pid, Kind.DEVICE).live_bytes == 4096
        assert rig.traced(player.pid).process.gpu_bytes() == 4096
        rig.tracer.reconcile(time.monotonic())
        assert (traced.exact, traced.resyncs, traced.epoch) == (True, 1, 1)
        player.out("cuMemAlloc_v2", 100)
        assert rig.sums(player.pid, Kind.DEVICE).live_bytes == 4196
