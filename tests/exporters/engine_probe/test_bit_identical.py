"""vLLM computes the same tokens with the probe as without it. No shared server takes the cores yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuglass_vllm import records
from tests.support.load import tokens
from tests.support.probe_receiver import running_receiver
from tests.support.vllm import run_offline

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(400)]

OFFLINE = Path(__file__).with_name("offline_generate.py")


def test_tokens_are_bit_identical_with_and_without_the_probe(
    probe_site: Path, deepseek: Path, short_path: Path
) -> None:
    """Offline, one process, greedy, all requests queued before the first step: then vLLM is deterministic."""
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    request = {
        "model": str(deepseek),
        # Some are preempted: 16 × (100 to 250) tokens do not fit into the pool.
        "prompts": [tokens(60 + 10 * n, n) for n in range(16)],
        "max_tokens": [40 + n for n in range(16)],
    }

    def run(name: str, site: Path | None = None, **fault: str) -> Any:
        more = {"site": site, "socket": socket} if site else {}
        return run_offline(OFFLINE, request, folder=short_path / name, env=one_process | fault, **more)

    socket = short_path / "agent.sock"
    first, second = run("first"), run("second")
    assert first == second, "void: vLLM itself is not deterministic here"
    assert [len(ids) for ids in first] == request["max_tokens"]
    assert len({tuple(ids) for ids in first}) > 8, "void: all requests give the same tokens"
    with running_receiver(socket) as heard:
        probed = run("probed", probe_site)
        ends = heard.of(records.RequestEnd)
        broken = run("broken", probe_site, GPUGLASS_FAULT="all")
    assert broken == first
    assert (
        "failed and may switch itself off: InjectedFault" in (short_path / "broken/offline.log").read_text()
    )
    assert probed == first
    assert not heard.faults
    assert {hello.role for hello in heard.senders().values()} == {"frontend", "core", "worker"}
    assert len({pid for pid, _ in heard.hellos}) == 1  # one process, three connections
    assert sorted(end.output_tokens for end in ends) == sorted(request["max_tokens"])
    assert heard.of(records.Preemption)
    assert heard.tenant()["output_tokens"] == sum(request["max_tokens"])
    assert heard.tenant()["gpu_ns"] > 0
