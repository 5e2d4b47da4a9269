"""The connection to the agent: one per role, one thread, never in the engine's way.

The engine's threads only append to a bounded queue. About four times a second the link's thread collects
events, states and sums, packs them and sends what the socket takes at once. Whatever the agent does or does
not do, the engine sees nothing of it: a full or missing socket leaves sums where they are and drops the
oldest events.

The thread holds the interpreter's lock in short stretches only, because the engine's thread wants it: between
groups of records it gives way.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import util as multiprocessing_util
from typing import Any, Protocol

import msgspec

from gpuglass_vllm import __version__, records, settings
from gpuglass_vllm.hooks import table

logger = logging.getLogger("gpuglass_vllm")

INTERVAL = 0.25
"""Seconds between flushes."""
RETRY = (0.25, 5.0)
"""Seconds until the first and, doubled each time, the last attempt to connect again."""
EVENTS = 4096
"""Events kept while they cannot be sent."""
ENDED_SECONDS, ENDED = 2.0, 1024
"""Ends of requests that are told again to the next agent: those of the last seconds before the connection
broke, and how many at most. The agent that went may have heard one half of them only, and waited so long for
the other one."""
STATE_INTERVAL = 1.0
"""Seconds between reports of the probe's own state."""
_GIVE_WAY = 32
"""Records made or packed before the thread gives way."""
_PAUSE = 0.0002
"""Seconds that it gives: a thread that waits for the interpreter's lock needs some time to wake up."""
_PACKET = records.MAX_PACKET - 64
"""Bytes of records in a packet: room for the map around them."""


class Source(Protocol):
    """What a role has to tell. All methods are called on the link's thread."""

    def hello(self) -> dict[str, Any]:
        """Fields of `records.Hello` that the role knows: model_name, engine, rank, pool, …"""

    def states(self, everything: bool) -> Iterable[records.Record]:
        """What has changed since the last call; all of it if `everything` (a new connection)."""

    def sums(self) -> Iterable[records.Record]:
        """Increases since the last call; each is handed out exactly once."""


def give_way() -> None:
    """Let the engine's thread have the interpreter, which would otherwise wait for up to five milliseconds.

    Called on a link's thread wherever it has worked for about a tenth of a millisecond.
    """
    time.sleep(_PAUSE)


def pack(items: Iterable[records.Record], encoder: msgspec.msgpack.Encoder) -> Iterator[list[msgspec.Raw]]:
    """Encoded records in groups that fit into one packet. A record that fits into none is left out."""
    group: list[msgspec.Raw] = []
    size = 0
    for number, item in enumerate(items, 1):
        data = encoder.encode(item)
        if number % _GIVE_WAY == 0:
            give_way()
        if len(data) > _PACKET:
            logger.warning("a record of %d bytes is too large to be sent", len(data))
            continue
        if size + len(data) > _PACKET:
            yield group
            group, size = [], 0
        group.append(msgspec.Raw(data))
        size += len(data)
    if group:
        yield group


