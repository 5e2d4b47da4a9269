"""What the demo shows of each GPU, and where the numbers come from.

In flow samples: from Prometheus by its HTTP API, or from the agent's own /metrics where there is no
Prometheus. Out flow one `Row` per GPU and the counts for the last line. `rows` is pure.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT = 2.0
"""Seconds for one request to a server on this machine."""

XID_SHOWN = 30.0
"""Seconds for which an XID error is shown beside its GPU."""

_SHOWN = (
    "gpuglass_gpu_info",
    "gpuglass_gpu_up",
    "gpuglass_gpu_busy_ratio",
    "gpuglass_gpu_sm_active_ratio",
    "gpuglass_gpu_memory_used_bytes",
    "gpuglass_gpu_memory_total_bytes",
    "gpuglass_gpu_power_watts",
    "gpuglass_gpu_power_limit_watts",
    "gpuglass_gpu_throttle_active",
    "gpuglass_gpu_xid_last_timestamp_seconds",
    "gpuglass_process_memory_used_bytes",
    "gpuglass_process_sm_ratio",
)

# Without a proxy, whatever the environment says: both servers are on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Sample(NamedTuple):
    """One value of a series at one moment."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class TopProcess:
    """The process that uses most of a GPU, or holds most of its memory where none is active."""

    name: str
    namespace: str = ""
    pod: str = ""


@dataclass(slots=True)
class Row:
    """One GPU as the table shows it; None is not known (yet)."""

    device: str
    model: str | None = None
    up: bool = True
    busy: float | None = None
    sm_active: float | None = None
    memory_used: float | None = None
    memory_total: float | None = None
    power: float | None = None
    power_limit: float | None = None
    top: TopProcess | None = None
    throttled: tuple[str, ...] = ()
    xids: tuple[tuple[str, float], ...] = ()
    """XID codes and how many seconds ago each was last reported."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What happened between start and end."""

    scrapes: int
    failed: int
    series: int


_VALUES = {
    "gpuglass_gpu_busy_ratio": "busy",
    "gpuglass_gpu_sm_active_ratio": "sm_active",
    "gpuglass_gpu_memory_used_bytes": "memory_used",
    "gpuglass_gpu_memory_total_bytes": "memory_total",
    "gpuglass_gpu_power_watts": "power",
    "gpuglass_gpu_power_limit_watts": "power_limit",
}


def rows(samples: Iterable[Sample], now: float) -> list[Row]:
    """One row per GPU, in the order of their numbers. `now` is Unix time."""
    found: dict[str, Row] = {}
    processes: dict[str, dict[TopProcess, tuple[float, float]]] = {}
    for name, labels, value in samples:
        device = labels.get("device")
        if device is None:
            continue
        row = found.setdefault(device, Row(device))
        if attribute := _VALUES.get(name):
            setattr(row, attribute, value)
        elif name == "gpuglass_gpu_info":
            row.model = labels.get("model", "").removeprefix("NVIDIA ").removeprefix("GeForce ")
        elif name == "gpuglass_gpu_up":
            row.up = value == 1
        elif name == "gpuglass_gpu_throttle_active":
            row.throttled += (labels.get("reason", ""),) if value else ()
        elif name == "gpuglass_gpu_xid_last_timestamp_seconds":
            ago = max(0.0, now - value)
            row.xids += ((labels.get("xid", ""), ago),) if ago <= XID_SHOWN else ()
        elif name.startswith("gpuglass_process_"):
            process = TopProcess(
                labels.get("process", ""),
                labels.get("workload_namespace", ""),
                labels.get("workload_pod", ""),
            )
            held = processes.setdefault(device, {})
            sm, memory = held.get(process, (0.0, 0.0))
            is_sm = name == "gpuglass_process_sm_ratio"
            held[process] = (sm + value, memory) if is_sm else (sm, memory + value)
    for device, held in processes.items():
        found[device].top = max(held, key=lambda process: held[process])
    return sorted(found.values(), key=lambda row: (len(row.device), row.device))


class Unavailable(Exception):
    """A server of the demo does not answer."""


def fetch(url: str, timeout: float = TIMEOUT) -> bytes:
    """The body of an answer with status 200. Raises Unavailable."""
    try:
        with _OPENER.open(url, timeout=timeout) as answer:
            body: bytes = answer.read()
            return body
    except (OSError, ValueError) as error:  # HTTPError, URLError and timeouts are OSErrors
        raise Unavailable(f"{url}: {error}") from None


def answers(url: str) -> bool:
    """Whether a server gives status 200 there."""
    try:
        fetch(url)
    except Unavailable:
        return False
    return True


class Source(Protocol):
    """Where the numbers come from."""

    def read(self) -> list[Sample]:
        """The newest samples, none before the first ones are there. Raises Unavailable."""

    def summary(self) -> Summary:
        """The counts so far. Raises Unavailable."""


@dataclass(slots=True)
class FromPrometheus:
    """Asks Prometheus. `url` has no slash at its end."""

    url: str

    def read(self) -> list[Sample]:
        return [
            Sample(labels.pop("__name__", ""), labels, value)
            for labels, value in self._query(f'{{__name__=~"{"|".join(_SHOWN)}"}}')
        ]

    def summary(self) -> Summary:
        # One query: scrapes go on meanwhile.
        numbers = {
            "done": "sum(count_over_time(up[1h]))",
            "good": "sum(sum_over_time(up[1h]))",
            "series": "sum(count by (job) ({job!=''}))",
        }
        named = (f"label_replace({query}, 'is', '{name}', '', '')" for name, query in numbers.items())
        found = {labels["is"]: int(value) for labels, value in self._query(" or ".join(named))}
        done = found.get("done", 0)
        return Summary(done, done - found.get("good", done), found.get("series", 0))

    def _query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        query = urllib.parse.urlencode({"query": expression})
        answer: Any = json.loads(fetch(f"{self.url}/api/v1/query?{query}"))
        return [(element["metric"], float(element["value"][1])) for element in answer["data"]["result"]]


@dataclass(slots=True)
class FromAgent:
    """Reads the agent's /metrics and counts what Prometheus would have counted."""

    url: str
    _done: int = field(default=0, init=False)
    _failed: int = field(default=0, init=False)
    _series: int = field(default=0, init=False)

    def read(self) -> list[Sample]:
        self._done += 1
        try:
            text = fetch(f"{self.url}/metrics").decode()
        except Unavailable:
            self._failed += 1
            raise
        samples = parse(text)
        self._series = len(samples)
        return [sample for sample in samples if sample.name in _SHOWN]

    def summary(self) -> Summary:
        return Summary(self._done, self._failed, self._series)


def parse(text: str) -> list[Sample]:
    """The samples in a text exposition."""
    return [
        Sample(sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
