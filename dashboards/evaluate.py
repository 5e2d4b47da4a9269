"""Runs a dashboard's queries as Grafana would: variables filled in, step from the panel's width and time
range.

In: a dashboard's JSON, a Prometheus, a time range, a choice of variables. Out: requests and their answers
as plain data. Previews, tests and benchmarks use it; Grafana itself is not needed.
"""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpuglass.errors import UserError

ALL = ".*"
SCRAPE_INTERVAL = 15.0
"""Seconds that Grafana's Prometheus data source assumes unless it is told otherwise."""
DEFAULT_POINTS = 1000
"""Width in pixels of a panel as wide as half a screen: Grafana asks for no more points than that."""
_STEPS = (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(\d+)(ms|[smhdw])")
_VARIABLE = re.compile(r"\$\{(\w+)(?::(\w+))?\}|\$(\w+)")
_SPECIAL = re.compile(r"[\\^$*+?.()|\[\]{}]")


class QueryError(Exception):
    """Prometheus refused a query; the text is its own."""


@dataclass(frozen=True, slots=True)
class Range:
    """Unix times."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Request:
    """A query that is ready for Prometheus; `step` in seconds, 0 for an instant one at the range's end."""

    ref: str
    expr: str
    step: float
    legend: str
    format: str
    exemplar: bool


@dataclass(frozen=True, slots=True)
class Series:
    """Labels and points (Unix time, value)."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


def seconds(text: str) -> float:
    """Seconds of a Prometheus duration such as 5m or 1h30m."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no duration")
    return float(sum(int(number) * _SECONDS[unit] for number, unit in parts))


def _duration(value: float) -> str:
    return f"{int(value)}s" if value >= 1 else f"{int(value * 1000)}ms"


def round_step(value: float) -> float:
    """The next of the steps that Grafana uses, not below `value`."""
    return float(next((step for step in _STEPS if step >= value), math.ceil(value / 86_400) * 86_400))


def fill(text: str, variables: Mapping[str, Sequence[str] | str], builtin: Mapping[str, str]) -> str:
    """Text with Grafana's variables replaced: several values become a pattern, as its Prometheus source
    does."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        if name in builtin:
            return builtin[name]
        if name not in variables:
            return match[0]
        chosen = variables[name]
        if isinstance(chosen, str):
            return chosen
        escaped = [_SPECIAL.sub(lambda special: "\\\\" + special[0], one) for one in chosen]
        return escaped[0] if len(escaped) == 1 else "(" + "|".join(escaped) + ")"

    return _VARIABLE.sub(value, text)


def requests(
    panel: Mapping[str, Any], time: Range, variables: Mapping[str, Sequence[str] | str]
) -> Iterator[Request]:
    """What a panel asks Prometheus for a time range."""
    points = panel.get("maxDataPoints") or DEFAULT_POINTS
    for target in panel.get("targets", ()):
        if "expr" not in target:
            continue
        least = seconds(target.get("interval") or panel.get("interval") or f"{SCRAPE_INTERVAL:g}s")
        step = max(least, round_step(time.seconds / points))
        scrape = least if target.get("interval") or panel.get("interval") else SCRAPE_INTERVAL
        builtin = {
            "__interval": _duration(step),
            "__rate_interval": _duration(max(step + scrape, 4 * scrape)),
            "__range": _duration(time.seconds),
            "__range_s": str(int(time.seconds)),
            "__from": str(int(time.start * 1000)),
            "__to": str(int(time.end * 1000)),
        }
        yield Request(
            target["refId"],
            fill(target["expr"], variables, builtin),
            0.0 if target.get("instant") else step,
            target.get("legendFormat", ""),
            target.get("format", "time_series"),
            bool(target.get("exemplar")),
        )


def name_of(series: Series, legend: str) -> str:
    """What the legend calls a series."""
    if legend in ("", "__auto"):
        inner = ", ".join(f"{k}={v}" for k, v in series.labels.items() if k != "__name__")
        return inner or series.labels.get("__name__", "value")
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: series.labels.get(match[1], ""), legend)


def panels_of(dashboard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels of a dashboard's JSON, those in collapsed rows as well, without the rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def defaults_of(dashboard: Mapping[str, Any]) -> dict[str, str]:
    """The choice of variables that a dashboard opens with."""
    chosen: dict[str, str] = {}
    for entry in dashboard["templating"]["list"]:
        if entry["type"] == "query":
            chosen[entry["name"]] = ALL
        elif entry["type"] == "custom":
            chosen[entry["name"]] = entry["current"]["value"]
    return chosen


@dataclass(frozen=True, slots=True)
class Client:
    """Prometheus' HTTP API. Raises `QueryError` for what it refuses, `UserError` where it does not answer."""

    url: str
    timeout: float = 60.0

    def get(self, path: str, **parameters: object) -> Any:
        """The `data` of an answer; parameters go in the body, as queries are long."""
        body = urllib.parse.urlencode(parameters, doseq=True).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}", body, self.timeout) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                raise QueryError(json.loads(text)["error"]) from None
            except (ValueError, KeyError, TypeError):
                raise QueryError(f"{error.code} {text[:200]}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"--prometheus {self.url}: no answer of a Prometheus there: {reason}") from None

    def ask(self, request: Request, time: Range) -> list[Series]:
        """Answer to one request; a scalar is a series without labels."""
        if request.step:
            # Grafana aligns both ends to the step.
            start, end = (at // request.step * request.step for at in (time.start, time.end))
            data = self.get("query_range", query=request.expr, start=start, end=end, step=request.step)
        else:
            data = self.get("query", query=request.expr, time=time.end)
        if data["resultType"] in ("scalar", "string"):
            return [Series({}, [_point(data["result"])])]
        return [
            Series(one["metric"], [_point(point) for point in one.get("values") or [one["value"]]])
            for one in data["result"]
            if "values" in one or "value" in one
        ]


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
