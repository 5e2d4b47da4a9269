"""A dashboard: panels in sections, laid out on Grafana's grid, with the variables, links and annotations
that all share.

In: a `Board`, plain data. Out: its JSON (classic form, schema version 39: file and sidecar provisioning of
later Grafanas refuse newer forms). Every dashboard has every variable, so that a link keeps the choice;
those that none of its panels uses are there and hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import attr
from grafanalib import core
from grafanalib._gen import DashboardEncoder

from dashboards import links
from dashboards.panels import Visual
from dashboards.promql_scan import variables as variables_in
from dashboards.variables import Variable, datasource, marks, shared, traces

SCHEMA_VERSION = 39
TAG = "gpuglass"
COLUMNS = 24
REFRESH = ("1s", "5s", "10s", "30s", "1m", "5m", "15m")
"""What the picker offers. 1s works where Grafana's min_refresh_interval allows it."""

Traces = Literal["tempo", "jaeger"]


@dataclass(frozen=True, slots=True)
class Options:
    """What a user can choose when the dashboards are written."""

    traces: Traces = "tempo"
    datasource_uid: str = ""
    """uid of the Prometheus that is chosen at first; empty: Grafana's default one."""
    histograms: Literal["classic", "native"] = "classic"


@dataclass(frozen=True, slots=True)
class Section:
    """A row with its panels, which flow from left to right. A collapsed one asks nothing until it is
    opened."""

    title: str
    panels: tuple[Visual, ...]
    collapsed: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """A dashboard. `start` is the beginning of its time range, such as `now-1h`."""

    uid: str
    title: str
    about: str
    sections: tuple[Section, ...]
    start: str = "now-1h"
    refresh: str = "30s"
    variables: tuple[Variable, ...] = ()
    """Those that only it has."""

    def panels(self) -> tuple[Visual, ...]:
        """All panels, in order."""
        return tuple(panel for section in self.sections for panel in section.panels)


Builder = Callable[[Options], Board]


def section(title: str, *panels: Visual, collapsed: bool = False) -> Section:
    """A `Section` of these panels."""
    return Section(title, panels, collapsed)


def _positions(panels: Sequence[Visual], top: int) -> tuple[list[core.GridPos], int]:
    """Places of panels that flow from left to right below `top`, and the first free line below them."""
    places: list[core.GridPos] = []
    x, y, height = 0, top, 0
    for panel in panels:
        if x + panel.width > COLUMNS:
            x, y, height = 0, y + height, 0
        places.append(core.GridPos(h=panel.height, w=panel.width, x=x, y=y))
        x, height = x + panel.width, max(height, panel.height)
    return places, y + height


def lay_out(sections: Sequence[Section]) -> list[Any]:
    """grafanalib's panels with places and ids: rows are followed by their panels, or hold them where
    collapsed."""
    laid: list[Any] = []
    y, number = 0, 0
    for one in sections:
        number += 1
        row = core.RowPanel(title=one.title, collapsed=one.collapsed, id=number)
        row.gridPos = core.GridPos(h=1, w=COLUMNS, x=0, y=y)
        places, bottom = _positions(one.panels, y + 1)
        placed = []
        for panel, place in zip(one.panels, places, strict=True):
            number += 1
            fields: dict[str, Any] = {"gridPos": place, "id": number}
            placed.append(attr.evolve(panel, **fields))
        if one.collapsed:
            row.panels = placed
            laid.append(row)
            y += 1  # a collapsed row takes one line; its panels' places count once it is opened
        else:
            laid += [row, *placed]
            y = bottom
    return laid


def _row_json(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what grafanalib writes for panels."""
    return {key: row[key] for key in ("id", "type", "title", "collapsed", "gridPos", "panels")}


def as_json(board: Board, options: Options) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    used = frozenset().union(*(_used(panel) for panel in board.panels()))
    chosen = [*shared(), *board.variables]
    list_ = [datasource(options.datasource_uid)]
    if any(panel.raw_targets for panel in board.panels()):
        list_.append(traces(options.traces))
    # A variable is needed by those that are chosen from within it, too.
    needed = set(used)
    for variable in reversed(chosen):
        if variable.name in needed:
            needed |= variables_in(variable.query)
    list_ += [
        (variable if variable.name in needed else replace(variable, hidden=True)).as_json()
        for variable in chosen
    ]
    dashboard = core.Dashboard(
        title=f"GPUGlass / {board.title}",
        description=board.about,
        uid=board.uid,
        tags=[TAG],
        editable=False,
        schemaVersion=SCHEMA_VERSION,
        graphTooltip=core.GRAPH_TOOLTIP_MODE_SHARED_CROSSHAIR,
        refresh=board.refresh,
        time=core.Time(board.start, "now"),
        timePicker=core.TimePicker(refreshIntervals=list(REFRESH), timeOptions=[]),
        timezone="browser",
        templating=core.Templating(list=list_),
        annotations=core.Annotations(list=marks()),
        links=[links.menu(TAG)],
        panels=lay_out(board.sections),
        version=1,
    )
    data: dict[str, Any] = json.loads(json.dumps(dashboard.to_json_data(), cls=DashboardEncoder))
    data["panels"] = [_row_json(panel) if panel["type"] == "row" else panel for panel in data["panels"]]
    data["timepicker"] = {"refresh_intervals": list(REFRESH)}
    for key in ("__inputs", "gnetId", "hideControls", "rows", "sharedCrosshair", "style", "id"):
        del data[key]  # Grafana 6 and older; an id of null would be a second name beside the uid
    return data


def _used(panel: Visual) -> frozenset[str]:
    """Variables that a panel's queries name."""
    texts = [query.expr for query in panel.queries] + [json.dumps(target) for target in panel.raw_targets]
    return frozenset().union(*map(variables_in, texts)) if texts else frozenset()


def as_text(board: Board, options: Options) -> str:
    """The file's content."""
    return json.dumps(as_json(board, options), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
