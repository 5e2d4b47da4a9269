"""Fleets for the tests of cost: what is on which GPU, as series, and what each part costs, calculated anew.

The calculation here follows the description in recording_rules/README.md, not the rules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from gpuglass.families import engine, gpu, prices
from tests.recording_rules.promtool import Series, counter, series
from tests.recording_rules.test_devices import A100, H100
from tests.recording_rules.test_engines import probed

MINUTES = 8
PARTS = ("prefill", "decode", "padding", "gap")


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """An engine: its GPUs with seconds per second of each of `PARTS`, tokens, tenants' weights, and wasted
    GPU time as a share of what its requests used."""

    model_name: str
    use: Mapping[int, tuple[float, float, float, float]]
    tokens: tuple[float, float, float]
    tenants: tuple[float, ...]
    wasted: float


@dataclass(frozen=True, slots=True)
class Job:
    """A job: its GPUs with the SM time that it uses of each."""

    use: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Fleet:
    """GPUs (their card), prices by card, and who is on them."""

    cards: tuple[str, ...]
    prices: Mapping[str, float]
    engines: tuple[EngineLoad, ...]
    jobs: tuple[Job, ...]

    def series(self) -> list[Series]:
        """All of it as an agent on each of two nodes would export it."""
        made: list[Series] = []
        for number, card in enumerate(self.cards):
            labels = _device(number)
            made.append(series(gpu.INFO, 1, MINUTES, **labels, model=card))
            made.append(series(gpu.MEMORY_TOTAL, 80e9, MINUTES, **labels))
            made.append(series(gpu.BUSY, 0.5, MINUTES, **labels, source="gpm"))
        for node in "ab":
            for card, price in self.prices.items():
                labels = {"instance": f"{node}:9955", "model": card, "currency": "USD", "example": "false"}
                made.append(series(prices.GPU_HOUR, price, MINUTES, **labels))
        for number, load in enumerate(self.engines):
            made += _engine(number, load)
        for number, job in enumerate(self.jobs):
            made += _job(number, job)
        return made

    def holders(self) -> dict[int, dict[str, float]]:
        """What each holder (engine0, job1, …) uses of each GPU."""
        found: dict[int, dict[str, float]] = defaultdict(dict)
        for number, load in enumerate(self.engines):
            for on, parts in load.use.items():
                found[on][f"engine{number}"] = sum(parts)
        for number, job in enumerate(self.jobs):
            for on, use in job.use.items():
                found[on][f"job{number}"] = use
        return found

    def cost_of(self, holder: str) -> float:
        """Cost per hour that a holder answers for."""
        total = 0.0
        for on, uses in self.holders().items():
            if holder in uses:
                used = sum(uses.values())
                share = uses[holder] / max(used, 1) + max(1 - used, 0) / len(uses)
                total += share * self.prices.get(self.cards[on], 0)
        return total

    def total(self) -> float:
        """GPUs times their prices."""
        return sum(self.prices.get(card, 0) for card in self.cards)

    def model_cost(self) -> dict[str, float]:
        """Allocation of each model."""
        costs: dict[str, float] = defaultdict(float)
        for number, load in enumerate(self.engines):
            costs[load.model_name] += self.cost_of(f"engine{number}")
        return dict(costs)


def _device(number: int) -> dict[str, str]:
    node = "ab"[number % 2]
    return {"instance": f"{node}:9955", "device": f"nvidia{number // 2}", "gpu_uuid": f"GPU-{number}"}


def _engine(number: int, load: EngineLoad) -> list[Series]:
    labels = probed(number, model_name=load.model_name)
    made = [series(engine.INFO, 1, MINUTES, **labels, engine_name="vllm", engine_version="1")]
    for rank, (on, parts) in enumerate(load.use.items()):
        worker = {**labels, "rank": str(rank), "gpu_uuid": f"GPU-{on}", "clock": "cuda"}
        for part, rate in zip(PARTS[:3], parts, strict=False):
            made.append(counter(engine.GPU_SECONDS_BY_PART, rate, MINUTES, **worker, part=part))
        made.append(counter(engine.IDLE, parts[3], MINUTES, **worker))
    used = sum(parts[0] + parts[1] for parts in load.use.values())
    for tenant, weight in enumerate(load.tenants):
        share = used * weight / sum(load.tenants)
        made.append(counter(engine.TENANT_GPU, share, MINUTES, **labels, tenant=f"t{tenant}"))
    for kind, rate in zip(("prompt", "cached", "output"), _counted(load.tokens), strict=True):
        made.append(counter(engine.TENANT_TOKENS, rate, MINUTES, **labels, tenant="t0", kind=kind))
    if load.wasted:
        made.append(
            counter(engine.WASTED, used * load.wasted, MINUTES, **labels, tenant="t0", reason="abort")
        )
    return made


def _counted(tokens: Sequence[float]) -> tuple[float, float, float]:
    """Input, cached and output tokens as the probe counts them: prompt includes what was cached."""
    return (tokens[0] + tokens[1], tokens[1], tokens[2])


def _job(number: int, job: Job) -> list[Series]:
    made = []
    for on, use in job.use.items():
        labels = {
            **_device(on),
            **{"workload_namespace": "train", "workload_pod": f"job-{number}", "process": "python3"},
        }
        made.append(series(gpu.PROCESS_MEMORY, 20e9, MINUTES, **labels))
        made.append(series(gpu.PROCESS_SM, use, MINUTES, **labels))
    return made


_RATE = st.integers(0, 60).map(lambda hundredths: hundredths / 100)
_TOKENS = st.sampled_from((0.0, 3.0, 250.0, 4000.0))


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    """Up to five GPUs of two cards, one of which may have no price, with engines and jobs that share them."""
    count = draw(st.integers(1, 5))
    cards = tuple(draw(st.sampled_from((H100, A100))) for _ in range(count))
    some = st.sets(st.integers(0, count - 1), min_size=1, max_size=count)
    engines = tuple(
        EngineLoad(
            draw(st.sampled_from(("deepseek", "qwen"))),
            {on: draw(st.tuples(_RATE, _RATE, _RATE, _RATE)) for on in sorted(draw(some))},
            draw(st.tuples(_TOKENS, _TOKENS, _TOKENS)),
            tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))),
            draw(st.sampled_from((0.0, 0.25, 1.5))),
        )
        for _ in range(draw(st.integers(0, 3)))
    )
    jobs = tuple(
        Job({on: draw(st.integers(0, 100)) / 100 for on in sorted(draw(some))})
        for _ in range(draw(st.integers(0, 2)))
    )
    priced = draw(st.sampled_from(({H100: 4.0, A100: 1.5}, {H100: 3.25})))
    return Fleet(cards, priced, engines, jobs)
