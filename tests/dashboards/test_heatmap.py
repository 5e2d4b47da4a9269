"""What Grafana's heatmap needs to draw a row per GPU, zeros and links included; see its source,
panel/heatmap.

Pinned on the JSON and on the frame that the query returns: rows are the series of one frame each, joined
by display name, in the order of the answer; the first label of the first series gives the rows' names
unless it is a number.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from dashboards import links
from dashboards.evaluate import Client, Range, Series, defaults_of, name_of, panels_of, requests
from dashboards.read import GENERATED
from tests.dashboards.conftest import END, World


def heatmaps() -> list[dict[str, Any]]:
    """All heatmaps whose rows are series, not buckets."""
    found = []
    for uid in links.UIDS:
        for panel in panels_of(json.loads((GENERATED / f"{uid}.json").read_text())):
            if panel["type"] == "heatmap" and panel["targets"][0]["format"] == "time_series":
                found.append(panel)
    return found


def the_map() -> tuple[dict[str, Any], dict[str, Any]]:
    data = json.loads((GENERATED / f"{links.COMPUTE_MAP}.json").read_text())
    return data, next(panel for panel in panels_of(data) if panel["type"] == "heatmap")


def faults_of_frame(answer: list[Series], legend: str) -> list[str]:
    """What would make Grafana draw something else than a row per series."""
    faults = []
    if any(len(series.points) < 2 for series in answer):
        faults.append("a frame of fewer than two samples is not drawn")
    first = next(iter(sorted(answer[0].labels.items())))[1] if answer else ""
    if first.replace(".", "", 1).isdigit():
        faults.append("the first label is a number: rows become buckets")
    names = [name_of(series, legend) for series in answer]
    if len(set(names)) != len(names):
        faults.append("two series have one name and would be joined")
    if names and all(name.replace(".", "", 1).isdigit() for name in names):
        faults.append("names are numbers: rows are sorted by them")
    return faults


@pytest.mark.parametrize("panel", heatmaps(), ids=lambda panel: panel["title"])
def test_options_make_rows_of_series(panel: dict[str, Any]) -> None:
    options = panel["options"]
    assert options["calculate"] is False, "else Grafana counts values into buckets"
    assert not {"dataFormat", "cards", "heatmap", "yBucketBound"} & (panel.keys() | options.keys()), (
        "Angular's keys"
    )
    assert options["filterValues"]["le"] < 0, "zeros are cells"
    assert options["tooltip"]["mode"] == "single", "the other one leaves zeros out"
    assert options["color"]["mode"] == "scheme" and options["color"]["min"] == 0, (
        "a colour means the same at all times"
    )
    assert options["yAxis"]["reverse"], "the first row is on top"
    (target,) = panel["targets"]
    assert target["legendFormat"] == "{{at}}"


def test_the_map_asks_for_seconds() -> None:
    data, panel = the_map()
    assert panel["interval"] == "1s" and panel["targets"][0]["interval"] == "1s"
    assert panel["maxDataPoints"] >= 900, "a quarter of an hour of seconds"
    assert data["refresh"] == "5s", "provisioning rewrites what is below Grafana's least interval"
    assert "1s" in data["timepicker"]["refresh_intervals"]
    assert panel["options"]["color"]["max"] == 1


def test_a_cell_links_to_its_gpu_and_time() -> None:
    _, panel = the_map()
    urls = [link["url"] for link in panel["fieldConfig"]["defaults"]["links"]]
    gpu = [url for url in urls if url.startswith(f"/d/{links.GPU}?")]
    assert all("var-gpu_uuid=${__field.labels.gpu_uuid:percentencode}" in url for url in gpu)
    assert any("time=${__value.time}&time.window=" in url for url in gpu)
    assert any("${__url_time_range}" in url for url in gpu)
    assert all("${datasource:queryparam}" in url and "${cluster:queryparam}" in url for url in urls)
    assert not any("${gpu_uuid:queryparam}" in url for url in gpu), (
        "the clicked GPU instead of the chosen ones"
    )


def test_the_frame_has_a_row_for_each_gpu_in_order(world: World) -> None:
    data, panel = the_map()
    span = Range(END - 300, END)
    (request,) = requests(panel, span, defaults_of(data))
    assert request.step == 1
    answer = Client(world.prometheus.url).ask(request, span)
    assert faults_of_frame(answer, request.legend) == []
    gpus = world.fleet.gpus
    assert [series.labels["gpu_uuid"] for series in answer] == [one.uuid for one in gpus], (
        "by node, card and device"
    )
    assert all(len(series.points) == 301 for series in answer)
    idle = {one.uuid for one in gpus if one.use == "idle"}
    zeros = {series.labels["gpu_uuid"] for series in answer if all(value == 0 for _, value in series.points)}
    assert zeros == idle, "an idle GPU is a row of zeros, not a gap"
    assert all(sorted(series.labels)[0] == "at" for series in answer)


def test_faulty_frames_are_found() -> None:
    points = [(0.0, 1.0), (1.0, 1.0)]
    assert faults_of_frame([Series({"at": "a"}, points), Series({"at": "b"}, points)], "{{at}}") == []
    assert "a number" in faults_of_frame([Series({"gpu": "0"}, points)], "{{gpu}} x")[0]
    assert (
        "one name"
        in faults_of_frame([Series({"at": "a", "b": "1"}, points), Series({"at": "a"}, points)], "{{at}}")[0]
    )
    assert "two samples" in faults_of_frame([Series({"at": "a"}, points[:1])], "{{at}}")[0]
