"""Tells the keep-list which expressions the ready queries and detectors evaluate."""

from __future__ import annotations

from collections.abc import Iterator

from anomaly_sidecar.presets import PRESETS


def queries() -> Iterator[str]:
    """Every expression of every preset."""
    for sections in PRESETS.values():
        for section in sections.values():
            for entry in section:
                yield from [entry["expr"]] if "expr" in entry else entry["inputs"].values()
