"""Servers and their engines as they live now: which processes are connected, the KV pool, open requests.

A server is what all processes with one `Hello.instance` are; it has one engine per data-parallel index. A
frontend may feed all engines of its server, so requests are kept per server.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from exporters.vllm.account import Account, Labels
from exporters.vllm.requests import OpenRequest
from exporters.vllm.sink import Sender
from gpuglass.family import MAX_LABEL_VALUE
from gpuglass_vllm.records import Pool, PoolState

REMEMBERED = 20_000
"""Requests of a server that are known to be done, so that a late word on them does not open them again."""
HOG_SHARE = 0.25
"""Share of the pool above which a request counts as hogging it."""

FRONTEND, CORE, WORKER = "frontend", "core", "worker"


class Engine:
    """One engine of one server."""

    __slots__ = ("account", "core_gone_at", "cores", "frontends", "hogs", "name", "pool", "state", "workers")

    def __init__(self, name: str, account: Account) -> None:
        self.name = name
        self.account = account
        self.frontends: dict[int, Sender] = {}
        """By the connection's number, as the next two."""
        self.cores: dict[int, Sender] = {}
        self.workers: dict[int, Sender] = {}
        self.core_gone_at: int | None = None
        """When the last core or worker went while no core is left; its requests die a little later."""
        self.pool: Pool | None = None
        """Geometry by a core's latest word; None while no core is connected."""
        self.state: PoolState | None = None
        self.hogs: dict[str, OpenRequest] = {}
        """Requests that hold a large part of the pool."""

    def senders(self, role: str) -> dict[int, Sender]:
        """Connected processes of a role."""
        return self.cores if role == CORE else self.workers if role == WORKER else self.frontends

    @property
    def is_live(self) -> bool:
        """Whether any of its processes is connected."""
        return bool(self.frontends or self.cores or self.workers)

    @property
    def speaker(self) -> Sender | None:
        """A connected process that says what the engine is; the core if there is one."""
        for senders in (self.cores, self.workers, self.frontends):
            for sender in senders.values():
                return sender
        return None

    def share(self, blocks: float) -> float | None:
        """Blocks as a share of the pool, at most 1; None if its size is unknown."""
        return min(1.0, blocks / self.pool.blocks) if self.pool is not None and self.pool.blocks > 0 else None

    @property
    def block_bytes(self) -> int:
        """Bytes of a block; 0 if unknown."""
        return self.pool.block_bytes if self.pool is not None else 0


class Server:
    """All processes of one instance."""

    __slots__ = ("closing", "done", "engines", "gone_frontends", "instance", "requests")

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.engines: dict[str, Engine] = {}
        self.requests: dict[str, OpenRequest] = {}
        """Not yet observed, by the engine's request id."""
        self.closing: dict[str, OpenRequest] = {}
        """Those of them that have ended and wait for what other processes know."""
        self.done: OrderedDict[str, None] = OrderedDict()
        self.gone_frontends: dict[str, int] = {}
        """Frontend processes that went, by their name, and when; those that came back are not here."""

    @property
    def is_live(self) -> bool:
        """Whether any of its processes is connected."""
        return any(engine.is_live for engine in self.engines.values())

    @property
    def has_frontend(self) -> bool:
        """Whether somebody is connected who tells what users felt."""
        return any(engine.frontends for engine in self.engines.values())

    def remember(self, request_id: str) -> None:
        """A request is done: later words on it are not news."""
        self.done[request_id] = None
        if len(self.done) > REMEMBERED:
            self.done.popitem(last=False)


def labels_of(sender: Sender) -> Labels:
    """Labels of the engine that a sender belongs to, before two with the same labels are told apart."""
    hello = sender.hello
    # Cut here as the catalog would cut them: labels that differ only behind the cut are the same ones.
    wanted = (hello.model_name, hello.engine, hello.server, *sender.workload)
    return Labels(*(value[:MAX_LABEL_VALUE] for value in wanted))


def free_labels(wanted: Labels, taken: Mapping[Labels, object]) -> Labels:
    """`wanted`, or with a number behind its `server` if another live engine has the same labels."""
    labels, number = wanted, 1
    while labels in taken:
        number += 1
        name = wanted.server[: MAX_LABEL_VALUE - 8]
        labels = wanted._replace(server=f"{name}-{number}" if name else str(number))
    return labels
