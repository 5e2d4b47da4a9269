"""What can be wrong with the dashboards: `gpuglass dashboards check`.

In: a folder of JSON files and the declarations that they refer to (families, records, alerts). Out: one
line for each fault. It needs no Prometheus and no Grafana; the tests put the same files to both
Prometheus' and Grafana's own schemas.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alert_rules.groups import groups as alert_groups
from dashboards import links
from dashboards.board import COLUMNS, TAG, Options
from dashboards.build import MAX_BYTES, files
from dashboards.evaluate import panels_of
from dashboards.promql_scan import Scan, scan
from dashboards.variables import ALERTS
from gpuglass import catalog
from gpuglass.families import cuda, engine
from gpuglass.family import Family, Kind
from gpuglass.promql import TARGET_LABELS
from recording_rules import records
from recording_rules.model import Alert
from recording_rules.settings import Settings

EXEMPLARS = frozenset(
    {
        engine.KV_HOG_SECONDS,
        engine.KV_PEAK,
        engine.PREEMPTIONS,
        engine.WASTED,
        engine.OUT_OF_MEMORY,
        engine.REQUEST_DURATION,
        engine.REQUEST_QUEUE,
        engine.REQUEST_PREFILL,
        engine.REQUEST_DECODE,
        engine.REQUEST_FIRST_TOKEN,
        engine.REQUEST_PROMPT_TOKENS,
        engine.REQUEST_CACHED_TOKENS,
        engine.REQUEST_OUTPUT_TOKENS,
        engine.REQUEST_GPU,
        cuda.EVENT_FAILURES,
        cuda.EVENT_BYTES,
    }
)
"""Families that exporters give exemplars; a test holds them to it."""
BUILTIN = frozenset({"__rate_interval", "__interval", "__range", "__range_s", "__from", "__to", "__all"})
_ALERT_LABELS = frozenset(
    {
        "alertname",
        "alertstate",
        "severity",
        "category",
        *TARGET_LABELS,
        *records.DEVICE,
        *records.ENGINE,
        *records.WORKLOAD,
        "tenant",
    }
)
_NO_QUERY = frozenset({"text", "row"})


def check(folder: Path, options: Options) -> list[str]:
    """All faults of the files in a folder, which should be what `options` give."""
    wanted = files(options)
    faults = []
    found = {path.name: path for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
    for name, text in wanted.items():
        if name not in found:
            faults.append(f"{name}: is missing; run `gpuglass dashboards build --out {folder}`")
        elif found[name].read_text(encoding="utf-8") != text:
            faults.append(f"{name}: is out of date; run `gpuglass dashboards build --out {folder}`")
    faults += [f"{name}: is no dashboard of ours; remove it" for name in found.keys() - wanted.keys()]
    dashboards = {}
    for name, path in found.items():
        try:
            dashboards[name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            faults.append(f"{name}: is not JSON: {error}")
    return faults + wrong(dashboards, alerts())


def alerts() -> list[Alert]:
    """All alerts of the pack."""
    return [rule for group in alert_groups(Settings()) for rule in group.rules if isinstance(rule, Alert)]


def wrong(dashboards: Mapping[str, Mapping[str, Any]], known_alerts: Iterable[Alert]) -> list[str]:
    """Faults of dashboards by file name, whatever made them."""
    faults: list[str] = []
    uids = {data.get("uid") for data in dashboards.values()}
    for name, data in dashboards.items():
        faults += [f"{name}: {fault}" for fault in _dashboard(data)]
        faults += [
            f"{name}: links to /d/{uid}, which is no dashboard of ours"
            for uid in sorted(links.targets_of(json.dumps(data)) - uids)
        ]
        for panel in panels_of(data):
            where = f"{name}: panel {panel.get('title', '?')!r}"
            faults += [f"{where}: {fault}" for fault in _panel(panel, data)]
        faults += [f"{name}: {fault}" for fault in overlaps(data["panels"])]
        if len(json.dumps(data)) > MAX_BYTES:
            faults.append(f"{name}: is larger than a ConfigMap may be")
    return faults + unseen(dashboards, known_alerts)


def _dashboard(data: Mapping[str, Any]) -> Iterator[str]:
    names = [entry["name"] for entry in data["templating"]["list"]]
    for needed in ("datasource", "cluster", "node", "gpu_uuid", "model_name", "tenant"):
        if needed not in names:
            yield f"has no variable {needed}"
    if TAG not in data.get("tags", ()):
        yield f"lacks the tag {TAG}: the menu would not list it"
    for entry in data["templating"]["list"]:
        if entry["type"] == "query":
            yield from (
                f"variable {entry['name']}: {fault}" for fault in _variable(entry["query"]["query"], names)
            )
        elif entry["type"] == "custom":
            for choice in entry["options"]:
                for metric in choice["value"].split("|"):
                    if labels_of(metric) is None:
                        yield f"variable {entry['name']}: {metric} is no metric of the pack"
    for annotation in data["annotations"]["list"]:
        yield from (
            f"annotation {annotation['name']}: {fault}" for fault in _query(annotation["expr"], names)
        )
    ids = [panel["id"] for panel in panels_of(data)]
    if len(set(ids)) != len(ids):
        yield "two panels have one id"


def _variable(query: str, names: list[str]) -> Iterator[str]:
    inner, _, label = query.removeprefix("label_values(").removesuffix(")").rpartition(",")
    if not inner:
        yield f"{query!r} is no label_values(metric, label)"
        return
    yield from _query(inner, names)
    known = labels_of(next(iter(scan(inner).metrics), ""))
    if known is not None and label.strip() not in known:
        yield f"{label.strip()} is no label of {inner}"


def _panel(panel: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[str]:
    if not panel.get("title") or not panel.get("description"):
        yield "has no title or no description"
    if panel["type"] in _NO_QUERY:
        return
    defaults = panel["fieldConfig"]["defaults"]
    for key in ("unit", "noValue", "thresholds"):
        if not defaults.get(key):
            yield f"has no {key}"
    if not panel.get("targets"):
        yield "asks nothing"
    names = [entry["name"] for entry in data["templating"]["list"]]
    refs = [target["refId"] for target in panel["targets"]]
    if len(set(refs)) != len(refs):
        yield "two queries have one name"
    for target in panel["targets"]:
        if "expr" not in target:
            continue
        yield from (f"query {target['refId']}: {fault}" for fault in _query(target["expr"], names))
        if target.get("exemplar"):
            read = {_base(metric) for metric in scan(target["expr"]).metrics}
            if not read & EXEMPLARS:
                yield f"query {target['refId']}: asks for exemplars of metrics that have none"


def _query(expr: str, names: list[str]) -> Iterator[str]:
    found = scan(expr)
    yield from found.faults
    if not found.metrics and "vector(" not in expr:
        yield "reads no metric"
    for variable in sorted(found.variables - set(names) - BUILTIN):
        yield f"variable ${variable} is not there"
    yield from _unknown(found)


def _unknown(found: Scan) -> Iterator[str]:
    labels: set[str] = {*found.made, *TARGET_LABELS}
    anything = False
    for metric in sorted(found.metrics):
        known = labels_of(metric)
        if known is None:
            yield f"{metric} is no metric of the pack"
            return
        family = _base(metric)
        anything |= family is not None and family.source_labels
        labels |= known
    for label in sorted(found.labels - labels) if not anything else ():
        yield f"{label} is a label of none of the metrics that it reads"


def labels_of(metric: str) -> frozenset[str] | None:
    """Labels that a metric's series can have, the target's included; None if nobody exports or records it."""
    if metric == ALERTS:
        return _ALERT_LABELS
    if metric in records.BY_NAME:
        return frozenset(records.BY_NAME[metric].labels)
    family = _base(metric)
    if family is None or (family.kind is Kind.HISTOGRAM and metric == family.name):
        return frozenset({*family.labels, *TARGET_LABELS}) if family is not None else None
    return frozenset({*family.labels, *TARGET_LABELS, *({"le"} if metric.endswith("_bucket") else ())})


def _base(metric: str) -> Family | None:
    """The family of a sample's name."""
    if family := catalog.BY_NAME.get(metric):
        return family
    for ending in ("_bucket", "_sum", "_count"):
        family = catalog.BY_NAME.get(metric.removesuffix(ending))
        if family is not None and metric.endswith(ending) and family.kind is Kind.HISTOGRAM:
            return family
    return None


