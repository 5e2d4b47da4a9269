"""GPM, the counters of Hopper and newer: means between two samples of a GPU or of a MIG instance.

A window is never shorter than 100 ms (the driver gives garbage below), each metric's own status is checked,
and the two sample buffers are freed when the sampler is closed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pynvml

from exporters.gpu.bulk import GpmQuery
from exporters.gpu.observe import Observations, State
from gpuglass.family import Family

MIN_WINDOW = 0.1
"""Seconds between two samples; nvml.h asks for at least 100 ms."""

MAX_WAIT = 0.005
"""Seconds that the sampling thread waits for a window to be long enough."""

GRAPHICS, SM, OCCUPANCY, DRAM = 1, 2, 3, 10
PCIE_TX, PCIE_RX = 20, 21
PIPES: Mapping[int, str] = {
    5: "tensor",
    6: "tensor_dfma",
    7: "tensor_hmma",
    8: "tensor_dmma",
    9: "tensor_imma",
    11: "fp64",
    12: "fp32",
    13: "fp16",
    4: "integer",
}
CAPABILITY: Mapping[int, str] = {
    GRAPHICS: "graphics_active",
    SM: "sm_active",
    OCCUPANCY: "sm_occupancy",
    DRAM: "dram_active",
    PCIE_TX: "gpm_pcie",
    PCIE_RX: "gpm_pcie",
    **{metric: f"pipe_{pipe}" for metric, pipe in PIPES.items()},
}
RATIOS = (GRAPHICS, SM, OCCUPANCY, DRAM, *PIPES)


def ratio(percent: float) -> float | None:
    """A percentage of the driver as a ratio of four digits; None for what cannot be one."""
    return round(percent / 100, 4) if math.isfinite(percent) and -0.01 <= percent <= 100.5 else None


class GpmSampler:
    """Means of GPM metrics over the time since the sample before. One per GPU or MIG instance, one thread."""

    def __init__(self, take: Callable[[Any], None], metrics: Sequence[int], prefix: str = "") -> None:
        """`take` reads the counters of a GPU or an instance into a sample buffer.

        `prefix` stands before the names of capabilities: instances can have what their parent has not.
        """
        self._take = take
        self._capability = {metric: prefix + CAPABILITY[metric] for metric in metrics}
        self._name = f"{prefix}gpm"
        self._samples: list[Any] = []
        self._sampled_at: float | None = None
        self._values: dict[int, float] | None = None
        self._query = GpmQuery()

    def sample(self, see: Observations) -> tuple[dict[int, float], float] | None:
        """Values by metric id and the seconds of their window; None until there is a window.

        On a machine that wakes us late the next tick can come too soon for a window: the last values stand,
        with 0 seconds, since they were told before.
        """
        # The counters are read when the driver gets to it, not when the tick began.
        short = 0.0 if self._sampled_at is None else MIN_WINDOW - (time.monotonic() - self._sampled_at)
        if short > MAX_WAIT:
            return None if self._values is None else (self._values, 0.0)
        if short > 0:
            time.sleep(short)  # at an interval of 100 ms each tick comes by the duration of a call too soon
        while len(self._samples) < 2:
            buffer = see.read(self._name, pynvml.nvmlGpmSampleAlloc)
            if buffer is None:
                return None
            self._samples.append(buffer)
        if not see.wanted(self._name):
            return None
        try:
            self._take(self._samples[1])
        except pynvml.NVMLError as error:
            self._sampled_at = self._values = None
            see.failed(self._name, error)
            return None
        see.succeeded(self._name)
        before, self._sampled_at = self._sampled_at, time.monotonic()
        self._samples.reverse()  # the newest is first, the older one is filled next
        if before is None:
            return None
        self._values = self._read(see)
        return self._values, self._sampled_at - before

    def _read(self, see: Observations) -> dict[int, float]:
        wanted = tuple(metric for metric, name in self._capability.items() if see.wanted(name))
        newer, older = self._samples
        answers = see.read(self._name, self._query.read, wanted, older, newer)
        values: dict[int, float] = {}
        for metric, (status, value) in zip(wanted, answers or (), strict=False):
            name = self._capability[metric]
            if status != pynvml.NVML_SUCCESS:
                see.failed(name, pynvml.NVMLError(status))
            elif math.isfinite(value):
                values[metric] = value
                see.succeeded(name)
            else:
                see.refuse(name, State.ERROR)
        return values

    def close(self) -> None:
        """Free the buffers; before the driver is shut down."""
        samples, self._samples = self._samples, []
        self._sampled_at = self._values = None
        for sample in samples:
            try:
                pynvml.nvmlGpmSampleFree(sample)
            except pynvml.NVMLError:
                return  # the driver has gone, and its memory with it


def add_ratios(
    see: Observations,
    values: Mapping[int, float],
    families: Mapping[int, Family],
    pipe: Family,
    *labels: str,
) -> None:
    """Note the ratios among GPM's values, pipes under the family `pipe`."""
    for metric, percent in values.items():
        if metric in PIPES:
            see.add(pipe, ratio(percent), *labels, PIPES[metric])
        elif metric in families:
            see.add(families[metric], ratio(percent), *labels)
