"""Detectors as the sidecar runs them: settings, inputs by role, and what is published of each verdict.

The detectors themselves know neither labels nor frames; this module fits them to `interface.Analyzer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import numpy as np

from anomaly_sidecar import rows as table
from anomaly_sidecar.detectors.leak import Leaks
from anomaly_sidecar.detectors.recurrence import Recurrences
from anomaly_sidecar.detectors.shift import Shifts
from anomaly_sidecar.detectors.silence import Held, silent, stranded
from anomaly_sidecar.detectors.straggler import Stragglers
from anomaly_sidecar.interface import (
    Column,
    FloatArray,
    Frame,
    Kind,
    Labels,
    Output,
    Point,
    Role,
    RowArray,
    State,
    Workers,
)
from gpuglass.families import anomaly as families

VERSION = 1
S = TypeVar("S")
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Keys of one detector in the configuration; what is not declared is refused."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, float) and not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name}: must be a number above 0, is {value:g}")


class LeakSettings(_Settings, frozen=True):
    """Memory leak."""

    min_bytes_per_hour: float = 0.2 * (1 << 30)
    """Slower growth is no leak."""


class StrandedSettings(_Settings, frozen=True):
    """Stranded memory."""

    min_bytes: float = float(1 << 30)
    seconds: float = 1800.0
    """That the GPU must have been idle."""


class SilentSettings(_Settings, frozen=True):
    """Silent failure."""

    seconds: float = 120.0
    """Without a token while requests are open."""


class RecurringSettings(_Settings, frozen=True):
    """Recurring peaks."""

    timezone: str = "UTC"
    """In which hours are counted, as "Europe/Berlin"."""

    def __post_init__(self) -> None:
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"timezone: {self.timezone!r} is not known on this machine") from None


class ShiftSettings(_Settings, frozen=True):
    """Level shift after a deployment: nothing to set."""


class StragglerSettings(_Settings, frozen=True):
    """Stragglers."""

    group_by: tuple[str, ...] = ("model_name", "engine", "server")
    """Labels that members of one group share."""
    tolerance: float = 0.15
    """Share of the peers' median by which a member may lag."""
    hold: float = 120.0
    """Half-life in seconds: a verdict needs twice this time of lag without a break."""
    low_is_slow: bool = False
    """Set for rates; times per step are slow when they are high."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance >= 1:
            raise ValueError(f"tolerance: must be below 1, is {self.tolerance:g}")


class Detector(Generic[S]):
    """A detector's state with the life of its rows. Implements `interface.Analyzer` but for two methods."""

    def __init__(self, empty: Callable[[int], S]) -> None:
        self._empty = empty
        self.state = empty(0)
        self.live = np.zeros(0, np.bool_)
        """(rows,) taken by a series."""
        self.time = float("nan")

    def admit(self, rows: RowArray, labels: Sequence[Labels], capacity: int) -> None:
        """See `Analyzer`."""
        table.resize(self.state, self._empty(capacity))
        table.clear(self.state, rows, self._empty(1))
        self.live = np.concatenate([self.live, np.zeros(max(0, capacity - len(self.live)), np.bool_)])
        self.live[rows] = True

    def evict(self, rows: RowArray) -> None:
        """See `Analyzer`."""
        table.clear(self.state, rows, self._empty(1))
        self.live[rows] = False

    def observe(self, frame: Frame) -> None:
        """See `Analyzer`."""
        self.time = frame.time
        self.step(frame.time, frame.values)

    def step(self, time: float, values: Mapping[str, FloatArray]) -> None:
        """One frame's values by role."""
        raise NotImplementedError

    def outputs(self) -> Iterable[Output]:
        """See `Analyzer`."""
        raise NotImplementedError

    def save(self) -> State:
        """See `Analyzer`."""
        saved = table.save(self.state, VERSION)
        saved.meta["time"] = self.time if np.isfinite(self.time) else None
        return saved

    def restore(self, state: State) -> None:
        """See `Analyzer`."""
        table.restore(self.state, state, VERSION)
        time = state.meta.get("time")
        self.time = float(time) if isinstance(time, (int, float)) else float("nan")

    def _of(self, values: FloatArray) -> FloatArray:
        """NaN for free rows."""
        return np.where(self.live, values, np.nan)


