"""Families of the anomaly sidecar: scores, bands, forecasts, verdicts of its detectors, and itself.

Families about a series carry its own labels beside `query`, the name of the query or detector in the
configuration. A source label that is called like one of the family's is renamed `exported_…`, as Prometheus
does it. Scrape with `honor_labels: true`: `job` and `instance` are the source's.
"""

from __future__ import annotations

from gpuglass.family import Family, Kind, Owner

_RUNS = "The sidecar does not run."


def _of_series(name: str, help: str, *labels: str, unit: str = "", absent: str) -> Family:
    """A gauge about a series, with its labels."""
    return Family(
        f"gpuglass_{name}",
        Kind.GAUGE,
        help,
        ("query", *labels),
        unit,
        owner=Owner.ANOMALY,
        absent=absent,
        source_labels=True,
    )


def _own(name: str, kind: Kind, help: str, *labels: str, unit: str = "", absent: str = _RUNS) -> Family:
    """What the sidecar says about itself."""
    return Family(f"gpuglass_anomaly_{name}", kind, help, labels, unit, owner=Owner.ANOMALY, absent=absent)


# Scores

SCORE = _of_series(
    "anomaly_score",
    "How unusual the latest value is: above 1 it deviates more than nearly ever before, on every series.",
    absent="The series has no recent sample, or is too short to judge (gpuglass_anomaly_ready is 0).",
)
READY = _of_series(
    "anomaly_ready",
    "1 once the series has been seen long enough to be scored; 0 while it warms up.",
    absent="The series has no recent sample.",
)
EXPECTED = _of_series(
    "anomaly_expected",
    "Value that the seasonal profile expects now, in the series' unit.",
    absent="The query does not ask for bands, or gpuglass_anomaly_ready is 0.",
)
LOWER = _of_series(
    "anomaly_lower",
    "Lower band around gpuglass_anomaly_expected; below it the seasonal part of the score exceeds 1.",
    absent="The query does not ask for bands, or gpuglass_anomaly_ready is 0.",
)
UPPER = _of_series(
    "anomaly_upper",
    "Upper band around gpuglass_anomaly_expected; above it the seasonal part of the score exceeds 1.",
    absent="The query does not ask for bands, or gpuglass_anomaly_ready is 0.",
)

# Forecasts

FORECAST = _of_series(
    "forecast",
    "Value of the query in horizon from now at a quantile, in the series' unit.",
    "horizon",
    "quantile",
    absent="The forecast has not seen enough samples yet.",
)
