"""What remains true of a real vLLM server when one of its processes is killed; and tensor parallelism."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gpuglass_vllm import records
from tests.exporters.engine_probe.conftest import Probed
from tests.support.load import Reply, complete, complete_all, tokens
from tests.support.probe_receiver import ProbeReceiver
from tests.support.vllm import RunningVllm

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]

LONG = 1200
"""Output tokens of a request that does not end by itself in these tests."""


@contextmanager
def _long_requests(address: str, receiver: ProbeReceiver, number: int) -> Iterator[list[Reply]]:
    """That many streams of tenant `red` run when the block begins; after it their replies are in the list."""
    replies: list[Reply] = []

    def ask(n: int) -> None:
        replies.append(complete(address, tokens(30, 80 + n), LONG, stream=True, headers={"x-tenant": "red"}))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()

    def under_way() -> bool:
        far = {p.request_id for p in receiver.of(records.RequestProgress) if p.output_tokens > 5}
        return len(far) == number

    receiver.wait(under_way, "requests under way")
    yield replies
    for thread in threads:
        thread.join()


def _see_what_is_left(receiver: ProbeReceiver, replies: list[Reply], number: int) -> None:
    """No reply hangs or pretends to be whole, and the sums hold what was told until then, once."""
    assert len(replies) == number
    assert all(reply.output_tokens < LONG for reply in replies if not reply.ok)
    receiver.settle()
    total = receiver.tenant("red")
    assert total["prompt_tokens"] == 30 * number
    # The engine may go on after the clients have lost their connections, never beyond what they asked for.
    assert 0 < total["output_tokens"] <= LONG * number
    attributed = sum(step.attributed_ns for step in receiver.of(records.StepSums))
    assert total["gpu_ns"] == pytest.approx(attributed)


def test_kill_9_of_the_engine_core(probed: Probed, receiver: ProbeReceiver) -> None:
    with _long_requests(probed.address, receiver, 3) as replies:
        (core,) = probed.server.pids("core")
        probed.server.kill(core)
    _see_what_is_left(receiver, replies, 3)
    assert not any(reply.ok for reply in replies)
    answers = receiver.of(records.RequestAnswered)
    assert [(a.outcome, a.error_type) for a in answers] == [("error", "engine")] * 3
    assert receiver.tenant("red")["requests"] == {"error/engine": 3}
    probed.server.wait(lambda: not probed.server.alive, "the end of the server")


def test_tensor_parallel_ranks_and_kill_9_of_a_worker(ranks: Probed, ranks_receiver: ProbeReceiver) -> None:
    _check_ranks(ranks.server, ranks_receiver)
    ranks_receiver.forget()
    with _long_requests(ranks.address, ranks_receiver, 2) as replies:
        ranks.server.kill(ranks.server.pids("worker")[1])
    _see_what_is_left(ranks_receiver, replies, 2)
    assert not any(reply.ok for reply in replies)
    assert ranks_receiver.tenant("red")["requests"] == {"error/engine": 2}
    ranks.server.wait(lambda: not ranks.server.alive, "the end of the server")


def _check_ranks(server: RunningVllm, receiver: ProbeReceiver) -> None:
    workers = {hello.rank: hello for hello in receiver.senders().values() if hello.role == "worker"}
    assert sorted(workers) == [0, 1]
    pid_of = {hello.rank: pid for pid, hello in receiver.hellos if hello.role == "worker"}
    assert set(pid_of.values()) == set(server.pids("worker"))
    requests = [{"prompt": tokens(30, n), "max_tokens": 20, "headers": {"x-tenant": "red"}} for n in range(6)]
    assert all(reply.ok for reply in complete_all(server.address, requests))
    receiver.settle(quiet=4)
    total = receiver.tenant("red")
    assert (total["prompt_tokens"], total["output_tokens"]) == (180, 120)
    by_rank = {
        rank: [
            h.record
            for h in receiver.heard
            if h.sender == hello.sender and isinstance(h.record, records.StepSums)
        ]
        for rank, hello in workers.items()
    }
    computed = 6 * (30 + 20 - 1)
    for steps in by_rank.values():
        assert sum(step.prefill_tokens + step.decode_tokens for step in steps) == computed
    # The time of both ranks counts, the tokens and the experts of one.
    attributed = sum(step.attributed_ns for steps in by_rank.values() for step in steps)
    assert total["gpu_ns"] == pytest.approx(attributed)
    experts = [h for h in receiver.heard if isinstance(h.record, records.ExpertSums)]
    assert {h.pid for h in experts} == {pid_of[0]}
    assert sum(h.record.counted_tokens for h in experts) == computed
    chosen = sum(
        int.from_bytes(h.record.counts[i : i + 4], "little")
        for h in experts
        for i in range(0, len(h.record.counts), 4)
    )
    assert chosen == computed * 2 * 2


def test_kill_9_of_an_api_server(pair: Probed, pair_receiver: ProbeReceiver) -> None:
    with _long_requests(pair.address, pair_receiver, 4) as replies:
        # The first is the parent that watches the others.
        victim = pair.server.pids("frontend")[1]
        pair.server.kill(victim)
    _see_what_is_left(pair_receiver, replies, 4)
    # vLLM ends the other processes in order: the core still tells how each request ended. Where the machine
    # is slow to do so, requests may have come to their ends before, also those whose API server was killed.
    ends = pair_receiver.of(records.RequestEnd)
    assert [end.tenant for end in ends] == ["red"] * 4
    outcomes = [end.outcome for end in ends]
    assert set(outcomes) <= {"abort", "length"}
    assert outcomes.count("length") >= sum(reply.ok for reply in replies)
    pair.server.wait(lambda: not pair.server.alive, "the end of the server", 60)
