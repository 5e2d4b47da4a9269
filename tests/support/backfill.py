"""A past for a real Prometheus: samples written as blocks, and rules evaluated into it layer by layer.

In: blocks of samples (`fleet`), rules, a Prometheus and its promtool. Out: a folder for
`running_prometheus`. Each layer of rules is evaluated by that Prometheus itself over what the layers below
recorded, and stored by promtool.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from gpuglass.promql import metrics_in
from recording_rules.model import Alert, Group, Rule
from tests.support.fleet import Block
from tests.support.history import RETENTION, series_text
from tests.support.prometheus import Prometheus, PrometheusError, running_prometheus

FloatArray = NDArray[np.float64]
FLAGS = (RETENTION, "--query.max-samples=200000000")
_BLOCK_HOURS = 162
"""Prometheus' blocks grow by powers of three from two hours."""
_MAX_POINTS = 10_000


@dataclass(frozen=True, slots=True)
class Span:
    """Unix times and a step in seconds at which rules are evaluated."""

    start: float
    end: float
    step: float


def lines(block: Block, stamps: Sequence[str]) -> Iterator[str]:
    """A family's samples as an OpenMetrics text has them; NaN is no sample."""
    for labels, column in zip(block.labels, block.values.T.tolist(), strict=True):
        head = series_text(block.name, labels)
        yield "".join(
            f"{head} {value:.9g} {at}\n" for value, at in zip(column, stamps, strict=True) if value == value
        )


def write(folder: Path, promtool: Path, times: FloatArray, blocks: Iterable[Block]) -> int:
    """Stores samples taken at `times` in `folder`/data; gives how many they are."""
    stamps = [f"{at:.3f}" for at in times.tolist()]
    text, count = folder / "samples.txt", 0
    with text.open("w") as file:
        for block in blocks:
            count += block.values.size
            file.writelines(lines(block, stamps))
        file.write("# EOF\n")
    store(folder, promtool, text)
    return count


def store(folder: Path, promtool: Path, text: Path) -> None:
    """Makes blocks of an OpenMetrics text and removes it."""
    (folder / "data").mkdir(exist_ok=True)
    command: list[str | Path] = [
        promtool,
        "tsdb",
        "create-blocks-from",
        f"--max-block-duration={_BLOCK_HOURS}h",
        "openmetrics",
        "--quiet",
    ]
    done = subprocess.run([*command, text, folder / "data"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"promtool: {done.stderr.strip()[-2000:]}")
    text.unlink()


def layers(groups: Sequence[Group]) -> list[list[Rule]]:
    """Rules by depth: each reads only families and what the layers before it recorded."""
    left = [rule for group in groups for rule in group.rules if isinstance(rule, Rule)]
    found: list[list[Rule]] = []
    while left:
        pending = {rule.record.name for rule in left}
        ready = [
            rule for rule in left if not (set(metrics_in(rule.expression)) - {rule.record.name}) & pending
        ]
        if not ready:
            raise ValueError(f"rules read each other: {sorted(pending)}")
        found.append(ready)
        left = [rule for rule in left if rule not in ready]
    return found


def evaluate(
    folder: Path, program: Path, promtool: Path, groups: Sequence[Group], spans: Sequence[Span]
) -> dict[str, str]:
    """Evaluates all recording rules into the store; gives the error of each that Prometheus refused, by
    record."""
    refused: dict[str, str] = {}
    for layer in layers(groups):
        text = folder / "layer.txt"
        with running_prometheus(program, [], folder, flags=FLAGS) as server, text.open("w") as file:
            for rule in sorted(layer, key=lambda rule: rule.record.name):
                try:
                    for labels, points in _answers(server, rule.expression, spans):
                        own = {"__name__": rule.record.name} | dict(rule.labels)
                        _write_series(file, labels | own, points)
                except PrometheusError as error:
                    refused[rule.record.name] = str(error)
            file.write("# EOF\n")
        store(folder, promtool, text)
    return refused


def fire(folder: Path, program: Path, promtool: Path, groups: Sequence[Group], span: Span) -> set[str]:
    """Writes `ALERTS` for what alerts' expressions match in a span, without waiting for `for`; gives the
    alerts' names."""
    fired: set[str] = set()
    text = folder / "alerts.txt"
    with running_prometheus(program, [], folder, flags=FLAGS) as server, text.open("w") as file:
        for group in groups:
            for alert in group.rules:
                if not isinstance(alert, Alert):
                    continue
                for labels, points in _answers(server, alert.expression, [span]):
                    own = {"__name__": "ALERTS", "alertname": alert.name, "alertstate": "firing"}
                    own |= {"severity": alert.severity, "category": alert.category} | dict(alert.labels)
                    _write_series(file, labels | own, [(at, 1.0) for at, _ in points])
                    fired.add(alert.name)
        file.write("# EOF\n")
    store(folder, promtool, text)
    return fired


def _answers(
    server: Prometheus, expression: str, spans: Sequence[Span]
) -> Iterator[tuple[dict[str, str], list[tuple[float, float]]]]:
    for span in spans:
        start = span.start
        while start <= span.end:
            end = min(span.end, start + _MAX_POINTS * span.step)
            for series in server.query_range(expression, start, end, span.step):
                yield {k: v for k, v in series.labels.items() if k != "__name__"}, series.points
            start = end + span.step


def _write_series(file: TextIO, labels: Mapping[str, str], points: Sequence[tuple[float, float]]) -> None:
    name = labels["__name__"]
    inner = {key: _escaped(value) for key, value in sorted(labels.items()) if key != "__name__"}
    head = series_text(name, inner)
    file.write("".join(f"{head} {value:.9g} {at:.3f}\n" for at, value in points if value == value))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
