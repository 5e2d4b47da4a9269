"""The receiver of the record stream: one thread, one SOCK_SEQPACKET socket, any number of hostile senders.

In flow packets (`gpuglass_vllm.records`), out go checked records into the `Sink` and acknowledgements to the
senders. Nothing that a sender does blocks the thread, ends it or makes it remember without bound: a packet
that cannot be read is refused and counted, a record that is wrong is refused alone, a sender that is too fast
is read later, one that sends garbage is cut off, and what it had not been acknowledged it sends again.

Sums are taken in once: the last `seq` of each sender's name is remembered over connections, and a packet is
acknowledged under the lock under which the sink was changed.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import selectors
import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from exporters.vllm import checks
from exporters.vllm.counts import Counts, Quiet
from exporters.vllm.endpoint import Endpoint, EndpointError
from exporters.vllm.peers import Peer, Peers, is_allowed, peer_of
from exporters.vllm.senders import Budget, Memory, Strikes, Taken
from exporters.vllm.sink import GpuClaim, Refusal, Refused, Sender, Sink
from gpuglass.config import EnginesConfig
from gpuglass.logs import LOG
from gpuglass_vllm import records

HELLO_SECONDS = 5.0
"""How long a connection may be silent before it introduces itself."""
MAX_RECORDS = 8192
"""Records of a packet; as many empty maps fit into one."""
MAX_SEQ = 2**62
PACKETS_PER_TURN = 16
"""Packets read of one sender before the others have their turn."""
ACCEPTS_PER_TURN = 64
ARRIVALS_PER_SECOND = 20.0
ARRIVALS_BURST = 512.0
"""New connections of one user: who comes and goes all the time makes the ledger remember engines that have
gone."""
USERS = 256
"""Users whose arrivals are remembered."""
BURST_SECONDS = 2.0
TICK = 1.0
"""Seconds between looks at what only time changes."""
REOPEN_SECONDS = 10.0
"""Between attempts to make a socket that could not be made."""
WORKLOAD_SECONDS = 60.0
"""How long the names of a new pod may be incomplete: the kubelet writes them a moment after the start."""

_STATES = (
    records.PoolState,
    records.GpuProgress,
    records.AllocatorState,
    records.MemoryState,
    records.ProbeState,
)
"""Records made when they are sent: their age on arrival is the lag."""
_WRONG = (msgspec.MsgspecError, UnicodeError, ValueError, OverflowError, RecursionError, MemoryError)
"""What decoding of hostile bytes may raise."""
_STRIKING = frozenset(Refusal) - {Refusal.UNKNOWN_TYPE, Refusal.TOO_MANY_REQUESTS, Refusal.INTERNAL}
"""Refusals that are the sender's fault."""


class _Kind(msgspec.Struct):
    type: str


@dataclass(slots=True, eq=False)
class Connection:
    """One accepted connection."""

    number: int
    socket: socket.socket
    peer: Peer
    accepted_at: float
    records: Budget
    bytes: Budget
    sender: Sender | None = None
    """None until it has introduced itself."""
    taken: Taken | None = None
    strikes: Strikes = field(default_factory=Strikes)
    struck_out: bool = False
    ack: int = 0
    """To be acknowledged; 0 if nothing is."""
    paused: bool = False


