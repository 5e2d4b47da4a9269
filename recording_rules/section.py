"""What a part of the settings is: keys with bounds, units and reasons, that a file may override."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a number may be, what it is measured in and why the default is what it is."""

    low: float
    high: float
    unit: str
    why: str


def between(low: float, high: float, unit: str, why: str) -> Bounds:
    """Bounds, as `Annotated` takes them."""
    return Bounds(low, high, unit, why)


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the settings; its numbers are `Annotated` with `between(…)`."""


DAY = 86400.0
