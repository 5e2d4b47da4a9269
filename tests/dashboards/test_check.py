"""The dashboards that are committed have no fault that `gpuglass dashboards check` knows, and it finds
each that is planted."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dashboards import links
from dashboards.board import Options, as_json, lay_out, section
from dashboards.build import boards, configmaps, files
from dashboards.check import EXEMPLARS, alerts, check, overlaps, wrong
from dashboards.evaluate import panels_of
from dashboards.panels import Query, stat, text
from dashboards.promql_scan import metrics, scan, variables
from dashboards.read import GENERATED
from gpuglass.families import engine, gpu
from gpuglass.family import Family, Kind
from recording_rules.model import Alert
from tests.exporters.vllm.engine_world import World
from tests.exporters.vllm.test_ledger_requests import told_of_one

ROOT = Path(__file__).parents[2]


def loaded() -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted(GENERATED.glob("*.json"))}


def test_what_is_committed_has_no_fault() -> None:
    assert check(GENERATED, Options()) == []


@pytest.mark.parametrize(
    "options", [Options("jaeger"), Options(histograms="native"), Options("jaeger", "prom-1", "native")]
)
def test_every_option_gives_dashboards_without_fault(options: Options) -> None:
    made = {name: json.loads(content) for name, content in files(options).items()}
    assert wrong(made, alerts()) == []
    assert made != loaded()


def test_uids_are_those_that_alerts_and_links_name() -> None:
    assert [board.uid for board in boards(Options())] == list(links.UIDS)
    assert {alert.dashboard for alert in alerts()} <= set(links.UIDS)


# Planted faults


def planted(change: str, value: object = None) -> list[str]:
    """Faults after one change to the first panel of a dashboard that asks something."""
    made = loaded()
    data = made["gpuglass-cost.json"]
    panel = next(panel for panel in panels_of(data) if panel["type"] == "stat")
    target = panel["targets"][0]
    match change:
        case "expr":
            target["expr"] = value
        case "exemplar":
            target["exemplar"] = True
        case "unit" | "noValue" | "thresholds":
            del panel["fieldConfig"]["defaults"][change]
        case "description":
            panel["description"] = ""
        case "link":
            panel["fieldConfig"]["defaults"]["links"] = [{"title": "x", "url": f"/d/{value}?a=b"}]
        case "place":
            panel["gridPos"] |= value
        case "id":
            panel["id"] = next(other["id"] for other in panels_of(data) if other is not panel)
        case "targets":
            panel["targets"] = []
        case "variable":
            data["templating"]["list"] = [e for e in data["templating"]["list"] if e["name"] != value]
        case "query of variable":
            entry = next(e for e in data["templating"]["list"] if e["name"] == "node")
            entry["query"]["query"] = value
        case "annotation":
            data["annotations"]["list"][0]["expr"] = value
        case "tag":
            data["tags"] = []
    return wrong(made, [])


@pytest.mark.parametrize(
    ("change", "value", "fault"),
    [
        ("expr", "sum (nobodys_metric)", "nobodys_metric is no metric of the pack"),
        ("expr", "sum (rate(gpuglass_gpu_up[5m])", "is not closed"),
        ("expr", "sum (gpuglass_gpu_up))", "unbalanced"),
        ("expr", "max by (tenant) (gpuglass_gpu_up)", "tenant is a label of none"),
        ("expr", 'gpuglass_gpu_up{modle="x"}', "modle is a label of none"),
        ("expr", "gpuglass_gpu_up{gpu_uuid=~'$gpu'}", "variable $gpu is not there"),
        ("expr", "gpuglass_gpu_up; 1", "stray ';'"),
        ("expr", "1 + 1", "reads no metric"),
        ("exemplar", None, "exemplars of metrics that have none"),
        ("unit", None, "has no unit"),
        ("noValue", None, "has no noValue"),
        ("thresholds", None, "has no thresholds"),
        ("description", None, "no title or no description"),
        ("link", "gpuglass-nowhere", "/d/gpuglass-nowhere, which is no dashboard"),
        ("place", {"x": 22, "w": 4}, "off the grid"),
        ("place", {"w": 8}, "overlap"),
        ("id", None, "two panels have one id"),
        ("targets", None, "asks nothing"),
        ("variable", "tenant", "has no variable tenant"),
        ("query of variable", "label_values(gpuglass_gpu_up, tenant)", "tenant is no label of"),
        ("query of variable", "query_result(up)", "is no label_values"),
        ("annotation", "sum(nobodys_metric)", "nobodys_metric is no metric"),
        ("tag", None, "lacks the tag"),
    ],
)
def test_a_planted_fault_is_found(change: str, value: object, fault: str) -> None:
    assert any(fault in found for found in planted(change, value)), planted(change, value)


def test_files_that_are_stale_missing_foreign_or_broken_are_found(tmp_path: Path) -> None:
    for name, content in files(Options()).items():
        (tmp_path / name).write_text(content)
    assert check(tmp_path, Options()) == []
    (tmp_path / "gpuglass-gpu.json").write_text("{")
    (tmp_path / "gpuglass-cost.json").unlink()
    (tmp_path / "mine.json").write_text(json.dumps(loaded()["gpuglass-jobs.json"]))
    found = "\n".join(check(tmp_path, Options()))
    for fault in (
        "gpuglass-cost.json: is missing",
        "gpuglass-gpu.json: is out of date",
        "gpuglass-gpu.json: is not JSON",
        "mine.json: is no dashboard of ours",
    ):
        assert fault in found


def alert(dashboard: str, expression: str, **variables: str) -> Alert:
    return Alert(
        "GPUTest", expression, "warning", "cost", "Something", "{{ $value }}", dashboard, variables=variables
    )


def test_an_alert_that_no_panel_shows_is_found() -> None:
    made = loaded()
    assert wrong(made, [alert(links.GPU, "device:gpu_up:min == 0", node="node")]) == []
    assert "none of ours" in wrong(made, [alert("elsewhere", "device:gpu_up:min == 0")])[0]
    assert "no panel of" in wrong(made, [alert(links.COST, "gpuglass_gpu_up == 0")])[0]
    assert "sets $pod" in wrong(made, [alert(links.GPU, "device:gpu_up:min == 0", pod="workload_pod")])[0]


def test_panels_of_a_collapsed_row_count_by_themselves() -> None:
    panels = copy.deepcopy(loaded()["gpuglass-compute-map.json"]["panels"])
    assert overlaps(panels) == []
    row = next(panel for panel in panels if panel["type"] == "row" and panel["panels"])
    row["panels"].append(copy.deepcopy(row["panels"][0]))
    assert "overlap" in overlaps(panels)[0]


# Exemplars


def given_exemplars(path: Path) -> set[str]:
    """Names of families to which a module hands a sample with an exemplar."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and any(keyword.arg == "exemplar" for keyword in node.keywords)
            and node.args
        ):
            found.add(ast.unparse(node.args[0]).rpartition(".")[2])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Histogram" and len(node.args) == 3:
            found.add("EVENT_BYTES")  # the one histogram that is made there
    return found


