"""The worker's steps, driven as vLLM drives them, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gpuglass_vllm import gpu_clock, worker
from gpuglass_vllm.gpu_clock import WallClock
from gpuglass_vllm.records import OutOfMemory, StepSample, StepSums
from gpuglass_vllm.step_samples import Noted
from gpuglass_vllm.tenants import OpenTenants
from gpuglass_vllm.worker import Probe, WorkerSource, batch_order

from .test_attribution import new, output


class Link:
    def __init__(self) -> None:
        self.events: list[Any] = []
        self.stopping = False

    def event(self, record: Any) -> None:
        self.events.append(record)


@pytest.fixture
def probe() -> Probe:
    now = [0]

    def clock() -> int:
        now[0] += 1000
        return now[0]

    runner = SimpleNamespace(execute_model_state=None, input_batch=SimpleNamespace(req_ids=["a", "b"]))
    probe = Probe(SimpleNamespace(model_runner=runner, vllm_config=None))
    probe.clock = WallClock[Noted](clock)
    probe.live = True
    probe.link = Link()  # type: ignore[assignment]
    for hook in (worker.STEPS, worker.PADDING, worker.OUT_OF_MEMORY, worker.SAMPLES):
        hook.activate()
    return probe


def step(probe: Probe, scheduled: Any, result: Any = None) -> None:
    probe.execute((scheduled,), {})
    probe.executed((scheduled,), {}, result, None)
    if result is None:
        probe.sample((None,), {})
        probe.sampled((None,), {}, object(), None)


def sums(probe: Probe) -> StepSums:
    return next(record for record in WorkerSource(probe).sums() if isinstance(record, StepSums))


def ended(probe: Probe) -> list[str]:
    return [name for record in WorkerSource(probe).states(False) for name in getattr(record, "ended", [])]


def test_a_step_is_forward_pass_and_sampling(probe: Probe) -> None:
    step(probe, output([new("a", 4)], {}, {"a": 4}))
    step(probe, output([], {"a": 4}, {"a": 1}))
    told = sums(probe)
    assert told.clock == "wall"
    assert told.steps == 2 and told.prefill_tokens == 4 and told.decode_tokens == 1
    assert told.attributed_ns == 4000


@pytest.mark.parametrize(("clock", "calls"), [("wall", ["sample", "sampled"]), ("cuda", ["sampled"])])
def test_only_a_clock_of_the_host_is_told_that_sampling_begins(
    monkeypatch: pytest.MonkeyPatch, probe: Probe, clock: str, calls: list[str]
) -> None:
    seen: list[str] = []
    for name in ("sample", "sampled"):
        monkeypatch.setattr(Probe, name, lambda *_, name=name: seen.append(name))

    class Worker:
        def sample_tokens(self, grammar: Any) -> str:
            return f"tokens by {grammar}"

    worker._wrap_sampling(Worker, clock)
    engine = Worker()
    setattr(engine, worker._PROBE, probe)
    assert engine.sample_tokens("g") == "tokens by g"
    assert seen == calls


def test_a_result_without_sampling_ends_the_step(probe: Probe) -> None:
    """Pooling models, and versions that sample within `execute_model`."""
    step(probe, output([new("a", 4)], {}, {"a": 4}), result=object())
    assert sums(probe).steps == 1


def test_the_output_may_be_a_keyword(probe: Probe) -> None:
    scheduled = output([new("a", 4)], {}, {"a": 4})
    probe.execute((), {"scheduler_output": scheduled})
    probe.executed((), {"scheduler_output": scheduled}, object(), None)
    assert sums(probe).steps == 1


def test_nothing_is_recorded_before_the_engine_is_ready(probe: Probe) -> None:
    probe.live = False
    step(probe, output([new("a", 4)], {}, {"a": 4}))
    probe.dummy((), {})
    probe.sampled((), {}, None, None)
    assert list(WorkerSource(probe).sums()) == []


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_padding_is_what_the_runner_computed_beyond_the_scheduled(probe: Probe, runner: str) -> None:
    state = (
        SimpleNamespace(hidden_states=SimpleNamespace(shape=(8, 128)))
        if runner == "v1"
        else SimpleNamespace(input_batch=SimpleNamespace(num_tokens_after_padding=8), hidden_states=None)
    )
    probe.worker.model_runner.execute_model_state = state
    step(probe, output([new("a", 2)], {}, {"a": 2}))
    told = sums(probe)
    assert told.padded_tokens == 6
    assert told.padding_ns == pytest.approx(told.attributed_ns * 3)


def test_dummy_steps_belong_to_nobody(probe: Probe) -> None:
    probe.dummy((), {})
    probe.sampled((), {}, None, None)
    told = sums(probe)
    assert told.steps == 1 and told.dummy_ns == 1000 and told.attributed_ns == 0


def test_a_request_that_ends_with_an_empty_step_is_told(probe: Probe) -> None:
    step(probe, output([new("a", 4)], {}, {"a": 4}))
    probe.execute((output(finished=("a",)),), {})
    probe.executed((None,), {}, object(), None)
    assert ended(probe) == ["a"]
    assert ended(probe) == []


def test_a_request_that_ends_is_told_with_the_next_step_too(probe: Probe) -> None:
    step(probe, output([new("a", 4)], {}, {"a": 4}))
    step(probe, output([new("b", 4)], {}, {"b": 4}, finished=("a",)))
    assert ended(probe) == ["a"]


def test_a_failed_step_leaves_no_time_and_no_request_behind(probe: Probe) -> None:
    step(probe, output([new("a", 4)], {}, {"a": 4}))
    failing = output([new("b", 4)], {}, {"b": 4}, finished=("a",))
    probe.execute((failing,), {})
    probe.cancel((failing,), {}, RuntimeError("broken"), None)
    assert sums(probe).steps == 1
    assert ended(probe) == ["a"]


def test_steps_without_room_lose_no_end_of_a_request(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link's thread does not come to take steps away: what ended meanwhile is forgotten later."""
    monkeypatch.setattr(gpu_clock, "MAX_OUTSTANDING", 2)
    step(probe, output([new("a", 4)], {}, {"a": 4}))
    step(probe, output([], {"a": 4}, {"a": 1}))
    step(probe, output([new("b", 4)], {}, {"b": 4}, finished=("a",)))
    assert sums(probe).steps == 2
    step(probe, output([], {"b": 4}, {"b": 1}))
    assert ended(probe) == ["a"]
    told = sums(probe)
    assert told.steps == 1 and told.unattributed_ns == 2000, "nobody was told of b"


