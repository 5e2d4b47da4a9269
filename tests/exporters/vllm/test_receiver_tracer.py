"""Who may speak of other processes' CUDA memory, and that old receivers pass new records over."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from exporters.vllm.sink import Refusal
from gpuglass_vllm import records
from tests.exporters.vllm.receiver_rig import hello, running_receiver
from tests.support.node import FakeProc

ME = os.getuid()
TRACER = hello(role="tracer", sender="tracer-1", engine_name="cuda-tracer", model_name="", pool=None)


def process(**more: Any) -> dict[str, Any]:
    """A report, as it is on the wire."""
    memory = [{"kind": "device", "live_bytes": 5, "failures": {2: 1}}]
    told = {"at": time.monotonic_ns(), "pid": 7, "start_ticks": 1, "tracking_since_ns": 0, "memory": memory}
    return {"type": "cuda_process", **told, **more}


def proc_of(tmp_path: Path, pids: str = "7") -> FakeProc:
    """A host's /proc with this process in it, numbered so in its pid namespaces."""
    proc = FakeProc(tmp_path / "proc")
    proc.add(os.getpid())
    (proc.root / str(os.getpid()) / "status").write_text(f"NSpid:\t{pids}\n")
    return proc


def test_a_tracer_of_a_believed_user_is_heard(tmp_path: Path) -> None:
    with running_receiver(tmp_path, proc=proc_of(tmp_path), tracer_uids=(ME,)) as rig:
        rig.connect(TRACER, process())
        (record,) = rig.wait(lambda: rig.sink.records)
        assert isinstance(record, records.CudaProcess)
        assert record.memory[0].failures == {2: 1}


def test_a_tracer_of_another_user_is_not(tmp_path: Path) -> None:
    with running_receiver(tmp_path, proc=proc_of(tmp_path), tracer_uids=(ME + 1,)) as rig:
        assert rig.connect(TRACER, process()).is_closed()
        assert rig.refused(Refusal.NOT_ALLOWED) == 1
        assert not rig.sink.records


@pytest.mark.parametrize(("pids", "heard"), [("7", True), ("7\t1", False)])
def test_a_tracer_in_a_container_with_its_own_pids_is_not_believed(
    tmp_path: Path, pids: str, heard: bool
) -> None:
    with running_receiver(tmp_path, proc=proc_of(tmp_path, pids), tracer_uids=(ME,)) as rig:
        raw = rig.connect(TRACER, process())
        if heard:
            assert rig.wait(lambda: rig.sink.records)
        else:
            assert raw.is_closed() and not rig.sink.records


def test_an_engine_may_not_speak_of_other_processes_nor_a_tracer_of_requests(tmp_path: Path) -> None:
    with running_receiver(tmp_path, proc=proc_of(tmp_path), tracer_uids=(ME,)) as rig:
        rig.connect(hello(role="worker", rank=0), process())
        rig.connect(TRACER, {"type": "request_start", "at": 1, "request_id": "r"})
        rig.wait(lambda: rig.refused(Refusal.WRONG_ROLE) == 2)
        assert not rig.sink.records


@pytest.mark.parametrize(
    "wrong",
    [
        process(pid=0),
        process(memory=[{"kind": "tape", "live_bytes": 5}]),
        process(memory=[{"kind": "device", "live_bytes": 5}] * 2),
        process(memory=[{"kind": "device", "live_bytes": -5}]),
        process(stacks=[{"stack": 1, "kind": "device", "live_bytes": 1}] * 17),
        {"type": "cuda_stack", "stack": 1, "frames": ["f"] * 49},
        {"type": "cuda_stack", "stack": 1, "frames": ["f" * 300]},
        {
            **{"type": "cuda_event", "at": 5, "begin_ns": 6, "pid": 1, "tid": 1, "function": "cuMemAlloc"},
            **{"kind": "device", "bytes": 1, "reason": "large"},
        },
    ],
)
def test_what_is_out_of_bounds_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with running_receiver(tmp_path, proc=proc_of(tmp_path), tracer_uids=(ME,)) as rig:
        rig.connect(TRACER, wrong)
        (reason,) = rig.wait(rig.refusals)
        assert reason in (Refusal.OUT_OF_RANGE, Refusal.BAD_TEXT)
        assert not rig.sink.records
        rig.works()


@pytest.mark.parametrize(
    "changes", [{"begin_ns": 9}, {"tokens": [1]}, {"kind": "x"}, {"phases": ["prefill"]}, {"tid": 0}]
)
def test_a_step_has_to_fit_together(tmp_path: Path, changes: dict[str, Any]) -> None:
    step = {
        **{"type": "step", "at": 8, "begin_ns": 5, "step": 1, "tid": 3, "kind": "graph"},
        **{"request_ids": ["a", "b"], "tokens": [5, 1], "phases": ["prefill", "decode"]},
    }
    with running_receiver(tmp_path) as rig:
        rig.connect(hello(role="worker", rank=0), step, step | changes)
        rig.wait(lambda: sum(rig.refusals().values()) == 1)
        (record,) = rig.sink.records
        assert record.request_ids == ["a", "b"]