class Receiver:
    """Listens, reads, judges, hands over. `counts` and `sink` change under `sink.lock` only."""

    def __init__(
        self,
        config: EnginesConfig,
        sink: Sink,
        peers: Peers,
        clock: Callable[[], float] = time.monotonic,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.counts = Counts()
        self.endpoint = Endpoint(config)
        self._config = config
        self._sink = sink
        self._peers = peers
        self._clock = clock
        self._clock_ns = clock_ns
        self._memory = Memory()
        self._quiet = Quiet()
        self._connections: dict[int, Connection] = {}
        self._by_name: dict[str, Connection] = {}
        self._of_user: Counter[int] = Counter()
        self._arrivals: OrderedDict[int, Budget] = OrderedDict()
        self._resume: list[tuple[float, int]] = []
        self._numbers = 0
        self._listening: socket.socket | None = None
        self._down = "starting"
        self._reopen_at = 0.0
        self._closing = False
        # One byte more than a packet may have: what fills it was too large.
        self._buffer = bytearray(records.MAX_PACKET + 1)
        self._packets = msgspec.msgpack.Decoder(records.Packet)
        self._records: msgspec.msgpack.Decoder[records.Record] = msgspec.msgpack.Decoder(records.Record)
        self._kinds = msgspec.msgpack.Decoder(_Kind)
        self._acks = msgspec.msgpack.Encoder()
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="engine-receiver", daemon=True)

    # From other threads

    def start(self) -> None:
        """Make the socket and start the thread.

        Raises `EndpointError` if a socket that the configuration names cannot be made. The default one is
        tried again and again instead: not every node has engines, and not every agent may write to /run.
        """
        try:
            self._open()
        except EndpointError as error:
            if not self.endpoint.is_default:
                raise
            self._failed(error)
        self._thread.start()

    def reload(self, config: EnginesConfig) -> None:
        """Take another configuration: who may send, and how much."""
        self._config = config

    def stop(self, timeout: float) -> bool:
        """Stop the thread and remove the socket; False if it is stuck."""
        self._closing = True
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
        return True

    @property
    def down(self) -> str:
        """Why the socket is not there; empty if it is."""
        return self._down

    def senders(self) -> list[Sender]:
        """Those that are connected and known. Call with the sink's lock held."""
        return [connection.sender for connection in self._connections.values() if connection.sender]

    def unknown(self) -> int:
        """Connections that have not introduced themselves. Call with the sink's lock held."""
        return sum(connection.sender is None for connection in self._connections.values())

    # The thread

    def _run(self) -> None:
        next_tick = self._clock() + TICK
        while not self._closing:
            try:
                now = self._clock()
                until = min(next_tick, self._resume[0][0]) if self._resume else next_tick
                for key, _ in self._selector.select(max(0.0, until - now)):
                    if key.fd == self._wake:
                        os.eventfd_read(self._wake)
                    elif isinstance(key.data, Connection):
                        self._serve(key.data)
                    else:
                        self._accept()
                now = self._clock()
                self._let_on(now)
                if now >= next_tick:
                    next_tick = now + TICK
                    self._tick(now)
            except Exception:
                # An error of ours must not end what all engines depend on.
                LOG.exception("the receiver of engine records failed")
                time.sleep(0.1)
        self._shut()

    def _shut(self) -> None:
        self.endpoint.remove()
        for connection in list(self._connections.values()):
            connection.socket.close()
        if self._listening is not None:
            self._listening.close()
        self._selector.close()
        os.close(self._wake)

    # Socket

    def _open(self) -> None:
        listening = self.endpoint.open()
        self._close_listening()
        self._listening = listening
        self._selector.register(listening, selectors.EVENT_READ)
        self._down = ""
        LOG.info("engines can connect to %s", self.endpoint.path)

    def _failed(self, error: EndpointError) -> None:
        self._close_listening()
        self._down = "socket"
        self._reopen_at = self._clock() + REOPEN_SECONDS
        if self._quiet.may("socket", self._clock()):
            LOG.warning("no engine can be heard: %s", error)

    def _close_listening(self) -> None:
        if self._listening is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._listening)
            self._listening.close()
            self._listening = None

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            if self._listening is None:
                return
            try:
                accepted, _ = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    # The waiting connection keeps the socket readable: do not spin until there is room.
                    self._failed(EndpointError(f"engines.socket: cannot accept: {error.strerror}"))
                    return
                continue
            with self._sink.lock:
                self._admit(accepted)

    def _admit(self, accepted: socket.socket) -> None:
        now = self._clock()
        self.counts.connections += 1
        limits = self._config.limits
        try:
            accepted.setblocking(False)
            peer = peer_of(accepted)
        except OSError:
            accepted.close()
            return
        refusal = None
        if self._config.allow_uids and peer.uid not in self._config.allow_uids:
            refusal = Refusal.NOT_ALLOWED
        elif len(self._connections) >= limits.senders:
            refusal = Refusal.TOO_MANY_SENDERS
        elif self._of_user[peer.uid] >= limits.senders_per_user or self._comes_too_often(peer.uid, now):
            refusal = Refusal.TOO_MANY_OF_USER
        if refusal is not None:
            self._note(refusal, peer, now)
            accepted.close()
            return
        self._numbers += 1
        connection = Connection(
            self._numbers,
            accepted,
            peer,
            now,
            Budget(limits.records_per_second, BURST_SECONDS * limits.records_per_second),
            Budget(1024 * limits.kilobytes_per_second, BURST_SECONDS * 1024 * limits.kilobytes_per_second),
        )
        self._connections[connection.number] = connection
        self._of_user[peer.uid] += 1
        self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _comes_too_often(self, uid: int, now: float) -> bool:
        budget = self._arrivals.get(uid)
        if budget is None:
            if len(self._arrivals) >= USERS:
                self._arrivals.popitem(last=False)
            budget = self._arrivals[uid] = Budget(ARRIVALS_PER_SECOND, ARRIVALS_BURST, at=now)
        self._arrivals.move_to_end(uid)
        if budget.wait(now) > 0:
            return True
        budget.take(1, now)
        return False

    def _close(self, connection: Connection, refusal: Refusal | None = None) -> None:
        """End a connection; what it had not been acknowledged its sender sends again on the next one."""
        if self._connections.pop(connection.number, None) is None:
            return
        if not connection.paused:
            self._selector.unregister(connection.socket)
        connection.socket.close()
        self._of_user[connection.peer.uid] -= 1
        if not self._of_user[connection.peer.uid]:
            del self._of_user[connection.peer.uid]
        sender = connection.sender
        if sender is not None:
            if self._by_name.get(sender.hello.sender) is connection:
                del self._by_name[sender.hello.sender]
            try:
                self._sink.gone(sender)
            except Exception:
                self._fault("gone")
        if refusal is not None:
            self._note(refusal, connection.peer, self._clock())

    # Packets

    def _serve(self, connection: Connection) -> None:
        """Read what one sender has sent, up to its turn's end."""
        for _ in range(PACKETS_PER_TURN):
            try:
                # With MSG_TRUNC the kernel tells a packet's full length, however much of it we take. File
                # descriptors that come along are closed by the kernel, as we offer no room for them.
                size = connection.socket.recv_into(self._buffer, 0, socket.MSG_TRUNC)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            with self._sink.lock:
                if size == 0:  # the end, or an empty packet, which nobody who means well sends
                    self._close(connection)
                    return
                wait = self._receive(connection, size)
                if connection.number not in self._connections:
                    return
                if wait > 0:
                    self._pause(connection, wait)
                    return

    def _receive(self, connection: Connection, size: int) -> float:
        """Take in one packet; gives the seconds for which its sender has to wait."""
        now, now_ns = self._clock(), self._clock_ns()
        self.counts.packets += 1
        self.counts.received_bytes += size
        count = 1
        if size > records.MAX_PACKET:
            self._strike(connection, Refusal.TOO_LARGE, now)
        else:
            packet = self._decode_packet(memoryview(self._buffer)[:size])
            if isinstance(packet, Refusal):
                self._strike(connection, packet, now)
            else:
                count = max(1, len(packet.records))
                self._take_packet(connection, packet, now, now_ns)
        if connection.struck_out:
            self._close(connection, Refusal.GARBAGE)
        return max(connection.records.take(count, now), connection.bytes.take(size, now))

    def _decode_packet(self, data: memoryview) -> records.Packet | Refusal:
        try:
            packet = self._packets.decode(data)
        except _WRONG:
            return Refusal.MALFORMED_PACKET
        if not 0 <= packet.seq < MAX_SEQ:
            return Refusal.MALFORMED_PACKET
        return packet if len(packet.records) <= MAX_RECORDS else Refusal.TOO_MANY_RECORDS

    def _take_packet(self, connection: Connection, packet: records.Packet, now: float, now_ns: int) -> None:
        rest = packet.records
        if connection.sender is None:
            hello = self._decode(rest[0]) if rest else Refusal.NO_HELLO
            if not isinstance(hello, records.Hello):
                self._close(connection, Refusal.NO_HELLO)
                return
            if not self._introduce(connection, hello, now_ns):
                return
            rest = rest[1:]
        sender, taken = connection.sender, connection.taken
        assert sender is not None and taken is not None
        sender.seen_at = now_ns
        if 0 < packet.seq <= taken.seq:
            self.counts.repeated += 1
            connection.ack = taken.seq
        else:
            for raw in rest:
                refusal = self._take(connection, sender, raw, packet.seq, now_ns)
                if refusal is not None:
                    self._strike(connection, refusal, now)
            if packet.seq > 0:
                taken.seq = connection.ack = packet.seq
        self._acknowledge(connection)

    def _decode(self, raw: msgspec.Raw) -> records.Record | Refusal:
        try:
            return self._records.decode(raw)
        except _WRONG:
            try:
                kind = self._kinds.decode(raw).type
            except _WRONG:
                return Refusal.MALFORMED_RECORD
            known = kind in checks.TAGS.values()
            return Refusal.MALFORMED_RECORD if known else Refusal.UNKNOWN_TYPE

    def _take(
        self, connection: Connection, sender: Sender, raw: msgspec.Raw, seq: int, now_ns: int
    ) -> Refusal | None:
        """Take in one record; gives why it is refused."""
        record = self._decode(raw)
        if isinstance(record, Refusal):
            return record
        try:
            if isinstance(record, records.Hello):
                self._renew(connection, sender, record, now_ns)
            else:
                if not seq and isinstance(record, records.Sum):
                    return Refusal.UNACKNOWLEDGED_SUM
                record = checks.check(record, sender.hello, now_ns)
                if isinstance(record, _STATES):
                    self.counts.observe_lag((now_ns - record.at) / 1e9)
                if isinstance(record, records.ProbeState):
                    sender.probe = record
                else:
                    self._sink.take(sender, record, now_ns)
        except Refused as refused:
            return refused.reason
        except Exception:
            self._fault(type(record).__name__)
            return Refusal.INTERNAL
        self.counts.records[checks.TAGS[type(record)]] += 1
        sender.records += 1
        return None

    # Introductions

    def _introduce(self, connection: Connection, hello: records.Hello, now_ns: int) -> bool:
        """The first `Hello` of a connection; closes it and gives False if the sender is not to be heard."""
        peer = connection.peer
        try:
            hello = checks.check_hello(hello)
        except Refused as refused:
            self._close(connection, refused.reason)
            return False
        if hello.role == records.TRACER and not self._may_trace(peer):
            self._close(connection, Refusal.NOT_ALLOWED)
            return False
        workload = self._peers.workload(peer.pid, hello.gpu_uuid)
        if not is_allowed(self._config, peer.uid, None if workload is None else workload[0]):
            self._close(connection, Refusal.NOT_ALLOWED)
            return False
        taken = self._memory.claim(hello.sender, peer.uid)
        if taken is None:
            self._close(connection, Refusal.SENDER_TAKEN)
            return False
        before = self._by_name.get(hello.sender)
        if before is not None:
            self._close(before)  # it connected again before we saw the end of the old connection
        pid = peer.pid if self._peers.sees_pids else 0
        sender = Sender(connection.number, hello, pid, peer.uid, peer.gid, now_ns)
        connection.sender, connection.taken = sender, taken
        self._by_name[hello.sender] = connection
        if workload is not None:
            sender.namespace, sender.pod, sender.container = workload
        self._judge_claim(sender, now_ns)
        self._tell(sender)
        self.counts.records["hello"] += 1
        if self._quiet.may(hello.sender, self._clock()):
            LOG.info(
                "engine process connected: %s of %s %s, %s, pid %d, uid %d",
                *(hello.role, hello.engine_name[:32], hello.engine_version[:32], hello.model_name[:100]),
                *(peer.pid, peer.uid),
            )
        return True

    def _may_trace(self, peer: Peer) -> bool:
        """Whether to believe a sender that speaks of other processes: by its user, and by the pids that it
        sees."""
        return peer.uid in self._config.tracer_uids and self._peers.sees_host_pids(peer.pid)

    def _renew(self, connection: Connection, sender: Sender, hello: records.Hello, now_ns: int) -> None:
        """A later `Hello`; raises `Refused` if it names somebody else."""
        hello = checks.check_hello(hello)
        old = sender.hello
        if (hello.sender, hello.instance, hello.role, hello.engine, hello.rank) != (
            *(old.sender, old.instance, old.role, old.engine, old.rank),
        ):
            raise Refused(Refusal.OUT_OF_RANGE)
        sender.hello = hello
        self._judge_claim(sender, now_ns)
        self._tell(sender)

    def _tell(self, sender: Sender) -> None:
        try:
            self._sink.hello(sender)
        except Exception:
            self._fault("hello")

    def _judge_claim(self, sender: Sender, now_ns: int) -> bool:
        """Judge the claimed GPU; gives whether that changed anything."""
        claimed = sender.hello.gpu_uuid
        claim = self._peers.claim(claimed, sender.pid, (now_ns - sender.connected_at) / 1e9)
        uuid = claimed if claim in (GpuClaim.VERIFIED, GpuClaim.UNVERIFIED) else ""
        if (claim, uuid) == (sender.claim, sender.gpu_uuid):
            return False
        if sender.claim is GpuClaim.VERIFIED and claimed == sender.gpu_uuid:
            return False  # seen there once; a process at its end leaves the list before it leaves us
        sender.claim, sender.gpu_uuid = claim, uuid
        return True

    # Acknowledgements and rates

    def _acknowledge(self, connection: Connection) -> None:
        """Send what is due. If the socket is full a later, higher one stands for it."""
        if not connection.ack:
            return
        try:
            connection.socket.send(
                self._acks.encode(records.Ack(connection.ack)), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            )
        except BlockingIOError:
            self.counts.unsent_acks += 1
        except OSError:
            connection.ack = 0  # reading will find the end
        else:
            connection.ack = 0

    def _pause(self, connection: Connection, seconds: float) -> None:
        """Read a sender later: until then its packets wait in the kernel, or with itself."""
        self.counts.pauses += 1
        connection.paused = True
        self._selector.unregister(connection.socket)
        heapq.heappush(self._resume, (self._clock() + seconds, connection.number))

    def _let_on(self, now: float) -> None:
        while self._resume and self._resume[0][0] <= now:
            _, number = heapq.heappop(self._resume)
            connection = self._connections.get(number)
            if connection is not None and connection.paused:
                connection.paused = False
                self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    # What only time changes

    def _tick(self, now: float) -> None:
        if self._listening is None:
            if now >= self._reopen_at:
                self._reopen()
        elif not self.endpoint.is_ours():
            LOG.info("%s was removed or replaced; making it again", self.endpoint.path)
            self._reopen()
        with self._sink.lock:
            for connection in list(self._connections.values()):
                self._look_at(connection, now)

    def _reopen(self) -> None:
        try:
            self._open()
        except EndpointError as error:
            self._failed(error)

    def _look_at(self, connection: Connection, now: float) -> None:
        config, sender = self._config, connection.sender
        limits = config.limits
        connection.records.rate = limits.records_per_second
        connection.bytes.rate = 1024 * limits.kilobytes_per_second
        if sender is None:
            if now - connection.accepted_at > HELLO_SECONDS:
                self._close(connection, Refusal.HELLO_LATE)
            return
        if not is_allowed(config, sender.uid, sender.namespace):
            self._close(connection, Refusal.NOT_ALLOWED)
            return
        self._acknowledge(connection)
        changed = self._judge_claim(sender, self._clock_ns())
        if not sender.container and now - connection.accepted_at < WORKLOAD_SECONDS:
            workload = self._peers.workload(sender.pid, sender.gpu_uuid)
            if workload is not None and workload != sender.workload:
                sender.namespace, sender.pod, sender.container = workload
                changed = True
        if changed:
            self._tell(sender)

    # What went wrong

    def _strike(self, connection: Connection, refusal: Refusal, now: float) -> None:
        self._note(refusal, connection.peer, now)
        if refusal in _STRIKING and connection.strikes.add(now):
            connection.struck_out = True

    def _note(self, refusal: Refusal, peer: Peer, now: float) -> None:
        self.counts.refused[refusal] += 1
        if refusal not in (Refusal.UNKNOWN_TYPE, Refusal.INTERNAL) and self._quiet.may(
            (refusal, peer.uid), now
        ):
            LOG.warning(
                "record stream: refused (%s) from pid %d, uid %d; said once an hour",
                *(refusal.value, peer.pid, peer.uid),
            )

    def _fault(self, where: str) -> None:
        """An error of the sink: the record is lost, and the stream goes on."""
        if self._quiet.may(("fault", where), self._clock()):
            LOG.exception("the ledger failed over a %s; said once an hour", where)
