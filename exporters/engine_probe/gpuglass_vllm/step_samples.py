"""Some steps are told one by one: what the engine's thread notes of each, the records of the chosen ones.

Chosen are steps in which requests begin, the longest, every n-th, and profiled ones. Beside them the pieces
of prompts are told, whichever step computed them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from gpuglass_vllm import records
from gpuglass_vllm.attribution import Batch, Ledger, Run, Step
from gpuglass_vllm.identity import short_id

FIRSTS = 4
"""Steps per flush that are told because a request began in them; beside them the longest one is told."""
REGULAR = 8
"""Steps per flush that are told because it was their turn."""
_STRIDE = 61
"""Requests of a large batch between the first ones of two records; prime, so that all come first."""
CHUNKS_KEPT = 1024
"""Pieces of prompts that are kept between two flushes."""

Span = tuple[int, int, int]
"""When the device began and ended a step, and the error; zeros: unknown."""
UNKNOWN: Span = (0, 0, 0)


class Noted(msgspec.Struct):
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
    profiled: bool = False


@dataclass(frozen=True, slots=True)
class _Told:
    noted: Noted
    step: Step
    run: Run
    busy_ns: float
    span: Span


class StepSamples:
    """Chooses steps between two flushes, and keeps pieces of prompts. For one thread."""

    def __init__(self, every: int = 0, chunks: bool = False) -> None:
        """One step in `every` is told in any case (0: none); `chunks`: tell of pieces of prompts."""
        self._every = every
        self._tells_chunks = chunks
        self._chosen: list[_Told] = []
        self._firsts = 0
        self._regular = 0
        self._turn = 0
        """Records made so far."""
        self._longest: _Told | None = None
        self._chunks: list[tuple[str, int, int, int, float]] = []

    def see(
        self, noted: Noted, step: Step, busy_ns: float, span: Callable[[], Span] = lambda: UNKNOWN
    ) -> None:
        """A step's time is known; `span` tells when the device had it."""
        if step.run is None or noted.batch is None:
            return
        run = step.run
        first = bool(noted.batch.new) and self._firsts < FIRSTS
        regular = bool(self._every) and noted.number % self._every == 0 and self._regular < REGULAR
        longest = self._longest is None or busy_ns > self._longest.busy_ns
        has_chunks = self._tells_chunks and run.prefill is not None and len(self._chunks) < CHUNKS_KEPT
        if not (first or regular or longest or has_chunks or noted.profiled):
            return
        told = _Told(noted, step, run, busy_ns, span())
        if first or regular or noted.profiled:
            self._firsts += first
            self._regular += regular and not first
            self._chosen.append(told)
        elif longest:
            self._longest = told
        if has_chunks:
            self._chunks += _chunks(told)

    def take(
        self, tid: int, cuda: bool, give_way: Callable[[], None] = lambda: None
    ) -> list[records.StepSample]:
        """Records of the steps chosen since the last call; `tid` is the engine's thread, to which the caller
        may give way after each."""
        chosen, self._chosen = self._chosen, []
        self._firsts = self._regular = 0
        if self._longest is not None:
            chosen.append(self._longest)
            self._longest = None
        records_of = []
        for told in chosen:
            self._turn += 1
            records_of.append(_record(told, tid, cuda, self._turn))
            give_way()
        return records_of

    def take_chunks(self) -> list[records.PrefillChunks]:
        """Records of the pieces of prompts since the last call."""
        chunks, self._chunks = self._chunks, []
        at = time.monotonic_ns()
        found = []
        for start in range(0, len(chunks), records.MAX_CHUNKS):
            ids, begins, ends, tokens, gpu = zip(*chunks[start : start + records.MAX_CHUNKS], strict=True)
            found.append(
                records.PrefillChunks(
                    at=at,
                    request_ids=list(ids),
                    begin_ns=list(begins),
                    end_ns=list(ends),
                    tokens=list(tokens),
                    gpu_ns=list(gpu),
                )
            )
        return found


def _chunks(told: _Told) -> list[tuple[str, int, int, int, float]]:
    """Request, begin, end, tokens and GPU time of each prompt that a step worked on."""
    run, noted = told.run, told.noted
    assert noted.batch is not None
    if run.prefill is None or len(run.prefill) != len(run.ids):
        return []
    shares = Ledger.shares(told.step, told.busy_ns) or [0.0] * len(run.ids)
    end = max(noted.end_ns, told.span[1])
    return [
        (
            short_id(run.ids[index]),
            noted.begin_ns,
            end,
            noted.batch.tokens_of.get(run.ids[index], 0),
            shares[index],
        )
        for index in run.prefill.nonzero()[0].tolist()
    ]


def _record(told: _Told, tid: int, cuda: bool, turn: int) -> records.StepSample:
    noted, run = told.noted, told.run
    assert noted.batch is not None
    tokens = [noted.batch.tokens_of.get(request_id, 0) for request_id in run.ids]
    shares = Ledger.shares(told.step, told.busy_ns)
    many = len(run.ids)
    order = list(range(many))
    if many > records.MAX_STEP_REQUESTS:
        # Those with as many tokens as others take turns, so that each is named now and then.
        first = turn * _STRIDE % many
        order = order[first:] + order[:first]
    order = sorted(order, key=lambda index: tokens[index], reverse=True)[: records.MAX_STEP_REQUESTS]
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
        gpu_begin_ns=told.span[0],
        gpu_end_ns=told.span[1],
        gpu_error_ns=told.span[2],
    )
