"""What engines do besides generating token by token: LoRA adapters, tokens guessed ahead, pooling models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuglass_vllm import records
from tests.exporters.engine_probe.conftest import SITE
from tests.support.ahead import Prepared, prepared, short_folder
from tests.support.load import tokens
from tests.support.probe_receiver import ProbeReceiver, running_receiver
from tests.support.vllm import run_offline
from tests.support.vllm_models import make_model

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]

OFFLINE = Path(__file__).with_name("offline_variants.py")
OUTPUT = 40
PROMPTS = [tokens(20 + n, n) * 3 for n in range(8)]
"""They repeat themselves: n-grams foretell some tokens."""
PROMPT_TOKENS = sum(map(len, PROMPTS))


@dataclass(frozen=True, slots=True)
class Run:
    """The size of each request's output, and what was heard."""

    sizes: list[int]
    heard: ProbeReceiver


def _prepared(kind: str) -> Prepared[Run]:
    def make(stack: ExitStack) -> Run:
        folder = short_folder(stack)
        socket = folder / "agent.sock"
        model = make_model("tiny-qwen3", folder / "model")
        request = {"model": str(model), "kind": kind, "prompts": PROMPTS, "max_tokens": OUTPUT}
        one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with running_receiver(socket) as heard:
            sizes = run_offline(
                OFFLINE, request, folder=folder, site=SITE.get(), socket=socket, env=one_process
            )
        return Run(sizes, heard)

    return prepared(kind, make)


ADAPTERS, POOLING = _prepared("adapters"), _prepared("pooling")


@pytest.fixture(scope="module")
def adapters() -> Iterator[Run]:
    yield ADAPTERS.get()
    ADAPTERS.close()


@pytest.fixture(scope="module")
def pooling() -> Iterator[Run]:
    yield POOLING.get()
    POOLING.close()


def _see_no_fault(heard: ProbeReceiver) -> None:
    assert not heard.faults
    assert not any(state.hook_errors for state in heard.of(records.ProbeState))


def _see_time_add_up(heard: ProbeReceiver) -> tuple[int, int]:
    """Prefill and decode tokens of all steps."""
    steps = heard.of(records.StepSums)
    assert heard.tenant()["gpu_ns"] == pytest.approx(sum(step.attributed_ns for step in steps))
    assert sum(step.unattributed_ns for step in steps) == 0
    return sum(step.prefill_tokens for step in steps), sum(step.decode_tokens for step in steps)


def test_adapters_and_tokens_guessed_ahead(adapters: Run) -> None:
    sizes, heard = adapters.sizes, adapters.heard
    _see_no_fault(heard)
    assert sizes == [OUTPUT] * len(PROMPTS)
    assert [e.output_tokens for e in heard.of(records.RequestEnd)] == sizes
    total = heard.tenant()
    assert (total["prompt_tokens"], total["output_tokens"]) == (PROMPT_TOKENS, OUTPUT * len(PROMPTS))
    assert total["recomputed_tokens"] == 0, "a guess that was wrong is no recomputation"
    prefill, decode = _see_time_add_up(heard)
    assert prefill == PROMPT_TOKENS
    assert decode > (OUTPUT - 1) * len(PROMPTS), "void: no token was guessed"


def test_a_pooling_model(pooling: Run) -> None:
    sizes, heard = pooling.sizes, pooling.heard
    _see_no_fault(heard)
    assert sizes == [128] * len(PROMPTS)
    ends = heard.of(records.RequestEnd)
    assert [(e.outcome, e.output_tokens) for e in ends] == [("stop", 0)] * len(PROMPTS)
    assert heard.tenant()["prompt_tokens"] == PROMPT_TOKENS
    assert _see_time_add_up(heard) == (PROMPT_TOKENS, 0)
