"""The request ledger: joins what frontends, cores and workers tell, and keeps what is exported of it.

In flow checked records (`Sink`). A request is followed from the first word on it until all processes have
told of its end, then it is observed once in the histograms of its engine's account. Sums go into the account
as they come: totals of tenants never wait for a request to end, and never miss one that was not followed.
Everything is bounded: open requests, tenants, accounts, experts. `tick` does what only time can tell: that
nothing more will be said of a request, that an engine has gone, that nobody looks at an account any more.

Locking: all methods are called with `lock` held, as `Sink` says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.samples import Exemplar

from exporters.vllm.account import Account, Kind, Labels
from exporters.vllm.engines import (
    CORE,
    FRONTEND,
    HOG_SHARE,
    WORKER,
    Engine,
    Server,
    free_labels,
    labels_of,
)
from exporters.vllm.experts import ExpertLoad, ExpertsRefused
from exporters.vllm.requests import Counted, OpenRequest, Summary, begin_ns, counted
from exporters.vllm.sink import Refusal, Refused, Sender
from exporters.vllm.tenants import TenantNames
from gpuglass import exemplar as exemplars
from gpuglass.config import EnginesConfig, TenantQuota
from gpuglass.exemplar import ExemplarPolicy, NameByRequest, RequestRef
from gpuglass.families import engine as families
from gpuglass.logs import LOG
from gpuglass.record_hub import EndedRequest
from gpuglass_vllm import records
from gpuglass_vllm.records import Record

GRACE_NS = 2_000_000_000
"""How long a request that has ended waits for the other processes' word; they speak about four times a
second."""
GONE_NS = 5_000_000_000
"""How long a process whose connection ended may take to come back before its requests count as lost with
it."""
ANSWERED_NS = 30_000_000_000
"""How long a request that a frontend is done with waits for the core, which may be inside a long step."""
RETURN_NS = 10_000_000_000
"""How long after the agent began to listen the processes of a server that was there before may take to come
back, one by one: each tries every five seconds."""
EXPIRE_NS = 900_000_000_000
"""How long a request without any news is kept."""
RETIRE_NS = 600_000_000_000
"""How long the account of an engine outlives its processes: several scrapes, whatever their interval."""
MAX_ACCOUNTS = 512
MAX_OPEN = 100_000
"""Open requests of all engines together: whoever may send cannot make the agent grow by inventing engines."""
_WORKLOAD = 3
"""Labels of the workload, the last ones of an engine."""
_SWEEP_NS = 5_000_000_000
_OLDEST_S, _NEWEST_S = 3600.0, 5.0
"""How far before and after now a time may lie; an event may have waited, the rest is a wrong clock offset."""
_ENTERS = "frontend.requests"
"""Hook of a frontend that tells of each request, who asked for it."""
_ANSWERS = "frontend.answers"
"""Hook of a frontend that counts ended requests; its core then does not (gpuglass_vllm)."""


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """What the configuration says about the ledger."""

    requests: int = 10_000
    """Open requests per engine."""
    tenants: int = 100
    """Tenants with series of their own."""
    quotas: Mapping[str, TenantQuota] = field(default_factory=dict)
    expert_window: float = 60.0
    """Seconds."""
    expert_matrix: bool = False

    @classmethod
    def of(cls, config: EnginesConfig) -> LedgerSettings:
        """From the section `engines`."""
        return cls(
            config.requests,
            config.tenants.limit,
            config.tenants.quotas,
            float(config.experts.window),
            config.experts.matrix,
        )


class Ledger:
    """All engines that tell this agent about themselves. Implements `exporters.vllm.sink.Sink`."""

    def __init__(
        self,
        settings: LedgerSettings | None = None,
        policy: ExemplarPolicy | None = None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.lock = threading.RLock()
        self.settings = settings if settings is not None else LedgerSettings()
        self.servers: dict[str, Server] = {}
        """By instance."""
        self.accounts: dict[Labels, Account] = {}
        self.tenants = TenantNames(self.settings.tenants, self.settings.quotas)
        self.told: Callable[[EndedRequest], None] | None = None
        """Hears of each request that has ended and is counted, with `lock` held."""
        self.listening_since_ns = 0
        """When the agent began to listen. 0: before any server did."""
        self._policy = policy if policy is not None else NameByRequest()
        self._wall = wall
        self._clock = clock
        self._places: dict[int, tuple[Server, Engine]] = {}
        """By number of the connection."""
        self._swept_at = 0
        self._warned: set[Labels] = set()
        self._take: dict[type, Callable[[Sender, Any, int], None]] = {
            records.RequestStart: self._start,
            records.RequestAnswered: self._answered,
            records.RequestRefused: self._refused,
            records.RequestProgress: self._progress,
            records.RequestEnd: self._end,
            records.GpuProgress: self._gpu,
            records.Preemption: self._preemption,
            records.PoolState: self._pool,
            records.TenantSums: self._tenant,
            records.CoreSums: self._core,
            records.StepSums: self._steps,
            records.ExpertSums: self._experts,
            records.HotExperts: self._hot_experts,
            records.AllocatorState: self._allocator,
            records.MemoryState: self._memory,
            records.OutOfMemory: self._out_of_memory,
        }

    def reconfigure(self, settings: LedgerSettings) -> None:
        """Take other limits and quotas. Windows of experts that exist keep their length."""
        self.settings = settings
        self.tenants.raise_limit(settings.tenants)
        self.tenants.admit_first(settings.quotas)

    # Sink

    def hello(self, sender: Sender) -> None:
        """A sender came, or something in its `hello` changed."""
        hello = sender.hello
        place = self._places.get(sender.number)
        if place is None:
            place = self._places[sender.number] = self._arrived(sender)
        _, engine = place
        self._relabel(engine, sender)
        lacking = frozenset(c.hook for c in hello.capabilities if c.state != "active")
        if hello.role == CORE:
            engine.account.lacking = lacking
        elif hello.role == WORKER and (worker := engine.account.worker(hello.rank)) is not None:
            worker.lacking = lacking
        if hello.role == CORE and hello.pool is not None:
            engine.pool = hello.pool
            for totals in engine.account.tenants.values():
                totals.weigh(hello.pool.block_bytes)

    def take(self, sender: Sender, record: Record, now_ns: int) -> None:
        """One checked record. Raises `Refused`."""
        if sender.number not in self._places:
            raise Refused(Refusal.INTERNAL)  # its hello failed: nothing may be lost unseen
        take = self._take.get(type(record))
        if take is not None:
            take(sender, record, now_ns)

    def gone(self, sender: Sender) -> None:
        """A connection ended."""
        place = self._places.pop(sender.number, None)
        if place is None:
            return
        server, engine = place
        hello = sender.hello
        now_ns = self._clock()
        engine.senders(hello.role).pop(sender.number, None)
        if hello.role == FRONTEND:
            server.gone_frontends[hello.sender] = now_ns
        elif hello.role == WORKER:
            worker = engine.account.worker(hello.rank)
            if worker is not None and worker.sender is sender:
                worker.went()
        if hello.role != FRONTEND and not engine.cores and (hello.role == CORE or not engine.workers):
            self._core_went(server, engine, now_ns)
        if not server.is_live:
            for other in server.engines.values():
                self._core_went(server, other, now_ns)
        if not engine.is_live:
            engine.account.idle_since = now_ns

    # Processes

    def _arrived(self, sender: Sender) -> tuple[Server, Engine]:
        hello = sender.hello
        server = self.servers.get(hello.instance)
        if server is None:
            server = self.servers[hello.instance] = Server(hello.instance)
        engine = server.engines.get(hello.engine)
        if engine is None:
            engine = server.engines[hello.engine] = Engine(hello.engine, self._account(sender))
        elif not engine.is_live and not self._is_ours(engine):
            engine.account = self._account(sender)
        engine.senders(hello.role)[sender.number] = sender
        account = engine.account
        account.idle_since = None
        if hello.role == FRONTEND:
            server.gone_frontends.pop(hello.sender, None)
        elif hello.role == CORE:
            account.had_core = True
            engine.core_gone_at = None
        else:
            worker = account.worker(hello.rank)
            if worker is not None:
                worker.came(sender)
        return server, engine

    def _live(self) -> dict[Labels, Engine]:
        return {
            engine.account.labels: engine
            for server in self.servers.values()
            for engine in server.engines.values()
            if engine.is_live
        }

    def _is_ours(self, engine: Engine) -> bool:
        """Whether an engine that comes back can go on in its account."""
        account = engine.account
        return self.accounts.get(account.labels) is account and account.labels not in self._live()

    def _account(self, sender: Sender) -> Account:
        """The account of an engine that no live engine has."""
        wanted = labels_of(sender)
        labels = free_labels(wanted, self._live())
        if labels != wanted and wanted not in self._warned and len(self._warned) < MAX_ACCOUNTS:
            self._warned.add(wanted)
            LOG.warning(
                "two servers of model %s have the same labels, the later one gets server=%r; "
                "set GPUGLASS_SERVER in their environments to name them",
                wanted.model_name,
                labels.server,
            )
        account = self.accounts.get(labels)
        if account is None:
            if len(self.accounts) >= MAX_ACCOUNTS:
                self._drop_oldest_account()
            load = ExpertLoad(self.settings.expert_window, self.settings.expert_matrix)
            account = self.accounts[labels] = Account(labels, load)
        return account

    def _relabel(self, engine: Engine, sender: Sender) -> None:
        """Give an engine the names of its workload, which may be known only seconds after it connected."""
        account = engine.account
        known = labels_of(sender)[-_WORKLOAD:]
        if sum(map(bool, known)) <= sum(map(bool, account.labels[-_WORKLOAD:])):
            return
        old = account.labels
        wanted = Labels(*old[:-_WORKLOAD], *known)._replace(server=sender.hello.server)
        labels = free_labels(wanted, self._live())
        if self.accounts.get(old) is account:
            del self.accounts[old]
        # An account that lay there idle was scraped under these labels: to a reader its counters start anew.
        account.labels = labels
        self.accounts[labels] = account

    def _drop_oldest_account(self) -> None:
        idle = [(a.idle_since, labels) for labels, a in self.accounts.items() if a.idle_since is not None]
        if idle:
            del self.accounts[min(idle)[1]]

    def _core_went(self, server: Server, engine: Engine, now_ns: int) -> None:
        """Nobody tells any more what the engine holds: that is unknown from now on, not zero."""
        if engine.core_gone_at is None:
            engine.core_gone_at = now_ns
        engine.state = None
        for request in engine.hogs.values():
            request.hog_since = None
        engine.hogs.clear()
        for request in server.requests.values():
            if request.engine is engine:
                request.blocks, request.running = 0.0, False

    # Time

    def tick(self, now_ns: int) -> None:
        """Do what time has made due; to be called about once a second."""
        for server in list(self.servers.values()):
            for engine in server.engines.values():
                gone_at = engine.core_gone_at
                if gone_at is not None and now_ns - gone_at >= GONE_NS:
                    engine.core_gone_at = None
                    self._died(server, engine, gone_at, now_ns)
            for request in list(server.closing.values()):
                if request.due is not None and request.due <= now_ns:
                    self._close_or_wait(server, request, now_ns)
            for name in [n for n, at in server.gone_frontends.items() if now_ns - at >= GONE_NS]:
                del server.gone_frontends[name]
        for account in self.accounts.values():
            account.experts.move_on(now_ns)
        if now_ns - self._swept_at >= _SWEEP_NS:
            self._swept_at = now_ns
            self._sweep(now_ns)

    def _died(self, server: Server, engine: Engine, gone_at: int, now_ns: int) -> None:
        """The engine has gone for good: what it was at has failed."""
        nobody_left = not any(other.cores for other in server.engines.values())
        for request in list(server.requests.values()):
            ours = request.engine is engine and (request.core_seen or request.gpu_ns or nobody_left)
            if ours and request.end is None:
                request.died_at = gone_at
                request.due = now_ns
                server.closing[request.request_id] = request

    def _close_or_wait(self, server: Server, request: OpenRequest, now_ns: int) -> None:
        frontend = request.frontend
        if request.answer is None and frontend is not None:
            # What a frontend that is coming back has to say would come too late.
            gone_at = server.gone_frontends.get(frontend.hello.sender)
            if gone_at is not None and now_ns - gone_at < GONE_NS:
                request.due = gone_at + GONE_NS
                return
        self._close(server, request)

    def _sweep(self, now_ns: int) -> None:
        for server in list(self.servers.values()):
            for request in list(server.requests.values()):
                if request.due is None and now_ns - request.news_at >= EXPIRE_NS:
                    self._forget(server, request, "expired")
                elif self._is_lost(request, now_ns) or self._is_over(request, now_ns):
                    self._forget(server, request, "lost")
                    server.remember(request.request_id)
            if not server.is_live and not server.requests:
                del self.servers[server.instance]
        for labels, account in list(self.accounts.items()):
            if account.idle_since is not None and now_ns - account.idle_since >= RETIRE_NS:
                del self.accounts[labels]

    @staticmethod
    def _is_lost(request: OpenRequest, now_ns: int) -> bool:
        """Whether the core has said since that it has no request at all: the word of its end was dropped."""
        state = request.engine.state
        return (
            request.due is None
            and request.core_seen
            and state is not None
            and state.running == state.waiting == 0
            and request.at < state.at - 1_000_000_000
            and now_ns - request.news_at >= GONE_NS
        )

    @staticmethod
    def _is_over(request: OpenRequest, now_ns: int) -> bool:
        """Whether only workers speak of it, and say that it has ended: all else was told before we came."""
        return (
            request.due is None
            and not request.is_known
            and request.gpu_ended is not None
            and now_ns - request.news_at >= ANSWERED_NS
        )

    def _forget(self, server: Server, request: OpenRequest, reason: str) -> None:
        request.engine.account.untracked[reason] += 1
        request.engine.hogs.pop(request.request_id, None)
        del server.requests[request.request_id]

    # Requests

    def _open(self, server: Server, engine: Engine, request_id: str, now_ns: int) -> OpenRequest | None:
        """The open request of that id, a new one if need be; None if it is done. Raises `Refused`."""
        request = server.requests.get(request_id)
        if request is not None:
            return request
        if request_id in server.done:
            return None
        if (
            len(server.requests) >= self.settings.requests * len(server.engines)
            or sum(len(other.requests) for other in self.servers.values()) >= MAX_OPEN
        ):
            engine.account.untracked["limit"] += 1
            server.remember(request_id)
            raise Refused(Refusal.TOO_MANY_REQUESTS)
        request = server.requests[request_id] = OpenRequest(request_id, engine, now_ns)
        return request

    def _told(self, sender: Sender, request_id: str, now_ns: int) -> tuple[Server, OpenRequest | None]:
        """The request that a core or worker speaks of; it belongs to the speaker's engine."""
        server, engine = self._places[sender.number]
        request = self._open(server, engine, request_id, now_ns)
        if request is not None:
            request.news_at = now_ns
            request.engine = engine
        return server, request

    def _start(self, sender: Sender, record: records.RequestStart, now_ns: int) -> None:
        server, engine = self._places[sender.number]
        request = self._open(server, engine, record.request_id, now_ns)
        if request is None:
            return
        request.news_at = now_ns
        request.first_at = min(request.first_at, record.at)
        request.frontend = sender
        request.tenant = record.tenant or request.tenant
        request.external_id = record.external_id
        request.trace_id = record.trace_id
        request.span_id = record.span_id
        request.sampled = record.sampled
        request.max_tokens = record.max_tokens
        request.lora = record.lora

    def _answered(self, sender: Sender, record: records.RequestAnswered, now_ns: int) -> None:
        server, engine = self._places[sender.number]
        request = self._open(server, engine, record.request_id, now_ns)
        if request is not None and request.answer is None:
            request.news_at = now_ns
            request.answer = record
            request.external_id = request.external_id or record.external_id
            if record.trace_id and not request.trace_id:
                request.trace_id, request.span_id = record.trace_id, record.span_id
                request.sampled = record.sampled
            request.max_tokens = request.max_tokens or record.max_tokens
            request.lora = request.lora or record.lora
            self._settle(server, request, now_ns)

    def _refused(self, sender: Sender, record: records.RequestRefused, now_ns: int) -> None:
        server, engine = self._places[sender.number]
        place = Counted(
            engine.account,
            Kind("rejected", record.error_type, False),
            self.tenants.label(record.tenant),
            ((families.REQUEST_DURATION, record.duration_ns / 1e9),),
        )
        place.count()
        unix = self._unix(sender, record.at)
        if not self._policy.waits:
            ref = RequestRef(record.external_id, "", record.trace_id)
            place.name(exemplars.fit(self._policy.names(ref)), unix)
        if self.told is None:
            return
        self.told(
            EndedRequest(
                instance=server.instance,
                request_id="",
                external_id=record.external_id,
                trace_id=record.trace_id,
                span_id=record.span_id,
                sampled=record.sampled,
                outcome="rejected",
                error_type=record.error_type,
                begin_ns=record.at - record.duration_ns,
                end_ns=record.at,
                clock_offset_ns=self._offset(sender, record.at),
                tenant=place.tenant,
                exemplify=self._exemplify(place, unix),
                **_engine_fields(engine, sender),
            )
        )

    def _progress(self, sender: Sender, record: records.RequestProgress, now_ns: int) -> None:
        _, request = self._told(sender, record.request_id, now_ns)
        if request is None or request.end is not None or record.at < request.at:
            return
        request.core_seen = True
        request.first_at = min(request.first_at, record.at)
        request.at = record.at
        request.tenant = record.tenant or request.tenant
        request.running = record.running
        request.blocks = record.blocks
        peak = max(record.peak_blocks, record.blocks)
        if peak > request.peak_blocks:
            request.peak_blocks, request.peak_at = peak, record.at
        request.preemptions = max(request.preemptions, record.preemptions)
        engine = request.engine
        pool = engine.pool
        if pool is not None and record.blocks > pool.blocks * HOG_SHARE:
            if request.hog_since is None:
                request.hog_since = record.at
                engine.hogs[request.request_id] = request
        elif request.hog_since is not None:
            self._stop_hogging(sender, request, record.at)

    def _end(self, sender: Sender, record: records.RequestEnd, now_ns: int) -> None:
        server, request = self._told(sender, record.request_id, now_ns)
        if request is None or request.end is not None:
            return
        request.core_seen = True
        request.end = record
        request.at = record.at
        request.tenant = record.tenant or request.tenant
        request.blocks = 0.0
        request.running = False
        self._stop_hogging(sender, request, record.at)
        self._settle(server, request, now_ns)

    def _gpu(self, sender: Sender, record: records.GpuProgress, now_ns: int) -> None:
        server, engine = self._places[sender.number]
        rank = sender.hello.rank
        found = server.requests
        recomputed = record.recompute_ns
        for index, request_id in enumerate(record.request_ids):
            request = found.get(request_id)
            if request is None:
                try:
                    request = self._open(server, engine, request_id, now_ns)
                except Refused:
                    continue
                if request is None:
                    continue
            request.news_at = now_ns
            request.engine = engine
            request.gpu_ns[rank] = record.gpu_ns[index]
            if recomputed and recomputed[index]:
                if request.recompute_ns is None:
                    request.recompute_ns = {}
                request.recompute_ns[rank] = recomputed[index]
        for request_id in record.ended:
            request = found.get(request_id)
            if request is not None:
                if request.gpu_ended is None:
                    request.gpu_ended = set()
                request.gpu_ended.add(rank)
                self._settle(server, request, now_ns)

    def finish(self) -> None:
        """The agent stops: close the requests that both frontend and core are done with. What is known of the
        others by halves is the next agent's."""
        for server in self.servers.values():
            for request in list(server.closing.values()):
                if request.end is not None and not self._awaits_answer(server, request):
                    self._close(server, request)

    def _settle(self, server: Server, request: OpenRequest, now_ns: int) -> None:
        """Close a request of which all is told, or set the time until which to wait for the rest."""
        if request.in_flight:
            return
        if request.end is not None and request.answer is not None and request.was_closed:
            self._close(server, request)
            return
        until = 0
        if begin_ns(request) < self.listening_since_ns:
            # What is not connected yet may have a part of it to tell.
            until = self.listening_since_ns + RETURN_NS
        if request.end is not None and now_ns >= until and self._is_complete(server, request):
            self._close(server, request)
            return
        waits_for_core = request.end is None and any(engine.cores for engine in server.engines.values())
        due = max(until, now_ns + (ANSWERED_NS if waits_for_core else GRACE_NS))
        request.due = due if request.due is None else min(request.due, due)
        server.closing[request.request_id] = request

    @staticmethod
    def _awaits_answer(server: Server, request: OpenRequest) -> bool:
        """Whether a frontend has still to say how it answered."""
        return request.answer is None and (server.has_frontend or bool(server.gone_frontends))

    def _is_complete(self, server: Server, request: OpenRequest) -> bool:
        """Whether nobody has anything to add to a request that has left the scheduler."""
        if self._awaits_answer(server, request):
            return False
        if request.end is not None and request.end.queue_ns < 0:
            return True  # it never ran: no worker knows it
        workers = request.engine.workers
        return not workers or (request.gpu_ended is not None and len(request.gpu_ended) >= len(workers))

    def _close(self, server: Server, request: OpenRequest) -> None:
        del server.requests[request.request_id]
        server.closing.pop(request.request_id, None)
        request.engine.hogs.pop(request.request_id, None)
        server.remember(request.request_id)
        if request.was_closed:
            return
        summary = Summary.of(request)
        tenant = self.tenants.label(request.tenant)
        if self._nobody_counted(server, request):
            request.engine.account.tenant(tenant).ended(summary.outcome, summary.error_type)
        place = counted(request, summary, tenant)
        place.count()
        self._ended(server, request, summary, place)

    def _nobody_counted(self, server: Server, request: OpenRequest) -> bool:
        """Whether the process that would have counted this end in its sums went before it came to that.

        A frontend that sees answers counts them, otherwise the core does.
        """
        frontend = request.frontend
        if frontend is not None and _has(frontend, _ANSWERS):
            return request.answer is None and not any(
                frontend.number in engine.frontends for engine in server.engines.values()
            )
        return request.died_at is not None and request.end is None

    def _ended(self, server: Server, request: OpenRequest, summary: Summary, place: Counted) -> None:
        """Name the request in exemplars, now or by whoever hears of its end, and tell of the end."""
        speaker = request.frontend or request.engine.speaker
        unix = self._unix(speaker, summary.at)
        if not self._policy.waits:
            place.name(exemplars.fit(self._policy.names(request.ref)), unix)
        if self.told is None:
            return
        begun_ns, ended_ns = _life(request, self._clock())
        self.told(
            EndedRequest(
                instance=server.instance,
                request_id=request.request_id,
                external_id=request.external_id,
                trace_id=request.trace_id,
                span_id=request.span_id,
                sampled=request.sampled,
                outcome=summary.outcome,
                error_type=summary.error_type,
                begin_ns=begun_ns,
                end_ns=ended_ns,
                clock_offset_ns=self._offset(speaker, ended_ns),
                queue_ns=summary.queue_ns,
                prefill_ns=summary.prefill_ns,
                decode_ns=summary.decode_ns,
                first_token_ns=summary.first_token_ns,
                prompt_tokens=summary.prompt_tokens,
                cached_tokens=summary.cached_tokens,
                output_tokens=summary.output_tokens,
                max_tokens=request.max_tokens or None,
                preemptions=summary.preemptions,
                kv_share=place.peak,
                kv_share_at=request.peak_at or ended_ns,
                gpu_ns=summary.gpu_ns,
                recompute_ns=summary.recompute_ns,
                tenant=place.tenant,
                lora=request.lora,
                caller_known=self._knows_caller(server, request),
                exemplify=self._exemplify(place, unix),
                **_engine_fields(request.engine, speaker),
            )
        )

    @staticmethod
    def _knows_caller(server: Server, request: OpenRequest) -> bool:
        """Whether it is told who asked: not if a frontend is there to tell that, and its word was dropped."""
        if request.frontend is not None or request.answer is not None:
            return True
        frontends = (f for engine in server.engines.values() for f in engine.frontends.values())
        return not any(_has(frontend, _ENTERS) for frontend in frontends)

    def _exemplify(self, place: Counted, unix: float) -> Callable[[exemplars.Names], None]:
        def exemplify(names: exemplars.Names) -> None:
            with self.lock:
                place.name(exemplars.fit(names), unix)

        return exemplify

    # Exemplars

    def _unix(self, sender: Sender | None, at: int) -> float:
        """Unix time of a moment on a sender's clock; now, if that cannot be true."""
        now = self._wall()
        unix = (at + sender.hello.clock_offset_ns) / 1e9 if sender is not None and at > 0 else now
        return unix if now - _OLDEST_S < unix < now + _NEWEST_S else now

    def _offset(self, sender: Sender | None, at: int) -> int:
        """What makes Unix time of a sender's nanoseconds; our own clock's, if the sender's cannot be true."""
        if sender is not None:
            unix = (at + sender.hello.clock_offset_ns) / 1e9
            if unix == self._unix(sender, at):
                return sender.hello.clock_offset_ns
        return int(self._wall() * 1e9) - self._clock()

    def _exemplar(self, sender: Sender, ref: RequestRef, value: float, at: int) -> Exemplar | None:
        return exemplars.exemplar(exemplars.fit(self._policy.names(ref)), value, self._unix(sender, at))

    def _ref(self, server: Server, request_id: str) -> RequestRef:
        request = server.requests.get(request_id)
        return request.ref if request is not None else RequestRef(request_id)

    # KV cache

    def _pool(self, sender: Sender, record: records.PoolState, now_ns: int) -> None:
        _, engine = self._places[sender.number]
        if engine.state is not None and record.at < engine.state.at:
            return
        engine.state = record
        # The largest one first: of exemplars with the same time the first is kept.
        for request in sorted(engine.hogs.values(), key=lambda request: -request.blocks):
            self._hogged(sender, request, record.at)

    def _hogged(self, sender: Sender, request: OpenRequest, at: int) -> None:
        """Count the time until `at` in which a request held a large part of the pool."""
        since = request.hog_since
        if since is None or at <= since:
            return
        request.hog_since = at
        request.hog_ns += at - since
        tenant = self.tenants.label(request.tenant)
        exemplar = self._exemplar(sender, request.ref, round(request.hog_ns / 1e9, 6), at)
        request.engine.account.hogged(tenant, at - since, exemplar)

    def _stop_hogging(self, sender: Sender, request: OpenRequest, at: int) -> None:
        self._hogged(sender, request, at)
        request.hog_since = None
        request.engine.hogs.pop(request.request_id, None)

    def _preemption(self, sender: Sender, record: records.Preemption, now_ns: int) -> None:
        server, engine = self._places[sender.number]
        cause = record.cause if record.cause in engine.account.preemptions else "unknown"
        victim = server.requests.get(record.victim)
        if victim is not None and record.at >= victim.at and victim.end is None:
            self._stop_hogging(sender, victim, record.at)
            victim.at, victim.blocks, victim.running = record.at, 0.0, False
        names = self._policy.names(self._ref(server, record.victim))
        holder = next((holder for holder in record.holders if holder != record.victim), None)
        if holder is not None:
            names = exemplars.side_by_side(names, self._policy.names(self._ref(server, holder)))
        found = exemplars.exemplar(exemplars.fit(names), 1.0, self._unix(sender, record.at))
        kept = exemplars.newer(engine.account.preemption_exemplars.get(cause), found)
        if kept is not None:
            engine.account.preemption_exemplars[cause] = kept

    # Sums

    def _tenant(self, sender: Sender, record: records.TenantSums, now_ns: int) -> None:
        _, engine = self._places[sender.number]
        label = self.tenants.label(record.tenant)
        engine.account.tenant(label).add(record, engine.block_bytes)
        engine.account.waste("recompute", label, record.recompute_ns)

    def _core(self, sender: Sender, record: records.CoreSums, now_ns: int) -> None:
        _, engine = self._places[sender.number]
        account = engine.account
        try:
            account.evictions.add(record.evictions, record.eviction_seconds)
        except ValueError:
            raise Refused(Refusal.OUT_OF_RANGE) from None
        for cause, count in record.preemptions.items():
            account.preemptions[cause if cause in account.preemptions else "unknown"] += count

    def _steps(self, sender: Sender, record: records.StepSums, now_ns: int) -> None:
        _, engine = self._places[sender.number]
        worker = engine.account.worker(sender.hello.rank)
        try:
            if worker is None:
                raise ValueError("too many ranks")
            worker.add(record, now_ns)
        except ValueError:
            raise Refused(Refusal.OUT_OF_RANGE) from None

    def _experts(self, sender: Sender, record: records.ExpertSums, now_ns: int) -> None:
        _, engine = self._places[sender.number]
        try:
            if sender.hello.experts is None:
                raise ExpertsRefused("no layers were announced")
            engine.account.experts.add(
                now_ns,
                sender.hello.experts,
                record.first,
                record.counts,
                record.counted_tokens,
                record.seen_tokens,
            )
        except ExpertsRefused:
            raise Refused(Refusal.OUT_OF_RANGE) from None

    # Other words of workers

    def _hot_experts(self, sender: Sender, record: records.HotExperts, now_ns: int) -> None:
        _, engine = self._places[sender.number]
        try:
            if sender.hello.experts is None:
                raise ExpertsRefused("no layers were announced")
            engine.account.experts.add_hot(now_ns, sender.hello.experts, record)
        except ExpertsRefused:
            raise Refused(Refusal.OUT_OF_RANGE) from None

    def _allocator(self, sender: Sender, record: records.AllocatorState, now_ns: int) -> None:
        _, engine = self._places[sender.number]
        worker = engine.account.worker(sender.hello.rank)
        if worker is not None:
            worker.allocated(record)

    def _memory(self, sender: Sender, record: records.MemoryState, now_ns: int) -> None:
        _, engine = self._places[sender.number]
        worker = engine.account.worker(sender.hello.rank)
        if worker is not None:
            worker.remembered(record)

    def _out_of_memory(self, sender: Sender, record: records.OutOfMemory, now_ns: int) -> None:
        server, engine = self._places[sender.number]
        worker = engine.account.worker(sender.hello.rank)
        if worker is None:
            return
        worker.out_of_memory += 1
        if record.request_ids:
            found = self._exemplar(sender, self._ref(server, record.request_ids[0]), 1.0, record.at)
            worker.out_of_memory_exemplar = exemplars.newer(worker.out_of_memory_exemplar, found)


def _has(sender: Sender, hook: str) -> bool:
    return any(c.hook == hook and c.state == "active" for c in sender.hello.capabilities)


def _life(request: OpenRequest, now_ns: int) -> tuple[int, int]:
    """When a request arrived and when all of it was over, as core and frontend saw it."""
    begin = begin_ns(request)
    ends = [told.at for told in (request.end, request.answer) if told is not None]
    return begin, max(*ends, begin) if ends else max(request.died_at or now_ns, begin)


def _engine_fields(engine: Engine, speaker: Sender | None) -> dict[str, Any]:
    """What an `EndedRequest` says of its engine."""
    labels = engine.account.labels
    hello = speaker.hello if speaker is not None else None
    workers = sorted(engine.account.workers.items())
    return {
        "model_name": labels.model_name,
        "engine": labels.engine,
        "server": labels.server,
        "workload": (labels.namespace, labels.pod, labels.container),
        "software": (hello.engine_name, hello.engine_version) if hello is not None else ("", ""),
        "gpu_uuids": tuple(worker.gpu_uuid for _, worker in workers if worker.gpu_uuid),
    }
