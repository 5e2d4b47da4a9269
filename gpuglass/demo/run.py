"""One run of the demo: what it starts, in which order, and what it says meanwhile.

In flow the settings, a folder that is removed afterwards and the signals; out flow running children, a table
and the last line. Whoever calls `play` stops the children and removes the folder, whatever happens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gpuglass.demo import distribution, ports, readings, simulator, table
from gpuglass.demo.children import Child, ChildFailed
from gpuglass.demo.host import Host
from gpuglass.demo.settings import Settings
from gpuglass.demo.signals import Signals, Stopped
from gpuglass.errors import UserError

READY_SECONDS = 30.0
PAST, AHEAD = 3.0, 4.0
"""Seconds of simulation in each scenario: the driver's means look back, and a rewrite may be late."""


@dataclass(slots=True)
class Demo:
    """Everything that one run has started."""

    settings: Settings
    folder: Path
    children: list[Child] = field(default_factory=list)
    _simulation: simulator.Simulation = field(init=False)
    _host: Host = field(init=False)
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._simulation = simulator.Simulation(self.settings.seed)
        self._host = Host(self.folder / "host")
        self._start = time.monotonic()

    def advance(self) -> None:
        """Write what the driver plays and who runs, for the seconds around now."""
        now = time.monotonic() - self._start
        frames = self._simulation.frames(max(0.0, now - PAST), now + AHEAD)
        self._host.update(process for frame in frames for process in frame.processes())
        simulator.scenario(self._simulation.places, frames, self._start).write(self._scenario)

    @property
    def _scenario(self) -> Path:
        return self.folder / "scenario"

    def start_agent(self, signals: Signals) -> str:
        """Start the agent; gives its address once it serves."""
        listen = f"{ports.HOST}:{self.settings.agent.number}"
        environ = agent_environ(
            os.environ, self.settings.nvml_library, self._scenario, self._host, self.folder, listen
        )
        command = [sys.executable, "-m", "gpuglass", "agent"]
        return self._start_server("the agent", command, environ, f"http://{listen}", "/readyz", signals)

    def start_prometheus(self, program: Path, signals: Signals) -> str:
        """Start Prometheus; gives its address once it serves."""
        config = self.folder / "prometheus.yml"
        config.write_text(json.dumps(prometheus_config(self.settings.agent.number), indent=2))  # JSON is YAML
        listen = f"{ports.HOST}:{self.settings.prometheus.number}"
        command = [
            str(program),
            f"--config.file={config}",
            f"--storage.tsdb.path={self.folder / 'prometheus'}",
            f"--web.listen-address={listen}",
            "--enable-feature=exemplar-storage",
        ]
        return self._start_server("Prometheus", command, os.environ, f"http://{listen}", "/-/ready", signals)

    def _start_server(
        self,
        name: str,
        command: list[str],
        environ: Mapping[str, str],
        url: str,
        ready: str,
        signals: Signals,
    ) -> str:
        log = self.folder / f"{name.split()[-1].lower()}.log"
        try:
            child = Child(name, command, log, environ)
        except OSError as error:
            raise UserError(f"{name} cannot be started: {command[0]}: {error.strerror}") from None
        self.children.append(child)
        if not child.wait_until(lambda: readings.answers(url + ready), READY_SECONDS, signals.pause):
            raise ChildFailed(child, f"is not ready after {READY_SECONDS:g} s")
        return url


def agent_environ(
    environ: Mapping[str, str], library: Path, scenario: Path, host: Host, folder: Path, listen: str
) -> dict[str, str]:
    """The agent's environment: this one, but with none of the user's own settings for an agent."""
    kept = {name: value for name, value in environ.items() if not name.startswith("GPUGLASS_")}
    return kept | {
        "FAKE_NVML_SCENARIO": str(scenario),
        "GPUGLASS_GPU_NVML_LIBRARY": str(library),
        "GPUGLASS_SERVER_LISTEN": listen,
        "GPUGLASS_PROC": str(host.proc),
        # No engine of this machine belongs to the simulated node.
        "GPUGLASS_ENGINES_ENABLED": "false",
        "GPUGLASS_KUBERNETES_CONTAINER_LOGS": str(host.container_logs),
        "GPUGLASS_KUBERNETES_POD_LOGS": str(host.pod_logs),
        "GPUGLASS_KUBERNETES_POD_RESOURCES_SOCKET": str(folder / "no-kubelet.sock"),
    }


