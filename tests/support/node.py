"""A simulated node: the fake driver playing a scenario, a made-up /proc, and the real GPU part in this
process.

Tests write a scenario, start the part and read samples back by name and labels, as a scrape would see them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from exporters.gpu.part import GpuPart
from exporters.gpu.workloads import Workloads
from gpuglass import catalog
from gpuglass.config import Config, GpuConfig, KubernetesConfig, Seconds
from gpuglass.demo.scenario import Scenario
from gpuglass.family import Owner, Tier
from gpuglass.procfs import INITIAL_PID_NAMESPACE
from gpuglass.store import Store, negotiate
from tests.fakes.nvml import build

Labels = Mapping[str, str]
_STAT = "{pid} ({name}) {state} 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {start} 0 0\n"


class FakeProc:
    """A /proc of the host's pid namespace, with the processes that a test puts there."""

    def __init__(self, root: Path, namespace: int = INITIAL_PID_NAMESPACE) -> None:
        self.root = root
        (root / "self" / "ns").mkdir(parents=True)
        (root / "self" / "ns" / "pid").symlink_to(f"pid:[{namespace}]")
        (root / "self" / "status").write_text("Name:\tx\nNSpid:\t7\n")
        self.add(1, "init")

    def add(
        self, pid: int, name: str = "python3", cgroup: str = "/", start: int = 100, state: str = "S"
    ) -> None:
        """Put a process there, or another one at the same pid."""
        folder = self.root / str(pid)
        folder.mkdir(exist_ok=True)
        (folder / "stat").write_text(_STAT.format(pid=pid, name=name, state=state, start=start))
        (folder / "cgroup").write_text(f"0::{cgroup}\n")
        (folder / "mountinfo").write_text("")

    def remove(self, pid: int) -> None:
        """The process has ended."""
        for file in (self.root / str(pid)).iterdir():
            file.unlink()
        (self.root / str(pid)).rmdir()


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of an exposition."""

    name: str
    labels: Labels
    value: float


@dataclass
class Node:
    """The running part and what it publishes."""

    part: GpuPart
    store: Store
    scenario_file: Path
    proc: FakeProc
    _stopped: bool = field(default=False)

    def samples(self, name: str = "", **labels: str) -> list[Sample]:
        """Published samples of a family whose labels contain `labels`."""
        text = self.store.exposition(frozenset(Tier), negotiate("")).decode()
        return [
            Sample(sample.name, sample.labels, sample.value)
            for metric in text_string_to_metric_families(text)
            for sample in metric.samples
            if (not name or sample.name == name) and labels.items() <= sample.labels.items()
        ]

    def value(self, name: str, **labels: str) -> float | None:
        """The only such sample's value; None if there is none."""
        found = self.samples(name, **labels)
        assert len(found) <= 1, found
        return found[0].value if found else None

    def wait(self, condition: Callable[[], Any], seconds: float = 10, what: str = "the condition") -> Any:
        """Wait until `condition` gives something true; fail with what is published otherwise."""
        until = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > until:
                up = [(s.labels, s.value) for s in self.samples("gpuglass_gpu_up")]
                raise AssertionError(f"{what} did not hold within {seconds:g} s; gpuglass_gpu_up: {up}")
            time.sleep(0.02)
        return result

    def wait_value(self, name: str, expected: float | None, seconds: float = 10, **labels: str) -> None:
        """Wait until a sample has a value (None: until it is not there)."""
        seen: list[float | None] = []

        def holds() -> bool:
            seen[:] = [self.value(name, **labels)]
            return (
                seen[0] is None
                if expected is None
                else seen[0] is not None and abs(seen[0] - expected) < 1e-6
            )

        try:
            self.wait(holds, seconds, f"{name}{labels} = {expected}")
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen: {seen}") from None

    def rewrite(self, scenario: Scenario) -> None:
        """Let the fake driver play another scenario from now on."""
        scenario.write(self.scenario_file)

    def stop(self, timeout: float = 5.0) -> bool:
        """Stop the part; False if a thread is stuck."""
        self._stopped = True
        return self.part.stop(timeout)


FAST = {
    "interval": Seconds(0.1),
    "slow_interval": Seconds(0.2),
    "retry_interval": Seconds(0.2),
    "hang_timeout": Seconds(0.6),
}
"""Intervals that let a test see several samples within a second."""


@contextmanager
def running_node(
    tmp_path: Path,
    scenario: Scenario,
    *,
    proc: FakeProc | None = None,
    kubernetes: KubernetesConfig | None = None,
    old_driver: bool = False,
    library: str | None = None,
    **gpu: Any,
) -> Iterator[Node]:
    """Run the GPU part on a scenario."""
    scenario_file = scenario.write(tmp_path / "scenario.txt")
    os.environ["FAKE_NVML_SCENARIO"] = str(scenario_file)
    proc = proc or FakeProc(tmp_path / "proc")
    config = Config(
        gpu=msgspec.structs.replace(
            GpuConfig(),
            nvml_library=str(build(old=old_driver)) if library is None else library,
            **{**FAST, **gpu},
        ),
        kubernetes=kubernetes
        or KubernetesConfig(
            pod_resources_socket=str(tmp_path / "no.sock"),
            container_logs=str(tmp_path / "containers"),
            pod_logs=str(tmp_path / "pods"),
        ),
        proc=str(proc.root),
    )
    store = Store(catalog.owned_by(Owner.AGENT))
    node = Node(GpuPart(config, store, Workloads(config)), store, scenario_file, proc)
    node.part.start()
    try:
        yield node
    finally:
        clean = node._stopped or node.stop()
        # Whatever hangs has to come back before the next test loads the same library.
        Scenario().write(scenario_file)
        node.part._supervisor.join(10)
        del os.environ["FAKE_NVML_SCENARIO"]
    assert clean, "a thread of the GPU part did not end"
