"""Sketches of dashboards, drawn by matplotlib from live data: `gpuglass dashboards preview`.

In: a dashboard's JSON, a Prometheus, a time range, variables. Out: a PNG. Places, queries, values and
units are those that Grafana would use; the looks are not Grafana's, and the picture says so. What a panel
type needs is one function here.
"""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from dashboards.board import COLUMNS
from dashboards.evaluate import (
    Client,
    QueryError,
    Range,
    Request,
    Series,
    fill,
    name_of,
    requests,
)
from dashboards.panels import COLOURS
from dashboards.units import text_of
from gpuglass.errors import UserError

COLUMN = 0.68
"""Inches that a grid column is wide."""
LINE = 0.30
"""Inches that a grid line is high."""
DPI = 80
GREY = "#555555"
MAX_ROWS = 40
"""Rows of a map that are drawn with names."""
Answers = Sequence[tuple[Request, list[Series]]]


def draw(
    dashboard: Mapping[str, Any],
    client: Client,
    time: Range,
    variables: Mapping[str, Sequence[str] | str],
    path: Path,
) -> None:
    """Draws all panels, those of collapsed rows below the others. Raises `UserError` where the file cannot
    be written."""
    placed = list(_placed(dashboard))
    texts = _texts(dashboard, variables)
    lines = max(y + place["h"] for _, place, y in placed)
    width, height = COLUMNS * COLUMN, lines * LINE + 0.55
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="#f4f5f5")
    figure.text(0.01, 1 - 0.16 / height, dashboard["title"], va="top", fontsize=15, weight="bold")
    about = f"preview by gpuglass, not Grafana · {_clock(time.start)} to {_clock(time.end)} UTC"
    figure.text(0.99, 1 - 0.2 / height, about, va="top", ha="right", fontsize=9, color=GREY)
    for panel, place, y in placed:
        if panel["type"] == "row":
            at = 1 - (0.55 + (y + 0.5) * LINE) / height
            figure.text(0.01, at, f"▾ {panel['title']}", va="center", fontsize=11, weight="bold")
            continue
        left, top = place["x"] / COLUMNS, 1 - (0.55 + y * LINE) / height
        wide, high = place["w"] / COLUMNS, place["h"] * LINE / height
        gap_x, gap_y = 0.05 / width, 0.05 / height
        back = figure.add_axes((left + gap_x, top - high + gap_y, wide - 2 * gap_x, high - 2 * gap_y))
        back.set_facecolor("white")
        back.set_xticks([])
        back.set_yticks([])
        for spine in back.spines.values():
            spine.set_color("#d8d9da")
        title = fill(panel["title"], texts, {})
        back.text(
            0.1 / (wide * width),
            1 - 0.06 / (place["h"] * LINE),
            _short(title, int(place["w"] * 7)),
            va="top",
            fontsize=8.5,
            transform=back.transAxes,
            weight="bold",
            color="#333333",
        )
        inner = figure.add_axes(_inner(panel, left, top, wide, high, width, height))
        _panel(inner, panel, client, time, variables)
    drawn = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}):
        figure.savefig(drawn, dpi=DPI)
    try:
        # A palette of colours is a third of the size.
        Image.open(drawn).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(
            path, optimize=True
        )
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot write there: {error.strerror}") from None


def _texts(
    dashboard: Mapping[str, Any], variables: Mapping[str, Sequence[str] | str]
) -> dict[str, Sequence[str] | str]:
    """Variables as titles show them: the texts of fixed choices."""
    shown = dict(variables)
    for entry in dashboard["templating"]["list"]:
        for choice in entry["options"]:
            if choice["value"] == variables.get(entry["name"]):
                shown[entry["name"]] = choice["text"]
    return shown


def _inner(
    panel: Mapping[str, Any], left: float, top: float, wide: float, high: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """Place of a panel's drawing within its frame, as shares of the figure: margins are for axes' labels."""
    kind = panel["type"]
    if any(change["id"] == "groupingToMatrix" for change in panel.get("transformations", ())):
        kind = "matrix"
    plain = kind in ("stat", "table", "text")
    margins = {
        "heatmap": (1.9, 0.95),
        "bargauge": (2.6, 0.75),
        "state-timeline": (2.3, 0.2),
        "matrix": (0.5, 0.2),
    }
    before, after = (0.12, 0.12) if plain else margins.get(kind, (0.75, 0.2))
    if wide * COLUMNS <= 8 and before > 1.3:
        before = 1.3
    if '"value": "right"' in json.dumps(panel.get("fieldConfig", {})):
        after = 0.75  # a second axis
    below = 0.08 if plain or kind == "bargauge" else 0.42
    x, y = left + before / width, top - high + below / height
    return x, y, wide - (before + after) / width, high - (below + 0.34) / height


def _placed(dashboard: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, int], int]]:
    """Panels with their places; collapsed rows are opened, which moves what stands below them down."""
    found = []
    shift = 0
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        found.append((panel, place, place["y"] + shift))
        if panel["type"] == "row" and panel["panels"]:
            bottom = max(inner["gridPos"]["y"] + inner["gridPos"]["h"] for inner in panel["panels"])
            found += [(inner, inner["gridPos"], inner["gridPos"]["y"] + shift) for inner in panel["panels"]]
            shift += bottom - place["y"] - 1
    return found


