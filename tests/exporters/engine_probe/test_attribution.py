"""How a step's time is divided: what goes in comes out, whatever the engine does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuglass_vllm import attribution
from gpuglass_vllm.attribution import Batch, Ledger, Step
from gpuglass_vllm.records import NO_TENANT, GpuProgress, StepSums, TenantSums
from gpuglass_vllm.work_model import BY_TOKENS, Phase, WorkModel

MODEL = WorkModel(
    Phase((3e-6,), 2e-10, 1e-10, 1e9, 1e5),
    Phase((2e-5,), 1e-10, 4e-9, 1e9, 1e5),
    "model",
)


def new(request_id: str, prompt: int, computed: int = 0, tenant: str = NO_TENANT) -> Any:
    """A request that the scheduler sends for the first time."""
    return SimpleNamespace(
        req_id=request_id,
        prompt_token_ids=[0] * prompt,
        num_computed_tokens=computed,
        sampling_params=SimpleNamespace(tenant=tenant),
    )


def output(
    fresh: list[Any] | None = None,
    cached: dict[str, int] | None = None,
    tokens: dict[str, int] | None = None,
    finished: tuple[str, ...] = (),
    resumed: tuple[str, ...] = (),
) -> Any:
    """A scheduler's output: `cached` has computed tokens by request."""
    tokens = tokens or {}
    cached = cached or {}
    return SimpleNamespace(
        scheduled_new_reqs=fresh or [],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=list(cached.values()), resumed_req_ids=set(resumed)
        ),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        finished_req_ids=set(finished),
    )


def tenant_of(params: Any) -> str:
    return str(params.tenant)


def step_sums(ledger: Ledger) -> StepSums:
    return next(record for record in ledger.sums("cuda") if isinstance(record, StepSums))


def progress(ledger: Ledger) -> dict[str, float]:
    result: dict[str, float] = {}
    for record in ledger.gains(False).records(0):
        result.update(zip(record.request_ids, record.gpu_ns, strict=True))
    return result


