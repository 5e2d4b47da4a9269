"""Fuzzing: random records and mutated packets against the running receiver and the real ledger.

Whatever comes, the receiver's thread lives, a sender who means well is heard afterwards, the samples can be
made, and memory stays bounded.
"""

from __future__ import annotations

import os
import random
import time
import tracemalloc
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ebpf.verdict.part import PUBLISH_EVERY, CudaPart
from exporters.vllm import checks, receiver
from exporters.vllm.ledger import Ledger, LedgerSettings
from exporters.vllm.probe_publish import probe_batch
from exporters.vllm.publish import fast_batch, slow_batch
from exporters.vllm.relay import Relay
from exporters.vllm.senders import Memory
from exporters.vllm.sink import Refused
from gpuglass import catalog
from gpuglass.config import Config, LimitsConfig
from gpuglass.family import Batch, Owner, Tier
from gpuglass.record_hub import RecordHub
from gpuglass.store import Store, negotiate
from gpuglass_vllm import records
from tests.exporters.vllm.receiver_rig import ENCODER, Raw, Rig, hello, progress, running_receiver, tenant
from tests.exporters.vllm.test_receiver_tracer import proc_of

LIMITS = LimitsConfig(records_per_second=100_000, kilobytes_per_second=100_000)
NUMBERS = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.sampled_from([0, 1, -1, 2**53, 1e308, 5e-324]),
)
TEXTS = st.one_of(
    st.text(max_size=80),
    st.sampled_from(["a", "r1", "r2", "stop", "error/engine", "kv_full", "cuda", "x" * 300]),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.binary(max_size=64)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=10,
)


