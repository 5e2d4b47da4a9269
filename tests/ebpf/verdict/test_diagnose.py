"""What the doctor says about the tracer's connection."""

from __future__ import annotations

from prometheus_client.samples import Sample

from ebpf.verdict.diagnose import judge
from gpuglass.doctor.check import Status
from gpuglass.families import cuda as families

PROCESS = {"process": "engine", "pid": "5", "kind": "device"}


def test_an_agent_without_the_part_says_nothing() -> None:
    assert judge([]) == []


def test_no_tracer_is_no_fault_and_has_a_mend() -> None:
    (check,) = judge([Sample(families.TRACERS.name, {}, 0)])
    assert check.status is Status.INFO
    assert "cuda-tracer" in (check.mend or "")


def test_leaks_and_blind_ledgers_are_named() -> None:
    checks = judge(
        [
            Sample(families.TRACERS.name, {}, 1),
            Sample(families.LEAK_STATE.name, PROCESS | {"state": "suspected"}, 1),
            Sample(families.LEAK_STATE.name, PROCESS | {"state": "blind", "pid": "6"}, 1),
            Sample(families.LEAK_SUSPECTED.name, PROCESS, 1),
        ]
    )
    assert [check.status for check in checks] == [Status.OK, Status.WARN, Status.WARN]
    assert checks[1].finding == "engine (pid 5, device)"


def test_a_healthy_node_is_ok() -> None:
    samples = [
        Sample(families.TRACERS.name, {}, 1),
        Sample(families.LEAK_STATE.name, PROCESS | {"state": "healthy"}, 1),
        Sample(families.LEAK_SUSPECTED.name, PROCESS, 0),
    ]
    assert [check.status for check in judge(samples)] == [Status.OK]
