"""Some steps are told one by one: what the engine's thread notes of each, the records of the chosen ones."""

from __future__ import annotations

from dataclasses import dataclass

from gpuglass_vllm import records
from gpuglass_vllm.attribution import Batch, Ledger, Run, Step
from gpuglass_vllm.identity import short_id

FIRSTS = 4
"""Steps per flush that are told because a request began in them; beside them the longest one is told."""


@dataclass(slots=True)
class Noted:
    """One step as the engine's thread saw it. All else is worked out on the link's thread."""

    batch: Batch | None
    """None: a step without requests."""
    number: int
    begin_ns: int = 0
    end_ns: int = 0
    padded: int = 0
    replays: int = 0
    """Captured graphs that were replayed."""
    timed: bool = True


@dataclass(frozen=True, slots=True)
class _Told:
    noted: Noted
    step: Step
    run: Run
    busy_ns: float


class StepSamples:
    """Chooses steps between two flushes: some in which requests began, and the longest. For one thread."""

    def __init__(self) -> None:
        self._firsts: list[_Told] = []
        self._longest: _Told | None = None

    def see(self, noted: Noted, step: Step, busy_ns: float) -> None:
        """A step's time is known."""
        if step.run is None or noted.batch is None:
            return
        longest = self._longest
        if noted.batch.new and len(self._firsts) < FIRSTS:
            self._firsts.append(_Told(noted, step, step.run, busy_ns))
        elif longest is None or busy_ns > longest.busy_ns:
            self._longest = _Told(noted, step, step.run, busy_ns)

    def take(self, tid: int, cuda: bool) -> list[records.StepSample]:
        """Records of the steps chosen since the last call; `tid` is the engine's thread."""
        chosen, self._firsts = self._firsts, []
        if self._longest is not None:
            chosen.append(self._longest)
            self._longest = None
        return [_record(told, tid, cuda) for told in chosen]


def _record(told: _Told, tid: int, cuda: bool) -> records.StepSample:
    noted, run = told.noted, told.run
    assert noted.batch is not None
    tokens = [noted.batch.tokens_of.get(request_id, 0) for request_id in run.ids]
    shares = Ledger.shares(told.step, told.busy_ns)
    order = sorted(range(len(run.ids)), key=lambda index: tokens[index], reverse=True)
    order = order[: records.MAX_STEP_REQUESTS]
    mask = run.prefill if run.prefill is not None and len(run.prefill) == len(run.ids) else None
    graph = {0: "eager", 1: "graph"}.get(noted.replays, "piecewise")
    return records.StepSample(
        at=noted.end_ns,
        begin_ns=noted.begin_ns,
        step=noted.number,
        tid=tid,
        kind=graph if cuda else "eager",
        request_ids=[short_id(run.ids[index]) for index in order],
        tokens=[tokens[index] for index in order],
        phases=["prefill" if mask is not None and mask[index] else "decode" for index in order]
        if mask is not None or len(run.slots) == run.requests
        else [],
        gpu_ns=[shares[index] for index in order] if shares else [],
        requests=run.requests,
        scheduled_tokens=run.tokens,
    )
