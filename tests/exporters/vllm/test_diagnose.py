"""The doctor about engines: each state of the socket, and what a running agent's metrics say."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.samples import Sample

from exporters.vllm.diagnose import allowed_check, judge, look_at, socket_check
from gpuglass.config import EnginesConfig, Mode
from gpuglass.demo.scenario import Scenario
from gpuglass.doctor.check import Check, Status
from gpuglass.families import probe
from tests.exporters.vllm.receiver_rig import Raw, hello
from tests.support.agent import environ, running_agent

WHO = {"model_name": "m", "engine": "0", "role": "worker", "engine_name": "vllm", "gpu_claim": "verified"}


def state(path: Path) -> tuple[str, Status]:
    found = look_at(msgspec.structs.replace(EnginesConfig(), socket=str(path)))
    return found.state, socket_check(found).status


def by_id(checks: list[Check]) -> dict[str, Check]:
    return {check.id: check for check in checks}


def test_what_lies_at_the_sockets_path(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    assert state(path) == ("absent", Status.INFO)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()
        assert state(path) == ("answers", Status.OK)
    assert state(path) == ("stale", Status.INFO)
    path.unlink()
    path.touch()
    assert state(path) == ("other", Status.FAIL)
    assert state(path / "below" / "agent.sock") == ("denied", Status.FAIL)


@pytest.mark.parametrize(
    ("changes", "is_said"),
    [
        ({}, True),
        ({"allow_uids": (5,)}, False),
        ({"allow_namespaces": ("prod",)}, False),
        ({"directory_mode": Mode("0750")}, False),
        ({"socket_mode": Mode("0660")}, False),
    ],
)
def test_it_says_when_anybody_may_send(changes: dict[str, Any], is_said: bool) -> None:
    found = allowed_check(msgspec.structs.replace(EnginesConfig(), **changes))
    assert [check.id for check in found] == ["engines.allowed"] * is_said


UP = Sample(probe.UP.name, {}, 1)


def sample(family: Any, number: float = 1, **labels: str) -> Sample:
    return Sample(family.name, WHO | labels, number)


def test_without_engines_it_says_how_they_come() -> None:
    found = by_id(judge([UP], "/x.sock"))
    assert found["engines.senders"].status is Status.INFO
    assert "GPUGLASS_SOCKET=/x.sock" in found["engines.senders"].mend
    assert found.keys() == {"engines.senders"}


def test_an_agent_without_a_receiver_is_not_mistaken_for_one_without_engines() -> None:
    assert "has no receiver" in by_id(judge([], "/x.sock"))["engines.senders"].finding


def test_engines_and_their_processes_are_listed() -> None:
    infos = [sample(probe.INFO), sample(probe.INFO), sample(probe.INFO, role="core")]
    found = by_id(judge([UP, *infos], "/x.sock"))
    assert found["engines.senders"].finding == "vllm m (1 core, 2 worker)"
    assert found["engines.senders"].status is Status.OK


@pytest.mark.parametrize(
    ("states", "status", "text"),
    [
        ([("a", "active", ""), ("b", "disabled", "")], Status.OK, "1 hooks active, none unavailable"),
        (
            [("a", "active", ""), ("b", "unavailable", "no such method")],
            Status.WARN,
            "1 hooks active; unavailable: b (no such method)",
        ),
        (
            [(str(n), "unavailable", "") for n in range(9)],
            Status.WARN,
            "0 hooks active; unavailable: "
            + ", ".join(f"{n} (no reason given)" for n in range(6))
            + " and 3 more",
        ),
    ],
)
def test_hooks_that_see_nothing_are_named(
    states: list[tuple[str, str, str]], status: Status, text: str
) -> None:
    samples = [sample(probe.CAPABILITY, hook=h, state=s, reason=r) for h, s, r in states]
    check = by_id(judge([UP, *samples], "/x.sock"))["engines.hooks"]
    assert (check.status, check.finding) == (status, text)


@pytest.mark.parametrize(
    ("claim", "status"),
    [("refused", Status.WARN), ("unverified", Status.INFO), ("verified", None), ("pending", None)],
)
def test_claims_of_gpus_are_judged(claim: str, status: Status | None) -> None:
    found = by_id(judge([UP, sample(probe.INFO, gpu_claim=claim)], "/x.sock")).get("engines.gpus")
    assert (None if found is None else found.status) == status


def test_refusals_are_named_but_not_what_a_newer_sender_says_beyond_us() -> None:
    refused = [
        sample(probe.REFUSED, 3, reason="too_large"),
        sample(probe.REFUSED, 5, reason="unknown_type"),
        sample(probe.REFUSED, 0, reason="rate"),
    ]
    check = by_id(judge([UP, *refused], "/x.sock"))["engines.refused"]
    assert (check.status, check.finding) == (Status.WARN, "since the agent started: too_large 3")
    assert "engines.refused" not in by_id(judge([UP, refused[1]], "/x.sock"))


def test_the_doctor_sees_who_is_connected_to_the_running_agent(tmp_path: Path) -> None:
    with running_agent(tmp_path, Scenario().gpus(1)) as agent:
        sender = Raw(tmp_path / "agent.sock")
        sender.send(hello(capabilities=[{"hook": "kv", "state": "unavailable", "reason": "why not"}]))
        agent.wait(lambda: agent.samples("gpuglass_probe_info"), "the sender", 12)
        config = json.loads(agent.config_file.read_text())
        config["server"]["listen"] = agent.address
        agent.config_file.write_text(json.dumps(config))
        done = subprocess.run(
            [sys.executable, "-m", "gpuglass", "doctor", "--json", "--config", str(agent.config_file)],
            env=environ(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        sender.close()
    found = {check["id"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["engines.receiver"]["status"] == "ok"
    assert found["engines.senders"]["finding"] == "vllm model (1 core)"
    assert found["engines.hooks"]["finding"] == "0 hooks active; unavailable: kv (why not)"
