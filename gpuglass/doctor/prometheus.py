"""Checks of a Prometheus: its version, exemplar storage, and how it scrapes our agents.

In flows a function that GETs a path of its HTTP API; out flow checks. Answers are taken apart without trust:
what stands behind the URL may be anything.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from gpuglass.doctor.check import Check, Status, one_line
from gpuglass.doctor.http import Answer, NoAnswer, Url
from gpuglass.doctor.processes import counted

MIN_VERSION = (2, 42)
FAST_SECONDS = 1.0
"""Scrape interval for which the fast tier is made."""
SLOW_SECONDS = 15.0
"""Beyond it even the slow tier loses."""

Fetch = Callable[[str], Answer]
"""GET of a path below the URL. Raises `NoAnswer`."""

SERIES = 'count by (__name__, job) ({__name__=~"gpuglass_gpu_up|gpuglass_agent_build_info"})'

_PAIR = ("/metrics/fast", "/metrics/slow")
_CREDENTIALS = re.compile(r"//[^/@\s\"]*@")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "y": 31536000.0}


class ApiError(Exception):
    """The API gave no data. `usable` is true if it is Prometheus nevertheless; `mend` may be empty."""

    def __init__(self, text: str, mend: str = "", usable: bool = False) -> None:
        super().__init__(text)
        self.mend = mend
        self.usable = usable


@dataclass(frozen=True, slots=True)
class Target:
    """What we need of an active target."""

    job: str
    place: str
    """Host and port."""
    path: str
    healthy: bool
    error: str
    interval: float | None
    """Seconds between scrapes; None if it is not told."""


def checks(url: Url, fetch: Fetch, agent: str) -> list[Check]:
    """All checks of one Prometheus. `agent` is host and port of our agent, for the mend."""
    title, name = "Prometheus", "monitoring.prometheus"
    try:
        jobs = parse_jobs(ask(fetch, "query", query=SERIES))
    except ApiError as error:
        return [Check(name, title, Status.FAIL, f"{url}: {error}", error.mend)]
    found = [version(url, _optional(fetch, "status/buildinfo"))]
    flags = _optional(fetch, "status/flags")
    if flags is not None:
        found.append(exemplars(flags))
    answer = _optional(fetch, "targets", state="active")
    targets = None if answer is None else ours(parse_targets(answer), jobs, agent)
    found.append(scrapes(jobs, targets, agent))
    if targets:
        found += [interval(targets), tiers(targets)]
    return found


def ask(fetch: Fetch, path: str, **parameters: str) -> Any:
    """The `data` of an API answer; raises `ApiError`."""
    query = f"?{urlencode(parameters)}" if parameters else ""
    try:
        answer = fetch(f"/api/v1/{path}{query}")
    except NoAnswer as error:
        raise ApiError(str(error), "check the address and that Prometheus runs") from None
    if answer.status in (401, 403):
        raise ApiError(
            f"refuses access (status {answer.status})",
            "--prometheus http://USER:PASSWORD@HOST:PORT with an account that may read",
        )
    if not answer.complete:
        raise ApiError("the answer is too large", usable=True)
    try:
        document = json.loads(answer.body)
    except (ValueError, RecursionError):
        what = one_line(answer.content_type.partition(";")[0], 40) or "no JSON"
        raise ApiError(
            f"does not answer as Prometheus does (status {answer.status}, {what})",
            "give the URL of Prometheus itself, with its path prefix if it has one",
        ) from None
    if not isinstance(document, dict) or document.get("status") != "success":
        reason = document.get("error") if isinstance(document, dict) else None
        text = one_line(str(reason), 160) if reason else "an answer without status"
        raise ApiError(f"refuses the query: {text}", "look at Prometheus' log", usable=True)
    return document.get("data")


def _optional(fetch: Fetch, path: str, **parameters: str) -> Any:
    """As `ask`; None where a compatible server does not have the path."""
    try:
        return ask(fetch, path, **parameters)
    except ApiError:
        return None


def version(url: Url, build: Any) -> Check:
    """2.42 or newer; 3.x is fine."""
    title, name = "Prometheus", "monitoring.prometheus"
    text = one_line(str(_get(build, "version", "")), 40)
    match = re.match(r"v?(\d{1,4})\.(\d{1,4})", text)
    if match is None:
        return Check(name, title, Status.OK, f"{url}: answers queries, tells no version")
    if (int(match[1]), int(match[2])) < MIN_VERSION:
        return Check(
            name,
            title,
            Status.WARN,
            f"{url}: version {text}; the pack is made for 2.42 or newer",
            "upgrade Prometheus to 2.42 or newer",
        )
    return Check(name, title, Status.OK, f"{url}: version {text}")


def exemplars(flags: Any) -> Check:
    """Without the feature exemplars are dropped silently."""
    features = str(_get(flags, "enable-feature", "")).split(",")
    if "exemplar-storage" in (feature.strip() for feature in features):
        return Check("monitoring.exemplars", "exemplars", Status.OK, "stored")
    return Check(
        "monitoring.exemplars",
        "exemplars",
        Status.WARN,
        "not stored: no way from a metric to its trace",
        "start Prometheus with --enable-feature=exemplar-storage",
    )


def ours(targets: Iterable[Target], jobs: Iterable[str], agent: str) -> list[Target]:
    """Targets that are agents: by a job whose series we saw, by our paths, or by the agent's own port.

    One that is down has no series, so that its job alone does not tell.
    """
    known, port = set(jobs), agent.rpartition(":")[2]
    return [
        target
        for target in targets
        if target.job in known or target.path in _PAIR or target.place.rpartition(":")[2] == port
    ]


def scrapes(jobs: Mapping[str, Mapping[str, int]], targets: Sequence[Target] | None, agent: str) -> Check:
    """Whether our families arrive, and from targets that answer."""
    title, name = "scraping", "monitoring.scraping"
    down = [target for target in targets or () if not target.healthy]
    if down:
        first = down[0]
        return Check(
            name,
            title,
            Status.FAIL if len(down) == len(targets or ()) else Status.WARN,
            f"{len(down)} of {counted(len(targets or ()), 'target')} down; "
            f"{first.place}{first.path}: {first.error}",
            f"curl -i http://{first.place}{first.path} from where Prometheus runs",
        )
    if not jobs and targets:
        return Check(
            name,
            title,
            Status.WARN,
            f"{counted(len(targets), 'target')}, but no series of ours yet",
            "wait for a scrape interval, then run the doctor again",
        )
    if not jobs:
        return Check(
            name,
            title,
            Status.FAIL,
            "no series of ours: no agent is scraped",
            "scrape_configs: - {job_name: gpuglass-fast, scrape_interval: 1s, metrics_path: /metrics/fast, "
            f"static_configs: [{{targets: ['{agent}']}}]}}, and the same for /metrics/slow each 15s",
        )
    gpus = sum(counts.get("gpuglass_gpu_up", 0) for counts in jobs.values())
    names = ", ".join(sorted(jobs))
    agents = len({target.place for target in targets or ()})
    what = f"{counted(gpus, 'GPU')}" + (f" of {counted(agents, 'agent')}" if agents else "")
    if not gpus:
        return Check(
            name,
            title,
            Status.WARN,
            f"{names}: agents are scraped, but none shows a GPU",
            "gpuglass doctor on those nodes",
        )
    return Check(name, title, Status.OK, f"{what}, job {names}")


def interval(targets: Sequence[Target]) -> Check:
    """The fast tier is made for one scrape a second."""
    title, name = "scrape interval", "monitoring.interval"
    fast = [t for t in targets if t.path != _PAIR[1] and t.interval is not None]
    if not fast:
        return Check(name, title, Status.INFO, "not told by this Prometheus")
    slowest = max(fast, key=lambda target: target.interval or 0)
    seconds = slowest.interval or 0
    where = f"{slowest.path} each {seconds:g} s"
    if seconds <= FAST_SECONDS:
        return Check(name, title, Status.OK, where)
    too_long = seconds > SLOW_SECONDS
    return Check(
        name,
        title,
        Status.WARN if too_long else Status.INFO,
        f"{where}: " + ("alerts come late and rates fail" if too_long else "what is shorter is not seen"),
        f"job {slowest.job}: scrape_interval: 1s for metrics_path: /metrics/fast, 15s for /metrics/slow",
    )


def tiers(targets: Iterable[Target]) -> Check:
    """Each series once: either /metrics, or both halves."""
    title, name = "endpoints", "monitoring.endpoints"
    by_place: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for target in targets:
        by_place[target.place][target.path] += 1
    for place, paths in sorted(by_place.items()):
        halves = [path for path in _PAIR if paths[path]]
        if paths["/metrics"] and halves:
            return Check(
                name,
                title,
                Status.WARN,
                f"{place}: /metrics and {halves[0]} are both scraped, so series are there twice",
                "scrape either /metrics, or /metrics/fast and /metrics/slow",
            )
        twice = [path for path, count in sorted(paths.items()) if count > 1]
        if twice:
            return Check(
                name,
                title,
                Status.WARN,
                f"{place}{twice[0]} is scraped by {paths[twice[0]]} targets, so series are there twice",
                "remove all scrape jobs of this address but one",
            )
        if len(halves) == 1:
            other = _PAIR[1] if halves[0] == _PAIR[0] else _PAIR[0]
            return Check(
                name,
                title,
                Status.WARN,
                f"{place}: only {halves[0]} is scraped",
                f"add a job with metrics_path: {other}",
            )
    used = sorted({path for paths in by_place.values() for path in paths})
    return Check(name, title, Status.OK, " and ".join(used))


def parse_jobs(data: Any) -> dict[str, dict[str, int]]:
    """Number of series by name, by job, from the answer to `SERIES`."""
    jobs: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for element in _list(_get(data, "result", None)):
        labels, value = _get(element, "metric", {}), _get(element, "value", None)
        if isinstance(labels, dict) and isinstance(value, list) and len(value) == 2:
            try:
                jobs[str(labels.get("job", ""))][str(labels.get("__name__", ""))] = int(float(value[1]))
            except (ValueError, TypeError, OverflowError):
                continue
    return dict(jobs)


def parse_targets(data: Any) -> list[Target]:
    """Active targets, from the answer of /api/v1/targets."""
    found = []
    for element in _list(_get(data, "activeTargets", None)):
        try:
            url = urlsplit(str(_get(element, "scrapeUrl", "")))
            place = url.netloc.rpartition("@")[2]
        except ValueError:
            continue
        error = _CREDENTIALS.sub("//", str(_get(element, "lastError", "")))
        found.append(
            Target(
                job=one_line(str(_get(_get(element, "labels", {}), "job", "")), 80),
                place=one_line(place, 80),
                path=one_line(url.path, 80),
                healthy=_get(element, "health", "") != "down",
                error=one_line(error, 160),
                interval=duration(str(_get(element, "scrapeInterval", ""))),
            )
        )
    return found


def duration(text: str) -> float | None:
    """Seconds of a Prometheus duration such as 1m30s; None for anything else."""
    if not re.fullmatch(r"(?:\d{1,9}(?:ms|[smhdwy]))+", text):
        return None
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdwy])", text))


def _get(mapping: Any, key: str, default: Any) -> Any:
    return mapping.get(key, default) if isinstance(mapping, dict) else default


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
