"""The running agent as seen from outside: endpoints, signals, refusals at the start, what a scrape costs the
driver."""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

import gpuglass
from gpuglass import catalog
from gpuglass.demo.scenario import H200, Scenario, uuid_of
from gpuglass.family import Tier
from gpuglass.store import negotiate
from tests.fakes.nvml import build
from tests.support.agent import RunningAgent, refused_agent, running_agent
from tests.support.node import running_node

pytestmark = pytest.mark.needs("cc")

POWER = "gpuglass_gpu_power_watts"
AGE = "gpuglass_gpu_snapshot_age_seconds"
RELOAD_OK = "gpuglass_agent_config_last_reload_success"


def two_gpus() -> Scenario:
    return Scenario().gpus(2, H200)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """One agent for the tests that only read."""
    with running_agent(tmp_path_factory.mktemp("agent"), two_gpus()) as running:
        running.wait(lambda: len(running.samples(POWER)) == 2, "both GPUs")
        yield running


# Endpoints


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/metrics/fast", "/metrics/slow"])
def test_every_endpoint_answers(agent: RunningAgent, path: str) -> None:
    answer = agent.fetch(path)
    assert answer.status == 200
    assert answer.body


@pytest.mark.parametrize("path", ["/metrics/", "/metrics/medium", "/-/reload", "/debug/pprof"])
def test_no_other_path_is_served(agent: RunningAgent, path: str) -> None:
    assert agent.fetch(path).status == 404


def names(agent: RunningAgent, path: str) -> set[str]:
    """Names of families: those of a histogram's samples have endings."""
    found = {sample.name for sample in agent.samples(path=path)}
    return {name if name in catalog.BY_NAME else re.sub(r"_(bucket|count|sum)\Z", "", name) for name in found}


def test_each_tier_has_its_families_and_the_union_has_both(agent: RunningAgent) -> None:
    fast, slow = names(agent, "/metrics/fast"), names(agent, "/metrics/slow")
    assert fast == {name for name in fast if catalog.BY_NAME[name].tier is Tier.FAST} != set()
    assert slow == {name for name in slow if catalog.BY_NAME[name].tier is Tier.SLOW} != set()
    assert names(agent, "/metrics") == fast | slow


def test_it_says_which_version_runs(agent: RunningAgent) -> None:
    (info,) = agent.samples("gpuglass_agent_build_info")
    assert info.labels["version"] == gpuglass.__version__
    assert gpuglass.__version__ in agent.fetch("/").text


def test_openmetrics_is_given_to_whom_asks_and_text_to_all_others(agent: RunningAgent) -> None:
    asked = agent.fetch(Accept="application/openmetrics-text;version=1.0.0")
    assert asked.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert asked.text.endswith("# EOF\n")
    assert POWER in {family.name for family in parse_openmetrics(asked.text)}
    other = agent.fetch()
    assert other.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "# EOF" not in other.text


def test_gzip_is_given_to_whom_asks_only(agent: RunningAgent) -> None:
    zipped = agent.fetch(Accept_Encoding="gzip")
    assert zipped.headers["Content-Encoding"] == "gzip"
    assert POWER in gzip.decompress(zipped.body).decode()
    assert "Content-Encoding" not in agent.fetch().headers


def test_requests_are_counted_by_handler_and_code(agent: RunningAgent) -> None:
    def count(**labels: str) -> float:
        return agent.value("gpuglass_agent_http_requests_total", **labels) or 0

    before, before_slow = count(handler="/metrics/fast", code="200"), count(handler="/metrics/slow")
    agent.fetch("/metrics/fast")
    agent.fetch("/metrics/fast")
    assert count(handler="/metrics/fast", code="200") == before + 2
    assert count(handler="/metrics/slow") == before_slow


def test_the_number_of_published_series_is_the_number_scraped(agent: RunningAgent) -> None:
    published = agent.value("gpuglass_agent_series", tier="fast")
    live = len(agent.samples(AGE))
    assert published == len(agent.samples(path="/metrics/fast")) - live


def test_without_its_parts_the_agent_serves_itself_alone(tmp_path: Path) -> None:
    off = {"gpu": {"enabled": False}, "engines": {"enabled": False}}
    with running_agent(tmp_path, two_gpus(), off) as agent:
        assert agent.value("gpuglass_agent_build_info") == 1
        assert not [s for s in agent.samples() if not s.name.startswith("gpuglass_agent_")]


# Readiness


