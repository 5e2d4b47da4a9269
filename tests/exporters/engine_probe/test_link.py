"""The link to the agent: sums arrive exactly once, events are bounded, and nobody waits for it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpuglass_vllm import link as link_module
from gpuglass_vllm import records, settings
from gpuglass_vllm.link import Link


class Agent:
    """A receiver that takes packets when told to."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(5)
        self.connection: socket.socket | None = None

    def accept(self) -> None:
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(5)

    def packet(self) -> tuple[int, list[dict[str, Any]]]:
        assert self.connection is not None
        data = self.connection.recv(2 * records.MAX_PACKET)
        assert data, "closed"
        assert len(data) <= records.MAX_PACKET
        packet = msgspec.msgpack.decode(data, type=records.Packet)
        return packet.seq, [msgspec.msgpack.decode(record) for record in packet.records]

    def until(self, wanted: Callable[[int, dict[str, Any]], bool]) -> tuple[int, dict[str, Any]]:
        for _ in range(1000):
            seq, items = self.packet()
            for item in items:
                if wanted(seq, item):
                    return seq, item
        raise AssertionError("not seen in 1000 packets")

    def next_sum(self) -> tuple[int, dict[str, Any]]:
        return self.until(lambda seq, item: seq > 0)

    def ack(self, seq: int) -> None:
        assert self.connection is not None
        self.connection.send(msgspec.msgpack.encode(records.Ack(seq)))

    def close(self) -> None:
        for one in (self.connection, self._listener):
            if one is not None:
                one.close()


class Source:
    """Says what tests put into it."""

    def __init__(self) -> None:
        self.pending: list[records.Record] = []
        self.drained = 0
        self.fields: dict[str, Any] = {
            "engine_name": "vllm",
            "engine_version": "1",
            "model_name": "tiny",
        }

    def hello(self) -> dict[str, Any]:
        return self.fields

    def states(self, everything: bool) -> Iterator[records.Record]:
        yield records.PoolState(at=1, used_blocks=int(everything))

    def sums(self) -> Iterator[records.Record]:
        taken, self.pending = self.pending, []
        self.drained += len(taken)
        yield from taken


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "agent.sock"
    monkeypatch.setattr(settings, "_current", settings.read({"GPUGLASS_SOCKET": str(path)}))
    monkeypatch.setattr(link_module, "INTERVAL", 0.01)
    monkeypatch.setattr(link_module, "RETRY", (0.01, 0.05))
    return path


@pytest.fixture
def agent(path: Path) -> Iterator[Agent]:
    agent = Agent(path)
    yield agent
    agent.close()


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def link(path: Path, source: Source) -> Iterator[Link]:
    link = Link("core", source)
    yield link
    link.stop(timeout=0.1)


def tokens(number: int) -> records.TenantSums:
    return records.TenantSums(tenant="a", output_tokens=number)


def test_hello_comes_first_then_all_states(agent: Agent, link: Link) -> None:
    link.start()
    agent.accept()
    seq, (hello,) = agent.packet()
    assert (seq, hello["type"], hello["role"], hello["version"]) == (0, "hello", "core", records.VERSION)
    assert hello["model_name"] == "tiny"
    assert abs(hello["clock_offset_ns"] - (time.time_ns() - time.monotonic_ns())) < 1e9
    assert agent.until(lambda seq, item: item["type"] == "pool")[1]["used_blocks"] == 1
    assert agent.until(lambda seq, item: item["type"] == "pool")[1]["used_blocks"] == 0


def test_a_changed_hello_is_said_again(agent: Agent, link: Link, source: Source) -> None:
    link.start()
    agent.accept()
    agent.packet()
    source.fields = {**source.fields, "model_name": "other"}
    assert agent.until(lambda seq, item: item["type"] == "hello")[1]["model_name"] == "other"


