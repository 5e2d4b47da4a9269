"""The probe in a real vLLM server: what it tells of requests, tenants, KV blocks, preemptions, sums."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gpuglass_vllm import records
from tests.exporters.engine_probe.conftest import PAIR_BLOCK, Probed
from tests.support import vllm_environment
from tests.support.load import (
    Reply,
    complete,
    complete_all,
    running_load,
    tokens,
    trace_id,
    traceparent,
)
from tests.support.probe_receiver import ProbeReceiver, running_receiver
from tests.support.vllm import BLOCK_TOKENS, KV_BLOCKS
from tests.support.vllm_models import deepseek_parameters

pytestmark = [pytest.mark.needs("vllm"), pytest.mark.timeout(600)]

POOL = KV_BLOCKS - 1
"""vLLM keeps one block as null block."""
LAYERS, TOP_K = 2, 2
"""Expert layers of the model, and experts per token."""


def _end(receiver: ProbeReceiver, external_id: str) -> records.RequestEnd:
    (end,) = receiver.wait(lambda: receiver.ended(external_id), f"the end of {external_id}")
    assert isinstance(end, records.RequestEnd)
    return end


def _start(receiver: ProbeReceiver, external_id: str) -> records.RequestStart:
    (start,) = receiver.wait(lambda: receiver.starts(external_id), f"the start of {external_id}")
    assert isinstance(start, records.RequestStart)
    return start


def _answer(receiver: ProbeReceiver, request_id: str) -> records.RequestAnswered:
    def find() -> list[records.RequestAnswered]:
        return [a for a in receiver.of(records.RequestAnswered) if a.request_id == request_id]

    (answer,) = receiver.wait(find, "the answer")
    assert isinstance(answer, records.RequestAnswered)
    return answer


def _blocks(number_of_tokens: int) -> int:
    return -(-number_of_tokens // BLOCK_TOKENS)


def test_each_process_says_who_it_is_and_what_it_can_see(
    probed: Probed, receiver: ProbeReceiver, deepseek: Path
) -> None:
    said = {hello.role: (pid, hello) for pid, hello in receiver.hellos}
    assert {role: [pid] for role, (pid, _) in said.items()} == {
        role: probed.server.pids(role) for role in ("frontend", "core", "worker")
    }
    hellos = {role: hello for role, (_, hello) in said.items()}
    assert len({hello.instance for hello in hellos.values()}) == 1
    assert {hello.model_name for hello in hellos.values()} == {"tiny"}
    assert {hello.engine_version for hello in hellos.values()} == {vllm_environment.version()}
    pool = hellos["core"].pool
    assert pool is not None and (pool.blocks, pool.block_tokens) == (POOL, BLOCK_TOKENS)
    # Multi-head latent attention keeps 512 + 64 numbers of two bytes per token and layer.
    assert pool.block_bytes == BLOCK_TOKENS * (512 + 64) * 2 * 3
    experts = hellos["worker"].experts
    assert experts is not None and (experts.layers, experts.experts, experts.top_k) == ([1, 2], 8, TOP_K)
    states = {c.hook: c.state for hello in hellos.values() for c in hello.capabilities}
    blind = {hook for hook, state in states.items() if state != "active"}
    # A CPU engine has no CUDA allocator, no graphs and no device with a clock, and vLLM switches prefix
    # caching off for this model on a CPU. Nobody asked for kernels.
    on_cuda_only = {"worker.allocator", "worker.memory_graphs", "worker.memory_activations"}
    assert blind == {*on_cuda_only, "worker.anchors", "worker.kernels", "core.evictions"}
    assert states["worker.kernels"] == "disabled"
    assert len(states) >= 15
    memory = receiver.wait(lambda: receiver.of(records.MemoryState), "what the worker's memory is for")[-1]
    config = json.loads((deepseek / "config.json").read_text())
    assert memory.weights == pytest.approx(deepseek_parameters(config) * 2, rel=0.01)
    assert memory.kv_cache == KV_BLOCKS * pool.block_bytes
    assert (memory.graphs, memory.graph_tensors, memory.activation_peak) == (-1, -1, -1), "unknown, not 0"
    assert memory.asleep == []


def test_a_request_is_told_from_start_to_end(probed: Probed, receiver: ProbeReceiver) -> None:
    began = time.monotonic_ns()
    reply = complete(
        probed.address,
        tokens(40, 1),
        24,
        headers={"traceparent": traceparent(1), "X-Request-Id": "plain", "x-tenant": "red"},
    )
    took = time.monotonic_ns() - began
    assert (reply.status, reply.output_tokens) == (200, 24)
    end = _end(receiver, "plain")
    start = _start(receiver, "plain")
    assert (start.tenant, start.trace_id, start.span_id, start.sampled) == (
        *("red", trace_id(1), f"{2:016x}", True),
    )
    assert (start.prompt_tokens, start.max_tokens) == (40, 24)
    assert (end.outcome, end.error_type, end.tenant) == ("length", "", "red")
    assert (end.prompt_tokens, end.output_tokens, end.cached_tokens, end.preemptions) == (40, 24, 0, 0)
    # The last token is never computed on: 40 + 24 - 1 tokens were stored.
    assert end.peak_blocks == _blocks(40 + 24 - 1)
    answer = _answer(receiver, start.request_id)
    assert (answer.outcome, answer.error_type) == ("length", "")
    assert 0 < answer.first_token_ns < answer.duration_ns <= took
    assert end.queue_ns + end.prefill_ns + end.decode_ns == pytest.approx(end.at - end.arrival_ns, abs=2e6)
    assert end.at - end.arrival_ns < took
    receiver.settle()
    total = receiver.tenant("red")
    assert total["requests"] == {"length": 1}
    assert (total["prompt_tokens"], total["output_tokens"]) == (40, 24)
    assert 0 < total["gpu_ns"] < took
    # Between the fewest and the most blocks that it held, for as long as it ran.
    assert 3 * end.decode_ns <= total["kv_block_ns"] <= 4 * (end.prefill_ns + end.decode_ns)


def test_gpu_time_and_experts_add_up(probed: Probed, receiver: ProbeReceiver) -> None:
    requests = [
        {"prompt": tokens(30 + n, 2 + n), "max_tokens": 10 + n, "headers": {"x-tenant": f"t{n % 3}"}}
        for n in range(12)
    ]
    assert all(reply.ok for reply in complete_all(probed.address, requests))
    receiver.settle(quiet=4)  # experts are read each few seconds
    steps = receiver.of(records.StepSums)
    attributed = sum(step.attributed_ns for step in steps)
    assert sum(receiver.tenant(f"t{n}")["gpu_ns"] for n in range(3)) == pytest.approx(attributed)
    last: dict[str, float] = {}
    for progress in receiver.of(records.GpuProgress):
        last.update(zip(progress.request_ids, progress.gpu_ns, strict=True))
    assert len(last) == 12
    assert sum(last.values()) == pytest.approx(attributed)
    assert {step.clock for step in steps} == {"wall"}
    # A request's last token is sampled and never computed on.
    computed = sum(30 + n + 10 + n - 1 for n in range(12))
    assert sum(step.prefill_tokens + step.decode_tokens for step in steps) == computed
    assert sum(sum(step.seconds) for step in steps) == sum(step.steps for step in steps)
    counted = receiver.of(records.ExpertSums)
    choices = [
        int.from_bytes(c.counts[i : i + 4], "little") for c in counted for i in range(0, len(c.counts), 4)
    ]
    assert sum(c.counted_tokens for c in counted) == sum(c.seen_tokens for c in counted) == computed
    assert sum(choices) == computed * TOP_K * LAYERS


def test_a_stream_is_told_as_it_runs(probed: Probed, receiver: ProbeReceiver) -> None:
    seen: list[Any] = []
    done = threading.Event()

    def ask() -> None:
        headers = {"X-Request-Id": "stream", "x-tenant": "red"}
        seen.append(complete(probed.address, tokens(32, 3), 120, stream=True, headers=headers))
        done.set()

    thread = threading.Thread(target=ask)
    thread.start()
    start = _start(receiver, "stream")

    def progress() -> list[records.RequestProgress]:
        return [p for p in receiver.of(records.RequestProgress) if p.request_id == start.request_id]

    receiver.wait(lambda: any(p.running and 0 < p.output_tokens < 120 for p in progress()), "progress")
    assert not done.is_set()
    thread.join()
    assert (seen[0].chunks, seen[0].output_tokens) == (120, 120)
    grown = [(p.output_tokens, p.blocks) for p in progress()]
    assert grown == sorted(grown)
    assert _end(receiver, "stream").output_tokens == 120


def test_a_client_that_hangs_up_is_an_abort(probed: Probed, receiver: ProbeReceiver) -> None:
    before = probed.server.value("vllm:request_success_total", finished_reason="abort")
    headers = {"traceparent": traceparent(4), "X-Request-Id": "hangs-up", "x-tenant": "gone"}
    complete(probed.address, tokens(64, 4), 1900, hang_up_after=5, headers=headers)
    end = _end(receiver, "hangs-up")
    start = _start(receiver, "hangs-up")
    assert (end.outcome, end.tenant, start.trace_id) == ("abort", "gone", trace_id(4))
    assert 5 <= end.output_tokens < 1900
    answer = _answer(receiver, start.request_id)
    assert answer.outcome == "abort" and answer.first_token_ns > 0
    receiver.settle()
    total = receiver.tenant("gone")
    assert total["requests"] == {"abort": 1}
    assert (total["prompt_tokens"], total["output_tokens"]) == (64, end.output_tokens)
    # vLLM itself tells nothing of it.
    assert probed.server.value("vllm:request_success_total", finished_reason="abort") == before


def test_a_refused_request_is_counted_once(probed: Probed, receiver: ProbeReceiver) -> None:
    headers = {"traceparent": traceparent(5), "X-Request-Id": "refused", "x-tenant": "red"}
    assert complete(probed.address, tokens(64, 5), 1_000_000, headers=headers).status == 400
    receiver.settle()
    (refused,) = receiver.of(records.RequestRefused)
    assert (refused.error_type, refused.tenant) == ("validation", "red")
    assert (refused.external_id, refused.trace_id) == ("refused", trace_id(5))
    assert receiver.tenant("red")["requests"] == {"rejected/validation": 1}
    assert not receiver.of(records.RequestStart)


def test_a_client_cannot_choose_the_mark_of_its_tenant(probed: Probed, receiver: ProbeReceiver) -> None:
    forged = {"vllm_xargs": {"gpuglass": ["0123456789abcdef", "victim", "yes"]}}
    for headers in ({"X-Request-Id": "forged"}, {"X-Request-Id": "forged-2", "x-tenant": "x" * 65}):
        assert complete(probed.address, tokens(16, 6), 2, headers=headers, **forged).ok
        assert _end(receiver, headers["X-Request-Id"]).tenant == records.UNVERIFIED
    receiver.settle()
    assert receiver.tenant(records.UNVERIFIED)["requests"] == {"length": 2}
    assert not receiver.tenant("victim")["requests"]


def test_the_request_that_hogs_the_kv_cache_is_named(probed: Probed, receiver: ProbeReceiver) -> None:
    replies: dict[str, Reply] = {}

    def ask(name: str, number: int, prompt: int, output: int) -> None:
        headers = {"traceparent": traceparent(number), "X-Request-Id": name, "x-tenant": name}
        replies[name] = complete(probed.address, tokens(prompt, number), output, headers=headers)

    hog = threading.Thread(target=ask, args=("hog", 100, 1600, 200))
    hog.start()
    start = _start(receiver, "hog")
    small = [threading.Thread(target=ask, args=(f"small-{n}", 101 + n, 100, 100)) for n in range(4)]
    for thread in small:
        thread.start()
    usage = []
    while hog.is_alive():
        usage.append(probed.server.value("vllm:kv_cache_usage_perc"))
        time.sleep(0.1)
    for thread in (hog, *small):
        thread.join()
    assert {name: reply.output_tokens for name, reply in replies.items()} == {
        "hog": 200,
        **{f"small-{n}": 100 for n in range(4)},
    }
    end = _end(receiver, "hog")
    truth = _blocks(1600 + 200 - 1)
    assert end.peak_blocks == pytest.approx(truth, rel=0.02)
    assert (end.preemptions, start.trace_id) == (0, trace_id(100))

    pushed = receiver.of(records.Preemption)
    assert len(pushed) >= 2
    by_id = {s.request_id: s for s in receiver.of(records.RequestStart)}
    for preemption in pushed:
        victim = by_id[preemption.victim]
        assert preemption.cause == "kv_full"
        assert victim.external_id.startswith("small-")
        assert victim.trace_id == trace_id(101 + int(victim.external_id[-1]))
        assert preemption.holders[0] == start.request_id
        assert preemption.holder_blocks[0] >= _blocks(1600)
        assert preemption.holder_blocks == sorted(preemption.holder_blocks, reverse=True)
        # The pool was full, and shares never add up to more than it.
        assert sum(preemption.holder_blocks) <= POOL
    ends = [_end(receiver, f"small-{n}") for n in range(4)]
    assert sum(e.preemptions for e in ends) == len(pushed)
    receiver.settle()
    assert sum(sums.preemptions.get("kv_full", 0) for sums in receiver.of(records.CoreSums)) == len(pushed)
    # While it ran: the share told at any time is what the arithmetic says of its tokens at that time.
    running = [
        p for p in receiver.of(records.RequestProgress) if p.request_id == start.request_id and p.running
    ]
    assert len(running) >= 2
    for progress in running:
        # A block for the next token may already be there.
        assert _blocks(progress.computed_tokens) <= progress.blocks <= _blocks(progress.computed_tokens) + 1
        assert progress.blocks <= truth
    # vLLM's own gauge saw the pool that full.
    fullest = max(state.used_blocks for state in receiver.of(records.PoolState))
    assert fullest / POOL >= max(usage) - 0.02
    assert max(usage) >= truth / POOL - 0.02


def test_two_api_servers_tell_of_their_own_requests(pair: Probed, pair_receiver: ProbeReceiver) -> None:
    hellos = list(pair_receiver.senders().values())
    assert sorted(hello.role for hello in hellos) == ["core", "frontend", "frontend", "worker"]
    assert len({hello.instance for hello in hellos}) == 1
    requests = [
        {
            "prompt": tokens(40 + n, 50 + n),
            "max_tokens": 5 + n % 7,
            "headers": {"traceparent": traceparent(n), "X-Request-Id": f"pair-{n}.", "x-tenant": f"t{n % 2}"},
        }
        for n in range(24)
    ]
    replies = complete_all(pair.address, requests, at_once=8)
    assert all(reply.ok for reply in replies)
    pair_receiver.settle()
    told = {h.pid for h in pair_receiver.heard if isinstance(h.record, records.RequestStart)}
    assert told == set(pair.server.pids("frontend")) & told and len(told) == 2
    for n in range(24):
        assert _start(pair_receiver, f"pair-{n}.").trace_id == trace_id(n)
        assert _end(pair_receiver, f"pair-{n}.").tenant == f"t{n % 2}"
    for tenant in range(2):
        total = pair_receiver.tenant(f"t{tenant}")
        mine = replies[tenant::2]
        assert total["requests"] == {"length": 12}
        assert total["prompt_tokens"] == sum(reply.prompt_tokens for reply in mine)
        assert total["output_tokens"] == sum(reply.output_tokens for reply in mine)


def _send_pair(pair: Probed, prompts: Sequence[list[int]], output: int) -> None:
    """Both at once, and waits for both."""
    threads = [
        threading.Thread(
            target=complete,
            args=(pair.address, prompt, output),
            kwargs={"headers": {"X-Request-Id": f"shares-{n}"}},
        )
        for n, prompt in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _moments_of_both(receiver: ProbeReceiver) -> list[tuple[records.RequestProgress, ...]]:
    """What was told of two requests at one moment: looked at in the same round."""
    moments: dict[int, dict[str, records.RequestProgress]] = {}
    for progress in receiver.of(records.RequestProgress):
        moments.setdefault(progress.at, {})[progress.request_id] = progress
    return [tuple(moment.values()) for moment in moments.values() if len(moment) == 2]


def test_a_shared_prefix_counts_once(pair: Probed, pair_receiver: ProbeReceiver) -> None:
    shared, own, output = 800, 40, 240
    prefix = tokens(shared, 7)
    assert complete(pair.address, prefix, 1).ok  # leaves the prefix in the cache
    pair_receiver.settle()
    # How many rounds see both depends on how fast the machine is and on how close together both begin.
    for attempt in range(10):
        pair_receiver.forget()
        _send_pair(pair, [[*prefix, *tokens(own, 60 + 2 * attempt + n)] for n in range(2)], output)
        pair_receiver.settle()
        together = _moments_of_both(pair_receiver)
        if len(together) >= 3:
            break
    assert together
    ends = [_end(pair_receiver, f"shares-{n}") for n in range(2)]
    assert [end.cached_tokens for end in ends] == [shared, shared]
    alone = -(-(own + output - 1) // PAIR_BLOCK)
    both = shared // PAIR_BLOCK
    for first, second in together:
        # Each holds half of the prefix; a block for the next token may already be there.
        assert first.blocks % 1 == second.blocks % 1 == both / 2 % 1
        owned = sum(-(-(p.computed_tokens - shared) // PAIR_BLOCK) for p in (first, second))
        assert both + owned <= first.blocks + second.blocks <= both + owned + 2
    most = max(first.blocks + second.blocks for first, second in together)
    fullest = max(state.used_blocks for state in pair_receiver.of(records.PoolState))
    assert most <= fullest <= both + 2 * alone
    for end in ends:
        # One of the two runs a step before the other, and alone it holds all of the prefix.
        assert both / 2 + alone <= end.peak_blocks <= both + alone
        # It holds half of the prefix to all of it, and grows from 2 blocks of its own to `alone`.
        took = end.prefill_ns + end.decode_ns
        assert both / 2 + 2 <= end.kv_block_ns / took <= both + alone
    # Most of the time both ran, so that together they held the prefix little more than once.
    held = sum(end.kv_block_ns for end in ends)
    span = max(end.at for end in ends) - min(end.at - end.prefill_ns - end.decode_ns for end in ends)
    assert held / span <= both + 2 * alone


def test_evictions_tell_how_long_a_cached_block_was_not_held(
    pair: Probed, pair_receiver: ProbeReceiver
) -> None:
    for n in range(4):  # more blocks than the pool has
        assert complete(pair.address, tokens(900, 70 + n), 1).ok
    pair_receiver.settle()
    sums = pair_receiver.of(records.CoreSums)
    evicted = sum(sum(part.evictions) for part in sums)
    assert evicted >= 4 * 28 - 79
    assert sum(part.eviction_seconds for part in sums) > 0


def test_a_missing_receiver_costs_nothing_but_freshness(probed: Probed) -> None:
    """Away from the start, gone in the middle, silent, back: each sum is taken in exactly once."""
    streams = {
        tenant: lambda n, tenant=tenant, seed=seed: {
            "prompt": tokens(20 + n % 30, seed + n % 7),
            "max_tokens": 3 + n % 5,
            "headers": {"x-tenant": tenant},
        }
        for seed, tenant in enumerate(("red", "green", "blue"), 20)
    }
    heard = ProbeReceiver()
    with running_receiver(probed.socket, into=heard):
        heard.wait(lambda: {h.role for _, h in heard.hellos} >= {"frontend", "core", "worker"}, "roles")
        heard.settle()
        heard.forget()
    with running_load(probed.address, streams) as load:
        time.sleep(2)  # nobody there
        with running_receiver(probed.socket, into=heard, acknowledges=False):
            heard.wait(lambda: heard.of(records.TenantSums, "core"), "sums", 20)
            time.sleep(1)
        time.sleep(0.5)  # gone without an acknowledgement: sums come again
        with running_receiver(probed.socket, into=heard):
            hellos = len(heard.hellos)
            heard.wait(lambda: len(heard.hellos) >= hellos + 3, "all roles again", 20)
            time.sleep(1)
        time.sleep(1)
        with running_receiver(probed.socket, into=heard):
            hellos = len(heard.hellos)
            heard.wait(lambda: len(heard.hellos) >= hellos + 3, "all roles again", 20)
            load.stop()
            heard.settle()
    assert not load.failed() and not heard.faults
    for tenant in streams:
        requests, prompt, output = load.usage(tenant)
        total = heard.tenant(tenant)
        assert requests >= 20
        assert total["requests"] == {"length": requests}
        assert (total["prompt_tokens"], total["output_tokens"]) == (prompt, output)
    steps = heard.of(records.StepSums)
    attributed = sum(step.attributed_ns for step in steps)
    assert sum(heard.tenant(t)["gpu_ns"] for t in streams) == pytest.approx(attributed)
