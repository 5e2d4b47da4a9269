"""The generator: what it refuses, what it writes, and that what is committed is what it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from alert_rules import files, keep_list
from gpuglass.errors import ConfigError
from gpuglass.families import engine, gpu
from gpuglass.promql import (
    PromqlError,
    divide,
    duration,
    histogram_at_most,
    metrics_in,
    one_of,
    parenthesize,
    rate,
    regex,
    select,
)
from recording_rules import check, records
from recording_rules.groups import groups
from recording_rules.model import RECORD_NAME, Alert, Group, Record, Rule, RuleError
from recording_rules.options import Options
from recording_rules.settings import Settings, load, parse, table
from recording_rules.writer import render, texts
from tests.support import tools
from tests.support.prometheus import running_prometheus

EVERY = [Options(h, s) for h in ("classic", "native") for s in ("gpuglass", "dcgm", "auto")]  # type: ignore[arg-type]


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("gpuglass")
    return subprocess.run([str(program), "rules", *arguments], capture_output=True, text=True, cwd=cwd)


# PromQL


def test_selectors_know_the_labels_of_their_metric() -> None:
    assert (
        select(gpu.BUSY, source="gpm", job=regex("a|b"))
        == 'gpuglass_gpu_busy_ratio{source="gpm", job=~"a|b"}'
    )
    assert select(records.MODEL_TOKENS, 90, kind=one_of(["a.b", "c"])) == (
        'model:tokens:rate{kind=~"a\\\\.b|c"}[1m30s]'
    )
    assert select(gpu.BUSY, source=one_of(["gpm"])) == 'gpuglass_gpu_busy_ratio{source="gpm"}'
    assert rate(engine.TENANT_GPU, 300, tenant='a"b\\') == (
        'rate(gpuglass_tenant_gpu_seconds_total{tenant="a\\"b\\\\"}[5m])'
    )
    with pytest.raises(PromqlError, match="gpuglass_gpu_busy_ratio has no label sorce"):
        select(gpu.BUSY, sorce="gpm")
    with pytest.raises(PromqlError, match="is a histogram"):
        select(engine.REQUEST_DURATION)
    with pytest.raises(PromqlError, match="is no histogram"):
        histogram_at_most("classic", 1, gpu.BUSY, 300)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "500ms"), (90, "1m30s"), (86400, "1d"), (5400.25, "1h30m250ms")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("seconds", [0, -1, 0.0001])
def test_impossible_durations_are_refused(seconds: float) -> None:
    with pytest.raises(PromqlError):
        duration(seconds)


def test_parentheses_are_put_where_they_are_needed() -> None:
    for whole in ("a", 'a{b="c"}', "sum(a)", "sum by (b) (a)", "(a + b)", "rate(a[5m])", 'f("(", a)'):
        assert parenthesize(whole) == whole
    for part in ("a + b", "sum(a) / sum(b)", "(a) + (b)", "sum by (b) (a) > 1", "-a"):
        assert parenthesize(part) == f"({part})"
    assert divide("a", "b") == "a\n/\n(b > 0)"


def test_names_are_read_out_of_expressions() -> None:
    text = """
      # it's a comment with a_name and "a quote
      sum by (label_a) (rate(x_total{b="c_d{}", e=~"f|g"}[5m] offset 1h))
      / on (h) group_left (i) (foo:bar:baz > bool 0)
      or label_replace(up, "node", "$1", "instance", "(.+)") and (time() - start_seconds) * 1e3 atan2 Inf
    """
    assert list(metrics_in(text)) == ["x_total", "foo:bar:baz", "up", "start_seconds"]


def _selected(node: Any) -> set[str]:
    """Names in the syntax tree that Prometheus gives."""
    if isinstance(node, list):
        return set().union(*map(_selected, node)) if node else set()
    if not isinstance(node, dict):
        return set()
    found = (
        {node["name"]}
        if node.get("type") in ("vectorSelector", "matrixSelector") and node.get("name")
        else set()
    )
    return found.union(*(_selected(value) for value in node.values())) if node else found


@pytest.mark.needs("prometheus3")
def test_names_in_all_rules_are_those_that_prometheus_reads(prometheus3: Path, tmp_path: Path) -> None:
    expressions = {
        rule.expression
        for options in EVERY
        for group in files.all_groups(Settings(), options)
        for rule in group.rules
    }
    assert len(expressions) > 200
    with running_prometheus(prometheus3, [], tmp_path) as server:
        for expression in expressions:
            tree = server.api("parse_query", query=expression)
            assert set(metrics_in(expression)) == _selected(tree), expression


# Declarations


def test_records_are_declared_with_care() -> None:
    for name in ("gpu:busy:avg", "device:busy", "Device:busy:avg", "device:busy:avg:more"):
        with pytest.raises(RuleError, match="level:metric:operation"):
            Record(name, (), "", "Help.")
    with pytest.raises(RuleError, match="sentences"):
        Record("device:x:avg", (), "", "help")
    with pytest.raises(RuleError, match="unit"):
        Record("device:x:avg", (), "furlongs", "Help.")


def _alert(**other: Any) -> Alert:
    fields = {
        **{"name": "GPUCold", "expression": "up", "severity": "warning", "category": "cost"},
        **{"summary": "GPU is cold", "description": "{{ $labels.node }}", "dashboard": "gpuglass-gpu"},
    }
    return Alert(**{**fields, **other})


def test_alerts_are_declared_with_care() -> None:
    for wrong in (
        {"name": "gpuCold"},
        {"summary": "GPU {{ $labels.gpu_uuid }} is cold"},
        {"description": "no numbers"},
        {"labels": {"severity": "info"}},
    ):
        with pytest.raises(RuleError):
            _alert(**wrong)


def test_alerts_link_to_runbook_and_dashboard_with_variables() -> None:
    settings = parse(
        {"runbook_base": "https://w/r", "runbook_suffix": ".md", "dashboard_base": "https://g/d"}, "x"
    )
    told = texts(_alert(runbook="advice#cold", variables={"node": "node"}), settings)
    assert told["runbook_url"] == "https://w/r/advice.md#cold"
    assert told["dashboard_url"] == "https://g/d/gpuglass-gpu?var-node={{ $labels.node | urlquery }}"


def test_faults_of_rules_are_found() -> None:
    own = Record("device:x:avg", ("a",), "", "Help.")
    wrong = [
        Group("one", 30, (Rule(own, "gpuglass_gpu_bussy_ratio"), Rule(records.DEVICE_BUSY, "device:y:avg"))),
        Group(
            "one", 30, (Rule(own, "up", {"b": "c"}), _alert(expression="gpuglass_request_duration_seconds"))
        ),
    ]
    found = "\n".join(check.faults(wrong))
    assert "one: device:x:avg: nobody exports gpuglass_gpu_bussy_ratio" in found
    assert "one: device:busy:avg: nobody exports device:y:avg" in found
    assert "device:x:avg: is not declared" in found
    assert "sets the label b, which is not declared" in found
    assert "there are two of this name" in found
    assert "device:gpu_up:min: is declared, and no rule records it" in found
    # A histogram's own name is what native histograms have.
    assert "gpuglass_request_duration_seconds" not in found


def test_the_rules_have_no_faults() -> None:
    assert [line for line in files.faults(Settings()) if "runbook" not in line] == []


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_a_source_reads_only_its_own_series(options: Options) -> None:
    read = {n for g in groups(Settings(), options) for rule in g.rules for n in metrics_in(rule.expression)}
    ours = {name for name in read if name.startswith("gpuglass_") and name != "gpuglass_advice"}
    theirs = {name for name in read if not name.startswith("gpuglass_") and ":" not in name} - {"up"}
    assert bool(theirs) == (options.source != "gpuglass")
    agents = {gpu.BUSY.name, engine.INFO.name, engine.TENANT_GPU.name}
    assert bool(agents & ours) == (options.source != "dcgm")
    buckets = {name for name in read if name.endswith("_bucket")}
    assert bool(buckets) == (options.histograms == "classic")


# Settings


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"advice": {"cold_ratio": 7}}, "advice.cold_ratio: must be between 0 and 1 ratio, is 7"),
        ({"advice": {"cold": 0.1}}, "advice.cold: no such key; did you mean advice.cold_ratio?"),
        ({"windows": {"rate": "five minutes"}}, "windows.rate: expected a duration such as 500ms"),
        ({"windows": {"rate": "30s"}}, "windows.rate: must be at least twice windows.interval, is 30s"),
        ({"slo": {"first_token": {"seconds": 3}}}, "slo.first_token.seconds: 3 is no bound of"),
        ({"slo": {"page_fast": {"short": "2h"}}}, "slo.page_fast: short has to be below long"),
        ({"jobs": {"ignored_processes": "("}}, "jobs.ignored_processes: is no regular expression"),
        ({"slo": 3}, "slo: expected"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(document: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(document, "rules.yaml")
    assert str(error.value).startswith(f"rules.yaml: {said}"), error.value
    assert "\n" not in str(error.value)


def test_a_part_of_a_section_leaves_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("slo:\n  page_fast: {factor: 10}\nwindows: {rate: 10m}\n")
    settings = load(file)
    assert (settings.slo.page_fast.factor, settings.slo.page_fast.long) == (10, 3600)
    assert (settings.windows.rate, settings.windows.average) == (600, Settings().windows.average)
    assert "[10m]" in render("x", groups(settings), settings)


def test_every_threshold_has_a_unit_and_a_reason() -> None:
    bare = [row.key for row in table(Settings()) if row.number is not None and not (row.unit and row.why)]
    # The SRE workbook's pairs of windows have their reason at their class.
    assert [key for key in bare if not key.startswith(("slo.page_", "slo.ticket_"))] == []


# Files and command


def test_committed_files_are_current() -> None:
    assert list(files.stale()) == []


def test_a_changed_file_is_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = {tmp_path / "a.yaml": "new\n", tmp_path / "b.yaml": "same\n", tmp_path / "c.yaml": "x\n"}
    (tmp_path / "a.yaml").write_text("old\n")
    (tmp_path / "b.yaml").write_text("same\n")
    monkeypatch.setattr(files, "committed", lambda: here)
    monkeypatch.setattr(files, "_PACKAGES", tmp_path)
    assert [line.partition(";")[0] for line in files.stale()] == [
        "a.yaml: is out of date",
        "c.yaml: is missing",
    ]
    files.write_committed()
    assert list(files.stale()) == []


def test_build_writes_both_forms(tmp_path: Path) -> None:
    done = command("build", "--out", str(tmp_path / "plain"))
    assert done.returncode == 0, done.stderr
    done = command("build", "--out", str(tmp_path / "objects"), "--format", "prometheusrule")
    assert done.returncode == 0, done.stderr
    for name in (files.RECORDS, files.ALERTS):
        plain = yaml.safe_load((tmp_path / "plain" / f"{name}.yaml").read_text())
        wrapped = yaml.safe_load((tmp_path / "objects" / f"{name}.yaml").read_text())
        assert (wrapped["kind"], wrapped["metadata"]["name"]) == ("PrometheusRule", name)
        assert wrapped["spec"] == plain


def test_bad_use_is_one_line_and_code_2(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("slo: {errors: {objective: 2}}\n")
    done = command("build", "--config", str(file), "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "slo.errors.objective" in done.stderr
    assert not list(tmp_path.glob("gpuglass-*"))
    assert command("build", "--histograms", "both").returncode == 2
    blocked = command("build", "--out", str(file))
    assert blocked.returncode == 1 and "cannot write" in blocked.stderr


def test_settings_are_listed_with_reasons() -> None:
    done = command("settings")
    assert "windows.rate: 5m  # holds four samples" in done.stdout


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.needs("debian-prometheus")
def test_check_rules(options: Options, debian_promtool: Path, tmp_path: Path) -> None:
    _check_rules(debian_promtool, options, tmp_path)


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.needs("prometheus3")
def test_check_rules_of_prometheus_3(options: Options, promtool3: Path, tmp_path: Path) -> None:
    _check_rules(promtool3, options, tmp_path)


def _check_rules(promtool: Path, options: Options, folder: Path) -> None:
    for name, text in files.rule_files(Settings(), options, "prometheus").items():
        (folder / name).write_text(text)
    paths = [str(path) for path in folder.glob("*.yaml")]
    done = subprocess.run([str(promtool), "check", "rules", *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


PINT = """
checks {{ disabled = ["rule/dependency"] }}  # later layers read earlier groups: that is the design
rule {{
  match {{ kind = "recording" }}
  name "{name}" {{
    severity = "bug"
  }}
}}
rule {{
  match {{ kind = "alerting" }}
  label "severity" {{
    severity = "bug"
    value    = "critical|warning"
    required = true
  }}
  label "category" {{
    severity = "bug"
    value    = "latency|memory|cost|health|self"
    required = true
  }}
{annotations}
}}
# What pint cannot know, alert by alert.
rule {{  # either branch of its `or` names another culprit; pint takes the labels of one for those of both
  match {{ name = "GPUOutOfMemory" }}
  disable = ["promql/impossible", "alerts/template"]
}}
rule {{  # its query's name is the user's, who may have watched fragmentation by another one
  match {{ name = "GPUMemoryFragmentedDaily" }}
  disable = ["promql/regexp"]
}}
rule {{  # that there is such a series at all is what they tell
  match {{ name = "GPUPricesNotSet|GPUGlass(TenantsCapped|ProcessesCapped|TracerOverBudget)" }}
  disable = ["alerts/comparison"]
}}
"""


@pytest.mark.needs("pint")
@pytest.mark.parametrize("name", [files.RECORDS, files.ALERTS])
def test_pint_warns_of_nothing(name: str, tmp_path: Path) -> None:
    done = _pint(files.rule_files(Settings(), Options(), "prometheus")[f"{name}.yaml"], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.needs("pint")
def test_pint_finds_a_missing_annotation_and_a_wrong_name(tmp_path: Path) -> None:
    text = """
