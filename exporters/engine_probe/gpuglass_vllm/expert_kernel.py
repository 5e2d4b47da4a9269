"""Counts of expert choices on a CUDA device, and the kernel that makes them behind a step.

One program per layer and block of choices reads the layer's `topk_ids` where the layer left them, through a
table of addresses, so that nothing has to run inside a captured CUDA graph. Nothing here waits for the device
on the engine's thread. Needs Triton; imported only where there is a CUDA device.
"""

# No `from __future__ import annotations` here: Triton reads the annotations.

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from gpuglass_vllm import cuda_events
from gpuglass_vllm.experts import TENANTS, Choices, Layout

BLOCKS = (32, 256, 1024)
"""Choices per program, for small, middle and large steps."""


@triton.jit(do_not_specialize=["row", "n"])  # type: ignore[untyped-decorator]
def gpuglass_count(  # type: ignore[no-untyped-def]
    table, counts, row, n, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """Add the histogram of each layer's first `n` choices to counts[row + layer]."""
    layer = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    address = tl.load(table + layer)
    if WIDE:
        ids = tl.load(address.to(tl.pointer_type(tl.int64)) + at, mask=inside, other=0).to(tl.int32)
    else:
        ids = tl.load(address.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
    valid = inside & (ids >= 0) & (ids < EXPERTS)
    histogram = tl.histogram(tl.where(valid, ids, 0), BINS, mask=valid)
    expert = tl.arange(0, BINS)
    where = counts + (row + layer) * EXPERTS + expert
    tl.atomic_add(where, histogram, mask=(histogram > 0) & (expert < EXPERTS), sem="relaxed")


@triton.jit(do_not_specialize=["layers", "n"])  # type: ignore[untyped-decorator]
def gpuglass_count_by_tenant(  # type: ignore[no-untyped-def]
    table,
    counts,
    tenants,
    layers,
    n,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The same for a batch of several tenants; `tenants` has the row of each token."""
    layer = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    address = tl.load(table + layer)
    if WIDE:
        ids = tl.load(address.to(tl.pointer_type(tl.int64)) + at, mask=inside, other=0).to(tl.int32)
    else:
        ids = tl.load(address.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
    tenant = tl.load(tenants + at // TOP_K, mask=inside, other=0).to(tl.int32)
    valid = inside & (ids >= 0) & (ids < EXPERTS)
    where = counts + (tenant * layers + layer) * EXPERTS + tl.where(valid, ids, 0)
    tl.atomic_add(where, 1, mask=valid, sem="relaxed")


def bins(experts: int) -> int:
    """Bins of the histogram: the next power of two, as Triton asks."""
    return max(2, 1 << (experts - 1).bit_length())


def block_for(choices: int) -> int:
    """Choices per program in a step with so many choices per layer."""
    return next((block for block in BLOCKS if choices <= block), BLOCKS[-1])


GRAPH_TABLES = 1024
"""Sets of captured graphs whose tables of addresses are kept; steps of further sets upload theirs each
time."""

_COLLECT_SECONDS = 0.01
"""How long the link's thread waits for a copy before it tries again at its next round."""


class _Buffer:
    """One of two sets of counts."""

    def __init__(self, shape: tuple[int, ...], device: Any) -> None:
        self.counts = torch.zeros(shape, dtype=torch.int32, device=device)
        self.last = torch.cuda.Event()
        """Behind the last kernel that counted into it."""
        self.used = False


class _Uploads:
    """Rows of pinned memory with their likes on the device, used in turn; a row is free once its copy has
    run."""

    def __init__(self, rows: int, width: int, dtype: Any, device: Any) -> None:
        self._host = torch.zeros((rows, width), dtype=dtype, pin_memory=True)
        self._array = self._host.numpy()
        self._device = torch.zeros((rows, width), dtype=dtype, device=device)
        self._events = [torch.cuda.Event() for _ in range(rows)]
        self._next = 0

    def put(self, values: Any) -> Any | None:
        """Copy values to the device behind what is queued; the row there, or None if no row is free."""
        row = self._next
        event = self._events[row]
        if len(values) > self._array.shape[1] or not event.query():
            return None
        self._next = (row + 1) % len(self._events)
        self._array[row, : len(values)] = values
        target = self._device[row]
        target.copy_(self._host[row], non_blocking=True)
        event.record()
        return target


class DeviceCounts:
    """See `experts.Counts`."""

    def __init__(self, layout: Layout, max_tokens: int, device: Any) -> None:
        """Takes about `TENANTS` × layers × experts × 12 bytes on the device. Raises what CUDA raises."""
        self._layout = layout
        self._device = device
        self._record = cuda_events.recorder(device)
        shape = (TENANTS, len(layout.layers), layout.experts)
        self._buffers = [_Buffer(shape, device), _Buffer(shape, device)]
        self._current = self._buffers[0]
        self._taken: _Buffer | None = None
        self._pinned = torch.zeros(shape, dtype=torch.int32, pin_memory=True)
        self._copied = torch.cuda.Event()
        self._side = torch.cuda.Stream(device)
        # Rows are multiples of 16 bytes: Triton compiles anew for addresses that are not.
        width = len(layout.layers) + len(layout.layers) % 2
        self._tables = torch.zeros((GRAPH_TABLES, width), dtype=torch.int64, device=device)
        self._table_rows: dict[tuple[int, ...], Any] = {}
        self._addresses = _Uploads(8, width, torch.int64, device)
        self._token_rows = _Uploads(4, (max_tokens + 15) // 16 * 16, torch.uint8, device)
        self._bins = bins(layout.experts)
        self._compiled: dict[Any, Any] = {}
        self._fast = True

    def warm_up(self) -> None:
        """Compile the kernels and run them once on nothing, so that no step waits for a compiler."""
        layers, experts = len(self._layout.layers), self._layout.experts
        table, counts = self._tables[0], self._current.counts
        rows = torch.zeros(16, dtype=torch.uint8, device=self._device)
        top_k = self._layout.top_k

        def all_kinds() -> None:
            for wide in (False, True):
                for block in BLOCKS:
                    shape = (experts, self._bins, block, wide)
                    self._launch(gpuglass_count, (layers, 1), block, table, counts, 0, 0, *shape)
                    by_tenant = (layers, 0, top_k, experts, block, wide)
                    grid = (layers, 1)
                    self._launch(gpuglass_count_by_tenant, grid, block, table, counts, rows, *by_tenant)

        all_kinds()
        try:
            all_kinds()
        except Exception:
            # Another Triton wants to be called otherwise: slower, and just as right.
            self._fast = False
            self._compiled.clear()

    def _launch(self, kernel: Any, grid: tuple[int, int], block: int, *arguments: Any) -> None:
        """Launch a kernel. From the second time on without Triton's look-up, which costs more than the
        launch; the arguments are alike enough: addresses are multiples of 16, numbers are not specialised."""
        key = (kernel, arguments[-2:])
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1)](*arguments)
            return
        compiled = kernel[grid](*arguments, num_warps=_warps(block))
        if self._fast and compiled is not None:
            self._compiled[key] = compiled

    def add(self, choices: Choices, tokens: int, rows: int | Sequence[tuple[int, int]]) -> bool:
        """See `experts.Counts`. Queues one kernel on the current stream."""
        first = choices.ids[0]
        size = first.element_size()
        if size not in (4, 8) or first.is_floating_point():
            return False
        table = self._table(choices, size)
        if table is None:
            return False
        buffer = self._current
        layers, experts, top_k = len(self._layout.layers), self._layout.experts, self._layout.top_k
        n = tokens * top_k
        block = block_for(n)
        grid = (layers, (n + block - 1) // block)
        if isinstance(rows, int):
            self._launch(
                gpuglass_count,
                grid,
                block,
                table,
                buffer.counts,
                rows * layers,
                n,
                experts,
                self._bins,
                block,
                size == 8,
            )
        else:
            row, width = np.array(rows, dtype=np.int64).T
            token_rows = self._token_rows.put(np.repeat(row, width).astype(np.uint8))
            if token_rows is None:
                return False
            self._launch(
                gpuglass_count_by_tenant,
                grid,
                block,
                table,
                buffer.counts,
                token_rows,
                layers,
                n,
                top_k,
                experts,
                block,
                size == 8,
            )
        self._record(buffer.last)
        buffer.used = True
        return True

    def _table(self, choices: Choices, size: int) -> Any | None:
        if choices.key:
            known = self._table_rows.get(choices.key)
            if known is not None:
                return known
        for tensor in choices.ids:
            if not tensor.is_contiguous() or tensor.element_size() != size:
                return None
        addresses = self._addresses.put(
            np.array([tensor.data_ptr() for tensor in choices.ids], dtype=np.int64)
        )
        if addresses is None or not choices.key or len(self._table_rows) >= GRAPH_TABLES:
            return addresses
        table = self._tables[len(self._table_rows)]
        table.copy_(addresses)
        self._table_rows[choices.key] = table
        return table

    def swap(self) -> None:
        """See `experts.Counts`. On the link's thread, while the engine's thread does not count."""
        taken = self._current
        self._current = self._buffers[1] if taken is self._buffers[0] else self._buffers[0]
        self._taken = taken
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            if taken.used:
                self._side.wait_event(taken.last)
            self._pinned.copy_(taken.counts, non_blocking=True)
            taken.counts.zero_()
            self._copied.record()
            taken.used = False

    def collect(self) -> Any | None:
        """See `experts.Counts`. On the link's thread."""
        deadline = time.monotonic() + _COLLECT_SECONDS
        while not self._copied.query():
            if time.monotonic() > deadline:
                return None
            time.sleep(0.001)
        self._taken = None
        return self._pinned.numpy().astype(np.int64)


def _warps(block: int) -> int:
    return 1 if block <= 256 else 4
