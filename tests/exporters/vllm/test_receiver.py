"""The receiver: what it takes in, what it refuses and says so, and that nothing a sender does stops it."""

from __future__ import annotations

import array
import os
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from exporters.vllm import receiver as module
from exporters.vllm.sink import GpuClaim, Refusal, Refused
from gpuglass.config import LimitsConfig
from gpuglass_vllm import records
from tests.exporters.vllm.receiver_rig import (
    ENCODER,
    Noted,
    as_uid,
    hello,
    progress,
    running_receiver,
    tenant,
)
from tests.support.node import FakeProc

# What is taken in


def test_records_reach_the_sink_in_order_with_who_said_them(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello(), progress("one"))
        sender.send(progress("two"), progress("three"))
        rig.wait(lambda: len(rig.sink.taken) == 3)
        assert [record.request_id for record in rig.sink.records] == ["one", "two", "three"]
        who = rig.sink.taken[0][0]
        assert (who.hello.sender, who.pid, who.uid) == ("sender-1", os.getpid(), os.getuid())
        assert rig.receiver.counts.records == {"hello": 1, "request_progress": 3}


def test_unknown_fields_and_types_of_newer_senders_are_passed_over(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello(new_field=[1]), progress(colour="red"))
        for _ in range(5):
            sender.send({"type": "novelty", "x": {"y": 1}}, progress())
        rig.wait(lambda: len(rig.sink.taken) == 6)
        assert rig.refused(Refusal.UNKNOWN_TYPE) == 5
        assert sum(rig.refusals().values()) == 5


def test_what_cannot_be_printed_is_replaced_because_clients_choose_ids_and_tenants(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello(model_name="a\tb"))
        for _ in range(5):
            sender.send(progress("one\xa0\n", tenant="\x1b[31m"))
        preemption = {"type": "preemption", "at": 1, "cause": "kv_full", "victim": "v\x00"}
        sender.send(preemption | {"holders": ["one\xa0\n"], "holder_blocks": [1.0]})
        sender.send({"type": "tenant", "tenant": "\x1b[31m", "output_tokens": 4}, seq=1)
        assert sender.ack() == 1
        assert rig.sink.hellos[0].hello.model_name == "a\ufffdb"
        first, *_, preempted, total = rig.sink.records
        assert (first.request_id, first.tenant) == ("one\ufffd\ufffd", "\ufffd[31m")
        # Everywhere the same way, so that records still join.
        assert (preempted.victim, preempted.holders) == ("v\ufffd", [first.request_id])
        assert (total.tenant, total.output_tokens) == (first.tenant, 4)
        assert not rig.refusals()


def test_long_texts_for_people_are_shortened(tmp_path: Path) -> None:
    reason = [{"hook": "h", "state": "unavailable", "reason": "y\n" * 500}]
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello(model_name="x" * 1000, capabilities=reason))
        sender.send(tenant(), seq=1)
        assert sender.ack() == 1
        said = rig.sink.hellos[0].hello
        assert said.model_name == "x" * 256
        assert said.capabilities[0].reason == "y\ufffd" * 128