groups:
  - name: wrong
    rules:
      - record: busy
        expr: sum(up)
      - alert: GPUCold
        expr: up == 0
        labels: {severity: warning, category: cost}
        annotations: {summary: cold}
"""
    done = _pint(text, tmp_path)
    assert done.returncode != 0
    assert "runbook_url" in done.stderr and "alerts/annotation" in done.stderr and "rule/name" in done.stderr


def _pint(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = tools.PINT.program("pint")
    assert program
    annotations = "\n".join(
        f'  annotation "{name}" {{\n    severity = "bug"\n    required = true\n  }}'
        for name in ("summary", "description", "runbook_url", "dashboard_url")
    )
    (folder / "pint.hcl").write_text(PINT.format(name=RECORD_NAME, annotations=annotations))
    (folder / "rules.yaml").write_text(text)
    run = [
        str(program),
        "--no-color",
        "--offline",
        "-c",
        "pint.hcl",
        "lint",
        "--fail-on=warning",
        "rules.yaml",
    ]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True)


# Keep-list


def test_the_keep_list_holds_what_rules_read_and_nothing_else() -> None:
    queries = [
        rule.expression
        for options in EVERY
        for group in files.all_groups(Settings(), options)
        for rule in group.rules
    ]
    kept = keep_list.kept_names(queries)
    written = {
        rule.record.name for group in groups(Settings()) for rule in group.rules if isinstance(rule, Rule)
    }
    read = {name for query in queries for name in metrics_in(query)} - written - check.PROMETHEUS_OWN
    assert read <= set().union(*kept.values())
    assert gpu.CLOCK.name not in kept["agent"]
    assert "DCGM_FI_DEV_GPU_UTIL" in kept["dcgm"] and "sglang_num_running_reqs" in kept["sglang"]
    # All parts of a classic histogram, and the name of what a scrape may convert it to.
    whole = {f"{engine.REQUEST_DURATION.name}{suffix}" for suffix in ("", "_bucket", "_count", "_sum")}
    assert whole <= set(kept["agent"])


def test_a_query_of_any_room_is_kept() -> None:
    kept = keep_list.kept_names([f"rate({gpu.ENERGY.name}[5m])"])
    assert kept == {"agent": [gpu.ENERGY.name]}