class LeakDetector(Detector[Leaks]):
    """Kind "leak"."""

    def __init__(self, settings: LeakSettings) -> None:
        super().__init__(lambda rows: Leaks.empty(rows, settings.min_bytes_per_hour))
        self._seen = np.zeros(0, np.bool_)

    def step(self, time: float, values: Mapping[str, FloatArray]) -> None:
        """See `Detector`."""
        used = values["used"]
        self._seen = ~np.isnan(used)
        self.state.observe(time, used, values.get("kv"), values.get("load"), values.get("started"))

    def outputs(self) -> Iterable[Output]:
        """See `Analyzer`."""
        if len(self._seen) == len(self.live):
            seen = self._of(np.where(self._seen, 1.0, np.nan))
            yield Column(
                families.LEAK, np.where(np.isnan(seen), np.nan, self.state.leaking.astype(np.float64))
            )
        yield Column(families.LEAK_RATE, self._of(self.state.rate / 3600.0))
        yield Column(families.LEAK_RESTARTS, self._of(self.state.restarts.astype(np.float64)))


class StrandedDetector(Detector[Held]):
    """Kind "stranded"."""

    def __init__(self, settings: StrandedSettings) -> None:
        super().__init__(lambda rows: Held.empty(rows, settings.seconds))
        self._settings = settings
        self._used: FloatArray = np.zeros(0)

    def step(self, time: float, values: Mapping[str, FloatArray]) -> None:
        """See `Detector`."""
        self._used = values["used"]
        holds, known = stranded(self._used, values["busy"], values.get("demand"), self._settings.min_bytes)
        self.state.observe(time, holds, known)

    def outputs(self) -> Iterable[Output]:
        """See `Analyzer`."""
        if len(self._used) != len(self.live):
            return
        held = self.state.seconds(self.time)
        bytes_held = np.where(self.state.verdict(self.time), self._used, 0.0)
        yield Column(families.STRANDED, self._of(np.where(np.isnan(held), np.nan, bytes_held)))
        yield Column(families.STRANDED_SECONDS, self._of(held))


class SilentDetector(Detector[Held]):
    """Kind "silent"."""

    def __init__(self, settings: SilentSettings) -> None:
        super().__init__(lambda rows: Held.empty(rows, settings.seconds))

    def step(self, time: float, values: Mapping[str, FloatArray]) -> None:
        """See `Detector`."""
        self.state.observe(time, *silent(values["alive"], values["demand"], values["tokens"]))

    def outputs(self) -> Iterable[Output]:
        """See `Analyzer`."""
        held = self.state.seconds(self.time)
        verdict = self.state.verdict(self.time).astype(np.float64)
        yield Column(families.SILENT, self._of(np.where(np.isnan(held), np.nan, verdict)))
        yield Column(families.SILENT_SECONDS, self._of(held))


class RecurringDetector(Detector[Recurrences]):
    """Kind "recurring"."""

    def __init__(self, settings: RecurringSettings) -> None:
        super().__init__(Recurrences.empty)
        self._zone = ZoneInfo(settings.timezone)

    def step(self, time: float, values: Mapping[str, FloatArray]) -> None:
        """See `Detector`."""
        offset = datetime.fromtimestamp(time, UTC).astimezone(self._zone).utcoffset()
        self.state.observe(time + (offset.total_seconds() if offset else 0.0), values["value"])

    def outputs(self) -> Iterable[Output]:
        """See `Analyzer`."""
        state = self.state
        for row in np.flatnonzero(self.live & (state.start >= 0)):
            weekday = int(state.weekday[row])
            labels = {
                "weekday": WEEKDAYS[weekday] if weekday >= 0 else "every",
                "from_hour": f"{state.start[row]:02d}:00",
                "to_hour": f"{(state.start[row] + state.hours[row]) % 24:02d}:00",
            }
            yield Point(families.RECURRING_STRENGTH, float(state.strength[row]), labels, int(row))
            yield Point(families.RECURRING_REPEATS, float(state.repeats[row]), labels, int(row))