def _panel(
    axes: Axes,
    panel: Mapping[str, Any],
    client: Client,
    time: Range,
    variables: Mapping[str, Sequence[str] | str],
) -> None:
    if panel["type"] == "text":
        return _text(axes, panel)
    answers: list[tuple[Request, list[Series]]] = []
    try:
        answers = [(request, client.ask(request, time)) for request in requests(panel, time, variables)]
    except QueryError as error:
        return _say(axes, f"refused: {error}")
    if not answers:
        return _say(axes, "asks another data source:\n" + _target(panel))
    if not any(series for _, series in answers):
        return _say(axes, panel["fieldConfig"]["defaults"].get("noValue", "no data"))
    _DRAWN[panel["type"]](axes, panel, answers, time)
    return None


def _target(panel: Mapping[str, Any]) -> str:
    target = panel["targets"][0]
    query = target.get("query") or target.get("tags", "")
    return f"{target['datasource']['type']}\n{_short(json.dumps(query, ensure_ascii=False), 150)}"


def _say(axes: Axes, text: str) -> None:
    axes.axis("off")
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 60)]
    axes.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=8, color=GREY)


def _text(axes: Axes, panel: Mapping[str, Any]) -> None:
    axes.axis("off")
    content = panel["options"]["content"].replace("**", "").replace("*", "").replace("`", "")
    axes.text(0, 0.95, content, va="top", fontsize=7.5, color="#333333")


