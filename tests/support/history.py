"""Histories for a real Prometheus: series as plain functions of time, written as blocks of its storage.

In: a folder for `running_prometheus` and arrays of samples. Out: `data/` in it, with blocks that promtool
made.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
_BLOCK = 7200.0

RETENTION = "--storage.tsdb.retention.time=10y"
"""A flag for Prometheus: blocks of the past are not to be dropped."""


def series_text(name: str, labels: Mapping[str, str]) -> str:
    """A series as a line of an exposition begins with it."""
    inner = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return f"{name}{{{inner}}}" if inner else name


def write(
    folder: Path,
    promtool: Path,
    name: str,
    labels: Sequence[Mapping[str, str]],
    times: FloatArray,
    values: FloatArray,
) -> None:
    """Write a gauge's samples, shape (times, series), times in Unix seconds; NaN is no sample."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    heads = [series_text(name, own) for own in labels]
    text = folder / "history.txt"
    # One file per block: promtool reads its whole input once for each block of two hours.
    block = times // _BLOCK
    for number in np.unique(block).tolist():
        chosen = block == number
        stamps = [f"{at:.3f}" for at in times[chosen].tolist()]
        with text.open("w") as file:
            file.write(f"# TYPE {name} gauge\n")
            for head, own in zip(heads, values[chosen].T.tolist(), strict=True):
                lines = [
                    f"{head} {value:.6g} {at}\n"
                    for at, value in zip(stamps, own, strict=True)
                    if value == value
                ]
                file.write("".join(lines))
            file.write("# EOF\n")
        command: list[str | Path] = [
            promtool,
            "tsdb",
            "create-blocks-from",
            "openmetrics",
            "--quiet",
            text,
            data,
        ]
        subprocess.run(command, check=True, capture_output=True)
    text.unlink()


def daily(series: int, times: FloatArray, seed: int = 1, noise: float = 0.1, week: float = 0.1) -> FloatArray:
    """Loads with a shape of the day, of the week (`week` is its share) and noise, shape (times, series)."""
    generator = np.random.default_rng(seed)
    level = generator.uniform(20, 200, series)
    phase = generator.uniform(0, 2 * np.pi, series)
    hour = 2 * np.pi * times[:, None] / 86_400
    shape = 1 + 0.4 * np.sin(hour + phase) + week * np.sin(hour / 7 + phase)
    values: FloatArray = level * (shape + noise * generator.standard_normal((len(times), series)))
    return values
