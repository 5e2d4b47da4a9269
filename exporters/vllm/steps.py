"""What a worker tells of its steps and its memory, summed since the agent started."""

from __future__ import annotations

from collections import deque

from prometheus_client.samples import Exemplar

from exporters.vllm.histograms import Observed
from exporters.vllm.sink import Sender
from gpuglass.families import engine as families
from gpuglass_vllm.records import AllocatorState, MemoryState, StepSums

FLOPS_WINDOW_NS = 15_000_000_000
"""Over which the use of floating-point operations is computed."""
CLOCKS = ("cuda", "wall")
_SAMPLE_NS = 1_000_000_000
_SAMPLES = 32


class StepTotals:
    """Steps that were timed by one clock."""

    __slots__ = (
        "decode_ns",
        "dummy_ns",
        "host_fed_ns",
        "idle_ns",
        "padding_ns",
        "prefill_ns",
        "seconds",
        "unattributed_ns",
    )

    def __init__(self) -> None:
        self.prefill_ns = 0.0
        self.decode_ns = 0.0
        self.padding_ns = 0.0
        self.dummy_ns = 0.0
        self.unattributed_ns = 0.0
        self.idle_ns = 0.0
        self.host_fed_ns = 0.0
        self.seconds = Observed(families.STEP)

    def parts(self) -> dict[str, float]:
        """Nanoseconds by part; they add up to the time of all steps."""
        return {
            "prefill": self.prefill_ns,
            "decode": self.decode_ns,
            "padding": self.padding_ns,
            "dummy": self.dummy_ns,
            "unattributed": self.unattributed_ns,
        }


class WorkerTotals:
    """One worker of an engine, by rank. Outlives the process: the next one with its rank goes on counting."""

    __slots__ = (
        "_gpu_uuid",
        "_ooms_before",
        "_process",
        "_retries_before",
        "allocator",
        "batches",
        "clocks",
        "decode_tokens",
        "flops",
        "flops_at",
        "lacking",
        "memory",
        "out_of_memory",
        "out_of_memory_exemplar",
        "padded_tokens",
        "prefill_tokens",
        "sender",
    )

    def __init__(self) -> None:
        self.sender: Sender | None = None
        """None while no such worker is connected."""
        self.lacking: frozenset[str] = frozenset()
        """Hooks that do not work in the worker: what they would have counted is unknown, not zero."""
        self.clocks: dict[str, StepTotals] = {}
        self.batches = Observed(families.BATCH)
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.padded_tokens = 0
        self.flops = 0.0
        self.flops_at: deque[tuple[int, float]] = deque(maxlen=_SAMPLES)
        """(when, `flops` by then), about one a second."""
        self.allocator: AllocatorState | None = None
        self.memory: MemoryState | None = None
        self.out_of_memory = 0
        self.out_of_memory_exemplar: Exemplar | None = None
        self._gpu_uuid = ""
        self._process = ""
        self._retries_before = 0
        self._ooms_before = 0

    @property
    def gpu_uuid(self) -> str:
        """The card, as far as it is believed; kept when the worker has gone, so that its series stay."""
        if self.sender is not None and self.sender.gpu_uuid:
            self._gpu_uuid = self.sender.gpu_uuid
        return self._gpu_uuid

    def came(self, sender: Sender) -> None:
        """A worker with this rank is connected."""
        if self._process != sender.hello.sender:
            self._end_process()
            self._process = sender.hello.sender
        self.sender = sender

    def went(self) -> None:
        """Its connection ended. What it held is unknown from now on; what it used is not undone."""
        _ = self.gpu_uuid
        self.sender = None

    def _end_process(self) -> None:
        if self.allocator is not None:
            self._retries_before += self.allocator.retries
            self._ooms_before += self.allocator.ooms
        self.allocator = None
        self.memory = None
        self.flops_at.clear()

    def allocated(self, state: AllocatorState) -> None:
        """The allocator's latest word. A count that sank was reset by somebody, and goes on from there."""
        old = self.allocator
        if old is not None:
            if state.at < old.at:
                return
            self._retries_before += old.retries if state.retries < old.retries else 0
            self._ooms_before += old.ooms if state.ooms < old.ooms else 0
        self.allocator = state

    def remembered(self, state: MemoryState) -> None:
        """What its memory is for; the latest word counts."""
        if self.memory is None or state.at >= self.memory.at:
            self.memory = state

    @property
    def retries(self) -> int:
        """Of this worker and those before it."""
        return self._retries_before + (self.allocator.retries if self.allocator is not None else 0)

    @property
    def ooms(self) -> int:
        """Of this worker and those before it."""
        return self._ooms_before + (self.allocator.ooms if self.allocator is not None else 0)

    def add(self, sums: StepSums, now_ns: int) -> None:
        """Take in steps. Raises ValueError for a wrong number of buckets, and then takes nothing."""
        if len(sums.requests) not in (0, len(self.batches.counts)):
            raise ValueError("wrong number of buckets of requests")
        if sums.clock not in CLOCKS:
            raise ValueError("unknown clock")
        totals = self.clocks.get(sums.clock)
        if totals is None:
            totals = self.clocks[sums.clock] = StepTotals()
        time_ns = sums.attributed_ns + sums.padding_ns + sums.dummy_ns + sums.unattributed_ns
        totals.seconds.add(sums.seconds, time_ns / 1e9)
        self.batches.add(sums.requests, sums.request_steps)
        prefill_ns = min(sums.prefill_ns, sums.attributed_ns)
        totals.prefill_ns += prefill_ns
        totals.decode_ns += sums.attributed_ns - prefill_ns
        totals.padding_ns += sums.padding_ns
        totals.dummy_ns += sums.dummy_ns
        totals.unattributed_ns += sums.unattributed_ns
        totals.idle_ns += sums.idle_ns
        totals.host_fed_ns += sums.host_fed_ns
        self.prefill_tokens += sums.prefill_tokens
        self.decode_tokens += sums.decode_tokens
        self.padded_tokens += sums.padded_tokens
        self.flops += sums.flops
        self._sample_flops(now_ns)

    def _sample_flops(self, now_ns: int) -> None:
        if not self.flops_at or now_ns - self.flops_at[-1][0] >= _SAMPLE_NS:
            self.flops_at.append((now_ns, self.flops))

    def flops_ratio(self, now_ns: int) -> float:
        """Modelled operations of the window ÷ the card's peak; NaN if one of them is unknown.

        The window's begin is the last sample that lies outside of it, so that an idle worker sinks to 0.
        """
        peak = self.sender.hello.peak_flops if self.sender is not None else 0.0
        if not peak > 0 or not self.flops > 0:
            return float("nan")
        self._sample_flops(now_ns)
        while len(self.flops_at) > 1 and self.flops_at[1][0] <= now_ns - FLOPS_WINDOW_NS:
            self.flops_at.popleft()
        since, before = self.flops_at[0]
        if now_ns <= since:
            return float("nan")
        seconds = (now_ns - max(since, now_ns - FLOPS_WINDOW_NS)) / 1e9
        return max(0.0, self.flops - before) / (peak * seconds)


def fragmentation(state: AllocatorState) -> float:
    """Inactive split ÷ reserved; NaN if nothing is reserved."""
    return state.inactive_split / state.reserved if state.reserved > 0 else float("nan")
