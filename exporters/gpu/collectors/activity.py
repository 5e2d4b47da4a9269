"""How busy a GPU is: the driver's own samples of "some kernel ran", and GPM's counters of what the SMs
did."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pynvml

from exporters.gpu import gpm
from exporters.gpu.bulk import SampleQuery
from exporters.gpu.device import Gpu
from exporters.gpu.observe import Observations
from gpuglass.families import gpu as families
from gpuglass.family import Tier

HOLD = 2.0
"""Seconds for which the last mean stands while the driver has no new sample (its period is up to 1 s)."""

_GPM_FAMILIES = {
    gpm.GRAPHICS: families.GRAPHICS_ACTIVE,
    gpm.SM: families.SM_ACTIVE,
    gpm.OCCUPANCY: families.SM_OCCUPANCY,
    gpm.DRAM: families.DRAM_ACTIVE,
}


class SampleCursor:
    """New samples of one kind of one GPU since the last look. A cursor is never shared between GPUs."""

    def __init__(self, kind: int) -> None:
        self._query = SampleQuery(kind)
        self._last_us = 0

    def read(self, see: Observations, handle: Any, first_window: float) -> list[int] | None:
        """Percentages since the last call, at the first call those of the last `first_window` seconds.

        None if the driver does not keep samples.
        """
        samples = see.read_list("busy_samples", self._query.read, handle, self._last_us)
        if samples is None:
            return None
        if not samples:
            return []
        newest = max(when for when, _ in samples)
        since = self._last_us or newest - int(first_window * 1e6)
        values = [value for when, value in samples if when > since and value <= 100]
        self._last_us = max(self._last_us, newest)
        return values


class Activity:
    """Busy ratio (samples, else the driver's rate, else GPM) and the GPM ratios of a whole GPU."""

    name = "activity"
    tier = Tier.FAST

    def __init__(self, gpu: Gpu, interval: float) -> None:
        self._gpu = gpu
        self._interval = interval
        self._cursor = SampleCursor(pynvml.NVML_GPU_UTILIZATION_SAMPLES)
        self._held: tuple[float, float, float] | None = None  # mean, peak, when
        self._gpm = gpm.GpmSampler(
            lambda buffer: pynvml.nvmlGpmSampleGet(gpu.handle, buffer),
            (*gpm.RATIOS, gpm.PCIE_TX, gpm.PCIE_RX),
        )
        self.pcie_bytes: tuple[float, float] = (0.0, 0.0)
        """Bytes sent and received as GPM's rates add up, for cards without byte counters."""

    def collect(self, see: Observations, now: float) -> None:
        """Note busy, peak and the GPM ratios."""
        window = self._gpm.sample(see) if self._supported(see) else None
        values, seconds = window or ({}, 0.0)
        gpm.add_ratios(see, values, _GPM_FAMILIES, families.PIPE_ACTIVE)
        if gpm.PCIE_TX in values and gpm.PCIE_RX in values:
            sent, received = self.pcie_bytes
            scale = seconds * 2**20
            self.pcie_bytes = (sent + values[gpm.PCIE_TX] * scale, received + values[gpm.PCIE_RX] * scale)
        self._busy(see, now, values.get(gpm.GRAPHICS))

    def _supported(self, see: Observations) -> bool:
        if "gpm" in see.states:
            return see.wanted("gpm")
        answer = see.read("gpm", pynvml.nvmlGpmQueryDeviceSupport, self._gpu.handle)
        if answer is not None and not answer.isSupportedDevice:
            see.failed("gpm", pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))
        return see.wanted("gpm") and answer is not None

    def _busy(self, see: Observations, now: float, graphics: float | None) -> None:
        samples = self._cursor.read(see, self._gpu.handle, self._interval)
        if samples:
            self._held = (fmean(samples), max(samples), now)
        if samples is not None and self._held is not None and now - self._held[2] <= HOLD + self._interval:
            mean, peak, _ = self._held
            see.add(families.BUSY, gpm.ratio(mean), "samples")
            see.add(families.BUSY_PEAK, gpm.ratio(peak))
            return
        rates = see.read("busy_rate", pynvml.nvmlDeviceGetUtilizationRates, self._gpu.handle)
        if rates is not None:
            see.add(families.BUSY, gpm.ratio(rates.gpu), "rate")
        elif graphics is not None:
            see.add(families.BUSY, gpm.ratio(graphics), "gpm")

    def close(self) -> None:
        """Free GPM's buffers."""
        self._gpm.close()


class MemoryController:
    """Share of time in which memory was read or written."""

    name = "memory_controller"
    tier = Tier.SLOW

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def collect(self, see: Observations, now: float) -> None:
        """Note the driver's memory utilisation under its right name."""
        rates = see.read("memory_controller_busy", pynvml.nvmlDeviceGetUtilizationRates, self._gpu.handle)
        if rates is not None:
            see.add(families.MEMORY_CONTROLLER_BUSY, gpm.ratio(rates.memory))

    def close(self) -> None:
        """Nothing is held."""
