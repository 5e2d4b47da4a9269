"""What the sidecar's parts agree on: queries, frames of samples, analyzers, outputs, and their state.

The reader turns one query and cycle into a `Frame`: one time, one value per series. An `Analyzer` (scores,
detectors, forecasts) sees each frame once and in order of time, whether it comes from now or from history,
and gives `Output`s. It knows no clock but `Frame.time`, so that two replicas that read the same data publish
the same values. Its state is plain arrays and JSON: it goes to disk and to worker processes, and never as a
pickle. The kinds of detectors and forecasts that can be configured are `anomaly_sidecar.detectors.KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from gpuglass.family import Family

FloatArray = NDArray[np.float64]
RowArray = NDArray[np.intp]
Labels = tuple[tuple[str, str], ...]
"""Labels of a series as pairs sorted by name, without `__name__`."""


class Direction(StrEnum):
    """Which side of the expected value can be anomalous."""

    BOTH = "both"
    ABOVE = "above"
    BELOW = "below"


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression whose series are scored. Durations in seconds."""

    name: str
    expression: str
    interval: float = 60.0
    """Between two evaluations; times of evaluation are multiples of it."""
    offset: float = 30.0
    """Evaluated at `now - offset`, when late samples have arrived."""
    history: float = 7 * 86400.0
    """Read at the first start."""
    history_step: float = 300.0
    """Resolution of that history; at least `interval`."""
    direction: Direction = Direction.BOTH
    min_deviation: float = 0.0
    """Smaller deviations from the expected value, in the series' own unit, are no anomaly."""
    min_relative_deviation: float = 0.0
    """The same as a share of the expected value."""
    valid_min: float = -np.inf
    """Values outside of [valid_min, valid_max] are gaps."""
    valid_max: float = np.inf
    bands: bool = False
    """Publish expected value, lower and upper band too."""
    limit: int = 20_000
    """Series admitted; further ones are refused and counted."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The samples of one evaluation.

    `values` has one array per role of the analyzer (the scores have the single role "value"), shape (rows,)
    with NaN where there is no sample: a gap, a free row, or a value outside of the valid range. `time` is the
    time of evaluation in Unix seconds, ascending from frame to frame but not evenly: after a gap it jumps.
    """

    time: float
    values: Mapping[str, FloatArray]
    step: float
    """Distance in seconds at which frames come at the moment: history may be coarser than the present."""
    live: bool = True
    """False while history is replayed."""


@dataclass(frozen=True, slots=True)
class Column:
    """Values of one family for all series of an analyzer, shape (rows,); NaN is not published.

    Published with the series' own labels, `query` (the analyzer's name) and `labels`.
    """

    family: Family
    values: FloatArray
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Point:
    """One value with labels of its own, beside `query`: for what is not per series, or rare."""

    family: Family
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)
    row: int | None = None
    """Adds the labels of this series."""


Output = Column | Point


@dataclass(frozen=True, slots=True)
class State:
    """State of a part, or arguments and result of a job in a worker: arrays and JSON, both by name.

    Arrays have numeric or fixed-width text types: object arrays are refused when they are written or read.
    """

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class StateError(ValueError):
    """A state that cannot be restored: another version, other shapes. The part starts anew and says so."""


class Analyzer(Protocol):
    """Scores, a detector or a forecast over all series of its inputs.

    Rows are numbers of series; arrays of state have one entry per row. Each call is bounded in time and
    memory by the number of rows. Calls come from one thread.
    """

    def admit(self, rows: RowArray, labels: Sequence[Labels], capacity: int) -> None:
        """New series in `rows`. Arrays have to hold `capacity` rows from now on; the rows start from nothing,
        whatever they held before."""

    def evict(self, rows: RowArray) -> None:
        """These series have gone for good. The rows may be admitted again for others."""

    def observe(self, frame: Frame) -> None:
        """Take in one frame; arrays have `capacity` values."""

    def outputs(self) -> Iterable[Output]:
        """What is to be published now, after the latest frame."""

    def save(self) -> State:
        """The whole state. The arrays may be views: they are written before the next call."""

    def restore(self, state: State) -> None:
        """Take a state that `save` gave, after `admit` was called for all of its rows with their old numbers.

        Afterwards everything goes on bit-identically. Raises `StateError`."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """Result of a job in a worker, or one line on why it failed (`state` is None)."""

    state: State | None
    error: str = ""


class Workers(Protocol):
    """Processes for fits that take longer than a cycle may."""

    def submit(self, key: str, job: str, arguments: State) -> bool:
        """Start `job`, "anomaly_sidecar.MODULE:FUNCTION", a function of `State` that returns `State`.

        False if the queue is full or a job of this key is under way: try again in a later cycle."""

    def take(self, key: str) -> JobResult | None:
        """The result of the job with this key, once; None while it is under way or unknown.

        A job that takes too long or whose process dies again and again gives an error."""

    def wait(self, key: str, seconds: float) -> tuple[JobResult | None, float]:
        """As `take`, but waits for the result; and the seconds that were waited, at most `seconds`."""

    def drop(self, key: str) -> None:
        """The result of the job with this key is not wanted any more."""


@dataclass(frozen=True, slots=True)
class Role:
    """An input of a detector: one PromQL expression under a name."""

    name: str
    help: str
    required: bool = True


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of detector or forecast that the configuration can name.

    The first role decides which series there are; samples of other roles are joined by the labels `by` of the
    configuration (all labels where it is empty). A role with a single series without labels counts for all
    rows. Optional roles that are not configured are missing in `Frame.values`.
    """

    name: str
    summary: str
    roles: tuple[Role, ...]
    settings: type[msgspec.Struct]
    """Frozen, `forbid_unknown_fields`, with a default for each key; `__post_init__` raises ValueError as
    "key: what is wrong"."""
    create: Callable[[str, Any, Workers], Analyzer]
    """From the configured name, an instance of `settings`, and the workers."""
    history: float = 0.0
    """Seconds of history that it can use at the first start."""
    history_step: float = 300.0


class Clock(Protocol):
    """The machine's clocks, passed in so that tests can move them."""

    def time(self) -> float:
        """Unix seconds; may jump."""

    def monotonic(self) -> float:
        """Seconds that never go back."""

    def wait(self, seconds: float) -> bool:
        """Wait; True if the sidecar is to end."""
