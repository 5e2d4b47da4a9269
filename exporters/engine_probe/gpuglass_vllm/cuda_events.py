"""CUDA events for the engine's thread, past what torch does around them.

Recording or asking for an event costs ten microseconds or more there: the driver's code and data have left
the processor's caches since the last step. Torch's look-up of the stream, and its methods in Python, would
double that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def new_event() -> Any:
    """An event that can be timed."""
    import torch

    return torch.cuda.Event(enable_timing=True)


def query() -> Callable[[Any], bool]:
    """Whether the device has passed an event."""
    asked: Callable[[Any], bool] = _base().query
    return asked


def recorder(device: Any) -> Callable[[Any], None]:
    """Puts an event on the current stream of the calling thread."""
    import torch

    index = device.index if device.index is not None else torch.cuda.current_device()
    current_handle = torch._C._cuda_getCurrentRawStream
    stream = torch.cuda.current_stream(index)
    handle = current_handle(index)
    put = _base().record

    def record(event: Any) -> None:
        nonlocal stream, handle
        now = current_handle(index)
        if now != handle:
            stream, handle = torch.cuda.current_stream(index), now
        put(event, stream)

    return record


def _base() -> Any:
    """The class of events in C, whose methods torch's own class calls from Python."""
    import torch

    return getattr(torch._C, "_CudaEventBase", torch.cuda.Event)
