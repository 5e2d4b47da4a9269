"""A real vLLM whose agent is started again in the middle of a request: one complete trace, and not two."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gpuglass.demo.scenario import Scenario
from tests.otel_bridge.conftest import Traced
from tests.otel_bridge.test_end_to_end import (
    PHASES,
    WAIT,
    ask,
    check_tree,
    config,
    fetch,
    length,
    named,
    roots,
    wait_for_engine,
)
from tests.support.agent import running_agent

pytestmark = [pytest.mark.needs("vllm", "jaeger", "cc"), pytest.mark.timeout(400)]


def test_an_agent_that_is_started_again_completes_the_trace(traced: Traced, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    asking = threading.Thread(target=ask, args=(traced, 70, 600, 1200))
    with running_agent(tmp_path / "one", Scenario().gpus(1), config(traced)) as agent:
        wait_for_engine(agent)
        asking.start()
        agent.wait(lambda: agent.value("gpuglass_traces_open_requests"), "the request", WAIT)
    with running_agent(tmp_path / "two", Scenario().gpus(1), config(traced)) as agent:
        wait_for_engine(agent)
        asking.join(3 * WAIT)  # on a loaded machine a token takes long
        assert not asking.is_alive()
        spans = fetch(traced, 70)
        agent.wait(lambda: agent.value("gpuglass_traces_exported_total") == 1, "one trace", WAIT)
    root = check_tree(spans)
    assert len(roots(spans)) == 1 and root.attributes["gen_ai.usage.output_tokens"] == 1200
    total = sum(length(named(spans, name)[0]) for name in PHASES)
    assert total == pytest.approx(length(root), rel=0.02)
