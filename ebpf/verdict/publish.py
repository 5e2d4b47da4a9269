"""Turns verdicts into samples. Reads only."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

from ebpf.verdict.account import Owner
from ebpf.verdict.leak import State, Verdict
from ebpf.verdict.process import Processes, ProcessWatch
from gpuglass.families import cuda as families
from gpuglass.family import MAX_LABEL_VALUE, Batch

MAX_PROCESSES = 256
"""Processes with series of their own, those with the most memory first; suspected ones always have them."""
_RESERVED = ("device", "virtual")


def leak_batch(
    processes: Processes,
    owner: Callable[[ProcessWatch], Owner],
    frames: Mapping[int, tuple[str, ...]],
    offset: float,
    previous: Batch,
) -> Batch:
    """Samples of all families of leaks. `offset` added to the samples' clock is Unix time, in seconds."""
    batch = Batch(previous=previous.samples)
    batch.add(families.PROCESSES, len(processes.by_key))
    batch.add(families.PROCESSES_REFUSED, processes.refused)
    chosen = heapq.nlargest(MAX_PROCESSES, processes.by_key.values(), key=_weight)
    for watch in chosen:
        *workload, process, gpu_uuid = owner(watch)
        scope = batch.scoped(*workload, process, str(watch.last.pid), gpu_uuid)
        _tensors(scope, watch)
        for kind, verdict in watch.verdicts():
            _kind(scope.scoped(kind), watch, kind, verdict, frames, offset)
    return batch


def _weight(watch: ProcessWatch) -> tuple[bool, int]:
    suspected = any(verdict.state is State.SUSPECTED for _, verdict in watch.verdicts())
    return suspected, sum(memory.live_bytes for memory in watch.last.memory)


def _tensors(scope: Batch, watch: ProcessWatch) -> None:
    live = {memory.kind: memory.live_bytes for memory in watch.last.memory}
    reserved = sum(live.get(kind, 0) for kind in _RESERVED)
    if "tensor" in live and reserved > 0:
        scope.add(families.TENSOR_RATIO, round(min(1.0, live["tensor"] / reserved), 4))


def _kind(
    scope: Batch,
    watch: ProcessWatch,
    kind: str,
    verdict: Verdict,
    frames: Mapping[int, tuple[str, ...]],
    offset: float,
) -> None:
    scope.add(families.LEAK_STATE, 1, verdict.state.value, verdict.why.value if verdict.why else "")
    trend = verdict.trend
    if verdict.state is State.HEALTHY:
        scope.add(families.LEAK_SUSPECTED, 0)
    if verdict.state is not State.SUSPECTED or trend is None:
        return
    scope.add(families.LEAK_SUSPECTED, 1)
    scope.add(families.LEAK_RATE, round(trend.slope))
    scope.add(families.LEAK_GROWTH, round(verdict.growth))
    scope.add(families.LEAK_SINCE, round(trend.since + offset))
    scope.add(families.LEAK_CONFIDENCE, round(verdict.confidence, 2))
    if trend.per_request == trend.per_request:
        scope.add(families.LEAK_PER_REQUEST, round(trend.per_request))
    for place, grown in enumerate(watch.grown(kind, trend.since), 1):
        text = " < ".join(frames.get(grown.stack, ())) or f"stack {grown.stack:x}"
        scope.add(families.LEAK_STACK, grown.growth, str(place), text[:MAX_LABEL_VALUE])
