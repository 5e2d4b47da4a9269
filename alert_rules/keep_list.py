"""`gpuglass rules keep-list`: scrape relabelling that keeps the series that somebody reads, and no others.

In: the expressions of all rooms that read Prometheus (entry points of the group `gpuglass.queries`). Out:
`metric_relabel_configs` for each kind of target.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points

import yaml

from gpuglass import catalog
from gpuglass.family import Kind, Owner
from gpuglass.promql import metrics_in
from recording_rules import foreign

_SUFFIXES = ("_bucket", "_count", "_sum")
_TARGETS: dict[str, str] = {
    Owner.AGENT: "the agent (/metrics, or /metrics/fast and /metrics/slow)",
    Owner.TRACER: "the CUDA tracer",
    Owner.ANOMALY: "the anomaly sidecar (with honor_labels: true)",
    "dcgm": "dcgm-exporter",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "trtllm": "trtllm-serve (/prometheus/metrics)",
    "triton": "Triton Inference Server (with vLLM's metrics, if REPORT_CUSTOM_METRICS is on)",
}


def all_queries() -> list[str]:
    """Expressions of rules, dashboards and detectors, as far as they are installed."""
    found: list[str] = []
    for entry in sorted(entry_points(group="gpuglass.queries"), key=lambda entry: entry.name):
        found += entry.load()()
    return found


def kept_names(queries: Iterable[str]) -> dict[str, list[str]]:
    """Names of samples by kind of target. A histogram is kept whole: `_bucket`, `_count` and `_sum`, and the
    bare name that it has once a scrape has converted it to a native one."""
    kept: dict[str, set[str]] = {target: set() for target in _TARGETS}
    for query in queries:
        for name in metrics_in(query):
            base = next((name.removesuffix(s) for s in _SUFFIXES if _histogram(name.removesuffix(s))), name)
            names = [base + s for s in ("", *_SUFFIXES)] if _histogram(base) else [base]
            for target in _targets_of(base):
                kept[target].update(names)
    return {target: sorted(names) for target, names in kept.items() if names}


def _histogram(name: str) -> bool:
    family, other = catalog.BY_NAME.get(name), foreign.BY_NAME.get(name)
    return (family is not None and family.kind is Kind.HISTOGRAM) or (other is not None and other.histogram)


def _targets_of(name: str) -> list[str]:
    if family := catalog.BY_NAME.get(name):
        return [family.owner]
    if metric := foreign.BY_NAME.get(name):
        # Triton's vLLM backend gives some of vLLM's metrics on Triton's endpoint.
        return [metric.exporter, "triton"] if metric.exporter == "vllm" else [metric.exporter]
    return []


def keep_list() -> str:
    """YAML: one entry per kind of target, to be put below its scrape job."""
    text = (
        "# Put each list below the scrape job of its target. Everything that no rule, dashboard or detector\n"
    )
    text += "# of the pack reads is dropped before it is stored.\n"
    for target, names in kept_names(all_queries()).items():
        rule = {"source_labels": ["__name__"], "regex": "|".join(names), "action": "keep"}
        text += f"\n# {_TARGETS[target]}\n"
        text += yaml.safe_dump({f"{target}": {"metric_relabel_configs": [rule]}}, sort_keys=False, width=100)
    return text
