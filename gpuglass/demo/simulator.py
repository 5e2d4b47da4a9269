"""A made-up node of eight GPUs that serves language models, for the demo and for trying rules without a GPU.

In flows a seed, out flow frames: what each GPU and each process does at every half second, always the same
for the same seed, and from some frames the scenario that the simulated driver plays. Rates, powers and
memory sizes are chosen to look like such a node; none of them was measured on one, so nothing about real
cards follows from them.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pynvml

from gpuglass.demo.scenario import A100, H200, Model, Scenario

STEP = 0.5
"""Seconds between two frames."""

FRAMES_KEPT = 64
"""Frames that can be asked for again without simulating from the start."""

MEBIBYTE = 1 << 20
UNATTRIBUTED_MIB = 14
"""Used memory that no process holds, as drivers show it on a card with contexts."""

XID_ILLEGAL_ACCESS = 31
"""A program touched memory that is not its own: NVIDIA's catalog calls it an MMU fault."""


# --- what a frame holds


@dataclass(frozen=True, slots=True)
class Program:
    """What a process runs and for whom. `name` is as the kernel keeps it: 15 bytes at most."""

    name: str
    namespace: str = ""
    pod: str = ""
    container: str = ""


@dataclass(frozen=True, slots=True)
class Process:
    """A process on one GPU."""

    program: Program
    pid: int
    started: float
    """Seconds after the simulation's start."""
    memory_mib: int
    sm: int
    """Percent of SM time."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What the programs of one GPU ask of it in one step. Percentages from 0 to 100, rates in bytes/s."""

    processes: tuple[Process, ...]
    busy: float = 0.0
    sm: float = 0.0
    tensor: float = 0.0
    dram: float = 0.0
    pcie_rate: float = 0.0
    nvlink_rate: float = 0.0
    """Of each link and direction."""
    xids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU in one frame. Counters run from the simulation's start."""

    demand: Demand
    used_mib: int
    power_mw: int
    power_capped: bool
    sm_mhz: int
    celsius: int
    energy_mj: int
    capped_ns: int
    pcie_bytes: int
    nvlink_bytes: int


@dataclass(frozen=True, slots=True)
class Frame:
    """The node at one moment."""

    time: float
    """Seconds after the simulation's start."""
    gpus: tuple[GpuState, ...]

    def processes(self) -> Iterator[Process]:
        """The processes of all GPUs."""
        for gpu in self.gpus:
            yield from gpu.demand.processes


# --- programs

Noise = Callable[[str, float, float], float]
"""(what, time, period): a smooth value from -1 to 1 that wanders within about one period."""


class Workload(Protocol):
    """What runs on one GPU."""

    def step(self, time: float, noise: Noise) -> Demand:
        """The demand from `time` on, one `STEP` after the call before."""


@dataclass(slots=True)
class Serving:
    """An engine like vLLM: it takes weights and KV cache at once and then follows the request rate."""

    service: str
    program: Program
    pid: int
    memory_mib: int
    load: float
    """Mean request rate as a share of what the GPU can serve; 0: nobody asks."""
    swing: float = 0.0
    """How far the rate goes up and down."""
    links: bool = False
    """Whether it is one rank of several that talk over NVLink."""

    def step(self, time: float, noise: Noise) -> Demand:
        rate = request_rate(self.service, self.load, self.swing, time, noise)
        own = noise(f"rank {self.pid}", time, 1.0)
        busy = within(100 * (1 - math.exp(-3.2 * rate)) + 2 * own * (rate > 0), 0, 100)
        sm = within(busy * (0.34 + 0.42 * min(rate, 1)) + 2.5 * own * (rate > 0), 0, busy)
        prefill = 0.5 + 0.35 * noise(f"{self.service} prompts", time, 2.5)
        return Demand(
            (Process(self.program, self.pid, 0.0, self.memory_mib, round(sm)),),
            busy=busy,
            sm=sm,
            tensor=sm * 0.55 * prefill,
            dram=within(busy * (0.95 - 0.55 * prefill), 0, 100),
            pcie_rate=3e6 + 220e6 * rate if rate else 0.0,
            nvlink_rate=9e9 * sm / 100 if self.links else 0.0,
        )