def test_exporters_give_these_families_exemplars() -> None:
    world = World()
    for sender, record in told_of_one(world):
        world.tell(sender, record)
    world.wait(40)
    histograms = {
        family for family in EXEMPLARS if family.kind is Kind.HISTOGRAM and family.name in vars_of(engine)
    }
    assert len(histograms) > 8
    assert {family.name for family in histograms if not world.exemplars(family)} == set()
    assert world.value(engine.BATCH) is None or not world.exemplars(engine.BATCH), (
        "not every histogram has some"
    )
    told = given_exemplars(ROOT / "exporters/vllm/publish.py") | given_exemplars(
        ROOT / "ebpf/verdict/account.py"
    )
    counters = {family for family in EXEMPLARS if family.kind is Kind.COUNTER}
    names = {family.name: name for module in ("engine", "cuda") for name, family in families(module).items()}
    assert {names[family.name] for family in counters} <= told


def vars_of(module: object) -> set[str]:
    return {value.name for value in vars(module).values() if isinstance(value, Family)}


def families(module: str) -> dict[str, Family]:
    import importlib

    found = vars(importlib.import_module(f"gpuglass.families.{module}"))
    return {name: value for name, value in found.items() if isinstance(value, Family)}


def test_every_dashboard_with_requests_shows_exemplars() -> None:
    for uid in (links.GPU, links.REQUESTS, links.TENANTS, links.CUDA_MEMORY):
        asked = [
            t
            for panel in panels_of(loaded()[f"{uid}.json"])
            for t in panel.get("targets", ())
            if t.get("exemplar")
        ]
        assert asked, uid


# Traces


@pytest.mark.parametrize(("kind", "told"), [("tempo", "queryType"), ("jaeger", "service")])
def test_trace_tables_ask_the_chosen_store_by_attributes_that_spans_have(kind: Any, told: str) -> None:
    from otel_bridge import attributes

    names = {value for value in vars(attributes).values() if isinstance(value, str)}
    asked = 0
    for content in files(Options(kind)).values():
        data = json.loads(content)
        for panel in panels_of(data):
            for target in panel.get("targets", ()):
                if target["datasource"]["type"] != kind:
                    continue
                asked += 1
                assert target[told] and target["datasource"]["uid"] == "${traces}"
                assert any(
                    entry["name"] == "traces" and entry["query"] == kind
                    for entry in data["templating"]["list"]
                )
                used = target.get("query", "").replace("span.", "").replace("resource.", "") + target.get(
                    "tags", ""
                )
                spoken = [word.strip("{}()&|") for word in used.replace("=", " ").split() if "." in word]
                attributes_named = {
                    word for word in spoken if word.startswith(("gpuglass.", "gen_ai.", "hw."))
                }
                assert attributes_named and attributes_named <= names
    assert asked == 2


