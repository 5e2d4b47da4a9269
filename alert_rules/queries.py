"""Tells the keep-list which expressions recording and alerting rules evaluate."""

from __future__ import annotations

from collections.abc import Iterable

from alert_rules import groups as alerts
from recording_rules import groups as records
from recording_rules.settings import Settings


def queries() -> Iterable[str]:
    """Every expression, in both forms of histograms: a keep-list may not depend on the form."""
    settings = Settings()
    for form in ("classic", "native"):
        for group in records.groups(
            settings, records.Options(histograms="native" if form == "native" else "classic")
        ):
            yield from (rule.expression for rule in group.rules)
    for group in alerts.groups(settings):
        yield from (rule.expression for rule in group.rules)