def test_it_is_ready_only_after_every_gpu_was_read_once(tmp_path: Path) -> None:
    hanging = two_gpus().hang(1, "nvmlDeviceGetMemoryInfo_v2", 60).hang(1, "nvmlDeviceGetMemoryInfo", 60)
    with running_agent(tmp_path, hanging, {"gpu": {"hang_timeout": 60}}, ready=False) as agent:
        agent.wait(lambda: agent.samples("gpuglass_gpu_up", device="nvidia0"), "the first GPU")
        answer = agent.fetch("/readyz")
        assert (answer.status, len(answer.text.splitlines())) == (503, 1)
        assert "not all GPUs were read yet" in answer.text
        assert agent.fetch("/healthz").status == 200
        agent.rewrite(two_gpus())
        agent.wait(lambda: agent.fetch("/readyz").status == 200, "readiness")


def test_a_machine_without_a_driver_is_ready_and_says_why_there_is_nothing(tmp_path: Path) -> None:
    with running_agent(tmp_path, Scenario().driver(state="not_loaded")) as agent:
        (driver,) = agent.wait(lambda: agent.samples("gpuglass_gpu_driver_up"), "the driver's state")
        assert (driver.value, driver.labels) == (0, {"reason": "driver_not_loaded"})
        assert agent.samples("gpuglass_gpu_up") == []


# Reload


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """One agent for tests that change its configuration."""
    with running_agent(tmp_path_factory.mktemp("reloaded"), two_gpus()) as running:
        yield running


@pytest.fixture
def reloaded(shared: RunningAgent) -> RunningAgent:
    """That agent with the configuration and the scenario that it started with."""
    shared.configure({})
    assert shared.hup().startswith("configuration taken")
    shared.rewrite(two_gpus())
    shared.wait(lambda: [s.value for s in shared.samples(POWER)] == [70, 70], "both GPUs")
    return shared


def test_sighup_takes_a_new_interval(tmp_path: Path) -> None:
    with running_agent(tmp_path, two_gpus(), {"gpu": {"interval": 30, "slow_interval": 30}}) as agent:
        before = agent.value("gpuglass_agent_config_last_reload_success_timestamp_seconds")
        agent.wait(lambda: [s.value for s in agent.samples(POWER)] == [70, 70], "both GPUs")
        agent.rewrite(two_gpus().gpu(0, power_mw=123_000))
        agent.configure({"gpu": {"interval": 0.1}})
        assert agent.hup() == "configuration taken; changed: gpu.interval, gpu.slow_interval"
        agent.wait(lambda: agent.value(POWER, device="nvidia0") == 123, "a sample at the new interval", 5)
        assert agent.value(RELOAD_OK) == 1
        after = agent.value("gpuglass_agent_config_last_reload_success_timestamp_seconds")
        assert before is not None
        assert after is not None
        assert after > before


def test_sighup_without_a_change_changes_nothing(reloaded: RunningAgent) -> None:
    loads = reloaded.value("gpuglass_gpu_driver_loads_total")
    assert reloaded.hup() == "configuration taken; changed: nothing"
    reloaded.rewrite(two_gpus().gpu(0, power_mw=99_000))
    reloaded.wait(lambda: reloaded.value(POWER, device="nvidia0") == 99, "a sample after that", 3)
    assert reloaded.value("gpuglass_gpu_driver_loads_total") == loads


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gpu: {interval: soon}", "agent.yaml: gpu.interval: expected a duration"),
        ("gpu: [", "agent.yaml: line "),
        ("gpu: {intervall: 1s}", "gpu.intervall: no such key; did you mean gpu.interval?"),
        (None, "agent.yaml: cannot read it"),
    ],
)
def test_a_bad_file_is_refused_and_the_old_configuration_stays(
    reloaded: RunningAgent, text: str | None, reason: str
) -> None:
    good = reloaded.config_file.read_text()
    if text is None:
        reloaded.config_file.unlink()
    else:
        reloaded.config_file.write_text(text)
    said = reloaded.hup()
    assert said.startswith("configuration not taken, the old one stays: ")
    assert reason in said
    assert reloaded.value(RELOAD_OK) == 0
    reloaded.rewrite(two_gpus().gpu(0, power_mw=99_000))
    reloaded.wait(lambda: reloaded.value(POWER, device="nvidia0") == 99, "a sample at the old interval", 3)
    reloaded.config_file.write_text(good)
    assert reloaded.hup() == "configuration taken; changed: nothing"
    assert reloaded.value(RELOAD_OK) == 1


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"server": {"listen": "127.0.0.1:1"}}, "server.listen"),
        ({"gpu": {"enabled": False}}, "gpu.enabled"),
        ({"kubernetes": {"refresh": 20}}, "kubernetes.refresh"),
    ],
)
def test_a_key_that_needs_a_restart_is_refused_with_all_that_came_along(
    reloaded: RunningAgent, config: dict[str, dict[str, object]], key: str
) -> None:
    reloaded.configure({**config, "gpu": {"interval": 30, "slow_interval": 30, **config.get("gpu", {})}})
    assert f"{key}: cannot change while the agent runs; restart it" in reloaded.hup()
    assert reloaded.value(RELOAD_OK) == 0
    reloaded.rewrite(two_gpus().gpu(0, power_mw=99_000))
    reloaded.wait(lambda: reloaded.value(POWER, device="nvidia0") == 99, "a sample at the old interval", 3)


