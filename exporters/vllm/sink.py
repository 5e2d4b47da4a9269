"""What the receiver hands over and to whom: `Sender`, who speaks, and `Sink`, who keeps what is said.

The receiver has checked each record before (lengths, ranges, known words, parallel lists) and holds
`Sink.lock` around each packet; it acknowledges a packet before it lets go of the lock. Whoever makes an
exposition holds the same lock, so a scrape never shows a sum that its sender may send again.
"""

from __future__ import annotations

import threading
from enum import StrEnum
from typing import Protocol

from gpuglass_vllm.records import Hello, ProbeState, Record


class Refusal(StrEnum):
    """Why a connection, a packet or a record was not taken in."""

    # connections
    NOT_ALLOWED = "not_allowed"
    """The kernel's uid or the pod's namespace is not on the allow list."""
    TOO_MANY_SENDERS = "too_many_senders"
    TOO_MANY_OF_USER = "too_many_senders_of_user"
    HELLO_LATE = "hello_late"
    NO_HELLO = "no_hello"
    """Something else came first."""
    VERSION = "version"
    SENDER_TAKEN = "sender_taken"
    """The sender's name belongs to another user."""
    GARBAGE = "garbage"
    """Closed after several refused packets or records."""
    # packets
    TOO_LARGE = "too_large"
    MALFORMED_PACKET = "malformed_packet"
    TOO_MANY_RECORDS = "too_many_records"
    # records
    UNKNOWN_TYPE = "unknown_type"
    """Of a newer sender, passed over."""
    MALFORMED_RECORD = "malformed_record"
    BAD_TEXT = "bad_text"
    """Too long, or empty where it has to name somebody."""
    OUT_OF_RANGE = "out_of_range"
    BAD_TIME = "bad_time"
    """Lies in the future."""
    WRONG_ROLE = "wrong_role"
    UNACKNOWLEDGED_SUM = "unacknowledged_sum"
    """A sum in a packet without `seq`."""
    TOO_MANY_REQUESTS = "too_many_requests"
    """More open requests than the ledger keeps."""
    INTERNAL = "internal"
    """An error of ours; the log has it."""


class Refused(Exception):
    """A record is not taken in; `Sink.take` may raise it."""

    def __init__(self, reason: Refusal) -> None:
        super().__init__(reason.value)
        self.reason = reason


class GpuClaim(StrEnum):
    """What is thought of the `gpu_uuid` that a sender claims."""

    NONE = "none"
    VERIFIED = "verified"
    """The driver lists the sender's process on that GPU."""
    UNVERIFIED = "unverified"
    """Nobody can tell: the GPU exporter is off, or the sender's pid is not known here. Taken as said."""
    PENDING = "pending"
    """Not listed yet; the driver's lists are read each few seconds."""
    REFUSED = "refused"
    """The driver knows the GPU, or other ones, and not this process on it."""


class Sender:
    """One connection that has introduced itself. Belongs to the receiver, changes only under `Sink.lock`."""

    __slots__ = (
        "claim",
        "connected_at",
        "container",
        "gid",
        "gpu_uuid",
        "hello",
        "namespace",
        "number",
        "pid",
        "pod",
        "probe",
        "records",
        "seen_at",
        "uid",
    )

    def __init__(self, number: int, hello: Hello, pid: int, uid: int, gid: int, connected_at: int) -> None:
        self.number = number
        """Of the connection; no two in the agent's life are equal."""
        self.hello = hello
        """The latest one. `sender`, `instance`, `role`, `engine` and `rank` never change on a connection."""
        self.pid = pid
        """In the agent's pid namespace; 0 if the process is not to be seen from there."""
        self.uid = uid
        self.gid = gid
        self.connected_at = connected_at
        """CLOCK_MONOTONIC, nanoseconds."""
        self.seen_at = connected_at
        """When the last packet came."""
        self.namespace = ""
        self.pod = ""
        self.container = ""
        """Workload of the process as the GPU families spell it (workload_namespace, …); empty on a host."""
        self.claim = GpuClaim.NONE
        self.gpu_uuid = ""
        """The claimed GPU where `claim` is verified or unverified, else empty. May become known later."""
        self.probe: ProbeState | None = None
        """How the sender fares, by its last word."""
        self.records = 0
        """Records taken in on this connection."""

    @property
    def workload(self) -> tuple[str, str, str]:
        """Namespace, pod, container."""
        return self.namespace, self.pod, self.container


class Sink(Protocol):
    """Takes in what senders say. All three are called by the receiver's thread with `lock` held."""

    lock: threading.RLock
    """Held by whoever changes or reads the sink's state."""

    def hello(self, sender: Sender) -> None:
        """A sender came, or something in its `hello` changed. The first call for each sender."""

    def take(self, sender: Sender, record: Record, now_ns: int) -> None:
        """One checked record, neither `Hello` nor `ProbeState`. A sum is given once, whatever is sent again.

        Raises `Refused`, which is counted; the other records of the packet are taken in all the same.
        """

    def gone(self, sender: Sender) -> None:
        """Its connection ended. The same process may come back as another `Sender` with the same
        `hello.sender`; then it has lost nothing but what it says it dropped."""