# Layout and variables


def test_panels_flow_and_rows_break() -> None:
    tiles = [stat(str(n), "A number.", Query("vector(1)"), unit="short", size=(10, 4 + n)) for n in range(3)]
    laid = lay_out(
        [section("one", *tiles), section("two", text("t", "x"), collapsed=True), section("three", tiles[0])]
    )
    places = [(p.gridPos.x, p.gridPos.y, p.gridPos.w, p.gridPos.h) for p in laid]
    assert places == [
        (0, 0, 24, 1),
        (0, 1, 10, 4),
        (10, 1, 10, 5),
        (0, 6, 10, 6),
        (0, 12, 24, 1),
        (0, 13, 24, 1),
        (0, 14, 10, 4),
    ]
    assert len({p.id for p in laid}) == len(laid)


def test_variables_that_no_panel_reads_are_hidden_and_travel_on() -> None:
    for board in boards(Options()):
        data = as_json(board, Options())
        asked = " ".join(t.get("expr", "") for panel in panels_of(data) for t in panel.get("targets", ()))
        for entry in data["templating"]["list"]:
            if entry["type"] == "query" and entry["hide"] == 2:
                assert entry["name"] not in variables(asked), (board.uid, entry["name"])
        menu = data["links"][0]
        assert menu["includeVars"] and menu["keepTime"]


def test_an_option_chooses_the_data_source_at_first() -> None:
    data = json.loads(files(Options(datasource_uid="prom-eu"))["gpuglass-cost.json"])
    entry = next(e for e in data["templating"]["list"] if e["name"] == "datasource")
    assert entry["current"] == {"text": "prom-eu", "value": "prom-eu"}


def test_configmaps_hold_the_same_files() -> None:
    import yaml

    for name, content in configmaps(Options(), "monitoring").items():
        manifest = yaml.safe_load(content)
        uid = name.removesuffix(".yaml")
        assert manifest["data"] == {f"{uid}.json": (GENERATED / f"{uid}.json").read_text()}
        assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert manifest["metadata"]["namespace"] == "monitoring"


# Reading PromQL


@pytest.mark.parametrize(
    ("expr", "names", "labels"),
    [
        ("sum by (a) (rate(x_total[5m]))", {"x_total"}, {"a"}),
        ('a:b:c{d=~"e|f", g!=""} / on (h) group_left (i) j', {"a:b:c", "j"}, {"d", "g", "h", "i"}),
        ('{__name__=~"x|y", k="v"}', {"x", "y"}, {"k"}),
        ('{__name__="x", __name__=~"$signal"}', {"x"}, set()),
        ('label_replace(x, "new", "$1", "old", "(.*)")', {"x"}, set()),
        ("topk (3, max_over_time (x[1h:5m] offset 1d)) and y > bool 0", {"x", "y"}, set()),
        ("histogram_quantile(0.9, sum by (le) (rate(x_bucket[$__rate_interval])))", {"x_bucket"}, {"le"}),
        ("count without (a) (x) or vector(0) unless time() < 1e3", {"x"}, {"a"}),
    ],
)
def test_names_are_read_out_of_queries(expr: str, names: set[str], labels: set[str]) -> None:
    found = scan(expr)
    assert (found.metrics, found.labels, found.faults) == (names, labels, ())


def test_labels_that_a_query_makes_are_known() -> None:
    assert scan('label_join(label_replace(x, "a", "$1", "b", "."), "c", "-", "a")').made == {"a", "c"}
    assert metrics('label_replace(x, "a", "y", "b", ".")') == {"x"}
    assert variables("$a ${b:regex} $1 ${__field.labels.c}") == {"a", "b"}


# What is to be kept


def test_the_keep_list_holds_what_dashboards_read_and_needs_no_grafanalib() -> None:
    program = (
        "import sys; sys.modules['grafanalib'] = None\n"
        "from dashboards.read import queries\n"
        "print(*queries(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    read = set(done.stdout.split())
    asked = {
        name
        for data in loaded().values()
        for panel in panels_of(data)
        for target in panel.get("targets", ())
        for name in metrics(target.get("expr", ""))
    }
    assert asked <= read
    assert {gpu.DRAM_ACTIVE.name, gpu.PIPE_ACTIVE.name} <= read, "named by the map's variable only"
    assert gpu.BAR1_USED.name not in read
