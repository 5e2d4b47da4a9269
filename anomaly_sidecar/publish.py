"""From analyzers' outputs to lines of an exposition: the series' own labels, `query`, and the family's.

The beginnings of lines are rendered once per series and kept while it lives; each cycle adds the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from anomaly_sidecar.interface import Column, FloatArray, Labels, Output
from gpuglass.family import MAX_LABEL_VALUE, Family
from gpuglass.store import Lines, line_head

DIGITS = 6
"""Significant digits of a value: more than any of these numbers knows, and short in storage."""


class Publisher:
    """Heads of one query's or detector's series."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._heads: dict[tuple[Family, tuple[tuple[str, str], ...]], list[str | None]] = {}
        self.collisions = 0
        """Series of the latest publication left out because another one has the same labels."""

    def forget(self, rows: Iterable[int]) -> None:
        """These rows belong to others from now on."""
        for row in rows:
            for heads in self._heads.values():
                if row < len(heads):
                    heads[row] = None

    def lines(self, outputs: Iterable[Output], labels: Sequence[Labels | None]) -> dict[Family, Lines]:
        """All lines of an analyzer, by family. `labels` are those of each row."""
        heads: dict[Family, list[str]] = {}
        values: dict[Family, list[float]] = {}
        for output in outputs:
            family = output.family
            into = heads.setdefault(family, [])
            numbers = values.setdefault(family, [])
            if isinstance(output, Column):
                extra = tuple(sorted(output.labels.items()))
                rows = np.flatnonzero(np.isfinite(output.values[: len(labels)]))
                into += self._of_rows(family, extra, rows.tolist(), labels)
                numbers += rounded(output.values[rows]).tolist()
            elif np.isfinite(output.value):
                own = labels[output.row] if output.row is not None else ()
                into.append(head(family, self._name, output.labels, own or ()))
                numbers += rounded(np.array([output.value])).tolist()
        self.collisions = 0
        return {family: self._unique(heads[family], values[family]) for family in heads}

    def _of_rows(
        self,
        family: Family,
        extra: tuple[tuple[str, str], ...],
        rows: list[int],
        labels: Sequence[Labels | None],
    ) -> list[str]:
        known = self._heads.setdefault((family, extra), [])
        if len(known) < len(labels):
            known += [None] * (len(labels) - len(known))
        made = []
        for row in rows:
            text = known[row]
            if text is None:
                text = known[row] = head(family, self._name, dict(extra), labels[row] or ())
            made.append(text)
        return made

    def _unique(self, heads: list[str], values: list[float]) -> Lines:
        """A line twice would make the scraper refuse the whole exposition."""
        if len(set(heads)) == len(heads):
            return Lines(heads, values)
        first: dict[str, float] = {}
        for text, value in zip(heads, values, strict=True):
            first.setdefault(text, value)
        self.collisions += len(heads) - len(first)
        return Lines(list(first), list(first.values()))


def head(family: Family, query: str, extra: Mapping[str, str], source: Labels) -> str:
    """A line's beginning. Source labels called like ours become `exported_…`, as Prometheus does it."""
    labels = {"query": query, **extra}
    for name, value in source:
        while name in labels:
            name = f"exported_{name}"
        labels[name] = value[:MAX_LABEL_VALUE]
    return line_head(family, labels)


def rounded(values: FloatArray) -> FloatArray:
    """To `DIGITS` significant digits."""
    size = np.abs(values)
    with np.errstate(divide="ignore", over="ignore"):
        exponent = np.where(size > 0, np.floor(np.log10(np.where(size > 0, size, 1.0))), 0.0)
    factor = 10.0 ** np.clip(DIGITS - 1 - exponent, -300, 300)
    result = np.rint(values * factor) / factor
    return np.where(np.isfinite(result), result, values)


def merged(parts: Iterable[Mapping[Family, Lines]]) -> dict[Family, Lines]:
    """Lines of all queries and detectors, which differ by the label `query`."""
    heads: dict[Family, list[str]] = {}
    values: dict[Family, list[float]] = {}
    for part in parts:
        for family, lines in part.items():
            heads.setdefault(family, []).extend(lines.heads)
            values.setdefault(family, []).extend(lines.values)
    return {family: Lines(heads[family], values[family]) for family in heads}
