"""A real vLLM whose agent is started again around a request: one complete trace, never two, never half.

The engine's core stands still while agents change, so that what is to be told later is not told before.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from gpuglass.demo.scenario import Scenario
from gpuglass.families import engine as families
from tests.otel_bridge.conftest import Traced
from tests.otel_bridge.test_end_to_end import (
    PHASES,
    WAIT,
    ask,
    check_tree,
    config,
    fetch,
    named,
    roots,
    wait_for_engine,
)
from tests.support.agent import RunningAgent, running_agent
from tests.support.jaeger import JaegerSpan
from tests.support.load import Reply

pytestmark = [pytest.mark.needs("vllm", "jaeger", "cc"), pytest.mark.timeout(600)]

numbers = count(70)
"""Of requests and their traces: no two are equal, however often the tests run on one server."""
PROMPT, OUTPUT = 40, 400


@dataclass
class Asking:
    """A request that the API server has and the engine's core, which stands still, has not begun."""

    traced: Traced
    number: int = field(default_factory=lambda: next(numbers))
    replies: list[Reply] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.core,) = self.traced.server.pids("core")
        os.kill(self.core, signal.SIGSTOP)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.replies.append(ask(self.traced, self.number, PROMPT, OUTPUT, timeout=5 * WAIT))

    def go_on(self) -> None:
        """Let the engine run."""
        os.kill(self.core, signal.SIGCONT)

    def finish(self) -> None:
        """Wait for the answer."""
        self.thread.join(5 * WAIT)
        (reply,) = self.replies
        assert reply.ok and reply.output_tokens == OUTPUT, reply


@contextmanager
def asking(traced: Traced) -> Iterator[Asking]:
    """A request on its way."""
    request = Asking(traced)
    try:
        yield request
    finally:
        request.go_on()
        request.thread.join(5 * WAIT)


@contextmanager
def next_agent(traced: Traced, folder: Path) -> Iterator[RunningAgent]:
    folder.mkdir()
    with running_agent(folder, Scenario().gpus(1), config(traced)) as agent:
        yield agent


def exported(agent: RunningAgent) -> float:
    return agent.value("gpuglass_traces_exported_total") or 0.0


def check_one(agent: RunningAgent) -> None:
    """The agent exports one trace, and counts one request."""

    def observed() -> float:
        return sum(sample.value for sample in agent.samples("gpuglass_request_duration_seconds_count"))

    agent.wait(lambda: exported(agent) and observed(), "a request", WAIT)
    assert (exported(agent), observed()) == (1, 1)


def check_whole(spans: list[JaegerSpan]) -> None:
    """All phases, and what only one of frontend, core and worker knows."""
    root = check_tree(spans)
    assert len(roots(spans)) == 1
    told = root.attributes
    assert told["gpuglass.kept_by"] == "caller" and told["gen_ai.request.max_tokens"] == OUTPUT
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (PROMPT, OUTPUT)
    assert told["gpuglass.gpu.seconds"] > 0 and named(spans, "engine.step")
    queue, prefill, decode = (named(spans, name)[0] for name in PHASES)
    assert root.begin_ns <= queue.begin_ns and decode.end_ns <= root.end_ns
    assert (queue.end_ns, prefill.end_ns) == (prefill.begin_ns, decode.begin_ns)


def test_a_request_that_began_under_one_agent_and_ends_under_the_next(traced: Traced, tmp_path: Path) -> None:
    with next_agent(traced, tmp_path / "one") as agent:
        wait_for_engine(agent)
        with asking(traced) as request:
            agent.wait(lambda: agent.value("gpuglass_traces_open_requests"), "the request", WAIT)
            assert agent.stop()[0] == 0
            with next_agent(traced, tmp_path / "two") as after:
                after.wait(
                    lambda: after.value("gpuglass_receiver_senders", role="frontend"), "a frontend", WAIT
                )
                request.go_on()
                wait_for_engine(after)
                request.finish()
                spans = fetch(traced, request.number)
                check_one(after)
    check_whole(spans)


def test_a_request_that_ends_while_no_agent_listens(traced: Traced, tmp_path: Path) -> None:
    with next_agent(traced, tmp_path / "one") as agent:
        wait_for_engine(agent)
        with asking(traced) as request:
            agent.wait(lambda: agent.value("gpuglass_traces_open_requests"), "the request", WAIT)
            assert agent.stop()[0] == 0
            request.go_on()
            request.finish()
    with next_agent(traced, tmp_path / "two") as after:
        spans = fetch(traced, request.number)
        check_one(after)
    check_whole(spans)


def test_a_request_that_ended_under_one_agent_is_no_news_to_the_next(traced: Traced, tmp_path: Path) -> None:
    first, second = next(numbers), next(numbers)
    with next_agent(traced, tmp_path / "one") as agent:
        wait_for_engine(agent)
        assert ask(traced, first, 600, 40).ok
        check_one(agent)
    with next_agent(traced, tmp_path / "two") as after:
        wait_for_engine(after)
        assert ask(traced, second, 600, 40).ok
        fetch(traced, second)
        # Whatever it was told of the first one would have been settled by now, or is still followed.
        after.wait(lambda: after.value(families.TRACKED.name) == 0, "all is told", WAIT)
        check_one(after)
    assert len(roots(fetch(traced, first))) == 1
