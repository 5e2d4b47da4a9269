"""Which request ran when an allocation was made: exact, temporal, or nobody knows."""

from __future__ import annotations

import pytest

from ebpf.verdict.account import EventAccount
from ebpf.verdict.events import MAX_STEPS, MAX_WAITING, Joined, Joiner, Link
from gpuglass import catalog
from gpuglass.exemplar import NameByRequest, RequestRef
from gpuglass.families import cuda as families
from gpuglass.family import Batch, Owner, Tier
from gpuglass.store import Store, negotiate
from gpuglass_vllm.records import CudaEvent, OutOfMemory, StepSample

MS = 1_000_000
SECOND = 1_000_000_000
TRACE = "0af7651916cd43dd8448eb211c80319c"


def step(begin: int, end: int, *requests: tuple[str, int], number: int = 1) -> StepSample:
    return StepSample(
        at=end * MS,
        begin_ns=begin * MS,
        step=number,
        tid=10,
        kind="eager",
        request_ids=[request for request, _ in requests],
        tokens=[tokens for _, tokens in requests],
    )


def event(at: int, tid: int = 10, pid: int = 10, **more: object) -> CudaEvent:
    told: dict[str, object] = {
        **{"function": "cuMemAlloc", "kind": "device", "bytes": 1 << 30, "reason": "failure", "code": 2},
        **{"begin_ns": (at - 1) * MS},
    }
    return CudaEvent(at=at * MS, pid=pid, tid=tid, **(told | more))  # type: ignore[arg-type]


def tell(joiner: Joiner, sample: StepSample, pid: int = 10, tid: int = 10) -> None:
    joiner.step(pid, tid, sample, RequestRef(sample.request_ids[0], trace_id=TRACE))


def joined(joiner: Joiner, told: CudaEvent, later: int = 4) -> Joined:
    joiner.event(told, told.at)
    (found,) = joiner.due(told.at + later * SECOND)
    return found


def test_the_thread_that_ran_the_step_within_it_is_exact() -> None:
    joiner = Joiner()
    tell(joiner, step(100, 200, ("big", 512), ("small", 1)))
    found = joined(joiner, event(150))
    assert found.link is Link.EXACT
    assert found.step is not None and found.step.batch == (("big", 512), ("small", 1))


@pytest.mark.parametrize(
    ("told", "link"),
    [
        (event(100), Link.TEMPORAL),  # began a moment before the step
        (event(101), Link.EXACT),
        (event(200), Link.EXACT),
        (event(201), Link.TEMPORAL),
        (event(150, tid=11), Link.TEMPORAL),
        (event(150, pid=11), Link.NONE),
        (event(1199), Link.TEMPORAL),
        (event(1202), Link.NONE),
    ],
)
def test_all_else_is_by_time_or_unknown(told: CudaEvent, link: Link) -> None:
    joiner = Joiner()
    tell(joiner, step(100, 200, ("r", 1)))
    assert joined(joiner, told).link is link


def test_a_step_that_is_told_after_the_allocation_is_waited_for() -> None:
    joiner = Joiner()
    told = event(150)
    joiner.event(told, told.at)
    assert list(joiner.due(told.at + SECOND)) == []
    tell(joiner, step(100, 200, ("r", 1)))
    (found,) = joiner.due(told.at + 2 * SECOND)
    assert found.link is Link.EXACT


def test_the_engines_own_hook_is_exact_for_what_ran_out_of_memory_before_it() -> None:
    joiner = Joiner()
    joiner.out_of_memory(10, OutOfMemory(at=900 * MS, request_ids=["r", "s"], tokens=[9, 1]), RequestRef("r"))
    assert joined(joiner, event(150, tid=99)).link is Link.EXACT
    assert joined(joiner, event(950, tid=99)).link is Link.NONE
    assert joined(joiner, event(150, tid=99, code=800)).link is Link.NONE


def test_the_nearest_step_is_taken() -> None:
    joiner = Joiner()
    tell(joiner, step(100, 200, ("early", 1)))
    tell(joiner, step(300, 400, ("late", 1)))
    found = joined(joiner, event(290, tid=99))
    assert found.step is not None and found.step.request.request_id == "late"


def test_what_waits_and_what_is_remembered_is_bounded() -> None:
    joiner = Joiner()
    given_back = [joiner.event(event(150), 0) for _ in range(MAX_WAITING + 5)]
    assert sum(found is not None for found in given_back) == joiner.dropped == 5
    for pid in range(1000):
        for n in range(3):
            tell(joiner, step(n, n + 1, ("r", 1)), pid=pid)
    for n in range(MAX_STEPS + 100):
        tell(joiner, step(n, n + 1, ("r", 1)))
    assert len(joiner._steps) <= 256 and len(joiner._steps[10]) == MAX_STEPS


def exposition(account: EventAccount) -> str:
    store, batch = Store(catalog.owned_by(Owner.AGENT)), Batch()
    account.fill(batch)
    store.publish("cuda", batch)
    return store.exposition(frozenset(Tier), negotiate("application/openmetrics-text;version=1.0.0")).decode()


def test_exemplars_name_trace_link_and_request() -> None:
    joiner, account = Joiner(), EventAccount()
    tell(joiner, step(100, 200, ("big", 512)))
    owner = ("ns", "pod", "main", "python3", "GPU-1")
    account.add(joined(joiner, event(150)), owner, NameByRequest(), 1_790_000_000.0)
    account.add(joined(joiner, event(150, pid=77)), owner, NameByRequest(), 1_790_000_001.0)
    text = exposition(account)
    line = next(line for line in text.splitlines() if line.startswith(families.EVENT_FAILURES.name))
    assert 'code="out_of_memory"' in line and " 2.0 # " in line
    assert f'{{link="exact",request_id="big",trace_id="{TRACE}"}}' in line
    assert 'gpuglass_cuda_event_links_total{link="none"} 1.0' in text


def test_an_allocation_without_a_step_has_no_exemplar() -> None:
    account = EventAccount()
    account.add(joined(Joiner(), event(150)), ("", "", "", "python3", ""), NameByRequest(), 1_790_000_000.0)
    assert " # {" not in exposition(account)


def test_series_of_events_are_bounded() -> None:
    account = EventAccount()
    for n in range(2000):
        told = Joined(event(150, function=f"f{n}", code=n + 1), Link.NONE, None)
        account.add(told, ("", "", "", f"p{n}", ""), NameByRequest(), 1_790_000_000.0)
    batch = Batch()
    account.fill(batch)
    assert len(batch.samples[families.EVENT_FAILURES]) < 1500
    assert sum(sample.value for sample in batch.samples[families.EVENT_FAILURES].values()) == 2000