def overlaps(panels: Iterable[Mapping[str, Any]]) -> list[str]:
    """Panels that stand outside of the grid or on each other; those of a collapsed row stand by
    themselves."""
    faults: list[str] = []
    placed: list[tuple[str, Mapping[str, int]]] = []
    for panel in panels:
        place = panel["gridPos"]
        title = panel.get("title", "?")
        if panel["type"] == "row" and panel["panels"]:
            faults += overlaps(panel["panels"])
        if (
            place["x"] < 0
            or place["w"] < 1
            or place["x"] + place["w"] > COLUMNS
            or place["h"] < 1
            or place["y"] < 0
        ):
            faults.append(f"panel {title!r} is off the grid: {place}")
        for other, taken in placed:
            apart = (
                place["x"] + place["w"] <= taken["x"]
                or taken["x"] + taken["w"] <= place["x"]
                or place["y"] + place["h"] <= taken["y"]
                or taken["y"] + taken["h"] <= place["y"]
            )
            if not apart:
                faults.append(f"panels {other!r} and {title!r} overlap")
        placed.append((title, place))
    return faults


def unseen(dashboards: Mapping[str, Mapping[str, Any]], known: Iterable[Alert]) -> list[str]:
    """Alerts whose dashboard is missing, or shows none of what the alert reads, or lacks a variable of its
    link."""
    faults = []
    by_uid = {data["uid"]: data for data in dashboards.values()}
    for alert in known:
        data = by_uid.get(alert.dashboard)
        if data is None:
            faults.append(f"alert {alert.name}: its dashboard {alert.dashboard} is none of ours")
            continue
        shown = {
            metric
            for panel in panels_of(data)
            for target in panel.get("targets", ())
            for metric in scan(target.get("expr", "")).metrics
        }
        if not _families(scan(alert.expression).metrics) & _families(shown):
            faults.append(f"alert {alert.name}: no panel of {alert.dashboard} shows anything that it reads")
        names = {entry["name"] for entry in data["templating"]["list"]}
        faults += [
            f"alert {alert.name}: sets ${variable}, which {alert.dashboard} does not have"
            for variable in sorted(set(alert.variables) - names)
        ]
    return faults


def _families(metrics: Iterable[str]) -> set[str]:
    """Names of families and records; the rules' rollups and forms of one thing count as that."""
    found = set()
    for metric in metrics:
        family = _base(metric)
        name = family.name if family else metric
        found.add(name)
    return found


__all__ = ["EXEMPLARS", "alerts", "check", "labels_of", "overlaps", "unseen", "wrong"]
