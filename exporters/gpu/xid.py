"""XID and health events, from a thread of its own: the driver neither repeats nor stamps them.

Counts live as long as the agent, so that a reload of the driver resets no counter; every known code is there
at 0 from the start, because `increase()` cannot see a series' first sample.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pynvml

from exporters.gpu.device import Gpu
from exporters.gpu.observe import State, state_of
from exporters.gpu.xid_codes import CLASS, classify
from gpuglass.families import gpu as families
from gpuglass.family import Batch
from gpuglass.logs import LOG

WAIT_MS = 250
MAX_UNKNOWN_CODES = 32
"""Codes per GPU beyond the known ones that get a series; further ones are counted as xid="other"."""

_WANTED = (
    pynvml.nvmlEventTypeXidCriticalError
    | pynvml.nvmlEventTypeGpuUnavailableError
    | pynvml.nvmlEventTypeGpuRecoveryAction
)


class XidCounts:
    """XIDs seen by GPU since the agent started. Written by the watcher, read by the publisher."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, int]] = {}
        self._last: dict[str, dict[str, float]] = {}
        self.version = 0
        """Grows with each XID: tells the publisher that there is news."""

    def expect(self, uuid: str) -> None:
        """Start a GPU's known codes at 0."""
        with self._lock:
            self._counts.setdefault(uuid, {str(code): 0 for code in sorted(CLASS)})
            self._last.setdefault(uuid, {})

    def count(self, uuid: str, code: int) -> None:
        """Count one XID."""
        self.expect(uuid)
        with self._lock:
            counts = self._counts[uuid]
            name = str(code)
            if name not in counts and len(counts) >= len(CLASS) + MAX_UNKNOWN_CODES:
                name = "other"
            counts[name] = counts.get(name, 0) + 1
            self._last[uuid][name] = self._wall()
            self.version += 1

    def fill(self, batch: Batch, uuid: str) -> None:
        """Add one GPU's samples to a batch that is scoped to it."""
        with self._lock:
            counts, last = dict(self._counts.get(uuid, {})), dict(self._last.get(uuid, {}))
        for name, count in counts.items():
            batch.add(families.XID_ERRORS, count, name, classify(int(name)) if name.isdigit() else "unknown")
        for name, when in last.items():
            batch.add(families.XID_LAST, round(when, 3), name)


class XidWatcher(threading.Thread):
    """Waits for events of one life of the driver. Ends when told, or when the driver gives no more events."""

    def __init__(
        self, gpus: Sequence[Gpu], counts: XidCounts, on_event: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(name="xid", daemon=True)
        self._gpus = gpus
        self._counts = counts
        self._on_event = on_event
        self._closing = threading.Event()
        self.states: dict[str, State] = {}
        """Whether events can be watched, by uuid."""

    def run(self) -> None:
        """Watch; after an error of the event set, make a new one."""
        while not self._closing.is_set():
            try:
                self._watch()
            except pynvml.NVMLError as error:
                if isinstance(error, (pynvml.NVMLError_Uninitialized, pynvml.NVMLError_FunctionNotFound)):
                    return
                LOG.warning("XID events: %s; watching again", error)
                self._closing.wait(1.0)

    def _watch(self) -> None:
        events = pynvml.nvmlEventSetCreate()
        try:
            if not self._register(events):
                self._closing.wait()
                return
            while not self._closing.is_set():
                try:
                    event = pynvml.nvmlEventSetWait_v2(events, WAIT_MS)
                except pynvml.NVMLError_Timeout:
                    continue
                self._take(event)
        finally:
            try:
                pynvml.nvmlEventSetFree(events)
            except pynvml.NVMLError as error:
                LOG.debug("event set: %s", error)

    def _register(self, events: Any) -> bool:
        """Register all GPUs; False if none can be watched."""
        for gpu in self._gpus:
            try:
                supported = pynvml.nvmlDeviceGetSupportedEventTypes(gpu.handle) & _WANTED
                if not supported & pynvml.nvmlEventTypeXidCriticalError:
                    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
                pynvml.nvmlDeviceRegisterEvents(gpu.handle, supported, events)
                self.states[gpu.uuid] = State.SUPPORTED
                self._counts.expect(gpu.uuid)
            except pynvml.NVMLError as error:
                self.states[gpu.uuid] = state_of(error)
        return State.SUPPORTED in self.states.values()

    def _take(self, event: Any) -> None:
        gpu = self._gpu_of(event.device)
        if gpu is None:
            return
        if event.eventType == pynvml.nvmlEventTypeXidCriticalError:
            code = int(event.eventData)
            LOG.warning("%s (%s): XID %d, class %s", gpu.device, gpu.uuid, code, classify(code))
            self._counts.count(gpu.uuid, code)
        else:
            LOG.warning("%s (%s): event %#x of the driver", gpu.device, gpu.uuid, event.eventType)
        self._on_event()

    def _gpu_of(self, handle: Any) -> Gpu | None:
        try:
            uuid = pynvml.nvmlDeviceGetUUID(handle)
        except pynvml.NVMLError:
            # The GPU of an XID is often the one that answers no more: then its handle tells.
            address = _address(handle)
            return next((gpu for gpu in self._gpus if _address(gpu.handle) == address), None)
        return next((gpu for gpu in self._gpus if gpu.uuid == uuid), None)

    def close(self) -> None:
        """Let the thread end within one wait."""
        self._closing.set()


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def watched(gpus: Iterable[Gpu], watcher: XidWatcher | None) -> dict[str, State]:
    """Whether XID events of each GPU are watched, by uuid."""
    states = watcher.states if watcher is not None else {}
    return {gpu.uuid: states[gpu.uuid] for gpu in gpus if gpu.uuid in states}
