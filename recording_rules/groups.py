"""All groups of recording rules, in the order in which a series passes through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpuglass.promql import Histograms
from recording_rules.model import Group
from recording_rules.settings import Settings

Source = Literal["gpuglass", "dcgm", "auto"]


@dataclass(frozen=True, slots=True)
class Options:
    """For which stack the rules are written.

    `source` gpuglass reads the pack's own exporters only; dcgm reads dcgm-exporter and the engines' own
    metrics; auto takes the pack's where they are, and the others elsewhere.
    """

    histograms: Histograms = "classic"
    source: Source = "auto"


DEFAULT = Options()


def groups(settings: Settings, options: Options = DEFAULT) -> list[Group]:
    """Groups of recording rules."""
    return []
