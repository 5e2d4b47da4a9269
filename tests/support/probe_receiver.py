"""A receiver of the record stream for tests of senders: it keeps all it hears, and misbehaves on demand.

In: the path of the socket. Out: records with who sent them, sums taken in once per sender and `seq`, as the
protocol says. It is written from the protocol's description alone and shares no code with the agent's.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gpuglass_vllm import records

R = TypeVar("R")

_ALWAYS = (records.ProbeState, records.PoolState, records.AllocatorState, records.MemoryState)
"""Said even by an engine that does nothing."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One record."""

    sender: str
    role: str
    pid: int
    record: Any


@dataclass(slots=True)
class _Peer:
    pid: int
    hello: records.Hello | None = None


@dataclass
class ProbeReceiver:
    """What was heard so far. All of it may be read while it runs."""

    heard: list[Heard] = field(default_factory=list)
    hellos: list[tuple[int, records.Hello]] = field(default_factory=list)
    """Each with the kernel's pid of its sender."""
    faults: list[str] = field(default_factory=list)
    """Breaches of the protocol."""
    packets: int = 0
    largest: int = 0
    """Bytes of the largest packet."""
    _seen: set[tuple[str, int]] = field(default_factory=set)

    def senders(self) -> dict[str, records.Hello]:
        """The last hello of each sender, by its name."""
        return {hello.sender: hello for _, hello in list(self.hellos)}

    def of(self, kind: type[R], role: str = "") -> list[R]:
        """All records of a kind, oldest first."""
        return [h.record for h in list(self.heard) if isinstance(h.record, kind) and role in ("", h.role)]

    def wait(self, condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = 45) -> Any:
        """Wait until `condition` gives something true; fail otherwise."""
        until = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > until:
                kinds = sorted({type(h.record).__name__ for h in list(self.heard)})
                said = what if isinstance(what, str) else what()
                raise AssertionError(f"{said} did not hold within {seconds:g} s; heard: {kinds}")
            time.sleep(0.02)
        return result

    def settle(self, quiet: float = 0.8, seconds: float = 60) -> None:
        """Wait until nothing new but the probe's own state was said for `quiet` seconds."""
        until = time.monotonic() + seconds
        count, since = -1, time.monotonic()
        while time.monotonic() - since < quiet:
            assert time.monotonic() < until, f"records still come after {seconds:g} s"
            now = sum(not isinstance(h.record, _ALWAYS) for h in list(self.heard))
            if now != count:
                count, since = now, time.monotonic()
            time.sleep(0.02)

    def forget(self) -> None:
        """Forget the records so far, and not who speaks and which sums were taken in."""
        self.heard.clear()

    def tenant(self, name: str = records.NO_TENANT, role: str = "") -> dict[str, Any]:
        """All sums of a tenant added up, `requests` by outcome."""
        total: dict[str, Any] = {"requests": {}}
        for part in self.of(records.TenantSums, role):
            if part.tenant != name:
                continue
            for key in part.__struct_fields__:
                value = getattr(part, key)
                if key == "requests":
                    for outcome, number in value.items():
                        total[key][outcome] = total[key].get(outcome, 0) + number
                elif key != "tenant":
                    total[key] = total.get(key, 0) + value
        return total

    def ended(self, external_id: str) -> list[records.RequestEnd]:
        """Ends of the sequences of a request, by the id that the client gave."""
        ids = {start.request_id for start in self.starts(external_id)}
        return [end for end in self.of(records.RequestEnd) if end.request_id in ids]

    def starts(self, external_id: str) -> list[records.RequestStart]:
        """Starts of the sequences of a request; a start that was told again counts once."""
        found = {s.request_id: s for s in self.of(records.RequestStart) if external_id in s.external_id}
        return list(found.values())

    def _take(self, peer: _Peer, data: bytes) -> int:
        """Take a packet in; the `seq` to acknowledge, or 0."""
        self.packets += 1
        self.largest = max(self.largest, len(data))
        if len(data) > records.MAX_PACKET:
            self.faults.append(f"a packet of {len(data)} bytes")
        try:
            packet = msgspec.msgpack.decode(data, type=records.Packet)
            parts = [msgspec.msgpack.decode(raw, type=records.Record) for raw in packet.records]
        except msgspec.MsgspecError as error:
            self.faults.append(repr(error))
            return 0
        for part in parts:
            if isinstance(part, records.Hello):
                peer.hello = part
                self.hellos.append((peer.pid, part))
            elif peer.hello is None:
                self.faults.append(f"{type(part).__name__} before hello")
            elif isinstance(part, records.Sum) != bool(packet.seq):
                self.faults.append(f"{type(part).__name__} in a packet with seq {packet.seq}")
        if peer.hello is None:
            return 0
        key = (peer.hello.sender, packet.seq)
        if not packet.seq or key not in self._seen:
            self._seen.add(key)
            self.heard += [
                Heard(peer.hello.sender, peer.hello.role, peer.pid, part)
                for part in parts
                if not isinstance(part, records.Hello)
            ]
        return packet.seq


@contextmanager
def running_receiver(
    path: Path, *, into: ProbeReceiver | None = None, reads: bool = True, acknowledges: bool = True
) -> Iterator[ProbeReceiver]:
    """Listen until the block ends; then the socket is gone and all connections are broken.

    `into` goes on with what an earlier receiver knows, as one process would. Without `reads` it accepts
    connections and lets them fill up; without `acknowledges` it takes in and says nothing.
    """
    receiver = into if into is not None else ProbeReceiver()
    with suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(64)
    stop_read, stop_write = os.pipe()
    thread = threading.Thread(
        target=_serve, args=(receiver, listener, stop_read, reads, acknowledges), daemon=True
    )
    thread.start()
    try:
        yield receiver
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        os.write(stop_write, b"x")
        thread.join()
        listener.close()
        os.close(stop_read)
        os.close(stop_write)


def _serve(
    receiver: ProbeReceiver, listener: socket.socket, stop: int, reads: bool, acknowledges: bool
) -> None:
    peers: dict[socket.socket, _Peer] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(stop, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == stop:
                    for peer in peers:
                        peer.close()
                    return
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                    peers[connection] = _Peer(int.from_bytes(credentials[:4], "little"))
                    if reads:
                        selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = key.fileobj  # type: ignore[assignment]
                try:
                    data = connection.recv(2 * records.MAX_PACKET)
                except OSError:
                    data = b""
                if not data:
                    selector.unregister(connection)
                    connection.close()
                    del peers[connection]
                    continue
                seq = receiver._take(peers[connection], data)
                if seq and acknowledges:
                    with suppress(OSError):
                        connection.send(msgspec.msgpack.encode(records.Ack(seq)), socket.MSG_NOSIGNAL)
