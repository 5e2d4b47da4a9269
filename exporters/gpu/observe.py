"""One GPU's readings and what could be read: every NVML call passes here.

A call's error is sorted once: the field is not supported (and is left alone for a while), the GPU or the
driver is down (raised, for the worker), or the call failed this time (counted). Collectors see a value or
None, never an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import pynvml

from exporters.gpu.bulk import FieldQuery
from gpuglass.family import Family

T = TypeVar("T")

RETRY_UNSUPPORTED = 300.0
"""Seconds after which a field that was not supported is tried again: a MIG change or a new permission may
give it."""


class State(StrEnum):
    """What is known about a field on a GPU, exported as `gpuglass_gpu_capability`."""

    SUPPORTED = "supported"
    UNSUPPORTED = "unsupported"
    MISSING_FUNCTION = "missing_function"
    NO_PERMISSION = "no_permission"
    ERROR = "error"


class GpuDown(Exception):
    """This GPU does not answer: no value of it can be trusted. `reason` is a word for a label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DriverDown(Exception):
    """The driver has to be initialised again before any GPU answers."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


_DOWN = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "lost",
    pynvml.NVML_ERROR_RESET_REQUIRED: "reset_required",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "gone",
}
_DRIVER_DOWN = {
    pynvml.NVML_ERROR_UNINITIALIZED: "uninitialized",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "driver_not_loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "version_mismatch",
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "library_not_found",
}
_LASTING = {
    pynvml.NVML_ERROR_NOT_SUPPORTED: State.UNSUPPORTED,
    pynvml.NVML_ERROR_INVALID_ARGUMENT: State.UNSUPPORTED,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH: State.MISSING_FUNCTION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: State.MISSING_FUNCTION,
    pynvml.NVML_ERROR_DEPRECATED: State.MISSING_FUNCTION,
    pynvml.NVML_ERROR_NO_PERMISSION: State.NO_PERMISSION,
}
_NOTHING = frozenset({pynvml.NVML_SUCCESS, pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_NO_DATA})
"""Codes of a list call that mean an empty list. pynvml raises NVMLError(0) where its size probe finds
nothing."""


def code_of(error: Exception) -> int:
    """NVML's code of an exception; whatever ctypes raises for garbage counts as unknown."""
    value = getattr(error, "value", None)
    return value if isinstance(value, int) else int(pynvml.NVML_ERROR_UNKNOWN)


def state_of(error: Exception) -> State:
    """What an error of a field says about it."""
    return _LASTING.get(code_of(error), State.ERROR)


def driver_reason(error: Exception) -> str:
    """A word for why the driver cannot be used."""
    return _DRIVER_DOWN.get(code_of(error), "error")


@dataclass(frozen=True, slots=True)
class Entry:
    """One value read from a GPU. `labels` follow the family's first two, which name the GPU."""

    family: Family
    value: float
    labels: tuple[str, ...]


class Observations:
    """Reads fields of one GPU and remembers which of them can be read. Used by one thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.states: dict[str, State] = {}
        self.errors = 0
        self.entries: list[Entry] = []
        self._clock = clock
        self._retry_at: dict[str, float] = {}
        self.reads = 0

    def add(self, family: Family, value: float | None, *labels: str) -> None:
        """Note a value for publication; None is unknown and noted nowhere."""
        if value is not None:
            self.entries.append(Entry(family, value, labels))

    def take(self) -> tuple[Entry, ...]:
        """Give the entries noted since the last call."""
        entries = tuple(self.entries)
        self.entries = []
        return entries

    def read(self, field: str, call: Callable[..., T], *arguments: Any) -> T | None:
        """Call NVML for `field`; None if it has no value. Raises `GpuDown` or `DriverDown`."""
        if not self.wanted(field):
            return None
        try:
            value = call(*arguments)
        except pynvml.NVMLError as error:
            self.failed(field, error)
            return None
        self.succeeded(field)
        return value

    def read_list(self, field: str, call: Callable[..., Sequence[T]], *arguments: Any) -> Sequence[T] | None:
        """As `read` for calls that give a list: "not found" means an empty one, for example an idle GPU."""
        if not self.wanted(field):
            return None
        try:
            value: Sequence[T] = call(*arguments)
        except pynvml.NVMLError as error:
            if code_of(error) not in _NOTHING:
                self.failed(field, error)
                return None
            value = ()
        self.succeeded(field)
        return value

    def wanted(self, field: str) -> bool:
        """False while a field is known not to be supported."""
        retry_at = self._retry_at.get(field) if self._retry_at else None
        return retry_at is None or self._clock() >= retry_at

    def succeeded(self, field: str) -> None:
        """Note that a field was read."""
        self.reads += 1
        if self.states.get(field) is not State.SUPPORTED:
            self.states[field] = State.SUPPORTED
            self._retry_at.pop(field, None)

    def failed(self, field: str, error: Exception) -> None:
        """Sort an error; raises `GpuDown` or `DriverDown` for those that concern more than the field."""
        code = code_of(error)
        if code in _DOWN:
            raise GpuDown(_DOWN[code])
        if code in _DRIVER_DOWN:
            raise DriverDown(_DRIVER_DOWN[code])
        self.refuse(field, state_of(error))

    def refuse(self, field: str, state: State) -> None:
        """Note that a field has no value: for a while if it is not supported, this time only after an
        error."""
        self.states[field] = state
        if state is State.ERROR:
            self.errors += 1
        else:
            self._retry_at[field] = self._clock() + RETRY_UNSUPPORTED


@dataclass(frozen=True, slots=True)
class Field:
    """One of NVML's numbered fields: its id, the scope (a link) and the capability under which it is
    known."""

    id: int
    capability: str
    scope: int = 0


class FieldReader:
    """Reads a list of fields in one driver call, without those that are not supported."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)
        self.kinds = [-1] * len(self.fields)
        """nvmlValueType_t of each value as last read; -1 for what was never read."""
        self._wanted: list[int] = []
        self._query = FieldQuery(())

    def read(self, see: Observations, handle: Any) -> list[float | None]:
        """Values in the order of the fields; None where there is none."""
        found: list[float | None] = [None] * len(self.fields)
        wanted = [index for index, field in enumerate(self.fields) if see.wanted(field.capability)]
        if not wanted:
            return found
        if wanted != self._wanted:
            self._wanted = wanted
            self._query = FieldQuery([(self.fields[index].id, self.fields[index].scope) for index in wanted])
        answers = see.read("fields", self._query.read, handle)
        for index, (status, number, kind) in zip(wanted, answers or (), strict=False):
            if number is not None:
                found[index], self.kinds[index] = number, kind
                see.succeeded(self.fields[index].capability)
            elif status != pynvml.NVML_SUCCESS:
                see.failed(self.fields[index].capability, pynvml.NVMLError(status))
        return found
