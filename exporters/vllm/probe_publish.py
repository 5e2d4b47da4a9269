"""Samples about the record stream itself. Reads only; call with the sink's lock held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from exporters.vllm.receiver import Receiver
from exporters.vllm.sink import Sender
from gpuglass.families import probe as families
from gpuglass.family import Batch, Histogram

MAX_HOOKS = 64
"""Hooks of a sender whose errors have series."""
MAX_REASON = 120
"""Characters of a reason in a label."""
NAME_LENGTH = 12
"""Characters of a sender's random name in a label."""


def probe_batch(receiver: Receiver, previous: Batch) -> Batch:
    """All samples of the families in `gpuglass.families.probe`."""
    batch = Batch(previous=previous.samples)
    senders = receiver.senders()
    _receiver(batch, receiver, senders)
    names: set[str] = set()
    for sender in senders:
        _sender(batch, sender, _name(sender, names))
    _capabilities(batch, senders)
    return batch


def _receiver(batch: Batch, receiver: Receiver, senders: Iterable[Sender]) -> None:
    counts = receiver.counts
    batch.add(families.UP, int(not receiver.down), receiver.down)
    roles = Counter(sender.hello.role for sender in senders)
    roles["unknown"] = receiver.unknown()
    for role, number in sorted(roles.items()):
        batch.add(families.SENDERS, number, role)
    for kind, number in sorted(counts.records.items()):
        batch.add(families.RECORDS, number, kind)
    for reason, number in sorted(counts.refused.items()):
        batch.add(families.REFUSED, number, reason.value)
    batch.add(families.CONNECTIONS, counts.connections)
    batch.add(families.PACKETS, counts.packets)
    batch.add(families.BYTES, counts.received_bytes)
    batch.add(families.REPEATED, counts.repeated)
    batch.add(families.PAUSES, counts.pauses)
    batch.add(families.UNSENT_ACKS, counts.unsent_acks)
    batch.add_histogram(families.LAG, Histogram(counts.lag, round(counts.lag_seconds, 6)))


def _name(sender: Sender, taken: set[str]) -> str:
    """The beginning of a sender's name; with the connection's number if another one begins like it."""
    name = sender.hello.sender[:NAME_LENGTH]
    if name in taken:
        name = f"{name}-{sender.number}"
    taken.add(name)
    return name


def _engine(sender: Sender) -> tuple[str, ...]:
    hello = sender.hello
    return hello.model_name, hello.engine, hello.server, *sender.workload


def _sender(batch: Batch, sender: Sender, name: str) -> None:
    hello, probe = sender.hello, sender.probe
    rank = "" if hello.rank < 0 else str(hello.rank)
    scope = batch.scoped(*_engine(sender), hello.role, rank, name)
    scope.add(
        families.INFO,
        1,
        hello.engine_name,
        hello.engine_version,
        hello.software,
        hello.device_name,
        sender.gpu_uuid,
        sender.claim.value,
    )
    if probe is None:
        return
    scope.add(families.DROPPED, probe.dropped)
    scope.add(families.SEND_ERRORS, probe.send_errors)
    scope.add(families.HOOK_SECONDS, round(probe.hook_ns / 1e9, 3))
    for hook, errors in sorted(probe.hook_errors.items())[:MAX_HOOKS]:
        scope.add(families.HOOK_ERRORS, errors, hook)


def _capabilities(batch: Batch, senders: Iterable[Sender]) -> None:
    processes: Counter[tuple[str, ...]] = Counter()
    for sender in senders:
        processes.update(
            {
                (*_engine(sender), sender.hello.role, c.hook, c.state, c.reason[:MAX_REASON])
                for c in sender.hello.capabilities
            }
        )
    for key, number in processes.items():
        batch.add(families.CAPABILITY, number, *key)
