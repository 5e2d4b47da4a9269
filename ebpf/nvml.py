"""What the driver says of processes: GPU memory by GPU and pid, read in a thread of its own because a call
into a driver can hang."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpuglass.logs import LOG


@dataclass(frozen=True, slots=True)
class Usage:
    """One reading."""

    gpus: tuple[str, ...] = ()
    """Uuids, in the driver's order."""
    memory: Mapping[int, Mapping[str, int | None]] = field(default_factory=dict)
    """Bytes by pid and uuid; None: hidden."""
    serial: int = 0
    """Counts readings; 0: there was none."""


class Nvml:
    """Reads NVML each `interval` seconds until stopped. Any thread may ask for the latest reading."""

    def __init__(self, library: str, interval: float) -> None:
        self._library = library
        self._interval = interval
        self._usage = Usage()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._nvml: Any = None
        self.up = False

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; a call that hangs is left behind."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def latest(self) -> Usage:
        """The last reading."""
        return self._usage

    def _run(self) -> None:
        told = ""
        while True:
            try:
                self._usage = self._read()
                self.up, told = True, ""
            except Exception as error:
                self._nvml, self.up = None, False
                if str(error) != told:
                    told = str(error)
                    LOG.info("the driver's figures are not to be had: %s", told)
            if self._stopping.wait(self._interval):
                return

    def _read(self) -> Usage:
        if self._nvml is None:
            library = ctypes.CDLL(self._library or "libnvidia-ml.so.1")
            import pynvml  # 8 MB: only where there is a driver

            pynvml.nvmlLib = library
            pynvml.nvmlInit()
            self._nvml = pynvml
        nvml = self._nvml
        gpus: list[str] = []
        memory: dict[int, dict[str, int | None]] = {}
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = str(nvml.nvmlDeviceGetUUID(handle))
                gpus.append(uuid)
                listed = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except nvml.NVMLError as error:
                LOG.debug("GPU %d: %s", index, error)
                continue
            for process in listed:
                used = process.usedGpuMemory
                memory.setdefault(int(process.pid), {})[uuid] = None if used is None else int(used)
        return Usage(tuple(gpus), memory, self._usage.serial + 1)
