"""What engines do besides generating token by token: LoRA adapters, tokens guessed ahead, pooling models."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuglass_vllm import records
from tests.support.load import tokens
from tests.support.probe_receiver import ProbeReceiver, running_receiver
from tests.support.vllm import run_offline
from tests.support.vllm_models import make_model

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(400)]

OFFLINE = Path(__file__).with_name("offline_variants.py")
OUTPUT = 40
PROMPTS = [tokens(20 + n, n) * 3 for n in range(8)]
"""They repeat themselves: n-grams foretell some tokens."""
PROMPT_TOKENS = sum(map(len, PROMPTS))


def _run(kind: str, site: Path, folder: Path) -> tuple[list[int], ProbeReceiver]:
    socket = folder / "agent.sock"
    model = make_model("tiny-qwen3", folder / "model")
    request = {"model": str(model), "kind": kind, "prompts": PROMPTS, "max_tokens": OUTPUT}
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with running_receiver(socket) as heard:
        sizes = run_offline(OFFLINE, request, folder=folder, site=site, socket=socket, env=one_process)
    assert not heard.faults
    assert not any(state.hook_errors for state in heard.of(records.ProbeState))
    return sizes, heard


def _see_time_add_up(heard: ProbeReceiver) -> tuple[int, int]:
    """Prefill and decode tokens of all steps."""
    steps = heard.of(records.StepSums)
    assert heard.tenant()["gpu_ns"] == pytest.approx(sum(step.attributed_ns for step in steps))
    assert sum(step.unattributed_ns for step in steps) == 0
    return sum(step.prefill_tokens for step in steps), sum(step.decode_tokens for step in steps)


def test_adapters_and_tokens_guessed_ahead(probe_site: Path, short_path: Path) -> None:
    sizes, heard = _run("adapters", probe_site, short_path)
    assert sizes == [OUTPUT] * len(PROMPTS)
    assert [e.output_tokens for e in heard.of(records.RequestEnd)] == sizes
    total = heard.tenant()
    assert (total["prompt_tokens"], total["output_tokens"]) == (PROMPT_TOKENS, OUTPUT * len(PROMPTS))
    assert total["recomputed_tokens"] == 0, "a guess that was wrong is no recomputation"
    prefill, decode = _see_time_add_up(heard)
    assert prefill == PROMPT_TOKENS
    assert decode > (OUTPUT - 1) * len(PROMPTS), "void: no token was guessed"


def test_a_pooling_model(probe_site: Path, short_path: Path) -> None:
    sizes, heard = _run("pooling", probe_site, short_path)
    assert sizes == [128] * len(PROMPTS)
    ends = heard.of(records.RequestEnd)
    assert [(e.outcome, e.output_tokens) for e in ends] == [("stop", 0)] * len(PROMPTS)
    assert heard.tenant()["prompt_tokens"] == PROMPT_TOKENS
    assert _see_time_add_up(heard) == (PROMPT_TOKENS, 0)
