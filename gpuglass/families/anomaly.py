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

_NO_TARGET = "Too few of its targets have come yet, or the series is gone."

FORECAST = _of_series(
    "forecast",
    "Value of the query in horizon from now at a quantile, in the series' unit.",
    "horizon",
    "quantile",
    absent="The forecast has not seen enough samples yet.",
)

FORECAST_WAPE = _of_series(
    "forecast_error_ratio",
    "Absolute error of what was published at a horizon as a share of the value, over about the last day.",
    "horizon",
    unit="ratio",
    absent=_NO_TARGET,
)
FORECAST_SKILL = _of_series(
    "forecast_skill_ratio",
    "How much smaller that error is than that of expecting no change (persistence): 0 is as good, negative "
    "is worse.",
    "horizon",
    unit="ratio",
    absent=_NO_TARGET,
)
FORECAST_COVERAGE = _of_series(
    "forecast_coverage_ratio",
    "Share of values at or below the quantile that was forecast for them, over about the last day.",
    "horizon",
    "quantile",
    unit="ratio",
    absent=_NO_TARGET,
)
FORECAST_USABLE = _of_series(
    "forecast_usable",
    "1 while a forecast beats persistence and is published; 0 while persistence with its margin is.",
    "horizon",
    absent=_NO_TARGET,
)
DECOMPOSITION = _of_series(
    "decomposition",
    "Part of a forecast's latest mean: trend, seasonal (the course of the day) and remainder add up to it.",
    "part",
    absent="The forecast does not ask for it, or nothing is fitted yet.",
)
DECOMPOSITION_STRENGTH = _of_series(
    "decomposition_strength_ratio",
    "How much of a forecast's series is trend or course of the day (part trend, seasonal) and not "
    "remainder, by the latest fit: 0 nothing, 1 all.",
    "part",
    unit="ratio",
    absent="The forecast does not ask for it, or nothing is fitted yet.",
)
EXHAUSTION = _of_series(
    "exhaustion_seconds",
    "Time until the forecast at a quantile reaches the limit or uses up the quota; 0 once that has happened.",
    "quantile",
    unit="seconds",
    absent="The limit is not reached within the longest horizon, the quota never, or neither is known.",
)
REPLICAS = _of_series(
    "replicas_needed",
    "Replicas that the load needs, basis all: the larger of now and forecast. Made for autoscalers.",
    "basis",
    absent="Neither the load nor what one replica can do is known: the autoscaler's fallback has to hold.",
)
REPLICA_CAPACITY = _of_series(
    "replica_capacity",
    "Load that one replica can take, in the unit of the load; source measured (while requests waited), "
    "observed (the highest load so far, a lower bound) or configured.",
    "source",
    absent="No load was seen yet.",
)

# Detectors

_NO_INPUT = "An input of the detector has no sample now."
_FEW = "The series has no sample now, or fewer than three members of its group have one."

LEAK = _of_series(
    "memory_leak", "1 while memory grows as a leak does; 0 while it does not.", absent=_NO_INPUT
)
LEAK_RATE = _of_series(
    "memory_leak_growth",
    "Growth of a leak in bytes per second.",
    absent="There is no leak: gpuglass_memory_leak is not 1.",
)
LEAK_RESTARTS = _of_series(
    "memory_leak_restarts_seen",
    "Restarts after which the search began anew.",
    absent="The series is not known.",
)
STRANDED = _of_series(
    "stranded_bytes",
    "Memory that a GPU has held idle for long; 0 while it works or has not idled for long enough.",
    unit="bytes",
    absent=_NO_INPUT,
)
STRANDED_SECONDS = _of_series(
    "stranded_idle_seconds",
    "Time for which that memory has been held without work; 0 while the GPU works.",
    unit="seconds",
    absent=_NO_INPUT,
)
SILENT = _of_series(
    "silent_failure",
    "1 while an engine is up, has requests, and has produced no token for long; 0 otherwise.",
    absent=_NO_INPUT,
)
SILENT_SECONDS = _of_series(
    "silent_seconds",
    "Time for which it has produced nothing while requests were open.",
    unit="seconds",
    absent=_NO_INPUT,
)
RECURRING_STRENGTH = _of_series(
    "recurring_peak_strength_ratio",
    "A peak that comes back from from_hour to to_hour, on a weekday or every day: share of the variance of "
    "the hours that it explains.",
    "weekday",
    "from_hour",
    "to_hour",
    unit="ratio",
    absent="No peak came back often enough.",
)
RECURRING_REPEATS = _of_series(
    "recurring_peak_repeats",
    "Days with that peak among the last seven; of one weekday, weeks among the last four.",
    "weekday",
    "from_hour",
    "to_hour",
    absent="No peak came back often enough.",
)
SHIFT = _of_series(
    "level_shift",
    "Change of the level with the latest deployment, in the series' unit, for six hours.",
    absent="No deployment, it is not judged yet, or it changed nothing beyond the series' usual course.",
)
SHIFT_RELATIVE = _of_series(
    "level_shift_ratio",
    "The same as a share of the level before.",
    unit="ratio",
    absent="No deployment, it is not judged yet, it changed nothing, or the level before was 0.",
)
STRAGGLER = _of_series(
    "straggler", "1 while a member lags behind its group; 0 while it does not.", absent=_FEW
)
STRAGGLER_RATIO = _of_series(
    "straggler_ratio", "Value as a share of the group's median.", unit="ratio", absent=_FEW
)
STRAGGLER_RANK = _of_series("straggler_rank", "Place in the group, 1 is the slowest.", absent=_FEW)

