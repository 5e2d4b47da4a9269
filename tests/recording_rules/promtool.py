"""Runs cases through `promtool test rules`: series in, what expressions then give out.

Samples come every 7 s and rules run every 30 s, so hardly a sample falls on the moment of an evaluation:
range selectors are left-open in Prometheus 3 and were not before. Values are compared after rounding.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gpuglass.family import Family
from gpuglass.promql import Metric, aggregate, select
from recording_rules import groups as recording
from recording_rules.model import Group, Record
from recording_rules.options import DEFAULT, Options
from recording_rules.settings import Settings
from recording_rules.writer import render

STEP, EVALUATION = 7, 30
PATIENCE = 300
"""Seconds that a promtool may take: a second on an idle machine, much more beside others."""
Layout = Literal["union", "pair"]
LAYOUTS: tuple[Layout, ...] = ("union", "pair")


@dataclass(frozen=True, slots=True)
class Series:
    """One input series in promtool's notation: `values` such as `0.5x20` or `0+7x20`."""

    metric: Metric
    values: str
    labels: Mapping[str, str]
    suffix: str = ""

    def text(self, layout: Layout) -> str:
        """Its selector, with the job that scrapes it in this layout."""
        labels = dict(self.labels)
        if isinstance(self.metric, Family) and "job" not in labels:
            tier = self.metric.tier if layout == "pair" else None
            labels["job"] = "gpuglass" if tier is None else f"gpuglass-{tier.value}"
        inner = ", ".join(f'{name}="{value}"' for name, value in labels.items() if value)
        return f"{self.metric.name}{self.suffix}{{{inner}}}"


def series(
    metric: Metric, values: str | float, minutes: float = 20, suffix: str = "", **labels: str
) -> Series:
    """A series; a number is a constant gauge."""
    text = values if isinstance(values, str) else f"{values:g}x{int(minutes * 60 / STEP)}"
    return Series(metric, text, labels, suffix)


def counter(
    metric: Metric, per_second: float, minutes: float = 20, suffix: str = "", **labels: str
) -> Series:
    """A counter that grows evenly."""
    return Series(metric, f"0+{per_second * STEP:.12g}x{int(minutes * 60 / STEP)}", labels, suffix)


def histogram(
    metric: Metric,
    bounds: Mapping[float, float],
    count: float,
    minutes: float = 20,
    native: bool = False,
    **labels: str,
) -> list[Series]:
    """A histogram that takes `count` observations per second; `bounds` are cumulative ones by bound."""
    sum_ = sum(bound * number for bound, number in bounds.items())
    steps = int(minutes * 60 / STEP)
    if native:
        cumulative = [*bounds.values(), count]
        buckets = [b - a for a, b in zip([0.0, *cumulative[:-1]], cumulative, strict=True)]
        numbers = " ".join(f"{b * STEP:.12g}" for b in buckets)
        one = (
            f"{{{{schema:-53 sum:{sum_ * STEP:.12g} count:{count * STEP:.12g} "
            f"custom_values:[{' '.join(f'{b:g}' for b in bounds)}] buckets:[{numbers}]}}}}"
        )
        return [Series(metric, f"{one}+{one}x{steps}", labels)]
    made = [
        counter(metric, number, minutes, "_bucket", **labels, le=repr(float(bound)))
        for bound, number in bounds.items()
    ]
    made.append(counter(metric, count, minutes, "_bucket", **labels, le="+Inf"))
    made.append(counter(metric, count, minutes, "_count", **labels))
    made.append(counter(metric, sum_, minutes, "_sum", **labels))
    return made


@dataclass(frozen=True, slots=True)
class Check:
    """What an expression gives at a time (minutes): label sets and values, or nothing at all."""

    expression: str
    expected: Sequence[tuple[Mapping[str, str], float]] = ()
    minute: float = 8


def values(
    record: Record, by: Sequence[str], expected: Mapping[Any, float], minute: float = 8, **matchers: str
) -> Check:
    """Check of a record's value by some of its labels; the keys of `expected` are their values."""
    expression = f"round({aggregate('sum', by, select(record, **matchers))}, 0.001)"
    rows = []
    for key, value in expected.items():
        texts = (key,) if isinstance(key, str) else key
        rows.append(({n: t for n, t in zip(by, texts, strict=True) if t}, value))
    return Check(expression, rows, minute)


def nothing(expression: str, minute: float = 8) -> Check:
    """Check that an expression gives no sample."""
    return Check(expression, (), minute)


@dataclass(frozen=True, slots=True)
class Case:
    """A situation and what is to be seen in it."""

    name: str
    series: Sequence[Series]
    checks: Sequence[Check]
    layouts: Sequence[Layout] = ("pair",)
    """How its exporters are scraped; where it matters, in both ways."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Rule files of some options, ready for a promtool."""

    promtool: Path
    folder: Path
    options: Options = DEFAULT
    settings: Settings = field(default_factory=Settings)

    def run(self, cases: Iterable[Case], wanted: Sequence[str] = ()) -> None:
        """Fails with promtool's words if a check of a case does. `wanted` are the groups to evaluate, by the
        word after gpuglass-; all if empty."""
        groups = [
            g
            for g in recording.groups(self.settings, self.options)
            if not wanted or g.name.removeprefix("gpuglass-").removesuffix(".rules") in wanted
        ]
        said = self.promtool_says(cases, groups)
        assert said.returncode == 0, (said.stdout + said.stderr)[-6000:]

    def promtool_says(
        self, cases: Iterable[Case], groups: Sequence[Group]
    ) -> subprocess.CompletedProcess[str]:
        """The finished run of promtool."""
        rules = self.folder / "rules.yaml"
        rules.write_text(render("test", groups, self.settings))
        document = {
            "rule_files": [str(rules)],
            "evaluation_interval": f"{EVALUATION}s",
            "group_eval_order": [group.name for group in groups],
            "tests": [_test(case, layout) for case in cases for layout in case.layouts],
        }
        file = self.folder / "test.yaml"
        file.write_text(yaml.safe_dump(document, sort_keys=False, width=10_000))
        return subprocess.run(
            [str(self.promtool), "test", "rules", str(file)], capture_output=True, text=True, timeout=PATIENCE
        )


def _test(case: Case, layout: Layout) -> dict[str, Any]:
    return {
        "name": f"{case.name} ({layout})",
        "interval": f"{STEP}s",
        "input_series": [{"series": s.text(layout), "values": s.values} for s in case.series],
        "promql_expr_test": [
            {
                "expr": check.expression,
                "eval_time": f"{int(check.minute * 60)}s",
                "exp_samples": [
                    {"labels": _labels(labels), "value": value} for labels, value in check.expected
                ],
            }
            for check in case.checks
        ],
    }


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