@dataclass(slots=True)
class Leaking:
    """A service whose memory grows until it cannot allocate and is started again."""

    program: Program
    pid: int
    start_mib: int
    limit_mib: int
    mib_per_second: float
    _held: float = 0.0
    _born: float = 0.0
    _down_until: float = 0.0
    _starts: int = 0

    def step(self, time: float, noise: Noise) -> Demand:
        if self._held == 0.0:
            if time < self._down_until:
                return Demand(())
            self._held, self._born, self._starts = float(self.start_mib), time, self._starts + 1
        self._held += self.mib_per_second * STEP * (1 + 0.5 * noise("leak", time, 4.0))
        if self._held > self.limit_mib:
            self._held, self._down_until = 0.0, time + 8.0
            return Demand(())
        rate = request_rate("embeddings", 0.35, 0.5, time, noise)
        busy = within(62 * rate + 12 + 6 * noise("embeddings", time, 0.8), 0, 100)
        sm = busy * 0.46
        process = Process(self.program, self.pid + self._starts - 1, self._born, int(self._held), round(sm))
        return Demand((process,), busy=busy, sm=sm, tensor=sm * 0.4, dram=busy * 0.5, pcie_rate=1.4e9 * rate)


@dataclass(slots=True)
class Training:
    """A batch job: steps at full speed, and a checkpoint now and then."""

    program: Program
    pid: int
    memory_mib: int
    checkpoint_every: float = 42.0
    checkpoint_seconds: float = 4.0

    def step(self, time: float, noise: Noise) -> Demand:
        if time % self.checkpoint_every > self.checkpoint_every - self.checkpoint_seconds:
            process = Process(self.program, self.pid, 0.0, self.memory_mib, 2)
            return Demand((process,), busy=6.0, sm=2.0, dram=4.0, pcie_rate=11e9)
        own = noise("training", time, 1.5)
        sm = 88 + 3 * own
        process = Process(self.program, self.pid, 0.0, self.memory_mib, round(sm))
        return Demand(
            (process,), busy=98.5 + own, sm=sm, tensor=57 + 4 * own, dram=61 + 4 * own, pcie_rate=0.6e9
        )


@dataclass(slots=True)
class Shared:
    """A small steady service beside a notebook that sometimes dies of an illegal memory access."""

    service: Program
    service_pid: int
    notebook: Program
    notebook_pid: int
    _died: float | None = None
    _starts: int = 0
    _born: float = 0.0
    _next_fault: float = 12.0

    def step(self, time: float, noise: Noise) -> Demand:
        calm = 0.5 + 0.5 * noise("requests", time, 5.0)
        xids: tuple[int, ...] = ()
        if self._died is not None and time >= self._died + 6.0:
            self._died, self._born, self._starts = None, time, self._starts + 1
        if self._died is None and time >= self._next_fault:
            xids, self._died = (XID_ILLEGAL_ACCESS,), time
            self._next_fault = time + 80.0 + 25.0 * noise("fault", time, 7.0)
        service_sm = 6 + 6 * calm
        processes = [Process(self.service, self.service_pid, 0.0, 9_300, round(service_sm))]
        notebook_sm = 0.0
        if self._died is None:
            cell_runs = noise("cell", time, 6.0) > -0.2
            notebook_sm = 24 + 8 * noise("cell load", time, 1.0) if cell_runs else 0.0
            pid = self.notebook_pid + self._starts
            memory = 18_400 + (6_200 if cell_runs else 0)
            processes.append(Process(self.notebook, pid, self._born, memory, round(notebook_sm)))
        sm = service_sm + notebook_sm
        busy = within(sm * 1.7 + 3, 0, 100)
        return Demand(
            tuple(processes),
            busy=busy,
            sm=sm,
            tensor=sm * 0.2,
            dram=sm * 0.6,
            pcie_rate=4e6 * sm,
            xids=xids,
        )


def within(value: float, low: float, high: float) -> float:
    """`value`, or the bound that it passed."""
    return max(low, min(high, value))


def request_rate(service: str, load: float, swing: float, time: float, noise: Noise) -> float:
    """Requests as a share of capacity: two tides, a wandering part, never below 0 nor above 1.3."""
    tide = 0.55 * math.sin(time / 9.7 + len(service)) + 0.2 * math.sin(time / 3.1 + 2 * len(service))
    return within(load * (1 + swing * (tide + 0.5 * noise(service, time, 3.0))), 0, 1.3)


# --- the node


def _vllm(pod: str, name: str = "VLLM::EngineCor") -> Program:
    return Program(name, "inference", pod, "vllm")


@dataclass(frozen=True, slots=True)
class Place:
    """A GPU of the node: its model, what runs on it, and the power limit if an operator lowered it."""

    model: Model
    workload: Workload
    limit_watts: int | None = None


