"""vLLM computes the same tokens with the probe as without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpuglass_vllm import records
from tests.exporters.engine_probe.conftest import DEEPSEEK, SITE
from tests.support.ahead import prepared, short_folder
from tests.support.load import tokens
from tests.support.probe_receiver import ProbeReceiver, running_receiver
from tests.support.vllm import run_offline

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]

OFFLINE = Path(__file__).with_name("offline_generate.py")


REQUEST = {
    # Some are preempted: 16 × (100 to 250) tokens do not fit into the pool.
    "prompts": [tokens(60 + 10 * n, n) for n in range(16)],
    "max_tokens": [40 + n for n in range(16)],
}


@dataclass(frozen=True, slots=True)
class Runs:
    """What four runs of the same requests gave, and what was heard of the third."""

    first: list[list[int]]
    second: list[list[int]]
    probed: list[list[int]]
    broken: list[list[int]]
    """Every hook of its probe raises."""
    log_of_broken: str
    heard: ProbeReceiver


def _run_all(stack: ExitStack) -> Runs:
    """Offline, one process, greedy, all requests queued before the first step: then vLLM is deterministic."""
    folder = short_folder(stack)
    socket = folder / "agent.sock"
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    request = REQUEST | {"model": str(DEEPSEEK.get())}

    def run(name: str, site: Path | None = None, **fault: str) -> Any:
        more = {"site": site, "socket": socket} if site else {}
        return run_offline(OFFLINE, request, folder=folder / name, env=one_process | fault, **more)

    first, second = run("first"), run("second")
    with running_receiver(socket) as heard:
        probed = run("probed", SITE.get())
    with running_receiver(socket):
        broken = run("broken", SITE.get(), GPUGLASS_FAULT="all")
    return Runs(first, second, probed, broken, (folder / "broken/offline.log").read_text(), heard)


RUNS = prepared("runs", _run_all)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    yield RUNS.get()
    RUNS.close()


def test_tokens_are_bit_identical_with_and_without_the_probe(runs: Runs) -> None:
    assert runs.first == runs.second, "void: vLLM itself is not deterministic here"
    assert [len(ids) for ids in runs.first] == REQUEST["max_tokens"]
    assert len({tuple(ids) for ids in runs.first}) > 8, "void: all requests give the same tokens"
    assert runs.broken == runs.first
    assert "failed and may switch itself off: InjectedFault" in runs.log_of_broken
    assert runs.probed == runs.first
    heard = runs.heard
    assert not heard.faults
    assert {hello.role for hello in heard.senders().values()} == {"frontend", "core", "worker"}
    assert len({pid for pid, _ in heard.hellos}) == 1  # one process, three connections
    ends = heard.of(records.RequestEnd)
    assert sorted(end.output_tokens for end in ends) == REQUEST["max_tokens"]
    assert heard.of(records.Preemption)
    assert heard.tenant()["output_tokens"] == sum(map(len, runs.first))
    assert heard.tenant()["gpu_ns"] > 0
