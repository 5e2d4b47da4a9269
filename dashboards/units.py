"""Values with units as people read them, for previews: `percentunit` 0.5 is 50%.

In: a number and Grafana's name of a unit. Out: a short text.
"""

from __future__ import annotations

from datetime import UTC, datetime

_SUFFIX = {
    "short": "",
    "none": "",
    "watt": "W",
    "celsius": " °C",
    "hertz": "Hz",
    "tokens/s": " tokens/s",
    "ops": " ops/s",
    "reqps": " req/s",
    "cps": " /s",
    "bytes": "iB",
    "Bps": "iB/s",
    "h": " h",
}
_METRIC = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))
_BINARY = ((2.0**40, "T"), (2.0**30, "G"), (2.0**20, "M"), (2.0**10, "K"))
_SPANS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def text_of(value: float, unit: str, decimals: int | None) -> str:
    """A value as a panel shows it."""
    if value != value:
        return "–"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "-∞"
    if unit == "percentunit":
        return f"{_number(value * 100, decimals)}%"
    if unit == "s":
        size, name = next(((s, n) for s, n in _SPANS if abs(value) >= s), (1, "s"))
        return f"{_number(value / size, None)} {name}"
    if unit == "dateTimeAsIso":
        return datetime.fromtimestamp(value / 1000, UTC).strftime("%Y-%m-%d %H:%M")
    scales = _BINARY if unit in ("bytes", "Bps") else _METRIC
    size, letter = next(((s, n) for s, n in scales if abs(value) >= s), (1.0, ""))
    if unit in ("celsius", "none", "h"):
        size, letter = 1.0, ""
    suffix = _SUFFIX.get(unit, f" {unit}")
    if unit in ("bytes", "Bps"):
        return f"{_number(value / size, decimals)} {letter}{suffix if letter else suffix.replace('i', '')}"
    letter = letter.lower() if unit == "watt" else letter
    return f"{_number(value / size, decimals)}{' ' if letter or unit == 'watt' else ''}{letter}{suffix}"


def _number(value: float, decimals: int | None) -> str:
    return f"{value:.{decimals}f}" if decimals is not None else f"{value:.3g}"
