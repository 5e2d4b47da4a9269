"""The whole agent with engines: the example sender, a kill in the middle, refusals at start, the log."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuglass.demo.scenario import Scenario
from tests.exporters.vllm.receiver_rig import Raw, hello, progress, tenant
from tests.support.agent import RunningAgent, refused_agent, running_agent

EXAMPLE = Path(__file__).parents[3] / "exporters/engine_probe/example_sender.py"
SLOW = 12
"""Seconds within which the slow tier is published."""


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    """An agent on a node with one GPU."""
    with running_agent(tmp_path, Scenario().gpus(1)) as running:
        yield running


def example(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, timeout=60
    )


def test_what_the_example_sends_is_in_the_metrics(agent: RunningAgent, tmp_path: Path) -> None:
    path = str(tmp_path / "agent.sock")
    done = example("--socket", path, "--tenant", "team-x", "--model", "toy", "--seconds", "2.5")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "core: acknowledged up to 1" in done.stdout
    labels = {"model_name": "toy", "engine": "0"}

    def tokens(kind: str) -> float | None:
        return agent.value("gpuglass_tenant_tokens_total", tenant="team-x", kind=kind, **labels)

    agent.wait(lambda: tokens("prompt") == 1600, "the tenant's tokens", SLOW)
    assert tokens("output") == 200
    held = agent.value("gpuglass_tenant_kv_byte_seconds_total", tenant="team-x", **labels)
    assert held == pytest.approx(113 * 2_097_152 * 2.5, rel=0.1)
    ended = {"outcome": "length", "tenant": "team-x", **labels}
    assert agent.value("gpuglass_tenant_requests_total", **ended) == 1
    name = "gpuglass_request_duration_seconds_count"
    agent.wait(lambda: agent.value(name, outcome="length", **labels) == 1, "the request", SLOW)
    peak = agent.value("gpuglass_kv_request_peak_ratio_sum", **labels)
    assert peak == pytest.approx(0.113)
    request, trace = done.stdout.split("request ")[-1].split(":")[0].split(", trace ")
    text = agent.fetch(Accept="application/openmetrics-text;version=1.0.0").text
    assert f'request_id="{request}",trace_id="{trace}"' in text


def test_the_example_shows_the_pool_while_its_request_runs(agent: RunningAgent, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--socket", str(tmp_path / "agent.sock"), "--seconds", "60"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            agent.wait(
                lambda: any(
                    sample.value == pytest.approx(0.113)
                    for sample in agent.samples(path="/metrics/fast", tenant="team-a", holder="1")
                ),
                "the holder's share",
            )
        finally:
            process.kill()


def test_the_example_says_how_it_is_used_and_what_is_wrong() -> None:
    assert "--socket" in example("--help").stdout
    assert example("--socket", "/nonexistent.sock").returncode == 1


def test_sums_that_were_not_acknowledged_when_the_agent_was_killed_are_counted_once(
    agent: RunningAgent, tmp_path: Path
) -> None:
    path = tmp_path / "agent.sock"
    name = "gpuglass_tenant_tokens_total"

    def tokens() -> float | None:
        return agent.value(name, tenant="a", kind="output")

    sender = Raw(path)
    sender.send(hello())
    sender.send(tenant(10), seq=1)
    assert sender.ack() == 1
    agent.wait(lambda: tokens() == 10, "the first sum", SLOW)

    # A stopped agent receives what it has not acknowledged; then it is killed.
    agent.process.send_signal(signal.SIGSTOP)
    sender.send(tenant(3), seq=2)
    sender.send(tenant(4), seq=3)
    agent.process.send_signal(signal.SIGKILL)
    agent.process.wait(10)
    agent._stopped = True
    sender.close()

    again_in = tmp_path / "again"
    again_in.mkdir()
    with running_agent(again_in, Scenario().gpus(1), {"engines": {"socket": str(path)}}) as again:
        # As a sender does: the rest again, in order, then repeated by another reconnection.
        for _ in range(2):
            sender = Raw(path)
            sender.send(hello())
            sender.send(tenant(3), seq=2)
            sender.send(tenant(4), seq=3)
            while sender.ack() < 3:
                pass
            sender.close()
        again.wait(lambda: again.value(name, tenant="a", kind="output") == 7, "the rest", SLOW)
        again.wait(lambda: again.value("gpuglass_receiver_repeated_packets_total") == 2, "repetitions", SLOW)
        # 10 before the kill and 7 after it, which is what was sent.
        assert again.value(name, tenant="a", kind="output") == 7


def test_what_the_receiver_knows_of_its_senders_is_in_the_metrics(
    agent: RunningAgent, tmp_path: Path
) -> None:
    sender = Raw(tmp_path / "agent.sock")
    capabilities = [
        {"hook": "core.kv", "state": "active"},
        {"hook": "core.evict", "state": "unavailable", "reason": "no such method"},
    ]
    sender.send(hello(capabilities=capabilities, server="blue"), progress(), progress(blocks=-1.0))
    at = time.monotonic_ns()
    sender.send(
        {"type": "probe", "at": at, "dropped": 3, "hook_ns": 2_000_000_000, "hook_errors": {"core.kv": 2}}
    )
    who: dict[str, str] = {"model_name": "model", "engine": "0", "server": "blue", "role": "core"}
    agent.wait(lambda: agent.value("gpuglass_probe_dropped_events_total", **who) == 3, "drops", SLOW)
    assert agent.value("gpuglass_probe_hook_seconds_total", **who) == 2
    assert agent.value("gpuglass_probe_hook_errors_total", hook="core.kv", **who) == 2
    assert agent.value("gpuglass_probe_info", software="test/1", gpu_claim="none", **who) == 1
    assert agent.value("gpuglass_probe_capability", hook="core.kv", state="active", **who) == 1
    missing = {"hook": "core.evict", "state": "unavailable", "reason": "no such method"}
    assert agent.value("gpuglass_probe_capability", **missing, **who) == 1
    assert agent.value("gpuglass_receiver_records_total", type="request_progress") == 1
    assert agent.value("gpuglass_receiver_refused_total", reason="out_of_range") == 1
    assert agent.value("gpuglass_receiver_senders", role="core") == 1
    assert agent.value("gpuglass_receiver_up") == 1
    assert agent.value("gpuglass_receiver_lag_seconds_count") == 1
    assert agent.value("gpuglass_agent_capability", feature="engine_socket", state="supported") == 1
    sender.close()
    agent.wait(lambda: not agent.samples("gpuglass_probe_info"), "that it has gone", SLOW)
    assert not agent.samples("gpuglass_probe_dropped_events_total")


def test_quotas_come_with_a_reload_and_a_new_socket_does_not(agent: RunningAgent, tmp_path: Path) -> None:
    quota = {"tenants": {"quotas": {"team-a": {"kv_share": 0.25}}}}
    socket_of = {"socket": str(tmp_path / "agent.sock")}
    agent.configure({"engines": socket_of | quota})
    agent.process.send_signal(signal.SIGHUP)
    agent.wait(
        lambda: any(sample.value == 0.25 for sample in agent.samples(tenant="team-a")), "the quota", SLOW
    )
    agent.configure({"engines": {"socket": str(tmp_path / "other.sock")}})
    agent.process.send_signal(signal.SIGHUP)
    agent.wait(lambda: "engines.socket: cannot change while the agent runs" in agent.log, "the refusal")


def test_a_socket_that_is_named_and_cannot_be_made_ends_the_agent_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = refused_agent(tmp_path, {"engines": {"socket": str(tmp_path / "file")}})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"gpuglass: engines.socket: {tmp_path / 'file'} is there and is no socket: "
        "remove it or name another path"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_agent_does_not_take_the_socket_of_the_first(agent: RunningAgent, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    done = refused_agent(second, {"engines": {"socket": str(tmp_path / "agent.sock")}})
    assert done.returncode == 2
    assert "another process answers on" in done.stderr
    Raw(tmp_path / "agent.sock").close()


def test_where_the_default_cannot_be_made_the_agent_serves_all_the_same(tmp_path: Path) -> None:
    # With somebody else on the default socket it cannot be made, whoever runs this test.
    folder = Path("/run/gpuglass")
    made = not folder.exists() and os.access(folder.parent, os.W_OK)
    if made:
        folder.mkdir()
    blocker = None
    if os.access(folder, os.W_OK):
        if (folder / "agent.sock").exists():
            pytest.skip("an agent of this machine uses the default socket")
        blocker = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        blocker.bind(str(folder / "agent.sock"))
        blocker.listen()
    try:
        with running_agent(tmp_path, Scenario().gpus(1), {"engines": {"socket": ""}}) as agent:
            agent.wait(lambda: "no engine can be heard" in agent.log, "the line in the log")
            state = {"feature": "engine_socket", "state": "error"}
            assert agent.value("gpuglass_agent_capability", **state) == 1
            agent.wait(lambda: agent.value("gpuglass_receiver_up", reason="socket") == 0, "up", SLOW)
    finally:
        if blocker is not None:
            blocker.close()
            (folder / "agent.sock").unlink()
        if made:
            folder.rmdir()


def test_engines_can_be_switched_off(tmp_path: Path) -> None:
    off = {"engines": {"enabled": False, "socket": str(tmp_path / "agent.sock")}}
    with running_agent(tmp_path, Scenario().gpus(1), off) as agent:
        assert not (tmp_path / "agent.sock").exists()
        assert not agent.samples("gpuglass_receiver_up")