def node() -> tuple[Place, ...]:
    """The demo's node: six H200 and two A100."""
    llama = _vllm("llama-70b-0", "VLLM::Worker_TP")
    return (
        Place(H200, Serving("llama-70b", llama, 18_201, 128_900, 0.55, 0.8, links=True)),
        Place(H200, Serving("llama-70b", llama, 18_202, 128_860, 0.55, 0.8, links=True)),
        Place(H200, Serving("qwen-32b", _vllm("qwen-32b-0"), 20_117, 128_512, 0.22, 0.9)),
        Place(H200, Serving("batch", _vllm("mixtral-0"), 23_640, 129_310, 1.15, 0.1), limit_watts=480),
        Place(H200, Serving("cold", _vllm("whisper-0"), 25_003, 64_220, 0.0)),
        Place(
            H200,
            Leaking(Program("python3", "search", "embed-0", "server"), 31_000, 31_000, 138_000, 160.0),
        ),
        Place(A100, Training(Program("torchrun"), 40_512, 74_300)),
        Place(
            A100,
            Shared(
                Program("tritonserver", "search", "rerank-0", "triton"),
                42_118,
                Program("ipykernel_launc", "research", "notebook-ada", "notebook"),
                51_000,
            ),
        ),
    )


@dataclass(slots=True)
class Card:
    """Heat, power and counters of one GPU."""

    model: Model
    limit_watts: int | None
    _celsius: float = 34.0
    _energy_mj: float = 0.0
    _capped_ns: float = 0.0
    _pcie: float = 0.0
    _nvlink: float = 0.0

    def number(self, key: str) -> float:
        """A value of the model."""
        value = self.model.values[key]
        assert isinstance(value, (int, float))
        return float(value)

    def step(self, demand: Demand, jitter: float) -> GpuState:
        """The card under a demand that lasts one step; `jitter` is from -1 to 1."""
        idle, full = self.number("power_mw") / 1000, self.number("power_default_limit_mw") / 1000
        limit = float(self.limit_watts or full)
        wanted = idle + (full - idle) * (0.16 * demand.busy + 0.78 * demand.sm + 0.06 * demand.dram) / 100
        if demand.processes and demand.busy < 1:
            wanted += 45  # a context keeps the clocks up
        capped = wanted > limit
        watts = (limit * (1 - 0.006 * (1 + jitter)) if capped else wanted) + 1.5 * jitter
        fastest = self.number("clock_max_sm")
        clock = fastest * math.sqrt(limit / wanted) if capped else fastest
        if not demand.processes:
            clock = self.number("clock_sm")
        goal = 29 + 44 * watts / full
        self._celsius += (goal - self._celsius) * STEP / 14
        self._energy_mj += watts * 1000 * STEP
        self._capped_ns += STEP * 1e9 if capped else 0
        self._pcie += demand.pcie_rate * STEP
        self._nvlink += demand.nvlink_rate * STEP
        used = sum(process.memory_mib for process in demand.processes)
        return GpuState(
            demand,
            used_mib=used + UNATTRIBUTED_MIB if used else 0,
            power_mw=round(watts * 1000),
            power_capped=capped,
            sm_mhz=round(clock / 15) * 15,
            celsius=round(self._celsius),
            energy_mj=round(self._energy_mj),
            capped_ns=round(self._capped_ns),
            pcie_bytes=round(self._pcie),
            nvlink_bytes=round(self._nvlink),
        )


@dataclass(slots=True)
class Simulation:
    """The node over time. `frame(n)` depends on the seed and on n only, not on what was asked before."""

    seed: int = 7
    places: tuple[Place, ...] = ()
    _cards: tuple[Card, ...] = ()
    _frames: deque[Frame] = field(default_factory=lambda: deque(maxlen=FRAMES_KEPT))
    _next: int = 0

    def __post_init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.places = node()
        self._cards = tuple(Card(place.model, place.limit_watts) for place in self.places)
        self._frames.clear()
        self._next = 0

    def frame(self, number: int) -> Frame:
        """The frame at `number * STEP` seconds."""
        if number < 0:
            raise ValueError(f"frame {number}: the first one is 0")
        if number < self._next - len(self._frames):
            self._restart()
        while self._next <= number:
            self._frames.append(self._step(self._next * STEP))
            self._next += 1
        return self._frames[number - self._next]

    def frames(self, start: float, end: float) -> tuple[Frame, ...]:
        """The frame in force at `start` (not before 0) and those up to `end`, in seconds."""
        first = max(0, math.floor(start / STEP))
        return tuple(self.frame(number) for number in range(first, max(first, math.floor(end / STEP)) + 1))

    def _step(self, time: float) -> Frame:
        states = []
        for index, (place, card) in enumerate(zip(self.places, self._cards, strict=True)):
            demand = place.workload.step(time, self._noise)
            states.append(card.step(demand, self._noise(f"card {index}", time, 1.0)))
        return Frame(time, tuple(states))

    def _noise(self, what: str, time: float, period: float) -> float:
        cell, part = divmod(time / period, 1.0)
        before, after = self._random(what, int(cell)), self._random(what, int(cell) + 1)
        part = part * part * (3 - 2 * part)
        return before + (after - before) * part

    def _random(self, what: str, cell: int) -> float:
        return random.Random(f"{self.seed} {what} {cell}").uniform(-1, 1)


