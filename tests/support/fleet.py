"""A simulated fleet: every family of the catalog, with plausible values, as text for promtool's backfilling.

In: how many GPUs, and times. Out: samples by family, counters as they grow. Eight GPUs are two nodes with
two kinds of cards, four engines of two models, a training job and an idle GPU; larger fleets repeat that.
Values follow the hour of the day and the weekday, and are the same for the same time however often and
densely they are asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from gpuglass import catalog
from gpuglass.families import anomaly, engine, gpu, prices
from gpuglass.family import Family, Kind, Tier
from recording_rules.foreign import VLLM_INTER_TOKEN
from tests.support.fleet_values import (
    BY_UNIT,
    CARDS,
    CHOICES,
    GIB,
    MODELS,
    PRICES,
    RANGES,
    RATES,
    RESERVED,
    SPECIAL,
    TENANTS,
    VLLM_BOUNDS,
    WEIGHTS,
)

FloatArray = NDArray[np.float64]
Labels = dict[str, str]

DAY = 86_400.0
OLDER_PROBE = "chat-1"
"""The engine whose probe does not tell what its tensors are."""
_GRID = 60.0
"""Seconds between the points at which counters are integrated."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of the fleet and what runs on it."""

    number: int
    node: str
    device: str
    uuid: str
    card: str
    use: str
    """`engine`, `job` or `idle`."""
    pod: str = ""
    model_name: str = ""
    rank: str = ""


