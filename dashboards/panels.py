"""The panels: grafanalib's frame with bodies of our own.

In: queries, a title, what the panel says and what to do about it. Out: panel objects that `board` places.
Grafanalib 0.7.1 knows neither exemplars nor data links, and its heatmap is one that Grafana turns into a
histogram of counts: so all bodies are written here, in the form that Grafana's own schema of panel options
has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import attr
from grafanalib.core import Panel

from dashboards.promql_scan import metrics

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Okabe and Ito's palette, which people with any colour blindness can tell apart, on light and dark."""
SCHEME = "Viridis"
"""Of heatmaps: even in lightness, so it reads in grey as well."""
NO_VALUE = "no data: see Pack health for what cannot be observed here"
_DROPPED = frozenset(
    {"cacheTimeout", "editable", "error", "height", "hideTimeOverride", "minSpan", "span", "repeatDirection"}
)
"""Keys of Grafana 6 and older that grafanalib still writes."""

Format = Literal["time_series", "table", "heatmap"]
Steps = Sequence[tuple[float | None, str]]

NEUTRAL: Steps = ((None, "#0072B2"),)
BAD_IF_ANY: Steps = ((None, "#0072B2"), (1, "#D55E00"))
GOOD_IF_ONE: Steps = ((None, "#D55E00"), (1, "#0072B2"))


def low_is_good(warn: float, bad: float) -> Steps:
    """Blue below `warn`, orange from there on, vermilion from `bad` on."""
    return ((None, "#0072B2"), (warn, "#E69F00"), (bad, "#D55E00"))


def high_is_good(bad: float, warn: float) -> Steps:
    """Vermilion below `bad`, orange below `warn`, blue from there on."""
    return ((None, "#D55E00"), (bad, "#E69F00"), (warn, "#0072B2"))


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL query of a panel. `step` is its least step, a Prometheus duration; empty: the data source's.

    `instant` asks for the latest value only. `exemplar` asks for exemplars, too: the metric must have some.
    """

    expr: str
    legend: str = ""
    instant: bool = False
    exemplar: bool = False
    step: str = ""
    format: Format = "time_series"

    def as_json(self, ref: str) -> dict[str, Any]:
        """The target in a panel."""
        target: dict[str, Any] = {
            "refId": ref,
            "datasource": DATASOURCE,
            "expr": self.expr,
            "legendFormat": self.legend or "__auto",
            "instant": self.instant,
            "range": not self.instant,
            "exemplar": self.exemplar,
            "format": self.format,
            "editorMode": "code",
        }
        return target | ({"interval": self.step} if self.step else {})


@dataclass(frozen=True, slots=True)
class Link:
    """A data link: opens `url` with the clicked value's labels and time in it."""

    title: str
    url: str

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "url": self.url, "targetBlank": False}


@attr.s(auto_attribs=True, kw_only=True)
class Visual(Panel):  # type: ignore[misc]
    """Any panel with a body: its `kind` is Grafana's plugin id. `width` and `height` are grid units of 24
    columns."""

    kind: str
    queries: tuple[Query, ...] = ()
    body: dict[str, Any] = attr.Factory(dict)
    defaults: dict[str, Any] = attr.Factory(dict)
    overrides: list[dict[str, Any]] = attr.Factory(list)
    width: int = 8
    height: int = 8
    raw_targets: tuple[dict[str, Any], ...] = ()
    """Targets of other data sources, as they stand in JSON."""

    def to_json_data(self) -> dict[str, Any]:
        data = self.panel_json({"type": self.kind, "options": self.body})
        targets = [query.as_json(ref) for query, ref in zip(self.queries, refs(), strict=False)]
        data["targets"] = [*targets, *self.raw_targets]
        data["datasource"] = self.dataSource or DATASOURCE
        data["fieldConfig"] = {"defaults": self.defaults, "overrides": self.overrides}
        if self.kind == "text":
            for key in ("targets", "datasource", "fieldConfig"):
                del data[key]
        return {key: value for key, value in data.items() if value is not None and key not in _DROPPED}


def refs() -> Sequence[str]:
    return [chr(ord("A") + number) for number in range(26)]


def steps_json(steps: Steps) -> dict[str, Any]:
    """Thresholds as Grafana has them; the first step's value is null, which means minus infinity."""
    return {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in steps]}


