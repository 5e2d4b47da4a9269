"""The driver calls that fill arrays, read without one Python object per element.

pynvml's wrappers make a ctypes object for each of a hundred elements and pass every attribute of it through
Python; at one look per second and GPU that is most of the exporter's CPU time. Here the same functions,
structures and error classes of pynvml are used with buffers that are kept, and decoded with `struct`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pynvml

_FIELD_VALUE = struct.Struct("=IIqqII8s")
_SAMPLE = struct.Struct("=QQ")
_VALUES = tuple(struct.Struct(code) for code in ("=d", "=I", "=Q", "=Q", "=q", "=i", "=H"))
"""Decoders of nvmlValue_t by nvmlValueType_t: double, unsigned int, long and long long, signed ones,
short."""

for _struct, _size in ((pynvml.c_nvmlFieldValue_t, _FIELD_VALUE.size), (pynvml.c_nvmlSample_t, _SAMPLE.size)):
    if ctypes.sizeof(_struct) != _size:
        raise ImportError(
            f"pynvml's {_struct.__name__} is not {_size} bytes: this version of the binding is unknown"
        )


def function(name: str) -> Callable[..., int]:
    """A function of the loaded library; raises NVMLError_FunctionNotFound."""
    found: Callable[..., int] = pynvml._nvmlGetFunctionPointer(name)
    return found


def check(status: int) -> None:
    """Raise the NVMLError of a status that is not success."""
    if status != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(status)


class FieldQuery:
    """A fixed list of (field id, scope), asked in one call."""

    def __init__(self, fields: Sequence[tuple[int, int]]) -> None:
        self._count = len(fields)
        self._buffer = (pynvml.c_nvmlFieldValue_t * self._count)()
        for slot, (field, scope) in enumerate(fields):
            self._buffer[slot].fieldId = field
            self._buffer[slot].scopeId = scope
        self._view = memoryview(self._buffer).cast("B")

    def read(self, handle: Any) -> list[tuple[int, float | None, int]]:
        """Status, number and nvmlValueType_t of each field; the number is None where the status is no
        success."""
        check(function("nvmlDeviceGetFieldValues")(handle, self._count, self._buffer))
        return [
            (status, _number(kind, value) if status == pynvml.NVML_SUCCESS else None, kind)
            for _, _, _, _, kind, status, value in _FIELD_VALUE.iter_unpack(self._view)
        ]


def _number(kind: int, value: bytes) -> float | None:
    """Number of an nvmlValue_t; None for a type that this version does not know."""
    if kind >= len(_VALUES):
        return None
    number: float = _VALUES[kind].unpack_from(value)[0]
    return number


class SampleQuery:
    """The driver's ring of samples of one kind."""

    def __init__(self, kind: int) -> None:
        self._kind = kind
        self._buffer: Any = None

    def read(self, handle: Any, since_us: int) -> list[tuple[int, int]]:
        """Timestamp in microseconds and unsigned value of each sample newer than `since_us`; raises
        NVMLError."""
        get = function("nvmlDeviceGetSamples")
        kind, count = pynvml._nvmlValueType_t(), ctypes.c_uint(0)
        since = ctypes.c_ulonglong(since_us)
        if self._buffer is None:
            check(get(handle, self._kind, since, ctypes.byref(kind), ctypes.byref(count), None))
            self._buffer = (pynvml.c_nvmlSample_t * max(1, count.value))()
        count.value = len(self._buffer)
        status = get(handle, self._kind, since, ctypes.byref(kind), ctypes.byref(count), self._buffer)
        if status == pynvml.NVML_ERROR_INSUFFICIENT_SIZE:
            self._buffer = None  # the ring has grown; the next call asks for its size again
        check(status)
        view = memoryview(self._buffer).cast("B")[: count.value * _SAMPLE.size]
        # The value is a union: an unsigned int stands in its lower half.
        return [(when, value & 0xFFFFFFFF) for when, value in _SAMPLE.iter_unpack(view)]


class GpmQuery:
    """A list of GPM metrics, computed in one call from two sample buffers."""

    def __init__(self) -> None:
        self._get = pynvml.c_nvmlGpmMetricsGet_t()
        self._get.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        self._view = memoryview(self._get).cast("B")
        self._offset = type(self._get).metrics.offset
        size = ctypes.sizeof(pynvml.c_nvmlGpmMetric_t)
        self._metric = struct.Struct(f"=IId{size - 16}x")
        self._asked: tuple[int, ...] = ()

    def read(self, metrics: tuple[int, ...], older: Any, newer: Any) -> list[tuple[int, float]]:
        """Status and value of each metric; raises NVMLError."""
        get = self._get
        if metrics != self._asked:
            get.numMetrics = len(metrics)
            for slot, metric in enumerate(metrics):
                get.metrics[slot].metricId = metric
            self._asked = metrics
        get.sample1, get.sample2 = older, newer
        check(function("nvmlGpmMetricsGet")(ctypes.byref(get)))
        view = self._view[self._offset : self._offset + len(metrics) * self._metric.size]
        return [(status, value) for _, status, value in self._metric.iter_unpack(view)]