def test_a_second_hello_changes_what_is_known_but_not_who_it_is(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        sender.send(hello(pool={"blocks": 7, "block_bytes": 1, "block_tokens": 16}))
        rig.wait(lambda: len(rig.sink.hellos) == 2)
        assert rig.sink.hellos[0] is rig.sink.hellos[1]
        assert rig.sink.hellos[0].hello.pool == records.Pool(blocks=7, block_bytes=1, block_tokens=16)
        sender.send(hello(instance="other"))
        rig.wait(lambda: rig.refused(Refusal.OUT_OF_RANGE) == 1)
        assert rig.sink.hellos[0].hello.instance == "instance-1"


def test_the_sink_hears_when_a_sender_has_gone(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        rig.connect(hello()).close()
        rig.wait(lambda: rig.sink.left)
        assert rig.sink.left == rig.sink.hellos


# Sums


def test_sums_are_acknowledged_and_a_repeated_packet_counts_once(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        for _ in range(3):
            sender.send(tenant(5), seq=7)
            assert sender.ack() == 7
        sender.send(tenant(2), seq=8)
        assert sender.ack() == 8
        assert rig.sink.tokens == 7
        assert rig.receiver.counts.repeated == 2


def test_sums_count_once_over_reconnections(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        first = rig.connect(hello())
        first.send(tenant(5), seq=1)
        assert first.ack() == 1
        # The old connection is still there, as far as the receiver can see.
        second = rig.connect(hello())
        second.send(tenant(5), seq=1)
        second.send(tenant(3), seq=2)
        assert [second.ack(), second.ack()] == [1, 2]
        assert first.is_closed()
        assert rig.sink.tokens == 8


def test_senders_of_different_names_count_each_for_themselves(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        for name in ("a", "b"):
            sender = rig.connect(hello(sender=name))
            sender.send(tenant(5), seq=1)
            assert sender.ack() == 1
        assert rig.sink.tokens == 10


def test_sums_without_seq_are_refused_because_they_could_come_twice(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        rig.connect(hello(), tenant())
        rig.wait(lambda: rig.refused(Refusal.UNACKNOWLEDGED_SUM) == 1)
        assert rig.sink.records == []


def test_packets_without_sums_are_not_acknowledged(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello(), progress())
        rig.wait(lambda: rig.sink.records)
        sender.socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sender.ack()


def test_a_packet_is_acknowledged_only_when_the_sink_has_it_and_its_lock_is_free(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        rig.wait(lambda: rig.sink.hellos)
        with rig.sink.lock:  # as the publisher holds it while it makes an exposition
            sender.send(tenant(5), seq=1)
            sender.socket.settimeout(0.2)
            with pytest.raises(TimeoutError):
                sender.ack()
            assert rig.sink.tokens == 0
        sender.socket.settimeout(10)
        assert sender.ack() == 1
        assert rig.sink.tokens == 5


def test_a_sender_that_never_reads_its_acknowledgements_does_not_block_the_others(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        deaf = rig.connect(hello(sender="deaf"))
        deaf.socket.settimeout(0.5)
        for seq in range(1, 3000):
            deaf.send(tenant(1), seq=seq)
            if rig.receiver.counts.unsent_acks:
                break
        rig.wait(lambda: rig.receiver.counts.unsent_acks)
        rig.works()
        # Once it reads, the last acknowledgement stands for all that did not fit.
        last = 0
        deaf.socket.settimeout(5)
        while last < seq:
            last = deaf.ack()
        assert rig.sink.tokens == seq


# What is refused


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (progress(blocks=float("nan")), Refusal.OUT_OF_RANGE),
        (progress(blocks=float("inf")), Refusal.OUT_OF_RANGE),
        (progress(blocks=-1.0), Refusal.OUT_OF_RANGE),
        (progress(blocks=1000.0), Refusal.OUT_OF_RANGE),
        (progress(output_tokens=-1), Refusal.OUT_OF_RANGE),
        (progress(output_tokens=2**60), Refusal.OUT_OF_RANGE),
        (progress(""), Refusal.OUT_OF_RANGE),
        (progress(output_tokens=2**64 - 1), Refusal.OUT_OF_RANGE),
        (progress("x" * 129), Refusal.BAD_TEXT),
        (progress(tenant="x" * 65), Refusal.BAD_TEXT),
        (progress(blocks="many"), Refusal.MALFORMED_RECORD),
        (progress(at=None), Refusal.MALFORMED_RECORD),
        (progress(at=time.monotonic_ns() + 3600 * 10**9), Refusal.BAD_TIME),
        ({"type": "request_progress"}, Refusal.MALFORMED_RECORD),
        ({"no": "type"}, Refusal.MALFORMED_RECORD),
        ({"type": 5}, Refusal.MALFORMED_RECORD),
        (5, Refusal.MALFORMED_RECORD),
        (None, Refusal.MALFORMED_RECORD),
        ([], Refusal.MALFORMED_RECORD),
        ({"type": "request_start", "at": 1, "request_id": "r"}, Refusal.WRONG_ROLE),
        ({"type": "preemption", "at": 1, "cause": "boredom", "victim": "r"}, Refusal.OUT_OF_RANGE),
        (
            {"type": "preemption", "at": 1, "cause": "kv_full", "victim": "r", "holders": ["a"]},
            Refusal.OUT_OF_RANGE,
        ),
        (
            {"type": "request_end", "at": 1, "request_id": "r", "outcome": "victory", "arrival_ns": 1},
            Refusal.OUT_OF_RANGE,
        ),
    ],
)  # fmt: skip
def test_a_wrong_record_is_refused_alone(tmp_path: Path, record: Any, reason: Refusal) -> None:
    with running_receiver(tmp_path) as rig:
        rig.connect(hello(), progress("before"), record, progress("after"))
        rig.wait(lambda: len(rig.sink.taken) == 2)
        assert [taken.request_id for taken in rig.sink.records] == ["before", "after"]
        assert rig.refusals() == {reason: 1}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"type": "core", "evictions": [1, 2]}, Refusal.OUT_OF_RANGE),
        ({"type": "core", "preemptions": {"boredom": 1}}, Refusal.OUT_OF_RANGE),
        ({"type": "tenant", "tenant": "a", "requests": {"victory": 1}}, Refusal.OUT_OF_RANGE),
        ({"type": "tenant", "tenant": "a", "requests": {"stop": -1}}, Refusal.OUT_OF_RANGE),
        ({"type": "tenant", "tenant": "a" * 65}, Refusal.BAD_TEXT),
    ],
)
def test_a_wrong_sum_is_refused_and_the_packet_acknowledged_as_it_will_not_get_better(
    tmp_path: Path, record: Any, reason: Refusal
) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        sender.send(tenant(3), record, seq=1)
        assert sender.ack() == 1
        assert rig.sink.tokens == 3
        assert rig.refusals() == {reason: 1}


WORKER = hello(
    role="worker", rank=0, experts={"layers": [3, 4], "experts": 8, "top_k": 2, "every": 1}, sender="w"
)


@pytest.mark.parametrize(
    ("record", "is_taken"),
    [
        ({"first": 0, "counts": bytes(64), "counted_tokens": 1, "seen_tokens": 1}, True),
        ({"first": 1, "counts": bytes(32), "counted_tokens": 1, "seen_tokens": 1}, True),
        ({"first": 1, "counts": bytes(64), "counted_tokens": 1, "seen_tokens": 1}, False),
        ({"first": 0, "counts": bytes(63), "counted_tokens": 1, "seen_tokens": 1}, False),
        ({"first": 0, "counts": b"", "counted_tokens": 1, "seen_tokens": 1}, False),
        ({"first": 0, "counts": bytes(64), "counted_tokens": 2, "seen_tokens": 1}, False),
    ],
)
def test_expert_counts_have_to_fit_the_layers_that_were_introduced(
    tmp_path: Path, record: dict[str, Any], is_taken: bool
) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(WORKER)
        sender.send({"type": "experts"} | record, seq=1)
        assert sender.ack() == 1
        assert len(rig.sink.records) == is_taken
        assert rig.refused(Refusal.OUT_OF_RANGE) == (not is_taken)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xc1", Refusal.MALFORMED_PACKET),
        (b"x", Refusal.MALFORMED_PACKET),
        (os.urandom(1000) + b"\xc1", Refusal.MALFORMED_PACKET),
        (b"\x91" * 60_000, Refusal.MALFORMED_PACKET),
        (b"\xdd\xff\xff\xff\xff", Refusal.MALFORMED_PACKET),
        (b"\x82\xa3seq\x00\xa7records\xdd\xff\xff\xff\xff", Refusal.MALFORMED_PACKET),
        (b"\xc6\xff\xff\xff\xff", Refusal.MALFORMED_PACKET),
        (ENCODER.encode({"seq": -1, "records": []}), Refusal.MALFORMED_PACKET),
        (ENCODER.encode({"seq": 2**63, "records": []}), Refusal.MALFORMED_PACKET),
        (ENCODER.encode({"seq": 1.5, "records": []}), Refusal.MALFORMED_PACKET),
        (ENCODER.encode({"records": []}), Refusal.MALFORMED_PACKET),
        (ENCODER.encode({"seq": 0, "records": [0] * (module.MAX_RECORDS + 1)}), Refusal.TOO_MANY_RECORDS),
        (ENCODER.encode({"seq": 0, "records": [progress()]})[:-3], Refusal.MALFORMED_PACKET),
        (bytes(records.MAX_PACKET + 1), Refusal.TOO_LARGE),
        (ENCODER.encode({"seq": 0, "records": [progress("x" * 100_000)]}), Refusal.TOO_LARGE),
    ],
)
def test_a_wrong_packet_is_refused_and_the_next_one_taken(
    tmp_path: Path, data: bytes, reason: Refusal
) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        sender.bytes(data)
        sender.send(progress())
        rig.wait(lambda: rig.sink.records)
        assert rig.refusals() == {reason: 1}


