"""A request is put together from what all processes tell, whatever the order, and observed once."""

from __future__ import annotations

from itertools import permutations

import pytest

from exporters.vllm.ledger import LedgerSettings
from exporters.vllm.requests import verdict
from exporters.vllm.sink import Refusal, Refused, Sender
from gpuglass.families import engine as families
from gpuglass_vllm import records
from tests.exporters.vllm.engine_world import (
    SECOND,
    TRACE,
    UNIX,
    World,
    end,
    gpu,
    progress,
    start,
)

KINDS = {"outcome": "stop", "preempted": "false"}
ANSWERS = [records.Capability(hook="frontend.answers", state="active")]


def answered(request_id: str, at: int, outcome: str = "stop", **more: object) -> records.RequestAnswered:
    told: dict[str, object] = {"duration_ns": 1_100_000_000, "first_token_ns": 350_000_000}
    return records.RequestAnswered(at=at, request_id=request_id, outcome=outcome, **(told | more))  # type: ignore[arg-type]


def told_of_one(world: World) -> list[tuple[Sender, records.Record]]:
    """All that is told of one request on two ranks, by four processes."""
    frontend, core = world.connect("frontend"), world.connect("core")
    workers = [world.connect("worker", rank=rank) for rank in (0, 1)]
    now = world.now
    return [
        (frontend, start("r1", now - SECOND, external_id="x", tenant="acme", trace_id=TRACE)),
        (core, progress("r1", now - SECOND // 2, 12.0, tenant="acme")),
        (core, end("r1", now, tenant="acme", peak_blocks=12.0)),
        (workers[0], gpu("r1", now, 0.3, ended=True)),
        (workers[1], gpu("r1", now, 0.2, ended=True)),
        (frontend, answered("r1", now)),
    ]


def in_order(order: tuple[int, ...]) -> bool:
    """Each process tells in order: the start before the answer. A late start tells nothing of a request that
    is complete without it, which a process that tells it first never makes happen."""
    return order.index(0) < order.index(5) and order.index(1) < order.index(2)


@pytest.mark.parametrize("twice", [False, True])
def test_every_order_of_its_records_gives_the_same_one_observation(twice: bool) -> None:
    for order in filter(in_order, permutations(range(6))):
        world = World()
        told = told_of_one(world)
        for index in order:
            for _ in range(1 + twice):
                world.tell(*told[index])
        world.wait(3)
        for index in order if twice else ():
            world.tell(*told[index])
        world.wait(40)
        assert world.value(families.REQUEST_DURATION, **KINDS) == 1, order
        assert world.sum(families.REQUEST_DURATION) == 1.1, "the frontend's number wins"
        assert world.sum(families.REQUEST_FIRST_TOKEN) == 0.35
        assert world.sum(families.REQUEST_QUEUE) == 0.1
        assert world.sum(families.REQUEST_PREFILL) == 0.2
        assert world.sum(families.REQUEST_DECODE) == 0.7
        assert world.sum(families.REQUEST_GPU) == 0.5, "ranks are added"
        assert world.sum(families.REQUEST_PROMPT_TOKENS) == 100
        assert world.sum(families.REQUEST_CACHED_TOKENS) == 32
        assert world.sum(families.REQUEST_OUTPUT_TOKENS) == 20
        assert world.sum(families.KV_PEAK) == 0.12
        assert world.value(families.TRACKED) == 0
        (exemplar,) = world.exemplars(families.REQUEST_GPU)
        assert exemplar.labels == {"trace_id": TRACE, "request_id": "r1", "external_id": "x"}
        assert (exemplar.value, float(exemplar.timestamp)) == (0.5, UNIX)


def test_a_request_of_which_all_is_told_is_observed_at_once_and_otherwise_after_a_grace() -> None:
    world = World()
    told = told_of_one(world)
    for sender, record in told[:-1]:
        world.tell(sender, record)
    assert world.value(families.REQUEST_DURATION) is None
    world.tell(*told[-1])
    assert world.value(families.REQUEST_DURATION) == 1

    world = World()
    for sender, record in told_of_one(world)[:-1]:
        world.tell(sender, record)
    world.wait(1.5)
    assert world.value(families.REQUEST_DURATION) is None
    world.wait(1)
    assert world.value(families.REQUEST_DURATION) == 1
    assert world.sum(families.REQUEST_DURATION) == 1.0, "the core's number, for want of a better one"
    assert world.sum(families.REQUEST_FIRST_TOKEN) == pytest.approx(0.3)


def test_a_core_alone_is_enough_and_what_nobody_tells_is_absent() -> None:
    world = World()
    core = world.connect("core")
    world.tell(core, end("r1", world.now, queue_ns=-1, prefill_ns=-1, decode_ns=-1, outcome="abort"))
    assert world.value(families.REQUEST_DURATION, outcome="abort") == 1
    assert world.find(families.REQUEST_QUEUE) == world.find(families.REQUEST_FIRST_TOKEN) == []
    assert world.find(families.REQUEST_GPU) == []


def test_a_frontend_alone_is_enough() -> None:
    world = World()
    frontend = world.connect("frontend")
    world.tell(frontend, start("r1", world.now), answered("r1", world.now, "error", error_type="timeout"))
    world.wait(3)
    assert world.value(families.REQUEST_DURATION, outcome="error", error_type="timeout") == 1
    assert world.find(families.REQUEST_PROMPT_TOKENS) == []


def test_an_answer_waits_for_a_core_that_is_inside_a_long_step() -> None:
    world = World()
    frontend, core = world.connect("frontend"), world.connect("core")
    world.tell(frontend, start("r1", world.now), answered("r1", world.now, "abort"))
    world.wait(20)
    assert world.value(families.REQUEST_DURATION) is None
    world.tell(core, end("r1", world.now, outcome="abort"))
    assert world.value(families.REQUEST_PROMPT_TOKENS, outcome="abort") == 1
    world.tell(frontend, start("r2", world.now), answered("r2", world.now))
    world.wait(31)
    assert world.value(families.REQUEST_DURATION, outcome="stop") == 1


def test_a_refused_request_is_observed_by_its_reason_with_the_ids_that_came() -> None:
    world = World()
    frontend = world.connect("frontend")
    refused = records.RequestRefused(
        at=world.now, error_type="validation", external_id="x1", trace_id=TRACE, duration_ns=SECOND // 100
    )
    world.tell(frontend, refused)
    assert world.value(families.REQUEST_DURATION, outcome="rejected", error_type="validation") == 1
    (exemplar,) = world.exemplars(families.REQUEST_DURATION)
    assert exemplar.labels == {"trace_id": TRACE, "request_id": "x1"}


def test_whether_it_was_preempted_is_told_and_its_time_to_first_token_is_kept_apart() -> None:
    world = World()
    core = world.connect("core")
    world.tell(core, end("r1", world.now, preemptions=2), end("r2", world.now))
    assert world.value(families.REQUEST_FIRST_TOKEN, preempted="true") == 1
    assert world.value(families.REQUEST_FIRST_TOKEN, preempted="false") == 1


STOP, ABORT, DIED = ("stop", ""), ("abort", ""), ("error", "engine")
TIMEOUT, MEMORY = ("error", "timeout"), ("error", "out_of_memory")


@pytest.mark.parametrize(
    ("core", "frontend", "died", "expected"),
    [
        (STOP, STOP, False, STOP),
        (STOP, None, False, STOP),
        (STOP, ABORT, False, STOP),  # the client left when all was done
        (ABORT, STOP, False, STOP),  # the frontend found a stop word and asked for the abort
        (ABORT, TIMEOUT, False, TIMEOUT),
        (ABORT, None, False, ABORT),
        (MEMORY, DIED, False, MEMORY),
        (None, STOP, False, STOP),
        (None, TIMEOUT, True, TIMEOUT),
        (None, None, True, DIED),
        (STOP, None, True, STOP),
    ],
)
def test_the_outcome_is_that_of_who_knows_it(
    core: tuple[str, str] | None, frontend: tuple[str, str] | None, died: bool, expected: tuple[str, str]
) -> None:
    said = end("r", SECOND, outcome=core[0], error_type=core[1]) if core else None
    answer = answered("r", SECOND, frontend[0], error_type=frontend[1]) if frontend else None
    assert verdict(said, answer, died) == expected


# Processes that die


def test_a_killed_core_fails_its_requests_and_nothing_else() -> None:
    world = World()
    core = world.connect("core")
    other = world.connect("core", instance="server-b", model_name="other")
    world.tell(core, progress("r1", world.now, 10.0, tenant="acme"), end("r2", world.now))
    world.wait(4)
    world.tell(other, progress("r1", world.now, 10.0))
    assert world.value(families.UP, model_name="tiny") == 1
    world.kill(core)
    assert world.value(families.UP, model_name="tiny") == 0
    world.wait(6)
    assert world.value(families.REQUEST_DURATION, outcome="error", error_type="engine") == 1
    assert world.sum(families.REQUEST_DURATION, outcome="error") == 4, "until the engine went"
    assert world.value(families.TENANT_REQUESTS, tenant="acme", outcome="error", error_type="engine") == 1
    assert world.value(families.KV_PEAK, model_name="tiny") == 2
    assert world.value(families.REQUEST_DURATION, outcome="stop") == 1
    assert world.value(families.TENANT_IN_FLIGHT, model_name="other", state="running") == 1


def test_a_core_that_comes_back_in_time_goes_on_with_its_requests() -> None:
    world = World()
    core = world.connect("core", sender="me")
    world.tell(core, progress("r1", world.now, 10.0))
    world.kill(core)
    assert world.find(families.KV_HOLDER) == [], "unknown while nobody tells"
    world.wait(3)
    core = world.connect("core", sender="me")
    world.tell(core, progress("r1", world.now, 11.0))
    world.wait(20)
    assert world.value(families.KV_HOLDER, holder="1") == 0.11
    world.tell(core, end("r1", world.now))
    assert world.value(families.REQUEST_DURATION, outcome="stop") == 1
    assert world.find(families.REQUEST_DURATION, outcome="error") == []


def test_a_killed_core_does_not_hide_what_the_frontend_answered_and_counted() -> None:
    world = World()
    frontend, core = world.connect("frontend", capabilities=ANSWERS), world.connect("core")
    world.tell(frontend, start("r1", world.now, tenant="acme"))
    world.tell(core, progress("r1", world.now, 10.0, tenant="acme"))
    world.kill(core)
    world.tell(frontend, answered("r1", world.now, "error", error_type="engine"))
    world.tell(frontend, records.TenantSums(tenant="acme", requests={"error/engine": 1}))
    world.wait(10)
    assert world.value(families.REQUEST_DURATION, outcome="error", error_type="engine") == 1
    assert world.value(families.TENANT_REQUESTS, tenant="acme", outcome="error", error_type="engine") == 1


@pytest.mark.parametrize(("capabilities", "counted"), [(ANSWERS, 1), ([], None)])
def test_who_would_have_counted_an_end_and_was_killed_is_stood_in_for(
    capabilities: list[records.Capability], counted: int | None
) -> None:
    world = World()
    frontend, core = world.connect("frontend", capabilities=capabilities), world.connect("core")
    world.tell(frontend, start("r1", world.now, tenant="acme"))
    world.tell(core, progress("r1", world.now, 10.0))
    world.kill(frontend)
    world.tell(core, end("r1", world.now, outcome="abort"))
    world.wait(10)
    assert world.value(families.REQUEST_DURATION, outcome="abort") == 1
    # Without the hook the core counts it in its own sums.
    assert world.value(families.TENANT_REQUESTS, tenant="acme", outcome="abort") == counted


def test_a_frontend_that_comes_back_is_waited_for() -> None:
    world = World()
    frontend = world.connect("frontend", sender="api", capabilities=ANSWERS)
    core = world.connect("core")
    world.tell(frontend, start("r1", world.now, tenant="acme"))
    world.kill(frontend)
    world.tell(core, end("r1", world.now, outcome="abort"))
    world.wait(3)
    frontend = world.connect("frontend", sender="api", capabilities=ANSWERS)
    world.tell(frontend, answered("r1", world.now, "error", error_type="timeout"))
    world.wait(10)
    assert world.value(families.REQUEST_DURATION, outcome="error", error_type="timeout") == 1
    assert world.find(families.TENANT_REQUESTS) == [], "its own sums tell"


def test_a_worker_that_dies_while_its_core_lives_fails_nothing() -> None:
    world = World()
    core, worker = world.connect("core"), world.connect("worker")
    world.tell(core, progress("r1", world.now, 10.0))
    world.kill(worker)
    world.wait(20)
    assert world.value(families.TENANT_IN_FLIGHT, state="running") == 1
    world.kill(core)
    world.wait(6)
    assert world.value(families.TENANT_REQUESTS, outcome="error", error_type="engine") == 1


# Data-parallel engines behind one frontend


def test_a_frontend_feeds_all_engines_of_its_server() -> None:
    world = World()
    frontend = world.connect("frontend")
    cores = [world.connect("core", engine=name) for name in ("0", "1")]
    for number, core in enumerate(cores):
        world.tell(frontend, start(f"r{number}", world.now, tenant="acme", trace_id=TRACE))
        world.tell(core, end(f"r{number}", world.now))
        world.tell(frontend, answered(f"r{number}", world.now))
    for name in ("0", "1"):
        assert world.value(families.REQUEST_DURATION, engine=name) == 1
        (exemplar,) = world.exemplars(families.REQUEST_DURATION, engine=name)
        assert exemplar.labels["trace_id"] == TRACE


# Bounds and loss


def test_a_sender_that_was_never_introduced_loses_nothing_unseen() -> None:
    world = World()
    core = world.connect("core")
    world.kill(core)
    with pytest.raises(Refused) as refused:
        world.tell(core, records.TenantSums(tenant="acme", output_tokens=7))
    assert refused.value.reason is Refusal.INTERNAL


def test_more_open_requests_than_allowed_are_refused_once_each_and_their_sums_count() -> None:
    world = World(LedgerSettings(requests=2))
    core = world.connect("core")
    world.tell(core, progress("r1", world.now, 1.0), progress("r2", world.now, 1.0))
    with pytest.raises(Refused) as refused:
        world.tell(core, progress("r3", world.now, 1.0))
    assert refused.value.reason is Refusal.TOO_MANY_REQUESTS
    world.tell(core, progress("r3", world.now, 2.0), end("r3", world.now))
    world.tell(core, records.TenantSums(tenant="acme", output_tokens=7, requests={"stop": 1}))
    assert world.value(families.UNTRACKED, reason="limit") == 1
    assert world.value(families.TRACKED) == 2
    assert world.value(families.TENANT_REQUESTS, tenant="acme") == 1
    assert world.find(families.REQUEST_DURATION) == []
    world.tell(core, end("r1", world.now))
    world.tell(core, progress("r4", world.now, 1.0))
    assert world.value(families.TRACKED) == 2


def test_many_engines_have_a_bound_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.vllm.ledger.MAX_OPEN", 5)
    world = World()
    for number in range(5):
        core = world.connect("core", instance=f"server-{number}", server=f"s{number}")
        world.tell(core, records.RequestProgress(at=world.now, request_id="r1"))
    with pytest.raises(Refused) as refused:
        world.tell(core, records.RequestProgress(at=world.now, request_id="r2"))
    assert refused.value.reason is Refusal.TOO_MANY_REQUESTS


def test_a_request_whose_end_was_dropped_is_let_go_when_its_core_has_none_left() -> None:
    world = World()
    core = world.connect("core")
    world.tell(core, progress("r1", world.now, 10.0))
    world.wait(10)
    world.tell(core, progress("r2", world.now, 5.0))
    world.tell(core, records.PoolState(at=world.now, used_blocks=5, running=1))
    world.wait(10)
    assert world.value(families.TRACKED) == 2, "one runs: it may be any of them"
    world.wait(2)
    world.tell(core, records.PoolState(at=world.now, used_blocks=0))
    world.wait(6)
    assert world.value(families.TRACKED) == 0
    assert world.value(families.UNTRACKED, reason="lost") == 2
    assert world.find(families.KV_HOLDER) == []


def test_a_request_without_news_for_a_quarter_of_an_hour_is_forgotten_and_counted() -> None:
    world = World()
    core = world.connect("core")
    world.tell(core, progress("r1", world.now, 0.0, running=False))
    world.wait(890)
    assert world.value(families.UNTRACKED, reason="expired") == 0
    world.wait(20)
    assert world.value(families.UNTRACKED, reason="expired") == 1
    world.tell(core, end("r1", world.now))
    assert world.value(families.REQUEST_DURATION) == 1


# Restarts


def test_a_new_agent_takes_up_requests_that_run_and_observes_them_whole() -> None:
    world = World()  # the agent that comes after the one that heard the beginning
    frontend, core = world.connect("frontend"), world.connect("core")
    worker = world.connect("worker")
    world.tell(core, progress("r1", world.now, 10.0, peak_blocks=30.0))
    world.tell(frontend, start("r1", world.now - 100 * SECOND, tenant="acme", trace_id=TRACE))
    world.tell(worker, gpu("r1", world.now, 12.5, ended=True))
    world.tell(core, end("r1", world.now, peak_blocks=30.0))
    world.tell(frontend, answered("r1", world.now))
    assert world.sum(families.REQUEST_GPU) == 12.5
    assert world.sum(families.KV_PEAK) == 0.3


def test_a_new_engine_goes_on_counting_where_the_old_one_stopped_and_shares_no_request_with_it() -> None:
    world = World()
    core = world.connect("core", instance="first")
    world.tell(core, records.TenantSums(tenant="acme", output_tokens=5), end("r0", world.now))
    world.tell(core, progress("r1", world.now, 10.0))
    world.kill(core)
    new = world.connect("core", instance="second")
    world.tell(new, progress("r1", world.now, 20.0))
    world.wait(10)
    world.tell(new, records.TenantSums(tenant="acme", output_tokens=6), end("r1", world.now))
    assert world.value(families.TENANT_TOKENS, tenant="acme", kind="output") == 11
    assert world.value(families.REQUEST_DURATION, outcome="stop") == 2
    assert world.value(families.TENANT_REQUESTS, outcome="error", error_type="engine") == 1
    assert [s.labels.get("server") for s in world.find(families.UP)] == [None]


def test_two_servers_with_the_same_labels_are_told_apart_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    cores = [world.connect("core", instance=name) for name in "abc"]
    for number, core in enumerate(cores):
        world.tell(core, records.TenantSums(tenant="acme", output_tokens=10 + number))
    found = {s.labels.get("server"): s.value for s in world.find(families.TENANT_TOKENS, kind="output")}
    assert found == {None: 10, "2": 11, "3": 12}
    assert sum("GPUGLASS_SERVER" in message for message in caplog.messages) == 1
    named = world.connect("core", instance="d", server="blue")
    world.tell(named, records.TenantSums(tenant="acme", output_tokens=20))
    assert world.value(families.TENANT_TOKENS, kind="output", server="blue") == 20


def test_a_gauge_goes_with_its_core_and_a_counter_ten_minutes_later() -> None:
    world = World()
    core, worker = world.connect("core"), world.connect("worker")
    world.tell(core, records.PoolState(at=world.now, used_blocks=5), records.TenantSums(tenant="acme"))
    world.tell(worker, records.StepSums(clock="wall", steps=1))
    assert world.value(families.KV_USED_BLOCKS) == 5
    world.kill(core)
    world.kill(worker)
    world.wait(590)
    assert world.find(families.KV_USED_BLOCKS) == world.find(families.KV_POOL_BLOCKS) == []
    assert world.value(families.UP) == 0
    assert world.value(families.TENANT_TOKENS, kind="output") == 0
    world.wait(30)
    assert world.find(families.UP) == world.find(families.TENANT_TOKENS) == []
    assert world.ledger.accounts == world.ledger.servers == {}


def test_names_of_the_workload_may_come_later_and_totals_go_along() -> None:
    world = World()
    core = world.connect("core")
    world.tell(core, records.TenantSums(tenant="acme", output_tokens=5))
    core.namespace, core.pod, core.container = "prod", "vllm-0", "engine"
    world.ledger.hello(core)
    world.tell(core, records.TenantSums(tenant="acme", output_tokens=2))
    (tokens,) = world.find(families.TENANT_TOKENS, kind="output")
    assert tokens.value == 7
    assert tokens.labels["workload_namespace"] == "prod"
    assert (tokens.labels["workload_pod"], tokens.labels["workload_container"]) == ("vllm-0", "engine")
    other = world.connect("core", instance="b")
    world.tell(other, records.TenantSums(tenant="acme", output_tokens=1))
    assert len(world.find(families.UP)) == 2
    other.namespace, other.pod, other.container = core.workload
    world.ledger.hello(other)
    world.tell(other, records.TenantSums(tenant="acme", output_tokens=1))
    assert world.value(families.TENANT_TOKENS, kind="output", server="2") == 2


def test_a_new_configuration_admits_more_tenants_and_takes_no_series_away() -> None:
    world = World(LedgerSettings(tenants=1))
    core = world.connect("core")

    def told(tenant: str) -> set[str]:
        world.tell(core, records.TenantSums(tenant=tenant, output_tokens=1))
        return {s.labels["tenant"] for s in world.find(families.TENANT_TOKENS)}

    assert told("a") | told("b") == {"a", "other"}
    world.ledger.reconfigure(LedgerSettings(tenants=2, requests=1))
    assert told("b") == {"a", "b", "other"}
    world.ledger.reconfigure(LedgerSettings(tenants=1))
    assert told("c") == {"a", "b", "other"}


def test_a_request_that_only_workers_know_is_nobodys_and_goes_when_they_say_that_it_has_ended() -> None:
    world = World()
    world.connect("core")
    worker = world.connect("worker")
    world.tell(worker, gpu("r1", world.now, 1.0), gpu("r2", world.now, 1.0, ended=True))
    assert world.find(families.TENANT_IN_FLIGHT) == []
    world.wait(40)
    assert world.value(families.TRACKED) == 1
    assert world.value(families.UNTRACKED, reason="lost") == 1


def test_exemplars_of_a_bucket_never_go_back_in_time() -> None:
    world = World()
    frontend, core = world.connect("frontend"), world.connect("core")
    world.wait(10)
    first, second = world.now - 2 * SECOND, world.now - SECOND
    world.tell(frontend, start("r1", first - SECOND), start("r2", second - SECOND))
    world.tell(core, end("r1", first))  # waits for its answer
    world.tell(core, end("r2", second))
    world.tell(frontend, answered("r2", second))
    assert [e.labels["request_id"] for e in world.exemplars(families.REQUEST_DECODE)] == ["r2"]
    world.tell(frontend, answered("r1", first))
    assert world.value(families.REQUEST_DECODE) == 2
    assert [e.labels["request_id"] for e in world.exemplars(families.REQUEST_DECODE)] == ["r2"]


@pytest.mark.parametrize(
    ("offset", "expected"),
    [(0, UNIX), (-600, UNIX - 600), (4, UNIX + 4), (-7200, UNIX), (3600, UNIX)],
)
def test_a_clock_that_cannot_be_right_is_not_believed(offset: int, expected: int) -> None:
    world = World()
    core = world.connect("core", clock_offset_ns=(UNIX - 1000 + offset) * SECOND)
    world.tell(core, end("r1", world.now))
    (exemplar,) = world.exemplars(families.REQUEST_DECODE)
    assert float(exemplar.timestamp) == expected