def fitting(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, sensible and extreme ones."""
    if kind is int:
        return st.integers(-2, 2000) | NUMBERS
    if kind is float:
        return st.floats(0, 100) | st.floats()
    if kind is str:
        return TEXTS
    if kind is bool:
        return st.booleans()
    if kind is bytes:
        return st.binary(max_size=64) | st.just(bytes(64))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return st.lists(fitting(arguments[0]), max_size=20)
    if origin is dict:
        return st.dictionaries(fitting(arguments[0]), fitting(arguments[1]), max_size=5)
    inner = [argument for argument in arguments if argument is not type(None)]
    return of(inner[0] if inner else kind) | st.none()


def of(kind: type[msgspec.Struct]) -> st.SearchStrategy[dict[str, Any]]:
    """Maps of a record's fields: required ones, any of the others, now and then something else entirely."""
    required: dict[str, st.SearchStrategy[Any]] = {}
    optional: dict[str, st.SearchStrategy[Any]] = {}
    for info in msgspec.structs.fields(kind):
        is_required = info.default is msgspec.NODEFAULT and info.default_factory is msgspec.NODEFAULT
        (required if is_required else optional)[info.name] = st.one_of(*[fitting(info.type)] * 9, ANYTHING)
    tag = kind.__struct_config__.tag
    head = {} if tag is None else {"type": st.just(tag)}
    return st.fixed_dictionaries(head | required, optional=optional)


RECORDS = st.one_of(*(of(kind) for kind in typing.get_args(records.Record)), ANYTHING)
ROLES = st.sampled_from((*checks.ROLES, records.TRACER))
TRACED = (records.CudaProcess, records.CudaStack, records.CudaEvent)
"""What a tracer alone may tell."""
EXPERTS = {"layers": [0, 1], "experts": 8, "top_k": 2, "every": 1}


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A receiver over the real ledger that lets anybody come as often as he likes."""
    monkeypatch.setattr(receiver, "ARRIVALS_BURST", 1e9)
    ledger = Ledger(LedgerSettings(requests=50, tenants=5))
    with running_receiver(tmp_path, ledger, limits=LIMITS) as running:
        yield running


@dataclass
class Traced:
    """A receiver that believes tracers, and the part that makes verdicts of what they tell."""

    rig: Rig
    hub: RecordHub
    part: CudaPart


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    monkeypatch.setattr(receiver, "ARRIVALS_BURST", 1e9)
    hub = RecordHub()
    part = CudaPart(Config(), Store(catalog.owned_by(Owner.AGENT)), hub)
    relay = Relay(Ledger(LedgerSettings(requests=50, tenants=5)), hub)
    with running_receiver(
        tmp_path, relay, proc=proc_of(tmp_path), limits=LIMITS, tracer_uids=(os.getuid(),)
    ) as running:
        yield Traced(running, hub, part)


def expose(rig: Rig) -> bytes:
    """All samples, as a scrape would get them."""
    ledger: Any = rig.sink
    store = Store(catalog.owned_by(Owner.AGENT))
    with ledger.lock:
        ledger.tick(time.monotonic_ns())
        store.publish("fast", fast_batch(ledger, Batch()))
        store.publish("slow", slow_batch(ledger, Batch(), time.monotonic_ns()))
        store.publish("probe", probe_batch(rig.receiver, Batch()))
    return store.exposition(frozenset(Tier), negotiate("application/openmetrics-text;version=1.0.0"))


def offer(sender: Raw, seq: int, items: list[Any]) -> bool:
    """Send a packet, if it is not too large for one; whether the receiver still listens."""
    data = ENCODER.encode({"seq": seq, "records": items})
    try:
        if len(data) <= records.MAX_PACKET:
            sender.bytes(data)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def finish(rig: Rig, sender: Raw) -> None:
    """See that a packet was dealt with: the receiver is alive and has read what came before."""
    sender.close()
    rig.works()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    role=ROLES,
    packets=st.lists(st.tuples(st.integers(0, 5), st.lists(RECORDS, max_size=8)), max_size=4),
    sender=st.sampled_from(["a", "b", "c"]),
)
def test_any_records_are_taken_or_refused(
    rig: Rig, role: str, packets: list[tuple[int, list[Any]]], sender: str
) -> None:
    raw = rig.connect(hello(role=role, sender=f"{sender}-{role}", experts=EXPERTS, instance="fuzz"))
    for seq, items in packets:
        if not offer(raw, seq, items):
            break  # shown out for garbage
    finish(rig, raw)
    assert rig.receiver.counts.refused["internal"] == 0  # type: ignore[index]
    assert expose(rig).endswith(b"# EOF\n")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    packets=st.lists(
        st.lists(st.one_of(*map(of, TRACED), RECORDS), min_size=1, max_size=8), min_size=1, max_size=4
    ),
    sender=st.sampled_from(["a", "b"]),
)
@example(
    packets=[[{"type": "cuda_process", "at": 1, "pid": 7, "start_ticks": 1, "tracking_since_ns": 1}]],
    sender="a",
)
def test_any_records_of_a_tracer_are_taken_or_refused(
    traced: Traced, packets: list[list[Any]], sender: str
) -> None:
    rig = traced.rig
    before = rig.receiver.counts.refused["not_allowed"]  # type: ignore[index]
    raw = rig.connect(hello(role=records.TRACER, sender=sender, pool=None, instance="fuzz"))
    for items in packets:
        if not offer(raw, 0, items):
            break
    finish(rig, raw)
    for _ in range(PUBLISH_EVERY):
        traced.part.round()
    assert rig.receiver.counts.refused["not_allowed"] == before  # type: ignore[index]
    assert rig.receiver.counts.refused["internal"] == 0  # type: ignore[index]
    assert not traced.hub._failed, "a listener failed"
    assert rig.receiver.counts.records["cuda_process"] > 0


@settings(max_examples=300, deadline=None)
@given(role=ROLES, record=st.one_of(RECORDS, *map(of, TRACED)))
def test_what_passes_the_checks_is_within_bounds(role: str, record: Any) -> None:
    who = msgspec.convert(hello(role=role, experts=EXPERTS), records.Hello)
    try:
        decoded = msgspec.msgpack.decode(ENCODER.encode(record), type=records.Record)
        if isinstance(decoded, records.Hello):
            taken: records.Record = checks.check_hello(decoded)
        else:
            taken = checks.check(decoded, who, 10**9)
    except (msgspec.MsgspecError, Refused, OverflowError):
        return
    for value in _leaves(msgspec.to_builtins(taken, builtin_types=(bytes,))):
        if isinstance(value, str):
            assert len(value) <= checks.MAX_TEXT
            assert value.isprintable()
        elif isinstance(value, (int, float)):
            assert -checks.MAX_NS <= value <= checks.MAX_FLOAT


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A packet with a few bytes changed, cut, repeated or put in."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0 if out:
                out[at % len(out)] = rng.randrange(256)
            case 1 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 2:
                del out[at : at + rng.randint(1, 20)]
            case 3:
                out[at:at] = rng.randbytes(rng.randint(1, 20))
            case _:
                out[at:at] = out[at : at + rng.randint(1, 50)]
    return bytes(out) or b"\x00"


def test_mutated_packets_do_no_harm(rig: Rig) -> None:
    rng = random.Random(7)
    now = time.monotonic_ns()
    greeting = hello(experts=EXPERTS, instance="bytes")
    packets = [
        ENCODER.encode({"seq": 0, "records": [greeting, progress(at=now), progress("other", tenant="b")]}),
        ENCODER.encode({"seq": 3, "records": [tenant(4), {"type": "core", "evictions": [1] * 15}]}),
        ENCODER.encode({"seq": 0, "records": [{"type": "pool", "at": now, "used_blocks": 5}]}),
        ENCODER.encode(
            {"seq": 0, "records": [{"type": "request_end", "at": now, "request_id": "r", "outcome": "stop"}]}
        ),
    ]
    for _ in range(1500):
        raw = rig.connect()
        try:
            for packet in packets:
                raw.bytes(mutated(packet, rng) if rng.random() < 0.6 else packet)
        except (BrokenPipeError, ConnectionResetError):
            pass
        raw.close()
    rig.works()
    assert rig.receiver.counts.refused["internal"] == 0  # type: ignore[index]
    assert rig.receiver.counts.refused.total() > 1000
    assert rig.receiver.counts.records["request_progress"] > 100
    assert expose(rig).endswith(b"# EOF\n")


def test_memory_stays_bounded_under_invented_names(rig: Rig) -> None:
    rig.receiver._memory = Memory(size=1000, per_user=200)
    ledger: Any = rig.sink

    def flood(rounds: range) -> int:
        """Bytes in use after so many senders have come, told much and gone."""
        for number in rounds:
            raw = rig.connect(hello(sender=f"s{number}", instance=f"i{number}", model_name=f"m{number}"))
            raw.send(*(progress(f"r{number}-{n}", tenant=f"t{number}-{n}") for n in range(20)))
            raw.send(*(tenant(1, f"t{number}-{n}") for n in range(20)), seq=1)
            raw.ack()
            raw.close()
            rig._senders.clear()
        rig.wait(lambda: not rig.receiver._connections)
        with ledger.lock:
            ledger.tick(time.monotonic_ns() + rounds.stop * 10**9)  # each a few minutes after the last
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = flood(range(400))
        second = flood(range(400, 800))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rig.receiver._memory) == 200
    assert second - first < 200_000
    assert most > second + 1_000_000  # there was something to forget
