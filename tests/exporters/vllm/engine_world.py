"""A ledger with engines that speak to it, without sockets: records go in, a parsed exposition comes out.

The clock stands still unless a test moves it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Exemplar, Sample

from exporters.vllm.ledger import Ledger, LedgerSettings
from exporters.vllm.publish import fast_batch, slow_batch
from exporters.vllm.sink import Sender
from gpuglass import catalog
from gpuglass.exemplar import ExemplarPolicy
from gpuglass.family import Batch, Family, Kind, Owner, Tier
from gpuglass.store import Store, negotiate
from gpuglass_vllm import records

SECOND = 1_000_000_000
UNIX = 1_790_000_000
"""Unix time at which the clock of the world stands at 1000 s."""
OPENMETRICS = "application/openmetrics-text;version=1.0.0"
POOL = records.Pool(blocks=100, block_bytes=4096, block_tokens=16)
_numbers = count(1)


@dataclass
class World:
    """One ledger, its clock, and what a scrape of it says."""

    settings: LedgerSettings = field(default_factory=LedgerSettings)
    now: int = 1000 * SECOND
    policy: ExemplarPolicy | None = None

    def __post_init__(self) -> None:
        self.ledger = Ledger(
            self.settings, self.policy, wall=lambda: UNIX + self.now / SECOND - 1000, clock=lambda: self.now
        )
        self.store = Store(catalog.owned_by(Owner.AGENT))
        self._fast, self._slow = Batch(), Batch()
        self._scraped: list[Sample] | None = None

    def connect(self, role: str, **hello: object) -> Sender:
        """A process that has said hello."""
        number = next(_numbers)
        said: dict[str, object] = {
            "version": records.VERSION,
            "sender": f"process-{number}",
            "instance": "server-a",
            "role": role,
            "engine_name": "vllm",
            "engine_version": "0.32.0",
            "software": "gpuglass-vllm/0.1.0",
            "model_name": "tiny",
            "rank": 0 if role == "worker" else -1,
            "clock_offset_ns": (UNIX - 1000) * SECOND,
            "pool": POOL if role == "core" else None,
        }
        sender = Sender(number, records.Hello(**(said | hello)), 100 + number, 0, 0, self.now)  # type: ignore[arg-type]
        self.ledger.hello(sender)
        self._scraped = None
        return sender

    def kill(self, sender: Sender) -> None:
        """Its connection ends."""
        self.ledger.gone(sender)
        self._scraped = None

    def tell(self, sender: Sender, *told: records.Record) -> None:
        """Records of one sender, now."""
        sender.seen_at = self.now
        self._scraped = None
        for record in told:
            self.ledger.take(sender, record, self.now)

    def wait(self, seconds: float) -> None:
        """Time passes, with the ledger's tick each half second."""
        self._scraped = None
        end = self.now + int(seconds * SECOND)
        while self.now < end:
            self.now = min(end, self.now + SECOND // 2)
            self.ledger.tick(self.now)

    def published(self) -> Batch:
        """Publish both tiers; gives the slow one."""
        self._fast = fast_batch(self.ledger, self._fast)
        self._slow = slow_batch(self.ledger, self._slow, self.now)
        self.store.publish("fast", self._fast)
        self.store.publish("slow", self._slow)
        return self._slow

    def exposition(self, accept: str = OPENMETRICS) -> str:
        """Both tiers as a scrape gets them."""
        self.published()
        return self.store.exposition(frozenset(Tier), negotiate(accept)).decode()

    def samples(self) -> list[Sample]:
        """The exposition, parsed; read once until something happens."""
        if self._scraped is None:
            parsed = text_string_to_metric_families(self.exposition())
            self._scraped = [sample for family in parsed for sample in family.samples]
        return self._scraped

    def find(self, family: Family | str, **labels: str) -> list[Sample]:
        """Samples of a family (or of the sample name given) with these labels among theirs."""
        name = family if isinstance(family, str) else family.name
        if isinstance(family, Family) and family.kind is Kind.HISTOGRAM:
            name = f"{name}_count"
        return [s for s in self.samples() if s.name == name and s.labels.items() >= labels.items()]

    def value(self, family: Family | str, **labels: str) -> float | None:
        """Value of the one such sample (a histogram's count); None if there is none."""
        found = self.find(family, **labels)
        assert len(found) <= 1, found
        return float(found[0].value) if found else None

    def sum(self, family: Family, **labels: str) -> float:
        """Sum of a histogram over all its label sets."""
        return sum(float(s.value) for s in self.find(f"{family.name}_sum", **labels))

    def exemplars(self, family: Family, **labels: str) -> list[Exemplar]:
        """Exemplars of a counter, or of a histogram's buckets."""
        name = f"{family.name}_bucket" if family.kind is Kind.HISTOGRAM else family.name
        return [s.exemplar for s in self.find(name, **labels) if s.exemplar is not None]


TRACE = "0af7651916cd43dd8448eb211c80319c"


def start(request_id: str, at: int, **more: object) -> records.RequestStart:
    """A frontend's word of a request that entered."""
    return records.RequestStart(at=at, request_id=request_id, **more)  # type: ignore[arg-type]


def end(request_id: str, at: int, **more: object) -> records.RequestEnd:
    """A core's word of a request that ran for a second: 0.1 s queue, 0.2 s prefill, 0.7 s decode."""
    told: dict[str, object] = {
        "outcome": "stop",
        "arrival_ns": at - SECOND,
        "queue_ns": SECOND // 10,
        "prefill_ns": SECOND // 5,
        "decode_ns": SECOND * 7 // 10,
        "prompt_tokens": 100,
        "cached_tokens": 32,
        "output_tokens": 20,
        "peak_blocks": 8.0,
    }
    return records.RequestEnd(at=at, request_id=request_id, **(told | more))  # type: ignore[arg-type]


def progress(request_id: str, at: int, blocks: float, **more: object) -> records.RequestProgress:
    """A core's word of a running request."""
    told: dict[str, object] = {"running": True, "peak_blocks": blocks}
    return records.RequestProgress(at=at, request_id=request_id, blocks=blocks, **(told | more))  # type: ignore[arg-type]


def gpu(request_id: str, at: int, seconds: float, ended: bool = False) -> records.GpuProgress:
    """A worker's word of a request."""
    return records.GpuProgress(
        at=at, request_ids=[request_id], gpu_ns=[seconds * SECOND], ended=[request_id] if ended else []
    )
