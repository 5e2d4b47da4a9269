"""Every panel's queries, put to a real Prometheus that holds the fleet, return data, whatever is chosen
above."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from dashboards import links
from dashboards.board import Options
from dashboards.build import files
from dashboards.evaluate import Client, Range, defaults_of, panels_of, requests, seconds
from dashboards.promql_scan import variables
from dashboards.read import GENERATED
from tests.dashboards.conftest import END, World
from tests.support.fleet_values import MEMORY_PARTS

EMPTY: dict[tuple[str, str], str] = {}
"""Panels that may be empty with this fleet, and why."""
MOST_EMPTY = 0.05
NARROW: dict[str, dict[tuple[str, str], str]] = {
    "gpu_uuid": {
        (links.COST, "Savings list: GPUs that were cold for an hour"): "the GPU that is chosen here is busy",
    },
}
"""Panels that are empty for the one value that is chosen here, and why."""

pytestmark = pytest.mark.timeout(900)


def dashboards() -> dict[str, dict[str, Any]]:
    return {uid: json.loads((GENERATED / f"{uid}.json").read_text()) for uid in links.UIDS}


def choices(world: World) -> list[dict[str, str]]:
    """One value of each variable, as a user would choose it."""
    serving = next(one for one in world.fleet.gpus if one.use == "engine")
    return [
        {"cluster": world.fleet.cluster},
        {"node": serving.node},
        {"gpu_uuid": serving.uuid},
        {"model_name": serving.model_name},
        {"tenant": "acme"},
    ]


def refs_without_data(
    client: Client, panel: Mapping[str, Any], time: Range, chosen: Mapping[str, str]
) -> list[str]:
    """Queries of a panel that return nothing, or nothing but NaN."""
    empty = []
    for request in requests(panel, time, chosen):
        values = [value for series in client.ask(request, time) for _, value in series.points]
        if not any(math.isfinite(value) for value in values):
            empty.append(request.ref)
    return empty


def span(data: Mapping[str, Any]) -> Range:
    return Range(END - seconds(data["time"]["from"].removeprefix("now-")), END)


def test_the_rules_could_be_evaluated(world: World) -> None:
    assert world.refused == {}
    assert world.fired


def test_every_panel_shows_data(world: World) -> None:
    client = Client(world.prometheus.url)
    empty, panels = [], 0
    for uid, data in dashboards().items():
        for panel in panels_of(data):
            panels += 1
            if refs := refs_without_data(client, panel, span(data), defaults_of(data)):
                empty.append((uid, panel["title"], refs))
    assert [one for one in empty if one[:2] not in EMPTY] == []
    assert len(EMPTY) <= panels * MOST_EMPTY


def test_every_panel_shows_data_for_each_choice(world: World) -> None:
    """With one cluster, node, GPU, model or tenant chosen, panels that read it still show something."""
    client = Client(world.prometheus.url)
    empty = []
    for uid, data in dashboards().items():
        for chosen in choices(world):
            (name,) = chosen
            for panel in panels_of(data):
                asked = (
                    " ".join(target.get("expr", "") for target in panel["targets"] or ())
                    if "targets" in panel
                    else ""
                )
                if name in variables(asked) and (uid, panel["title"]) not in EMPTY | NARROW.get(name, {}):
                    refs = refs_without_data(client, panel, span(data), defaults_of(data) | chosen)
                    empty += [(uid, panel["title"], name, refs)] if refs else []
    assert empty == []


def test_every_choice_of_the_maps_signal_shows_every_gpu(world: World) -> None:
    data = dashboards()[links.COMPUTE_MAP]
    (panel,) = [panel for panel in panels_of(data) if panel["title"].startswith("GPU × time")]
    (signal,) = [entry for entry in data["templating"]["list"] if entry["name"] == "signal"]
    client = Client(world.prometheus.url)
    everywhere = {one.uuid for one in world.fleet.gpus}
    serving = {one.uuid for one in world.fleet.gpus if one.use == "engine"}
    hopper = {one.uuid for one in world.fleet.gpus if "A100" not in one.card}
    for choice in signal["options"]:
        (request,) = requests(panel, span(data), defaults_of(data) | {"signal": choice["value"]})
        answer = client.ask(request, span(data))
        expected = {"KV cache used": serving, "SM activity": hopper}.get(choice["text"], everywhere)
        assert {series.labels["gpu_uuid"] for series in answer} == expected, choice["text"]
        assert all(0 <= value <= 1 for series in answer for _, value in series.points), choice["text"]


@pytest.mark.parametrize("use", ["engine", "job", "idle"])
def test_memory_broken_down_adds_up_to_the_memory_used(world: World, use: str) -> None:
    """Whether the engine's probe tells all parts, an older one tells some, or there is none."""
    data = dashboards()[links.GPU]
    (panel,) = [panel for panel in panels_of(data) if panel["title"] == "Memory broken down"]
    client, time = Client(world.prometheus.url), span(data)
    seen = set()
    for one in (one for one in world.fleet.gpus if one.use == use):
        asked = requests(panel, time, defaults_of(data) | {"gpu_uuid": one.uuid})
        answers = [(series, request.ref) for request in asked for series in client.ask(request, time)]
        parts = {series.labels.get("part", ref): dict(series.points) for series, ref in answers}
        seen.add(frozenset(parts))
        selector = f'gpuglass_gpu_memory_used_bytes{{gpu_uuid="{one.uuid}"}}'
        for at in next(iter(parts.values())):
            (used,) = world.prometheus.query(selector, at)
            values = [points[at] for points in parts.values()]
            assert min(values) >= 0
            assert sum(values) == pytest.approx(used.value), (one.pod, at, parts.keys())
    engines = {
        frozenset({*MEMORY_PARTS, "B", "C"}),
        frozenset({"kv_cache", "unknown", "in_flight", "allocator_cache", "B", "C"}),
    }
    assert seen == {"engine": engines, "job": {frozenset("BC")}, "idle": {frozenset("C")}}[use]


def test_variables_have_values(world: World) -> None:
    for data in dashboards().values():
        for entry in data["templating"]["list"]:
            if entry["type"] != "query":
                continue
            inner, _, label = (
                entry["query"]["query"].removeprefix("label_values(").removesuffix(")").rpartition(",")
            )
            selector = inner
            for name, value in defaults_of(data).items():
                selector = selector.replace(f"${name}", value)
            values = {sample.labels.get(label.strip()) for sample in world.prometheus.query(selector, END)}
            assert values - {None}, entry["name"]


def test_annotations_and_the_parser_agree(world: World) -> None:
    client = Client(world.prometheus.url)
    for data in dashboards().values():
        for annotation in data["annotations"]["list"]:
            panel = {"targets": [{"refId": "A", "expr": annotation["expr"]}]}
            for request in requests(panel, Range(END - 3_600, END), defaults_of(data)):
                client.ask(request, Range(END - 3_600, END))  # raises for what does not parse


def test_the_form_for_native_histograms_parses_and_reads_no_buckets(world: World) -> None:
    """Without native histograms in the store there is no data; what is asked must still be PromQL."""
    client = Client(world.prometheus.url)
    asked = 0
    for text in files(Options(histograms="native")).values():
        data = json.loads(text)
        for panel in panels_of(data):
            for request in requests(panel, Range(END - 600, END), defaults_of(data)):
                assert "_bucket" not in request.expr
                if "histogram_" in request.expr:
                    asked += 1
                    client.ask(request, Range(END - 600, END))
    assert asked > 10