def test_the_largest_packet_is_taken(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        empty = len(ENCODER.encode({"seq": 0, "records": [progress(filler="")]}))
        data = ENCODER.encode(
            {"seq": 0, "records": [progress(filler="x" * (records.MAX_PACKET - empty - 2))]}
        )
        assert len(data) == records.MAX_PACKET
        sender.bytes(data)
        rig.wait(lambda: rig.sink.records)
        sender.bytes(data + b"\x00")
        rig.wait(lambda: rig.refused(Refusal.TOO_LARGE))


def test_three_refusals_end_a_connection_and_what_stood_in_the_packet_is_not_lost(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        bad = progress(blocks=-1.0)
        sender.send(bad, bad, bad, tenant(4), seq=1)
        assert sender.ack() == 1
        assert sender.is_closed()
        assert (rig.sink.tokens, rig.refused(Refusal.GARBAGE)) == (4, 1)
        rig.works()


def test_two_refusals_do_not(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        sender.bytes(b"garbage")
        sender.bytes(b"garbage")
        sender.send(tenant(), seq=1)
        assert sender.ack() == 1


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (progress(), Refusal.NO_HELLO),
        (5, Refusal.NO_HELLO),
        (hello(version=2), Refusal.VERSION),
        (hello(sender=""), Refusal.BAD_TEXT),
        (hello(instance=""), Refusal.BAD_TEXT),
        (hello(role="king"), Refusal.OUT_OF_RANGE),
        (hello(engine="x" * 65), Refusal.BAD_TEXT),
        (hello(pool={"blocks": 0, "block_bytes": 1, "block_tokens": 1}), Refusal.OUT_OF_RANGE),
        (hello(capabilities=[{"hook": "h", "state": "dreaming"}]), Refusal.OUT_OF_RANGE),
        (hello(capabilities=[{"hook": "h", "state": "active"}] * 65), Refusal.OUT_OF_RANGE),
        (hello(experts={"layers": [], "experts": 0, "top_k": 1, "every": 1}), Refusal.OUT_OF_RANGE),
        (hello(rank=-2), Refusal.OUT_OF_RANGE),
    ],
)
def test_who_does_not_introduce_himself_properly_is_not_heard(
    tmp_path: Path, first: Any, reason: Refusal
) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect()
        sender.send(first)
        assert sender.is_closed()
        assert rig.refusals() == {reason: 1}
        assert not rig.sink.hellos
        rig.works()


def test_a_packet_without_records_is_no_introduction(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect()
        sender.send()
        assert sender.is_closed()
        assert rig.refused(Refusal.NO_HELLO) == 1


def test_who_says_nothing_is_shown_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELLO_SECONDS", 0.1)
    monkeypatch.setattr(module, "TICK", 0.05)
    with running_receiver(tmp_path) as rig:
        known = rig.connect(hello())
        silent = rig.connect()
        assert silent.is_closed()
        assert rig.refused(Refusal.HELLO_LATE) == 1
        known.send(tenant(), seq=1)
        assert known.ack() == 1


def test_file_descriptors_that_come_along_do_not_stay(tmp_path: Path) -> None:
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        rig.wait(lambda: rig.sink.hellos)
        before = len(os.listdir("/proc/self/fd"))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 50))]
        data = ENCODER.encode({"seq": 1, "records": [tenant()]})
        sender.socket.sendmsg([data], rights)
        assert sender.ack() == 1
        assert len(os.listdir("/proc/self/fd")) <= before


