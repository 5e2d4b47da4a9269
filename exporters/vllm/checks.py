"""Judges single records of the stream before anything believes them. Pure: a record in, a record or a
`Refused` out.

msgspec has checked the types by then. Here come bounds: lengths of texts and lists, ranges of numbers, words
of closed vocabularies, parallel lists that belong together, times that lie in the future. What each field may
hold is read from the schema once, so that a new field is bounded the day it appears.

Ids and tenants come from clients of the engine, by way of header fields. What cannot be printed in them is
replaced, always in the same way, so that no client can bring the engine's process into disrepute.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from typing import Any, TypeVar

import msgspec

from exporters.vllm.sink import Refusal, Refused
from gpuglass_vllm import records

MAX_TEXT = 256
"""Characters of texts that are no ids: model and server names, versions, reasons."""
MAX_ITEMS = 4096
"""Elements of any list or mapping in a record."""
MAX_CAPABILITIES = 64
MAX_LAYERS = 1024
MAX_CODES = 64
"""Kinds of failure that a process may have met; CUresult has some hundred values."""
MAX_EXPERTS = 4096
MAX_INT = 2**53
"""Largest whole number: beyond it a sample, which is a double, could not hold it. As nanoseconds 104 days."""
MAX_NS = 2**62
"""Largest time in nanoseconds, on any clock."""
MAX_FLOAT = 1e24
"""Largest quantity; FLOPs of a day of 10^18 each second are below 10^23."""
FUTURE_NS = 60 * 10**9
"""How far ahead of our clock a time may lie."""

ROLES = ("frontend", "core", "worker")
"""Roles of an engine's processes; a tracer is none of them."""
CLOCKS = ("cuda", "wall")
STATES = ("active", "unavailable", "disabled")
PLACEMENTS = ("linear", "round_robin", "unknown")
SLEEPERS = frozenset({"weights", "kv_cache", "graphs"})
"""Parts of a worker's memory that can be taken off the device for a while."""

_MAX_CHARACTERS = {
    "request_id": records.MAX_ID,
    "external_id": records.MAX_ID,
    "request_ids": records.MAX_ID,
    "ended": records.MAX_ID,
    "victim": records.MAX_ID,
    "holders": records.MAX_ID,
    "sender": records.MAX_ID,
    "instance": records.MAX_ID,
    "tenant": records.MAX_TENANT,
    "tenants": records.MAX_TENANT,
    "trace_id": 32,
    "span_id": 16,
    "engine": 64,
    "hook": 64,
    "hook_errors": 64,
    "function": 64,
}
_LEAST = {
    "queue_ns": -1,
    "prefill_ns": -1,
    "decode_ns": -1,
    "first_token_ns": -1,
    "rank": -1,
    "waste_tokens": -1,
    "untracked_bytes": -1,
    "weights": -1,
    "kv_cache": -1,
    "graphs": -1,
    "graph_tensors": -1,
    "activation_peak": -1,
}
"""Whole numbers that say "unknown" or "none" by -1."""
_LEAST_ANY = {"clock_offset_ns"}

_OUTCOMES = frozenset(records.OUTCOMES)
_ERROR_TYPES = frozenset(records.ERROR_TYPES)
_CAUSES = frozenset(records.PREEMPTION_CAUSES)
_ENDINGS = _OUTCOMES | {f"{o}/{e}" for o in ("error", "rejected") for e in records.ERROR_TYPES if e}

ROLE_OF: Mapping[type, Collection[str]] = {
    records.RequestStart: ("frontend",),
    records.RequestAnswered: ("frontend",),
    records.RequestRefused: ("frontend",),
    records.RequestTraced: ("frontend",),
    records.RequestProgress: ("core",),
    records.RequestEnd: ("core",),
    records.Preemption: ("core",),
    records.PoolState: ("core",),
    records.CoreSums: ("core",),
    records.GpuProgress: ("worker",),
    records.StepSums: ("worker",),
    records.ExpertSums: ("worker",),
    records.HotExperts: ("worker",),
    records.AllocatorState: ("worker",),
    records.MemoryState: ("worker",),
    records.OutOfMemory: ("worker",),
    records.StepSample: ("worker",),
    records.PrefillChunks: ("worker",),
    records.StepKernels: ("worker",),
    records.CudaProcess: (records.TRACER,),
    records.CudaStack: (records.TRACER,),
    records.CudaEvent: (records.TRACER,),
    records.TenantSums: ROLES,
    records.ProbeState: (*ROLES, records.TRACER),
}
"""Which roles may say what: a frontend cannot know blocks. A server in one process connects once per role."""