def gpus(count: int, models: int = 2) -> list[Gpu]:
    """The fleet's GPUs: nodes of four up to eight GPUs, of eight beyond; a half has engines of two ranks."""
    per_node = 4 if count <= 8 else 8
    found = []
    for number in range(count):
        node, slot = divmod(number, per_node)
        group, place = divmod(number, 4)
        uuid = f"GPU-{number:08x}-0000-4000-8000-{number:012x}"
        card = CARDS[node % len(CARDS)] if count > 8 else CARDS[node % 2]
        use, pod, model, rank = "idle", "", "", ""
        if place < 2:
            use, pod, rank, model = "engine", f"serve-{group}", str(place), _model(group // 2 * 2, models)
        elif (place == 2) == (node % 2 == 0):
            use, pod, rank, model = "engine", f"chat-{group}", "0", _model(group // 2 * 2 + 1, models)
        elif place == 2:
            use, pod = "job", f"train-{group}"
        found.append(Gpu(number, f"gpu-node-{node:03}", f"nvidia{slot}", uuid, card, use, pod, model, rank))
    return found


def _model(number: int, models: int) -> str:
    number %= models
    return MODELS[number] if number < len(MODELS) else f"model-{number:03}"


@dataclass(frozen=True, slots=True)
class Block:
    """Samples of one family: values of shape (times, series)."""

    name: str
    labels: list[Labels]
    values: FloatArray


def load(times: FloatArray, phase: FloatArray) -> FloatArray:
    """Load from 0 to 1, shape (times, series): the hour of the day, the weekday, and bursts of minutes."""
    at = times[:, None]
    day = 0.5 - 0.5 * np.cos(2 * np.pi * (at / DAY - 0.2))
    week = np.where((at // DAY + 3) % 7 < 5, 1.0, 0.55)
    burst = 0.5 + 0.5 * np.sin(at / 97.0 + 7 * phase) * np.sin(at / 41.0 + 13 * phase)
    result: FloatArray = np.clip((0.15 + 0.6 * day * week) * (0.7 + 0.6 * burst), 0.0, 1.0)
    return result


@dataclass(frozen=True, slots=True)
class Fleet:
    """All that is simulated. `start` is the time from which counters grow."""

    gpus: Sequence[Gpu]
    start: float
    cluster: str = "eu-1"

    def blocks(
        self, times: FloatArray, tiers: Sequence[Tier], names: Sequence[str] | None = None
    ) -> Iterator[Block]:
        """Samples at `times` of all families of the tiers, or of those among `names`."""
        for family in catalog.BY_NAME.values():
            if family.tier in tiers and (names is None or family.name in names):
                yield from self._family(family, times)

    def foreign(self, times: FloatArray) -> Iterator[Block]:
        """What vLLM itself exports and the probe does not: its histogram of the time between tokens."""
        labels = [
            {"job": "vllm", "instance": f"{own['workload_pod']}:8000", "cluster": self.cluster}
            | {"model_name": own["model_name"], "engine": own["engine"]}
            for own, _ in self._engines()
        ]
        phases, weights = np.array([_hash(sorted(own.items())) for own in labels]), np.ones(len(labels))
        yield from self._histogram(VLLM_INTER_TOKEN.name, VLLM_BOUNDS, labels, times, phases, weights)

    def _family(self, family: Family, times: FloatArray) -> Iterator[Block]:
        labels, weights = self._series(family)
        if not labels:
            return
        phases = np.array([_hash(sorted(own.items())) for own in labels])
        weight = np.array(weights)
        if family.kind is Kind.HISTOGRAM:
            yield from self._histogram(family.name, family.buckets, labels, times, phases, weight)
            return
        yield Block(family.name, labels, self._values(family, labels, times, phases, weight))

    def _values(
        self, family: Family, labels: list[Labels], times: FloatArray, phases: FloatArray, weights: FloatArray
    ) -> FloatArray:
        name = family.name
        if family.kind is Kind.COUNTER:
            return self._grown(RATES.get(name, 0.5), times, phases, weights)
        shape = load(times, phases) * weights
        if name.endswith("_timestamp_seconds"):
            recent = name in (anomaly.LAST_EVALUATION.name,)
            stamp: FloatArray = (times[:, None] - 30 if recent else self.start - 3_600) + 0 * shape
            return stamp
        if family.kind is Kind.INFO or family.help.startswith("Always 1"):
            return np.ones_like(shape)
        if name == prices.GPU_HOUR.name:
            priced: FloatArray = np.ones_like(shape) * np.array(
                [PRICES.get(own.get("model", ""), 2.0) for own in labels]
            )
            return priced
        low, high = RANGES.get(name, BY_UNIT.get(family.unit, (0.0, 2.0)))
        values: FloatArray = low + (high - low) * shape
        if name == gpu.MEMORY_USED.name:
            idle = {one.uuid for one in self.gpus if one.use == "idle"}
            values = np.array([0.5 if own["gpu_uuid"] in idle else 74.0 for own in labels]) * GIB + 0 * shape
        elif name == gpu.MEMORY_FREE.name:
            values = 6 * GIB + 0 * shape
        elif name == gpu.MEMORY_UNATTRIBUTED.name:
            idle = {one.uuid for one in self.gpus if one.use == "idle"}
            values = np.array([0.5 if own["gpu_uuid"] in idle else 1.0 for own in labels]) * GIB + 0 * shape
        elif name == engine.MEMORY.name:
            values = _parts_of_memory(labels, times)
        elif name == gpu.PROCESS_MEMORY.name:
            values = 73 * GIB + 0 * shape
        elif name == engine.FRAGMENTATION.name:
            hour = (times[:, None] % DAY) // 3_600
            values = values + np.where((hour >= 19) & (hour < 21), 0.25, 0.0)
        elif name in (engine.TENANT_KV_SHARE.name, engine.EXPERT_TENANT.name):
            values = values / len(TENANTS)
        elif name in (engine.KV_HOLDER.name,):
            values = values / np.array([float(own["holder"]) for own in labels])
        elif name == engine.EXPERT_RANK.name:
            values = 0.4 + 0.2 * phases[None, :] + 0 * shape
        whole = (
            family.unit == ""
            and high - low >= 1
            and name not in (engine.EXPERT_IMBALANCE.name, anomaly.SCORE.name)
        )
        return (
            np.floor(values) if whole and name.split("_")[-1] in ("requests", "blocks", "hottest") else values
        )

    def _grown(self, rate: float, times: FloatArray, phases: FloatArray, weights: FloatArray) -> FloatArray:
        """A counter: the integral of the load since `start`, the same at a time whichever times are asked."""
        grid = np.arange(self.start, times[-1] + _GRID, _GRID)
        loads = load(grid, phases) * weights
        total = np.concatenate([np.zeros((1, loads.shape[1])), np.cumsum(loads[:-1], axis=0)]) * _GRID * rate
        grown: FloatArray = np.column_stack([np.interp(times, grid, column) for column in total.T])
        return grown

    def _histogram(
        self,
        name: str,
        buckets: Sequence[float],
        labels: list[Labels],
        times: FloatArray,
        phases: FloatArray,
        weights: FloatArray,
    ) -> Iterator[Block]:
        count = self._grown(6.0, times, phases, weights)
        bounds = np.array([*buckets, np.inf])
        middle = len(buckets) * 0.6
        share = 1 / (1 + np.exp(-(np.arange(len(bounds)) - middle) / 0.8))
        share[-1] = 1.0
        for bound, part in zip(bounds, share, strict=True):
            le = "+Inf" if np.isinf(bound) else repr(float(bound))
            yield Block(f"{name}_bucket", [own | {"le": le} for own in labels], count * part)
        yield Block(f"{name}_count", labels, count)
        yield Block(f"{name}_sum", labels, count * buckets[int(middle)])

    # Which series a family has

    def _series(self, family: Family) -> tuple[list[Labels], list[float]]:
        found: list[Labels] = []
        weights: list[float] = []
        for own, weight in self._entities(family):
            free = [name for name in family.labels if name not in own]
            choices = [self._choices(family, name) for name in free]
            for values in itertools.product(*choices):
                labels = own | dict(zip(free, values, strict=True))
                share = self._share(labels) if family.kind in (Kind.COUNTER, Kind.HISTOGRAM) else 1.0
                found.append({name: value for name, value in labels.items() if value != ""})
                weights.append(weight * share)
        return found, weights

    @staticmethod
    def _share(labels: Labels) -> float:
        """How a counter's growth is spread over label values: tenants fall off, few experts are hot."""
        share = 1.0
        for name, value in labels.items():
            share *= WEIGHTS.get((name, value), 1.0)
        if labels.get("tenant") in TENANTS:
            share *= 1.6 / (1 + TENANTS.index(labels["tenant"]))
        if "expert" in labels:
            share *= 0.4 + 2.5 * _hash((labels["layer"], labels["expert"], labels["model_name"])) ** 6
        return share

    def _choices(self, family: Family, label: str) -> tuple[str, ...]:
        if label in SPECIAL.get(family.name, {}):
            return SPECIAL[family.name][label]
        if label == "kind":
            return ("device", "virtual")
        if label == "clock" and family.name.startswith("gpuglass_engine"):
            return ("cuda",)
        if label == "outcome" and family.kind is Kind.HISTOGRAM:
            return ("stop",)
        if label in CHOICES:
            return CHOICES[label]
        return (label,)

    def _entities(self, family: Family) -> Iterator[tuple[Labels, float]]:
        """Label sets that say whose series a family is, with how busy that is."""
        names = set(family.labels)
        if family.source_labels:
            yield from self._of_sidecar(family)
        elif "role" in names and "model_name" in names:
            for engine_labels, members in self._engines():
                own = engine_labels | self._target(members[0])
                roles = {"role": "worker"} | (
                    {"rank": "0", "sender": f"s{members[0].number}"} if "sender" in names else {}
                )
                gpu_label = {"gpu_uuid": members[0].uuid} if "gpu_uuid" in names else {}
                yield own | roles | gpu_label, 1.0
        elif "model_name" in names and "rank" in names:
            for engine_labels, members in self._engines():
                if family in (engine.MEMORY, engine.ACTIVATION_PEAK) and members[0].pod == OLDER_PROBE:
                    continue
                for member in members:
                    yield (
                        engine_labels | self._target(member) | {"rank": member.rank, "gpu_uuid": member.uuid},
                        1.0,
                    )
        elif "model_name" in names:
            for engine_labels, members in self._engines():
                yield engine_labels | self._target(members[0]), 1.0
        elif "device" in names and "gpu_uuid" in names and "mig_uuid" not in names:
            yield from self._of_gpus(family, names)
        elif "mig_uuid" in names:
            if family is gpu.ALLOCATION_INFO:
                for one in self.gpus:
                    if one.pod:
                        workload = self._workload(one)
                        yield (
                            self._target(one)
                            | {
                                "device": one.device,
                                "gpu_uuid": one.uuid,
                                "resource": "nvidia.com/gpu",
                                "mig_uuid": "",
                            }
                            | workload,
                            1.0,
                        )
        elif "process" in names:
            for one in self.gpus:
                # A process on several GPUs is one where its GPU is no label.
                if one.pod and ("gpu_uuid" in names or one.rank != "1"):
                    own = self._target(one) | self._workload(one) | {"process": _process(one)}
                    yield (
                        own
                        | ({"pid": ""} if "pid" in names else {})
                        | ({"gpu_uuid": one.uuid} if "gpu_uuid" in names else {}),
                        1.0,
                    )
        elif family.owner.value == "anomaly":
            yield {"job": "gpuglass-anomaly", "instance": "sidecar:9960", "cluster": self.cluster}, 1.0
        elif "model" in names:  # prices
            for node in self._first_of_nodes():
                for card in sorted({one.card for one in self.gpus}):
                    yield self._target(node) | {"model": card}, 1.0
        else:
            for node in self._first_of_nodes():
                yield self._target(node), 1.0

    def _of_gpus(self, family: Family, names: set[str]) -> Iterator[tuple[Labels, float]]:
        for one in self.gpus:
            own = self._target(one) | {"device": one.device, "gpu_uuid": one.uuid}
            weight = {"engine": 1.0, "job": 0.7, "idle": 0.0}[one.use]
            if family is gpu.INFO:
                facts = (
                    "pci_bus_id",
                    "architecture",
                    "compute_capability",
                    "driver_version",
                    "cuda_version",
                    "mig_mode",
                )
                yield own | {"model": one.card} | dict.fromkeys(facts, "x"), 1.0
            elif "process" in names:
                if one.pod:
                    yield own | self._workload(one) | {"process": _process(one), "pid": ""}, weight
            elif family is gpu.ALLOCATION_INFO:
                if one.pod:
                    yield own | self._workload(one) | {"resource": "nvidia.com/gpu", "mig_uuid": ""}, 1.0
            elif family in (gpu.SM_ACTIVE, gpu.SM_OCCUPANCY, gpu.GRAPHICS_ACTIVE) and "A100" in one.card:
                continue  # GPM needs Hopper
            else:
                yield own, weight

    def _of_sidecar(self, family: Family) -> Iterator[tuple[Labels, float]]:
        for replica in ("sidecar-0:9960", "sidecar-1:9960"):
            base = {"job": "gpuglass-anomaly", "instance": replica, "cluster": self.cluster}
            if family in (anomaly.STRANDED, anomaly.STRANDED_SECONDS, anomaly.LEAK, anomaly.LEAK_RATE):
                for one in [one for one in self.gpus if one.use == "job"][:3]:
                    yield base | {"gpu_uuid": one.uuid, "process": "python"} | self._workload(one), 1.0
            elif family is anomaly.EXHAUSTION:
                for tenant in TENANTS[:3]:
                    yield base | {"tenant": tenant}, 1.0
            else:
                for model in sorted({one.model_name for one in self.gpus if one.model_name})[:20]:
                    rank = {"rank": "0"} if family in (anomaly.STRAGGLER, anomaly.STRAGGLER_RATIO) else {}
                    yield base | {"model_name": model} | rank, 1.0

    def _engines(self) -> Iterator[tuple[Labels, list[Gpu]]]:
        serving = [one for one in self.gpus if one.use == "engine"]
        for _, members in itertools.groupby(
            sorted(serving, key=lambda one: (one.pod, one.rank)), key=lambda one: one.pod
        ):
            own = list(members)
            workload = self._workload(own[0])
            yield {"model_name": own[0].model_name, "engine": "0", "server": ""} | workload, own

    def _first_of_nodes(self) -> Iterator[Gpu]:
        for _, members in itertools.groupby(self.gpus, key=lambda one: one.node):
            yield next(members)

    def _target(self, one: Gpu) -> Labels:
        return {"job": "gpuglass", "instance": f"{one.node}:9955", "cluster": self.cluster}

    @staticmethod
    def _workload(one: Gpu) -> Labels:
        namespace = "training" if one.use == "job" else "serving"
        return {"workload_namespace": namespace, "workload_pod": one.pod, "workload_container": "main"}


def _process(one: Gpu) -> str:
    return "python" if one.use == "job" else "VLLM::Worker"


def _parts_of_memory(labels: Sequence[Labels], times: FloatArray) -> FloatArray:
    """Parts that add up to what is reserved: activations come and go, what they leave is cached. An engine
    of two ranks has half of its KV cache on each."""
    columns = []
    for own in labels:
        worker = {name: value for name, value in own.items() if name != "part"}
        busy = load(times, np.array([_hash(sorted(worker.items()))]))[:, 0]
        kv_cache = (30 if own["workload_pod"].startswith("serve") else 60) * GIB + 0 * busy
        parts: dict[str, FloatArray] = {
            "weights": 62 * GIB - kv_cache,
            "kv_cache": kv_cache,
            "graphs": 1.5 * GIB + 0 * busy,
            "activations": (0.5 + 4 * busy) * GIB,
            "in_flight": 0.5 * GIB * busy,
        }
        parts["allocator_cache"] = RESERVED - np.sum(list(parts.values()), axis=0)
        columns.append(parts[own["part"]])
    return np.column_stack(columns)


def _hash(value: Any) -> float:
    """A number from 0 to 1 that belongs to the value, the same in every process."""
    return crc32(repr(value).encode()) / 0xFFFFFFFF
