"""For which stack the rules are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpuglass.promql import Histograms

Source = Literal["gpuglass", "dcgm", "auto"]


@dataclass(frozen=True, slots=True)
class Options:
    """Form of histograms, and whose series the first layer reads.

    `source` gpuglass reads the pack's own exporters only; dcgm reads dcgm-exporter and the engines' own
    metrics; auto takes the pack's where they are, and the others elsewhere.
    """

    histograms: Histograms = "classic"
    source: Source = "auto"

    def chosen(self, ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
        """Of the expressions over the pack's own series and over others', those to read, the best first."""
        return [
            *(ours if self.source != "dcgm" else ()),
            *(theirs if self.source != "gpuglass" else ()),
        ]


DEFAULT = Options()