def test_the_log_can_become_json_while_it_runs(reloaded: RunningAgent) -> None:
    assert not [line for line in reloaded.log.splitlines() if line.startswith("{")]
    reloaded.configure({"log": {"format": "json"}})
    reloaded.process.send_signal(signal.SIGHUP)
    (line,) = reloaded.wait(
        lambda: [line for line in reloaded.log.splitlines() if line.startswith("{")], "a JSON line"
    )
    entry = json.loads(line)
    assert entry["msg"] == "configuration taken; changed: log.format"
    assert (entry["level"], entry["logger"]) == ("info", "gpuglass")


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_code_0(tmp_path: Path, number: signal.Signals) -> None:
    with running_agent(tmp_path, two_gpus()) as agent:
        code, seconds = agent.stop(number)
        assert code == 0
        assert seconds < 5
        assert "Traceback" not in agent.log
        with pytest.raises(OSError):
            agent.fetch("/healthz")


def test_it_ends_in_time_while_a_driver_call_hangs_and_a_scraper_does_not_read(tmp_path: Path) -> None:
    with running_agent(tmp_path, two_gpus()) as agent, slow_scraper(agent):
        agent.rewrite(two_gpus().hang(0, "*", 600))
        agent.wait(lambda: agent.samples("gpuglass_gpu_up", reason="hung"), "a GPU that hangs")
        code, seconds = agent.stop()
        assert code == 0
        assert seconds < 5
        assert "a call into a driver did not return" in agent.log


def test_it_ends_in_time_in_the_middle_of_scrapes(tmp_path: Path) -> None:
    with running_agent(tmp_path, two_gpus()) as agent:
        bodies: list[str] = []
        stop = threading.Event()

        def scrape() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    bodies.append(agent.fetch(Accept="application/openmetrics-text").text)

        threads = [threading.Thread(target=scrape) for _ in range(3)]
        for thread in threads:
            thread.start()
        agent.wait(lambda: len(bodies) > 20, "scrapes")
        code, seconds = agent.stop()
        stop.set()
        for thread in threads:
            thread.join()
        assert code == 0
        assert seconds < 5
        assert all(body.endswith("# EOF\n") for body in bodies)  # no half of an answer passed for a whole


# Refusals at the start


def refusal(tmp_path: Path, config: dict[str, dict[str, object]]) -> str:
    done = refused_agent(tmp_path, config)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert done.stdout == ""
    return line


def test_a_busy_port_is_refused_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refusal(tmp_path, {"server": {"listen": address}})
    assert line.startswith(f"gpuglass: server.listen: cannot bind {address}: address already in use;")


