"""The account of one engine: everything that is exported of it and must outlive its processes.

An account belongs to a set of label values, not to a process: an engine that is started again goes on in the
account of the one before, so its counters neither start again nor lose what was not scraped yet.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

from prometheus_client.samples import Exemplar

from exporters.vllm.experts import ExpertLoad
from exporters.vllm.histograms import Observed
from exporters.vllm.steps import WorkerTotals
from exporters.vllm.tenants import TenantTotals
from gpuglass.exemplar import newer
from gpuglass.families import engine as families
from gpuglass.family import Family
from gpuglass_vllm.records import PREEMPTION_CAUSES

MAX_WORKERS = 1024
"""Ranks of an engine that are told apart."""
UNTRACKED = ("limit", "expired", "lost")
"""Why a request is missing in the histograms of requests."""


class Labels(NamedTuple):
    """Label values of an engine, in the order of `families.ENGINE`."""

    model_name: str
    engine: str
    server: str
    namespace: str
    pod: str
    container: str


class Kind(NamedTuple):
    """How a request ended: the labels by which requests are told apart."""

    outcome: str
    error_type: str
    preempted: bool


class Time:
    """Nanoseconds that add up, and the request that added last."""

    __slots__ = ("exemplar", "ns")

    def __init__(self) -> None:
        self.ns = 0.0
        self.exemplar: Exemplar | None = None


Key = TypeVar("Key", bound=Hashable)


class Account:
    """Totals of one engine since the agent started."""

    __slots__ = (
        "evictions",
        "experts",
        "had_core",
        "hogging",
        "idle_since",
        "labels",
        "lacking",
        "peaks",
        "preemption_exemplars",
        "preemptions",
        "requests",
        "tenants",
        "untracked",
        "wasted",
        "workers",
    )

    def __init__(self, labels: Labels, experts: ExpertLoad) -> None:
        self.labels = labels
        self.experts = experts
        self.had_core = False
        self.lacking: frozenset[str] = frozenset()
        """Hooks that do not work in the core: what they would have counted is unknown, not zero."""
        self.idle_since: int | None = None
        """When its last process went; None while one is connected."""
        self.tenants: dict[str, TenantTotals] = {}
        """By label value."""
        self.hogging: dict[str, Time] = {}
        """Time that single requests held a large part of the pool, by tenant."""
        self.peaks = Observed(families.KV_PEAK)
        self.evictions = Observed(families.KV_EVICT)
        self.preemptions = dict.fromkeys(PREEMPTION_CAUSES, 0)
        self.preemption_exemplars: dict[str, Exemplar] = {}
        self.requests: dict[Family, dict[Kind, Observed]] = {}
        self.wasted: dict[tuple[str, str], Time] = {}
        """By reason and tenant."""
        self.untracked = dict.fromkeys(UNTRACKED, 0)
        self.workers: dict[int, WorkerTotals] = {}

    def tenant(self, label: str) -> TenantTotals:
        """Totals of a tenant."""
        totals = self.tenants.get(label)
        if totals is None:
            totals = self.tenants[label] = TenantTotals()
        return totals

    def hogged(self, tenant: str, ns: int, exemplar: Exemplar | None) -> None:
        """A request held a large part of the pool for a while."""
        _add(self.hogging, tenant, ns, exemplar)

    def worker(self, rank: int) -> WorkerTotals | None:
        """Totals of a rank; None beyond the bound."""
        found = self.workers.get(rank)
        if found is None and len(self.workers) < MAX_WORKERS:
            found = self.workers[rank] = WorkerTotals()
        return found

    def observe(self, family: Family, kind: Kind, value: float) -> None:
        """One request in one of the histograms of requests."""
        by_kind = self.requests.setdefault(family, {})
        observed = by_kind.get(kind)
        if observed is None:
            observed = by_kind[kind] = Observed(family)
        observed.observe(value)

    def exemplify(self, family: Family, kind: Kind, value: float, exemplar: Exemplar) -> None:
        """Name a request that was observed there."""
        observed = self.requests.get(family, {}).get(kind)
        if observed is not None:
            observed.exemplify(value, exemplar)

    def waste(self, reason: str, tenant: str, ns: float) -> None:
        """GPU time whose result nobody used."""
        _add(self.wasted, (reason, tenant), ns, None)

    def name(self, what: Mapping[Key, Time], key: Key, exemplar: Exemplar) -> None:
        """Name a request that added to a time of `hogging` or `wasted`."""
        time = what.get(key)
        if time is not None:
            time.exemplar = newer(time.exemplar, exemplar)


def _add(times: dict[Key, Time], key: Key, ns: float, exemplar: Exemplar | None) -> None:
    if ns <= 0:
        return
    time = times.get(key)
    if time is None:
        time = times[key] = Time()
    time.ns += ns
    time.exemplar = newer(time.exemplar, exemplar)
