"""Tables: label sets with queries as columns, one label against another, traces.

In: columns, each an instant query with its unit; or a search for traces. Out: panels of Grafana's type table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dashboards.panels import Link, Query, Steps, Visual, panel, refs, steps_json, value_mapping

SERVICE = "vllm"
"""Service name of the bridge's spans, unless traces.service_name says otherwise; Jaeger's search needs
one."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: an instant query's value, with its unit. `bar` draws it as a gauge from 0 to
    `top`."""

    title: str
    expr: str
    unit: str = "short"
    decimals: int | None = None
    steps: Steps = ()
    bar: bool = False
    top: float | None = None
    links: tuple[Link, ...] = field(default=())
    values: tuple[tuple[str, str, str], ...] = ()
    """(value, text, colour) of values that are states."""


def table(
    title: str,
    says: str,
    *columns: Column,
    labels: Mapping[str, str],
    size: tuple[int, int] = (24, 9),
    links: Mapping[str, Sequence[Link]] | None = None,
    sort: str | None = None,
    hidden: Sequence[str] = (),
) -> Visual:
    """Rows are label sets, columns are queries joined by them. `labels` says which labels are shown, with
    their headings;
    `links` are data links on the cells of a heading; `hidden` labels are there for links but not shown."""
    queries = [Query(column.expr, instant=True, format="table") for column in columns]
    overrides = []
    for column in columns:
        properties: list[dict[str, Any]] = [{"id": "unit", "value": column.unit}]
        if column.decimals is not None:
            properties.append({"id": "decimals", "value": column.decimals})
        if column.steps:
            properties.append({"id": "thresholds", "value": steps_json(column.steps)})
        if column.bar:
            cell = {"type": "gauge", "mode": "basic", "valueDisplayMode": "text"}
            properties += [{"id": "custom.cellOptions", "value": cell}, {"id": "min", "value": 0}]
            if column.top is not None:
                properties.append({"id": "max", "value": column.top})
        elif column.steps or column.values:
            properties.append({"id": "custom.cellOptions", "value": {"type": "color-text"}})
        if column.values:
            properties.append({"id": "mappings", "value": value_mapping(column.values)})
        if column.links:
            properties.append({"id": "links", "value": [link.as_json() for link in column.links]})
        overrides.append({"matcher": {"id": "byName", "options": column.title}, "properties": properties})
    for heading, own in (links or {}).items():
        properties = [{"id": "links", "value": [link.as_json() for link in own]}]
        overrides.append({"matcher": {"id": "byName", "options": heading}, "properties": properties})
    for label in hidden:
        properties = [{"id": "custom.hidden", "value": True}]
        overrides.append({"matcher": {"id": "byName", "options": label}, "properties": properties})
    values = [f"Value #{ref}" for ref in refs()[: len(columns)]] if len(columns) > 1 else ["Value"]
    names = [*labels, *hidden, *values]
    renamed = dict(labels) | {value: column.title for value, column in zip(values, columns, strict=True)}
    organize = {
        "excludeByName": {"Time": True},
        "indexByName": {name: index for index, name in enumerate(names)},
        "renameByName": renamed,
        "includeByName": {},
    }
    transformations = [{"id": "merge", "options": {}}, {"id": "organize", "options": organize}]
    body = {
        "showHeader": True,
        "cellHeight": "sm",
        "sortBy": [{"displayName": sort, "desc": True}] if sort else [],
    }
    custom = {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False, "filterable": True}
    return panel(
        "table",
        title,
        says,
        queries,
        body,
        unit="short",
        size=size,
        custom=custom,
        overrides=overrides,
        transformations=transformations,
    )


def matrix(
    title: str,
    says: str,
    query: Query,
    *,
    rows: str,
    columns: str,
    unit: str,
    size: tuple[int, int] = (24, 10),
    decimals: int | None = None,
) -> Visual:
    """A table of two labels against each other, coloured by the latest value: the heatmap has only time on
    its axis."""
    grouping = {"columnField": columns, "rowField": rows, "valueField": "Value", "emptyValue": "empty"}
    custom = {
        "align": "center",
        "cellOptions": {"type": "color-background", "mode": "basic"},
        "inspect": False,
    }
    corner: dict[str, Any] = {"matcher": {"id": "byName", "options": f"{rows}\\{columns}"}, "properties": []}
    corner["properties"] = [{"id": "custom.cellOptions", "value": {"type": "auto"}}]
    return panel(
        "table",
        title,
        says,
        [query],
        {"showHeader": True, "cellHeight": "sm", "sortBy": []},
        unit=unit,
        size=size,
        custom=custom,
        decimals=decimals,
        color={"mode": "continuous-blues"},
        overrides=[corner],
        transformations=[{"id": "groupingToMatrix", "options": grouping}],
    )


def traces(
    title: str, says: str, kind: str, traceql: str, tags: Mapping[str, str], size: tuple[int, int] = (24, 9)
) -> Visual:
    """Traces that were found, in Tempo by a TraceQL query or in Jaeger by tags; a click opens the trace."""
    target: dict[str, Any] = {"refId": "A", "datasource": {"type": kind, "uid": "${traces}"}, "limit": 50}
    if kind == "tempo":
        target |= {"queryType": "traceql", "query": traceql, "tableType": "traces"}
    else:
        found = " ".join(f'{name}="{value}"' for name, value in tags.items())
        target |= {"queryType": "search", "service": SERVICE, "operation": "", "tags": found}
    found = panel(
        "table",
        title,
        says,
        [],
        {"showHeader": True, "cellHeight": "sm", "sortBy": []},
        unit="short",
        size=size,
        custom={"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False},
        no_value="no trace: is the bridge on, and is this the right trace store?",
    )
    found.raw_targets = (target,)
    found.dataSource = target["datasource"]
    return found