def prometheus_config(agent_port: int) -> dict[str, object]:
    """Scrape the agent's fast tier each second and its slow tier each five."""
    target = [{"targets": [f"{ports.HOST}:{agent_port}"]}]
    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "scrape_configs": [
            {"job_name": "gpuglass-fast", "metrics_path": "/metrics/fast", "static_configs": target},
            {
                "job_name": "gpuglass-slow",
                "metrics_path": "/metrics/slow",
                "scrape_interval": "5s",
                "static_configs": target,
            },
        ],
    }


def find_prometheus(signals: Signals) -> Path | None:
    """Prometheus, fetched if need be; None after one line that says what is missing."""
    if (program := distribution.locate("prometheus")) is not None:
        return program
    print("fetching Prometheus from the distribution, about 20 MB, once ...", flush=True)
    began = time.monotonic()
    try:
        with signals.interrupting():
            program = distribution.find("prometheus")
    except distribution.ProgramMissing as error:
        print(f"without Prometheus, with the agent alone: {error}", flush=True)
        return None
    print(f"fetched in {time.monotonic() - began:.0f} s: {program}", flush=True)
    return program


def watch(demo: Demo, source: readings.Source, view: table.View, signals: Signals) -> None:
    """Play and show until the time is over. Raises Stopped and ChildFailed."""
    began = time.monotonic()
    seconds = demo.settings.seconds
    second = 0
    while seconds is None or second <= seconds:
        demo.advance()
        for child in demo.children:
            child.check()
        # One that does not answer is dead, and the next check says so, or slow: then the table stands still.
        with suppress(readings.Unavailable):
            view.show(readings.rows(source.read(), time.time()), time.monotonic() - began)
        second = max(second + 1, int(time.monotonic() - began))
        signals.pause(began + min(second, seconds or second) - time.monotonic())


def summary_line(summary: readings.Summary, has_prometheus: bool) -> str:
    """The last line of a run."""
    failed = f"{summary.failed} failed" if summary.failed else "none failed"
    who = " by Prometheus" if has_prometheus else ""
    return f"{summary.scrapes} scrapes{who}, {failed}; {summary.series} series; read on: README.md"


def start(demo: Demo, signals: Signals) -> readings.Source:
    """Start everything and say where it is. Raises Stopped, ChildFailed and other UserErrors."""
    program = find_prometheus(signals)
    demo.advance()
    agent = demo.start_agent(signals)
    print(f"agent       {agent}/metrics{demo.settings.agent.note}", flush=True)
    source: readings.Source = readings.FromAgent(agent)
    if program is not None:
        prometheus = demo.start_prometheus(program, signals)
        source = readings.FromPrometheus(prometheus)
        print(f"Prometheus  {prometheus}{demo.settings.prometheus.note}", flush=True)
    seconds = demo.settings.seconds
    how = "Ctrl-C ends it" if seconds is None else f"for {seconds:g} s"
    print(f"The node and its eight GPUs are simulated, all else is real; {how}.", flush=True)
    return source


def play(demo: Demo, signals: Signals) -> None:
    """One run, from the first child to the last line. Raises ChildFailed and other UserErrors."""
    try:
        source = start(demo, signals)
    except Stopped:
        return
    view = table.choose(os.environ)
    try:
        watch(demo, source, view, signals)
    except Stopped:
        pass
    finally:
        view.close()
    try:
        print(
            "",
            summary_line(source.summary(), isinstance(source, readings.FromPrometheus)),
            sep="\n",
            flush=True,
        )
    except readings.Unavailable as error:
        raise UserError(f"no answer at the end: {error}") from None
