"""A running receiver for tests: its real thread on a real socket, with a sink that notes what it is given.

Senders are raw: they send exactly the bytes that a test wants.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from exporters.vllm import receiver as module
from exporters.vllm.peers import Peer, Peers
from exporters.vllm.receiver import Receiver
from exporters.vllm.sink import Refusal, Sender
from gpuglass.config import Config, EnginesConfig, KubernetesConfig
from gpuglass.gpu_processes import GpuProcesses
from gpuglass_vllm import records
from tests.support.node import FakeProc

ENCODER = msgspec.msgpack.Encoder()
HELLO: dict[str, Any] = {
    **{"type": "hello", "version": records.VERSION, "sender": "sender-1", "instance": "instance-1"},
    **{"role": "core", "engine_name": "vllm", "engine_version": "0.32.0", "software": "test/1"},
    **{
        "model_name": "model",
        "clock_offset_ns": 0,
        "pool": {"blocks": 100, "block_bytes": 1, "block_tokens": 16},
    },
}


def hello(**changes: Any) -> dict[str, Any]:
    """A `Hello` as it is on the wire."""
    return HELLO | changes


def tenant(tokens: int = 1, name: str = "a") -> dict[str, Any]:
    """A sum."""
    return {"type": "tenant", "tenant": name, "output_tokens": tokens}


def progress(request: str = "r", **changes: Any) -> dict[str, Any]:
    """A state."""
    return {"type": "request_progress", "at": 1, "request_id": request, "blocks": 1.0} | changes


@dataclass
class Noted:
    """A sink that keeps everything."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    hellos: list[Sender] = field(default_factory=list)
    taken: list[tuple[Sender, Any]] = field(default_factory=list)
    left: list[Sender] = field(default_factory=list)
    react: Callable[[Any], None] = lambda record: None

    def hello(self, sender: Sender) -> None:
        """As in `Sink`."""
        self.hellos.append(sender)

    def take(self, sender: Sender, record: Any, now_ns: int) -> None:
        """As in `Sink`; `react` may raise."""
        self.react(record)
        self.taken.append((sender, record))

    def gone(self, sender: Sender) -> None:
        """As in `Sink`."""
        self.left.append(sender)

    @property
    def records(self) -> list[Any]:
        """What was taken in, in order."""
        return [record for _, record in self.taken]

    @property
    def tokens(self) -> int:
        """Sum over all tenant sums."""
        return sum(record.output_tokens for record in self.records if isinstance(record, records.TenantSums))


class Raw:
    """A sender that sends what it is told."""

    def __init__(self, path: Path | str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Blocking until it is connected: with a timeout a full queue of the listener would be an error.
        self.socket.connect(str(path))
        self.socket.settimeout(10)

    def bytes(self, data: bytes) -> None:
        """One packet of any bytes."""
        self.socket.send(data)

    def send(self, *items: Any, seq: int = 0) -> None:
        """One packet of records."""
        self.bytes(ENCODER.encode({"seq": seq, "records": items}))

    def ack(self) -> int:
        """The next acknowledgement; raises TimeoutError or EOFError."""
        data = self.socket.recv(256)
        if not data:
            raise EOFError
        return msgspec.msgpack.decode(data, type=records.Ack).ack

    def is_closed(self) -> bool:
        """Whether the receiver ended the connection, waiting up to 10 s for it."""
        try:
            while self.socket.recv(256):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Leave."""
        self.socket.close()


@dataclass
class Rig:
    """A receiver at work."""

    receiver: Receiver
    sink: Noted
    path: Path
    gpu_processes: GpuProcesses
    _senders: list[Raw] = field(default_factory=list)

    def connect(self, *first: dict[str, Any]) -> Raw:
        """A new connection, and the records of its first packet."""
        sender = Raw(self.path)
        self._senders.append(sender)
        if first:
            sender.send(*first)
        return sender

    def refused(self, reason: Refusal) -> int:
        """How often the receiver refused something for a reason."""
        with self.sink.lock:
            return self.receiver.counts.refused[reason]

    def refusals(self) -> dict[Refusal, int]:
        """All that was refused so far."""
        with self.sink.lock:
            return dict(self.receiver.counts.refused)

    def wait(self, condition: Callable[[], Any], seconds: float = 10) -> Any:
        """Wait until something holds."""
        until = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > until:
                counts = self.receiver.counts
                raise AssertionError(f"did not come true within {seconds:g} s; {counts}, {self.sink.taken}")
            time.sleep(0.005)
        return result

    def works(self) -> None:
        """See that a new sender is heard and acknowledged."""
        sender = self.connect(hello(sender=f"works-{os.urandom(4).hex()}"))
        sender.send(tenant(0), seq=1)
        assert sender.ack() == 1
        sender.close()


@contextmanager
def running_receiver(
    tmp_path: Path,
    sink: Any = None,
    proc: FakeProc | None = None,
    container_logs: str = "/nonexistent",
    **engines: Any,
) -> Iterator[Rig]:
    """Run a receiver on `tmp_path/agent.sock`."""
    path = tmp_path / "agent.sock"
    settings = {"socket": str(path)} | engines
    config = Config(
        engines=msgspec.structs.replace(EnginesConfig(), **settings),
        kubernetes=KubernetesConfig(container_logs=container_logs, pod_logs="/nonexistent"),
        proc=str((proc or FakeProc(tmp_path / "proc")).root),
    )
    gpu_processes = GpuProcesses()
    noted = Noted() if sink is None else sink
    receiver = Receiver(config.engines, noted, Peers(config, gpu_processes))
    receiver.start()
    rig = Rig(receiver, noted, path, gpu_processes)
    try:
        yield rig
    finally:
        assert receiver.stop(10), "the receiver's thread is stuck"
        for sender in rig._senders:
            sender.close()


def as_uid(monkeypatch: Any, uid: int, pid: int | None = None) -> None:
    """Let later connections come from another user."""

    def peer_of(connection: socket.socket) -> Peer:
        return Peer(os.getpid() if pid is None else pid, uid, uid)

    monkeypatch.setattr(module, "peer_of", peer_of)
