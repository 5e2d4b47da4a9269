"""Runbooks: one per alert, each with the same sections, whose queries parse and read only what somebody
exports."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from alert_rules import files, groups
from gpuglass.demo import distribution
from gpuglass.promql import metrics_in
from recording_rules import check, records
from recording_rules.settings import parse
from tests.support import tools

ALERTS = groups.alerts(parse({"alerts": {"cost": {"target_per_1k_tokens": 1}}}, "all alerts"))
NAMES = sorted({alert.name for alert in ALERTS})
SECTIONS = ["Meaning", "Impact", "Diagnosis", "Mitigation"]
_QUERY = re.compile(r"^```promql\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    return (files.RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")


def queries(text: str) -> list[str]:
    return [query.strip() for query in _QUERY.findall(text)]


@pytest.mark.parametrize("name", NAMES)
def test_each_alert_has_a_runbook_with_meaning_impact_diagnosis_and_mitigation(name: str) -> None:
    text = text_of(name)
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    for body in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        assert len(body.strip()) > 4
    assert len(queries(text)) >= 2


def test_no_runbook_is_left_of_an_alert_that_is_gone() -> None:
    # Pages that begin with a small letter are about other things, such as advice.
    pages = {path.stem for path in files.RUNBOOKS.glob("[A-Z]*.md")}
    assert pages == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_queries_read_only_what_is_exported_or_recorded(name: str) -> None:
    for query in queries(text_of(name)):
        assert list(metrics_in(query)), query
        assert check.unknown_metrics(query, records.BY_NAME) == [], query


def test_a_query_of_a_metric_that_nobody_exports_would_be_found() -> None:
    assert check.unknown_metrics("rate(gpuglass_gpu_nothing_total[5m])", records.BY_NAME)
    assert check.unknown_metrics("max by (x) (device:nothing:max)", records.BY_NAME)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_other_runbooks(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(name)):
        assert (files.RUNBOOKS / target).exists(), target
        assert target != f"{name}.md", "a runbook that sends its reader to itself"


@pytest.mark.parametrize(
    "version",
    [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("debian-prometheus", "prometheus3")],
)
def test_prometheus_understands_all_queries(version: str, tmp_path: Path) -> None:
    """All in one file of recording rules, each in a group that names its runbook."""
    promtool = (
        distribution.find("promtool")
        if version == "debian-prometheus"
        else tools.PROMETHEUS.program("promtool")
    )
    book = [
        {
            "name": path.stem,
            "rules": [
                {"record": f"query:{number}", "expr": query}
                for number, query in enumerate(queries(path.read_text(encoding="utf-8")))
            ],
        }
        for path in sorted(files.RUNBOOKS.glob("*.md"))
    ]
    file = tmp_path / "queries.json"
    file.write_text(json.dumps({"groups": [group for group in book if group["rules"]]}))
    done = subprocess.run(
        [str(promtool), "check", "rules", "--lint=none", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
