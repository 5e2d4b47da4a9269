"""How much work a request is, so that a step's GPU time can be divided over the requests that ran in it.

In goes vLLM's own analytic model (`vllm.v1.metrics.perf.ModelMetrics`), asked once at start about a few
batches of one request; out comes a `WorkModel`, whose cost is linear in a request's tokens, tokens × context
and context. Linear because only then a share does not depend on the order of the requests and two halves of a
prompt cost what the whole costs. FLOPs and bytes are added as times at the device's peaks: attention waits
for memory in the same step in which the projections wait for the tensor cores, so neither alone decides. What
does not depend on the request (reading the weights) is divided by tokens.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

GRID = tuple(1 << power for power in range(15))
"""Tokens of a step at which the cost per token is asked for: 1 to 16384."""

CONTEXTS = (1024, 4096)
"""Contexts (tokens) between which the cost of context is taken as linear."""


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator's peaks, as its maker gives them without sparsity."""

    flops: float
    """FLOP/s in bfloat16 and float16."""
    flops8: float
    """FLOP/s in 8-bit formats; equal to `flops` where the device has none."""
    bandwidth: float
    """Bytes per second of its memory."""


DEVICES: tuple[tuple[str, Device], ...] = (
    # NVIDIA Blackwell architecture technical brief (HGX B200: 72 PFLOPS FP8 dense in 8 GPUs / 2, 8 TB/s).
    ("GB200", Device(2.5e15, 5.0e15, 8.0e12)),
    ("B200", Device(2.25e15, 4.5e15, 8.0e12)),
    # NVIDIA H200 data sheet; the numbers there are with sparsity, halved here.
    ("GH200", Device(989.4e12, 1978.9e12, 4.0e12)),
    ("H200", Device(989.4e12, 1978.9e12, 4.8e12)),
    # NVIDIA H20 as listed in public system guides.
    ("H20", Device(148e12, 296e12, 4.0e12)),
    # NVIDIA H100 data sheet: NVL, PCIe, SXM.
    ("H100 NVL", Device(835.5e12, 1671e12, 3.9e12)),
    ("H100 PCIe", Device(756.5e12, 1513e12, 2.0e12)),
    ("H100", Device(989.4e12, 1978.9e12, 3.35e12)),
    # NVIDIA A100 data sheet: 40 GB, 80 GB PCIe, 80 GB SXM. 8 bits is INT8.
    ("A100-PCIE-40GB", Device(312e12, 624e12, 1.555e12)),
    ("A100-SXM4-40GB", Device(312e12, 624e12, 1.555e12)),
    ("A100 80GB PCIe", Device(312e12, 624e12, 1.935e12)),
    ("A100", Device(312e12, 624e12, 2.039e12)),
    # NVIDIA L40S, L40, L4, A10 data sheets (halved where given with sparsity).
    ("L40S", Device(362.05e12, 733e12, 0.864e12)),
    ("L40", Device(181.05e12, 362e12, 0.864e12)),
    ("L4", Device(121e12, 242.5e12, 0.3e12)),
    ("A10", Device(125e12, 250e12, 0.6e12)),
    # NVIDIA Tesla V100 and T4 data sheets; float16 only.
    ("V100", Device(125e12, 125e12, 0.9e12)),
    ("T4", Device(65e12, 65e12, 0.3e12)),
    # AMD Instinct MI300X and MI325X data sheets.
    ("MI325X", Device(1307.4e12, 2614.9e12, 6.0e12)),
    ("MI300X", Device(1307.4e12, 2614.9e12, 5.3e12)),
)
"""By a part of the name that the driver gives; the first that fits counts."""

UNKNOWN = Device(2.0e14, 4.0e14, 1.0e12)
"""For dividing only: 200 FLOP per byte is what the devices above have within a factor of two. Its peak is
not told."""


def device_by_name(name: str) -> Device | None:
    """The peaks of an accelerator, or None if this list does not have it."""
    for part, device in DEVICES:
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?!\d)", name, re.IGNORECASE):
            return device
    return None


class Analytic(Protocol):
    """What is asked of an engine's model of itself: FLOPs and bytes of a batch of one request."""

    def flops(self, tokens: int, context: int, prefill: bool) -> float: ...
    def bytes(self, tokens: int, context: int, prefill: bool) -> float: ...


@dataclass(frozen=True, slots=True)
class Phase:
    """Cost of one phase (prefill or decode)."""

    per_token: tuple[float, ...]
    """Seconds per token, for steps of as many tokens as `GRID` says."""
    per_token_context: float
    """Seconds per token and token of context that it looks at."""
    per_context: float
    """Seconds per token of context that is read."""
    flops_per_token: float
    flops_per_token_context: float

    def token(self, step_tokens: int) -> float:
        """Seconds per token in a step of so many tokens."""
        table = self.per_token
        if len(table) == 1 or step_tokens <= 1:
            return table[0]
        if step_tokens >= GRID[-1]:
            return table[-1]
        right = bisect_right(GRID, step_tokens)
        left = right - 1
        part = (step_tokens - GRID[left]) / (GRID[right] - GRID[left])
        return table[left] + part * (table[right] - table[left])


@dataclass(frozen=True, slots=True)
class WorkModel:
    """Cost of requests in both phases. `source` says where it comes from: model or tokens."""

    prefill: Phase
    decode: Phase
    source: str


_TOKEN = Phase((1.0,), 0.0, 0.0, 0.0, 0.0)
BY_TOKENS = WorkModel(_TOKEN, _TOKEN, "tokens")
"""Every token costs the same: where the engine has no model of itself."""


def fit(analytic: Analytic, device: Device, bits8: bool = False) -> WorkModel:
    """Ask the engine's model and solve for the coefficients.

    Raises ValueError if its answers are not numbers that a cost can have.
    """
    peak = device.flops8 if bits8 else device.flops

    def phase(prefill: bool) -> Phase:
        def seconds(tokens: int, context: int) -> float:
            return (
                analytic.flops(tokens, context, prefill) / peak
                + analytic.bytes(tokens, context, prefill) / device.bandwidth
            )

        # A request of n tokens and context c costs fixed + a n + b n c + d c: four questions give b and d.
        near, far = CONTEXTS
        one = _slope(seconds, 1, near, far)
        many = _slope(seconds, 65, near, far)
        per_token_context = max(0.0, (many - one) / 64)
        per_context = max(0.0, one - per_token_context)

        def flops(tokens: int, context: int) -> float:
            return analytic.flops(tokens, context, prefill)

        flops_slope = _slope(flops, 1, near, far)
        flops_token = flops(2, near) - flops(1, near) - flops_slope * near
        per_token = []
        for tokens in GRID:
            context = near
            rest = seconds(tokens, context) - context * (per_token_context * tokens + per_context)
            per_token.append(rest / tokens)
        result = Phase(
            tuple(per_token), per_token_context, per_context, max(0.0, flops_token), max(0.0, flops_slope)
        )
        if not all(math.isfinite(value) and value > 0 for value in result.per_token):
            raise ValueError("the engine's model gives no cost per token")
        return result

    return WorkModel(phase(True), phase(False), "model")


def _slope(of: Callable[[int, int], float], tokens: int, near: int, far: int) -> float:
    return (of(tokens, far) - of(tokens, near)) / (far - near)