# The sink


def test_what_the_sink_refuses_is_counted_and_no_strike(tmp_path: Path) -> None:
    def full(record: Any) -> None:
        if record.request_id.startswith("no"):
            raise Refused(Refusal.TOO_MANY_REQUESTS)

    with running_receiver(tmp_path, Noted(react=full)) as rig:
        rig.connect(hello(), *(progress(f"no-{n}") for n in range(10)), progress("yes"))
        rig.wait(lambda: rig.sink.records)
        assert rig.refusals() == {Refusal.TOO_MANY_REQUESTS: 10}


def test_an_error_in_the_sink_costs_one_record_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(record: Any) -> None:
        if record.tenant == "bad":
            raise ZeroDivisionError

    with running_receiver(tmp_path, Noted(react=fail)) as rig:
        sender = rig.connect(hello())
        sender.send(tenant(1, "bad"), tenant(2, "bad"), tenant(4), seq=1)
        assert sender.ack() == 1
        assert (rig.sink.tokens, rig.refused(Refusal.INTERNAL)) == (4, 2)
    assert sum("ledger failed" in message for message in caplog.messages) == 1


# Who may send


def test_only_listed_users_may_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_receiver(tmp_path, allow_uids=(4711,)) as rig:
        assert rig.connect().is_closed()
        assert rig.refused(Refusal.NOT_ALLOWED) == 1
        as_uid(monkeypatch, 4711)
        rig.works()