@pytest.mark.parametrize("listen", ["localhost", "127.0.0.1:70000"])
def test_an_address_that_is_none_is_refused_in_one_line(tmp_path: Path, listen: str) -> None:
    assert "server.listen: " in refusal(tmp_path, {"server": {"listen": listen}})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tls_server_config: {cert_file: no.pem, key_file: no.key}", "no.pem"),
        ("basic_auth_users: {admin: secret}", "basic_auth_users"),
        (None, "No such file"),
    ],
)
def test_a_bad_web_configuration_is_refused_in_one_line(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    web = tmp_path / "web.yaml"
    if text is not None:
        web.write_text(text)
    line = refusal(tmp_path, {"server": {"web_config_file": str(web)}})
    assert line.startswith("gpuglass: server.web_config_file: ")
    assert str(web) in line
    assert reason.lower() in line.lower()


def test_a_good_web_configuration_is_in_force_and_a_variable_goes_over_the_file(tmp_path: Path) -> None:
    web = tmp_path / "web.yaml"
    web.write_text("http_server_config: {headers: {X-Frame-Options: deny}}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = f"127.0.0.1:{taken.getsockname()[1]}"
        config = {"server": {"listen": busy, "web_config_file": str(web)}}
        with running_agent(tmp_path, two_gpus(), config, GPUGLASS_SERVER_LISTEN="127.0.0.1:0") as agent:
            assert agent.address != busy
            assert agent.fetch().headers["X-Frame-Options"] == "deny"
            assert agent.value("gpuglass_agent_web_config_last_reload_success") == 1
            assert agent.hup() == "configuration taken; changed: nothing"  # also by way of the variable


# Scrapers


def test_two_scrapers_at_once_both_get_whole_answers(agent: RunningAgent) -> None:
    def scrape(accept: str) -> bool:
        text = agent.fetch(Accept=accept).text
        return POWER in text and text.endswith("# EOF\n") == bool(accept)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(scrape, ["application/openmetrics-text", ""] * 40))
    assert answers == [True] * 80


PAGES = 400
"""So many pages do not fit into the sockets' buffers."""


@contextlib.contextmanager
def slow_scraper(agent: RunningAgent) -> Iterator[socket.socket]:
    """A scraper that asks for many pages and reads nothing."""
    host, port = agent.address.rsplit(":", 1)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect((host, int(port)))
        client.sendall(b"GET /metrics/slow HTTP/1.1\r\nHost: a\r\n\r\n" * PAGES)
        agent.wait(lambda: (agent.value("gpuglass_agent_http_connections") or 0) >= 2, "the slow scraper")
        yield client


def test_a_slow_scraper_does_not_delay_a_fast_one(agent: RunningAgent) -> None:
    def answered() -> float:
        return agent.value("gpuglass_agent_scrapes_total", handler="/metrics/slow") or 0

    before = answered()
    with slow_scraper(agent) as slow:
        for _ in range(20):
            assert agent.fetch("/metrics/fast", timeout=2).status == 200
        assert 0 < answered() - before < PAGES  # the server waits for the slow one
        assert slow.recv(12) == b"HTTP/1.1 200"  # and has its answer ready when it reads at last


def away_from_tick() -> None:
    """Samples at an interval of a minute are due at its multiples: wait until the next is not just ahead."""
    ahead = 60 - time.monotonic() % 60
    if ahead < 4:
        time.sleep(ahead)


def test_a_scrape_takes_no_new_sample(tmp_path: Path) -> None:
    away_from_tick()
    with running_agent(tmp_path, two_gpus(), {"gpu": {"interval": 60, "slow_interval": 60}}) as agent:
        agent.wait(lambda: len(agent.samples(POWER)) == 2, "both GPUs")
        agent.rewrite(two_gpus().gpu(0, power_mw=90_000).gpu(1, power_mw=90_000))
        ages = [agent.value(AGE, device="nvidia0") or 0.0 for _ in range(50)]
        assert [s.value for s in agent.samples(POWER)] == [70, 70]
        assert ages == sorted(ages)
        assert ages[-1] > ages[0]


def test_a_scrape_never_calls_the_driver_and_a_sample_does(tmp_path: Path) -> None:
    calls = ctypes.CDLL(str(build())).fakeNvmlCalls
    calls.argtypes, calls.restype = [ctypes.c_char_p], ctypes.c_ulong
    away_from_tick()
    with running_node(tmp_path, two_gpus(), interval=60.0, slow_interval=60.0, xid_events=False) as node:
        node.wait(lambda: node.part.not_ready() is None, what="readiness")
        before = calls(b"*")
        assert before > 0
        for accept in ("", "application/openmetrics-text;version=1.0.0"):
            for _ in range(50):
                assert node.store.exposition(frozenset(Tier), negotiate(accept))
        assert calls(b"*") == before
    with running_node(tmp_path, two_gpus(), proc=node.proc) as sampling:
        before = calls(b"*")
        sampling.wait(lambda: calls(b"*") > before + 10, what="calls of the driver")


def test_a_lost_gpu_is_seen_by_a_scraper(reloaded: RunningAgent) -> None:
    reloaded.rewrite(two_gpus().gpu(1, lost=1))

    def seen() -> tuple[dict[str, float], set[str]]:
        """Whether each GPU is up, and of which the power is told; of one scrape."""
        samples = reloaded.samples()
        up = {s.labels["gpu_uuid"]: s.value for s in samples if s.name == "gpuglass_gpu_up"}
        return up, {s.labels["gpu_uuid"] for s in samples if s.name == POWER}

    # A machine with much else to do may think for a moment that the other hangs.
    expected = ({uuid_of(0): 1.0, uuid_of(1): 0.0}, {uuid_of(0)})
    reloaded.wait(lambda: seen() == expected, "a lost GPU", 30)


def test_it_uses_few_threads_and_files_after_many_scrapes(agent: RunningAgent) -> None:
    def used() -> tuple[float, float]:
        agent.wait(lambda: (agent.value("gpuglass_agent_http_connections") or 9) <= 1, "closed connections")
        return agent.value("gpuglass_agent_threads") or 0, agent.value("gpuglass_agent_open_fds") or 0

    threads, files = used()
    for _ in range(100):
        agent.fetch("/metrics/fast")
    more_threads, more_files = used()
    assert more_threads <= threads + 1
    assert more_files <= files + 2