def test_the_longest_step_and_those_with_new_requests_are_told_one_by_one(probe: Probe) -> None:
    step(probe, output([new("a", 4)], {}, {"a": 4}))
    step(probe, output([new("b", 9)], {"a": 4}, {"a": 1, "b": 9}))
    for computed in (5, 6):
        step(probe, output([], {"a": computed, "b": computed + 4}, {"a": 1, "b": 1}))
    list(WorkerSource(probe).states(False))
    told: list[StepSample] = probe.link.events  # type: ignore[union-attr]
    assert [sample.step for sample in told] == [1, 2, 3]
    mixed = told[1]
    assert (mixed.request_ids, mixed.tokens, mixed.phases) == (["b", "a"], [9, 1], ["prefill", "decode"])
    assert sum(mixed.gpu_ns) == pytest.approx(2000)
    assert mixed.gpu_ns == pytest.approx([1800, 200])
    assert mixed.requests == 2 and mixed.scheduled_tokens == 10
    assert mixed.begin_ns <= mixed.at and mixed.tid == probe.tid > 0
    assert told[2].phases == ["decode", "decode"]
    probe.link.events.clear()  # type: ignore[union-attr]
    list(WorkerSource(probe).states(False))
    assert probe.link.events == [], "each is told once"  # type: ignore[union-attr]


def test_the_tenant_of_all_open_requests_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuglass_vllm.tenants.MAX_OPEN", 3)
    tenants = OpenTenants()
    assert tenants.single is None
    tenants.begin("a", "red")
    tenants.begin("a", "blue")
    tenants.begin("b", "red")
    assert tenants.single == "red"
    tenants.begin("c", "blue")
    assert tenants.single is None and tenants.of(["c", "x", "a"]) == ["blue", "", "red"]
    tenants.end("c")
    assert tenants.single == "red"
    tenants.begin("c", "red")
    tenants.begin("too many", "red")
    assert tenants.single is None
    for name in ("a", "b", "c", "too many"):
        tenants.end(name)
    tenants.begin("d", "")
    assert tenants.single == ""


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


def test_out_of_memory_names_the_batch(probe: Probe) -> None:
    tokens = {f"r{i}": i + 1 for i in range(40)}
    scheduled = output([new(i, 1) for i in tokens], {}, tokens)
    probe.execute((scheduled,), {})
    error = OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")
    probe.failed((scheduled,), {}, error, None)
    (event,) = probe.link.events  # type: ignore[union-attr]
    assert isinstance(event, OutOfMemory)
    assert event.requested == int(2.5 * 2**30)
    assert len(event.request_ids) == 16
    assert event.request_ids[0] == "r39" and event.tokens[0] == 40


def test_out_of_memory_while_sampling_names_the_batch_too(probe: Probe) -> None:
    scheduled = output([new("a", 4)], {}, {"a": 4})
    probe.execute((scheduled,), {})
    probe.executed((scheduled,), {}, None, None)
    probe.sampling_failed((None,), {}, OutOfMemoryError("no number here"), None)
    (event,) = probe.link.events  # type: ignore[union-attr]
    assert event.request_ids == ["a"] and event.requested == 0


def test_other_errors_are_not_out_of_memory(probe: Probe) -> None:
    scheduled = output([new("a", 4)], {}, {"a": 4})
    probe.failed((scheduled,), {}, ValueError("Tried to allocate 2.50 GiB"), None)
    assert probe.link.events == []  # type: ignore[union-attr]


def test_the_batch_order_is_the_runners(probe: Probe) -> None:
    runner = probe.worker.model_runner
    assert batch_order(runner, 1) == ["a"]
    runner.execute_model_state = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["z", "y"]))
    assert batch_order(runner, 2) == ["z", "y"]


def test_allocator_statistics_come_from_one_call() -> None:
    from gpuglass_vllm import allocator

    nested = {
        name: {"all": {"current": number, "peak": 99}}
        for number, name in enumerate(
            ["allocated_bytes", "active_bytes", "reserved_bytes", "inactive_split_bytes"]
        )
    } | {"num_alloc_retries": 7, "num_ooms": 1}
    state = allocator.state(nested, 5)
    assert (state.allocated, state.active, state.reserved, state.inactive_split) == (0, 1, 2, 3)
    assert (state.at, state.retries, state.ooms) == (5, 7, 1)
    with pytest.raises(KeyError):
        allocator.state({}, 0)