def panel(
    kind: str,
    title: str,
    says: str,
    queries: Sequence[Query],
    body: dict[str, Any],
    *,
    unit: str,
    size: tuple[int, int],
    steps: Steps = NEUTRAL,
    custom: Mapping[str, Any] | None = None,
    links: Sequence[Link] = (),
    limits: tuple[float | None, float | None] = (None, None),
    decimals: int | None = None,
    color: Mapping[str, Any] | None = None,
    mappings: Sequence[Mapping[str, Any]] = (),
    overrides: Sequence[dict[str, Any]] = (),
    transformations: Sequence[dict[str, Any]] = (),
    no_value: str = NO_VALUE,
    points: int | None = None,
    step: str | None = None,
) -> Visual:
    """A panel of any kind; the functions below and in `tables` are what dashboards call."""
    defaults: dict[str, Any] = {"unit": unit, "thresholds": steps_json(steps), "noValue": no_value}
    defaults |= {"color": dict(color or {"mode": "thresholds"}), "mappings": list(mappings)}
    defaults |= {key: value for key, value in zip(("min", "max"), limits, strict=True) if value is not None}
    if decimals is not None:
        defaults["decimals"] = decimals
    if custom:
        defaults["custom"] = dict(custom)
    if links:
        defaults["links"] = [link.as_json() for link in links]
    inherited: dict[str, Any] = {  # from grafanalib's Panel, which has no types
        "title": title,
        "description": describe(says, queries),
        "transformations": list(transformations),
        "maxDataPoints": points,
        "interval": step,
    }
    return Visual(
        kind=kind,
        queries=tuple(queries),
        body=body,
        defaults=defaults,
        overrides=list(overrides),
        width=size[0],
        height=size[1],
        **inherited,
    )


def describe(says: str, queries: Sequence[Query]) -> str:
    """What a panel says and what to do, and the metrics that it reads."""
    names = sorted({name for query in queries for name in metrics(query.expr)})
    return says + ("\n\nReads " + ", ".join(f"`{name}`" for name in names) + "." if names else "")


def _tooltip(multi: bool = True) -> dict[str, Any]:
    return {"mode": "multi" if multi else "single", "sort": "desc" if multi else "none"}


def fixed(ref: str, colour: str) -> dict[str, Any]:
    """An override: all series of a query in one colour."""
    properties = [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}]
    return {"matcher": {"id": "byFrameRefID", "options": ref}, "properties": properties}


def coloured(name: str, colour: str) -> dict[str, Any]:
    """An override: the series that the legend calls `name` in one colour."""
    properties = [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}]
    return {"matcher": {"id": "byName", "options": name}, "properties": properties}


def timeseries(
    title: str,
    says: str,
    *queries: Query,
    unit: str,
    size: tuple[int, int] = (8, 8),
    steps: Steps = NEUTRAL,
    stacked: bool = False,
    limits: tuple[float | None, float | None] = (0, None),
    links: Sequence[Link] = (),
    bars: bool = False,
    step: str | None = None,
    points: int | None = None,
    decimals: int | None = None,
    log: bool = False,
    overrides: Sequence[dict[str, Any]] = (),
) -> Visual:
    """Lines over time. Queries whose legend is a fixed text each get a colour of the palette."""
    line = len(steps) > 1
    custom = {
        "drawStyle": "bars" if bars else "line",
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "fillOpacity": 60 if stacked or bars else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if line else "off"},
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
    }
    named = all(query.legend and "{{" not in query.legend for query in queries)
    colours = [fixed(ref, colour) for ref, colour in zip(refs()[: len(queries)], COLOURS, strict=False)]
    table = size[0] >= 12
    legend = {
        "displayMode": "table" if table else "list",
        "placement": "right" if table and len(queries) == 1 and not named else "bottom",
        "showLegend": True,
        "calcs": ["lastNotNull", "max"] if table else [],
    }
    return panel(
        "timeseries",
        title,
        says,
        queries,
        {"legend": legend, "tooltip": _tooltip()},
        unit=unit,
        size=size,
        steps=steps,
        custom=custom,
        links=links,
        limits=limits,
        step=step,
        points=points,
        decimals=decimals,
        color={"mode": "palette-classic"},
        overrides=[*(colours if named else ()), *overrides],
    )


