"""Fake driver, agent and a real Prometheus: what the server stores is what the GPUs did, scrape by scrape.

The time of a scrape and the time of the reading in it differ by the sampling interval at most.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpuglass.demo import distribution
from gpuglass.demo.scenario import H200, Scenario, uuid_of
from tests.support import tools
from tests.support.agent import RunningAgent, running_agent
from tests.support.prometheus import Prometheus, promtool_check_metrics, running_prometheus

pytestmark = pytest.mark.needs("cc")

GPUS = 8
STEP_SECONDS = 4
LEVELS = (0, 100, 300, 200)
POWER, TEMPERATURE, ENERGY = (
    f"gpuglass_gpu_{name}" for name in ("power_watts", "temperature_celsius", "energy_joules_total")
)
GPU_CONFIG = {"gpu": {"interval": 1, "slow_interval": 5, "hang_timeout": 5}}

SLACK_SECONDS = 1.2
"""What a machine with other work to do may add to the sampling interval."""


class Steps:
    """Eight GPUs whose power and temperature take another level every few seconds, at known times."""

    def __init__(self, seconds: int) -> None:
        self.start = time.monotonic()
        self._wall = time.time() - self.start
        self.scenario = Scenario().gpus(GPUS, H200).clock(self.start)
        for number in range(seconds // STEP_SECONDS + 1):
            at = self.scenario.at(number * STEP_SECONDS)
            for gpu in range(GPUS):
                level = LEVELS[number % len(LEVELS)]
                at.gpu(gpu, power_mw=1000 * (100 + 10 * gpu + level), temp_gpu=40 + gpu + level // 10)

    def power(self, gpu: int, unix: float) -> float:
        """Watts at a moment."""
        return 100 + 10 * gpu + LEVELS[int((unix - self._wall - self.start) // STEP_SECONDS) % len(LEVELS)]

    def temperature(self, gpu: int, unix: float) -> float:
        """Degrees at a moment."""
        return 40 + gpu + (self.power(gpu, unix) - 100 - 10 * gpu) // 10

    def joules(self, gpu: int, start: float, end: float) -> float:
        """Energy used between two moments."""
        tick = 0.01
        return sum(self.power(gpu, start + n * tick) for n in range(round((end - start) / tick))) * tick


def points(prometheus: Prometheus, selector: str) -> dict[int, list[tuple[float, float]]]:
    """Every stored sample of the last two minutes with the time of its scrape, by GPU."""
    found = prometheus.api("query", query=f"{selector}[2m]")["result"]
    index = {uuid_of(gpu): gpu for gpu in range(GPUS)}
    return {
        index[series["metric"]["gpu_uuid"]]: [(float(at), float(value)) for at, value in series["values"]]
        for series in found
    }


def misses(
    stored: list[tuple[float, float]], expected: Callable[[float], float], oldest: float
) -> list[tuple[float, float]]:
    """Stored samples whose value the GPU had at no moment that the sample can stem from.

    `oldest` is how long before its scrape a sample was read at most. A GPU holds a level for longer than
    that, so both ends of the time tell all levels in it.
    """
    return [(at, value) for at, value in stored if value not in (expected(at), expected(at - oldest))]


def complaints(prometheus: Prometheus, address: str) -> list[str]:
    """Lines of the server's log about samples of a target that it could not store."""
    said = re.compile(r"out.of.order|duplicate|different value|out.of.bounds|append failed", re.IGNORECASE)
    lines = prometheus.log.read_text().splitlines()
    return [line for line in lines if address in line and said.search(line)]


def job(name: str, address: str, path: str, interval: str) -> dict[str, Any]:
    return {
        "job_name": name,
        "metrics_path": path,
        "scrape_interval": interval,
        "scrape_timeout": "1s",
        "static_configs": [{"targets": [address]}],
    }


def value(prometheus: Prometheus, expression: str) -> float:
    (sample,) = prometheus.query(expression)
    return sample.value


def check_power(prometheus: Prometheus, steps: Steps, selector: str, at_least: int) -> None:
    """Every sample of every GPU follows the steps, and all levels were seen."""
    stored = points(prometheus, selector)
    assert sorted(stored) == list(range(GPUS))
    for gpu, samples in stored.items():
        assert len(samples) >= at_least
        assert misses(samples, lambda at, gpu=gpu: steps.power(gpu, at), 1 + SLACK_SECONDS) == []
        assert {value - 100 - 10 * gpu for _, value in samples} == set(LEVELS)


@contextmanager
def bad_target() -> Iterator[str]:
    """Serves a series whose timestamps go backwards, which no server stores."""
    stamps = itertools.count(int(time.time() * 1000), -1000)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(b"bad 1 %d\n" % next(stamps))

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


A_MINUTE = " and on () ".join(
    (
        'count_over_time(up{job="fast"}[1m]) >= 59',
        'min_over_time(up{job="fast"}[1m]) == 1',
        'min_over_time(up{job="slow"}[1m]) == 1',
        'max_over_time(scrape_duration_seconds{job="fast"}[1m]) < 1',
    )
)
"""Each scrape of the last minute was answered within its second."""


