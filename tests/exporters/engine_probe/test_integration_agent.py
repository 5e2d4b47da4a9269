"""A real vLLM server with the probe, and the real agent: what an operator sees in /metrics."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Exemplar

from gpuglass.demo.scenario import Scenario
from tests.exporters.engine_probe.conftest import SMALL, Probed
from tests.support.agent import RunningAgent, running_agent
from tests.support.ahead import prepared, short_folder
from tests.support.load import Load, Reply, complete, running_load, tokens, trace_id, traceparent
from tests.support.vllm import BLOCK_TOKENS, KV_BLOCKS

pytestmark = [pytest.mark.needs("vllm", "cc"), pytest.mark.timeout(600)]

POOL = KV_BLOCKS - 1
AWAY_SECONDS = 60
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def _config(probed: Probed) -> dict[str, Any]:
    return {"engines": {"socket": str(probed.socket)}}


@pytest.fixture
def agent(probed: Probed, tmp_path: Path) -> Iterator[RunningAgent]:
    """An agent that hears all roles of the server."""
    with running_agent(tmp_path, Scenario().gpus(1), _config(probed)) as running:
        _wait_for_engine(running)
        yield running


def _wait_for_engine(agent: RunningAgent) -> None:
    agent.wait(lambda: agent.value("gpuglass_engine_up", model_name="tiny") == 1, "engine_up", 60)
    agent.wait(lambda: agent.samples("gpuglass_engine_info"), "engine_info", 60)


def _exemplars(agent: RunningAgent, name: str) -> list[tuple[dict[str, str], Exemplar]]:
    """Labels and exemplar of all samples of that name which have one."""
    text = agent.fetch(accept=OPEN_METRICS).text
    return [
        (sample.labels, sample.exemplar)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.exemplar
    ]


def test_what_a_workers_memory_is_for_is_in_the_metrics(agent: RunningAgent) -> None:
    name = "gpuglass_engine_memory_bytes"
    agent.wait(lambda: agent.samples(name), "parts of the memory", 60)
    parts = {sample.labels["part"]: sample.value for sample in agent.samples(name)}
    assert set(parts) == {"weights", "kv_cache"}, "a CPU engine has no graphs, and no allocator to divide"
    # All ranks' blocks together, and the one that vLLM keeps for itself.
    pool, blocks = agent.value("gpuglass_kv_pool_bytes"), agent.value("gpuglass_kv_pool_blocks")
    assert pool and blocks and parts["kv_cache"] == pool * (blocks + 1) / blocks
    assert 2**20 < parts["weights"] < 2**24
    told = agent.samples("gpuglass_probe_capability")
    reasons = {sample.labels["hook"]: sample.labels.get("reason") for sample in told}
    assert reasons["worker.memory_graphs"] == "the engine runs on a CPU"


def test_the_request_that_hogs_the_kv_cache_is_named(probed: Probed, agent: RunningAgent) -> None:
    replies: dict[str, Reply] = {}

    def ask(name: str, number: int, prompt: int, output: int) -> None:
        headers = {"traceparent": traceparent(number), "X-Request-Id": name, "x-tenant": name}
        replies[name] = complete(probed.address, tokens(prompt, number), output, headers=headers)

    hog = threading.Thread(target=ask, args=("hog", 200, 1600, 200))
    hog.start()
    in_use = "vllm:kv_cache_usage_perc"
    probed.server.wait(lambda: probed.server.value(in_use) > 0.5, "the prompt in the KV cache", 60)
    small = [threading.Thread(target=ask, args=(f"small-{n}", 201 + n, 100, 100)) for n in range(4)]
    for thread in small:
        thread.start()
    truth = -(-(1600 + 200 - 1) // BLOCK_TOKENS) / POOL

    def largest() -> float:
        """Share of the largest holder, in one scrape: what is told at one moment."""
        ratios = agent.samples("gpuglass_kv_holder_ratio", path="/metrics/fast")
        assert sum(s.value for s in ratios) <= 1.0
        first = {s.labels["tenant"]: s.value for s in ratios if s.labels["holder"] == "1"}
        share = max(first.values(), default=0.0)
        assert share <= truth and (share <= 0.25 or first == {"hog": share})
        return share

    while hog.is_alive():
        largest()
        time.sleep(0.2)
    for thread in (hog, *small):
        thread.join()
    assert all(reply.ok for reply in replies.values())

    def peak() -> list[Exemplar]:
        found = _exemplars(agent, "gpuglass_kv_request_peak_ratio_bucket")
        return [exemplar for _, exemplar in found if exemplar.labels.get("trace_id") == trace_id(200)]

    (exemplar,) = agent.wait(peak, "the hog's peak", 60)
    assert exemplar.value == pytest.approx(truth, rel=0.02)
    pushed = agent.wait(lambda: _exemplars(agent, "gpuglass_request_preemptions_total"), "preemptions", 60)
    (((labels, exemplar)),) = pushed
    assert labels["cause"] == "kv_full"
    assert exemplar.labels["trace_id"] in {trace_id(201 + n) for n in range(4)}
    assert exemplar.labels["holder_trace_id"] == trace_id(200)
    # The requests that were pushed out carry their own traces, each where its duration lies.
    durations = _exemplars(agent, "gpuglass_request_duration_seconds_bucket")
    preempted = {e.labels["trace_id"] for at, e in durations if at["preempted"] == "true"}
    assert preempted and preempted <= {trace_id(201 + n) for n in range(4)}
    total = sum(
        agent.value("gpuglass_tenant_preemptions_total", tenant=f"small-{n}") or 0.0 for n in range(4)
    )
    assert total >= 2 and total == agent.value("gpuglass_request_preemptions_total", cause="kv_full")
    assert not agent.value("gpuglass_tenant_preemptions_total", tenant="hog")

    def named_while_it_runs(number: int) -> bool:
        """Whether a hog's share and its trace are told before it has ended; nothing pushes it out."""
        hog = threading.Thread(target=ask, args=("hog", number, 700, 1100))
        hog.start()
        named: set[str] = set()
        share = 0.0
        while hog.is_alive():
            share = max(share, largest())
            exemplars = _exemplars(agent, "gpuglass_kv_hog_seconds_total")
            if hog.is_alive():
                named |= {exemplar.labels["trace_id"] for _, exemplar in exemplars}
            time.sleep(0.2)
        assert replies["hog"].ok
        assert named <= {trace_id(n) for n in range(200, number + 1)}
        # It grows from the prompt's share; how far a scrape sees it come is the machine's matter.
        return trace_id(number) in named and share >= 0.99 * (700 // BLOCK_TOKENS / POOL)

    # Counters are told every five seconds; which requests live for that long is the machine's matter.
    assert any(named_while_it_runs(number) for number in range(210, 230))


def _streams(tenants: tuple[str, ...]) -> dict[str, Any]:
    def stream(tenant: str, seed: int) -> Any:
        return lambda n: {
            "prompt": tokens(20 + n % 60, seed + n % 7),
            "max_tokens": 3 + n % 20,
            "headers": {"x-tenant": tenant},
        }

    return {tenant: stream(tenant, 30 + number) for number, tenant in enumerate(tenants)}


def _totals(agent: RunningAgent, tenant: str) -> tuple[float, float, float]:
    """Requests, prompt and output tokens that the agent counts for a tenant."""
    return (
        agent.value("gpuglass_tenant_requests_total", tenant=tenant, outcome="length") or 0.0,
        agent.value("gpuglass_tenant_tokens_total", tenant=tenant, kind="prompt") or 0.0,
        agent.value("gpuglass_tenant_tokens_total", tenant=tenant, kind="output") or 0.0,
    )


def _gpu_seconds(agent: RunningAgent) -> tuple[float, float]:
    """GPU-seconds of all tenants, and those that the workers divided over requests."""
    tenants = sum(s.value for s in agent.samples("gpuglass_tenant_gpu_seconds_total"))
    parts = agent.samples("gpuglass_engine_gpu_seconds_total")
    return tenants, sum(s.value for s in parts if s.labels["part"] in ("prefill", "decode"))


@dataclass(frozen=True, slots=True)
class Totals:
    """What clients and agents count of each tenant; GPU-seconds of all tenants, and those of all requests."""

    clients_before: dict[str, tuple[float, float, float]]
    agent_before: dict[str, tuple[float, float, float]]
    clients_away: dict[str, tuple[float, float, float]]
    agent_away: dict[str, tuple[float, float, float]]
    agent_later: dict[str, tuple[float, float, float]]
    gpu_seconds: tuple[float, float]
    failed: list[Reply]
    answered: int


def _count(ending: ExitStack) -> Totals:
    """An agent hangs for a minute under load, is killed and started anew."""
    tenants = ("mercury", "venus", "mars")
    folder, kept = short_folder(ending), SMALL.get()
    first_folder, second_folder = folder / "first", folder / "second"
    for made in (first_folder, second_folder):
        made.mkdir()

    def counted(agent: RunningAgent) -> dict[str, tuple[float, float, float]]:
        return {tenant: _totals(agent, tenant) for tenant in tenants}

    def settled(agent: RunningAgent, load: Load) -> tuple[dict[str, Any], dict[str, Any]]:
        truth = {tenant: load.usage(tenant) for tenant in tenants}
        agent.wait(lambda: counted(agent) == truth, "totals of the clients", 60)
        return truth, counted(agent)

    with kept.turn:
        probed = kept.get()
        with running_agent(first_folder, Scenario().gpus(1), _config(probed)) as agent:
            _wait_for_engine(agent)
            with running_load(probed.address, _streams(tenants)) as before:
                time.sleep(5)
            clients_before, agent_before = settled(agent, before)
            # What was published is what was acknowledged once the next round is there.
            agent.wait(lambda: _gpu_seconds(agent)[0] > 0, "GPU-seconds", 60)
            agent.process.send_signal(signal.SIGSTOP)
            with running_load(probed.address, _streams(tenants)) as away:
                time.sleep(AWAY_SECONDS)
                agent.stop(signal.SIGKILL)
                with running_agent(second_folder, Scenario().gpus(1), _config(probed)) as second:
                    _wait_for_engine(second)
                    time.sleep(3)
                    away.stop()
                    clients_away, agent_away = settled(second, away)
                    gpu_seconds = _gpu_seconds(second)
                    time.sleep(6)  # another round of the slow tier changes nothing
                    agent_later = counted(second)
    failed = [*before.failed(), *away.failed()]
    return Totals(
        clients_before,
        agent_before,
        clients_away,
        agent_away,
        agent_later,
        gpu_seconds,
        failed,
        away.answered(),
    )


COUNTED = prepared("totals", _count)


@pytest.fixture(scope="module")
def totals() -> Iterator[Totals]:
    yield COUNTED.get()
    COUNTED.close()


def test_tenant_totals_survive_a_minute_without_the_agent_and_its_kill(totals: Totals) -> None:
    """Nothing is lost or doubled."""
    assert totals.agent_before == totals.clients_before
    assert totals.agent_away == totals.agent_later == totals.clients_away
    tenants, divided = totals.gpu_seconds
    assert tenants == pytest.approx(divided, rel=1e-6)
    assert tenants > AWAY_SECONDS / 4
    assert not totals.failed
    assert totals.answered > 200
