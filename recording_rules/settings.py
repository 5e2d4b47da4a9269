"""The one configuration dictionary of the rules: every threshold with its unit, its bounds and its reason.

In: the defaults below and a user's YAML file that overrides some of them. Out: a frozen `Settings`; what the
file has wrong is one line that names the key and the mend. `table` lists all of it for the documentation.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from gpuglass.config import Seconds, read_yaml_mapping
from gpuglass.errors import ConfigError
from gpuglass.families import engine
from gpuglass.promql import duration
from recording_rules.alert_settings import Alerts
from recording_rules.section import DAY, Bounds, Section, between


class Windows(Section, frozen=True):
    """How often rules run, and over which time they look."""

    interval: Annotated[
        Seconds, between(1, 300, "s", "twice the slow tier's scrape interval: every scrape is seen")
    ] = Seconds(30)
    slow_interval: Annotated[
        Seconds, between(1, 3600, "s", "cost, quota and advice change slowly and read many series")
    ] = Seconds(60)
    long_interval: Annotated[
        Seconds, between(1, 3600, "s", "a fifth of the samples, and still two within Prometheus's lookback")
    ] = Seconds(150)
    rate: Annotated[
        Seconds, between(2, 3600, "s", "holds four samples even at a scrape interval of one minute")
    ] = Seconds(300)
    average: Annotated[
        Seconds, between(2, 3600, "s", "smooths gauges of one second, and holds two samples at one minute")
    ] = Seconds(120)
    jobs: Annotated[Seconds, between(2, 3600, "s", "a job between two batches is no idle job")] = Seconds(600)


class Objective(Section, frozen=True):
    """A service level objective on a latency."""

    objective: Annotated[
        float, between(0.5, 0.99999, "ratio", "share of requests that have to be fast enough")
    ] = 0.95
    seconds: Annotated[float, between(0.001, 3600, "s", "what is fast enough; a bound of the histogram")] = (
        1.0
    )


class FirstToken(Objective, frozen=True):
    """Time to first token."""

    seconds: Annotated[
        float,
        between(0.001, 3600, "s", "a reader waits a second; the only bound that all engines share there"),
    ] = 1.0


class InterToken(Objective, frozen=True):
    """Time between two tokens of a request."""

    seconds: Annotated[float, between(0.001, 3600, "s", "ten tokens a second is faster than people read")] = (
        0.1
    )


class RequestDuration(Objective, frozen=True):
    """Time of a whole request."""

    seconds: Annotated[float, between(0.001, 3600, "s", "callers commonly give up after half a minute")] = (
        30.0
    )


class Errors(Section, frozen=True):
    """Requests that fail or are refused."""

    objective: Annotated[
        float, between(0.5, 0.99999, "ratio", "one request of a hundred may fail before a budget burns")
    ] = 0.99


class BurnRate(Section, frozen=True):
    """A pair of windows and the burn rate at which both alert (the SRE workbook's figures for 30 days)."""

    long: Seconds
    short: Seconds
    factor: float


class Slo(Section, frozen=True):
    """Service level objectives, per model."""

    first_token: FirstToken = FirstToken()
    inter_token: InterToken = InterToken()
    request_duration: RequestDuration = RequestDuration()
    errors: Errors = Errors()
    page_fast: BurnRate = BurnRate(long=Seconds(3600), short=Seconds(300), factor=14.4)
    page_slow: BurnRate = BurnRate(long=Seconds(6 * 3600), short=Seconds(1800), factor=6.0)
    ticket_fast: BurnRate = BurnRate(long=Seconds(DAY), short=Seconds(2 * 3600), factor=3.0)
    ticket_slow: BurnRate = BurnRate(long=Seconds(3 * DAY), short=Seconds(6 * 3600), factor=1.0)
    min_requests_per_second: Annotated[
        float, between(0, 1e6, "requests/s", "one slow request of ten in an hour is no incident")
    ] = 0.01

    def pairs(self) -> tuple[BurnRate, ...]:
        """All pairs of windows, the fastest first."""
        return (self.page_fast, self.page_slow, self.ticket_fast, self.ticket_slow)

    def windows(self) -> tuple[float, ...]:
        """Each window once, the shortest first."""
        return tuple(sorted({float(w) for pair in self.pairs() for w in (pair.long, pair.short)}))


class Cost(Section, frozen=True):
    """How cost is divided over tokens."""

    cached_token_weight: Annotated[
        float,
        between(
            0, 1, "ratio", "a cached token skips the computation but holds cache; sellers bill about a tenth"
        ),
    ] = 0.1
    output_token_weight: Annotated[
        float,
        between(
            0.01,
            1000,
            "ratio",
            "an output token's cost in input tokens where an engine's GPU time is not measured",
        ),
    ] = 4.0
    min_tokens_per_second: Annotated[
        float, between(0, 1e9, "tokens/s", "cost per token of an idle model is noise")
    ] = 1.0


class Jobs(Section, frozen=True):
    """Processes on GPUs that belong to no known engine."""

    ignored_processes: str = "Xorg|gnome-.*|nv-hostengine|nvidia-.*|dcgm.*"
    """Anchored pattern of the names of processes that are nobody's work."""


class Advice(Section, frozen=True):
    """When the data supports a change of configuration."""

    window: Annotated[
        Seconds, between(1, 30 * DAY, "s", "an advice rests on a day's course, not on a moment")
    ] = Seconds(DAY)
    job_window: Annotated[
        Seconds, between(60, 7 * DAY, "s", "long enough to hold a job's epochs and pauses")
    ] = Seconds(4 * 3600)
    kv_full_ratio: Annotated[
        float, between(0, 1, "ratio", "above it vLLM preempts at the next long prompt")
    ] = 0.9
    kv_empty_ratio: Annotated[
        float,
        between(0, 1, "ratio", "a pool whose busiest five percent of the time fill a third is too large"),
    ] = 0.35
    memory_headroom_ratio: Annotated[
        float, between(0, 1, "ratio", "free memory that a larger pool can take and still leave a reserve")
    ] = 0.12
    memory_tight_ratio: Annotated[
        float, between(0, 1, "ratio", "free memory below which an allocation outside of the pool fails")
    ] = 0.02
    preemptions_per_second: Annotated[
        float, between(0, 1e6, "events/s", "a preemption every five minutes costs more than it hides")
    ] = 1 / 300
    waiting_requests: Annotated[float, between(0, 1e6, "requests", "a queue at all times, not a burst")] = 1.0
    prefix_hit_ratio: Annotated[
        float, between(0, 1, "ratio", "below it the cache of prefixes is as good as off")
    ] = 0.01
    prefix_repeat_tokens: Annotated[
        float, between(0, 1e9, "tokens/s", "so much prompt is computed that a shared prefix would be felt")
    ] = 1000.0
    prefill_share: Annotated[
        float,
        between(0, 1, "ratio", "prefill above half of the GPU time delays the tokens of running requests"),
    ] = 0.5
    expert_imbalance: Annotated[
        float, between(1, 1000, "×mean", "busiest expert ÷ mean; from here on its rank sets the pace")
    ] = 3.0
    expert_rank_imbalance: Annotated[
        float, between(1, 1000, "×mean", "busiest rank ÷ mean: the others wait for a fifth of each step")
    ] = 1.25
    cold_ratio: Annotated[
        float, between(0, 1, "ratio", "mean activity of a day below which two models fit on one GPU")
    ] = 0.1
    job_unused_ratio: Annotated[
        float, between(0, 1, "ratio", "SM activity that no work explains: a context alone costs nothing")
    ] = 0.01
    job_burst_ratio: Annotated[
        float, between(0, 1, "ratio", "SM activity that shows that the job can use the card when it is fed")
    ] = 0.6
    job_idle_ratio: Annotated[
        float, between(0, 1, "ratio", "GPU time that a job holds and does not use before it is said")
    ] = 0.5
    job_busy_ratio: Annotated[float, between(0, 1, "ratio", "SM activity from which on a job computes")] = 0.3
    job_tensor_ratio: Annotated[
        float, between(0, 1, "ratio", "tensor pipes below it although SMs work: wrong type or shape")
    ] = 0.1
    job_memory_ratio: Annotated[
        float, between(0, 1, "ratio", "share of the card's memory below which a smaller card suffices")
    ] = 0.25
    peak_strength: Annotated[
        float,
        between(0, 1, "ratio", "share of the variance that a daily peak explains before it counts as one"),
    ] = 0.3


class Settings(Section, frozen=True):
    """All settings of recording and alerting rules."""

    windows: Windows = Windows()
    slo: Slo = Slo()
    cost: Cost = Cost()
    jobs: Jobs = Jobs()
    advice: Advice = Advice()
    alerts: Alerts = Alerts()
    runbook_base: str = "https://gpuglass.example/runbooks"
    """Where runbooks are read: links are base/NAME (or base/NAME.md#…, see `runbook_suffix`)."""
    runbook_suffix: str = ""
    dashboard_base: str = "/d"
    """Where Grafana's dashboards are: links are base/UID?var-…; with a host for use in notifications."""


# Reading

_AT = re.compile(r" - at `\$\.?(.*)`\Z")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


def load(path: Path | None) -> Settings:
    """Settings with a user's overrides; raises `ConfigError`."""
    return parse(read_yaml_mapping(path), str(path)) if path is not None else Settings()


def parse(document: Mapping[str, Any], source: str) -> Settings:
    """As `load`, of a document. An override of a part of a section leaves the rest of it at the defaults."""
    try:
        settings = msgspec.convert(_filled(document), Settings, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(str(error))}") from None
    _check(settings, source)
    return settings


def _filled(document: Mapping[str, Any]) -> dict[str, Any]:
    """Burn rates have no defaults of their own: take those of the pair that is overridden in part."""
    filled = dict(document)
    slo = filled.get("slo")
    if isinstance(slo, dict):
        filled["slo"] = {
            key: {**msgspec.structs.asdict(default), **value}
            if isinstance(default := getattr(Slo(), key, None), BurnRate) and isinstance(value, dict)
            else value
            for key, value in slo.items()
        }
    return filled


def _decode(kind: type, value: Any) -> Any:
    if kind is Seconds:
        return Seconds.parse(value)
    raise NotImplementedError(kind)


def _explain(message: str) -> str:
    at = _AT.search(message)
    path, text = (at[1], message[: at.start()]) if at else ("", message)
    if unknown := _UNKNOWN.match(text):
        key = " ".join((f"{path}.{unknown[1]}" if path else unknown[1]).split())[:80]
        close = difflib.get_close_matches(key, [row.key for row in table(Settings())], 1, 0.6)
        return f"{key}: no such key" + (f"; did you mean {close[0]}?" if close else "")
    text = " ".join(text.replace("`", "").split())[:200]
    return f"{path}: {text[:1].lower()}{text[1:]}" if path else text


def _check(settings: Settings, source: str) -> None:
    for row in table(settings):
        value = row.number
        if value is not None and not row.low <= value <= row.high:
            raise ConfigError(
                f"{source}: {row.key}: must be between {row.low:g} and {row.high:g} {row.unit}, is {value:g}"
            )
    for name, family in (
        ("first_token", engine.REQUEST_FIRST_TOKEN),
        ("request_duration", engine.REQUEST_DURATION),
    ):
        bound = getattr(settings.slo, name).seconds
        if bound not in family.buckets:
            bounds = ", ".join(f"{b:g}" for b in family.buckets)
            raise ConfigError(
                f"{source}: slo.{name}.seconds: {bound:g} is no bound of {family.name}; take one of {bounds}"
            )
    for key, pair in zip(
        ("page_fast", "page_slow", "ticket_fast", "ticket_slow"), settings.slo.pairs(), strict=True
    ):
        if not 1 <= pair.short < pair.long <= 30 * DAY or not 0 < pair.factor <= 1000:
            raise ConfigError(
                f"{source}: slo.{key}: short has to be below long, both from 1s to 30d, factor up to 1000"
            )
    try:
        re.compile(settings.jobs.ignored_processes)
    except re.error as error:
        raise ConfigError(f"{source}: jobs.ignored_processes: is no regular expression: {error}") from None
    if settings.windows.rate < 2 * settings.windows.interval:
        raise ConfigError(
            f"{source}: windows.rate: must be at least twice windows.interval, "
            f"is {duration(settings.windows.rate)}"
        )


# Listing


@dataclass(frozen=True, slots=True)
class Row:
    """A setting: dotted key, value as a user writes it, and its bounds and reason."""

    key: str
    value: str
    unit: str = ""
    why: str = ""
    low: float = float("-inf")
    high: float = float("inf")
    number: float | None = None


def table(settings: Settings) -> list[Row]:
    """All settings in the order of their declaration."""
    return list(_rows(settings, ""))


def _rows(section: Section, prefix: str) -> Iterator[Row]:
    hints = get_type_hints(type(section), include_extras=True)
    for field in section.__struct_fields__:
        value, key = getattr(section, field), f"{prefix}{field}"
        if isinstance(value, Section):
            yield from _rows(value, f"{key}.")
            continue
        hint = hints[field]
        bounds = next((m for m in get_args(hint) if isinstance(m, Bounds)), None)
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        shown = (
            duration(value) if kind is Seconds else f"{value:.4g}" if isinstance(value, float) else str(value)
        )
        number = float(value) if isinstance(value, int | float) else None
        if bounds is None:
            yield Row(key, shown, number=number)
        else:
            yield Row(key, shown, bounds.unit, bounds.why, bounds.low, bounds.high, number)