class Engine:
    """A scheduler that behaves: prompts in chunks, decoding, preemption with recomputation, endings."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.prompt: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.waiting: list[tuple[str, int, str]] = []
        self.preempted: set[str] = set()
        self.finished: list[str] = []
        self.count = 0

    def arrive(self, prompt: int, tenant: str) -> None:
        self.waiting.append((f"r{self.count}", prompt, tenant))
        self.count += 1

    def step(self, budget: int, resend: bool) -> Step:
        fresh, cached, tokens, resumed = [], {}, {}, []
        for request_id, computed in self.computed.items():
            if request_id in self.preempted:
                self.preempted.discard(request_id)
                if resend:
                    fresh.append(new(request_id, self.prompt[request_id]))
                    tokens[request_id] = self._take(request_id, 0, budget)
                    continue
                resumed.append(request_id)
                computed = 0
            cached[request_id] = computed
            tokens[request_id] = self._take(request_id, computed, budget)
        while self.waiting:
            request_id, prompt, tenant = self.waiting.pop()
            self.prompt[request_id] = prompt
            fresh.append(new(request_id, prompt, tenant=tenant))
            tokens[request_id] = self._take(request_id, 0, budget)
        finished, self.finished = tuple(self.finished), []
        return self.ledger.observe(
            Batch.of(output(fresh, cached, tokens, finished, tuple(resumed)), tenant_of)
        )

    def _take(self, request_id: str, computed: int, budget: int) -> int:
        tokens = max(1, min(budget, self.prompt[request_id] - computed))
        self.computed[request_id] = computed + tokens
        return tokens


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(1, 700), st.sampled_from(["", "a", "b"])),
        st.tuples(st.just("step"), st.floats(1e3, 1e9), st.integers(0, 40)),
        st.tuples(st.just("end"), st.integers(0, 30), st.none()),
        st.tuples(st.just("preempt"), st.integers(0, 30), st.none()),
        st.tuples(st.just("dummy"), st.floats(1e3, 1e9), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.booleans(), st.integers(0, 3), st.sampled_from([MODEL, BY_TOKENS]))
def test_what_goes_in_comes_out(actions: Any, resend: bool, lag: int, model: WorkModel) -> None:
    """Requests + residuals = time of the steps; tenants = requests; whatever lags behind."""
    ledger = Ledger(model, capacity=2)
    engine = Engine(ledger)
    pending: list[tuple[Step, float]] = []
    put = dummy = tenants = told_steps = 0.0
    requests: dict[str, float] = {}
    ended: list[str] = []
    sums: list[StepSums] = []

    def resolve(keep: int) -> None:
        while len(pending) > keep:
            step, ns = pending.pop(0)
            ledger.add(step, ns)

    def collect() -> None:
        nonlocal tenants
        for record in ledger.gains(False).records(0):
            requests.update(zip(record.request_ids, record.gpu_ns, strict=True))
            ended.extend(record.ended)
        for record in ledger.sums("cuda"):
            if isinstance(record, TenantSums):
                tenants += record.gpu_ns
            else:
                sums.append(record)

    for kind, first, second in actions:
        if kind == "arrive":
            engine.arrive(first, second)
        elif kind == "dummy":
            pending.append((Step(None), first))
            put += first
            dummy += first
        elif kind == "step":
            step = engine.step(128, resend)
            if step.run is None:
                resolve(0)
                ledger.end(step)
                continue
            step.padded = second
            pending.append((step, first))
            put += first
            told_steps += 1
        elif engine.computed:
            victim = sorted(engine.computed)[first % len(engine.computed)]
            if kind == "end":
                del engine.computed[victim]
                engine.preempted.discard(victim)
                engine.finished.append(victim)
            else:
                engine.preempted.add(victim)
        resolve(lag)
        if len(pending) % 2:
            collect()
    resolve(0)
    collect()
    residuals = sum(s.padding_ns + s.dummy_ns + s.unattributed_ns for s in sums)
    attributed = sum(s.attributed_ns for s in sums)
    assert sum(requests.values()) == pytest.approx(attributed, rel=1e-9, abs=1e-3)
    assert tenants == pytest.approx(attributed, rel=1e-9, abs=1e-3)
    assert attributed + residuals == pytest.approx(put, rel=1e-9, abs=1e-3)
    assert sum(s.dummy_ns for s in sums) == pytest.approx(dummy)
    assert sum(s.prefill_ns for s in sums) <= attributed * (1 + 1e-9)
    assert sum(s.unattributed_ns for s in sums) == 0
    assert all(value >= 0 for value in requests.values())
    assert len(ended) == len(set(ended))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.lists(st.floats(1e5, 1e7), min_size=2, max_size=30))
def test_a_row_of_steps_is_divided_like_its_steps(requests: int, start: int, times: list[float]) -> None:
    """What is added up per run equals dividing each step for itself."""
    ledger = Ledger(MODEL)
    contexts = {f"r{i}": start * (i + 1) for i in range(requests)}
    ledger.observe(Batch.of(output([new(i, c) for i, c in contexts.items()], {}, contexts), tenant_of))
    expected = dict.fromkeys(contexts, 0.0)
    for ns in times:
        step = ledger.observe(Batch.of(output([], dict(contexts), dict.fromkeys(contexts, 1)), tenant_of))
        ledger.add(step, ns)
        decode = MODEL.decode
        weights = {
            i: decode.token(requests) + (decode.per_token_context + decode.per_context) * (c + 1)
            for i, c in contexts.items()
        }
        for i, weight in weights.items():
            expected[i] += ns * weight / sum(weights.values())
            contexts[i] += 1
    assert progress(ledger) == pytest.approx(expected, rel=1e-9)
    assert step_sums(ledger).decode_tokens == requests * len(times)


def test_a_long_prompt_bears_most_of_its_step() -> None:
    ledger = Ledger(MODEL)
    ledger.add(ledger.observe(Batch.of(output([new("small", 8)], {}, {"small": 8}), tenant_of)), 1e6)
    mixed = output([new("long", 2000)], {"small": 8}, {"long": 2000, "small": 1})
    ledger.add(ledger.observe(Batch.of(mixed, tenant_of)), 10e6)
    times = progress(ledger)
    assert times["long"] > 0.95 * 10e6
    assert 1e6 < times["small"] < 1.1e6
    sums = step_sums(ledger)
    assert sums.prefill_tokens == 2008 and sums.decode_tokens == 1
    assert sums.prefill_ns == pytest.approx(times["long"] + 1e6)


def test_padding_takes_its_share_and_no_more() -> None:
    ledger = Ledger(BY_TOKENS)
    ledger.observe(Batch.of(output([new("a", 1), new("b", 1)], {}, {"a": 1, "b": 1}), tenant_of))
    step = ledger.observe(Batch.of(output([], {"a": 1, "b": 1}, {"a": 1, "b": 1}), tenant_of))
    step.padded = 6
    ledger.add(step, 8000)
    sums = step_sums(ledger)
    assert sums.padding_ns == pytest.approx(6000) and sums.padded_tokens == 6
    assert progress(ledger) == pytest.approx({"a": 1000, "b": 1000})


@pytest.mark.parametrize("resend", [False, True])
def test_recomputed_tokens_are_told_apart(resend: bool) -> None:
    """After a preemption, up to where it had been before: again; from there on: new."""
    ledger = Ledger(BY_TOKENS)
    ledger.add(ledger.observe(Batch.of(output([new("v", 100)], {}, {"v": 100}), tenant_of)), 100)
    ledger.add(ledger.observe(Batch.of(output([], {"v": 100}, {"v": 1}), tenant_of)), 1)
    if resend:
        again = output([new("v", 102, computed=32)], {}, {"v": 70})
    else:
        again = output([], {"v": 32}, {"v": 70}, resumed=("v",))
    ledger.add(ledger.observe(Batch.of(again, tenant_of)), 70)
    ledger.add(ledger.observe(Batch.of(output([], {"v": 102}, {"v": 1}), tenant_of)), 1)
    (record,) = ledger.gains(False).records(0)
    assert record.gpu_ns == pytest.approx([172])
    assert record.recompute_ns == pytest.approx([69])  # 32 to 101; the last token is new
    tenant = next(r for r in ledger.sums("cuda") if isinstance(r, TenantSums))
    assert tenant.recompute_ns == pytest.approx(69)


def test_a_rejected_draft_is_no_recomputation() -> None:
    ledger = Ledger(BY_TOKENS)
    ledger.add(ledger.observe(Batch.of(output([new("s", 10)], {}, {"s": 10}), tenant_of)), 10)
    ledger.add(ledger.observe(Batch.of(output([], {"s": 10}, {"s": 4}), tenant_of)), 4)
    ledger.add(ledger.observe(Batch.of(output([], {"s": 11}, {"s": 4}), tenant_of)), 4)
    (record,) = ledger.gains(False).records(0)
    assert record.recompute_ns == []
    assert record.gpu_ns == pytest.approx([18])


def test_an_ended_request_is_told_once_with_its_last_value() -> None:
    ledger = Ledger(BY_TOKENS)
    ledger.add(ledger.observe(Batch.of(output([new("a", 4)], {}, {"a": 4}), tenant_of)), 40)
    step = ledger.observe(Batch.of(output([new("b", 2)], {}, {"b": 2}, finished=("a",)), tenant_of))
    assert [r.ended for r in ledger.gains(False).records(0)] == [[]]
    ledger.add(step, 20)
    (record,) = ledger.gains(False).records(0)
    assert record == GpuProgress(at=0, request_ids=["b", "a"], gpu_ns=[20, 40], ended=["a"])
    assert ledger.gains(False).records(0) == []
    (record,) = ledger.gains(True).records(0)
    assert record.request_ids == ["b"]


def test_a_name_used_again_is_another_request() -> None:
    ledger = Ledger(BY_TOKENS)
    ledger.add(ledger.observe(Batch.of(output([new("a", 4)], {}, {"a": 4}), tenant_of)), 40)
    step = ledger.observe(
        Batch.of(output([new("a", 3, tenant="t")], {}, {"a": 3}, finished=("a",)), tenant_of)
    )
    ledger.add(step, 30)
    tenants = {r.tenant: r.gpu_ns for r in ledger.sums("cuda") if isinstance(r, TenantSums)}
    assert tenants == pytest.approx({"": 40, "t": 30})


def test_more_requests_than_slots_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "MAX_REQUESTS", 4)
    ledger = Ledger(BY_TOKENS, capacity=2)
    ids = [f"r{i}" for i in range(8)]
    ledger.add(
        ledger.observe(Batch.of(output([new(i, 1) for i in ids], {}, dict.fromkeys(ids, 1)), tenant_of)), 800
    )
    sums = step_sums(ledger)
    assert sums.attributed_ns == pytest.approx(400)
    assert sums.unattributed_ns == pytest.approx(400)
    assert len(progress(ledger)) == 4


def test_tenants_without_requests_are_forgotten_but_not_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "OTHER_TENANTS", 8)
    ledger = Ledger(BY_TOKENS, capacity=2)
    last: tuple[str, ...] = ()
    for number in range(40):
        name = f"r{number}"
        step = ledger.observe(
            Batch.of(output([new(name, 1, tenant=f"t{number}")], {}, {name: 1}, last), tenant_of)
        )
        ledger.add(step, 10)
        last = (name,)
    tenants = {r.tenant: r.gpu_ns for r in ledger.sums("cuda") if isinstance(r, TenantSums)}
    assert sum(tenants.values()) == pytest.approx(400)
    assert len(tenants) <= 9 and tenants["other"] > 0


def test_idleness_counts_only_while_requests_run_on() -> None:
    ledger = Ledger(BY_TOKENS)
    ledger.add(ledger.observe(Batch.of(output([new("a", 4)], {}, {"a": 4}), tenant_of)), 40, idle_ns=1e9)
    ledger.add(ledger.observe(Batch.of(output([], {"a": 4}, {"a": 1}), tenant_of)), 10, idle_ns=7)
    assert step_sums(ledger).idle_ns == 7


def test_records_fit_into_packets() -> None:
    import msgspec

    from gpuglass_vllm import records

    ledger = Ledger(BY_TOKENS)
    ids = [f"{i:05d}" + "x" * 200 for i in range(1000)]
    step = ledger.observe(Batch.of(output([new(i, 1) for i in ids], {}, dict.fromkeys(ids, 1)), tenant_of))
    ledger.add(step, 1e9 / 3)
    ledger.end(Step(None, ended=ledger.observe(Batch.of(output(finished=tuple(ids)), tenant_of)).ended))
    told = ledger.gains(False).records(0)
    assert sum(len(r.request_ids) for r in told) == 1000
    assert max(len(msgspec.msgpack.encode(r)) for r in told) < records.MAX_PACKET - 1024