_UNPRINTABLE = "unprintable"
_Verdict = Refusal | str | None
"""Why a value is refused, `_UNPRINTABLE` if it has to be cleaned, or None."""
_Check = Callable[[Any], _Verdict]
R = TypeVar("R", bound=msgspec.Struct)


def check(record: records.Record, hello: records.Hello, now_ns: int) -> records.Record:
    """The record as it may be taken in; raises `Refused` if it may not.

    `hello` is the sender's. `now_ns` is CLOCK_MONOTONIC; records are on the same clock.
    """
    kind = type(record)
    record = _bounded(record)
    if hello.role not in ROLE_OF.get(kind, ROLES):
        raise Refused(Refusal.WRONG_ROLE)
    at: int = getattr(record, "at", 0)
    if at > now_ns + FUTURE_NS:
        raise Refused(Refusal.BAD_TIME)
    special = _SPECIAL.get(kind)
    if special is not None and not special(record, hello):
        raise Refused(Refusal.OUT_OF_RANGE)
    return record


def check_hello(hello: records.Hello) -> records.Hello:
    """The `Hello` as it may be taken in, long texts shortened; raises `Refused` if it names nobody or is out
    of bounds."""
    if hello.version != records.VERSION:
        raise Refused(Refusal.VERSION)
    hello = _bounded(_shortened(hello))
    if not hello.sender or not hello.instance:
        raise Refused(Refusal.BAD_TEXT)
    experts = hello.experts
    fits = (
        (hello.role in ROLES or hello.role == records.TRACER)
        and len(hello.capabilities) <= MAX_CAPABILITIES
        and all(capability.state in STATES for capability in hello.capabilities)
        and (
            experts is None
            or (
                len(experts.layers) <= MAX_LAYERS
                and 0 < experts.experts <= MAX_EXPERTS
                and 0 < experts.top_k <= experts.experts
                and experts.every > 0
                and 0 < experts.ranks <= experts.experts
                and experts.placement in PLACEMENTS
            )
        )
        and (hello.pool is None or hello.pool.blocks > 0)
    )
    if not fits:
        raise Refused(Refusal.OUT_OF_RANGE)
    return hello