def test_a_name_belongs_to_the_user_who_used_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_receiver(tmp_path) as rig:
        rig.connect(hello())
        rig.wait(lambda: rig.sink.hellos)
        as_uid(monkeypatch, 4711)
        thief = rig.connect(hello())
        assert thief.is_closed()
        assert rig.refused(Refusal.SENDER_TAKEN) == 1
        assert not rig.sink.left


POD = "/kubepods.slice/kubepods-pod12345678_1234_1234_1234_123456789abc.slice/cri-containerd-" + "a" * 64


def in_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let later connections come from pid 77, a container of the pod `serve` in the namespace `prod`."""
    logs = tmp_path / "containers"
    logs.mkdir()
    (logs / f"serve_prod_vllm-{'a' * 64}.log").symlink_to("/dev/null")
    proc = FakeProc(tmp_path / "proc")
    proc.add(77, "vllm", cgroup=f"{POD}.scope")
    as_uid(monkeypatch, 0, pid=77)
    return {"proc": proc, "container_logs": str(logs)}


def test_a_sender_gets_the_workload_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = in_pod(tmp_path, monkeypatch)
    with running_receiver(tmp_path, **pod) as rig:
        rig.connect(hello())
        rig.wait(lambda: rig.sink.hellos)
        assert rig.sink.hellos[0].workload == ("prod", "serve", "vllm")


@pytest.mark.parametrize(("pattern", "may"), [("prod", True), ("pr*", True), ("dev", False)])
def test_only_pods_of_listed_namespaces_may_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, may: bool
) -> None:
    pod = in_pod(tmp_path, monkeypatch)
    with running_receiver(tmp_path, allow_namespaces=(pattern,), **pod) as rig:
        sender = rig.connect(hello())
        sender.send(tenant(), seq=1)
        if may:
            assert sender.ack() == 1
        else:
            assert sender.is_closed()
            assert rig.refused(Refusal.NOT_ALLOWED) == 1
        as_uid(monkeypatch, 0, pid=1)  # a process of the host is in no namespace
        assert rig.connect(hello(sender="host")).is_closed()


def test_a_process_of_another_pid_namespace_is_taken_but_joined_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_uid(monkeypatch, 0, pid=0)
    with running_receiver(tmp_path) as rig:
        rig.gpu_processes.note("GPU-1", [5])
        rig.connect(hello(gpu_uuid="GPU-1"))
        rig.wait(lambda: rig.sink.hellos)
        who = rig.sink.hellos[0]
        assert (who.pid, who.workload, who.claim) == (0, ("", "", ""), GpuClaim.UNVERIFIED)


def test_a_claimed_gpu_is_believed_once_the_driver_lists_the_process_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TICK", 0.05)
    with running_receiver(tmp_path) as rig:
        rig.gpu_processes.note("GPU-1", [5])
        rig.connect(hello(gpu_uuid="GPU-1"))
        rig.wait(lambda: rig.sink.hellos)
        who = rig.sink.hellos[0]
        assert (who.claim, who.gpu_uuid) == (GpuClaim.PENDING, "")
        rig.gpu_processes.note("GPU-1", [5, os.getpid()])
        rig.wait(lambda: who.gpu_uuid == "GPU-1")
        assert who.claim is GpuClaim.VERIFIED
        # At its end a process leaves the driver's list before it leaves us.
        rig.gpu_processes.note("GPU-1", [5])
        hellos = len(rig.sink.hellos)
        time.sleep(0.2)
        assert (who.gpu_uuid, len(rig.sink.hellos)) == ("GPU-1", hellos)


# Bounds


def test_a_thousand_connections_are_bounded_and_those_before_them_work(tmp_path: Path) -> None:
    with running_receiver(tmp_path, limits=LimitsConfig(senders=100, senders_per_user=100)) as rig:
        known = rig.connect(hello(sender="known"))
        rig.wait(lambda: rig.sink.hellos)
        others = [rig.connect() for _ in range(1000)]
        rig.wait(lambda: rig.refused(Refusal.TOO_MANY_SENDERS) == 901)
        known.send(tenant(), seq=1)
        assert known.ack() == 1
        for other in others:
            other.close()
        rig.wait(lambda: len(rig.receiver._connections) == 1)
        rig.works()


def test_one_user_cannot_take_all_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_receiver(tmp_path, limits=LimitsConfig(senders=20, senders_per_user=10)) as rig:
        for _ in range(30):
            rig.connect()
        rig.wait(lambda: rig.refused(Refusal.TOO_MANY_OF_USER) == 20)
        as_uid(monkeypatch, 4711)
        rig.works()


def test_who_comes_and_goes_all_the_time_is_not_let_in_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ARRIVALS_BURST", 5.0)
    monkeypatch.setattr(module, "ARRIVALS_PER_SECOND", 0.001)
    with running_receiver(tmp_path) as rig:
        for number in range(5):
            rig.connect(hello(sender=f"s{number}")).close()
        rig.wait(lambda: len(rig.sink.left) == 5)
        assert rig.connect().is_closed()
        assert rig.refused(Refusal.TOO_MANY_OF_USER) == 1
        as_uid(monkeypatch, 4711)
        rig.works()


def test_a_flood_waits_and_is_not_lost_and_others_are_heard_meanwhile(tmp_path: Path) -> None:
    slow = LimitsConfig(records_per_second=2000)  # bursts of 4,000
    with running_receiver(tmp_path, limits=slow) as rig:
        flood = rig.connect(hello(sender="flood"))
        for seq in range(1, 7):
            flood.send(*[tenant(1)] * 1000, seq=seq)
        rig.wait(lambda: rig.receiver.counts.pauses)
        assert rig.sink.tokens < 6000
        rig.works()
        while flood.ack() < 6:
            pass
        assert rig.sink.tokens == 6000
        assert not rig.refusals()


def test_a_sender_that_leaves_while_it_waits_leaves_nothing_behind(tmp_path: Path) -> None:
    with running_receiver(tmp_path, limits=LimitsConfig(records_per_second=1000)) as rig:
        flood = rig.connect(hello(sender="flood"))
        for _ in range(3):
            flood.send(*[progress()] * 1000)
        rig.wait(lambda: rig.receiver.counts.pauses)
        flood.close()
        rig.wait(lambda: rig.sink.left)
        assert not rig.receiver._connections
        rig.works()


def test_a_reload_shuts_out_who_may_send_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK", 0.05)
    with running_receiver(tmp_path) as rig:
        sender = rig.connect(hello())
        rig.wait(lambda: rig.sink.hellos)
        config = rig.receiver._config
        rig.receiver.reload(msgspec.structs.replace(config, allow_uids=(os.getuid() + 1,)))
        assert sender.is_closed()
        assert rig.refused(Refusal.NOT_ALLOWED) == 1
