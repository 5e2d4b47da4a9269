"""Which row of the arrays is which series: admission, joining of roles, and forgetting of the gone.

In flow label bytes as the server wrote them, out flow row numbers. Rows are reused; when the table is full
the series that has been missing longest makes room for a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.interface import FloatArray, Labels, RowArray
from anomaly_sidecar.reader import labels_of

_GROWTH = 16
"""Rows to begin with: what a row costs, it costs empty, too."""
_KEYS_PER_ROW = 4
"""Spellings of label sets remembered per row, before all are read anew."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What one frame did to the table."""

    admitted: list[int] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)
    refused: int = 0
    ambiguous: int = 0
    """Samples that belong to one series with another sample of the same time; both are dropped."""


class SeriesTable:
    """Rows of one query or detector. `by` keeps only these labels; empty: all, `metric` if `keep_name`."""

    def __init__(self, limit: int, ttl: float, by: Sequence[str] = (), keep_name: bool = True) -> None:
        self._keep_name = keep_name
        self.limit = limit
        self.ttl = ttl
        self._by = frozenset(by)
        self.capacity = 0
        self.labels: list[Labels | None] = []
        """By row; None for a free one."""
        self._row_of: dict[Labels, int] = {}
        self._key_rows: dict[bytes, int] = {}
        self._free: list[int] = []
        self.missing = np.zeros(0)
        """Seconds for which each row's series did not come, while others did."""

    def __len__(self) -> int:
        return len(self._row_of)

    def rows(self) -> RowArray:
        """Rows that are taken."""
        return np.fromiter((row for row, labels in enumerate(self.labels) if labels is not None), np.intp)

    def reduced(self, key: bytes) -> Labels:
        """Labels of a series as this table joins them."""
        labels = labels_of(key)
        if self._by:
            return tuple(pair for pair in labels if pair[0] in self._by)
        return labels if self._keep_name else tuple(pair for pair in labels if pair[0] != "metric")

    def locate(self, keys: Sequence[bytes], admit: bool) -> tuple[RowArray, Changes]:
        """Rows of the series, -1 for those that have none; with `admit` new ones get one."""
        known = self._key_rows
        changes = Changes()
        rows = np.fromiter((known.get(key, -1) for key in keys), np.intp, len(keys))
        unknown = np.flatnonzero(rows < 0)
        if not len(unknown):
            return rows, changes
        refused = 0
        present = set(rows[rows >= 0].tolist())
        wanted: list[tuple[int, Labels]] = []
        for index in unknown.tolist():
            labels = self.reduced(keys[index])
            row = self._row_of.get(labels, -1)
            if row < 0:
                wanted.append((index, labels))
            else:
                rows[index] = row
                present.add(row)
                self._remember(keys[index], row)
        if not admit:
            return rows, changes
        for index, labels in wanted:
            found = self._row_of.get(labels)
            if found is None:
                found = self._take(present, changes)
                if found is None:
                    refused += 1
                    continue
                self.labels[found] = labels
                self._row_of[labels] = found
                self.missing[found] = 0.0
                changes.admitted.append(found)
            present.add(found)
            rows[index] = found
            self._remember(keys[index], found)
        return rows, Changes(changes.admitted, changes.evicted, refused)

    def _remember(self, key: bytes, row: int) -> None:
        if len(self._key_rows) > _KEYS_PER_ROW * max(1024, self.limit):
            self._key_rows.clear()
        self._key_rows[key] = row

    def _take(self, present: set[int], changes: Changes) -> int | None:
        """A free row; where there is none, that of the series that has been missing longest."""
        if not self._free:
            if len(self._row_of) < self.limit:
                grown = min(self.limit, max(_GROWTH, self.capacity + self.capacity // 2))
                self._free = list(range(grown - 1, self.capacity - 1, -1))
                self.labels += [None] * (grown - self.capacity)
                self.missing = np.concatenate([self.missing, np.zeros(grown - self.capacity)])
                self.capacity = grown
            else:
                longest = int(np.argmax(self.missing))
                if self.missing[longest] <= 0 or longest in present:
                    return None
                self._forget([longest])
                changes.evicted.append(longest)
        return self._free.pop()

    def place(self, rows: RowArray, values: FloatArray) -> tuple[FloatArray, int]:
        """Values, shape (steps, series), by row: (steps, capacity), and the samples dropped as ambiguous."""
        placed = np.full((len(values), self.capacity), np.nan)
        good = rows >= 0
        placed[:, rows[good]] = values[:, good]
        counts = np.bincount(rows[good], minlength=self.capacity)
        twice = counts > 1
        placed[:, twice] = np.nan
        return placed, int(counts[twice].sum())

    def age(self, present: NDArray[np.bool_], seconds: float) -> list[int]:
        """Note who was there; gives the rows of the series that are forgotten now."""
        if not present.any():
            return []  # nobody came: that says more about the server than about the series
        self.missing = np.where(present, 0.0, self.missing + seconds)
        gone = np.flatnonzero(self.missing > self.ttl)
        evicted = [row for row in gone.tolist() if self.labels[row] is not None]
        self._forget(evicted)
        return evicted

    def _forget(self, rows: Sequence[int]) -> None:
        if not rows:
            return
        gone = set(rows)
        for row in rows:
            labels = self.labels[row]
            if labels is not None:
                del self._row_of[labels]
            self.labels[row] = None
            self.missing[row] = 0.0
        self._free += sorted(rows, reverse=True)
        self._key_rows = {key: row for key, row in self._key_rows.items() if row not in gone}

    # State

    def save(self) -> dict[str, Any]:
        """Rows, JSON-able."""
        return {
            "capacity": self.capacity,
            "rows": [[row, dict(labels)] for row, labels in enumerate(self.labels) if labels is not None],
            "missing": [round(float(self.missing[row]), 3) for row in self.rows().tolist()],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take what `save` gave, into an empty table. Raises ValueError, KeyError or TypeError."""
        capacity, rows, missing = int(saved["capacity"]), saved["rows"], saved["missing"]
        if not 0 <= len(rows) <= capacity <= max(self.limit, _GROWTH) or len(missing) != len(rows):
            raise ValueError(f"{len(rows)} series in {capacity} rows do not fit the limit of {self.limit}")
        self.capacity = capacity
        self.labels = [None] * capacity
        self.missing = np.zeros(capacity)
        for (row, pairs), seconds in zip(rows, missing, strict=True):
            labels = tuple(sorted((str(name), str(value)) for name, value in pairs.items()))
            if not 0 <= row < capacity or self.labels[row] is not None or labels in self._row_of:
                raise ValueError("a row or a series is there twice")
            self.labels[row] = labels
            self._row_of[labels] = row
            self.missing[row] = float(seconds)
        self._free = [row for row in range(capacity - 1, -1, -1) if self.labels[row] is None]