# --- what the driver plays


def scenario(places: Sequence[Place], frames: Sequence[Frame], clock_start: float) -> Scenario:
    """The driver's scenario over some frames in a row; the first one also stands for all time before it.

    `clock_start` is the simulation's start on CLOCK_MONOTONIC. Counters are written as they are, so a
    scenario of later frames continues them.
    """
    out = Scenario().clock(clock_start)
    out.driver("570.133.20", cuda="12.8", nvml="12.570.133.20").count(len(places))
    for index, place in enumerate(places):
        out.model(index, place.model)
        if place.limit_watts is not None:
            out.gpu(index, power_limit_mw=place.limit_watts * 1000)
        before: GpuState | None = None
        for frame in frames:
            state = frame.gpus[index]
            at = out if before is None else out.at(frame.time)
            _write_state(at, index, place.model, state, before)
            for xid in state.demand.xids:
                out.at(frame.time).event(index, "xid", xid)
            before = state
    return out


def _write_state(out: Scenario, gpu: int, model: Model, state: GpuState, before: GpuState | None) -> None:
    demand = state.demand
    busy = round(demand.busy)
    out.gpu(
        gpu,
        util_gpu=busy,
        util_mem=round(demand.dram * 0.9),
        used_mib=state.used_mib,
        bar1_used_mib=2 + 4 * len(demand.processes),
        power_mw=state.power_mw,
        energy_mj=state.energy_mj,
        temp_gpu=state.celsius,
        temp_mem=state.celsius + 7,
        clock_sm=state.sm_mhz,
        clock_graphics=state.sm_mhz,
        clocks_event_reasons=_clock_reasons(state),
        pcie_tx_bytes=state.pcie_bytes // 3,
        pcie_rx_bytes=state.pcie_bytes,
    )
    out.field(gpu, pynvml.NVML_FI_DEV_PERF_POLICY_POWER, state.capped_ns)
    if model.nvlinks:
        out.nvlink(gpu, tx_bytes=state.nvlink_bytes, rx_bytes=state.nvlink_bytes)
    if model.values["gpm_support"]:
        out.gpm(gpu, gpm_metrics(demand))
    for process in demand.processes:
        out.process(gpu, process.pid, mem_mib=process.memory_mib, sm=process.sm)
    for pid in _ended(before, demand.processes):
        out.gone(gpu, pid)


def _clock_reasons(state: GpuState) -> int:
    if state.power_capped:
        return int(pynvml.nvmlClocksEventReasonSwPowerCap)
    return int(pynvml.nvmlClocksEventReasonGpuIdle) if state.demand.busy < 1 else 0


def _ended(before: GpuState | None, now: Iterable[Process]) -> set[int]:
    earlier = set() if before is None else {process.pid for process in before.demand.processes}
    return earlier - {process.pid for process in now}


def gpm_metrics(demand: Demand) -> dict[int, float]:
    """GPM's percentages, and PCIe in MiB/s, for a demand."""
    percent = {
        pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL: demand.busy,
        pynvml.NVML_GPM_METRIC_SM_UTIL: demand.sm,
        pynvml.NVML_GPM_METRIC_SM_OCCUPANCY: demand.sm * 0.31,
        pynvml.NVML_GPM_METRIC_INTEGER_UTIL: demand.sm * 0.22,
        pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: demand.tensor,
        pynvml.NVML_GPM_METRIC_HMMA_TENSOR_UTIL: demand.tensor,
        pynvml.NVML_GPM_METRIC_DFMA_TENSOR_UTIL: 0.0,
        pynvml.NVML_GPM_METRIC_DMMA_TENSOR_UTIL: 0.0,
        pynvml.NVML_GPM_METRIC_IMMA_TENSOR_UTIL: 0.0,
        pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: demand.dram,
        pynvml.NVML_GPM_METRIC_FP64_UTIL: 0.0,
        pynvml.NVML_GPM_METRIC_FP32_UTIL: demand.sm * 0.12,
        pynvml.NVML_GPM_METRIC_FP16_UTIL: demand.sm * 0.08,
        pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC: demand.pcie_rate / 3 / MEBIBYTE,
        pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC: demand.pcie_rate / MEBIBYTE,
    }
    return {metric: round(value, 2) for metric, value in percent.items()}