class Link:
    """Sends one role's records to the agent."""

    def __init__(self, role: str, source: Source) -> None:
        self.role = role
        self.dropped = 0
        self.send_errors = 0
        self._source = source
        self._settings = settings.current()
        self._sender = secrets.token_hex(8)
        self._events: deque[records.Record] = deque()
        self._ended: deque[tuple[float, records.RequestEnd | records.RequestAnswered]] = deque(maxlen=ENDED)
        """When ends were sent on this connection."""
        self._encoder = msgspec.msgpack.Encoder()
        self._acks = msgspec.msgpack.Decoder(records.Ack)
        self._socket: socket.socket | None = None
        self._seq = 0
        self._unacknowledged: deque[tuple[int, bytes]] = deque()
        self._unsent: deque[tuple[int, bytes]] = deque()
        """The last of `_unacknowledged` that this connection has not carried yet."""
        self._said: records.Hello | None = None
        self._incomplete = False
        """States were lost on a full socket: all are sent again."""
        self._retry = RETRY[0]
        self._next_try = 0.0
        self._next_state = 0.0
        self._next_hello = 0.0
        """When it is looked whether what we said of us still holds."""
        self._wake = threading.Event()
        self.stopping = False
        """The process ends: what is told now is the last."""
        self._lock = threading.Lock()
        """Held while flushing: the thread and the last flush at exit do not mix."""
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def start(self) -> None:
        """Start the thread. In a child made by fork the link is dead: a link belongs to one process."""
        self._thread = threading.Thread(target=self._run, name=f"gpuglass-{self.role}", daemon=True)
        self._thread.start()
        _at_exit(self)

    def event(self, record: records.Record) -> None:
        """Queue an event. Never blocks; the oldest is dropped and counted when the queue is full."""
        if len(self._events) >= EVENTS:
            try:
                self._events.popleft()
            except IndexError:
                pass
            else:
                self.dropped += 1
        self._events.append(record)

    def stop(self, timeout: float = 0.5) -> None:
        """Send what is there, wait shortly for the agent's acknowledgement, and close."""
        if self.stopping or os.getpid() != self._pid:
            return
        self.stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)
        if not self._lock.acquire(timeout=timeout):
            return
        try:
            self._flush()
            if self._acknowledged_within(timeout):
                self._flush()
                self._acknowledged_within(timeout)
            self._disconnect()
        except Exception as error:
            logger.debug("last flush of %s: %r", self.role, error)
        finally:
            self._lock.release()

    def _acknowledged_within(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while self._unacknowledged and self._socket is not None and time.monotonic() < deadline:
            time.sleep(0.005)
            self._receive_acks()
            self._send_unsent()
        return not self._unacknowledged

    def abandon(self) -> None:
        """In a child made by fork: close our copy of the socket and do nothing any more."""
        self.stopping = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _run(self) -> None:
        while not self._wake.wait(INTERVAL):
            with self._lock:
                try:
                    self._flush()
                except Exception as error:
                    self._failed(error)
                    self._disconnect()

    def _failed(self, error: Exception) -> None:
        self.send_errors += 1
        if self.send_errors <= 3:
            logger.warning("sending %s records failed: %r", self.role, error, exc_info=error)

    def _gather(self, items: Iterable[records.Record]) -> list[records.Record]:
        """What a source says, up to where it fails: what it has handed out already must not be lost."""
        gathered = []
        try:
            for item in items:
                gathered.append(item)
                if len(gathered) % _GIVE_WAY == 0:
                    give_way()
        except Exception as error:
            self._failed(error)
        return gathered

    def _flush(self) -> None:
        if self._socket is None and not self._connect():
            return
        self._receive_acks()
        if self._socket is None or not self._say_hello():
            return
        while self._ended and self._ended[0][0] < time.monotonic() - ENDED_SECONDS:
            self._ended.popleft()
        give_way()
        if self._send_events() and self._send_states(everything=self._incomplete):
            give_way()
            self._send_sums()

    def _connect(self) -> bool:
        now = time.monotonic()
        if now < self._next_try:
            return False
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        connection.setblocking(False)
        try:
            connection.connect(self._settings.socket)
        except OSError as error:
            connection.close()
            logger.debug("no agent at %s: %s", self._settings.socket, error)
            self._next_try = now + self._retry
            self._retry = min(2 * self._retry, RETRY[1])
            return False
        self._socket = connection
        self._retry = RETRY[0]
        self._said = None
        self._unsent = deque(self._unacknowledged)
        return True

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._next_try = time.monotonic() + self._retry
        self._retry = min(2 * self._retry, RETRY[1])

    def _say_hello(self) -> bool:
        """Say who we are if that has changed; on a new connection all states follow."""
        said = self._said
        now = time.monotonic()
        if said is not None and now < self._next_hello:
            return True
        self._next_hello = now + STATE_INTERVAL
        hello = records.Hello(
            version=records.VERSION,
            sender=self._sender,
            instance=self._settings.instance,
            server=self._settings.server,
            role=self.role,
            software=f"gpuglass-vllm/{__version__}",
            clock_offset_ns=said.clock_offset_ns
            if said is not None
            else time.time_ns() - time.monotonic_ns(),
            capabilities=table.capabilities(self.role),
            **self._source.hello(),
        )
        if hello == said:
            return True
        if not self._send_packet(0, [msgspec.Raw(self._encoder.encode(hello))]):
            return False
        self._said = hello
        if said is None:
            self._incomplete = True
            self._events.extendleft(
                msgspec.structs.replace(end, again=True) for _, end in reversed(self._ended)
            )
            self._ended.clear()
        return True

    def _send_events(self) -> bool:
        while self._events:
            taken = [self._events.popleft() for _ in range(min(_GIVE_WAY, len(self._events)))]
            for group in pack(taken, self._encoder):
                if not self._send_packet(0, group):
                    # A repeated event is better than a lost one where a batch was cut in two: receivers
                    # know requests by their ids. Batches are small, and this happens once per reconnection.
                    self._events.extendleft(reversed(taken))
                    return False
            now = time.monotonic()
            for record in taken:
                if isinstance(record, (records.RequestEnd, records.RequestAnswered)):
                    self._ended.append((now, record))
        return True

    def _send_states(self, everything: bool) -> bool:
        now = time.monotonic()
        states = self._gather(self._source.states(everything))
        if everything or now >= self._next_state:
            self._next_state = now + STATE_INTERVAL
            states.append(
                records.ProbeState(
                    at=time.monotonic_ns(),
                    hook_errors=table.errors(self.role),
                    dropped=self.dropped,
                    hook_ns=table.spent_ns(self.role),
                    send_errors=self.send_errors,
                )
            )
        sent = all(self._send_packet(0, group) for group in pack(states, self._encoder))
        self._incomplete = not sent
        return sent

    def _send_sums(self) -> None:
        if self._socket is None:
            return
        if not self._unacknowledged:
            for group in pack(self._gather(self._source.sums()), self._encoder):
                self._seq += 1
                packet = self._encoder.encode(records.Packet(self._seq, group))
                self._unacknowledged.append((self._seq, packet))
                self._unsent.append((self._seq, packet))
        self._send_unsent()

    def _send_unsent(self) -> None:
        while self._unsent:
            if not self._send(self._unsent[0][1]):
                return
            self._unsent.popleft()

    def _send_packet(self, seq: int, group: list[msgspec.Raw]) -> bool:
        return self._send(self._encoder.encode(records.Packet(seq, group)))

    def _send(self, packet: bytes) -> bool:
        """Whether the socket took the packet; a broken connection is closed."""
        if self._socket is None:
            return False
        try:
            self._socket.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            logger.debug("the agent has gone: %s", error)
            self._disconnect()
            return False
        return True

    def _receive_acks(self) -> None:
        while self._socket is not None:
            try:
                data = self._socket.recv(256, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # the agent went without having read all; what it acknowledged before is still here
            except OSError:
                data = b""
            if not data:
                self._disconnect()
                return
            try:
                ack = self._acks.decode(data).ack
            except msgspec.MsgspecError:
                continue
            for waiting in (self._unacknowledged, self._unsent):
                while waiting and waiting[0][0] <= ack:
                    waiting.popleft()


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _at_exit(link: Link) -> None:
    if not _links:
        # Children of `multiprocessing` leave without atexit, but run their finalizers.
        atexit.register(stop_all)
        multiprocessing_util.Finalize(None, stop_all, exitpriority=10)
    _links.add(link)


def stop_all() -> None:
    """Send what is left, at the end of the process."""
    for link in list(_links):
        link.stop()


def _after_fork() -> None:
    for link in list(_links):
        link.abandon()
    _links.clear()


os.register_at_fork(after_in_child=_after_fork)
