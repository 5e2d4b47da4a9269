"""When fits are asked for and when they take effect: by the time of the data alone, so that replicas agree.

A fit is asked for when a cell has closed, from the cells up to it: the first one as soon as there are two
days of them, the others every `refit` seconds, at a time that follows from the labels of the series, so that
they spread. It takes effect `DELAY` after that cell, whenever the worker answered in between. One that is not
there by then is late: that is counted, and it takes effect a multiple of `DELAY` later. In flow cells that
closed, out flow results to take now; state are two numbers per series.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar import rows as table
from anomaly_sidecar.interface import JobResult, Labels, RowArray, State, Workers
from anomaly_sidecar.models.history import FIT_DELAY, RING_DAYS, Floats, History

JOB = "anomaly_sidecar.models.seasonal:job"
MIN_DAYS = 2
PATIENCE = 30.0
"""Seconds for which a replay of what was missed waits for fits, in all: so it takes them where they were
taken live."""
RESULTS = ("taken", "nothing", "failed", "late")


@dataclass(slots=True)
class Asked:
    """State per series; numbers of cells as floats."""

    cell: Floats
    """(rows,) latest cell of the latest fit; -1 before the first, NaN for a free row."""
    due: Floats
    """(rows,) cell at whose end the fit under way takes effect; NaN where there is none."""
    lived: bool = False
    """Whether the present was ever reached: what is read before it is too much to fit each day of it."""

    @classmethod
    def empty(cls, rows: int) -> Asked:
        """Free rows."""
        return cls(np.full(rows, np.nan), np.full(rows, np.nan))


@dataclass(slots=True)
class Fits:
    """Fits of one analyzer's series. `step` and `refit` in seconds."""

    name: str
    step: float
    refit: float
    workers: Workers
    asked: Asked = field(default_factory=lambda: Asked.empty(0))
    counts: Counter[str] = field(default_factory=Counter)
    """By one of `RESULTS`."""
    _phase: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(rows,) cells by which the daily times are moved."""
    _sent: dict[int, str] = field(default_factory=dict)
    """Key of the job under way by row."""
    _patience: float = PATIENCE

    @property
    def delay(self) -> int:
        """Cells between the latest that a fit saw and the one at whose end it takes effect."""
        return max(1, round(FIT_DELAY / self.step))

    def resize(self, capacity: int) -> None:
        """Make room."""
        table.resize(self.asked, Asked.empty(capacity))
        self._phase = np.concatenate([self._phase, np.zeros(max(0, capacity - len(self._phase)), np.int64)])

    def admit(self, rows: RowArray, labels: Sequence[Labels]) -> None:
        """New series in `rows`."""
        self.evict(rows)
        self.asked.cell[rows] = -1.0
        period = max(1, round(self.refit / self.step))
        for row, own in zip(rows.tolist(), labels, strict=True):
            self._phase[row] = zlib.crc32(repr(own).encode()) % period

    def evict(self, rows: RowArray) -> None:
        """These series have gone; results of their fits are not wanted any more."""
        table.clear(self.asked, rows, Asked.empty(1))
        for row in rows.tolist():
            self._drop(row)

    def _drop(self, row: int) -> None:
        key = self._sent.pop(row, None)
        if key is not None:
            self.workers.drop(key)

    def take(self, index: int, live: bool) -> Iterator[tuple[int, State]]:
        """Fits that take effect at the end of cell `index`: the row, and what the job gave."""
        due = self.asked.due
        for row in np.flatnonzero(due <= index).tolist():
            result = self._result(row, live)
            if result is None:
                # Counted once per fit: later it stays late.
                first = due[row] == self.asked.cell[row] + self.delay
                self.counts["late"] += bool(first)
                due[row] += self.delay * ((index - due[row]) // self.delay + 1)
                continue
            due[row] = np.nan
            self._sent.pop(row, None)
            if result.state is None:
                self.counts["failed"] += 1
            elif not result.state.arrays:
                self.counts["nothing"] += 1
            else:
                self.counts["taken"] += 1
                yield row, result.state

    def _result(self, row: int, live: bool) -> JobResult | None:
        key = self._sent.get(row)
        if key is None:
            return None
        if live or self._patience <= 0:
            return self.workers.take(key)
        result, waited = self.workers.wait(key, self._patience)
        self._patience -= waited
        return result

    def ask(self, history: History, live: bool) -> None:
        """Ask for fits that are due after the latest cell, and again for those that could not be sent."""
        asked, index = self.asked, history.index
        asked.lived |= live
        if not asked.lived:
            return
        period = max(1, round(self.refit / self.step))
        passed = (index - self._phase) // period > (asked.cell - self._phase) // period
        due = (history.seen >= MIN_DAYS * history.day) & ((asked.cell == -1.0) | (passed & (asked.cell >= 0)))
        for row in np.flatnonzero(due).tolist():
            self._drop(row)
            asked.cell[row], asked.due[row] = index, index + self.delay
        for row in np.flatnonzero(~np.isnan(asked.due)).tolist():
            if row not in self._sent and not self._send(row, history):
                break

    def _send(self, row: int, history: History) -> bool:
        cell = int(self.asked.cell[row])
        first = max(cell - RING_DAYS * history.day, history.index - history.ring.shape[1]) + 1
        cells = history.ring[row, np.arange(first, cell + 1) % history.ring.shape[1]].astype(np.float64)
        begin = int((~np.isnan(cells)).argmax()) if len(cells) else 0
        arguments = State({"values": cells[begin:]}, {"first": first + begin, "period": history.day})
        key = f"{self.name}/{row}/{cell}"
        if not self.workers.submit(key, JOB, arguments):
            return False
        self._sent[row] = key
        return True
