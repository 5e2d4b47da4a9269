"""A real Prometheus for tests: started on a free port, queried over its HTTP API, stopped.

In: the program (2.x or 3.x, see the fixtures of tests/conftest.py) and a configuration as plain data. Out:
answers of its API as frozen values, times in Unix seconds.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuglass.demo import distribution
from tests.support.ports import free_port
from tests.support.servers import serving

READY_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Sample:
    """One element of an instant vector; a scalar has no labels."""

    labels: dict[str, str]
    time: float
    value: float
    histogram: dict[str, Any] | None = None
    """A native histogram as the API gives it; `value` is then its sum."""


@dataclass(frozen=True, slots=True)
class Series:
    """One element of a range vector."""

    labels: dict[str, str]
    points: list[tuple[float, float]]
    """(time, value); native histograms are left out."""


@dataclass(frozen=True, slots=True)
class Exemplar:
    series: dict[str, str]
    labels: dict[str, str]
    time: float
    value: float


@dataclass(frozen=True, slots=True)
class Target:
    job: str
    url: str
    health: str
    """`up`, `down` or `unknown` before the first scrape."""
    error: str
    labels: dict[str, str]


class PrometheusError(Exception):
    """It did not start, or refused a request; the text is its own."""


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running server. All methods raise PrometheusError where it refuses."""

    url: str
    log: Path

    def api(self, path: str, **parameters: object) -> Any:
        """The `data` of /api/v1/`path`."""
        query = urllib.parse.urlencode({k: v for k, v in parameters.items() if v is not None}, doseq=True)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise PrometheusError(error.read().decode(errors="replace")) from None

    def query(self, expression: str, time: float | None = None) -> list[Sample]:
        """An instant query, now or at a Unix time."""
        data = self.api("query", query=expression, time=time)
        match data["resultType"]:
            case "vector":
                return [_sample(element) for element in data["result"]]
            case "scalar":
                return [_sample({"metric": {}, "value": data["result"]})]
            case other:
                raise PrometheusError(f"{expression} is a {other}; use query_range or api")

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """A range query; Unix times, `step` in seconds."""
        data = self.api("query_range", query=expression, start=start, end=end, step=step)
        return [
            Series(element["metric"], [(float(at), float(value)) for at, value in element.get("values", [])])
            for element in data["result"]
        ]

    def exemplars(self, expression: str, start: float, end: float) -> list[Exemplar]:
        """The exemplars of the series that `expression` reads."""
        return [
            Exemplar(element["seriesLabels"], e["labels"], float(e["timestamp"]), float(e["value"]))
            for element in self.api("query_exemplars", query=expression, start=start, end=end)
            for e in element["exemplars"]
        ]

    def targets(self) -> list[Target]:
        """The targets that it scrapes."""
        return [
            Target(t["scrapePool"], t["scrapeUrl"], t["health"], t["lastError"], t["labels"])
            for t in self.api("targets", state="active")["activeTargets"]
        ]

    def wait_for(self, expression: str, seconds: float = 30) -> list[Sample]:
        """Repeats an instant query until it answers something. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not (samples := self.query(expression)):
            if time.monotonic() > deadline:
                health = [(t.job, t.health, t.error) for t in self.targets()]
                raise TimeoutError(f"{expression} is empty after {seconds:g} s; targets: {health}")
            time.sleep(0.1)
        return samples


@contextmanager
def running_prometheus(
    program: Path,
    scrape_configs: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    features: Sequence[str] = ("exemplar-storage",),
    flags: Sequence[str] = (),
) -> Iterator[Prometheus]:
    """Runs `program` with its files in `folder` until the block ends.

    `config` holds further top-level keys of the configuration file (`rule_files`, `alerting`, …); its
    `global` replaces the intervals of one second. Raises PrometheusError if it does not become ready.
    """
    second: dict[str, Any] = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}}
    settings = second | dict(config or {}) | {"scrape_configs": list(scrape_configs)}
    (folder / "prometheus.yml").write_text(json.dumps(settings, indent=2))  # JSON is YAML
    log, address = folder / "prometheus.log", f"127.0.0.1:{free_port()}"
    command = [
        str(program),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        *([f"--enable-feature={','.join(features)}"] if features else []),
        *flags,
    ]
    server = Prometheus(f"http://{address}", log)
    with serving("Prometheus", command, log, f"{server.url}/-/ready", READY_SECONDS, error=PrometheusError):
        yield server


def _sample(element: dict[str, Any]) -> Sample:
    if "histogram" in element:
        at, histogram = element["histogram"]
        return Sample(element["metric"], float(at), float(histogram["sum"]), histogram)
    at, value = element["value"]
    return Sample(element["metric"], float(at), float(value))


def promtool_check_metrics(text: str, promtool: Path | None = None) -> list[str]:
    """What `promtool check metrics` finds wrong with a text exposition, one line each.

    Without a path it is the distribution's promtool.
    """
    done = subprocess.run(
        [promtool or distribution.find("promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
    )
    return [line for line in done.stderr.splitlines() if line.strip()] if done.returncode else []