def stat(
    title: str,
    says: str,
    query: Query,
    *,
    unit: str,
    size: tuple[int, int] = (4, 4),
    steps: Steps = NEUTRAL,
    decimals: int | None = None,
    graph: bool = True,
    links: Sequence[Link] = (),
    no_value: str = "–",
    mappings: Sequence[Mapping[str, Any]] = (),
    names: bool = False,
) -> Visual:
    """One number, with its course behind it unless the query is instant."""
    body = {
        "graphMode": "area" if graph and not query.instant else "none",
        "colorMode": "value",
        "justifyMode": "auto",
        "textMode": "value_and_name" if names else "auto",
        "orientation": "auto",
        "wideLayout": True,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    return panel(
        "stat",
        title,
        says,
        [query],
        body,
        unit=unit,
        size=size,
        steps=steps,
        decimals=decimals,
        links=links,
        no_value=no_value,
        mappings=mappings,
    )


def bargauge(
    title: str,
    says: str,
    *queries: Query,
    unit: str,
    size: tuple[int, int] = (8, 8),
    steps: Steps = NEUTRAL,
    limits: tuple[float | None, float | None] = (0, None),
    links: Sequence[Link] = (),
    decimals: int | None = None,
) -> Visual:
    """A bar for each series' latest value."""
    body = {
        "displayMode": "basic",
        "orientation": "horizontal",
        "valueMode": "color",
        "namePlacement": "auto",
        "showUnfilled": True,
        "sizing": "auto",
        "minVizWidth": 8,
        "minVizHeight": 16,
        "maxVizHeight": 300,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False, "calcs": []},
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    return panel(
        "bargauge",
        title,
        says,
        queries,
        body,
        unit=unit,
        size=size,
        steps=steps,
        limits=limits,
        links=links,
        decimals=decimals,
    )


def heatmap(
    title: str,
    says: str,
    query: Query,
    *,
    unit: str,
    size: tuple[int, int] = (24, 12),
    limits: tuple[float | None, float | None] = (0, 1),
    links: Sequence[Link] = (),
    points: int | None = None,
    step: str | None = None,
    decimals: int | None = None,
) -> Visual:
    """A row for each series, coloured by its value over time.

    What makes it that, and not a histogram of counts: `calculate` is off, the target's format is time
    series, and the options are not empty (else Grafana runs its migration from the Angular heatmap).
    `filterValues.le` is below 0, or zeros, which are idle GPUs, would not be drawn; the tooltip is single,
    as the other kind skips zeros; the colour's range is fixed, so that a colour means the same at all times.
    """
    body = {
        "calculate": False,
        "yAxis": {"axisPlacement": "left", "unit": "short", "reverse": True},
        "rowsFrame": {"layout": "auto", "value": "value"},
        "color": {
            "mode": "scheme",
            "scheme": SCHEME,
            "steps": 64,
            "exponent": 0.5,
            "fill": "dark-blue",
            "scale": "exponential",
            "reverse": False,
        }
        | {key: value for key, value in zip(("min", "max"), limits, strict=True) if value is not None},
        "cellGap": 0,
        "cellValues": {"unit": unit} | ({"decimals": decimals} if decimals is not None else {}),
        "filterValues": {"le": -1},
        "showValue": "never",
        "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": True},
        "legend": {"show": True},
        "exemplars": {"color": "#D55E00"},
        "selectionMode": "x",
    }
    custom = {
        "scaleDistribution": {"type": "linear"},
        "hideFrom": {"tooltip": False, "viz": False, "legend": False},
    }
    return panel(
        "heatmap",
        title,
        says,
        [query],
        body,
        unit=unit,
        size=size,
        custom=custom,
        links=links,
        points=points,
        step=step,
        decimals=decimals,
    )


def buckets(
    title: str,
    says: str,
    query: Query,
    *,
    unit: str,
    size: tuple[int, int] = (12, 9),
    links: Sequence[Link] = (),
) -> Visual:
    """A histogram over time: rows are its buckets, colour is how many observations fell into each;
    exemplars on it."""
    found = heatmap(title, says, query, unit="short", size=size, limits=(None, None), links=links, points=200)
    found.body["yAxis"] = {"axisPlacement": "left", "unit": unit, "reverse": False}
    found.body["rowsFrame"] = {"layout": "auto", "value": "observations"}
    found.body["filterValues"] = {"le": 1e-9}  # an empty bucket is no cell
    return found


def timeline(
    title: str,
    says: str,
    query: Query,
    *,
    size: tuple[int, int] = (12, 8),
    mappings: Sequence[Mapping[str, Any]] = (),
    steps: Steps = NEUTRAL,
    unit: str = "short",
    links: Sequence[Link] = (),
) -> Visual:
    """States over time, a row for each series; equal neighbours are merged."""
    body = {
        "mergeValues": True,
        "showValue": "auto",
        "alignValue": "left",
        "rowHeight": 0.9,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": _tooltip(multi=False),
    }
    custom = {"lineWidth": 0, "fillOpacity": 80}
    return panel(
        "state-timeline",
        title,
        says,
        [query],
        body,
        unit=unit,
        size=size,
        steps=steps,
        custom=custom,
        mappings=mappings,
        links=links,
    )


def text(
    title: str, content: str, size: tuple[int, int] = (24, 4), says: str = "What this page is for."
) -> Visual:
    """Markdown."""
    body = {"mode": "markdown", "content": content}
    inherited: dict[str, Any] = {"title": title, "description": says, "maxDataPoints": None}
    return Visual(kind="text", body=body, width=size[0], height=size[1], **inherited)


def value_mapping(values: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Grafana's mapping of values to texts and colours."""
    options = {
        value: {"text": text, "color": colour, "index": index}
        for index, (value, text, colour) in enumerate(values)
    }
    return [{"type": "value", "options": options}] if options else []