def test_sums_wait_for_the_acknowledgement(agent: Agent, link: Link, source: Source) -> None:
    source.pending = [tokens(1)]
    link.start()
    agent.accept()
    seq, item = agent.next_sum()
    assert item["output_tokens"] == 1
    source.pending.append(tokens(2))
    time.sleep(0.1)
    assert source.drained == 1, "the second is kept where it is"
    agent.ack(seq)
    assert agent.next_sum() == (seq + 1, {"type": "tenant", "tenant": "a", "output_tokens": 2})


def test_what_was_not_acknowledged_is_sent_again_unchanged(
    agent: Agent, link: Link, source: Source, path: Path
) -> None:
    source.pending = [tokens(1)]
    link.start()
    agent.accept()
    first = agent.next_sum()
    agent.close()
    second_agent = Agent(path)
    source.pending.append(tokens(2))
    second_agent.accept()
    assert second_agent.packet()[1][0]["type"] == "hello"
    assert second_agent.next_sum() == first
    second_agent.ack(first[0])
    assert second_agent.next_sum()[1]["output_tokens"] == 2
    second_agent.close()


def test_an_acknowledgement_before_a_sudden_end_counts(
    agent: Agent, link: Link, source: Source, path: Path
) -> None:
    source.pending = [tokens(1)]
    link.start()
    agent.accept()
    seq, _ = agent.next_sum()
    agent.until(lambda seq, item: item["type"] == "pool")
    with link._lock:  # it reads nothing until the agent has gone
        link._send_packet(0, [])  # what the agent leaves unread, the kernel tells as an error
        agent.ack(seq)
        agent.close()
    second_agent = Agent(path)
    source.pending.append(tokens(2))
    second_agent.accept()
    assert second_agent.next_sum() == (seq + 1, {"type": "tenant", "tenant": "a", "output_tokens": 2})
    second_agent.close()


def end(request_id: str) -> records.RequestEnd:
    return records.RequestEnd(at=2, request_id=request_id, outcome="stop", arrival_ns=1)


def requests_until(agent: Agent, last: str) -> list[tuple[str, str, bool]]:
    """Type, id and `again` of what is told of requests, up to a request."""
    seen = []

    def note(seq: int, item: dict[str, Any]) -> bool:
        if "request_id" in item:
            seen.append((item["type"], item["request_id"], item.get("again", False)))
        return item.get("request_id") == last

    agent.until(note)
    return seen


def test_the_last_ends_are_told_to_the_next_agent_again(
    agent: Agent, link: Link, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "ENDED_SECONDS", 60.0)
    link.start()
    agent.accept()
    link.event(records.RequestStart(at=1, request_id="0"))
    link.event(end("1"))
    link.event(records.RequestAnswered(at=2, request_id="2", outcome="stop", duration_ns=1))
    requests_until(agent, "2")
    with link._lock:
        agent.close()
        link.event(end("3"))
    second_agent = Agent(path)
    second_agent.accept()
    assert requests_until(second_agent, "3") == [
        ("request_end", "1", True),
        ("request_answered", "2", True),
        ("request_end", "3", False),
    ]
    second_agent.close()


def test_ends_of_long_ago_are_not_told_again(
    agent: Agent, link: Link, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "ENDED_SECONDS", 0.0)
    link.start()
    agent.accept()
    link.event(end("1"))
    requests_until(agent, "1")
    for _ in range(3):  # each flush tells of the pool
        agent.until(lambda seq, item: item["type"] == "pool")
    with link._lock:
        agent.close()
        link.event(end("2"))
    second_agent = Agent(path)
    second_agent.accept()
    assert requests_until(second_agent, "2") == [("request_end", "2", False)]
    second_agent.close()


