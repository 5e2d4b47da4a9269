"""The KV pool: how full it is, who holds it, who held too much of it for how long, who was pushed out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.vllm.ledger import LedgerSettings
from gpuglass.families import engine as families
from gpuglass_vllm import records
from tests.exporters.vllm.engine_world import (
    SECOND,
    TRACE,
    UNIX,
    World,
    end,
    progress,
    start,
)

HOLDER_TRACE = "1bf7651916cd43dd8448eb211c80319c"


def pool_state(at: int, used: int = 0, **more: int) -> records.PoolState:
    return records.PoolState(at=at, used_blocks=used, running=1, **more)


# The pool


def test_the_pool_is_given_in_blocks_bytes_and_tokens() -> None:
    world = World()
    core = world.connect("core")
    world.tell(core, pool_state(world.now, 40, cached_blocks=25, waste_tokens=24, waiting=3))
    expected = {
        families.KV_POOL_BLOCKS: 100,
        families.KV_POOL_BYTES: 100 * 4096,
        families.KV_USED_BLOCKS: 40,
        families.KV_USED_BYTES: 40 * 4096,
        families.KV_CACHED_BLOCKS: 25,
        families.KV_CACHED_BYTES: 25 * 4096,
        families.KV_WASTE_TOKENS: 24,
        families.KV_WASTE_BYTES: 24 * 256,
    }
    assert {family: world.value(family) for family in expected} == expected
    assert world.value(families.REQUESTS, state="running") == 1
    assert world.value(families.REQUESTS, state="waiting") == 3


def test_what_is_unknown_is_absent() -> None:
    world = World()
    core = world.connect("core", pool=records.Pool(blocks=100, block_bytes=0, block_tokens=0))
    world.tell(core, pool_state(world.now, 40, waste_tokens=-1))
    assert world.value(families.KV_USED_BLOCKS) == 40
    for family in (
        families.KV_POOL_BYTES,
        families.KV_USED_BYTES,
        families.KV_CACHED_BYTES,
        families.KV_WASTE_BYTES,
        families.KV_WASTE_TOKENS,
    ):
        assert world.find(family) == []

    world = World()
    core = world.connect("core", pool=None)
    world.tell(core, pool_state(world.now, 40), progress("r1", world.now, 50.0), end("r1", world.now))
    assert world.find(families.KV_POOL_BLOCKS) == world.find(families.KV_PEAK) == []


def test_an_older_snapshot_does_not_replace_a_newer_one() -> None:
    world = World()
    core = world.connect("core")
    world.tell(core, pool_state(world.now, 40), pool_state(world.now - SECOND, 90))
    assert world.value(families.KV_USED_BLOCKS) == 40


# Holders


def test_the_five_largest_holders_are_series_with_their_tenants() -> None:
    world = World()
    core = world.connect("core")
    for number in range(8):
        world.tell(core, progress(f"r{number}", world.now, 1.0 + number, tenant="ab"[number % 2]))
    found = {s.labels["holder"]: (s.labels["tenant"], s.value) for s in world.find(families.KV_HOLDER)}
    assert found == {
        "1": ("b", 0.08),
        "2": ("a", 0.07),
        "3": ("b", 0.06),
        "4": ("a", 0.05),
        "5": ("b", 0.04),
    }
    assert world.value(families.TENANT_KV_SHARE, tenant="a") == 0.16
    assert world.value(families.TENANT_KV_SHARE, tenant="b") == 0.2
    world.tell(core, end("r7", world.now))
    assert world.find(families.KV_HOLDER, holder="1")[0].labels["tenant"] == "a"


@given(
    st.lists(st.floats(0, 101, allow_nan=False), max_size=12),
    st.sampled_from([1, 3, 7, 100]),
)
def test_shares_never_add_up_to_more_than_the_pool(held: list[float], blocks: int) -> None:
    world = World()
    core = world.connect("core", pool=records.Pool(blocks=blocks, block_bytes=1, block_tokens=1))
    for number, amount in enumerate(held):
        world.tell(core, progress(f"r{number}", world.now, amount, tenant=f"t{number % 3}"))
    holders = [s.value for s in world.find(families.KV_HOLDER)]
    assert sum(holders) <= 1
    assert holders == sorted(holders, reverse=True)
    assert sum(s.value for s in world.find(families.TENANT_KV_SHARE)) <= 1
    if held and sum(held) <= blocks:
        assert sum(s.value for s in world.find(families.TENANT_KV_SHARE)) == pytest.approx(
            sum(held) / blocks, abs=1e-5
        )


# Hogs


def test_time_above_a_quarter_of_the_pool_grows_while_the_request_runs_and_names_it() -> None:
    world = World()
    frontend, core = world.connect("frontend"), world.connect("core")
    world.tell(frontend, start("big", world.now, tenant="acme", trace_id=TRACE))
    world.tell(core, progress("big", world.now, 60.0, tenant="acme"), pool_state(world.now, 60))
    assert world.find(families.KV_HOG_SECONDS) == []
    for second in (1, 2, 3):
        world.wait(1)
        world.tell(core, pool_state(world.now, 60))
        assert world.value(families.KV_HOG_SECONDS, tenant="acme") == second
        (exemplar,) = world.exemplars(families.KV_HOG_SECONDS)
        assert exemplar.labels == {"trace_id": TRACE, "request_id": "big"}
        assert (exemplar.value, float(exemplar.timestamp)) == (second, UNIX + second)
    world.wait(0.5)
    world.tell(core, end("big", world.now))
    world.wait(5)
    world.tell(core, pool_state(world.now))
    assert world.value(families.KV_HOG_SECONDS, tenant="acme") == 3.5


def test_a_quarter_itself_is_not_too_much_and_the_time_below_it_does_not_count() -> None:
    world = World()
    core = world.connect("core")
    world.tell(core, progress("r1", world.now, 25.0))
    for blocks in (26.0, 25.0, 26.0):
        world.wait(1)
        world.tell(core, progress("r1", world.now, blocks), pool_state(world.now, 26))
    assert world.value(families.KV_HOG_SECONDS, tenant="none") == 1
    world.wait(1)
    world.tell(core, pool_state(world.now, 26))
    assert world.value(families.KV_HOG_SECONDS) == 2


def test_of_two_hogs_the_larger_is_named_and_both_count() -> None:
    world = World()
    core = world.connect("core")
    world.tell(core, progress("larger", world.now, 50.0), progress("smaller", world.now, 30.0))
    world.wait(2)
    world.tell(core, pool_state(world.now, 80))
    assert world.value(families.KV_HOG_SECONDS) == 4
    assert [e.labels for e in world.exemplars(families.KV_HOG_SECONDS)] == [{"request_id": "larger"}]


def test_time_that_nobody_saw_is_not_counted() -> None:
    world = World()
    core = world.connect("core", sender="me")
    world.tell(core, progress("big", world.now, 60.0), pool_state(world.now, 60))
    world.wait(1)
    world.tell(core, pool_state(world.now, 60))
    world.kill(core)
    world.wait(3)
    core = world.connect("core", sender="me")
    world.tell(core, progress("big", world.now, 60.0), pool_state(world.now, 60))
    assert world.value(families.KV_HOG_SECONDS) == 1


def test_the_peak_is_kept_from_progress_when_the_end_does_not_say_it() -> None:
    world = World()
    core = world.connect("core")
    world.tell(core, progress("r1", world.now, 10.0, peak_blocks=87.6))
    world.tell(core, end("r1", world.now, peak_blocks=0.0))
    assert world.sum(families.KV_PEAK) == pytest.approx(0.876)
    (exemplar,) = world.exemplars(families.KV_PEAK)
    assert (exemplar.labels, exemplar.value) == ({"request_id": "r1"}, pytest.approx(0.876))


# Preemption and eviction


def test_a_preemption_names_its_victim_and_who_held_most() -> None:
    world = World()
    frontend, core = world.connect("frontend"), world.connect("core")
    world.tell(frontend, start("small", world.now, trace_id=TRACE))
    world.tell(frontend, start("big", world.now, trace_id=HOLDER_TRACE))
    world.tell(core, progress("small", world.now, 4.0), progress("big", world.now, 90.0))
    assert world.value(families.PREEMPTIONS, cause="kv_full") == 0
    preemption = records.Preemption(
        at=world.now,
        cause="kv_full",
        victim="small",
        victim_blocks=4.0,
        holders=["big", "small"],
        holder_blocks=[90.0, 4.0],
    )
    world.tell(core, preemption)
    assert world.exemplars(families.PREEMPTIONS) == [], "not before it is counted"
    world.tell(core, records.CoreSums(preemptions={"kv_full": 1}))
    assert world.value(families.PREEMPTIONS, cause="kv_full") == 1
    assert world.value(families.PREEMPTIONS, cause="cache_reset") == 0
    (exemplar,) = world.exemplars(families.PREEMPTIONS)
    assert exemplar.labels == {
        "trace_id": TRACE,
        "holder_trace_id": HOLDER_TRACE,
        "request_id": "small",
        "holder_request_id": "big",
    }
    assert world.value(families.KV_HOLDER, holder="1") == 0.9
    assert world.find(families.KV_HOLDER, holder="2") == [], "the victim holds nothing any more"


def test_evictions_come_in_the_buckets_of_the_stream() -> None:
    world = World()
    core = world.connect("core")
    assert world.find(families.KV_EVICT) == []
    counts = [0] * (len(records.EVICT_SECONDS) + 1)
    counts[0], counts[3], counts[-1] = 4, 2, 1
    for _ in range(2):
        world.tell(core, records.CoreSums(evictions=counts, eviction_seconds=5000.5))
    assert world.value(families.KV_EVICT) == 14
    assert world.sum(families.KV_EVICT) == 10001
    assert world.value(f"{families.KV_EVICT.name}_bucket", le="0.1") == 8
    assert world.value(f"{families.KV_EVICT.name}_bucket", le="3600.0") == 12


def test_many_tenants_share_what_is_left_over() -> None:
    world = World(LedgerSettings(tenants=2))
    core = world.connect("core")
    for number in range(5):
        world.tell(core, progress(f"r{number}", world.now, 10.0, tenant=f"t{number}"))
    assert world.value(families.TENANT_KV_SHARE, tenant="t0") == 0.1
    assert world.value(families.TENANT_KV_SHARE, tenant="other") == 0.3
    assert world.value(families.TENANT_IN_FLIGHT, tenant="other", state="running") == 3
