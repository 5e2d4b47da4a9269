"""Hands what the receiver takes in to the ledger and, by way of the core's `RecordHub`, to other rooms.

A tracer is no part of an engine: the ledger never hears of it.
"""

from __future__ import annotations

import threading

from exporters.vllm.ledger import Ledger
from exporters.vllm.sink import Sender
from gpuglass.exemplar import RequestRef
from gpuglass.record_hub import RecordHub, Speaker
from gpuglass_vllm.records import TRACER, Record


class Relay:
    """Implements `exporters.vllm.sink.Sink` over a ledger and a hub."""

    def __init__(self, ledger: Ledger, hub: RecordHub) -> None:
        self.lock: threading.RLock = ledger.lock
        self._ledger = ledger
        self._hub = hub
        self._speakers: dict[int, Speaker] = {}
        hub.keeps_requests(self.request)

    def hello(self, sender: Sender) -> None:
        """A sender came, or something in its `hello` changed."""
        if sender.hello.role != TRACER:
            self._ledger.hello(sender)
        hello = sender.hello
        speaker = Speaker(
            *(sender.number, sender.pid, sender.uid, hello.role, hello.instance, hello.clock_offset_ns),
            *(hello.rank, hello.engine, sender.gpu_uuid),
            hello.experts.experts if hello.experts is not None else 0,
        )
        if self._speakers.get(sender.number) != speaker:
            self._speakers[sender.number] = speaker
            self._hub.arrived(speaker)

    def take(self, sender: Sender, record: Record, now_ns: int) -> None:
        """One checked record. Raises `Refused`."""
        if sender.hello.role != TRACER:
            self._ledger.take(sender, record, now_ns)
        speaker = self._speakers.get(sender.number)
        if speaker is not None:
            self._hub.told(speaker, record, now_ns)

    def gone(self, sender: Sender) -> None:
        """Its connection ended."""
        if sender.hello.role != TRACER:
            self._ledger.gone(sender)
        speaker = self._speakers.pop(sender.number, None)
        if speaker is not None:
            self._hub.gone(speaker)

    def request(self, instance: str, request_id: str) -> RequestRef | None:
        """What is known of an open request. Call with the lock held."""
        server = self._ledger.servers.get(instance)
        request = server.requests.get(request_id) if server is not None else None
        return request.ref if request is not None else None