def test_without_an_agent_sums_stay_and_events_are_bounded(
    link: Link, source: Source, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "EVENTS", 3)
    source.pending = [tokens(1)]
    link.start()
    for number in range(5):
        link.event(records.RequestAnswered(at=number, request_id=str(number), outcome="stop", duration_ns=1))
    time.sleep(0.1)
    assert (link.dropped, source.drained) == (2, 0)
    agent = Agent(path)
    agent.accept()
    seen = [agent.until(lambda seq, item: item["type"] == "request_answered")[1]["request_id"]]
    assert seen == ["2"], "the oldest were dropped"
    assert agent.next_sum()[1]["output_tokens"] == 1
    dropped = agent.until(lambda seq, item: item["type"] == "probe")[1]
    assert dropped["dropped"] == 2
    agent.close()


def test_an_agent_that_does_not_read_blocks_nobody(agent: Agent, link: Link, source: Source) -> None:
    link.start()
    agent.accept()
    for number in range(3 * link_module.EVENTS):
        link.event(records.RequestStart(at=number, request_id="r" * 100 + str(number), external_id="e" * 100))
        if number % 500 == 0:
            time.sleep(0.02)
    assert link.dropped > 0
    source.pending = [tokens(7)]
    agent.until(lambda seq, item: item.get("request_id", "").endswith(str(3 * link_module.EVENTS - 1)))
    assert agent.next_sum()[1]["output_tokens"] == 7


def test_more_than_a_packet_is_split(agent: Agent, link: Link, source: Source) -> None:
    names = [f"tenant-{number}".ljust(60, "x") for number in range(2000)]
    source.pending = [records.TenantSums(tenant=name, output_tokens=1) for name in names]
    link.start()
    agent.accept()
    seen: list[str] = []
    packets = 0
    while len(seen) < len(names):
        seq, items = agent.packet()
        if seq:
            packets += 1
            seen += [item["tenant"] for item in items]
    agent.ack(seq)
    assert seen == names
    assert packets > 1


def test_a_record_too_large_for_any_packet_is_left_out(agent: Agent, link: Link, source: Source) -> None:
    source.pending = [records.TenantSums(tenant="x" * 70_000), tokens(3)]
    link.start()
    agent.accept()
    assert agent.next_sum()[1]["output_tokens"] == 3


def test_garbage_from_the_agent_is_passed_over(agent: Agent, link: Link, source: Source) -> None:
    source.pending = [tokens(1)]
    link.start()
    agent.accept()
    seq, _ = agent.next_sum()
    assert agent.connection is not None
    agent.connection.send(b"\xc1garbage")
    agent.connection.send(msgspec.msgpack.encode({"ack": "many"}))
    agent.ack(seq)
    source.pending.append(tokens(2))
    assert agent.next_sum()[1]["output_tokens"] == 2


def test_a_source_that_fails_loses_nothing_that_it_said_before(
    agent: Agent, link: Link, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(everything: bool) -> Iterator[records.Record]:
        raise RuntimeError("ours")
        yield

    def half() -> Iterator[records.Record]:
        yield tokens(1)
        raise RuntimeError("ours as well")

    monkeypatch.setattr(source, "states", fail)
    monkeypatch.setattr(source, "sums", half)
    link.start()
    agent.accept()
    assert agent.next_sum()[1]["output_tokens"] == 1
    assert link.send_errors > 0


def test_stopping_sends_what_is_left(agent: Agent, link: Link, source: Source) -> None:
    link.start()
    agent.accept()
    agent.packet()
    source.pending = [tokens(5)]
    link.stop(timeout=0.1)
    assert agent.next_sum()[1]["output_tokens"] == 5
    with pytest.raises(AssertionError, match="closed"):
        for _ in range(100):
            agent.packet()


def test_a_child_made_by_fork_leaves_the_link_alone(agent: Agent, link: Link, source: Source) -> None:
    link.start()
    agent.accept()
    agent.packet()
    child = os.fork()
    if child == 0:
        link.stop()
        os._exit(0)
    os.waitpid(child, 0)
    source.pending = [tokens(9)]
    assert agent.next_sum()[1]["output_tokens"] == 9
