"""Tells the agent: the ledger of each process as states, failures, large allocations and a sample as events.

The connection is the engine probe's own (`gpuglass_vllm.link`), with its bounds: a missing agent costs
nothing but a counter of dropped events."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from ebpf.layout import Event, EventType, Kind, Layer
from ebpf.ledger import Process, Sums
from ebpf.results import function_name
from ebpf.stacks import stack_id
from ebpf.view import Traced
from gpuglass_vllm import records

_KINDS = (Kind.DEVICE, Kind.HOST, Kind.MANAGED, Kind.VIRTUAL)
_MAX_STACKS = 4096
_REASONS = {EventType.FAILURE: "failure", EventType.LARGE: "large", EventType.SAMPLE: "sample"}


class Sender:
    """What the link asks, and what the tracer tells. The link's thread reads, the tracer's writes."""

    def __init__(self, socket: str) -> None:
        os.environ["GPUGLASS_SOCKET"] = socket
        from gpuglass_vllm import link

        self._lock = threading.Lock()
        self._states: list[records.Record] = []
        self._fresh = False
        self._stacks: OrderedDict[int, records.CudaStack] = OrderedDict()
        self._told: set[int] = set()
        self._link = link.Link(records.TRACER, self)

    def start(self) -> None:
        """Start to send."""
        self._link.start()

    def stop(self) -> None:
        """Send what is left."""
        self._link.stop()

    @property
    def connected(self) -> bool:
        """Whether the agent is there."""
        return self._link._socket is not None

    @property
    def dropped(self) -> int:
        """Events that were not sent."""
        return self._link.dropped

    # What the link asks

    def hello(self) -> dict[str, Any]:
        """Who speaks."""
        return {"engine_name": "cuda-tracer", "engine_version": "", "model_name": ""}

    def states(self, everything: bool) -> Iterable[records.Record]:
        """Stacks that are new, then the processes' states if they are."""
        with self._lock:
            if everything:
                self._told.clear()
            new = [stack for id, stack in self._stacks.items() if id not in self._told]
            self._told.update(stack.stack for stack in new)
            self._told &= self._stacks.keys()
            states = self._states if self._fresh or everything else []
            self._fresh = False
        return [*new, *states]

    def sums(self) -> Iterable[records.Record]:
        """The ledger is a state: nothing here."""
        return ()

    # What the tracer tells

    def stack(self, frames: Sequence[str]) -> int:
        """Note a stack; gives its id, 0 for none."""
        if not frames:
            return 0
        id = stack_id(frames)
        with self._lock:
            if id not in self._stacks:
                self._stacks[id] = records.CudaStack(stack=id, frames=list(frames[: records.MAX_FRAMES]))
                while len(self._stacks) > _MAX_STACKS:
                    self._stacks.popitem(last=False)
        return id

    def event(self, event: Event, start_ticks: int, frames: Sequence[str]) -> None:
        """One call."""
        kind = Kind(event.kind)
        if event.layer != Layer.DRIVER or kind not in _KINDS:
            return
        self._link.event(
            records.CudaEvent(
                at=event.time_ns,
                begin_ns=event.time_ns - event.latency_ns,
                pid=event.tgid,
                tid=event.tid,
                start_ticks=start_ticks,
                function=function_name(event.op, event.kind),
                kind=kind.name.lower(),
                bytes=event.size,
                code=event.code,
                stack=self.stack(frames),
                reason=_REASONS[EventType(event.type)],
            )
        )

    def processes(self, at: int, listed: Iterable[tuple[Traced, list[records.CudaOwner]]]) -> None:
        """The states of all processes."""
        states: list[records.Record] = [_state(at, traced, owners) for traced, owners in listed]
        with self._lock:
            self._states, self._fresh = states, True


def _state(at: int, traced: Traced, owners: list[records.CudaOwner]) -> records.CudaProcess:
    process = traced.process
    known = traced.reconciled if len(traced.reconciled) == 1 else []
    memory = [_memory(process, Layer.DRIVER, kind, kind.name.lower()) for kind in _KINDS]
    if traced.tensors_known:
        memory.append(_memory(process, Layer.TENSORS, Kind.DEVICE, "tensor"))
    return records.CudaProcess(
        at=at,
        pid=process.pid,
        start_ticks=traced.start_ticks,
        name=traced.name,
        gpu_uuid=known[0].gpu_uuid if known else "",
        memory=[one for one in memory if one is not None],
        stacks=owners,
        tracking_since_ns=traced.since_ns,
        untracked_bytes=max(known[0].untracked, 0) if known else -1,
        lost=process.record.lost,
        epoch=traced.epoch,
        drifted=not traced.exact,
        ended=traced.ended_at is not None,
    )


def _memory(process: Process, layer: Layer, kind: Kind, name: str) -> records.CudaMemory | None:
    """One kind of memory of a ledger, called `name`; None if nothing was done with it."""
    failures = {
        code: count
        for (of_layer, of_kind, code), count in process.failures.items()
        if of_layer is layer and of_kind is kind
    }
    sums = process.sums.get((layer, kind))
    if sums is None:
        if not failures:
            return None
        sums = Sums()
    return records.CudaMemory(
        kind=name,
        live_bytes=max(sums.live_bytes, 0),
        live_allocations=max(sums.live_count, 0),
        allocated_bytes=sums.allocated_bytes,
        freed_bytes=sums.freed_bytes + sums.context_bytes + sums.exit_bytes,
        allocations=sums.allocations,
        frees=sums.frees + sums.context_frees + sums.exit_frees,
        failures=failures,
    )
