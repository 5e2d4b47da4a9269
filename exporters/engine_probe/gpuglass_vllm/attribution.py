"""Divide each step's time over the requests that ran in it. Pure: no engine, no device, no clock, no lock.

In go the scheduler's outputs, one per step (`Batch.of`, then `Ledger.observe`), and, later and in the same
order, how long each step took (`Ledger.add`). Out come GPU time per request (absolute) and sums per tenant
and for all steps (drained). What is put in comes out: requests + padding + unattributed + dummy = time of the
steps, and tenants = requests.

A batch that only decodes repeats for many steps, and its work grows by the same amount each time. Such a row
of steps is one `Run`: a step adds two numbers to it, and only when the batch changes the run is divided over
its requests. So the cost of a step does not depend on the number of requests, except where the batch changes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np

from gpuglass_vllm.identity import short_id
from gpuglass_vllm.records import (
    BATCH_REQUESTS,
    NO_TENANT,
    STEP_SECONDS,
    GpuProgress,
    StepSums,
    TenantSums,
)
from gpuglass_vllm.work_model import BY_TOKENS, WorkModel

MAX_REQUESTS = 16384
"""Open requests that are told apart; the share of more goes to `unattributed_ns`."""

MAX_ENDED = 8192
"""Ended requests whose last value waits to be sent; of more, the oldest are forgotten (tenants keep their
sums)."""

IDS_PER_RECORD = 160
"""Requests in one `GpuProgress`: with ids of full length it stays below `records.MAX_PACKET`."""

OTHER_TENANTS = 4096
"""Tenants that are told apart between two rounds of forgetting those without requests."""

_STEP_BOUNDS_NS = tuple(bound * 1e9 for bound in STEP_SECONDS)


class New(NamedTuple):
    """A request that the scheduler sends for the first time, or again after a preemption."""

    id: str
    computed: int
    """Tokens of it that are computed already."""
    prompt: int
    """Tokens to compute before it decodes."""
    tenant: str


class Batch(msgspec.Struct):
    """What a step was to do: what is kept of a `SchedulerOutput` until its time is known.

    Made on the engine's thread, so nothing is worked out here, and lists are the scheduler's own (it makes
    new ones for each step). Prompts are not kept. A struct because it is made without a Python call.
    """

    new: tuple[New, ...]
    ids: list[str]
    """Requests that were sent before; `computed` has the tokens that are computed of each."""
    computed: list[int]
    resumed: Collection[str]
    finished: tuple[str, ...]
    tokens_of: dict[str, int]
    total: int

    @classmethod
    def of(cls, output: Any, tenant_of: Callable[[Any], str]) -> Batch:
        """From a `SchedulerOutput` (by its fields; any object that has them will do)."""
        cached = output.scheduled_cached_reqs
        new, finished = output.scheduled_new_reqs, output.finished_req_ids
        return cls(
            tuple([_new(request, tenant_of) for request in new]) if new else (),
            cached.req_ids,
            cached.num_computed_tokens,
            getattr(cached, "resumed_req_ids", None) or (),
            tuple(finished) if finished else (),
            output.num_scheduled_tokens,
            output.total_num_scheduled_tokens,
        )

    @property
    def runs(self) -> bool:
        """Whether there is anything to compute; if not, it only tells which requests ended."""
        return self.total > 0 and bool(self.ids or self.new)


def _new(request: Any, tenant_of: Callable[[Any], str]) -> New:
    known = (getattr(request, "prefill_token_ids", None), request.prompt_token_ids)
    length = max((len(tokens) for tokens in known if tokens is not None), default=0)
    embeds = getattr(request, "prompt_embeds", None)
    if length == 0 and embeds is not None:
        length = int(embeds.shape[0])
    params = request.sampling_params
    if params is None:
        params = getattr(request, "pooling_params", None)
    return New(request.req_id, request.num_computed_tokens, length, tenant_of(params))


class Run:
    """A batch: one step, or a row of steps in which the same requests decode one token each.

    In step k of a run, request i has weight `base[i]` + k × `slope`.
    """

    __slots__ = (
        "base",
        "base_sum",
        "computed",
        "computed_sum",
        "decode_tokens",
        "flops",
        "flops_slope",
        "ids",
        "lost",
        "pad_weight",
        "prefill",
        "prefill_sum",
        "prefill_tokens",
        "rate",
        "rate_k",
        "recompute",
        "requests",
        "slope",
        "slots",
        "steady",
        "tokens",
    )

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.slots: Any = None
        self.base: Any = None
        self.recompute: Any = None
        self.computed: Any = None
        self.slope = 0.0
        self.base_sum = 0.0
        self.prefill: Any = None
        """Which requests compute their prompts, a mask in the order of `slots`; None: none does."""
        self.prefill_sum = 0.0
        self.lost = 0.0
        self.pad_weight = 0.0
        self.computed_sum = 0
        self.requests = 0
        self.tokens = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.flops = 0.0
        self.flops_slope = 0.0
        self.steady = False
        self.rate = 0.0
        self.rate_k = 0.0


@dataclass(slots=True)
class Step:
    """One step of a run, from scheduling until its time is known. `run` None: no request ran (a dummy)."""

    run: Run | None
    k: int = 0
    padded: int = 0
    """Tokens that were computed beside those of requests, to fill a captured batch."""
    ended: tuple[int, ...] = ()
    """Slots that are free once this step is divided."""
    host_fed: bool = False
    """The host launched it piece by piece: the device may have waited within it."""
    continues: bool = False
    """Requests of the step before run on: a pause between the two is idleness."""


@dataclass(slots=True)
class _Totals:
    steps: int = 0
    attributed: float = 0.0
    padding: float = 0.0
    dummy: float = 0.0
    unattributed: float = 0.0
    idle: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    padded_tokens: int = 0
    prefill: float = 0.0
    host_fed: float = 0.0
    flops: float = 0.0
    request_steps: int = 0
    seconds: list[int] = field(default_factory=lambda: [0] * (len(STEP_SECONDS) + 1))
    requests: list[int] = field(default_factory=lambda: [0] * (len(BATCH_REQUESTS) + 1))


@dataclass(frozen=True, slots=True)
class Gains:
    """Requests and their GPU time so far, taken from a ledger at one moment. Parallel lists."""

    ids: list[str]
    gpu_ns: list[float]
    recompute_ns: list[float]
    ended: list[tuple[str, float, float]]
    """(id, GPU time, of that recomputation) of requests that will not change any more."""

    def records(self, at: int) -> list[GpuProgress]:
        """As they are sent."""
        ended = [short_id(request_id) for request_id, _, _ in self.ended]
        ids = [short_id(request_id) for request_id in self.ids] + ended
        gpu = self.gpu_ns + [gpu_ns for _, gpu_ns, _ in self.ended]
        recompute = self.recompute_ns + [recompute_ns for _, _, recompute_ns in self.ended]
        result = []
        for start in range(0, len(ids), IDS_PER_RECORD):
            part = slice(start, start + IDS_PER_RECORD)
            here = set(ids[part])
            result.append(
                GpuProgress(
                    at=at,
                    request_ids=ids[part],
                    gpu_ns=gpu[part],
                    recompute_ns=recompute[part] if any(recompute[part]) else [],
                    ended=[request_id for request_id in ended if request_id in here],
                )
            )
        return result


class Ledger:
    """GPU time by request and tenant on one rank. The caller serialises all calls."""

    def __init__(self, model: WorkModel = BY_TOKENS, capacity: int = 512) -> None:
        self.model = model
        self._slot_of: dict[str, int] = {}
        self._ids: list[str] = [""] * capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._gpu = np.zeros(capacity)
        self._recompute = np.zeros(capacity)
        self._gpu_told = np.zeros(capacity)
        self._recompute_told = np.zeros(capacity)
        self._changed = np.zeros(capacity, dtype=bool)
        self._high = np.zeros(capacity, dtype=np.int64)
        self._lost_until = np.zeros(capacity, dtype=np.int64)
        self._prefill_until = np.zeros(capacity, dtype=np.int64)
        self._tenant = np.zeros(capacity, dtype=np.int64)
        self._tenants: list[str] = [NO_TENANT]
        self._tenant_index: dict[str, int] = {NO_TENANT: 0}
        self._tenant_ns: dict[str, list[float]] = {}
        self._ended: deque[tuple[str, float, float]] = deque(maxlen=MAX_ENDED)
        self._observed: Run | None = None
        self._k = 0
        self._adding: Run | None = None
        self._totals = _Totals()

    # What the scheduler says

    def observe(self, batch: Batch) -> Step:
        """The next step's batch. A batch that computes nothing gives a step without a run, for `end`."""
        ids = batch.ids
        run = self._observed
        if (
            run is not None
            and run.steady
            and batch.total == run.requests == len(ids)
            and not batch.new
            and not batch.finished
            and ids == run.ids
        ):
            k = self._k + 1
            if sum(batch.computed) == run.computed_sum + k * run.requests:
                self._k = k
                return Step(run, k, continues=True)
        return self._changed_batch(batch)

    def _changed_batch(self, batch: Batch) -> Step:
        if self._observed is not None and self._observed.steady:
            before = self._observed
            self._high[before.slots] = before.computed + (self._k + 1)
        self._observed = None
        ended = []
        for request_id in batch.finished:
            slot = self._slot_of.pop(request_id, None)
            if slot is not None:
                ended.append(slot)
        for new in batch.new:
            self._admit(new)
        for request_id in batch.resumed:
            slot = self._slot_of.get(request_id)
            if slot is not None:
                self._resume(slot)
        step = Step(None, ended=tuple(ended), continues=bool(batch.ids))
        if batch.runs:
            ids = [new.id for new in batch.new] + batch.ids
            computed = [new.computed for new in batch.new] + batch.computed
            step.run = self._run(ids, computed, batch.tokens_of, batch.total, not batch.new)
            self._observed, self._k = step.run, 0
        return step

    def _run(
        self, ids: list[str], computed: list[int], tokens_of: dict[str, int], total: int, cached_only: bool
    ) -> Run:
        """Weights of a batch. Few numpy calls: where requests come and go this is done in every step."""
        slot_of = self._slot_of
        run = Run()
        run.ids = ids
        run.requests = len(ids)
        places: list[Any] = list(map(slot_of.get, ids))
        # As many tokens as requests: one each, for nobody is scheduled for less.
        counts = [1] * total if total == len(ids) else [tokens_of.get(i, 0) for i in ids]
        run.tokens = total
        run.pad_weight = self.model.decode.token(run.tokens)
        context = np.array(computed, dtype=np.int64)
        if None in places:
            self._unknown(run, places, counts, context)
            kept = [index for index, place in enumerate(places) if place is not None]
            places = [places[index] for index in kept]
            counts = [counts[index] for index in kept]
            context = context[kept]
        slots = np.array(places, dtype=np.int64)
        until = self._prefill_until[slots]
        prefill = context < until
        if prefill.any():
            self._mixed(run, slots, np.array(counts, dtype=np.int64), context, prefill)
        elif max(counts, default=0) <= 1:
            self._decoding(run, slots, context, cached_only)
        else:
            self._mixed(run, slots, np.array(counts, dtype=np.int64), context, prefill)
        run.slots, run.computed = slots, context
        run.base_sum = float(run.base.sum()) + run.lost
        return run

    def _decoding(self, run: Run, slots: Any, context: Any, cached_only: bool) -> None:
        """Every request computes one token behind its prompt. That may be the begin of a row of steps."""
        phase = self.model.decode
        slope = phase.per_token_context + phase.per_context
        run.base = context * slope
        run.base += run.pad_weight + slope
        looked_at = int(context.sum())
        run.decode_tokens += len(slots)
        run.flops += phase.flops_per_token * len(slots) + phase.flops_per_token_context * (
            looked_at + len(slots)
        )
        self._high[slots] = context + 1
        if cached_only and len(slots) == run.requests:
            run.steady = True
            run.computed_sum = looked_at
            run.slope = slope
            run.flops_slope = phase.flops_per_token_context * run.requests

    def _mixed(self, run: Run, slots: Any, tokens: Any, context: Any, prefill: Any) -> None:
        """Some compute prompts, perhaps again, or several tokens at once."""
        model = self.model
        # A token looks at what is before it and at itself: on average half of its own chunk.
        looked_at = tokens * (context + (tokens + 1) * 0.5)
        read = context + tokens
        run.base = np.where(
            prefill,
            model.prefill.token(run.tokens) * tokens
            + model.prefill.per_token_context * looked_at
            + model.prefill.per_context * read,
            run.pad_weight * tokens
            + model.decode.per_token_context * looked_at
            + model.decode.per_context * read,
        )
        prefill_tokens = int(tokens[prefill].sum())
        run.prefill_tokens += prefill_tokens
        run.decode_tokens += int(tokens.sum()) - prefill_tokens
        run.prefill_sum = float(run.base[prefill].sum())
        run.prefill = prefill
        flops = np.where(
            prefill,
            model.prefill.flops_per_token * tokens + model.prefill.flops_per_token_context * looked_at,
            model.decode.flops_per_token * tokens + model.decode.flops_per_token_context * looked_at,
        )
        run.flops += float(flops.sum())
        # What was lost lies below `_prefill_until`, so only here tokens can be computed again.
        again = np.clip(self._lost_until[slots] - context, 0, tokens)
        if again.any():
            run.recompute = again / np.maximum(tokens, 1)
        self._high[slots] = context + np.where(prefill, tokens, np.minimum(tokens, 1))

    def _unknown(self, run: Run, places: list[Any], counts: list[int], context: Any) -> None:
        """Requests beyond `MAX_REQUESTS`: their share is not attributed. Prompts are told by their size."""
        for place, tokens, before in zip(places, counts, context.tolist(), strict=True):
            if place is None:
                phase = self.model.prefill if tokens > 1 else self.model.decode
                looked_at = tokens * (before + (tokens + 1) * 0.5)
                run.lost += phase.token(run.tokens) * tokens + phase.per_token_context * looked_at
                run.lost += phase.per_context * (before + tokens)
                run.flops += phase.flops_per_token * tokens + phase.flops_per_token_context * looked_at
                run.prefill_tokens += tokens if tokens > 1 else 0
                run.decode_tokens += tokens if tokens <= 1 else 0

    def _admit(self, new: New) -> None:
        slot = self._slot_of.get(new.id)
        if slot is not None:  # one way of resuming is to send the request again
            self._resume(slot)
            self._prefill_until[slot] = max(self._prefill_until[slot], new.prompt)
            return
        slot = self._take()
        if slot is None:
            return
        self._slot_of[new.id] = slot
        self._ids[slot] = new.id
        self._prefill_until[slot] = new.prompt
        self._tenant[slot] = self._tenant_number(new.tenant)

    def _resume(self, slot: int) -> None:
        lost = self._high[slot]
        self._lost_until[slot] = max(self._lost_until[slot], lost)
        self._prefill_until[slot] = max(self._prefill_until[slot], lost)

    def _take(self) -> int | None:
        if not self._free:
            size = len(self._ids)
            if size >= MAX_REQUESTS:
                return None
            self._ids += [""] * size
            self._free = list(range(2 * size - 1, size - 1, -1))
            for name in _ARRAYS:
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        return self._free.pop()

    def _tenant_number(self, tenant: str) -> int:
        number = self._tenant_index.get(tenant)
        if number is None:
            if len(self._tenants) >= OTHER_TENANTS:
                self._forget_tenants()
            number = self._tenant_index[tenant] = len(self._tenants)
            self._tenants.append(tenant)
        return number

    def _forget_tenants(self) -> None:
        """Number the tenants anew, leaving out those without an open request."""
        self._fold_tenants()
        open_slots = [slot for slot, request_id in enumerate(self._ids) if request_id]
        names = {slot: self._tenants[self._tenant[slot]] for slot in open_slots}
        self._tenants = [NO_TENANT, *sorted(set(names.values()) - {NO_TENANT})]
        self._tenant_index = {name: number for number, name in enumerate(self._tenants)}
        for slot, name in names.items():
            self._tenant[slot] = self._tenant_index[name]

    # What the clock says

    def add(self, step: Step, busy_ns: float, idle_ns: float = 0.0, unattributed_ns: float = 0.0) -> None:
        """A step took `busy_ns`. Before it, or before its forward pass, the stream was idle for `idle_ns`."""
        totals = self._totals
        run = step.run
        if run is not self._adding:
            self._settle()
            self._adding = run
        totals.steps += 1
        totals.unattributed += unattributed_ns
        if step.host_fed:
            totals.host_fed += busy_ns
        totals.seconds[bisect_left(_STEP_BOUNDS_NS, busy_ns)] += 1
        if run is None:
            totals.dummy += busy_ns
        else:
            if step.continues:
                totals.idle += idle_ns
            k = step.k
            weight = run.base_sum + k * run.slope * run.requests
            padding = step.padded * run.pad_weight
            rate = busy_ns / (weight + padding) if weight > 0 else 0.0
            run.rate += rate
            run.rate_k += k * rate
            lost = run.lost * rate if weight > 0 else busy_ns
            padding_ns = padding * rate
            totals.padding += padding_ns
            totals.unattributed += lost
            totals.attributed += max(0.0, busy_ns - padding_ns - lost)
            totals.prefill += run.prefill_sum * rate
            totals.prefill_tokens += run.prefill_tokens
            totals.decode_tokens += run.decode_tokens
            totals.padded_tokens += step.padded
            totals.flops += run.flops + k * run.flops_slope
            totals.request_steps += run.requests
            totals.requests[bisect_left(BATCH_REQUESTS, run.requests)] += 1
        if step.ended:
            self.end(step)

    def end(self, step: Step) -> None:
        """Forget the requests that ended before this step; for steps that took no time at all."""
        for slot in step.ended:
            self._settle_if(slot)
            request_id = self._ids[slot]
            self._fold(slot)
            self._ended.append((request_id, float(self._gpu[slot]), float(self._recompute[slot])))
            self._ids[slot] = ""
            for name in _ARRAYS:
                getattr(self, name)[slot] = 0
            self._free.append(slot)

    def _settle_if(self, slot: int) -> None:
        if self._adding is not None and slot in self._adding.slots:
            self._settle()

    def _settle(self) -> None:
        """Divide the time of the run that is being added to over its requests."""
        run = self._adding
        if run is None or run.rate == 0.0:
            return
        share = run.base * run.rate
        if run.rate_k:
            share += run.slope * run.rate_k
        self._gpu[run.slots] += share
        if run.recompute is not None:
            self._recompute[run.slots] += share * run.recompute
        self._changed[run.slots] = True
        run.rate = run.rate_k = 0.0

    @staticmethod
    def shares(step: Step, busy_ns: float) -> list[float]:
        """What each request of a step gets of its time (ns), in the order of `Run.ids`.

        Empty if some of them are not told apart.
        """
        run = step.run
        if run is None or len(run.slots) != run.requests:
            return []
        weight = run.base_sum + step.k * run.slope * run.requests + step.padded * run.pad_weight
        if weight <= 0:
            return []
        shares: list[float] = ((run.base + step.k * run.slope) * (busy_ns / weight)).tolist()
        return shares

    # What is told

    def gains(self, everything: bool) -> Gains:
        """Requests whose GPU time has changed since the last call (or all open ones that have some)."""
        self._settle()
        if everything:
            self._changed[
                [slot for slot, request_id in enumerate(self._ids) if request_id and self._gpu[slot]]
            ] = True
        slots = np.flatnonzero(self._changed)
        self._changed[slots] = False
        ended = list(self._ended)
        self._ended.clear()
        return Gains(
            [self._ids[slot] for slot in slots],
            self._gpu[slots].tolist(),
            self._recompute[slots].tolist(),
            ended,
        )

    def sums(self, clock: str) -> list[StepSums | TenantSums]:
        """What was added since the last call; each increase is given exactly once."""
        self._settle()
        self._fold_tenants()
        result: list[StepSums | TenantSums] = [
            TenantSums(tenant=tenant, gpu_ns=gpu_ns, recompute_ns=recompute_ns)
            for tenant, (gpu_ns, recompute_ns) in self._tenant_ns.items()
        ]
        self._tenant_ns = {}
        totals = self._totals
        if totals.steps or totals.unattributed:
            result.append(
                StepSums(
                    clock=clock,
                    steps=totals.steps,
                    attributed_ns=totals.attributed,
                    padding_ns=totals.padding,
                    dummy_ns=totals.dummy,
                    unattributed_ns=totals.unattributed,
                    idle_ns=totals.idle,
                    prefill_tokens=totals.prefill_tokens,
                    decode_tokens=totals.decode_tokens,
                    padded_tokens=totals.padded_tokens,
                    prefill_ns=totals.prefill,
                    host_fed_ns=totals.host_fed,
                    flops=totals.flops,
                    seconds=totals.seconds,
                    requests=totals.requests,
                    request_steps=totals.request_steps,
                )
            )
            self._totals = _Totals()
        return result

    def _fold_tenants(self) -> None:
        """Move what requests gained into their tenants' sums."""
        gained = self._gpu - self._gpu_told
        slots = np.flatnonzero(gained)
        if not len(slots):
            return
        again = self._recompute[slots] - self._recompute_told[slots]
        numbers = self._tenant[slots]
        by_tenant = np.bincount(numbers, weights=gained[slots])
        again_by_tenant = np.bincount(numbers, weights=again)
        for number in np.flatnonzero(by_tenant):
            self._tenant_add(self._tenants[number], float(by_tenant[number]), float(again_by_tenant[number]))
        self._gpu_told[slots] = self._gpu[slots]
        self._recompute_told[slots] = self._recompute[slots]

    def _fold(self, slot: int) -> None:
        gained = float(self._gpu[slot] - self._gpu_told[slot])
        if gained:
            again = float(self._recompute[slot] - self._recompute_told[slot])
            self._tenant_add(self._tenants[self._tenant[slot]], gained, again)

    def _tenant_add(self, tenant: str, gpu_ns: float, recompute_ns: float) -> None:
        if tenant not in self._tenant_ns and len(self._tenant_ns) >= OTHER_TENANTS:
            tenant = "other"
        total = self._tenant_ns.setdefault(tenant, [0.0, 0.0])
        total[0] += gpu_ns
        total[1] += recompute_ns


_ARRAYS = (
    "_gpu",
    "_recompute",
    "_gpu_told",
    "_recompute_told",
    "_changed",
    "_high",
    "_lost_until",
    "_prefill_until",
    "_tenant",
)
