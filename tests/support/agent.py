"""A running `gpuglass agent` for tests: a process of its own, with the fake driver playing a scenario.

In: a scenario and the configuration as plain data. Out: its base URL, answers of its endpoints, samples by
name and labels, its log, and what it does on signals. `refused_agent` is for configurations that it must
not start with.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from gpuglass.demo.scenario import Scenario
from tests.fakes.nvml import build
from tests.support.node import FakeProc, Sample

START_SECONDS = 60
STOP_SECONDS = 20

FAST: Mapping[str, Any] = {"interval": 0.1, "slow_interval": 0.2, "retry_interval": 0.2, "hang_timeout": 2}
"""GPU intervals that let a test see several samples within a second; a driver that is slow because much else
runs does not hang yet."""

_SERVING = re.compile(r"serving (http\S+)/metrics$", re.MULTILINE)
_RELOADED = re.compile(r"^.* (configuration (?:not )?taken.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()


def command(config_file: Path) -> list[str]:
    """The command line of an agent."""
    return [sys.executable, "-m", "gpuglass", "agent", "--config", str(config_file)]


def environ(**more: str) -> dict[str, str]:
    """This environment without any setting of an agent, and `more`."""
    return {k: v for k, v in os.environ.items() if not k.startswith("GPUGLASS_")} | more


def document(tmp_path: Path, config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A configuration that touches nothing of this machine; `config` goes over it section by section."""
    base: dict[str, dict[str, Any]] = {
        "server": {"listen": "127.0.0.1:0"},
        "gpu": {**FAST, "nvml_library": str(build())},
        "engines": {"socket": str(tmp_path / "agent.sock")},
        "kubernetes": {
            "pod_resources_socket": str(tmp_path / "no.sock"),
            "container_logs": str(tmp_path / "containers"),
            "pod_logs": str(tmp_path / "pods"),
        },
    }
    merged = {name: base.get(name, {}) | dict(config.get(name, {})) for name in {**base, **config}}
    return merged | {"proc": str(tmp_path / "proc")}


@dataclass
class RunningAgent:
    """An agent that serves."""

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path
    config_file: Path
    scenario_file: Path
    _folder: Path
    _stopped: bool = field(default=False)

    @property
    def log(self) -> str:
        """What it has written to standard error so far."""
        return self.log_file.read_text()

    @property
    def address(self) -> str:
        """Host and port."""
        return self.url.partition("//")[2]

    def fetch(self, path: str = "/metrics", timeout: float = 10, **headers: str) -> Answer:
        """GET a path; statuses of errors are answers as well. `accept_encoding="gzip"` sets that header."""
        request = urllib.request.Request(
            self.url + path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())

    def samples(self, name: str = "", path: str = "/metrics", **labels: str) -> list[Sample]:
        """Samples of one scrape whose name is `name` (any if empty) and whose labels contain `labels`."""
        return [
            Sample(sample.name, sample.labels, sample.value)
            for metric in text_string_to_metric_families(self.fetch(path).text)
            for sample in metric.samples
            if (not name or sample.name == name) and labels.items() <= sample.labels.items()
        ]

    def value(self, name: str, **labels: str) -> float | None:
        """The only such sample's value; None if there is none."""
        found = self.samples(name, **labels)
        assert len(found) <= 1, found
        return found[0].value if found else None

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 10) -> Any:
        """Wait until `condition` gives something true; fail with the log's end otherwise."""
        until = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > until:
                raise AssertionError(f"{what} did not hold within {seconds:g} s; log:\n{self.log[-2000:]}")
            time.sleep(0.02)
        return result

    def rewrite(self, scenario: Scenario) -> None:
        """Let the fake driver play another scenario from now on."""
        scenario.write(self.scenario_file)

    def configure(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        """Write another configuration file; the agent does not know it yet."""
        self.config_file.write_text(json.dumps(document(self._folder, config)))

    def hup(self) -> str:
        """Send SIGHUP and wait; gives what the log says about it."""
        before = len(_RELOADED.findall(self.log))
        self.process.send_signal(signal.SIGHUP)
        said: list[str] = self.wait(lambda: _RELOADED.findall(self.log)[before:], "an answer to SIGHUP")
        return said[0]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Send a signal; gives the exit code and the seconds until the end."""
        self._stopped = True
        started = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(STOP_SECONDS)
        return code, time.monotonic() - started


@contextmanager
def running_agent(
    tmp_path: Path,
    scenario: Scenario,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    ready: bool = True,
    **variables: str,
) -> Iterator[RunningAgent]:
    """Run an agent until the block ends, and see that SIGTERM ends it with code 0.

    `config` goes over a configuration with short intervals, `variables` into the environment. Without
    `ready` the block begins as soon as it serves, and not when /readyz says 200.
    """
    FakeProc(tmp_path / "proc")
    agent_log, config_file = tmp_path / "agent.log", tmp_path / "agent.yaml"
    config_file.write_text(json.dumps(document(tmp_path, config or {})))  # JSON is YAML
    scenario_file = scenario.write(tmp_path / "scenario.txt")
    with agent_log.open("wb") as log:
        process = subprocess.Popen(
            command(config_file),
            cwd=tmp_path,
            env=environ(FAKE_NVML_SCENARIO=str(scenario_file), **variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    agent = RunningAgent("", process, agent_log, config_file, scenario_file, tmp_path)
    try:
        serving = agent.wait(
            lambda: process.poll() is not None or _SERVING.search(agent.log), "serving", START_SECONDS
        )
        assert serving is not True, f"the agent ended with {process.poll()}:\n{agent.log}"
        agent.url = serving[1]
        if ready:
            agent.wait(lambda: agent.fetch("/readyz").status == 200, "readiness", START_SECONDS)
        yield agent
        if not agent._stopped:
            code, _ = agent.stop()
            assert code == 0, f"SIGTERM ended the agent with {code}:\n{agent.log}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def refused_agent(
    tmp_path: Path, config: Mapping[str, Mapping[str, Any]]
) -> subprocess.CompletedProcess[str]:
    """Run an agent that is expected to end by itself."""
    FakeProc(tmp_path / "proc")
    config_file = tmp_path / "agent.yaml"
    config_file.write_text(json.dumps(document(tmp_path, config)))
    scenario = Scenario().gpus(1).write(tmp_path / "scenario.txt")
    return subprocess.run(
        command(config_file),
        cwd=tmp_path,
        env=environ(FAKE_NVML_SCENARIO=str(scenario)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
