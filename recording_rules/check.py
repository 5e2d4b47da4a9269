"""Finds what is wrong with rules before Prometheus does: metrics that nobody exports, records that are never
written or written without being declared, labels that a record does not have.

In: groups. Out: one line per fault.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from gpuglass import catalog
from gpuglass.family import Kind
from gpuglass.promql import metrics_in
from recording_rules import foreign, records
from recording_rules.model import Alert, Group, Rule

PROMETHEUS_OWN = frozenset({"up", "ALERTS", "ALERTS_FOR_STATE", "scrape_samples_scraped"})
"""Series that Prometheus makes itself."""

_SUFFIXES = ("_bucket", "_count", "_sum")


def exported(name: str) -> bool:
    """Whether some exporter that the pack knows gives a series of this name."""
    return (
        name in PROMETHEUS_OWN
        or _known(name)
        or any(name.endswith(s) and _is_histogram(name.removesuffix(s)) for s in _SUFFIXES)
    )


def _known(name: str) -> bool:
    return name in catalog.BY_NAME or name in foreign.BY_NAME


def _is_histogram(name: str) -> bool:
    if name in catalog.BY_NAME:
        return catalog.BY_NAME[name].kind is Kind.HISTOGRAM
    return name in foreign.BY_NAME and foreign.BY_NAME[name].histogram


def unknown_metrics(expression: str, written: Collection[str]) -> list[str]:
    """Names in an expression that nobody exports and no rule of `written` records."""
    return sorted({name for name in metrics_in(expression) if name not in written and not exported(name)})


def faults(groups: Iterable[Group]) -> Iterator[str]:
    """One line per fault of the groups, which are to be all groups of a stack."""
    groups = list(groups)
    written = {rule.record.name for group in groups for rule in group.rules if isinstance(rule, Rule)}
    for name in sorted({group.name for group in groups if [g.name for g in groups].count(group.name) > 1}):
        yield f"group {name}: there are two of this name"
    for group in groups:
        for rule in group.rules:
            where = f"{group.name}: {rule.name if isinstance(rule, Alert) else rule.record.name}"
            for name in unknown_metrics(rule.expression, written):
                yield f"{where}: nobody exports {name}"
            if isinstance(rule, Rule):
                if records.BY_NAME.get(rule.record.name) is not rule.record:
                    yield f"{where}: is not declared in recording_rules/records.py"
                if extra := sorted(rule.labels.keys() - set(rule.record.labels)):
                    yield f"{where}: sets the label {extra[0]}, which is not declared"
    for name in records.BY_NAME.keys() - written:
        yield f"{name}: is declared, and no rule records it"
