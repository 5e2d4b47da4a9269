"""The agent's part for CUDA memory: listens to the record stream, judges, publishes.

The receiver's thread notes what tracers and workers say; a thread of its own joins allocations each second
and publishes each fifteen, as often as tracers report. Both hold the part's lock while they do.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ebpf.verdict.account import EventAccount, Owner, code_name
from ebpf.verdict.events import Joined, Joiner
from ebpf.verdict.process import Processes, ProcessWatch
from ebpf.verdict.publish import leak_batch
from ebpf.verdict.threads import HostThreads
from gpuglass.config import Config
from gpuglass.families import cuda as families
from gpuglass.family import Batch
from gpuglass.logs import LOG
from gpuglass.part import Part, PartContext
from gpuglass.procfs import ProcFs
from gpuglass.record_hub import NOBODY, Allocation, RecordHub, Speaker
from gpuglass.store import Store
from gpuglass.workload import WorkloadResolver
from gpuglass_vllm import records

ROUND_SECONDS = 1.0
PUBLISH_EVERY = 5
"""Rounds between two publications."""
MAX_STACKS = 8192
"""Stacks whose frames are remembered."""
LOG_SECONDS = 60.0
"""Failures of one process are logged once in so many seconds."""
KINDS = (
    *(records.CudaProcess, records.CudaStack, records.CudaEvent),
    *(records.StepSample, records.OutOfMemory, records.RequestEnd),
)


class CudaPart(Part):
    """Verdicts on the CUDA memory of this node's processes. Listens to the hub (`gpuglass.record_hub`)."""

    def __init__(
        self,
        config: Config,
        store: Store,
        hub: RecordHub,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], float] = time.time,
    ) -> None:
        procfs, kubernetes = ProcFs(config.proc), config.kubernetes
        self._resolver = WorkloadResolver(procfs, Path(kubernetes.container_logs), Path(kubernetes.pod_logs))
        self._threads = HostThreads(procfs)
        self._store, self._hub, self._clock_ns, self._wall = store, hub, clock_ns, wall
        self._lock = threading.Lock()
        self._processes, self._joiner, self._account = Processes(), Joiner(), EventAccount()
        self._frames: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._tracers: dict[int, Speaker] = {}
        self._engines: dict[int, Speaker] = {}
        """Processes of engines, by connection."""
        self._served: dict[str, int] = {}
        """Requests that ended, by instance; only of those with a core."""
        self._logged: OrderedDict[int, float] = OrderedDict()
        self._batch = Batch()
        self._rounds = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cuda-verdicts", daemon=True)
        hub.listen(KINDS, self)

    # Part

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def reload(self, config: Config) -> None:
        """Nothing here can be configured."""

    def stop(self, timeout: float) -> bool:
        """Stop the thread."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def not_ready(self) -> str | None:
        """A node without a tracer is ready."""
        return None

    # Listener

    def arrived(self, speaker: Speaker) -> None:
        """A tracer or a process of an engine."""
        with self._lock:
            if speaker.role == records.TRACER:
                self._tracers[speaker.number] = speaker
            else:
                self._engines[speaker.number] = speaker
                if speaker.role == "core":
                    self._served.setdefault(speaker.instance, 0)

    def gone(self, speaker: Speaker) -> None:
        """Its connection ended. Steps stay a while: the last allocations may still be told."""
        with self._lock:
            self._tracers.pop(speaker.number, None)
            self._engines.pop(speaker.number, None)
            if not any(other.instance == speaker.instance for other in self._engines.values()):
                self._served.pop(speaker.instance, None)
            self._threads.forget(speaker.pid)

    def heard(self, speaker: Speaker, record: Any, now_ns: int) -> None:
        """One record of `KINDS`."""
        with self._lock:
            match record:
                case records.CudaProcess():
                    self._processes.take(record, self._requests(record.pid))
                    if record.ended:
                        self._joiner.forget(record.pid)
                case records.CudaStack():
                    self._frames[record.stack] = tuple(record.frames)
                    self._frames.move_to_end(record.stack)
                    if len(self._frames) > MAX_STACKS:
                        self._frames.popitem(last=False)
                case records.CudaEvent():
                    dropped = self._joiner.event(record, now_ns)
                    if dropped is not None:
                        self._tell(dropped)
                case records.RequestEnd():
                    if speaker.instance in self._served:
                        self._served[speaker.instance] += 1
                case records.StepSample() if speaker.pid > 0 and record.request_ids:
                    tid = self._threads.find(speaker.pid, record.tid)
                    ref = self._hub.request(speaker.instance, record.request_ids[0])
                    self._joiner.step(speaker.pid, tid, record, ref)
                case records.OutOfMemory() if speaker.pid > 0 and record.request_ids:
                    ref = self._hub.request(speaker.instance, record.request_ids[0])
                    self._joiner.out_of_memory(speaker.pid, record, ref)

    def _requests(self, pid: int) -> float:
        """Requests that the engine of a process has served; NaN if nobody tells."""
        for speaker in self._engines.values():
            if speaker.pid == pid and speaker.instance in self._served:
                return self._served[speaker.instance]
        return math.nan

    # The thread

    def _run(self) -> None:
        while not self._closing.wait(ROUND_SECONDS):
            try:
                self.round()
            except Exception:
                LOG.exception("judging CUDA memory failed")

    def round(self) -> None:
        """Join what can be joined; publish each `PUBLISH_EVERY` rounds."""
        now_ns = self._clock_ns()
        with self._lock:
            for joined in list(self._joiner.due(now_ns)):
                self._tell(joined)
            self._rounds += 1
            if self._rounds % PUBLISH_EVERY:
                return
            self._processes.tick(now_ns)
            batch = leak_batch(
                self._processes, self._owner, self._frames, self._wall() - now_ns / 1e9, self._batch
            )
            self._account.fill(batch)
            batch.add(families.EVENT_DROPPED, self._joiner.dropped)
            batch.add(families.TRACERS, len(self._tracers))
            self._batch = batch
        self._store.publish("cuda", batch)

    def _owner(self, watch: ProcessWatch) -> Owner:
        last = watch.last
        return self._labels(last.pid, last.start_ticks, last.gpu_uuid, last.name)

    def _labels(self, pid: int, start_ticks: int, gpu_uuid: str, name: str) -> Owner:
        found = self._resolver.resolve(pid, gpu_uuid)
        if found is None or (start_ticks and found[0].start_time != start_ticks):
            return "", "", "", name or "unknown", gpu_uuid
        return *found[1].labels, found[0].name, gpu_uuid

    def _tell(self, joined: Joined) -> None:
        """Count one allocation, log a failure, and hand it to who listens."""
        event, step = joined.event, joined.step
        watch = next(
            (w for w in self._processes.by_key.values() if w.last.pid == event.pid),
            None,
        )
        gpu, name = (watch.last.gpu_uuid, watch.last.name) if watch is not None else ("", "")
        owner = self._labels(event.pid, event.start_ticks, gpu, name)
        unix = self._wall() - max(0, self._clock_ns() - event.at) / 1e9
        self._account.add(joined, owner, self._hub.policy, unix)
        if event.code:
            self._log(joined, owner)
        allocation = Allocation(
            begin_ns=event.begin_ns,
            at=event.at,
            pid=event.pid,
            tid=event.tid,
            function=event.function,
            kind=event.kind,
            bytes=event.bytes,
            code=event.code,
            frames=self._frames.get(event.stack, ()),
            link=joined.link.value,
            step=step.number if step is not None else -1,
            batch=step.batch if step is not None else (),
        )
        self._hub.told(NOBODY, allocation, event.at)

    def _log(self, joined: Joined, owner: Owner) -> None:
        event, step = joined.event, joined.step
        now = event.at / 1e9
        last = self._logged.get(event.pid)
        if last is not None and now - last < LOG_SECONDS:
            return
        self._logged[event.pid] = now
        self._logged.move_to_end(event.pid)
        if len(self._logged) > MAX_STACKS:
            self._logged.popitem(last=False)
        requests = "no step known"
        if step is not None:
            shown = ", ".join(f"{request} ({tokens} tokens)" for request, tokens in step.batch[:8])
            rest = len(step.batch) - 8
            requests = f"link {joined.link.value}: {shown}{f' and {rest} more' if rest > 0 else ''}"
        LOG.warning(
            "CUDA memory: %s of %d MiB failed (%s) in pid %d (%s); %s",
            *(event.function, event.bytes >> 20, code_name(event.code), event.pid, owner[3], requests),
        )


def create(context: PartContext) -> Part | None:
    """Make the part; None without a receiver (`engines.enabled`)."""
    if not context.config.engines.enabled:
        return None
    return CudaPart(context.config, context.store, context.records)