def _bounded(record: R) -> R:
    """The record with what cannot be printed replaced; raises `Refused` for what is out of bounds."""
    must_clean = False
    for name, judge in _FIELDS[type(record)]:
        verdict = judge(getattr(record, name))
        if isinstance(verdict, Refusal):
            raise Refused(verdict)
        must_clean = must_clean or verdict is not None
    if not must_clean:
        return record
    cleaned = msgspec.to_builtins(record, builtin_types=(bytes,))
    # Another field may be out of bounds behind the one that was found: all are judged again.
    return _bounded(msgspec.convert(_printable(cleaned), type(record)))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return "".join(char if char.isprintable() else "\ufffd" for char in value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


def _shortened(hello: records.Hello) -> records.Hello:
    """Texts for people are cut: a model's path may be as long as it likes."""
    if max(
        map(len, (*(getattr(hello, name) for name in _FREE), *(c.reason for c in hello.capabilities)))
    ) <= (MAX_TEXT):
        return hello
    changes: dict[str, Any] = {name: getattr(hello, name)[:MAX_TEXT] for name in _FREE}
    capabilities = [
        msgspec.structs.replace(capability, reason=capability.reason[:MAX_TEXT])
        for capability in hello.capabilities[: MAX_CAPABILITIES + 1]
    ]
    return msgspec.structs.replace(hello, capabilities=capabilities, **changes)


_FREE = ("model_name", "server", "engine_name", "engine_version", "software", "device_name")


# Fields, by their types


def _worst(verdicts: Iterable[_Verdict]) -> _Verdict:
    """A refusal if there is one, else whether to clean."""
    worst: _Verdict = None
    for verdict in verdicts:
        if isinstance(verdict, Refusal):
            return verdict
        worst = verdict or worst
    return worst


def _text(limit: int) -> _Check:
    def judge(value: str) -> _Verdict:
        if len(value) > limit:
            return Refusal.BAD_TEXT
        return None if value.isprintable() else _UNPRINTABLE

    return judge


def _whole(least: int, most: int) -> _Check:
    def judge(value: int) -> _Verdict:
        return None if least <= value <= most else Refusal.OUT_OF_RANGE

    return judge


def _quantity(value: float) -> _Verdict:
    # NaN fails both comparisons.
    return None if 0 <= value <= MAX_FLOAT else Refusal.OUT_OF_RANGE


def _any(value: object) -> _Verdict:
    return None


def _list(of: _Check) -> _Check:
    def judge(value: Collection[Any]) -> _Verdict:
        if len(value) > MAX_ITEMS:
            return Refusal.OUT_OF_RANGE
        return _worst(map(of, value))

    return judge


def _mapping(key: _Check, of: _Check) -> _Check:
    def judge(value: Mapping[Any, Any]) -> _Verdict:
        if len(value) > MAX_ITEMS:
            return Refusal.OUT_OF_RANGE
        return _worst(chain(map(key, value), map(of, value.values())))

    return judge


def _struct(fields: tuple[tuple[str, _Check], ...]) -> _Check:
    def judge(value: object) -> _Verdict:
        if value is None:
            return None
        return _worst(of(getattr(value, name)) for name, of in fields)

    return judge


def _of(name: str, kind: Any) -> _Check:
    if kind is str:
        return _text(_MAX_CHARACTERS.get(name, MAX_TEXT))
    if kind is int:
        is_time = name == "at" or name.endswith("_ns")
        most = MAX_NS if is_time else MAX_INT
        return _whole(-MAX_NS if name in _LEAST_ANY else _LEAST.get(name, 0), most)
    if kind is float:
        return _quantity
    if kind in (bool, bytes):
        return _any
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return _list(_of(name, arguments[0]))
    if origin is dict:
        return _mapping(_of(name, arguments[0]), _of(name, arguments[1]))
    if origin in (typing.Union, types.UnionType) and type(None) in arguments:
        (kind,) = (argument for argument in arguments if argument is not type(None))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _struct(_fields(kind))
    raise TypeError(f"{name}: no bounds for {kind}")


def _fields(kind: type[msgspec.Struct]) -> tuple[tuple[str, _Check], ...]:
    found = ((info.name, _of(info.name, info.type)) for info in msgspec.structs.fields(kind))
    return tuple((name, judge) for name, judge in found if judge is not _any)


_FIELDS = {kind: _fields(kind) for kind in typing.get_args(records.Record)}


# What belongs together


def _answered(record: records.RequestAnswered, hello: records.Hello) -> bool:
    return record.outcome in _OUTCOMES and record.error_type in _ERROR_TYPES


def _refused(record: records.RequestRefused, hello: records.Hello) -> bool:
    return record.error_type in _ERROR_TYPES


def _start(record: records.RequestStart, hello: records.Hello) -> bool:
    return bool(record.request_id)


def _progress(record: records.RequestProgress, hello: records.Hello) -> bool:
    # One block more than there are, for sums of many fractions.
    blocks = math.inf if hello.pool is None else hello.pool.blocks + 1
    return bool(record.request_id) and record.blocks <= blocks and record.peak_blocks <= blocks


def _end(record: records.RequestEnd, hello: records.Hello) -> bool:
    return record.outcome in _OUTCOMES and record.error_type in _ERROR_TYPES and bool(record.request_id)


def _gpu_progress(record: records.GpuProgress, hello: records.Hello) -> bool:
    count = len(record.request_ids)
    return len(record.gpu_ns) == count and len(record.recompute_ns) in (0, count)


def _preemption(record: records.Preemption, hello: records.Hello) -> bool:
    return record.cause in _CAUSES and len(record.holders) == len(record.holder_blocks) <= 3


def _tenant(record: records.TenantSums, hello: records.Hello) -> bool:
    return record.requests.keys() <= _ENDINGS


def _core(record: records.CoreSums, hello: records.Hello) -> bool:
    evictions = len(record.evictions) in (0, len(records.EVICT_SECONDS) + 1)
    return evictions and record.preemptions.keys() <= _CAUSES


def _steps(record: records.StepSums, hello: records.Hello) -> bool:
    return (
        record.clock in CLOCKS
        and len(record.seconds) in (0, len(records.STEP_SECONDS) + 1)
        and len(record.requests) in (0, len(records.BATCH_REQUESTS) + 1)
    )


def _memory(record: records.MemoryState, hello: records.Hello) -> bool:
    return record.graph_tensors <= record.graphs and SLEEPERS.issuperset(record.asleep)


def _experts(record: records.ExpertSums, hello: records.Hello) -> bool:
    if hello.experts is None or record.counted_tokens > record.seen_tokens:
        return False
    layers, rest = divmod(len(record.counts), 4 * hello.experts.experts)
    return not rest and layers > 0 and record.first + layers <= len(hello.experts.layers)


def _hot_experts(record: records.HotExperts, hello: records.Hello) -> bool:
    described = hello.experts
    return (
        described is not None
        and len(record.layers) == len(record.experts) == len(record.counts)
        and all(layer < len(described.layers) for layer in record.layers)
        and all(expert < described.experts for expert in record.experts)
        and all(len(counts) == len(record.tenants) for counts in record.counts)
    )


def _out_of_memory(record: records.OutOfMemory, hello: records.Hello) -> bool:
    return len(record.request_ids) <= 16 and len(record.tokens) in (0, len(record.request_ids))


def _step(record: records.StepSample, hello: records.Hello) -> bool:
    count = len(record.request_ids)
    return (
        record.kind in records.STEP_KINDS
        and count <= records.MAX_STEP_REQUESTS
        and len(record.tokens) == count
        and len(record.phases) in (0, count)
        and len(record.gpu_ns) in (0, count)
        and all(phase in records.STEP_PHASES for phase in record.phases)
        and record.tid > 0
        and record.begin_ns <= record.at
        and record.gpu_begin_ns <= record.gpu_end_ns
    )


def _prefill(record: records.PrefillChunks, hello: records.Hello) -> bool:
    count = len(record.request_ids)
    return (
        count <= records.MAX_CHUNKS
        and len(record.begin_ns) == len(record.end_ns) == len(record.tokens) == count
        and len(record.gpu_ns) in (0, count)
        and all(begin <= end for begin, end in zip(record.begin_ns, record.end_ns, strict=True))
    )


def _kernels(record: records.StepKernels, hello: records.Hello) -> bool:
    count = len(record.names)
    return (
        count <= records.MAX_KERNELS
        and len(record.streams) == len(record.begin_ns) == len(record.duration_ns) == count
        and len(record.device_ns) in (0, count)
        and record.begun_ns <= record.ended_ns
    )


def _traced(record: records.RequestTraced, hello: records.Hello) -> bool:
    return bool(record.request_id) and len(record.trace_id) == 32 and len(record.span_id) == 16


def _cuda_process(record: records.CudaProcess, hello: records.Hello) -> bool:
    kinds = [memory.kind for memory in record.memory]
    return (
        record.pid > 0
        and len(kinds) == len(set(kinds))
        and len(record.stacks) <= records.MAX_STACKS
        and all(kind in records.MEMORY_KINDS for kind in kinds)
        and all(len(memory.failures) <= MAX_CODES for memory in record.memory)
        and all(owner.kind in records.MEMORY_KINDS for owner in record.stacks)
    )


def _cuda_stack(record: records.CudaStack, hello: records.Hello) -> bool:
    return record.stack > 0 and len(record.frames) <= records.MAX_FRAMES


def _cuda_event(record: records.CudaEvent, hello: records.Hello) -> bool:
    return (
        record.pid > 0
        and record.tid > 0
        and record.kind in records.MEMORY_KINDS
        and record.reason in records.CUDA_EVENT_REASONS
        and record.begin_ns <= record.at
    )


_SPECIAL: Mapping[type, Callable[[Any, records.Hello], bool]] = {
    records.RequestStart: _start,
    records.RequestAnswered: _answered,
    records.RequestRefused: _refused,
    records.RequestProgress: _progress,
    records.RequestEnd: _end,
    records.GpuProgress: _gpu_progress,
    records.Preemption: _preemption,
    records.TenantSums: _tenant,
    records.CoreSums: _core,
    records.StepSums: _steps,
    records.ExpertSums: _experts,
    records.HotExperts: _hot_experts,
    records.MemoryState: _memory,
    records.OutOfMemory: _out_of_memory,
    records.StepSample: _step,
    records.PrefillChunks: _prefill,
    records.StepKernels: _kernels,
    records.RequestTraced: _traced,
    records.CudaProcess: _cuda_process,
    records.CudaStack: _cuda_stack,
    records.CudaEvent: _cuda_event,
}


TAGS: Mapping[type, str] = {kind: str(kind.__struct_config__.tag) for kind in typing.get_args(records.Record)}
"""The `type` that each kind of record carries."""