# The sidecar itself

_NOT_YET = "It was not evaluated since the sidecar started."
_NO_STATE = "No folder for state is configured, or nothing was written yet."

BUILD_INFO = _own("build_info", Kind.INFO, "Version of the sidecar.", "version", "python")
START_TIME = _own(
    "start_timestamp_seconds", Kind.GAUGE, "Unix time at which the sidecar started.", unit="seconds"
)
CONFIG_RELOAD_OK = _own(
    "config_last_reload_success", Kind.GAUGE, "1 if the last (re)load of the configuration was taken."
)
CONFIG_RELOAD_TIME = _own(
    "config_last_reload_success_timestamp_seconds",
    Kind.GAUGE,
    "Unix time at which the configuration in force was loaded.",
    unit="seconds",
)
EVALUATIONS = _own(
    "evaluations_total",
    Kind.COUNTER,
    "Evaluations of a query or detector by result: ok, partial (the server left something out) or failed.",
    "query",
    "result",
    absent=_NOT_YET,
)
LAST_EVALUATION = _own(
    "last_evaluation_timestamp_seconds",
    Kind.GAUGE,
    "Unix time that the latest successful evaluation is about. What is published is as old as this.",
    "query",
    unit="seconds",
    absent=_NOT_YET,
)
STAGE_SECONDS = _own(
    "stage_seconds_total",
    Kind.COUNTER,
    "Time spent by stage: read (waiting for the server and parsing), join, analyze, publish, snapshot.",
    "query",
    "stage",
    unit="seconds",
    absent=_NOT_YET,
)
SAMPLES = _own("samples_total", Kind.COUNTER, "Samples taken in, history included.", "query", absent=_NOT_YET)
READ_BYTES = _own(
    "read_bytes_total", Kind.COUNTER, "Bytes of the server's answers.", "query", unit="bytes", absent=_NOT_YET
)
SERIES = _own("series", Kind.GAUGE, "Series that are known by query.", "query", absent=_NOT_YET)
SERIES_CHANGES = _own(
    "series_changes_total",
    Kind.COUNTER,
    "Series by what happened: admitted, evicted (gone for longer than state.ttl, or made room), refused "
    "(beyond the limit), ambiguous (two samples of one series in an answer).",
    "query",
    "change",
    absent=_NOT_YET,
)
COLLISIONS = _own(
    "label_collisions",
    Kind.GAUGE,
    "Series not published because another one has the same labels after renaming.",
    "query",
    absent=_NOT_YET,
)
BACKFILLED = _own(
    "backfilled_samples_total",
    Kind.COUNTER,
    "Samples read by range queries: history at the start, and gaps after outages.",
    "query",
    absent=_NOT_YET,
)
CLOCK_OFFSET = _own(
    "clock_offset_seconds",
    Kind.GAUGE,
    "This machine's clock minus the server's. Evaluations follow the server's.",
    unit="seconds",
    absent="The server did not answer yet.",
)
CLOCK_JUMPS = _own(
    "clock_jumps_total", Kind.COUNTER, "Times that a clock jumped, this machine's or the server's."
)
SNAPSHOT_TIME = _own(
    "snapshot_timestamp_seconds",
    Kind.GAUGE,
    "Unix time of the latest state on disk.",
    unit="seconds",
    absent=_NO_STATE,
)
SNAPSHOT_BYTES = _own(
    "snapshot_size_bytes", Kind.GAUGE, "Size of the latest state on disk.", unit="bytes", absent=_NO_STATE
)
SNAPSHOT_FAILURES = _own("snapshot_failures_total", Kind.COUNTER, "States that could not be written.")
RESTORED = _own(
    "state_restored",
    Kind.GAUGE,
    "1 if the query started with the state on disk, with the outcome: latest, previous (the latest was "
    "broken), new (none there), changed (the configuration differs) or damaged.",
    "query",
    "outcome",
    absent=_NOT_YET,
)
WORKER_JOBS = _own("worker_jobs_total", Kind.COUNTER, "Fits done by worker processes, by result.", "result")
WORKER_PENDING = _own("worker_jobs_pending", Kind.GAUGE, "Fits that wait or run.")
WORKER_RESTARTS = _own(
    "worker_restarts_total", Kind.COUNTER, "Worker processes that died and were started anew."
)
FITS = _own(
    "fits_total",
    Kind.COUNTER,
    "Fits of a forecast by result: taken, nothing (there is nothing to fit), failed, or late (the workers "
    "were too slow: taken later than by other replicas).",
    "query",
    "result",
    absent=_NOT_YET,
)
CPU = _own("cpu_seconds_total", Kind.COUNTER, "CPU time of the sidecar without its workers.", unit="seconds")
MEMORY = _own("resident_memory_bytes", Kind.GAUGE, "Memory of the sidecar that is resident.", unit="bytes")
