"""How long the tests of each room may take in CI, on two cores.

In: the path and the duration of each test. Out: a line for each room whose tests took longer than its
budget.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

CORE = "core and GPU"
DEMO = "demo"
MACHINERY = "the tests' own machinery"
ROOMS = {
    "tests/gpuglass/test_demo.py": DEMO,
    "tests/test_support.py": MACHINERY,
    "tests/test_ahead.py": MACHINERY,
    "tests/test_vllm_rig.py": MACHINERY,
    "tests/fakes/": MACHINERY,
    "tests/exporters/vllm/": "receiver and ledger",
    "tests/exporters/engine_probe/": "vLLM",
    "tests/ebpf/": "ebpf",
    "tests/otel_bridge/": "otel_bridge",
    "tests/anomaly_sidecar/": "anomaly_sidecar",
    "tests/recording_rules/": "rules",
    "tests/alert_rules/": "rules",
    "tests/dashboards/": "dashboards",
}
"""The room of the tests in a folder or file; all others are CORE's."""

SECONDS = {
    CORE: 240,
    DEMO: 60,
    MACHINERY: 60,
    "vLLM": 720,
    "receiver and ledger": 180,
    "ebpf": 240,
    "otel_bridge": 240,
    "anomaly_sidecar": 300,
    "rules": 360,
    "dashboards": 360,
}


def room_of(path: str) -> str:
    """The room of a test's path, which is relative to the repository."""
    return next((room for folder, room in ROOMS.items() if path.startswith(folder)), CORE)


@dataclass(slots=True)
class Spent:
    """Seconds per room; `scale` stretches every budget, for a slower machine."""

    scale: float = 1.0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, path: str, seconds: float) -> None:
        """Counts one phase (setup, call or teardown) of a test."""
        self.seconds[room_of(path)] += seconds

    def exceeded(self) -> list[str]:
        """One line per room that took too long."""
        return [
            f"time budget exceeded: tests of {room} took {spent:.1f} s of {SECONDS[room] * self.scale:g} s"
            for room, spent in self.seconds.items()
            if spent > SECONDS[room] * self.scale
        ]
