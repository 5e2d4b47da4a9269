"""What the ledger tells of each request that has ended, and exemplars that wait for whoever hears of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations

import pytest

from exporters.vllm.ledger import RETURN_NS
from gpuglass.exemplar import NameByRequest, Names, RequestRef
from gpuglass.families import engine as families
from gpuglass.record_hub import EndedRequest
from gpuglass_vllm import records
from tests.exporters.vllm.engine_world import SECOND, TRACE, UNIX, World, end, gpu, progress, start

CALLER = "b7ad6b7169203331"


class Waits(NameByRequest):
    """A policy whose labels for ended requests come later."""

    waits = True

    def names(self, request: RequestRef) -> Names:
        return [("request_id", request.request_id)]


@dataclass
class Heard:
    """A world, and what it told."""

    world: World = field(default_factory=lambda: World(policy=Waits()))
    ended: list[EndedRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world.ledger.told = self.ended.append


@pytest.fixture
def heard() -> Iterator[Heard]:
    yield Heard()


def answered(request_id: str, at: int, outcome: str = "stop", **more: object) -> records.RequestAnswered:
    told: dict[str, object] = {"duration_ns": 1_100_000_000, "first_token_ns": 350_000_000}
    return records.RequestAnswered(at=at, request_id=request_id, outcome=outcome, **(told | more))  # type: ignore[arg-type]


def test_an_ended_request_is_told_once_with_all_that_is_known(heard: Heard) -> None:
    world = heard.world
    frontend, core = world.connect("frontend"), world.connect("core")
    worker = world.connect("worker")
    worker.gpu_uuid = "GPU-1"
    now = world.now
    entered = start(
        "r1",
        now - SECOND,
        external_id="x",
        tenant="acme",
        trace_id=TRACE,
        span_id=CALLER,
        sampled=True,
        max_tokens=20,
        lora="l",
    )
    world.tell(frontend, entered)
    world.tell(core, progress("r1", now - SECOND // 2, 50.0, tenant="acme"))
    world.tell(core, end("r1", now, tenant="acme", peak_blocks=50.0, preemptions=1))
    world.tell(worker, gpu("r1", now, 0.3, ended=True))
    assert heard.ended == []
    world.now += SECOND // 100
    world.tell(frontend, answered("r1", world.now, duration_ns=SECOND + SECOND // 50))
    world.wait(60)
    (told,) = heard.ended
    assert (told.request_id, told.external_id, told.instance) == ("r1", "x", "server-a")
    assert (told.trace_id, told.span_id, told.sampled) == (TRACE, CALLER, True)
    assert (told.outcome, told.error_type, told.tenant, told.lora) == ("stop", "", "acme", "l")
    assert told.begin_ns == now + SECOND // 100 - SECOND - SECOND // 50, "the earlier of what both saw"
    assert told.end_ns == now + SECOND // 100, "the later of what both saw"
    assert told.clock_offset_ns == (UNIX - 1000) * SECOND
    assert (told.queue_ns, told.prefill_ns, told.decode_ns) == (SECOND // 10, SECOND // 5, SECOND * 7 // 10)
    assert (told.prompt_tokens, told.cached_tokens, told.output_tokens, told.max_tokens) == (100, 32, 20, 20)
    assert (told.preemptions, told.gpu_ns) == (1, 0.3 * SECOND)
    assert (told.kv_share, told.kv_share_at) == (0.5, now - SECOND // 2)
    assert (told.model_name, told.software, told.gpu_uuids) == ("tiny", ("vllm", "0.32.0"), ("GPU-1",))


def test_a_request_without_a_frontend_is_told_too(heard: Heard) -> None:
    core = heard.world.connect("core")
    heard.world.tell(core, end("r1", heard.world.now))
    (told,) = heard.ended
    assert (told.trace_id, told.begin_ns, told.end_ns) == ("", heard.world.now - SECOND, heard.world.now)


def test_a_request_that_began_before_the_agent_is_still_its_callers(heard: Heard) -> None:
    frontend, core = heard.world.connect("frontend"), heard.world.connect("core")
    context = {"external_id": "x", "trace_id": TRACE, "span_id": CALLER, "sampled": True}
    heard.world.tell(core, end("r1", heard.world.now))
    heard.world.tell(frontend, answered("r1", heard.world.now, **context))
    (told,) = heard.ended
    assert (told.external_id, told.trace_id, told.span_id, told.sampled) == ("x", TRACE, CALLER, True)


CONTEXT = {"external_id": "x", "trace_id": TRACE, "span_id": CALLER, "sampled": True, "max_tokens": 20}


@pytest.mark.parametrize("order", list(permutations(["frontend", "core", "worker"])))
def test_an_agent_that_was_just_started_waits_until_all_processes_are_back(
    heard: Heard, order: tuple[str, ...]
) -> None:
    """Each connects when it likes, and tells what it has: nobody's part is missing, whoever comes first."""
    world = heard.world
    world.ledger.listening_since_ns = world.now
    at = world.now - SECOND
    parts = {
        "frontend": [answered("r1", at, **CONTEXT)],
        "core": [end("r1", at)],
        "worker": [gpu("r1", at, 0.3, ended=True)],
    }
    for role in order:
        world.tell(world.connect(role), *parts[role])
        world.wait(2.8)
    world.wait(60)
    (told,) = heard.ended
    assert (told.trace_id, told.span_id, told.sampled, told.external_id) == (TRACE, CALLER, True, "x")
    assert (told.queue_ns, told.output_tokens, told.max_tokens) == (SECOND // 10, 20, 20)
    assert told.gpu_ns == 0.3 * SECOND and told.caller_known
    assert world.value(families.REQUEST_DURATION) == 1
    counts = [sample.value for sample in world.find(families.TENANT_REQUESTS)]
    assert sum(counts) == 0, "whoever counts ends does so in sums"


def test_it_waits_with_older_requests_only_and_not_for_long(heard: Heard) -> None:
    world = heard.world
    world.ledger.listening_since_ns = world.now
    core = world.connect("core")
    world.tell(core, end("old", world.now))
    world.wait(2)
    world.tell(core, end("new", world.now, arrival_ns=world.now - SECOND // 2))
    assert [told.request_id for told in heard.ended] == ["new"]
    world.wait(RETURN_NS / SECOND - 3)
    assert [told.request_id for told in heard.ended] == ["new"]
    world.wait(1.5)
    assert [told.request_id for told in heard.ended] == ["new", "old"]
    world.tell(core, end("older", world.now, arrival_ns=1))
    assert len(heard.ended) == 3, "from now on nobody is awaited"


def test_an_agent_that_stops_closes_what_is_told_from_both_sides(heard: Heard) -> None:
    world = heard.world
    frontend, core = world.connect("frontend"), world.connect("core")
    world.connect("worker")
    world.tell(core, *(end(name, world.now) for name in ("both", "half")), progress("open", world.now, 1.0))
    world.tell(frontend, *(answered(name, world.now) for name in ("both", "other half")))
    assert heard.ended == []
    world.ledger.finish()
    assert [told.request_id for told in heard.ended] == ["both"]


@pytest.mark.parametrize("first", ["frontend", "core"])
@pytest.mark.parametrize("again", [set(), {"core"}, {"frontend"}, {"core", "frontend"}])
def test_what_one_agent_knew_by_half_the_next_one_completes(
    heard: Heard, again: set[str], first: str
) -> None:
    """What both sides told the agent before, or the only side that told anything, is no news."""
    world = heard.world
    world.ledger.listening_since_ns = world.now
    at = world.now - SECOND
    told = {
        "frontend": answered("r1", at, again="frontend" in again, **CONTEXT),
        "core": end("r1", at, again="core" in again),
    }
    for role in sorted(told, key=lambda role: role != first):
        world.tell(world.connect(role), told[role])
        world.wait(1)
    world.wait(60)
    assert len(heard.ended) == (0 if len(again) == 2 else 1)
    assert (world.value(families.REQUEST_DURATION) or 0) == len(heard.ended)
    assert world.value(families.TRACKED) == 0
    if heard.ended:
        (ended,) = heard.ended
        assert (ended.trace_id, ended.queue_ns, ended.output_tokens) == (TRACE, SECOND // 10, 20)


@pytest.mark.parametrize("role", ["frontend", "core"])
def test_half_of_an_end_that_was_told_before_is_no_news(heard: Heard, role: str) -> None:
    world = heard.world
    world.ledger.listening_since_ns = world.now
    speaker = world.connect(role)
    told = answered("r1", world.now, again=True) if role == "frontend" else end("r1", world.now, again=True)
    world.tell(speaker, told)
    world.wait(60)
    assert heard.ended == [] and not world.value(families.REQUEST_DURATION)
    assert not any(sample.value for sample in world.find(families.UNTRACKED))


def test_a_request_of_which_no_frontend_told_has_an_unknown_caller(heard: Heard) -> None:
    world = heard.world
    core = world.connect("core")
    world.tell(core, end("no frontend", world.now))
    hook = records.Capability(hook="frontend.requests", state="active")
    frontend = world.connect("frontend", capabilities=[hook])
    world.tell(frontend, start("told", world.now))
    world.tell(core, end("told", world.now), end("lost", world.now), end("answered", world.now))
    world.tell(frontend, answered("answered", world.now))
    world.wait(60)
    known = {told.request_id: told.caller_known for told in heard.ended}
    assert known == {"no frontend": True, "told": True, "lost": False, "answered": True}


def test_a_request_that_never_ran_has_no_phases(heard: Heard) -> None:
    core = heard.world.connect("core")
    aborted = end("r1", heard.world.now, outcome="abort", queue_ns=-1, prefill_ns=-1, decode_ns=-1)
    heard.world.tell(core, aborted)
    (told,) = heard.ended
    assert (told.outcome, told.queue_ns, told.prefill_ns, told.decode_ns) == ("abort", None, None, None)


def test_a_rejected_request_is_told_with_its_callers_context(heard: Heard) -> None:
    frontend = heard.world.connect("frontend")
    refused = records.RequestRefused(
        at=heard.world.now,
        error_type="admission",
        tenant="acme",
        external_id="x",
        trace_id=TRACE,
        span_id=CALLER,
        sampled=True,
        duration_ns=SECOND // 10,
    )
    heard.world.tell(frontend, refused)
    (told,) = heard.ended
    assert (told.request_id, told.external_id, told.outcome, told.error_type) == (
        "",
        "x",
        "rejected",
        "admission",
    )
    assert (told.trace_id, told.span_id, told.sampled) == (TRACE, CALLER, True)
    assert told.end_ns - told.begin_ns == SECOND // 10


def test_a_request_whose_engine_died_is_told(heard: Heard) -> None:
    world = heard.world
    frontend, core = world.connect("frontend"), world.connect("core")
    begun = world.now
    world.tell(frontend, start("r1", begun))
    world.tell(core, progress("r1", begun, 5.0))
    world.wait(2)
    world.kill(core)
    world.kill(frontend)
    world.wait(20)
    (told,) = heard.ended
    assert (told.outcome, told.error_type, told.queue_ns) == ("error", "engine", None)
    assert begun <= told.begin_ns <= told.end_ns <= begun + 3 * SECOND


def test_a_wrong_clock_offset_is_replaced_by_our_own(heard: Heard) -> None:
    core = heard.world.connect("core", clock_offset_ns=0)
    heard.world.tell(core, end("r1", heard.world.now))
    (told,) = heard.ended
    assert (told.end_ns + told.clock_offset_ns) / SECOND == pytest.approx(UNIX, abs=1)


def test_exemplars_wait_until_the_request_is_named(heard: Heard) -> None:
    world = heard.world
    core, worker = world.connect("core"), world.connect("worker")
    world.tell(core, end("r1", world.now, outcome="abort"))
    world.tell(worker, gpu("r1", world.now, 0.3, ended=True))
    world.wait(5)
    asked = (families.REQUEST_DURATION, families.REQUEST_QUEUE, families.KV_PEAK)
    assert world.value(families.REQUEST_DURATION, outcome="abort") == 1, "counted at once"
    assert [world.exemplars(family) for family in asked] == [[], [], []]
    (told,) = heard.ended
    told.exemplify([("trace_id", TRACE), ("request_id", "r1")])
    world._scraped = None
    for family in asked:
        (exemplar,) = world.exemplars(family)
        assert exemplar.labels == {"trace_id": TRACE, "request_id": "r1"}
    (wasted,) = world.exemplars(families.WASTED)
    assert wasted.labels["trace_id"] == TRACE
    assert world.value(families.REQUEST_DURATION, outcome="abort") == 1, "and not twice"


def test_of_two_that_are_named_late_the_newer_stays(heard: Heard) -> None:
    world = heard.world
    core = world.connect("core")
    for name in ("old", "new"):
        world.wait(1)
        world.tell(core, end(name, world.now))
    old, new = heard.ended
    new.exemplify([("trace_id", "2" * 32)])
    old.exemplify([("trace_id", "1" * 32)])
    world._scraped = None
    assert {e.labels["trace_id"] for e in world.exemplars(families.REQUEST_DURATION)} == {"2" * 32}


def test_without_a_policy_that_waits_exemplars_are_there_at_once() -> None:
    heard = Heard(World())
    core = heard.world.connect("core")
    heard.world.tell(core, end("r1", heard.world.now))
    (exemplar,) = heard.world.exemplars(families.REQUEST_DURATION)
    assert exemplar.labels == {"request_id": "r1"} and len(heard.ended) == 1