@pytest.mark.timeout(400)
@pytest.mark.needs("debian-prometheus")
def test_a_minute_of_scrapes_of_both_tiers_has_no_gap_and_the_right_values(tmp_path: Path) -> None:
    program = tools.PROMETHEUS.program("prometheus") or distribution.find("prometheus")
    steps = Steps(300)
    with running_agent(tmp_path, steps.scenario, GPU_CONFIG) as agent:
        fast = job("fast", agent.address, "/metrics/fast", "1s")
        slow = job("slow", agent.address, "/metrics/slow", "5s")
        with running_prometheus(program, [fast, slow], tmp_path) as prometheus:
            # A minute after the start, or later where something else takes the cores for a while.
            prometheus.wait_for(A_MINUTE, 240)
            assert 11 <= value(prometheus, 'count_over_time(up{job="slow"}[1m])') <= 13
            check_power(prometheus, steps, POWER, at_least=58)
            for gpu, samples in points(prometheus, f'{TEMPERATURE}{{sensor="gpu"}}').items():
                # The slow tier is up to 5 s old, longer than a level is held: the one between counts, too.
                allowed = [
                    {steps.temperature(gpu, at - age) for age in (0, 2, 4, 5 + SLACK_SECONDS)}
                    for at, _ in samples
                ]
                assert len(samples) >= 11
                assert all(value in levels for (_, value), levels in zip(samples, allowed, strict=True))
            check_energy(prometheus, steps)
            assert complaints(prometheus, agent.address) == []
            (series,) = prometheus.query(f"count({POWER})")
            assert series.value == GPUS
            check_openmetrics(prometheus)
            check_counted(agent)


def check_energy(prometheus: Prometheus, steps: Steps) -> None:
    """The counter grows by what the steps add up to; its ends may be as old as the sampling interval."""
    for gpu, samples in points(prometheus, ENERGY).items():
        values = [value for _, value in samples]
        assert values == sorted(values)
        (start, first), (end, last) = samples[0], samples[-1]
        uncertain = 2 * (5 + SLACK_SECONDS) * max(LEVELS)
        assert last - first == pytest.approx(steps.joules(gpu, start, end), abs=uncertain)
        assert last - first > uncertain


def check_openmetrics(prometheus: Prometheus) -> None:
    """Only OpenMetrics tells a unit: a server that knows it has negotiated that format."""
    known = prometheus.api("targets/metadata", metric=POWER)
    assert [(entry["type"], entry["unit"]) for entry in known] == [("gauge", "watts")]


def check_counted(agent: RunningAgent) -> None:
    """The agent has counted the same scrapes, and refused none."""
    counted = agent.value("gpuglass_agent_http_requests_total", handler="/metrics/fast", code="200")
    assert counted is not None
    assert counted >= 59
    assert {s.value for s in agent.samples("gpuglass_agent_http_rejected_total")} == {0}
    assert {s.labels["code"] for s in agent.samples("gpuglass_agent_http_requests_total")} <= {"200", "503"}


@pytest.mark.needs("debian-prometheus")
def test_the_union_of_both_tiers_is_scraped_without_a_gap_and_bad_series_would_be_seen(
    tmp_path: Path, debian_prometheus: Path
) -> None:
    steps = Steps(60)
    with running_agent(tmp_path, steps.scenario, GPU_CONFIG) as agent, bad_target() as bad:
        jobs = [job("union", agent.address, "/metrics", "1s"), job("bad", bad, "/metrics", "1s")]
        with running_prometheus(debian_prometheus, jobs, tmp_path) as prometheus:
            whole = 'count_over_time(up{job="union"}[15s]) >= 15 and min_over_time(up{job="union"}[15s]) == 1'
            prometheus.wait_for(whole, 50)
            check_power(prometheus, steps, POWER, at_least=14)
            assert complaints(prometheus, agent.address) == []
            assert complaints(prometheus, bad)
            # Each family comes once, whether its tier is fast or slow.
            for name in (POWER, f'{TEMPERATURE}{{sensor="gpu"}}', "gpuglass_gpu_up"):
                assert value(prometheus, f"count({name})") == GPUS
            check_openmetrics(prometheus)


def test_a_sample_of_another_time_would_be_found() -> None:
    steps = Steps(40)
    wall = time.time() - time.monotonic() + steps.start

    def power(at: float) -> float:
        return steps.power(0, at)

    fresh, late, wrong = (wall + 9, power(wall + 8)), (wall + 9, power(wall + 2)), (wall + 9, 123.0)
    assert misses([fresh], power, 1.7) == []
    assert misses([fresh, late, wrong], power, 1.7) == [late, wrong]


@pytest.fixture(scope="module")
def promtooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """An agent that has something to say in many families."""
    scenario = Scenario().gpus(GPUS, H200).process(0, 4242, mem_mib=100, sm=5).event(0, "xid", 79)
    with running_agent(tmp_path_factory.mktemp("agent"), scenario) as agent:
        agent.wait(lambda: len(agent.samples(POWER)) == GPUS, "all GPUs")
        yield agent


@pytest.fixture(params=["debian-prometheus", "prometheus3"])
def promtool(request: pytest.FixtureRequest) -> Path:
    """The distribution's promtool, and Prometheus 3's where it was built."""
    if request.param == "debian-prometheus":
        return distribution.find("promtool")
    program = tools.PROMETHEUS.program("promtool")
    if program is None:
        pytest.skip("Prometheus 3 is not built")
    return program


@pytest.mark.needs("debian-prometheus")
def test_promtool_finds_nothing_wrong_on_any_endpoint(promtooled: RunningAgent, promtool: Path) -> None:
    for path in ("/metrics", "/metrics/fast", "/metrics/slow"):
        text = promtooled.fetch(path).text
        assert POWER in text or path == "/metrics/slow"
        assert promtool_check_metrics(text, promtool) == []
        doubled = text + text.partition("\n# HELP")[0] + "\n"
        assert promtool_check_metrics(doubled, promtool) != []