class ShiftDetector(Detector[Shifts]):
    """Kind "shift"."""

    def __init__(self, settings: ShiftSettings) -> None:
        super().__init__(Shifts.empty)

    def step(self, time: float, values: Mapping[str, FloatArray]) -> None:
        """See `Detector`."""
        self.state.observe(time, values["value"], values["version"])

    def outputs(self) -> Iterable[Output]:
        """See `Analyzer`."""
        yield Column(families.SHIFT, self._of(self.state.shift))
        finite = np.where(np.isfinite(self.state.relative), self.state.relative, np.nan)
        yield Column(families.SHIFT_RELATIVE, self._of(finite))


class StragglerDetector(Detector[Stragglers]):
    """Kind "straggler"."""

    def __init__(self, settings: StragglerSettings) -> None:
        super().__init__(
            lambda rows: Stragglers.empty(rows, settings.tolerance, settings.hold, settings.low_is_slow)
        )
        self._by = frozenset(settings.group_by)
        self._keys: dict[int, Labels] = {}
        """Group of each row. Numbers of groups are those of their first row: they need no table of their
        own."""

    def admit(self, rows: RowArray, labels: Sequence[Labels], capacity: int) -> None:
        """See `Analyzer`."""
        super().admit(rows, labels, capacity)
        for row, of_row in zip(rows, labels, strict=True):
            self._keys[int(row)] = tuple(pair for pair in of_row if pair[0] in self._by)
        self._number()

    def evict(self, rows: RowArray) -> None:
        """See `Analyzer`."""
        super().evict(rows)
        for row in rows:
            self._keys.pop(int(row), None)
        self._number()

    def _number(self) -> None:
        first: dict[Labels, int] = {}
        for row in sorted(self._keys):
            self.state.group[row] = first.setdefault(self._keys[row], row)

    def step(self, time: float, values: Mapping[str, FloatArray]) -> None:
        """See `Detector`."""
        self.state.observe(time, values["value"])

    def outputs(self) -> Iterable[Output]:
        """See `Analyzer`."""
        known = ~np.isnan(self.state.ratio)
        yield Column(families.STRAGGLER, np.where(known, self.state.verdict.astype(np.float64), np.nan))
        yield Column(families.STRAGGLER_RATIO, self.state.ratio)
        yield Column(families.STRAGGLER_RANK, self.state.rank)


def _make(detector: Callable[[Any], Detector[Any]]) -> Callable[[str, Any, Workers], Detector[Any]]:
    return lambda name, settings, workers: detector(settings)


_VALUE = Role("value", "What is looked at.")
_USED = Role("used", "Bytes of GPU memory in use.")

KINDS: tuple[Kind, ...] = (
    Kind(
        "leak",
        "memory that grows steadily",
        (
            _USED,
            Role("kv", "Bytes of it in the KV cache: a cache that fills is no leak.", required=False),
            Role("load", "Requests per second: growth that follows it is no leak.", required=False),
            Role("started", "Start of the process in Unix seconds: a restart begins anew.", required=False),
        ),
        LeakSettings,
        _make(LeakDetector),
        history=8 * 3600.0,
        history_step=60.0,
    ),
    Kind(
        "stranded",
        "memory held by a GPU that does nothing",
        (
            _USED,
            Role("busy", "Share of time in which a kernel ran."),
            Role("demand", "Requests that run or wait.", required=False),
        ),
        StrandedSettings,
        _make(StrandedDetector),
        history=2 * 3600.0,
        history_step=60.0,
    ),
    Kind(
        "silent",
        "alive, asked, and producing nothing",
        (
            Role("alive", "1 while the engine is up."),
            Role("demand", "Requests that run or wait."),
            Role("tokens", "Tokens per second, prompt and output together."),
        ),
        SilentSettings,
        _make(SilentDetector),
    ),
    Kind(
        "recurring",
        "peaks at the same hours, daily or on a weekday",
        (_VALUE,),
        RecurringSettings,
        _make(RecurringDetector),
        history=28 * 86400.0,
        history_step=1800.0,
    ),
    Kind(
        "shift",
        "another level since a deployment",
        (_VALUE, Role("version", "Number that changes with each deployment, as a start time.")),
        ShiftSettings,
        _make(ShiftDetector),
        history=86400.0,
        history_step=300.0,
    ),
    Kind(
        "straggler",
        "the rank that lags behind its peers",
        (_VALUE,),
        StragglerSettings,
        _make(StragglerDetector),
    ),
)