def _lines(axes: Axes, panel: Mapping[str, Any], answers: Answers, time: Range) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults["custom"]
    stacked = custom["stacking"]["mode"] == "normal"
    overrides = {
        entry["matcher"]["options"]: {p["id"]: p["value"] for p in entry["properties"]}
        for entry in panel["fieldConfig"]["overrides"]
    }
    right = None
    names, heights, stack_times = [], [], None
    index = 0
    for request, many in answers:
        own = overrides.get(request.ref, {})
        of = axes
        if own.get("custom.axisPlacement") == "right":
            right = right or axes.twinx()
            of = right
        for series in many[:24]:
            name = name_of(series, request.legend)
            colour = (
                overrides.get(name, own).get("color", {}).get("fixedColor", COLOURS[index % len(COLOURS)])
            )
            index += 1
            at = np.array([point[0] for point in series.points])
            value = np.array([point[1] for point in series.points])
            if stacked and request.step:
                grid = np.arange(time.start // request.step, time.end // request.step + 1) * request.step
                row = np.full(len(grid), 0.0)
                places = np.round((at - grid[0]) / request.step).astype(int)
                row[np.clip(places, 0, len(grid) - 1)] = np.nan_to_num(value)
                stack_times = grid if stack_times is None else stack_times
                if len(grid) == len(stack_times):
                    heights.append((row, colour, name))
            else:
                of.plot(
                    _dates(at),
                    value,
                    lw=1,
                    color=colour,
                    label=_short(name, 34),
                    marker="." if len(at) < 2 else "",
                )
            names.append(name)
    if heights and stack_times is not None:
        axes.stackplot(
            _dates(stack_times),
            [row for row, _, _ in heights],
            colors=[colour for _, colour, _ in heights],
            alpha=0.75,
            labels=[_short(name, 34) for _, _, name in heights],
        )
    for step in defaults["thresholds"]["steps"][1:]:
        if custom["thresholdsStyle"]["mode"] == "line":
            axes.axhline(step["value"], color=step["color"], lw=0.8, ls="--")
    low, high = axes.get_ylim()
    axes.set_ylim(
        defaults.get("min", low),
        max(defaults["max"], 0) if "max" in defaults else high * 1.02 if high > 0 else high,
    )
    _time_axis(axes, time)
    axes.grid(color="#e8e8e8", lw=0.6)
    axes.yaxis.set_major_formatter(lambda value, _: text_of(value, defaults["unit"], None))
    if right is not None:
        unit = next(own["unit"] for own in overrides.values() if "custom.axisPlacement" in own)
        right.yaxis.set_major_formatter(lambda value, _: text_of(value, unit, None))
        right.tick_params(labelsize=7, colors=GREY)
    if 0 < len(names) <= 12:
        axes.legend(fontsize=6.5, loc="upper left", framealpha=0.75, borderpad=0.3, labelspacing=0.25)


def _stat(axes: Axes, panel: Mapping[str, Any], answers: Answers, _: Range) -> None:
    axes.axis("off")
    defaults = panel["fieldConfig"]["defaults"]
    value = _last(answers[0][1][0])
    shown = text_of(value, defaults["unit"], defaults.get("decimals"))
    axes.text(
        0.5,
        0.42,
        shown,
        ha="center",
        va="center",
        fontsize=20,
        weight="bold",
        color=_colour(value, defaults["thresholds"]),
    )


def _bars(axes: Axes, panel: Mapping[str, Any], answers: Answers, _: Range) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    rows = [(name_of(s, request.legend), _last(s)) for request, many in answers for s in many][:14]
    rows.reverse()
    values = [value for _, value in rows]
    axes.barh(
        range(len(rows)),
        values,
        color=[_colour(value, defaults["thresholds"]) for value in values],
        height=0.6,
    )
    axes.set_yticks(range(len(rows)), [_short(name, 38) for name, _ in rows])
    axes.set_ylim(-0.6, max(len(rows), 6) - 0.4)
    axes.set_xlim(0, defaults.get("max", max([*values, 1e-12]) * 1.02))
    for place, value in enumerate(values):
        axes.text(
            1.01,
            place,
            text_of(value, defaults["unit"], defaults.get("decimals")),
            va="center",
            fontsize=7.5,
            transform=axes.get_yaxis_transform(),
        )
    axes.tick_params(labelsize=7, colors="#333333")
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _heatmap(axes: Axes, panel: Mapping[str, Any], answers: Answers, time: Range) -> None:
    request, many = answers[0]
    options, unit = panel["options"], panel["options"]["cellValues"]["unit"]
    buckets = request.format == "heatmap"
    rows = sorted(many, key=lambda series: float(series.labels.get("le", "inf"))) if buckets else list(many)
    step = request.step or 15.0
    start = time.start // step * step
    width = int(time.seconds // step) + 1
    cells = np.full((len(rows), width), np.nan)
    for row, series in enumerate(rows):
        for at, value in series.points:
            cells[row, min(width - 1, max(0, round((at - start) / step)))] = value
    if buckets:  # cumulative by le
        cells = np.diff(np.nan_to_num(cells), axis=0, prepend=0.0)
        cells[cells <= options["filterValues"]["le"]] = np.nan
    extent = (*_dates(np.array([start, start + width * step])), len(rows) - 0.5, -0.5)
    colour = options["color"]
    image = axes.imshow(
        cells,
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
        extent=extent,
        vmin=colour.get("min"),
        vmax=colour.get("max"),
    )
    names = [
        (
            text_of(float(s.labels["le"]), options["yAxis"]["unit"], None)
            if buckets
            else name_of(s, request.legend)
        )
        for s in rows
    ]
    if buckets:
        axes.invert_yaxis()
    every = max(1, len(names) // (MAX_ROWS if not buckets else 10))
    axes.set_yticks(range(0, len(names), every), [_short(name, 26) for name in names[::every]])
    _time_axis(axes, time)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
    bar.ax.yaxis.set_major_formatter(lambda value, _: text_of(value, "short" if buckets else unit, None))
    bar.ax.tick_params(labelsize=6.5, colors=GREY)


def _timeline(axes: Axes, panel: Mapping[str, Any], answers: Answers, time: Range) -> None:
    request, many = answers[0]
    mapped = {
        float(value): entry
        for mapping in panel["fieldConfig"]["defaults"]["mappings"]
        for value, entry in mapping["options"].items()
    }
    rows = many[:18]
    step = request.step or 15.0
    for place, series in enumerate(rows):
        for at, value in series.points:
            entry = mapped.get(
                value, {"color": COLOURS[int(value) % len(COLOURS)] if value == value else "#ffffff"}
            )
            left, right = _dates(np.array([at, at + step]))
            axes.barh(place, right - left, left=left, height=0.75, color=entry["color"], linewidth=0)
    axes.set_yticks(range(len(rows)), [_short(name_of(series, request.legend), 34) for series in rows])
    axes.set_ylim(max(len(rows), 5) - 0.4, -0.6)
    _time_axis(axes, time)
    for number, entry in enumerate(mapped.values()):
        axes.plot([], [], color=entry["color"], lw=5, label=entry["text"])
        del number
    if mapped:
        axes.legend(fontsize=6.5, loc="lower right", ncols=len(mapped))


def _table(axes: Axes, panel: Mapping[str, Any], answers: Answers, _: Range) -> None:
    axes.axis("off")
    if panel["transformations"][0]["id"] == "groupingToMatrix":
        return _matrix(axes, panel, answers)
    organize = next(t["options"] for t in panel["transformations"] if t["id"] == "organize")
    order = sorted(organize["indexByName"], key=lambda name: int(organize["indexByName"][name]))
    overrides = {
        entry["matcher"]["options"]: {p["id"]: p["value"] for p in entry["properties"]}
        for entry in panel["fieldConfig"]["overrides"]
    }
    shown = [name for name in order if not overrides.get(name, {}).get("custom.hidden")]
    rows: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for request, many in answers:
        column = f"Value #{request.ref}" if len(answers) > 1 else "Value"
        for series in many:
            key = tuple(sorted((k, v) for k, v in series.labels.items() if k != "__name__"))
            rows.setdefault(key, dict(key))[column] = _last(series)
    renamed = organize["renameByName"]
    by = panel["options"].get("sortBy") or []
    listed = list(rows.values())
    if by:
        column = next(name for name, heading in renamed.items() if heading == by[0]["displayName"])
        listed.sort(key=lambda row: row.get(column, float("-inf")), reverse=True)
    lines = max(1, int(panel["gridPos"]["h"] * LINE / 0.19) - 3)
    headings = [renamed.get(name, name) for name in shown]
    texts = [
        [_cell(row.get(name), overrides.get(renamed.get(name, name), {})) for name in shown]
        for row in listed[:lines]
    ]
    if not texts:
        return _say(axes, "no rows")
    wide = [
        max(len(heading), *(len(line[place]) for line in texts), 4) for place, heading in enumerate(headings)
    ]
    room = int(panel["gridPos"]["w"] * COLUMN / 0.062)
    while sum(wide) > room and max(wide) > 6:
        wide[wide.index(max(wide))] -= 1
    x = 0.0
    for place, heading in enumerate(headings):
        axes.text(
            x, 1.0, _short(heading, wide[place]), va="top", fontsize=7.5, weight="bold", color="#333333"
        )
        for number, line in enumerate(texts):
            y = 1 - (number + 1.25) / (lines + 2)
            axes.text(x, y, _short(line[place], wide[place]), va="top", fontsize=7.3, color="#222222")
        x += (wide[place] + 1.5) / (sum(wide) + 1.5 * len(wide))
    if len(listed) > lines:
        axes.text(1, -0.01, f"{len(listed) - lines} more", ha="right", fontsize=7, color=GREY)
    return None


def _matrix(axes: Axes, panel: Mapping[str, Any], answers: Answers) -> None:
    options = panel["transformations"][0]["options"]
    cells = {
        (series.labels[options["rowField"]], series.labels[options["columnField"]]): _last(series)
        for series in answers[0][1]
    }
    rows, columns = (sorted({key[place] for key in cells}) for place in (0, 1))
    values = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])
    axes.axis("on")
    axes.imshow(values, aspect="auto", cmap="Blues")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.tick_params(labelsize=7, colors="#333333")
    if values.size <= 400:
        defaults = panel["fieldConfig"]["defaults"]
        for y, x in np.ndindex(values.shape):
            shown = text_of(float(values[y, x]), defaults["unit"], defaults.get("decimals"))
            dark = values[y, x] > 0.6 * np.nanmax(values)
            axes.text(x, y, shown, ha="center", va="center", fontsize=6.5, color="w" if dark else "#222222")


def _cell(value: Any, override: Mapping[str, Any]) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    for mapping in override.get("mappings", ()):
        if f"{value:g}" in mapping["options"]:
            return str(mapping["options"][f"{value:g}"]["text"])
    return text_of(value, override.get("unit", "short"), override.get("decimals"))


_DRAWN: dict[str, Callable[[Axes, Mapping[str, Any], Answers, Range], None]] = {
    "timeseries": _lines,
    "stat": _stat,
    "bargauge": _bars,
    "heatmap": _heatmap,
    "state-timeline": _timeline,
    "table": _table,
}


def _last(series: Series) -> float:
    return series.points[-1][1]


def _colour(value: float, thresholds: Mapping[str, Any]) -> str:
    chosen = thresholds["steps"][0]["color"]
    for step in thresholds["steps"][1:]:
        if value >= step["value"]:
            chosen = step["color"]
    return str(chosen)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _dates(times: np.ndarray[Any, Any]) -> Any:
    return times / 86_400  # matplotlib counts days since 1970


def _time_axis(axes: Axes, time: Range) -> None:
    axes.set_xlim(*_dates(np.array([time.start, time.end])))
    axes.xaxis_date()
    pattern = "%H:%M:%S" if time.seconds < 900 else "%H:%M" if time.seconds <= 2 * 86_400 else "%m-%d"
    axes.xaxis.set_major_formatter(DateFormatter(pattern))  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(labelsize=7, colors=GREY)
